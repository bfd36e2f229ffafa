// dat_cuda._C: facts about this build. The operators register themselves in ops.cpp when the
// library loads; this file stays free of torch.

#include <pybind11/pybind11.h>

#include <string>

namespace dat::cpu {
const char* simd_name();
}

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("Clang ") + __clang_version__;
#else
  return std::string("GCC ") + __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = DAT_VERSION;
  info["compiler"] = compiler();
  info["torch"] = DAT_TORCH_VERSION;
#if defined(DAT_WITH_CUDA)
  info["cuda"] = DAT_CUDA_VERSION;
  info["architectures"] = py::str(DAT_CUDA_ARCHITECTURES).attr("split")(";");
#else
  info["cuda"] = py::none();
  info["architectures"] = py::list();
#endif
  py::list simd;
  simd.append("baseline");
#if defined(DAT_HAVE_AVX2)
  simd.append("avx2");
#endif
#if defined(DAT_HAVE_AVX512)
  simd.append("avx512");
#endif
  info["simd"] = simd;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "Build information of dat_cuda; loading it registers the operators.";
  module.def("build_info", &build_info,
             "version, compiler, torch built against, cuda toolkit or None, architectures, simd");
  module.def("simd", &dat::cpu::simd_name, "The SIMD variant that the CPU kernels use here.");
}

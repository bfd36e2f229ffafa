// The operators on the emulated device: CUDA's kernels and launchers at work on CPU tensors.
#include <cstdlib>

#include "ops.h"

namespace {

struct EmulatedDevice : dat::CudaKernels {
  explicit EmulatedDevice(const dat::Tensor& features) : CudaKernels{features, nullptr} {}
};

}  // namespace

// The linker sends csrc/cuda here: tests choose how many multiprocessors the device has, which
// decides how its work is cut into blocks (tests/emulated.py).
extern "C" int __real_cudaDeviceGetAttribute(int* value, int attribute, int device);
extern "C" int __wrap_cudaDeviceGetAttribute(int* value, int attribute, int device) {
  constexpr int kMultiProcessorCount = 16;  // cudaDevAttrMultiProcessorCount
  const char* chosen = std::getenv("DAT_EMULATED_MULTIPROCESSORS");
  if (attribute != kMultiProcessorCount || !chosen)
    return __real_cudaDeviceGetAttribute(value, attribute, device);
  *value = std::atoi(chosen);
  return 0;
}

// DAT_LIBRARY: the name, which a macro of torch would take as it stands.
#define DEFINE_LIBRARY(name)                                  \
  STABLE_TORCH_LIBRARY(name, m) { dat::define_operators(m); } \
  STABLE_TORCH_LIBRARY_IMPL(name, CPU, m) { dat::implement_operators<EmulatedDevice>(m); }
DEFINE_LIBRARY(DAT_LIBRARY)

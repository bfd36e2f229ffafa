// Registers the operators of ops.h: on the CPU over csrc/cpu, on CUDA over csrc/cuda.
//
// They are written against LibTorch's stable ABI, so that one binary serves several releases of
// torch, CPU-only ones too. Autograd, fake kernels and defaults are in dat_cuda/functional.py.
#include "ops.h"

#include <torch/csrc/stable/accelerator.h>

#include "depthwise.h"
#include "offset_head.h"
#include "threads.h"
#include "transpose.h"
#include "windows.h"

namespace dat {
namespace {

struct CpuDevice {
  static constexpr bool reads_feature_dtype = false, adds_in_any_order = false;
  static constexpr bool writes_any_layout = true;

  explicit CpuDevice(const Tensor&) {}

  void run(const SampleForward& p) const { cpu::kernels().sample_forward(p, threads); }
  void run(const SampleBackward& p) const { cpu::kernels().sample_backward(p, threads); }
  void run(const AttentionForward& p) const { cpu::kernels().attention_forward(p, threads); }
  void run(const AttentionBackward& p, bool) const {  // deterministic in any case
    cpu::kernels().attention_backward(p, threads);
  }

  const cpu::Threads threads = torch_threads();
};

#if defined(DAT_WITH_CUDA)
namespace accelerator = torch::stable::accelerator;

// Launches on the current stream of the features' device, which is the current one meanwhile.
struct CudaDevice : CudaKernels {
  explicit CudaDevice(const Tensor& t)
      : CudaKernels{t, accelerator::getCurrentStream(t.get_device_index()).nativeHandle()},
        guard(t.get_device_index()) {}

  const accelerator::DeviceGuard guard;
};
#endif

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY(dat_cuda, m) {
  dat::define_operators(m);
  dat::define_window_operators(m);
  dat::define_depthwise_operators(m);
  dat::define_offset_head_operators(m);
  dat::define_transpose_operator(m);
}
STABLE_TORCH_LIBRARY_IMPL(dat_cuda, CPU, m) {
  dat::implement_operators<dat::CpuDevice>(m);
  dat::implement_window_operators(m);
  dat::implement_depthwise_operators(m);
  dat::implement_offset_head_operators(m);
  dat::implement_transpose_operator(m);
}
#if defined(DAT_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(dat_cuda, CUDA, m) { dat::implement_operators<dat::CudaDevice>(m); }
#endif

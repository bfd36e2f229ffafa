// Registers the operators of ops.h: on the CPU over csrc/cpu, on CUDA over csrc/cuda.
//
// They are written against LibTorch's stable ABI, so that one binary serves several releases of
// torch, CPU-only ones too. Autograd, fake kernels and defaults are in dat_cuda/functional.py.
#include "ops.h"

#include <torch/csrc/stable/accelerator.h>

#include "cpu/kernels.h"

namespace dat {
namespace {

void run_tasks(int tasks, void (*body)(void*, int), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(context, int(task));
  });
}

struct CpuDevice {
  static constexpr bool reads_feature_dtype = false, adds_in_any_order = false;

  explicit CpuDevice(const Tensor&) {}

  void run(const SampleForward& p) const { cpu::kernels().sample_forward(p, threads); }
  void run(const SampleBackward& p) const { cpu::kernels().sample_backward(p, threads); }
  void run(const AttentionForward& p) const { cpu::kernels().attention_forward(p, threads); }
  void run(const AttentionBackward& p, bool) const {  // deterministic in any case
    cpu::kernels().attention_backward(p, threads);
  }

  const cpu::Threads threads{int(torch::stable::get_num_threads()), run_tasks};
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

STABLE_TORCH_LIBRARY(dat_cuda, m) { dat::define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(dat_cuda, CPU, m) { dat::implement_operators<dat::CpuDevice>(m); }
#if defined(DAT_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(dat_cuda, CUDA, m) { dat::implement_operators<dat::CudaDevice>(m); }
#endif

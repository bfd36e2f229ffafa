// The operators on the emulated device: CUDA's kernels and launchers at work on CPU tensors.
#include "ops.h"

namespace {

struct EmulatedDevice : dat::CudaKernels {
  explicit EmulatedDevice(const dat::Tensor& features) : CudaKernels{features, nullptr} {}
};

}  // namespace

STABLE_TORCH_LIBRARY(dat_cuda_emulated, m) { dat::define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(dat_cuda_emulated, CPU, m) {
  dat::implement_operators<EmulatedDevice>(m);
}

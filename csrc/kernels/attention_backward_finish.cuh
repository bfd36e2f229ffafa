// Sums of what several blocks have of the same result, in a fixed order. A thread owns an element.
#pragma once

#include "common.cuh"

namespace dat::cuda {

struct SumJob {
  const void* parts;  // [count, size] in the accumulation type; null: nothing to do
  void* result;       // [size]
  int64_t size;
  int count;
  bool narrow;  // the result has the features' dtype
};

struct SumJobs {
  SumJob job[4];
};

template <class T>
__global__ void __launch_bounds__(256)
    attention_backward_finish_kernel(const __grid_constant__ SumJobs jobs) {
  using A = acc_t<T>;
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const SumJob& job = jobs.job[j];
    if (!job.parts) continue;
    if (i >= 0 && i < job.size) {
      A sum = 0;
      for (int part = 0; part < job.count; ++part)
        sum += static_cast<const A*>(job.parts)[part * job.size + i];
      if (job.narrow)
        static_cast<T*>(job.result)[i] = from_acc<T>(sum);
      else
        static_cast<A*>(job.result)[i] = sum;
    }
    i -= job.size;
  }
}

}  // namespace dat::cuda

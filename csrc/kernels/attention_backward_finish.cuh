// Sums of what several blocks have of the same result, in a fixed order. A thread owns four
// neighbouring elements, or one.
#pragma once

#include "common.cuh"

namespace dat::cuda {

constexpr int kSumVec = 4;

struct SumJob {
  const void* parts;  // [count, size] in the accumulation type; null: nothing to do
  void* result;       // [size]
  int64_t size;
  int count;
  bool narrow;  // the result has the features' dtype

  // Whether every part is a whole number of fours, hence aligned.
  __host__ __device__ bool wide() const { return size % kSumVec == 0; }
  __host__ __device__ int64_t threads() const { return wide() ? size / kSumVec : size; }
};

struct SumJobs {
  SumJob job[4];
};

// Elements [i, i + kVec) of the result.
template <class T, int kVec>
__device__ void sum_parts(const SumJob& job, int64_t i) {
  using A = acc_t<T>;
  using Wide = Vec<A, kVec>;
  Wide sum{};
  const auto* part = static_cast<const A*>(job.parts) + i;
  for (int n = 0; n < job.count; ++n, part += job.size) {
    const Wide more = *reinterpret_cast<const Wide*>(part);
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum.at[e] += more.at[e];
  }
  if (job.narrow) {
    Vec<T, kVec> narrow;
#pragma unroll
    for (int e = 0; e < kVec; ++e) narrow.at[e] = from_acc<T>(sum.at[e]);
    *reinterpret_cast<Vec<T, kVec>*>(static_cast<T*>(job.result) + i) = narrow;
  } else {
    *reinterpret_cast<Wide*>(static_cast<A*>(job.result) + i) = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(256)
    attention_backward_finish_kernel(const __grid_constant__ SumJobs jobs) {
  int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const SumJob& job = jobs.job[j];
    if (!job.parts) continue;
    const int64_t threads = job.threads();
    if (thread >= 0 && thread < threads) {
      if (job.wide())
        sum_parts<T, kSumVec>(job, thread * kSumVec);
      else
        sum_parts<T, 1>(job, thread);
    }
    thread -= threads;
  }
}

}  // namespace dat::cuda

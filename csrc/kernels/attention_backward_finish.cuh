// Sums of what several blocks have of the same result, in a fixed order.
#pragma once

#include "ptx.cuh"

namespace dat::cuda {

constexpr int kSumVec = 4;

struct SumJob {
  const void* parts;  // [count, size] in the accumulation type
  void* result;       // [size]
  int64_t size;
  int count;
  bool narrow;  // the result has the features' dtype

  // Whether every part is a whole number of fours, hence aligned.
  __host__ __device__ bool wide() const { return size % kSumVec == 0; }
  __host__ __device__ int64_t threads() const { return wide() ? size / kSumVec : size; }
};

// Elements [i, i + kVec) of the result.
template <class T, int kVec>
__device__ void sum_parts(const SumJob& job, int64_t i) {
  using A = acc_t<T>;
  using Wide = Vec<A, kVec>;
  Wide sum{};
  const auto* part = static_cast<const A*>(job.parts) + i;
  for (int n = 0; n < job.count; ++n, part += job.size) {
    Wide more;
    load_others(more, part);
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

// A block's share: `rows` rows of `count` elements, `pitch` apart, from `first` on.
template <class T>
__device__ void sum_rows(const SumJob& job, int64_t first, int rows, int pitch, int count) {
  if (count == pitch) count *= rows, rows = 1;
  if (rows == 1 && job.wide() && first % kSumVec == 0 && count % kSumVec == 0) {
    for (int i = threadIdx.x * kSumVec; i < count; i += blockDim.x * kSumVec)
      sum_parts<T, kSumVec>(job, first + i);
    return;
  }
  for (int row = 0; row < rows; ++row, first += pitch)
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum_parts<T, 1>(job, first + i);
}

// A whole result; a thread owns four neighbouring elements, or one.
template <class T>
__global__ void __launch_bounds__(256)
    attention_backward_finish_kernel(const __grid_constant__ SumJob job) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= job.threads()) return;
  if (job.wide())
    sum_parts<T, kSumVec>(job, thread * kSumVec);
  else
    sum_parts<T, 1>(job, thread);
}

}  // namespace dat::cuda

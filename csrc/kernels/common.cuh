// What every kernel uses: storage types and their conversions, vectors, warp reductions.
//
// Kernels know CUDA and csrc/math, never torch. A kernel computes in acc_t of its storage type:
// double for double, float for the others.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../params.h"

namespace dat::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_acc(acc_t<T> x) {
  return T(x);
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N values that move as one aligned access.
template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Vec {
  T at[N];
};

// Sum over the lanes whose index differs in the bits of `mask`.
template <class T>
__device__ __forceinline__ T sum_lanes(T x, int mask) {
  for (int bit = 1; bit < kWarp; bit *= 2)
    if (mask & bit) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

template <class T>
__device__ __forceinline__ T max_lanes(T x, int mask) {
  for (int bit = 1; bit < kWarp; bit *= 2)
    if (mask & bit) x = max(x, __shfl_xor_sync(kAllLanes, x, bit));
  return x;
}

// Whether kernels of an engine are compiled for this architecture: half precision runs on tensor
// cores from sm_80 on, before that, and only there, on CUDA cores.
template <class E>
__host__ __device__ constexpr bool is_compiled() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return !E::kTensorCores;
#else
  return E::kTensorCores || sizeof(typename E::Storage) > 2;
#endif
}

template <class I>
__host__ __device__ constexpr I divide_up(I a, I b) {
  return (a + b - 1) / b;
}

}  // namespace dat::cuda

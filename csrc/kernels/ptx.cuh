// The few instructions that CUDA C++ has no name for.
#pragma once

#include "common.cuh"

namespace dat::cuda {

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return unsigned(__cvta_generic_to_shared(p));
}

// x, of which the compiler knows nothing: what is computed from it stays where it is used, and is
// not made ready ahead of a loop or for paths that are not taken.
template <class N>
__device__ __forceinline__ N opaque(N x) {
  if constexpr (std::is_same_v<N, float>)
    asm volatile("" : "+f"(x));
  else
    asm volatile("" : "+r"(x));
  return x;
}

// Four 8x8 matrices of 16-bit values; lanes 8 i .. 8 i + 7 give the rows of matrix i, kOffset bytes
// from an address. Lane l gets of each the pair at (row l / 4, columns 2 (l % 4), + 1), transposed:
// (rows 2 (l % 4), + 1, column l / 4).
template <bool kTransposed, int kOffset = 0>
__device__ __forceinline__ void load_matrices(unsigned (&m)[4], unsigned address) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4+%5];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address), "n"(kOffset)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4+%5];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address), "n"(kOffset)
                 : "memory");
}

// c [16, 8] = a [16, 16] b [16, 8], added to c; to `top` and `bottom`, of the lane's two rows, if
// kFirst. Lane l holds of c rows l / 4 (c0, c1) and l / 4 + 8 (c2, c3), columns 2 (l % 4), + 1.
template <class T, bool kFirst = false>
__device__ __forceinline__ void mma(float& c0, float& c1, float& c2, float& c3,
                                    const unsigned (&a)[4], unsigned b0, unsigned b1, float top = 0,
                                    float bottom = 0) {
  const float d0 = kFirst ? top : c0, d1 = kFirst ? top : c1;
  const float d2 = kFirst ? bottom : c2, d3 = kFirst ? bottom : c3;
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(c0), "=f"(c1), "=f"(c2), "=f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(d0), "f"(d1), "f"(d2),
          "f"(d3));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(c0), "=f"(c1), "=f"(c2), "=f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(d0), "f"(d1), "f"(d2),
          "f"(d3));
}

template <class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned bits;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Asynchronous copy of kBytes (4, 8 or 16) to an address in shared memory, both sides aligned to
// that; zeros unless `inside`, and then nothing is read.
template <int kBytes>
__device__ __forceinline__ void copy_async(unsigned shared, const void* global, bool inside) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global),
               "n"(kBytes), "r"(inside ? kBytes : 0)
               : "memory");
#else
  using Word = Vec<unsigned, kBytes / 4>;
  *static_cast<Word*>(__cvta_shared_to_generic(shared)) =
      inside ? *static_cast<const Word*>(global) : Word{};
#endif
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// What other blocks of this launch have written: one value, or the four from `p` on.
__device__ __forceinline__ void load_others(Vec<float, 1>& to, const float* p) {
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(to.at[0]) : "l"(p) : "memory");
}
__device__ __forceinline__ void load_others(Vec<float, 4>& to, const float* p) {
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(to.at[0]), "=f"(to.at[1]), "=f"(to.at[2]), "=f"(to.at[3])
               : "l"(p)
               : "memory");
}

// A counter of other blocks, and after it what they wrote before they counted.
__device__ __forceinline__ int load_acquire(const int* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// Base-2 exponential and logarithm; in float the hardware's, off by some units in the last place.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double fast_exp2(double x) { return exp2(x); }

__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double fast_log2(double x) { return log2(x); }

// 1 / x, the hardware's.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a b + c rounded once. Said aloud where c is itself a product: the compiler may fuse that one.
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// 32 bits that travel as a number.
__device__ __forceinline__ float number_of_bits(int bits) { return __int_as_float(bits); }
__device__ __forceinline__ int bits_of_number(float x) { return __float_as_int(x); }

// t = whole + fraction, for |t| below 2^22. Without the slow conversions: adding 1.5 2^23 moves the
// whole part to the last bits.
struct Parts {
  static constexpr float kMove = 0x1.8p23f;
  float fraction, whole, moved;
};
__device__ __forceinline__ Parts parts_of(float t) {
  const float moved = __fadd_rd(t, Parts::kMove), whole = moved - Parts::kMove;
  return {t - whole, whole, moved};
}

// The whole parts' place in rows that are `pitch` apart.
__device__ __forceinline__ int place_of(Parts y, Parts x, int pitch) {
  return __float_as_int(fused(y.whole, float(pitch), x.moved)) - __float_as_int(Parts::kMove);
}

// The same in two steps: the address in shared memory of a row of cells, with what turns the bits
// of x.moved into a number taken off; and a cell of it.
template <class Cell>
__device__ __forceinline__ int row_address(const Cell* cells, Parts y, int pitch) {
  const unsigned place = unsigned(int(y.whole) * pitch) - unsigned(__float_as_int(Parts::kMove));
  return int(shared_address(cells) + place * unsigned(sizeof(Cell)));
}
template <class Cell>
__device__ __forceinline__ const Cell* cell_at(int row, Parts x) {
  const unsigned address = unsigned(row) + unsigned(__float_as_int(x.moved)) * sizeof(Cell);
  return static_cast<const Cell*>(__cvta_shared_to_generic(address));
}

// a k + b, clamped to [0, 1], for k from 1 to 7 that the compiler knows.
__device__ __forceinline__ float fused_saturated(float a, int k, float b) {
  float sum = 0;
  switch (k) {
    case 1: asm("add.sat.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b)); break;
    case 2: asm("fma.rn.sat.f32 %0, %1, 0f40000000, %2;" : "=f"(sum) : "f"(a), "f"(b)); break;
    case 3: asm("fma.rn.sat.f32 %0, %1, 0f40400000, %2;" : "=f"(sum) : "f"(a), "f"(b)); break;
    case 4: asm("fma.rn.sat.f32 %0, %1, 0f40800000, %2;" : "=f"(sum) : "f"(a), "f"(b)); break;
    case 5: asm("fma.rn.sat.f32 %0, %1, 0f40A00000, %2;" : "=f"(sum) : "f"(a), "f"(b)); break;
    case 6: asm("fma.rn.sat.f32 %0, %1, 0f40C00000, %2;" : "=f"(sum) : "f"(a), "f"(b)); break;
    case 7: asm("fma.rn.sat.f32 %0, %1, 0f40E00000, %2;" : "=f"(sum) : "f"(a), "f"(b)); break;
  }
  return sum;
}

}  // namespace dat::cuda

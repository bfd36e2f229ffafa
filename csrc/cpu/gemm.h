// Small matrix products on tiles that lie in cache: the arithmetic of attention.
//
//   c[i][x] (+)= sum over k of a[i, k] * b[k][x]
//
// a is read one value at a time and broadcast, b and c by vectors along x. A block of c stays in
// registers while k runs. Strides are compile-time constants wherever the caller's are, since the
// function is inlined: the broadcasts then need no address arithmetic.
#pragma once

#include "vec.h"

namespace dat::cpu::DAT_SIMD {

// Rows and vectors of a register block: as many accumulators as the register file holds beside the
// operands (32 registers on AVX-512 and NEON, 16 on AVX2 and SSE2).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 6, kBlockVectors = 4, kTallRows = 12;
#else
constexpr int kBlockRows = 6, kBlockVectors = 2, kTallRows = 6;
#endif
constexpr int kTallVectors = 2;

// One operand: element (i, k) at data[i * row + k * column].
template <class T>
struct Operand {
  const T* data;
  int64_t row, column;
};

template <int I, int X, class T>
DAT_INLINE void gemm_block(bool accumulate, int depth, Operand<T> a, const T* b, int64_t ldb, T* c,
                           int64_t ldc) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[I][X];
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) sum[i][x] = accumulate ? load(c + i * ldc + x * L) : Vec<T>{};
  for (int k = 0; k < depth; ++k) {
    Vec<T> bk[X];
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) bk[x] = load(b + k * ldb + x * L);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const Vec<T> aik = splat(a.data[i * a.row + k * a.column]);
#pragma GCC unroll 4
      for (int x = 0; x < X; ++x) sum[i][x] += aik * bk[x];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) store(c + i * ldc + x * L, sum[i][x]);
}

// Part `index` of `total` split evenly into `parts`: where it starts (part parts is the end).
DAT_INLINE int split_point(int total, int parts, int index) {
  return int(int64_t(total) * index / parts);
}

template <int I, int X, class T>
DAT_INLINE void gemm_rows(bool accumulate, int rows, int depth, Operand<T> a, const T* b,
                          int64_t ldb, T* c, int64_t ldc) {
  if (rows == I) {
    gemm_block<I, X>(accumulate, depth, a, b, ldb, c, ldc);
  } else if constexpr (I > 1) {
    gemm_rows<I - 1, X>(accumulate, rows, depth, a, b, ldb, c, ldc);
  }
}

template <int I, int X, class T>
DAT_INLINE void gemm_columns(bool accumulate, int rows, int vectors, int depth, Operand<T> a,
                             const T* b, int64_t ldb, T* c, int64_t ldc) {
  if (vectors == X) {
    const int parts = (rows + I - 1) / I;
    for (int part = 0; part < parts; ++part) {
      const int i = split_point(rows, parts, part), end = split_point(rows, parts, part + 1);
      const Operand<T> ai = {a.data + i * a.row, a.row, a.column};
      gemm_rows<I, X>(accumulate, end - i, depth, ai, b, ldb, c + i * ldc, ldc);
    }
  } else if constexpr (X > 1) {
    gemm_columns<I, X - 1>(accumulate, rows, vectors, depth, a, b, ldb, c, ldc);
  }
}

// c: rows x (vectors * lanes); a: rows x depth; b: depth x (vectors * lanes).
template <int I, int X, class T>
DAT_INLINE void gemm(bool accumulate, int rows, int vectors, int depth, Operand<T> a, const T* b,
                     int64_t ldb, T* c, int64_t ldc) {
  const int parts = (vectors + X - 1) / X;
  for (int part = 0; part < parts; ++part) {
    const int x = split_point(vectors, parts, part), end = split_point(vectors, parts, part + 1);
    gemm_columns<I, X>(accumulate, rows, end - x, depth, a, b + x * kLanes<T>, ldb,
                       c + x * kLanes<T>, ldc);
  }
}

}  // namespace dat::cpu::DAT_SIMD

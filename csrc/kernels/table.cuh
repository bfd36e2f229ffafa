// A head's bias table where every key can be met: in global memory, with every tap checked. Blocks
// have a window of it in shared memory (window.cuh) and come here for keys that the window does not
// hold: far away, infinite, NaN.
#pragma once

#include "../math/bilinear.h"
#include "common.cuh"
#include "plan.h"

namespace dat::cuda {

// A head's table in global memory, every tap checked: any key, any slope.
template <class A>
struct WholeTable {
  const void* data;  // [Th, Tw]
  const Plan& plan;

  __device__ WholeTable(const AttentionInputs& in, const Plan& plan_, int head)
      : data(static_cast<const char*>(in.table) + head * plan_.table_stride), plan(plan_) {}

  __device__ A tap(int64_t row, int64_t column) const {
    if (row < 0 || row >= plan.y.size || column < 0 || column >= plan.x.size) return 0;
    const int64_t i = row * plan.x.size + column;
    switch (plan.table_dtype) {
      case DType::f16: return A(to_acc(static_cast<const __half*>(data)[i]));
      case DType::bf16: return A(to_acc(static_cast<const __nv_bfloat16*>(data)[i]));
      default: return static_cast<const A*>(data)[i];
    }
  }

  struct Place {
    Cell<A> y, x;
  };
  __device__ Place place(A pos_y, A pos_x, int row, int column) const {
    return {cell_of(plan.axis_y<A>().slope * row + plan.axis_y<A>().shift(pos_y), plan.y.size),
            cell_of(plan.axis_x<A>().slope * column + plan.axis_x<A>().shift(pos_x), plan.x.size)};
  }

  // Value and derivatives of the bias of query (row, column).
  __device__ Bilinear<A> value(A pos_y, A pos_x, int row, int column) const {
    const auto [y, x] = place(pos_y, pos_x, row, column);
    const Bilinear<A> b =
        bilinear<A>(tap(y.index, x.index), tap(y.index, x.index + 1), tap(y.index + 1, x.index),
                    tap(y.index + 1, x.index + 1), y.fraction, x.fraction);
    // NaN in one coordinate makes the value, hence both derivatives, NaN.
    const A nan = (y.fraction + x.fraction) * 0;
    return {b.value + nan, b.d_y + nan, b.d_x + nan};
  }

  // The query's gradient to its four taps; add(cell, value) for those inside the table.
  template <class Add>
  __device__ void scatter(A pos_y, A pos_x, int row, int column, A grad, const Add& add) const {
    const auto [y, x] = place(pos_y, pos_x, row, column);
    const TapWeights<A> w = tap_weights(y.fraction, x.fraction);
    const A weight[4] = {w.w00, w.w01, w.w10, w.w11};
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) {
      const int64_t i = y.index + tap / 2, j = x.index + tap % 2;
      if (i >= 0 && i < plan.y.size && j >= 0 && j < plan.x.size)
        add(i * plan.x.size + j, grad * weight[tap]);
    }
  }
};

}  // namespace dat::cuda

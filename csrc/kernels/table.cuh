// The bias table as a block sees it: values along a column of queries, their derivatives, and the
// way back for gradients.
//
// A block's queries and the keys near the map meet only a window of the table. It is copied to
// shared memory once, with zeros for cells outside the table.
// Keys whose queries would leave the window (far away, infinite, NaN) are read from global memory
// with every tap checked.
//
// Along a column, x is interpolated once for each table row that the queries meet, and the result
// is shared by the queries: at slope 1 four of them meet five table rows, and a group of queries
// whose rows span at most one cell meets three.
#pragma once

#include "../math/bilinear.h"
#include "../math/softmax.h"
#include "plan.h"
#include "ptx.cuh"

namespace dat::cuda {

// Cells beyond those that keys at -1 or 1 need, on either side.
constexpr int kWindowMargin = 1;

// Cells between rows of a window: known to the compiler, so that taps have fixed places.
__host__ __device__ constexpr int window_pitch(Bias bias) { return bias == Bias::unit ? 128 : 72; }

// Cells that a tile of `queries` rows or columns meets.
inline int window_cells(const TableAxis<double>& axis, int queries) {
  return int(std::ceil(axis.slope * (queries - 1) + 2 * axis.quarter)) + 4 + 2 * kWindowMargin;
}

// The window's first cell for a tile that starts at query `first`.
template <class A>
__device__ __forceinline__ int window_start(const TableAxis<A>& axis, int first) {
  return int(floor(axis.slope * first + axis.origin - axis.quarter)) - kWindowMargin;
}

// A group of queries down a column and the table rows that it meets, from values h interpolated in
// x at those rows.
template <class A, Bias kBias>
struct RowGroup {
  static constexpr int kQueries = kBias == Bias::slope ? 2 : 4;
  static constexpr int kReads = 3;
  A first[kQueries], second[kQueries];  // how far between rows 0 and 1, and between 1 and 2

  // The group's first query is a fraction above table row 0.
  __device__ RowGroup(A fraction, A slope) {
#pragma unroll
    for (int r = 0; r < kQueries; ++r) {
      first[r] = add_saturated(fraction, slope * r);
      second[r] = add_saturated(fraction - 1, slope * r);
    }
  }
  __device__ A blend(const A (&h)[kReads], int r) const {
    return h[0] + first[r] * (h[1] - h[0]) + second[r] * (h[2] - h[1]);
  }
  // d blend / d coordinate.
  __device__ A blend_slope(const A (&h)[kReads], int r) const {
    return first[r] < 1 ? h[1] - h[0] : h[2] - h[1];
  }
  __device__ void adjoint(A (&grad_h)[kReads], const A* grad) const {
#pragma unroll
    for (int i = 0; i < kReads; ++i) grad_h[i] = 0;
#pragma unroll
    for (int r = 0; r < kQueries; ++r) {
      grad_h[0] += grad[r] - grad[r] * first[r];
      grad_h[1] += grad[r] * first[r] - grad[r] * second[r];
      grad_h[2] += grad[r] * second[r];
    }
  }
};

template <class A>
struct RowGroup<A, Bias::unit> {
  static constexpr int kQueries = 4, kReads = 5;
  A fraction;
  __device__ RowGroup(A fraction_, A) : fraction(fraction_) {}
  __device__ A blend(const A (&h)[kReads], int r) const {
    return h[r] + fraction * (h[r + 1] - h[r]);
  }
  __device__ A blend_slope(const A (&h)[kReads], int r) const { return h[r + 1] - h[r]; }
  __device__ void adjoint(A (&grad_h)[kReads], const A* grad) const {
    grad_h[0] = 0;
#pragma unroll
    for (int r = 0; r < kQueries; ++r) {
      grad_h[r + 1] = grad[r] * fraction;
      grad_h[r] += grad[r] - grad_h[r + 1];
    }
  }
};

// A head's table in global memory, every tap checked: any key, any slope.
template <class A>
struct WholeTable {
  const void* data;  // [Th, Tw]
  DType dtype;
  const Plan& plan;

  __device__ WholeTable(const AttentionInputs& in, const Plan& plan_, int64_t head)
      : dtype(in.shape.table_in_dtype ? in.shape.dtype : DType::f32), plan(plan_) {
    const int bytes =
        in.shape.table_in_dtype && sizeof(A) == 4 && dtype != DType::f32 ? 2 : sizeof(A);
    data = static_cast<const char*>(in.table) + head * in.shape.table_h * in.shape.table_w * bytes;
  }

  __device__ A tap(int64_t row, int64_t column) const {
    if (row < 0 || row >= plan.y.size || column < 0 || column >= plan.x.size) return 0;
    const int64_t i = row * plan.x.size + column;
    switch (dtype) {
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

template <class A, Bias kBias>
struct TableWindow {
  static_assert(kBias != Bias::direct);
  using Group = RowGroup<A, kBias>;
  static constexpr bool kPairs = kBias != Bias::unit;
  using Cell = Vec<A, kPairs ? 2 : 1>;  // a value, and what to add for the next column's

  static constexpr int kPitch = window_pitch(kBias);

  const Cell* window;
  A slope_y, slope_x;
  int start_y, start_x;  // first cell
  A *rel_y, *rel_x;      // [key_stage] coordinates of the tile's first query in the window; at
                         // slope 1 only their fractions
  int* base;             // [key_stage] that query's cell at slope 1; -1 marks far keys

  // shared: values of the window, then [3][key_stage].
  __device__ TableWindow(void* shared_window, void* shared_keys, const Plan& plan, int row,
                         int column)
      : window(static_cast<const Cell*>(shared_window)),
        slope_y(plan.axis_y<A>().slope),
        slope_x(plan.axis_x<A>().slope),
        start_y(window_start(plan.axis_y<A>(), row)),
        start_x(window_start(plan.axis_x<A>(), column)),
        rel_y(static_cast<A*>(shared_keys)),
        rel_x(rel_y + plan.key_stage),
        base(reinterpret_cast<int*>(rel_x + plan.key_stage)) {}

  // Asynchronous where the table has the right dtype already.
  template <class T>
  __device__ void load(const T* table, const Plan& plan) const {
    Cell* to = const_cast<Cell*>(window);
    const int height = int(plan.y.size), width = int(plan.x.size), columns = plan.window_columns;
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    for (int r = threadIdx.x / kWarp; r < plan.window_rows; r += warps) {
      const bool inside = unsigned(start_y + r) < unsigned(height);
      // Columns of the table that exist in this row, counted from the window's first.
      const int first = max(-start_x, 0), end = inside ? width - start_x : 0;
      const T* row = table + (int64_t(start_y + r) * width + start_x);
      Cell* cells = to + r * kPitch;
      if constexpr (!kPairs && std::is_same_v<T, A> && sizeof(A) == 4) {
        unsigned at = shared_address(cells + lane);
        const T* from = row + lane;
#pragma unroll 4
        for (int c = lane; c < columns; c += kWarp, at += kWarp * 4, from += kWarp)
          copy_async<4>(at, from, c >= first && c < end);
      } else {
        const auto tap = [&](int c) { return c >= first && c < end ? A(to_acc(row[c])) : A(0); };
#pragma unroll 4
        for (int c = lane; c < columns; c += kWarp) {
          cells[c].at[0] = tap(c);
          if constexpr (kPairs) cells[c].at[1] = tap(c + 1) - cells[c].at[0];
        }
      }
    }
    commit_copies();
  }

  // Returns whether the key is far: whether its queries leave the window.
  __device__ bool stage_key(int n, A pos_y, A pos_x, const Plan& plan, int row, int column) const {
    const A y = slope_y * row + plan.axis_y<A>().shift(pos_y) - A(start_y);
    const A x = slope_x * column + plan.axis_x<A>().shift(pos_x) - A(start_x);
    const A last_y = y + slope_y * (plan.rows * plan.tiles_down - 1),
            last_x = x + slope_x * (plan.columns - 1);
    // Written so that NaN is far.
    const bool far = !(y >= 0) || !(x >= 0) || !(last_y < A(plan.window_rows - 3)) ||
                     !(last_x < A(plan.window_columns - 2));
    const A floor_y = floor(y), floor_x = floor(x);
    base[n] = far ? -1 : kPairs ? 0 : int(floor_y) * kPitch + int(floor_x);
    rel_y[n] = far ? A(0) : kPairs ? y : y - floor_y;
    rel_x[n] = far ? A(0) : kPairs ? x : x - floor_x;
    return far;
  }

  __device__ bool is_far(int n) const { return base[n] < 0; }

  // Where a column of a key is: cells of the window for group `i` of the unit that starts at `row`.
  struct Column {
    const TableWindow& at;
    A y, fraction_x;
    int cell;

    __device__ Column(const TableWindow& window, int n, int column) : at(window) {
      y = at.rel_y[n];
      if constexpr (kPairs) {
        const A x = at.rel_x[n] + at.slope_x * column;
        cell = int(x);
        fraction_x = x - A(cell);
      } else {
        cell = max(at.base[n], 0) + column;
        fraction_x = at.rel_x[n];
      }
    }
    // The group's fraction; first_cell is that of its first table row.
    __device__ Group group(int row, int& first_cell) const {
      if constexpr (kPairs) {
        const A t = y + at.slope_y * row;
        const int index = int(t);
        first_cell = cell + index * kPitch;
        return Group(t - A(index), at.slope_y);
      } else {
        first_cell = cell + row * kPitch;
        return Group(y, at.slope_y);
      }
    }
    // h: interpolated in x at the group's table rows; d: its derivative.
    __device__ void read(int first_cell, A (&h)[Group::kReads], A (&d)[Group::kReads]) const {
#pragma unroll
      for (int i = 0; i < Group::kReads; ++i) {
        const Cell* c = at.window + first_cell + i * kPitch;
        if constexpr (kPairs)
          d[i] = c->at[1];
        else
          d[i] = c[1].at[0] - c->at[0];
        h[i] = c->at[0] + fraction_x * d[i];
      }
    }
  };

  // Biases of the unit's four rows from tile row `row` on, at tile column `column`. Of far keys:
  // anything.
  __device__ void values(A (&value)[kUnitRows], int n, int row, int column) const {
    const Column at(*this, n, column);
#pragma unroll
    for (int i = 0; i < kUnitRows; i += Group::kQueries) {
      int cell;
      A h[Group::kReads], d[Group::kReads];
      const Group group = at.group(row + i, cell);
      at.read(cell, h, d);
#pragma unroll
      for (int r = 0; r < Group::kQueries; ++r) value[i + r] = group.blend(h, r);
    }
  }

  // Given the gradients of those biases: adds to (y, x) their products with the derivatives in the
  // coordinates, and calls add(cell of the window, value) with the table's gradient.
  template <class Add>
  __device__ void backward(A (&slopes)[2], const A (&grad)[kUnitRows], int n, int row, int column,
                           const Add& add) const {
    const Column at(*this, n, column);
#pragma unroll
    for (int i = 0; i < kUnitRows; i += Group::kQueries) {
      int cell;
      A h[Group::kReads], d[Group::kReads], grad_h[Group::kReads];
      const Group group = at.group(row + i, cell);
      at.read(cell, h, d);
#pragma unroll
      for (int r = 0; r < Group::kQueries; ++r) {
        slopes[0] += grad[i + r] * group.blend_slope(h, r);
        slopes[1] += grad[i + r] * group.blend(d, r);
      }
      group.adjoint(grad_h, grad + i);
#pragma unroll
      for (int k = 0; k < Group::kReads; ++k) {
        const A right = grad_h[k] * at.fraction_x;
        add(cell + k * kPitch, grad_h[k] - right);
        add(cell + k * kPitch + 1, right);
      }
    }
  }
};

}  // namespace dat::cuda

// The bias table as a block sees it: values along a column of queries, their derivatives, and the
// way back for gradients.
//
// A block's queries and the keys near the map meet only a window of the table. It is copied to
// shared memory once, with zeros for cells outside the table.
//
// Along a column, x is interpolated once for each table row that the queries meet, and the result
// is shared by the queries: at slopes from 1/3 to 1 four of them meet five table rows, below that
// three; eight of them nine at slopes near 1.
#pragma once

#include "../math/softmax.h"
#include "plan.h"
#include "ptx.cuh"

namespace dat::cuda {

// Cells beyond those that keys at -1 or 1 need, on either side: keys of dat++ are clamped there,
// those of dat stray by a few cells of a small table.
__host__ __device__ constexpr int window_margin(double slope) { return slope == 1 ? 1 : 4; }

// Rows that the last query may read below its own cell.
constexpr int kWindowBelow = 3;

// What a block walks over. Keys: rows of the window are a fixed number of cells apart, so that taps
// have places known to the compiler, and keys are staged for each band of the tile's queries.
// Queries: there is another window for gradients, rows are as near as may be, and keys are staged
// once.
enum class Walk { keys, queries };

__host__ __device__ constexpr int window_pitch(Bias bias) { return bias == Bias::unit ? 128 : 72; }

// Cells that a tile of `queries` rows or columns meets.
inline int window_cells(const TableAxis<double>& axis, int queries) {
  return int(std::ceil(axis.slope * (queries - 1) + 2 * axis.quarter)) + 4 +
         2 * window_margin(axis.slope);
}

// The window's first cell for a tile that starts at query `first`.
template <class A>
__device__ __forceinline__ int window_start(const TableAxis<A>& axis, int first) {
  return int(floor(axis.slope * first + axis.origin - axis.quarter)) - window_margin(axis.slope);
}

// The queries down a column of a unit, or of a stack of units, and the table rows that they meet,
// from values h interpolated in x at those rows.
//
// Slopes below 1: the first query is a fraction above table row 0, query r is at fraction + slope
// r, and the piecewise linear function is a sum over i of h[i + 1] - h[i], each as far as the query
// is past row i, at most 1. Eight queries: slopes from 6/7, where query r is near row r.
template <class A, Bias kBias, int kRows>
struct RowGroup {
  static constexpr int kReads = kBias == Bias::shallow ? 3 : kRows + 1;
  // The row that `from` counts from.
  static constexpr int kFrom = kBias == Bias::shallow ? 1 : 0;
  A from, slope_y;  // where query 0 is

  RowGroup() = default;
  __device__ RowGroup(A from_, A slope) : from(from_), slope_y(slope) {}

  // Query r is past row low(r) and not past row high(r): with five rows, slopes are above 1/3.
  __device__ static constexpr int low(int r) {
    return kRows == 8 && r ? r - 1 : kReads == 5 && r == 3 ? 1 : 0;
  }
  __device__ static constexpr int high(int r) { return r + 1 < kReads ? r + 1 : kReads - 1; }
  __device__ A moved(int by) const { return by ? from + by : from; }
  // How far it is past row i.
  __device__ A past(int r, int i) const {
    if (r == 0) return moved(kFrom);
    if (kRows == 8) return fused_saturated(slope_y - 1, r, moved(r - i));
    return fused_saturated(slope_y, r, moved(kFrom - i));
  }

  // Query r's value, added to `to` unless kFresh.
  template <bool kFresh>
  __device__ A add(A to, const A (&h)[kReads], int r) const {
    const auto onto = [&](A value) { return kFresh ? value : to + value; };
    if constexpr (kBias == Bias::shallow) {
      // A line through rows 0 and 1, and how much it bends for those past row 1.
      const A step = h[1] - h[0], bend = h[2] - h[1] - step;
      const A line = onto(h[1] + from * step) + A(r) * (slope_y * step);
      return r ? line + past(r, 1) * bend : line;
    }
    A value = onto(h[low(r)]);
#pragma unroll
    for (int i = low(r); i < high(r); ++i) value += past(r, i) * (h[i + 1] - h[i]);
    return value;
  }
  // Adds to along_y the product of the values' gradients with d value / d coordinate: the
  // difference h[i + 1] - h[i] that each query is in. What is past row i goes on to the next.
  __device__ void backward(A& along_y, A (&grad_h)[kReads], const A (&h)[kReads],
                           const A (&grad)[kUnitRows]) const {
    A moved[kReads] = {};  // from row i to row i + 1
#pragma unroll
    for (int i = 0; i < kReads; ++i) grad_h[i] = 0;
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r) {
      A difference = h[low(r) + 1] - h[low(r)];
      grad_h[low(r)] += grad[r];
#pragma unroll
      for (int i = low(r); i < high(r); ++i) {
        moved[i] = fused(grad[r], past(r, i), moved[i]);
        if (i > low(r) && from + slope_y * r >= A(i - kFrom)) difference = h[i + 1] - h[i];
      }
      along_y += grad[r] * difference;
    }
#pragma unroll
    for (int i = 0; i + 1 < kReads; ++i) grad_h[i] -= moved[i], grad_h[i + 1] += moved[i];
  }
};

// Slope 1: each query is between two rows, with weights that are the key's.
template <class A>
struct RowGroup<A, Bias::unit, kUnitRows> {
  static constexpr int kReads = 5, kFrom = 0;
  A upper, lower;  // times log2(e)
  RowGroup() = default;
  __device__ RowGroup(A upper_, A lower_) : upper(upper_), lower(lower_) {}

  template <bool kFresh>
  __device__ A add(A to, const A (&h)[kReads], int r) const {
    return fused(h[r], upper, kFresh ? h[r + 1] * lower : fused(h[r + 1], lower, to));
  }
  // As above; table row i gets grad[i] and a fraction of grad[i - 1] - grad[i].
  __device__ void backward(A& along_y, A (&grad_h)[kReads], const A (&h)[kReads],
                           const A (&grad)[kUnitRows]) const {
    const A fraction = lower * A(kLn2);
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      const A own = i < kUnitRows ? grad[i < kUnitRows ? i : 0] : A(0);
      const A step = (i ? grad[i ? i - 1 : 0] : A(0)) - own;
      grad_h[i] = own + fraction * step;
      along_y += h[i] * step;
    }
  }
};

// What lanes need of a key. Biases come in units of the exponent of 2.
template <class A>
struct alignas(16) WindowKey {
  // At slope 1: the fraction of the cell along x, the weights of its two rows times log2(e), 0 for
  // far keys, and the place in bytes of the block's first query's cell. Else: where the block's
  // first query is in the window, and the slope along x; far keys stay in column -1, where the
  // window is zero.
  A x, y0_or_slope_x, y1_or_y, place;  // the place as the bits of a number
};

// And for a band of queries, at slopes other than 1: where the first one is (RowGroup), and the row
// of cells that this counts from.
template <class A>
struct alignas(2 * sizeof(A)) BandKey {
  A from, row;  // the address as the bits of a number
};

// kRows_: queries of a column that are taken at a time.
template <class A, Bias kBias, Walk kWalk, int kRows_ = kUnitRows>
struct TableWindow {
  static_assert(kBias != Bias::direct);
  static constexpr int kRows = kRows_;
  using Group = RowGroup<A, kBias, kRows>;
  static constexpr bool kPairs = kBias != Bias::unit;
  static constexpr bool kBands = kPairs && kWalk == Walk::keys;
  // Pairs: a value times log2(e), and what to add for the next column's; column -1 is zero.
  using Cell = Vec<A, kPairs ? 2 : 1>;
  static constexpr int kBefore = kPairs ? 2 : 0;  // cells of memory before the window

  const Cell* window;
  WindowKey<A>* keys;  // [key_stage]
  BandKey<A>* bands;   // [band of the tile][kMaxKeys]
  int tile_row;        // the tile's first row, from the block's first query
  A slope_y, slope_x;
  int start_y, start_x;  // first cell
  int columns, least;

  __device__ int pitch() const { return kWalk == Walk::keys ? window_pitch(kBias) : least; }

  __device__ TableWindow(void* shared_window, void* shared_keys, const Plan& plan, int row,
                         int column)
      : window(static_cast<const Cell*>(shared_window) + kBefore),
        keys(static_cast<WindowKey<A>*>(shared_keys)),
        bands(reinterpret_cast<BandKey<A>*>(keys + plan.key_stage)),
        slope_y(plan.axis_y<A>().slope),
        slope_x(plan.axis_x<A>().slope),
        start_y(window_start(plan.axis_y<A>(), row)),
        start_x(window_start(plan.axis_x<A>(), column)),
        columns(plan.window_columns),
        least(plan.window_pitch) {}

  // Asynchronous where the table has the right dtype already.
  template <class T>
  __device__ void load(const T* table, const Plan& plan) const {
    Cell* to = const_cast<Cell*>(window);
    const int width = int(plan.x.size), rows = plan.window_rows;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    // Rows of the window that the table has: [top, bottom).
    const int top = min(max(-start_y, 0), rows);
    const int bottom = max(min(rows, int(plan.y.size) - start_y), top);
    // A warp takes runs of rows, whose loads are under way all at once.
    constexpr int kRun = 4;
    for (int c = lane; c < columns; c += kWarp) {
      const Tap<T> own(table, start_x + c, start_y, width);
      const Tap<T> next(table, start_x + c + 1, start_y, width);
      int r = top + warp * kRun;
      const int64_t step = width;
      const T *at = own.at + r * step, *right = next.at + r * step;
      Cell* cells = to + r * pitch() + c;
      const auto copy_row = [&] {
        if constexpr (!kPairs && std::is_same_v<T, A>) {
          copy_async<4>(shared_address(cells), at, own.inside);
        } else if constexpr (!kPairs) {
          cells->at[0] = own.value(at);
        } else {
          const A value = own.value(at) * A(kLog2e);
          *cells = {value, next.value(right) * A(kLog2e) - value};
          right += step;
        }
        at += step, cells += pitch();
      };
#pragma unroll 1
      for (; r + kRun <= bottom; r += warps * kRun) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) copy_row();
        const int skipped = (warps - 1) * kRun;
        at += skipped * step, right += skipped * step, cells += skipped * pitch();
      }
#pragma unroll 1
      for (; r < bottom; ++r) copy_row();
#pragma unroll 1
      for (r = warp; r < top; r += warps) to[r * pitch() + c] = Cell{};
#pragma unroll 1
      for (r = bottom + warp; r < rows; r += warps) to[r * pitch() + c] = Cell{};
    }
    if (kPairs)
      for (int r = threadIdx.x; r < rows; r += blockDim.x) to[r * pitch() - 1] = Cell{};
    commit_copies();
  }

  // A column of the table, from some row on; outside the table, one that can be read instead.
  template <class T>
  struct Tap {
    bool inside;
    const T* at;
    __device__ Tap(const T* table, int column, int row, int width)
        : inside(unsigned(column) < unsigned(width)),
          at(table + (int64_t(row) * width + min(max(column, 0), width - 1))) {}
    // Masked, not branched around: loads do not wait for each other.
    __device__ A value(const T* from) const {
      if constexpr (sizeof(T) == 2) {
        const unsigned short bits =
            *reinterpret_cast<const unsigned short*>(from) & (inside ? 0xffff : 0);
        return to_acc(*reinterpret_cast<const T*>(&bits));
      } else {
        return __int_as_float(*reinterpret_cast<const int*>(from) & (inside ? -1 : 0));
      }
    }
  };

  // Returns whether the key is far: whether its queries leave the window.
  __device__ bool stage_key(int n, A pos_y, A pos_x, const Plan& plan, int row, int column) const {
    const A y = slope_y * row + plan.axis_y<A>().shift(pos_y) - A(start_y);
    const A x = slope_x * column + plan.axis_x<A>().shift(pos_x) - A(start_x);
    // Written so that NaN is far.
    const bool near = y >= 0 && x >= 0 && y < A(plan.near_y) && x < A(plan.near_x);
    if constexpr (kPairs) {
      keys[n] = near ? WindowKey<A>{x, slope_x, y, 0} : WindowKey<A>{-1, 0, 0, 0};
      if constexpr (kBands)
        for (int band = 0; band < plan.rows / kRows; ++band) {
          const Parts at = parts_of(near ? fused(slope_y, A(tile_row + band * kRows), y) : A(0));
          bands[band * kMaxKeys + n] = {at.fraction - Group::kFrom,
                                        number_of_bits(row_address(window, at, pitch()))};
        }
    } else if (!near) {
      keys[n] = {0, 0, 0, number_of_bits(0)};
    } else {
      const A floor_y = floor(y), floor_x = floor(x), lower = (y - floor_y) * A(kLog2e);
      keys[n] = {x - floor_x, A(kLog2e) - lower, lower,
                 number_of_bits((int(floor_y) * pitch() + int(floor_x)) * int(sizeof(Cell)))};
    }
    return !near;
  }

  __device__ bool is_far(int n) const {
    return kPairs ? keys[n].x < 0 : keys[n].y0_or_slope_x + keys[n].y1_or_y == 0;
  }

  // A column of the unit's queries before one key, and the table rows that they meet; from row
  // `row` and column `column` of the block's queries on.
  struct Taps {
    A h[Group::kReads], d[Group::kReads];  // interpolated in x; and the derivative
    Group group;
    A fraction_x;
    int place, pitch;  // of gradients: the cell's place, and a row's, in bytes; no place of bands

    Taps() = default;
    __device__ Taps(const TableWindow& at, int n, int row, int column)
        : pitch(at.pitch() * int(sizeof(A))) {
      const int pitch = at.pitch();
      const Cell* cells;
      if constexpr (kPairs) {
        const auto line = *reinterpret_cast<const Vec<A, 2>*>(at.keys + n);
        const Parts x = parts_of(fused(line.at[1], A(column), line.at[0]));
        fraction_x = x.fraction;
        if constexpr (kBands) {
          const BandKey<A> band = at.bands[(row - at.tile_row) / kRows * kMaxKeys + n];
          group = Group(band.from, at.slope_y);
          cells = cell_at<Cell>(bits_of_number(band.row), x);
        } else {
          const Parts y = parts_of(fused(at.slope_y, A(row), at.keys[n].y1_or_y));
          group = Group(y.fraction - Group::kFrom, at.slope_y);
          const int cell = place_of(y, x, pitch);
          place = cell * int(sizeof(A));
          cells = at.window + cell;
        }
      } else {
        const WindowKey<A> key = at.keys[n];
        place = bits_of_number(key.place) + (row * pitch + column) * int(sizeof(A));
        group = Group(key.y0_or_slope_x, key.y1_or_y);
        fraction_x = key.x;
        cells = reinterpret_cast<const Cell*>(reinterpret_cast<const char*>(at.window) + place);
      }
#pragma unroll
      for (int i = 0; i < Group::kReads; ++i) {
        if constexpr (kPairs)
          d[i] = cells[i * pitch].at[1];
        else
          d[i] = cells[i * pitch + 1].at[0] - cells[i * pitch].at[0];
        h[i] = cells[i * pitch].at[0] + fraction_x * d[i];
      }
    }

    // The biases of the rows, in units of the exponent of 2, added to `value` unless kFresh; 0 of
    // far keys.
    template <bool kFresh = false>
    __device__ void add(A (&value)[kRows]) const {
#pragma unroll
      for (int r = 0; r < kRows; ++r) value[r] = group.template add<kFresh>(value[r], h, r);
    }

    // Given the gradients of those biases: adds to (y, x) their products with the derivatives in
    // the coordinates; grad_h is what arrives at the table rows.
    __device__ void backward(A (&slopes)[2], A (&grad_h)[Group::kReads],
                             const A (&grad)[kUnitRows]) const {
      // What the window holds and weights are multiplied by; gradients are of natural units.
      constexpr A kUnits = A(kPairs ? kLn2 : 1);
      A along_y = 0, along_x = 0;
      group.backward(along_y, grad_h, h, grad);
#pragma unroll
      for (int i = 0; i < Group::kReads; ++i) along_x += grad_h[i] * d[i];
      slopes[0] += along_y * kUnits, slopes[1] += along_x * kUnits;
    }
  };

  // Two neighbouring columns at a time: given the gradients that arrive at their table rows, calls
  // add(place of a cell, value, next cell's value, ..) with the table's gradient.
  template <class Add>
  __device__ static void scatter(const Taps (&taps)[2], const A (&grad_h)[2][Group::kReads],
                                 const Add& add) {
    const auto each_row = [&](const auto& use) {
#pragma unroll
      for (int i = 0; i < Group::kReads; ++i) {
        const A right[2] = {grad_h[0][i] * taps[0].fraction_x, grad_h[1][i] * taps[1].fraction_x};
        use(i, grad_h[0][i] - right[0], right[0], right[1]);
      }
    };
    const auto place = [&](int c, int i) { return taps[c].place + i * taps[c].pitch; };
    if constexpr (!kPairs) {
      each_row([&](int i, A left, A right, A last) {
        add(place(0, i), left, right + (grad_h[1][i] - last), last);
      });
      return;
    }
    const int apart = taps[1].place - taps[0].place;  // nothing, or a cell, at slopes up to 1
    if (apart > int(sizeof(A))) {
      each_row([&](int i, A left, A right, A last) {
        add(place(0, i), left, right);
        add(place(1, i), grad_h[1][i] - last, last);
      });
      return;
    }
    const A at = taps[1].fraction_x + A(apart ? 1 : 0);
    const A first = max(1 - at, A(0)), third = max(at - 1, A(0)), second = 1 - first - third;
#pragma unroll
    for (int i = 0; i < Group::kReads; ++i) {
      const A right = grad_h[0][i] * taps[0].fraction_x, left = grad_h[0][i] - right;
      add(place(0, i), fused(grad_h[1][i], first, left), fused(grad_h[1][i], second, right),
          grad_h[1][i] * third);
    }
  }
};

}  // namespace dat::cuda

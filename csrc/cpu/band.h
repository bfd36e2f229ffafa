// The bias at slopes a little below 1: version dat at the resolution it was trained at.
//
// Counted from where a tile's first row meets the table, query row r then lies between slots r - 1
// and r or between r and r + 1, and likewise for the columns of a vector. So three expanded rows in
// registers serve a query row, three vectors of neighbouring cells a row of columns: one walk down
// the tile, without the lattice's buffers and products. Sums of gradients walk along: a slot is
// done when the query row below it is.
#pragma once

#include "lattice.h"

namespace dat::cpu::DAT_SIMD {

// Whether none of the points is so far outside that its cell is a bounded one (cell_of). NaN is.
template <class T>
DAT_INLINE bool within_reach(const TableAxis<T>& axis, int64_t first, int64_t count, T pos) {
  const T t = axis.slope * T(first) + axis.shift(pos);
  return t >= -2 && t + axis.slope * T(count - 1) <= T(axis.size);
}

template <class T>
DAT_INLINE bool is_band(const PaddedTable<T>& table, const Tile& tile) {
  return table.y.stays_near(tile.rows) && table.x.stays_near(std::min(tile.columns, kLanes<T>));
}

template <class T>
DAT_INLINE bool within_reach(const PaddedTable<T>& table, const Tile& tile, T pos_y, T pos_x) {
  return within_reach(table.y, tile.row, tile.rows, pos_y) &&
         within_reach(table.x, tile.column, tile.columns, pos_x);
}

// A vector of columns of which each lies between two of three neighbouring vectors of cells.
template <class T>
struct BandColumns {
  int64_t base;
  IVec<T> next;  // column l lies between cells base + l and the next one, not before it
  Vec<T> fraction;

  DAT_INLINE BandColumns(const PaddedTable<T>& table, int64_t first, T pos_x) {
    const ColumnWindow<T> columns(table, first, pos_x);
    base = columns.base, fraction = columns.fraction;
    next = columns.index == lane_index<T>();
  }
  DAT_INLINE Expanded<T> expand(const T* row) const {
    const T* cells = row + base;
    const Vec<T> own = load(cells);
    const Vec<T> left = next ? own : load(cells - 1), right = next ? load(cells + 1) : own;
    return {lerp(left, right, fraction), right - left};
  }
};

// s[query] = bias for one key, in the units of the padded table.
template <class T>
DAT_INLINE void band_bias(const PaddedTable<T>& table, const Tile& tile, T pos_y, T pos_x, T* s) {
  constexpr int L = kLanes<T>;
  const RowWindow<T> rows(table, tile, pos_y);
  // From the right: what the last vector of a row spills over, the next row's first overwrites.
  for (int v = int(ceil_div(tile.columns, L)) - 1; v >= 0; --v) {
    const BandColumns<T> columns(table, tile.column + v * L, pos_x);
    const T* row = table.row(rows.start);
    Vec<T> above{}, here = columns.expand(row).value;
    T* to = s + v * L;
    for (int r = 0; r < tile.rows; ++r, to += tile.columns) {
      const Vec<T> below = columns.expand(row += table.stride).value;
      const bool next = rows.slot[r] == r;
      store(to, lerp(next ? here : above, next ? below : here, splat(rows.fraction[r])));
      above = here, here = below;
    }
  }
}

// The way back along x: gradients of expanded rows to cells of the table's gradient.
template <class T>
struct BandScatter {
  Vec<T> before, own, after;  // weights of cells l - 1, l, l + 1 in column l
  IVec<T> lane_before, lane_after;

  DAT_INLINE explicit BandScatter(const BandColumns<T>& columns) {
    const Vec<T> f = columns.fraction, zero{};
    before = columns.next ? zero : 1 - f;
    own = columns.next ? 1 - f : f;
    after = columns.next ? f : zero;
    lane_before = lane_index<T>() - 1, lane_after = lane_index<T>() + 1;
    lane_before = lane_before < 0 ? IVec<T>{} + Int<T>(kLanes<T>) : lane_before;
  }
  // cells: [lanes + 1] of the row
  DAT_INLINE void add(T* cells, Vec<T> grad) const {
    constexpr int L = kLanes<T>;
    const Vec<T> zero{}, up = after * grad;
    Vec<T> sum = load(cells) + own * grad;
    sum += permute2<T>(up, zero, lane_before);
    sum += permute2<T>(before * grad, zero, lane_after);
    store(cells, sum);
    cells[L] += up[L - 1];
  }
};

// From the scores' gradient for one key: adds to the table's gradient and, by lanes, to the
// position's, along_pos [2][lanes], in cells.
template <class T>
__attribute__((noinline)) void band_bias_backward(const PaddedTable<T>& table,
                                                  const PaddedTable<T>& grad_table,
                                                  const Tile& tile, T pos_y, T pos_x, const T* ds,
                                                  T* along_pos) {
  constexpr int L = kLanes<T>;
  const RowWindow<T> rows(table, tile, pos_y);
  Vec<T> along_y = load(along_pos), along_x = load(along_pos + L);
  for (int first = 0; first < tile.columns; first += L) {
    const IVec<T> inside = lane_index<T>() < Int<T>(tile.columns - first);
    const BandColumns<T> columns(table, tile.column + first, pos_x);
    const BandScatter<T> scatter(columns);
    const T *row = table.row(rows.start), *d = ds + first;
    T* cells = grad_table.row(rows.start) + columns.base;
    Expanded<T> here = columns.expand(row);
    // Of the slots above, of query row r, and of the next one, so far; and of the step to r.
    Vec<T> grad_above{}, grad_here{}, slope_above{}, step_above{};
    for (int r = 0; r < tile.rows; ++r, d += tile.columns) {
      const Expanded<T> below = columns.expand(row += table.stride);
      const Vec<T> step = below.value - here.value, grad = inside ? load(d) : Vec<T>{};
      const Vec<T> lower = splat(rows.fraction[r]) * grad, upper = grad - lower;
      const bool next = rows.slot[r] == r;
      along_y += grad * (next ? step : step_above);
      if (r) {
        grad_above += next ? Vec<T>{} : upper;
        along_x += grad_above * slope_above;
        scatter.add(cells - table.stride, grad_above);
      }
      grad_above = grad_here + (next ? upper : lower);
      grad_here = next ? lower : Vec<T>{};
      slope_above = here.slope, step_above = step, here = below;
      cells += table.stride;
    }
    along_x += grad_above * slope_above + grad_here * here.slope;
    scatter.add(cells - table.stride, grad_above);
    scatter.add(cells, grad_here);
  }
  store(along_pos, along_y);
  store(along_pos + L, along_x);
}

}  // namespace dat::cpu::DAT_SIMD

// The bias interpolated from the position table at any slope: version dat, other resolutions, and
// windows that leave the padded table.
//
// For a fixed key the bias over the query lattice is separable (math/grid.h, table_axis): each
// query row lies between two table rows, each query column between two table columns. So the table
// rows that a tile can reach are first expanded along x, to one value per query column, and then
// blended along y: no gather per query, and an expanded row serves every query row that meets it.
// The backward runs the two steps transposed, as products with matrices of hat functions.
// Everything goes by one vector of query columns at a time.
#pragma once

#include "table.h"

namespace dat::cpu::DAT_SIMD {

// Table rows from the first that a tile meets, one a slot; as many for each key of a call, so that
// all take the same steps.
template <class T>
DAT_INLINE int reachable_rows(const TableAxis<T>& axis, int64_t rows) {
  return int(axis.slope * T(rows - 1)) + 3;
}

// cell_of, by vectors, at lattice points first, first + 1, ..
template <class T>
DAT_INLINE void cells_of(const TableAxis<T>& axis, int64_t first, T shift, IVec<T>& cell,
                         Vec<T>& fraction) {
  const Vec<T> lower = splat(T(-2)), upper = splat(T(axis.size));
  const IVec<T> index = lane_index<T>() + Int<T>(first);
  Vec<T> t = __builtin_convertvector(index, Vec<T>) * axis.slope + shift;
  t = t < lower ? lower : (t > upper ? upper : t);
  cell = __builtin_convertvector(t + T(2), IVec<T>);
  cell = (cell < 0 ? IVec<T>{} : cell) - 2;
  fraction = t - __builtin_convertvector(cell, Vec<T>);
}

// Where the query rows of a tile meet the table: row r lies between slots slot[r] and slot[r] + 1,
// and slot 0 is table row `start`.
template <class T>
struct RowWindow {
  int64_t start;
  Int<T> slot[kMaxRows + kLanes<T>];
  T fraction[kMaxRows + kLanes<T>];

  DAT_INLINE RowWindow(const PaddedTable<T>& table, const Tile& tile, T pos_y) {
    const T shift = table.y.shift(pos_y);
    for (int r = 0; r < tile.rows; r += kLanes<T>) {
      IVec<T> cells;
      Vec<T> fractions;
      cells_of(table.y, tile.row + r, shift, cells, fractions);
      if (r == 0) start = cells[0];
      cells -= Int<T>(start);
      std::memcpy(slot + r, &cells, sizeof cells);
      store(fraction + r, fractions);
    }
  }
  // The rows past the table's far padding are like its last one.
  DAT_INLINE const T* table_row(const PaddedTable<T>& table, int index) const {
    return table.row(std::min(start + index, table.y.size + 1));
  }
};

// Where a vector of query columns meets the table: lane l between cells base + index[l] and the
// next.
template <class T>
struct ColumnWindow {
  int64_t base;
  IVec<T> index;
  Vec<T> fraction;
  int span;  // index[last lane] + 1

  DAT_INLINE ColumnWindow(const PaddedTable<T>& table, int64_t first, T pos_x) {
    IVec<T> cells;
    cells_of(table.x, first, table.x.shift(pos_x), cells, fraction);
    base = cells[0];
    index = cells - cells[0];
    span = int(index[kLanes<T> - 1]) + 1;
  }
};

// Value and x-derivative of a table row at a vector of query columns.
template <class T>
struct Expanded {
  Vec<T> value, slope;
};

template <class T>
DAT_INLINE Expanded<T> expand(const T* row, const ColumnWindow<T>& w) {
  constexpr int L = kLanes<T>;
  const T* cells = row + w.base;
  Vec<T> left, right;
  if (w.span < 2 * L) {
    const Vec<T> a = load(cells), b = load(cells + L);
    left = permute2<T>(a, b, w.index);
    right = permute2<T>(a, b, w.index + 1);
  } else {
    for (int l = 0; l < L; ++l) left[l] = cells[w.index[l]], right[l] = cells[w.index[l] + 1];
  }
  return {lerp(left, right, w.fraction), right - left};
}

template <class T>
struct LatticeWork {
  T *value, *step;  // expanded rows and their difference to the next, [slot][lane]
  T *slope, *grad;  // x-derivative of the rows, and the rows' gradient, [slot][lane]
  T* hat_y;         // [query row][slot]
  T* hat_x;         // [lane][2 * lanes]
  T* cells;         // [slot][2 * lanes]

  explicit LatticeWork(Arena& arena)
      : value(arena.take<T>(kMaxSlots * kLanes<T>)),
        step(arena.take<T>(kMaxSlots * kLanes<T>)),
        slope(arena.take<T>(kMaxSlots * kLanes<T>)),
        grad(arena.take<T>(kMaxSlots * kLanes<T>)),
        hat_y(arena.take<T>(kMaxRows * kMaxSlots)),
        hat_x(arena.take<T>(2 * kLanes<T> * kLanes<T>)),
        cells(arena.take<T>(2 * kLanes<T> * kMaxSlots)) {}
};

// s[query] = bias for one key, in the units of the padded table.
template <class T>
DAT_INLINE void lattice_bias(const PaddedTable<T>& table, const Tile& tile, T pos_y, T pos_x,
                             const LatticeWork<T>& work, T* s) {
  constexpr int L = kLanes<T>;
  const int slots = reachable_rows(table.y, tile.rows);
  const RowWindow<T> rows(table, tile, pos_y);
  // From the right: what the last vector of a row spills over, the next row's first overwrites.
  for (int v = int(ceil_div(tile.columns, L)) - 1; v >= 0; --v) {
    const ColumnWindow<T> columns(table, tile.column + v * L, pos_x);
    Vec<T> above{};
    for (int slot = 0; slot < slots; ++slot) {
      const Vec<T> value = expand(rows.table_row(table, slot), columns).value;
      store(work.value + slot * L, value);
      if (slot) store(work.step + (slot - 1) * L, value - above);
      above = value;
    }
    T* to = s + v * L;
    for (int r = 0; r < tile.rows; ++r, to += tile.columns) {
      const int64_t at = int64_t(rows.slot[r]) * L;
      store(to, load(work.value + at) + splat(rows.fraction[r]) * load(work.step + at));
    }
  }
}

// A row of a matrix of hat functions: max(0, 1 - |t - x|) at x = 0, 1, .., `vectors` of them.
template <class T>
DAT_INLINE void store_hat(T t, int vectors, T* hat) {
  Vec<T> x = __builtin_convertvector(lane_index<T>(), Vec<T>) - t;
  for (int i = 0; i < vectors; ++i, x += T(kLanes<T>), hat += kLanes<T>)
    store(hat, maximum(T(1) - absolute<T>(x), Vec<T>{}));
}

// Gradients of expanded rows (work.grad, `count` columns) to the table's gradient: a product with
// the hat functions of the columns, or value by value where the columns lie far apart.
template <class T>
DAT_INLINE void scatter_columns(const PaddedTable<T>& grad_table, const RowWindow<T>& rows,
                                const ColumnWindow<T>& w, int slots, int count,
                                const LatticeWork<T>& work) {
  constexpr int L = kLanes<T>;
  if (w.span >= 2 * L) {
    for (int slot = 0; slot < slots; ++slot)
      for (int l = 0; l < count; ++l) {
        const T g = work.grad[slot * L + l], f = w.fraction[l];
        T* cell = const_cast<T*>(rows.table_row(grad_table, slot)) + w.base + w.index[l];
        cell[0] += (1 - f) * g;
        cell[1] += f * g;
      }
    return;
  }
  const int vectors = w.span < L ? 1 : 2;
  T t[L];
  store(t, __builtin_convertvector(w.index, Vec<T>) + w.fraction);
  for (int l = 0; l < count; ++l) store_hat(t[l], vectors, work.hat_x + l * 2 * L);
  gemm<kTallRows, kTallVectors>(false, slots, vectors * L, count, Operand<T>{work.grad, L, 1},
                                work.hat_x, 2 * L, work.cells, 2 * L);
  for (int slot = 0; slot < slots; ++slot) {
    T* cell = const_cast<T*>(rows.table_row(grad_table, slot)) + w.base;
    for (int x = 0; x < vectors * L; x += L)
      store(cell + x, load(cell + x) + load(work.cells + slot * 2 * L + x));
  }
}

// From the scores' gradient for one key: adds to the table's gradient and, by lanes, to the
// position's, along_pos [2][lanes], in cells.
template <class T>
__attribute__((noinline)) void lattice_bias_backward(const PaddedTable<T>& table,
                                                     const PaddedTable<T>& grad_table,
                                                     const Tile& tile, T pos_y, T pos_x,
                                                     const T* ds, const LatticeWork<T>& work,
                                                     T* along_pos) {
  constexpr int L = kLanes<T>;
  const int slots = reachable_rows(table.y, tile.rows);
  const RowWindow<T> rows(table, tile, pos_y);
  for (int r = 0; r < tile.rows; ++r)
    store_hat(T(rows.slot[r]) + rows.fraction[r], int(ceil_div(slots, L)),
              work.hat_y + r * kMaxSlots);
  for (int v = 0; v * L < tile.columns; ++v) {
    const ColumnWindow<T> columns(table, tile.column + v * L, pos_x);
    const int count = std::min(L, tile.columns - v * L);
    Vec<T> above{};
    for (int slot = 0; slot < slots; ++slot) {
      const Expanded<T> e = expand(rows.table_row(table, slot), columns);
      store(work.slope + slot * L, e.slope);
      if (slot) store(work.step + (slot - 1) * L, e.value - above);
      above = e.value;
    }
    // Lanes past the last column hold other rows' gradients up to here.
    const T* d = ds + v * L;
    gemm<kTallRows, 1>(false, slots, L, tile.rows, Operand<T>{work.hat_y, 1, kMaxSlots}, d,
                       tile.columns, work.grad, L);
    Vec<T> along_y{}, along_x{};
    for (int r = 0; r < tile.rows; ++r)
      along_y += load(d + r * tile.columns) * load(work.step + int64_t(rows.slot[r]) * L);
    for (int slot = 0; slot < slots; ++slot)
      along_x += load(work.grad + slot * L) * load(work.slope + slot * L);
    const IVec<T> inside = lane_index<T>() < Int<T>(count);
    store(along_pos, load(along_pos) + (inside ? along_y : Vec<T>{}));
    store(along_pos + L, load(along_pos + L) + (inside ? along_x : Vec<T>{}));
    scatter_columns(grad_table, rows, columns, slots, count, work);
  }
}

}  // namespace dat::cpu::DAT_SIMD

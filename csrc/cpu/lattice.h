// The bias interpolated from the position table at any slope: version dat, other resolutions, and
// windows that leave the padded table.
//
// For a fixed key the bias over the query lattice is separable (math/grid.h, table_axis): each query
// row lies between two table rows, each query column between two table columns. So the table rows a
// tile needs are first expanded along x, to one value and one x-derivative per query column, and
// then blended along y: no gather per query, and an expanded row serves every query row that meets
// it. The backward runs the same two steps transposed.
#pragma once

#include "table.h"

namespace dat::cpu::DAT_SIMD {

constexpr int kMaxSlots = 2 * kMaxRows;

// What one key sees of the table across one tile.
template <class T>
struct Window {
  static constexpr int kVectors = kMaxQueries / kLanes<T> + 1;

  // Query row r lies between the expanded rows at first[r] and first[r] + stride.
  int slots, stride;
  const T* table_row[kMaxSlots];
  int first[kMaxRows];
  T fraction_y[kMaxRows + kLanes<T>];

  // Columns, by vectors of queries: lane l lies between cells base + index[l] and the next one.
  int vectors;
  int64_t base[kVectors];
  int span[kVectors];  // index[last lane] + 1
  IVec<T> index[kVectors];
  Vec<T> fraction_x[kVectors];
};

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

template <class T>
DAT_INLINE void locate(const PaddedTable<T>& table, const Tile& tile, T pos_y, T pos_x,
                       Window<T>& w) {
  constexpr int L = kLanes<T>;
  Int<T> cell[kMaxRows + L];
  for (int r = 0; r < tile.rows; r += L) {
    IVec<T> cells;
    Vec<T> fraction;
    cells_of(table.y, tile.row + r, table.y.shift(pos_y), cells, fraction);
    std::memcpy(cell + r, &cells, sizeof cells);
    store(w.fraction_y + r, fraction);
  }
  w.vectors = int(ceil_div(tile.columns, L));
  w.stride = w.vectors * L;
  // A slot for each table row that a tile of this height can reach, so that all keys take the same
  // number of steps; or two for each query row if those are fewer.
  const int64_t last = table.y.size + 1;
  const int reach = int(table.y.slope * T(tile.rows - 1)) + 3;
  const bool dense = reach <= 2 * tile.rows;
  w.slots = dense ? reach : 2 * tile.rows;
  for (int r = 0; r < tile.rows; ++r) w.first[r] = (dense ? int(cell[r] - cell[0]) : 2 * r) * w.stride;
  for (int slot = 0; slot < w.slots; ++slot)
    w.table_row[slot] =
        table.row(std::min<int64_t>(last, dense ? cell[0] + slot : cell[slot / 2] + slot % 2));

  for (int v = 0; v < w.vectors; ++v) {
    IVec<T> cells;
    cells_of(table.x, tile.column + v * L, table.x.shift(pos_x), cells, w.fraction_x[v]);
    w.base[v] = cells[0];
    w.index[v] = cells - cells[0];
    w.span[v] = int(w.index[v][L - 1]) + 1;
  }
}

// Value and x-derivative of a table row at a vector of query columns.
template <class T>
struct Expanded {
  Vec<T> value, slope;
};

template <class T>
DAT_INLINE Expanded<T> expand(const T* row, const Window<T>& w, int v) {
  constexpr int L = kLanes<T>;
  Vec<T> left, right;
  const T* cells = row + w.base[v];
  if (w.span[v] < 2 * L) {
    const Vec<T> a = load(cells), b = load(cells + L);
    left = permute2<T>(a, b, w.index[v]);
    right = permute2<T>(a, b, w.index[v] + 1);
  } else {
    for (int l = 0; l < L; ++l) left[l] = cells[w.index[v][l]], right[l] = cells[w.index[v][l] + 1];
  }
  return {lerp(left, right, w.fraction_x[v]), right - left};
}

// Size of a buffer of expanded rows, [slot][query column]: a tile has at most twice as many slots as
// rows, and a row is filled up to whole vectors.
template <class T>
constexpr int64_t kSlotBuffer = 2 * kMaxQueries + int64_t(kMaxSlots) * kLanes<T>;

// s[query] = bias for one key, in the units of the padded table.
template <class T>
__attribute__((noinline)) void lattice_bias(const PaddedTable<T>& table, const Tile& tile, T pos_y,
                                            T pos_x, T* rows, T* s) {
  constexpr int L = kLanes<T>;
  Window<T> w;
  locate(table, tile, pos_y, pos_x, w);
  for (int slot = 0; slot < w.slots; ++slot)
    for (int v = 0; v < w.vectors; ++v)
      store(rows + slot * w.stride + v * L, expand(w.table_row[slot], w, v).value);
  // Rows are written in order: what the last vector of one spills over, the next overwrites.
  for (int r = 0; r < tile.rows; ++r) {
    const T *above = rows + w.first[r], *below = above + w.stride;
    const Vec<T> f = splat(w.fraction_y[r]);
    for (int v = 0; v < w.vectors; ++v)
      store(s + r * tile.columns + v * L, lerp(load(above + v * L), load(below + v * L), f));
  }
}

// Scratch of lattice_bias_backward.
template <class T>
struct LatticeWork {
  T *value, *slope;  // expanded rows, [slot][query column]
  T* grad;           // their gradient, the same
  T* hat;            // [lane][2 * lanes]: weights of cells for one vector of columns
  T* cells;          // [slot][2 * lanes]

  explicit LatticeWork(Arena& arena)
      : value(arena.take<T>(kSlotBuffer<T>)),
        slope(arena.take<T>(kSlotBuffer<T>)),
        grad(arena.take<T>(kSlotBuffer<T>)),
        hat(arena.take<T>(2 * kLanes<T> * kLanes<T>)),
        cells(arena.take<T>(2 * kLanes<T> * kMaxSlots)) {}
};

// Gradients of expanded rows to the table's gradient, which lies `to_grad` elements behind the table:
// one vector of columns at a time, a product with the matrix of hat functions, or value by value
// where the columns lie far apart.
template <class T>
__attribute__((noinline)) void scatter_columns(const Window<T>& w, int v, int64_t to_grad,
                                               const LatticeWork<T>& work) {
  constexpr int L = kLanes<T>;
  const T* column = work.grad + v * L;
  const auto cells = [&](int slot) {
    return const_cast<T*>(w.table_row[slot]) + to_grad + w.base[v];
  };
  if (w.span[v] >= 2 * L) {
    for (int slot = 0; slot < w.slots; ++slot)
      for (int l = 0; l < L; ++l) {
        const T g = column[slot * w.stride + l], f = w.fraction_x[v][l];
        T* cell = cells(slot) + w.index[v][l];
        cell[0] += (1 - f) * g;
        cell[1] += f * g;
      }
    return;
  }
  const int vectors = w.span[v] < L ? 1 : 2;
  for (int l = 0; l < L; ++l) {
    T* hat = work.hat + l * 2 * L;
    for (int x = 0; x < vectors; ++x) store(hat + x * L, Vec<T>{});
    hat[w.index[v][l]] = 1 - w.fraction_x[v][l];
    hat[w.index[v][l] + 1] = w.fraction_x[v][l];
  }
  gemm<kBlockRows, 2>(false, w.slots, vectors, L, Operand<T>{column, w.stride, 1}, work.hat, 2 * L,
                      work.cells, 2 * L);
  for (int slot = 0; slot < w.slots; ++slot)
    for (int x = 0; x < vectors; ++x) {
      T* cell = cells(slot) + x * L;
      store(cell, load(cell) + load(work.cells + slot * 2 * L + x * L));
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
  Window<T> w;
  locate(table, tile, pos_y, pos_x, w);
  for (int slot = 0; slot < w.slots; ++slot)
    for (int v = 0; v < w.vectors; ++v) {
      const Expanded<T> e = expand(w.table_row[slot], w, v);
      const int at = slot * w.stride + v * L;
      store(work.value + at, e.value);
      store(work.slope + at, e.slope);
      store(work.grad + at, Vec<T>{});
    }
  const IVec<T> in_last = lane_index<T>() < Int<T>(tile.columns - (w.vectors - 1) * L);
  Vec<T> along_y = load(along_pos), along_x = load(along_pos + L);
  for (int r = 0; r < tile.rows; ++r) {
    const Vec<T> f = splat(w.fraction_y[r]);
    for (int v = 0; v < w.vectors; ++v) {
      Vec<T> d = load(ds + r * tile.columns + v * L);
      if (v == w.vectors - 1) d = in_last ? d : Vec<T>{};
      const T* value = work.value + w.first[r] + v * L;
      T* g = work.grad + w.first[r] + v * L;
      along_y += d * (load(value + w.stride) - load(value));
      const Vec<T> below = d * f;
      store(g, load(g) + (d - below));
      store(g + w.stride, load(g + w.stride) + below);
    }
  }
  for (int i = 0; i < w.slots * w.stride; i += L)
    along_x += load(work.grad + i) * load(work.slope + i);
  store(along_pos, along_y);
  store(along_pos + L, along_x);
  const int64_t to_grad = grad_table.cells - table.cells;
  for (int v = 0; v < w.vectors; ++v) scatter_columns(w, v, to_grad, work);
}

}  // namespace dat::cpu::DAT_SIMD

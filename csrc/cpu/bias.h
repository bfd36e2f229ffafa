// The additive bias of one tile: interpolated from the position table, or dense.
//
// For a fixed key the bias over the query lattice is separable (math/grid.h, table_axis): each query
// row lies between two table rows, each query column between two table columns. So the table rows a
// tile needs are first expanded along x, to one value and one x-derivative per query column, and
// then blended along y: no gather per query, and an expanded row serves every query row that meets
// it. The backward runs the same two steps transposed.
#pragma once

#include "../math/bilinear.h"
#include "../math/grid.h"
#include "../math/random.h"
#include "tile.h"

namespace dat::cpu::DAT_SIMD {

constexpr int kMaxSlots = 2 * kMaxRows;

// The table of one head, surrounded by zeros so that every cell a window touches can be read.
template <class T>
struct PaddedTable {
  static constexpr int kPadRows = 2, kPadColumns = 3 * kLanes<T> + 8;

  TableAxis<T> y, x;
  int64_t stride = 0, size = 0;
  T* cells = nullptr;

  PaddedTable() = default;
  PaddedTable(Arena& arena, const AttentionShape& shape)
      : y(table_axis<T>(shape.table_h, shape.height, shape.version)),
        x(table_axis<T>(shape.table_w, shape.width, shape.version)),
        stride(round_up<T>(shape.table_w + 2 * kPadColumns)),
        size((shape.table_h + 2 * kPadRows) * stride),
        cells(arena.take<T>(shape.table_h ? size : 0)) {}

  T* row(int64_t index) const { return cells + (index + kPadRows) * stride + kPadColumns; }

  void read(const T* table, T scale) {
    std::fill_n(cells, size, T(0));
    for (int64_t i = 0; i < y.size; ++i)
      for (int64_t j = 0; j < x.size; ++j) row(i)[j] = table[i * x.size + j] * scale;
  }
};

// What one key sees of the table across one tile.
template <class T>
struct Window {
  static constexpr int kVectors = kMaxQueries / kLanes<T> + 1;

  // Query row r lies between the table rows in slots first[r] and first[r] + 1.
  int slots;
  int table_row[kMaxSlots];
  int first[kMaxRows];
  T fraction_y[kMaxRows];

  // Columns, by vectors of queries. Unit slope: neighbouring queries take neighbouring cells, from
  // `base` on; else lane l takes cell base + index[l].
  bool contiguous;
  int vectors;
  int64_t base[kVectors];
  int span[kVectors];  // index[last lane] + 1
  IVec<T> index[kVectors];
  Vec<T> fraction_x[kVectors];
};

template <class T>
void locate_rows(const PaddedTable<T>& table, const Tile& tile, T shift, Window<T>& w) {
  w.slots = 0;
  for (int r = 0; r < tile.rows; ++r) {
    const Cell<T> cell = cell_of(table.y.slope * T(tile.row + r) + shift, table.y.size);
    const int last = w.slots ? w.table_row[w.slots - 1] : 0;
    if (w.slots && cell.index == last) {
      w.table_row[w.slots++] = cell.index + 1;
    } else if (!w.slots || cell.index != last - 1) {
      w.table_row[w.slots++] = cell.index;
      w.table_row[w.slots++] = cell.index + 1;
    }
    w.first[r] = w.slots - 2;
    w.fraction_y[r] = cell.fraction;
  }
}

template <class T>
void locate_columns(const PaddedTable<T>& table, const Tile& tile, T shift, Window<T>& w) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kPad = PaddedTable<T>::kPadColumns;
  w.vectors = int(ceil_div(tile.columns, L));
  const T start = shift + T(tile.column), floored = std::floor(start);
  w.contiguous = table.x.slope == 1 && floored >= T(-kPad) &&
                 floored + T((w.vectors + 1) * L + 1) <= T(table.x.size + kPad);
  if (w.contiguous) {
    w.base[0] = int64_t(floored);
    w.fraction_x[0] = splat(T(start - floored));
    return;
  }
  // cell_of, by vectors.
  const Vec<T> lower = splat(T(-2)), upper = splat(T(table.x.size));
  for (int v = 0; v < w.vectors; ++v) {
    const IVec<T> j = lane_index<T>() + Int<T>(tile.column + v * L);
    Vec<T> t = __builtin_convertvector(j, Vec<T>) * table.x.slope + shift;
    t = t < lower ? lower : (t > upper ? upper : t);
    IVec<T> cell = __builtin_convertvector(t + T(2), IVec<T>);
    cell = (cell < 0 ? IVec<T>{} : cell) - 2;
    w.base[v] = cell[0];
    w.index[v] = cell - cell[0];
    w.span[v] = int(w.index[v][L - 1]) + 1;
    w.fraction_x[v] = t - __builtin_convertvector(cell, Vec<T>);
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
  if (w.contiguous) {
    left = load(row + w.base[0] + v * L);
    right = load(row + w.base[0] + v * L + 1);
    return {lerp(left, right, w.fraction_x[0]), right - left};
  }
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

// Size of a buffer of expanded rows [slot][query column] with up to two vectors of margin: a tile has
// at most twice as many slots as rows.
template <class T>
constexpr int64_t kSlotBuffer = 2 * kMaxQueries + int64_t(kMaxSlots) * 3 * kLanes<T>;

// s[query] = bias for one key, in the units of the padded table.
template <class T>
__attribute__((noinline)) void table_bias(const PaddedTable<T>& table, const Tile& tile, T pos_y,
                                          T pos_x, T* rows, T* s) {
  constexpr int L = kLanes<T>;
  Window<T> w;
  locate_rows(table, tile, table.y.shift(pos_y), w);
  locate_columns(table, tile, table.x.shift(pos_x), w);
  const int stride = w.vectors * L;
  for (int slot = 0; slot < w.slots; ++slot)
    for (int v = 0; v < w.vectors; ++v)
      store(rows + slot * stride + v * L, expand(table.row(w.table_row[slot]), w, v).value);
  // Rows are written in order: what the last vector of one spills over, the next overwrites.
  for (int r = 0; r < tile.rows; ++r) {
    const T *above = rows + w.first[r] * stride, *below = above + stride;
    const Vec<T> f = splat(w.fraction_y[r]);
    for (int v = 0; v < w.vectors; ++v)
      store(s + r * tile.columns + v * L, lerp(load(above + v * L), load(below + v * L), f));
  }
}

template <class T>
struct PositionGradient {
  T y, x;
};

// Scratch of table_bias_backward.
template <class T>
struct BiasBackwardWork {
  T *value, *slope;  // expanded rows, [slot][query column]
  T* grad;           // their gradient, the same, with kLanes zeros on either side
  T* hat;            // [lane][2 * lanes]: weights of cells for one vector of columns
  T* cells;          // [slot][2 * lanes]

  explicit BiasBackwardWork(Arena& arena)
      : value(arena.take<T>(kSlotBuffer<T>)),
        slope(arena.take<T>(kSlotBuffer<T>)),
        grad(arena.take<T>(kSlotBuffer<T>)),
        hat(arena.take<T>(2 * kLanes<T> * kLanes<T>)),
        cells(arena.take<T>(2 * kLanes<T> * kMaxSlots)) {}
};

// Row gradients at unit slope: cell base + x gets (1 - f) of column x and f of column x - 1.
template <class T>
DAT_INLINE void scatter_contiguous(const Window<T>& w, const Tile& tile, const T* grad, T* row) {
  constexpr int L = kLanes<T>;
  const Vec<T> right = w.fraction_x[0], left = T(1) - right;
  for (int x = 0; x <= tile.columns; x += L) {
    T* cell = row + w.base[0] + x;
    store(cell, load(cell) + left * load(grad + x) + right * load(grad + x - 1));
  }
}

// Row gradients at any slope, one vector of columns at a time: a product with the matrix of hat
// functions, or value by value where the columns lie far apart.
template <class T>
__attribute__((noinline)) void scatter_columns(const PaddedTable<T>& table, const Window<T>& w,
                                               int v, const T* grad, int stride,
                                               const BiasBackwardWork<T>& work) {
  constexpr int L = kLanes<T>;
  const T* column = grad + v * L;
  if (w.span[v] >= 2 * L) {
    for (int slot = 0; slot < w.slots; ++slot) {
      T* cells = table.row(w.table_row[slot]) + w.base[v];
      for (int l = 0; l < L; ++l) {
        const T g = column[slot * stride + l], f = w.fraction_x[v][l];
        cells[w.index[v][l]] += (1 - f) * g;
        cells[w.index[v][l] + 1] += f * g;
      }
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
  gemm<kBlockRows, 2>(false, w.slots, vectors, L, Operand<T>{column, stride, 1}, work.hat, 2 * L,
                      work.cells, 2 * L);
  for (int slot = 0; slot < w.slots; ++slot) {
    T* cells = table.row(w.table_row[slot]) + w.base[v];
    for (int x = 0; x < vectors; ++x)
      store(cells + x * L, load(cells + x * L) + load(work.cells + slot * 2 * L + x * L));
  }
}

// From the scores' gradient for one key: adds to the table's gradient and returns the position's,
// in cells (times -quarter and the table's units, the caller's part).
template <class T>
__attribute__((noinline)) PositionGradient<T> table_bias_backward(
    const PaddedTable<T>& table, const PaddedTable<T>& grad_table, const Tile& tile, T pos_y,
    T pos_x, const T* ds, const BiasBackwardWork<T>& work) {
  constexpr int L = kLanes<T>;
  Window<T> w;
  locate_rows(table, tile, table.y.shift(pos_y), w);
  locate_columns(table, tile, table.x.shift(pos_x), w);
  const int stride = (w.vectors + 2) * L;
  T* grad = work.grad + L;
  for (int slot = 0; slot < w.slots; ++slot) {
    const T* row = table.row(w.table_row[slot]);
    for (int v = 0; v < w.vectors; ++v) {
      const Expanded<T> e = expand(row, w, v);
      store(work.value + slot * stride + v * L, e.value);
      store(work.slope + slot * stride + v * L, e.slope);
      store(grad + slot * stride + v * L, Vec<T>{});
    }
    store(grad + slot * stride - L, Vec<T>{});
    store(grad + slot * stride + w.vectors * L, Vec<T>{});
  }
  const IVec<T> in_last = lane_index<T>() < Int<T>(tile.columns - (w.vectors - 1) * L);
  Vec<T> along_y{}, along_x{};
  for (int r = 0; r < tile.rows; ++r) {
    const int slot = w.first[r] * stride;
    const Vec<T> f = splat(w.fraction_y[r]);
    for (int v = 0; v < w.vectors; ++v) {
      Vec<T> d = load(ds + r * tile.columns + v * L);
      if (v == w.vectors - 1) d = in_last ? d : Vec<T>{};
      const T* value = work.value + slot + v * L;
      T* g = grad + slot + v * L;
      along_y += d * (load(value + stride) - load(value));
      const Vec<T> below = d * f;
      store(g, load(g) + (d - below));
      store(g + stride, load(g + stride) + below);
    }
  }
  for (int slot = 0; slot < w.slots; ++slot) {
    const T* g = grad + slot * stride;
    for (int v = 0; v < w.vectors; ++v)
      along_x += load(g + v * L) * load(work.slope + slot * stride + v * L);
    if (w.contiguous) scatter_contiguous(w, tile, g, grad_table.row(w.table_row[slot]));
  }
  if (!w.contiguous)
    for (int v = 0; v < w.vectors; ++v) scatter_columns(grad_table, w, v, grad, stride, work);
  return {lane_sum<T>(along_y), lane_sum<T>(along_x)};
}

// s[n][m] (+)= scale * bias[m, n] for `keys` keys from `first` on.
template <class S, class T>
__attribute__((noinline)) void dense_bias(bool accumulate, const S* head, const DenseBias& bias,
                                          const Tile& tile, int64_t width, int64_t first, int keys,
                                          T scale, T* s) {
  for (int r = 0; r < tile.rows; ++r)
    for (int j = 0; j < tile.columns; ++j) {
      const int64_t query = (tile.row + r) * width + tile.column + j;
      const S* from = head + query * bias.query + first * bias.key;
      T* to = s + r * tile.columns + j;
      for (int n = 0; n < keys; ++n) {
        const T value = T(to_acc(from[n * bias.key])) * scale;
        to[n * kLd<T>] = accumulate ? to[n * kLd<T>] + value : value;
      }
    }
}

// factor[n][m] = 0 where the probability is dropped, else 1 / (1 - p). `first` is a multiple of 4.
template <class T>
__attribute__((noinline)) void dropout_factors(uint64_t seed, double p, int64_t batch_head,
                                               const Tile& tile, int64_t width, int64_t first,
                                               int keys, T* factor) {
  const Dropout rule = dropout_rule(p);
  const T scale = T(rule.scale);
  for (int n = 0; n < keys; n += 4)
    for (int r = 0; r < tile.rows; ++r)
      for (int j = 0; j < tile.columns; ++j) {
        const int64_t query = (tile.row + r) * width + tile.column + j;
        const Random4 draw = dropout_draw(seed, batch_head, query, (first + n) / 4);
        for (int i = 0; i < std::min(4, keys - n); ++i)
          factor[(n + i) * kLd<T> + r * tile.columns + j] =
              draw.value[i] < rule.threshold ? T(0) : scale;
      }
}

}  // namespace dat::cpu::DAT_SIMD

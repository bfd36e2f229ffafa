// The position table of one head in cache, and the bias at unit slope, the common case: dat++ at
// the resolution it was trained at.
//
// At unit slope the fractions depend on the key alone, and the bias over a tile is one window of
// the table, blended with its neighbours one row and one column on: contiguous loads, no gather.
#pragma once

#include "../math/bilinear.h"
#include "../math/grid.h"
#include "tile.h"

namespace dat::cpu::DAT_SIMD {

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

// Where one key meets the table, at unit slope: query (i, j) of the map lies between cells
// (row + i, column + j) and (row + i + 1, column + j + 1).
template <class T>
struct UnitCell {
  int row, column;
  T fraction_y, fraction_x;
};

// The cells of all keys of one head and image, and the range they span.
template <class T>
struct UnitCells {
  UnitCell<T>* cell;  // [N]
  int first_row, last_row, first_column, last_column;

  UnitCells(Arena& arena, int64_t keys) : cell(arena.take<UnitCell<T>>(keys)) {}

  void read(const PaddedTable<T>& table, const T* pos, int64_t keys) {
    // Beyond any table; NaN and what is farther away end there, too.
    constexpr T kFar = T(1 << 26);
    const auto locate = [](T t, int& index, T& fraction) {
      const T floored = std::floor(t);
      index = int(std::abs(t) < kFar ? floored : kFar), fraction = t - floored;
    };
    first_row = first_column = int(kFar), last_row = last_column = -int(kFar);
    for (int64_t n = 0; n < keys; ++n) {
      UnitCell<T>& c = cell[n];
      locate(table.y.shift(pos[2 * n]), c.row, c.fraction_y);
      locate(table.x.shift(pos[2 * n + 1]), c.column, c.fraction_x);
      first_row = std::min(first_row, c.row), last_row = std::max(last_row, c.row);
      first_column = std::min(first_column, c.column);
      last_column = std::max(last_column, c.column);
    }
  }

  // Whether all that a tile sees of the table, from any key, is within the padding.
  bool in_reach(const PaddedTable<T>& table, const Tile& tile) const {
    constexpr int64_t kPadRows = PaddedTable<T>::kPadRows, kPad = PaddedTable<T>::kPadColumns;
    return first_row + tile.row >= -kPadRows && first_column + tile.column >= -kPad &&
           last_row + tile.row + tile.rows < table.y.size + kPadRows &&
           last_column + tile.column + round_up<T>(tile.columns + 1) + 1 <= table.x.size + kPad;
  }
};

// Lanes of the narrower vectors that serve maps of few columns: of full ones most would be idle.
template <class T>
constexpr int kHalfLanes = kLanes<T> / 2;

// s[n][query] = bias, in the units of the padded table, for X vectors of columns from `first` on.
// Rows are written in order, and blocks of columns from the right: what the last vector of a row
// spills over is overwritten later, by the next row's first block or the next key's.
template <int X, int L, class T>
void unit_bias_columns(const PaddedTable<T>& table, const Tile& tile, const UnitCell<T>* cells,
                       int keys, int first, T* s) {
  using V = Vec<T, L>;
  const auto blend = [](const T* cell, V fx) {
    return lerp(load_as<V>(cell), load_as<V>(cell + 1), fx);
  };
  for (int n = 0; n < keys; ++n, s += kLd<T>) {
    const V fy = splat_as<V>(cells[n].fraction_y), fx = splat_as<V>(cells[n].fraction_x);
    const T* cell = table.row(cells[n].row + tile.row) + cells[n].column + tile.column + first;
    T* to = s + first;
    V above[X];
    for (int x = 0; x < X; ++x) above[x] = blend(cell + x * L, fx);
    for (int r = 0; r < tile.rows; ++r, to += tile.columns) {
      cell += table.stride;
#pragma GCC unroll 4
      for (int x = 0; x < X; ++x) {
        const V below = blend(cell + x * L, fx);
        store(to + x * L, lerp(above[x], below, fy));
        above[x] = below;
      }
    }
  }
}

template <class T>
__attribute__((noinline)) void unit_bias(const PaddedTable<T>& table, const Tile& tile,
                                         const UnitCell<T>* cells, int keys, T* s) {
  constexpr int L = kLanes<T>;
  if (tile.columns <= kHalfLanes<T>)
    return unit_bias_columns<1, kHalfLanes<T>>(table, tile, cells, keys, 0, s);
  int end = int(ceil_div(tile.columns, L));
  switch (end % 4) {
    case 1: unit_bias_columns<1, L>(table, tile, cells, keys, (end -= 1) * L, s); break;
    case 2: unit_bias_columns<2, L>(table, tile, cells, keys, (end -= 2) * L, s); break;
    case 3: unit_bias_columns<3, L>(table, tile, cells, keys, (end -= 3) * L, s); break;
  }
  while (end > 0) unit_bias_columns<4, L>(table, tile, cells, keys, (end -= 4) * L, s);
}

// From the scores' gradient for one key: adds to the table's gradient and, by lanes, to the
// position's, along_pos [2][lanes], in cells.
// With u the gradient that reaches the cells of a row through the blend along x, the one of the
// window's row r is (1 - fy) u[r] + fy u[r - 1], and both position derivatives are sums of table
// cells times such blends: everything is computed where the cell is.
template <int L, class T>
__attribute__((noinline)) void unit_bias_backward(const PaddedTable<T>& table,
                                                  const PaddedTable<T>& grad_table,
                                                  const Tile& tile, const UnitCell<T>& key,
                                                  const T* ds, T* along_pos) {
  using V = Vec<T, L>;
  const V fy = splat_as<V>(key.fraction_y), fx = splat_as<V>(key.fraction_x);
  const int64_t row = key.row + tile.row, column = key.column + tile.column;
  V along_y = load_as<V>(along_pos), along_x = load_as<V>(along_pos + kLanes<T>);
  for (int first = 0; first <= tile.columns; first += L) {
    const IVec<T, L> j = lane_index<T, L>() + Int<T>(first);
    const IVec<T, L> has_left = j < Int<T>(tile.columns);
    const IVec<T, L> has_right = (j > 0) & (j <= Int<T>(tile.columns));
    const T *cell = table.row(row) + column + first, *d = ds + first;
    T* grad = grad_table.row(row) + column + first;
    V u_above{}, e_above{};
    const auto visit = [&](V u, V e) {
      const V value = load_as<V>(cell), du = u_above - u;
      along_y += value * du;
      along_x += value * lerp(e, e_above, fy);
      store(grad, load_as<V>(grad) + (u + fy * du));
      u_above = u, e_above = e;
      cell += table.stride, grad += table.stride;
    };
    for (int r = 0; r < tile.rows; ++r, d += tile.columns) {
      // As the left tap of column j, and as the right tap of column j - 1.
      const V left = has_left ? load_as<V>(d) : V{};
      const V right = has_right ? load_as<V>(d - 1) : V{};
      visit(left + fx * (right - left), right - left);
    }
    visit(V{}, V{});
  }
  store(along_pos, along_y);
  store(along_pos + kLanes<T>, along_x);
}

}  // namespace dat::cpu::DAT_SIMD

// The additive bias of one tile, from the position table or dense, and the dropout of its scores.
#pragma once

#include "../math/random.h"
#include "band.h"

namespace dat::cpu::DAT_SIMD {

// The table's share in one head: the padded table, and where its keys meet it.
template <class T>
struct TableBias {
  PaddedTable<T> table;  // in units of 1 / log2(e)
  UnitCells<T> cells;    // at unit slope
  LatticeWork<T> work;
  const T* pos = nullptr;  // [N, 2]

  TableBias(Arena& arena, const AttentionShape& shape)
      : table(arena, shape), cells(arena, shape.table_h ? shape.keys : 0), work(arena) {}

  bool unit() const { return table.y.slope == 1 && table.x.slope == 1; }
  bool contiguous(const Tile& tile) const { return unit() && cells.in_reach(table, tile); }

  void read_positions(const T* positions, int64_t keys) {
    pos = positions;
    if (unit()) cells.read(table, pos, keys);
  }

  // s[n][m] = bias for `keys` keys from `first` on.
  void forward(const Tile& tile, int64_t first, int keys, T* s) const {
    if (contiguous(tile)) return unit_bias(table, tile, cells.cell + first, keys, s);
    const bool band = is_band(table, tile);
    for (int n = 0; n < keys; ++n, s += kLd<T>) {
      const T y = pos[2 * (first + n)], x = pos[2 * (first + n) + 1];
      if (band && within_reach(table, tile, y, x))
        band_bias(table, tile, y, x, s);
      else
        lattice_bias(table, tile, y, x, work, s);
    }
  }

  // Adds to the table's gradient and to the positions', [N][2][lanes], in cells.
  void backward(const Tile& tile, int64_t first, int keys, const T* ds,
                const PaddedTable<T>& grad_table, T* grad_pos) const {
    const bool unit_cells = contiguous(tile), band = is_band(table, tile);
    // It walks over one cell more than there are columns.
    const auto unit_backward = tile.columns < kHalfLanes<T> ? unit_bias_backward<kHalfLanes<T>, T>
                                                            : unit_bias_backward<kLanes<T>, T>;
    for (int64_t n = first; n < first + keys; ++n, ds += kLd<T>) {
      const T y = pos[2 * n], x = pos[2 * n + 1];
      T* along = grad_pos + n * 2 * kLanes<T>;
      if (unit_cells)
        unit_backward(table, grad_table, tile, cells.cell[n], ds, along);
      else if (band && within_reach(table, tile, y, x))
        band_bias_backward(table, grad_table, tile, y, x, ds, along);
      else
        lattice_bias_backward(table, grad_table, tile, y, x, ds, work, along);
    }
  }
};

// s[n][m] (+)= bias[m, n], as an exponent of 2, for `keys` keys from `first` on.
template <class S, class T>
__attribute__((noinline)) void dense_bias(bool accumulate, const S* head, const DenseBias& bias,
                                          const Tile& tile, int64_t width, int64_t first, int keys,
                                          T* s) {
  if (bias.key == 1 && !accumulate) {
    for_each_query_run(tile, width, [&](int64_t query, int place, int count) {
      const S* from = head + query * bias.query + first;
      read_transposed([&](int i) { return from + i * bias.query; }, count, keys, T(1), s + place,
                      kLd<T>);
    });
    const int64_t padded = round_up<T>(tile.queries());
    for (int n = 0; n < keys; ++n)
      for (T *at = s + n * kLd<T>, *end = at + padded; at < end; at += kLanes<T>)
        store(at, as_exponent<Vec<T>, T>(load(at)));
    return;
  }
  for (int r = 0; r < tile.rows; ++r)
    for (int j = 0; j < tile.columns; ++j) {
      const int64_t query = (tile.row + r) * width + tile.column + j;
      const S* from = head + query * bias.query + first * bias.key;
      T* to = s + r * tile.columns + j;
      for (int n = 0; n < keys; ++n) {
        const T value = as_exponent(T(to_acc(from[n * bias.key])));
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

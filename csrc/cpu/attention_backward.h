// deform_attention, backward: the scores are computed again from the saved log-sum-exp.
//
// The items (head, image, query tile), in that order, are cut into one run for each thread. A thread
// keeps what is summed over queries (grad_k, grad_v, grad_pos of one head and image; grad_table of
// one head) to itself, and writes it when the run leaves that head. Only what two runs share is
// kept aside and summed at the end, in the order of the runs: results do not depend on timing.
#pragma once

#include <map>
#include <vector>

#include "attention_forward.h"

namespace dat::cpu::DAT_SIMD {

// Sums over the queries of one head and image, in the units they are added up in.
template <class T>
struct KeySums {
  T *k, *v;  // [N, padded channels], both padded for blocks; k times 1 / (scale * log2(e))
  T* pos;    // [N][2][lanes], in cells, times log2(e)

  static int64_t padded(const AttentionShape& shape) { return round_up<T>(shape.head_dim); }
  static int64_t size(const AttentionShape& shape) {
    return 2 * rows(shape) * padded(shape) + 2 * shape.keys * kLanes<T>;
  }
  static int64_t rows(const AttentionShape& shape) { return round_up<T>(shape.keys); }
  KeySums(T* memory, const AttentionShape& shape)
      : k(memory), v(k + rows(shape) * padded(shape)), pos(v + rows(shape) * padded(shape)) {}
};

template <class S>
struct BackwardWork {
  using T = acc_t<S>;

  HeadOperands<S> head;
  PaddedTable<T> grad_table;  // in natural units
  T* key_sums;
  T *q, *grad_out, *grad_q;    // tile buffers of channels
  T *q_rows, *grad_out_rows;   // [query][padded channels]
  T* tile_sum;                 // [key of a key tile][padded channels]
  T *p, *ds, *factor;          // tile buffers of keys
  T *lse, *row_sum;            // [query]

  BackwardWork(Arena& arena, const AttentionShape& shape)
      : head(arena, shape),
        grad_table(arena, shape),
        key_sums(arena.take<T>(KeySums<T>::size(shape))),
        q(arena.take<T>(channel_rows(shape) * kLd<T>)),
        grad_out(arena.take<T>(channel_rows(shape) * kLd<T>)),
        grad_q(arena.take<T>(shape.head_dim * kLd<T>)),
        q_rows(arena.take<T>(KeySums<T>::padded(shape) * kLd<T>)),
        grad_out_rows(arena.take<T>(KeySums<T>::padded(shape) * kLd<T>)),
        tile_sum(arena.take<T>(kKeyTile * KeySums<T>::padded(shape))),
        p(arena.take<T>((kKeyTile + 1) * kLd<T>)),
        ds(arena.take<T>((kKeyTile + 1) * kLd<T>)),
        factor(arena.take<T>(shape.dropout_p > 0 ? kKeyTile * kLd<T> : 0)),
        lse(arena.take<T>(kLd<T>)),
        row_sum(arena.take<T>(kLd<T>)) {}

  // Tile buffers of channels that are transposed have the padding channels, too.
  static int64_t channel_rows(const AttentionShape& shape) { return KeySums<T>::padded(shape); }
};

// [channel][query] -> [query][padded channel]
template <class T>
__attribute__((noinline)) void transpose_tile(const T* from, int queries, int64_t padded, T* to) {
  for (int m = 0; m < queries; m += kLanes<T>)
    for (int64_t c = 0; c < padded; c += kLanes<T>)
      transpose_block(from + c * kLd<T> + m, kLd<T>, to + m * padded + c, padded);
}

// p = 2^(s - lse), and what the values' gradient multiplies: p times the dropout factor, in s;
// ds = the scores' gradient from dp, the probabilities' one.
template <class T>
__attribute__((noinline)) void softmax_backward(int keys, int vectors, const T* lse,
                                                const T* row_sum, const T* factor, T* s, T* dp) {
  constexpr int L = kLanes<T>;
  for (int n = 0; n < keys; ++n, s += kLd<T>, dp += kLd<T>) {
    for (int x = 0; x < vectors * L; x += L) {
      const Vec<T> p = exp2<T>(load(s + x) - load(lse + x));
      const Vec<T> z = factor ? load(factor + n * kLd<T> + x) : splat(T(1));
      store(s + x, factor ? p * z : p);
      store(dp + x, softmax_vjp(p, factor ? load(dp + x) * z : load(dp + x), load(row_sum + x)));
    }
  }
}

// Adds a tile's ds [n][m] to grad_bias [.., M, N].
template <class T>
void add_dense_grad(const T* ds, const Tile& tile, int64_t width, int64_t keys_total, int64_t first,
                    int keys, T* grad) {
  for (int r = 0; r < tile.rows; ++r)
    for (int j = 0; j < tile.columns; ++j) {
      const int64_t query = (tile.row + r) * width + tile.column + j;
      const T* from = ds + r * tile.columns + j;
      for (int n = 0; n < keys; ++n) grad[query * keys_total + first + n] += from[n * kLd<T>];
    }
}

// Loads what a tile needs once: q, grad_out, both transposed, the saved lse and the row sums.
template <class S>
void load_tile(const AttentionBackward& p, int64_t b, int64_t h, const Tile& tile,
               const BackwardWork<S>& work) {
  using T = acc_t<S>;
  const AttentionShape& shape = p.in.shape;
  const int d = int(shape.head_dim), queries = tile.queries();
  const int64_t padded = KeySums<T>::padded(shape);
  // grad_q's buffer serves to read out.
  read_tile(head_data<const S>(p.out, b, h * d), p.out, tile, d, T(1), work.grad_q);
  read_tile(head_data<const S>(p.grad_out, b, h * d), p.grad_out, tile, d, T(1), work.grad_out);
  std::fill_n(work.row_sum, kLd<T>, T(0));
  for (int c = 0; c < d; ++c)
    for (int m = 0; m < queries; ++m)
      work.row_sum[m] += work.grad_q[c * kLd<T> + m] * work.grad_out[c * kLd<T> + m];
  read_tile(head_data<const S>(p.in.q, b, h * d), p.in.q, tile, d, T(shape.scale * kLog2e), work.q);
  const MapView lse =
      contiguous_map(const_cast<void*>(p.lse), shape.heads, shape.height, shape.width);
  read_tile(head_data<const T>(lse, b, h), lse, tile, 1, T(kLog2e), work.lse);
  std::fill_n(work.q + d * kLd<T>, (padded - d) * kLd<T>, T(0));
  std::fill_n(work.grad_out + d * kLd<T>, (padded - d) * kLd<T>, T(0));
  transpose_tile(work.q, queries, padded, work.q_rows);
  transpose_tile(work.grad_out, queries, padded, work.grad_out_rows);
}

// sums[n][c] += sum over the tile's queries of p[n][m] * rows[m][c], the tile's part on its own first:
// a running sum over all queries of a large map would lose digits.
template <class T>
void add_product(int keys, int queries, int64_t padded, const T* p, const T* rows, T* tile_sum,
                 T* sums, Prefetch& prefetch) {
  multiply_queries(keys, queries, padded, p, rows, tile_sum, prefetch);
  for (int64_t i = 0; i < keys * padded; ++i) sums[i] += tile_sum[i];
}

template <class S>
void backward_tile(const AttentionBackward& p, int64_t b, int64_t h, const Tile& tile,
                   const BackwardWork<S>& work, Prefetch& prefetch) {
  using T = acc_t<S>;
  const AttentionInputs& in = p.in;
  const AttentionShape& shape = in.shape;
  const int d = int(shape.head_dim), queries = tile.queries();
  const int vectors = int(ceil_div(queries, kLanes<T>)), stride = key_stride(shape.keys);
  const int64_t padded = KeySums<T>::padded(shape);
  const KeySums<T> sums(work.key_sums, shape);
  const T* factor = shape.dropout_p > 0 ? work.factor : nullptr;
  const MapView map = contiguous_map(p.grad_q, shape.heads * d, shape.height, shape.width);
  prefetch_tile(prefetch, head_data<const S>(map, b, h * d), map, tile, d);
  load_tile(p, b, h, tile, work);
  for (int64_t first = 0; first < shape.keys; first += kKeyTile) {
    const int keys = int(std::min<int64_t>(kKeyTile, shape.keys - first));
    scores<S>(in, work.head, b, h, tile, first, keys, work.q, work.p,
              static_cast<T*>(nullptr), prefetch);
    multiply_keys(false, keys, vectors, d, work.head.v + first * d, stride, work.grad_out, work.ds,
                  static_cast<T*>(nullptr), prefetch);
    if (factor)
      dropout_factors(uint64_t(*in.seed), shape.dropout_p, b * shape.heads + h, tile, shape.width,
                      first, keys, work.factor);
    softmax_backward(keys, vectors, work.lse, work.row_sum, factor, work.p, work.ds);
    add_product(keys, queries, padded, work.p, work.grad_out_rows, work.tile_sum,
                sums.v + first * padded, prefetch);
    add_product(keys, queries, padded, work.ds, work.q_rows, work.tile_sum,
                sums.k + first * padded, prefetch);
    multiply_values(first > 0, keys, vectors, d, work.head.k + first * d, stride, work.ds,
                    work.grad_q, prefetch);
    if (in.table)
      work.head.bias.backward(tile, first, keys, work.ds, work.grad_table, sums.pos);
    if (p.grad_bias)
      add_dense_grad(work.ds, tile, shape.width, shape.keys, first, keys,
                     static_cast<T*>(p.grad_bias) + b * p.grad_bias_batch + h * p.grad_bias_head);
  }
  std::fill_n(work.row_sum, queries, T(shape.scale));
  write_tile(work.grad_q, work.row_sum, tile, d, head_data<S>(map, b, h * d), map);
}

// to[c][n] = scale * sums[n][c]; `rows` is a buffer of kLanes rows of kLd.
template <class S, class T>
__attribute__((noinline)) void write_transposed(const T* sums, int64_t keys, int64_t channels,
                                                int64_t padded, T scale, T* rows, S* to) {
  constexpr int L = kLanes<T>;
  for (int64_t first = 0; first < keys; first += kMaxQueries) {
    const int64_t count = std::min<int64_t>(kMaxQueries, keys - first);
    for (int64_t c = 0; c < channels; c += L) {
      for (int64_t n = 0; n < count; n += L)
        transpose_block(sums + (first + n) * padded + c, padded, rows + n, kLd<T>);
      for (int64_t i = 0; i < std::min<int64_t>(L, channels - c); ++i)
        for (int64_t n = 0; n < count; ++n)
          to[(c + i) * keys + first + n] = from_acc<S>(rows[i * kLd<T> + n] * scale);
    }
  }
}

// Writes the sums of one head and image to the outputs; `rows` as above.
template <class S, class T = acc_t<S>>
void write_key_sums(const AttentionBackward& p, int64_t b, int64_t h, const T* memory, T* rows) {
  const AttentionShape& shape = p.in.shape;
  const KeySums<T> sums(const_cast<T*>(memory), shape);
  const int64_t d = shape.head_dim, padded = KeySums<T>::padded(shape), pair = b * shape.heads + h;
  S* k = static_cast<S*>(p.grad_k) + pair * d * shape.keys;
  S* v = static_cast<S*>(p.grad_v) + pair * d * shape.keys;
  write_transposed(sums.k, shape.keys, d, padded, T(kLn2), rows, k);
  write_transposed(sums.v, shape.keys, d, padded, T(1), rows, v);
  if (!p.grad_pos) return;
  const T along_y = -T(kLn2) * table_axis<T>(shape.table_h, shape.height, shape.version).quarter;
  const T along_x = -T(kLn2) * table_axis<T>(shape.table_w, shape.width, shape.version).quarter;
  T* pos = static_cast<T*>(p.grad_pos) + pair * shape.keys * 2;
  for (int64_t n = 0; n < shape.keys; ++n) {
    const T* lanes = sums.pos + n * 2 * kLanes<T>;
    pos[2 * n] = lane_sum<T>(load(lanes)) * along_y;
    pos[2 * n + 1] = lane_sum<T>(load(lanes + kLanes<T>)) * along_x;
  }
}

template <class T>
void write_table(const AttentionBackward& p, int64_t h, const PaddedTable<T>& grad) {
  const AttentionShape& shape = p.in.shape;
  T* to = static_cast<T*>(p.grad_table) + h * shape.table_h * shape.table_w;
  for (int64_t i = 0; i < shape.table_h; ++i)
    std::copy_n(grad.row(i), shape.table_w, to + i * shape.table_w);
}

// Sums to which several runs contribute, by pair (image and head) or by head.
template <class T>
using Parts = std::map<int64_t, std::vector<T>>;

template <class T>
void add_part(Parts<T>& parts, int64_t id, const T* data, int64_t size) {
  std::vector<T>& sum = parts[id];
  sum.resize(size_t(size));
  for (int64_t i = 0; i < size; ++i) sum[size_t(i)] += data[i];
}

template <class T>
struct SharedSums {
  Parts<T> keys, tables;

  void add(const SharedSums& other) {
    for (const auto& [id, sum] : other.keys) add_part(keys, id, sum.data(), int64_t(sum.size()));
    for (const auto& [id, sum] : other.tables)
      add_part(tables, id, sum.data(), int64_t(sum.size()));
  }
};

// Heads and images whose tiles may be worked on at the same time.
struct Slice {
  int64_t batch_begin, batch_end, head_begin, head_end;

  int64_t images() const { return batch_end - batch_begin; }
  int64_t pairs() const { return images() * (head_end - head_begin); }
  Item item(int64_t index, int64_t tiles) const {
    Item item(index, tiles, images());
    item.b += batch_begin, item.h += head_begin;
    return item;
  }
};

// Announces the memory that an item's backward starts with.
template <class S>
void prefetch_backward(Prefetch& prefetch, const AttentionBackward& p, const TileGrid& grid,
                       const Item& item) {
  const int d = int(p.in.shape.head_dim);
  prefetch_item<S>(prefetch, p.in, grid, item);
  for (const MapView* map : {&p.out, &p.grad_out})
    prefetch_tile(prefetch, head_data<const S>(*map, item.b, item.h * d), *map,
                  grid.tile(item.tile), d);
}

// Items [begin, end) of a slice, in the order head, image, tile.
template <class S, class T = acc_t<S>>
void backward_run(const AttentionBackward& p, const Slice& slice, const TileGrid& grid,
                  int64_t begin, int64_t end, SharedSums<T>& shared) {
  const AttentionShape& shape = p.in.shape;
  auto work = make_workspace<BackwardWork<S>>(shape);
  const int64_t tiles = grid.count(), head_items = slice.images() * tiles;
  const PaddedTable<T>& grad_table = work.grad_table;
  Prefetch prefetch;
  int64_t last_head = -1;
  for (int64_t i = begin; i < end;) {
    const Item item = slice.item(i, tiles);
    const int64_t b = item.b, h = item.h, first = item.tile;
    const int64_t stop = std::min(tiles, first + end - i);
    work.head.read(p.in, b, h, h != last_head);
    if (h != last_head) std::fill_n(grad_table.cells, shape.table_h ? grad_table.size : 0, T(0));
    last_head = h;
    std::fill_n(work.key_sums, KeySums<T>::size(shape), T(0));
    for (int64_t t = first; t < stop; ++t, ++i) {
      prefetch.clear();
      if (t + 1 == stop) {
        const MapView grad = {nullptr, 0, shape.keys, 0, 1};
        const int64_t channels = (b * shape.heads + h) * shape.head_dim;
        for (void* data : {p.grad_k, p.grad_v})
          prefetch_keys(prefetch, static_cast<const S*>(data) + channels * shape.keys, grad,
                        shape.keys, int(shape.head_dim));
      }
      if (i + 1 < end) prefetch_backward<S>(prefetch, p, grid, slice.item(i + 1, tiles));
      backward_tile(p, b, h, grid.tile(t), work, prefetch);
    }
    if (stop - first == tiles)
      write_key_sums<S>(p, b, h, work.key_sums, work.p);
    else
      add_part(shared.keys, b * shape.heads + h, work.key_sums, KeySums<T>::size(shape));
    const bool head_done = i == end || i % head_items == 0;
    if (!p.grad_table || !head_done) continue;
    const bool whole = i % head_items == 0 && i - head_items >= begin;
    if (whole && slice.images() == shape.batch)
      write_table(p, h, grad_table);
    else
      add_part(shared.tables, h, grad_table.cells, grad_table.size);
  }
}

template <class S, class T = acc_t<S>>
void backward_slice(const AttentionBackward& p, const Slice& slice, const TileGrid& grid,
                    const Threads& threads, SharedSums<T>& shared) {
  const int64_t total = slice.pairs() * grid.count();
  std::vector<SharedSums<T>> of_run(size_t(threads.count));
  parallel(threads, threads.count, [&](int run) {
    const int64_t begin = total * run / threads.count, end = total * (run + 1) / threads.count;
    if (begin < end) backward_run<S>(p, slice, grid, begin, end, of_run[size_t(run)]);
  });
  for (const SharedSums<T>& sums : of_run) shared.add(sums);
}

// A dense bias that broadcasts over images or heads gathers its gradient over them: those are taken
// one after the other.
template <class S>
void attention_backward(const AttentionBackward& p, const Threads& threads) {
  using T = acc_t<S>;
  const AttentionShape& shape = p.in.shape;
  const TileGrid grid = choose_tiles<T>(shape);
  const int64_t image_step = p.grad_bias && !p.grad_bias_batch ? 1 : shape.batch;
  const int64_t head_step = p.grad_bias && !p.grad_bias_head ? 1 : shape.heads;
  SharedSums<T> shared;
  for (int64_t b = 0; b < shape.batch; b += image_step)
    for (int64_t h = 0; h < shape.heads; h += head_step)
      backward_slice<S>(p, {b, b + image_step, h, h + head_step}, grid, threads, shared);
  std::vector<T> rows(size_t(kLanes<T> * kLd<T>));
  for (const auto& [pair, sum] : shared.keys)
    write_key_sums<S>(p, pair / shape.heads, pair % shape.heads, sum.data(), rows.data());
  for (const auto& [h, sum] : shared.tables) {
    Arena none(nullptr);
    PaddedTable<T> table(none, shape);
    table.cells = const_cast<T*>(sum.data());
    write_table(p, h, table);
  }
}

}  // namespace dat::cpu::DAT_SIMD

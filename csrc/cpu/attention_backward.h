// deform_attention, backward: who computes which tile, and where the sums go.
//
// The items (head, image, query tile), in that order, are cut into one run for each thread. A
// thread keeps what is summed over queries (grad_k, grad_v, grad_pos of one head and image;
// grad_table of one head) to itself, and writes it when the run leaves that head. Only what two
// runs share is kept aside and summed at the end, in the order of the runs: results do not depend
// on timing.
#pragma once

#include <map>
#include <vector>

#include "attention_backward_tile.h"

namespace dat::cpu::DAT_SIMD {

// head[c, n] = scale * sums[n][c], added where windows overlap; `rows` is a buffer of kLanes rows
// of kLd.
template <class S, class T>
__attribute__((noinline)) void write_keys(const T* sums, int64_t keys, int64_t channels,
                                          int64_t padded, T scale, T* rows,
                                          const HeadView<S>& head) {
  constexpr int L = kLanes<T>;
  if (head.places || head.channel == 1) {
    for (int64_t n = 0; n < keys; ++n, sums += padded) {
      S* to = head.places ? head.place(n) : head.data + n * head.column;
      if (head.places)
        for (int64_t c = 0; c < channels; ++c)
          to[c] = from_acc<S>(T(to_acc(to[c])) + sums[c] * scale);
      else
        for (int64_t c = 0; c < channels; ++c) to[c] = from_acc<S>(sums[c] * scale);
    }
    return;
  }
  for (int64_t first = 0; first < keys; first += kMaxQueries) {
    const int64_t count = std::min<int64_t>(kMaxQueries, keys - first);
    for (int64_t c = 0; c < channels; c += L) {
      for (int64_t n = 0; n < count; n += L)
        transpose_block(sums + (first + n) * padded + c, padded, rows + n, kLd<T>);
      for (int64_t i = 0; i < std::min<int64_t>(L, channels - c); ++i)
        for (int64_t n = 0; n < count; ++n)
          head.data[(c + i) * head.channel + first + n] = from_acc<S>(rows[i * kLd<T> + n] * scale);
    }
  }
}

// Writes the sums of one head and image to the outputs; `rows` as above.
template <class S, class T = acc_t<S>>
void write_key_sums(const AttentionBackward& p, int64_t b, int64_t h, const T* memory, T* rows) {
  const AttentionShape& shape = p.in.shape;
  const KeySums<T> sums(const_cast<T*>(memory), shape);
  const int64_t d = shape.head_dim, padded = KeySums<T>::padded(shape), pair = b * shape.heads + h;
  write_keys(sums.k, shape.keys, d, padded, T(kLn2), rows, key_view<S>(p.in, p.grad_k, b, h));
  write_keys(sums.v, shape.keys, d, padded, T(1), rows, key_view<S>(p.in, p.grad_v, b, h));
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
  const auto tile_of = [&](const MapView& map) {
    prefetch_tile(prefetch, query_view<const S>(p.in, map, item.b, item.h), grid.tile(item.tile),
                  d);
  };
  prefetch_item<S>(prefetch, p.in, grid, item);
  tile_of(p.grad_out);
  if (needs_out(p.in.shape)) tile_of(p.out);
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
    std::fill_n(KeySums<T>(work.key_sums, shape).pos, shape.keys * 2 * kLanes<T>, T(0));
    for (int64_t t = first; t < stop; ++t, ++i) {
      prefetch.clear();
      if (t + 1 == stop) {
        const int d = int(shape.head_dim);
        for (const MapView* map : {&p.grad_k, &p.grad_v})
          prefetch_keys(prefetch, key_view<const S>(p.in, *map, b, h), shape.keys, d);
      }
      if (i + 1 < end) prefetch_backward<S>(prefetch, p, grid, slice.item(i + 1, tiles));
      backward_tile(p, b, h, grid.tile(t), t == first, work, prefetch);
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

// deform_attention, forward: softmax(scale * q.k + bias) . v without a score in memory.
//
// A thread takes query tiles (tile.h) of one head from a common counter. For each tile it walks
// over the keys, kKeyTile at a time: bias, plus q.k, exponentials under a running maximum, times v.
// All buffers together stay in its L2 cache, most of them in L1; the head's table is copied there
// when the head changes, and keys and values that do not lie as products read them.
#pragma once

#include <atomic>

#include "bias.h"

namespace dat::cpu::DAT_SIMD {

// What the forward and the backward share: the operands of one head, as the products want them.
template <class S>
struct HeadOperands {
  using T = acc_t<S>;

  T *k_copy, *v_copy;
  const T *k, *v;  // [key tile][channel][key_stride], the copies or in place
  TableBias<T> bias;

  HeadOperands(Arena& arena, const AttentionShape& shape)
      : k_copy(arena.take<T>(ceil_div(shape.keys, kKeyTile) * kKeyTile * shape.head_dim)),
        v_copy(arena.take<T>(ceil_div(shape.keys, kKeyTile) * kKeyTile * shape.head_dim)),
        bias(arena, shape) {}

  void read(const AttentionInputs& in, int64_t b, int64_t h, bool table_too) {
    const AttentionShape& shape = in.shape;
    const int d = int(shape.head_dim);
    k = read_keys(key_view<const S>(in, in.k, b, h), shape.keys, d, k_copy);
    v = read_keys(key_view<const S>(in, in.v, b, h), shape.keys, d, v_copy);
    if (!in.table) return;
    const int64_t group = h / (shape.heads / shape.groups);
    bias.read_positions(static_cast<const T*>(in.pos) + (b * shape.groups + group) * shape.keys * 2,
                        shape.keys);
    if (table_too)
      bias.table.read(static_cast<const T*>(in.table) + h * shape.table_h * shape.table_w,
                      T(kLog2e));
  }
};

// s[n][m] = (scale * q.k + bias) * log2(e), for `keys` keys from `first` on. `q` carries the
// factor. top[m], if wanted, grows to the largest of them.
template <class S, class T = acc_t<S>>
void scores(const AttentionInputs& in, const HeadOperands<S>& head, int64_t b, int64_t h,
            const Tile& tile, int64_t first, int keys, const T* q, T* s, T* top,
            Prefetch& prefetch) {
  const int d = int(in.shape.head_dim);
  if (in.table) head.bias.forward(tile, first, keys, s);
  if (in.bias.data) {
    const S* bias = static_cast<const S*>(in.bias.data) + b * in.bias.batch + h * in.bias.head;
    dense_bias<S>(in.table, bias, in.bias, tile, in.shape.width, first, keys, s);
  }
  multiply_keys(in.table || in.bias.data, keys, tile.queries(), d, head.k + first * d,
                key_stride(in.shape.keys), q, s, top, prefetch);
}

template <class S>
struct ForwardWork {
  using T = acc_t<S>;

  HeadOperands<S> head;
  T *q, *s, *o;            // tile buffers of channels, keys, channels
  T *maximum, *top, *sum;  // [query]: largest score before and now, sum of exponentials
  T* factor;               // of dropout, a tile buffer of keys

  ForwardWork(Arena& arena, const AttentionShape& shape)
      : head(arena, shape),
        q(arena.take<T>(shape.head_dim * kLd<T>)),
        s(arena.take<T>((kKeyTile + 1) * kLd<T>)),
        o(arena.take<T>(shape.head_dim * kLd<T>)),
        maximum(arena.take<T>(kLd<T>)),
        top(arena.take<T>(kLd<T>)),
        sum(arena.take<T>(kLd<T>)),
        factor(arena.take<T>(shape.dropout_p > 0 ? kKeyTile * kLd<T> : 0)) {}
};

// Replaces scores by exponentials under the maximum now; where that grew, the sum and the output so
// far shrink. A row that met only -inf keeps weights of 0, hence NaN at the end.
template <int X, class T>
DAT_INLINE void exponentials(int keys, int channels, T* s, T* o, T* before, const T* now, T* sums) {
  constexpr int L = kLanes<T>;
  Vec<T> top[X], shrink[X], sum[X];
  for (int x = 0; x < X; ++x) {
    const Vec<T> largest = load(now + x * L);
    top[x] = largest == -splat(T(INFINITY)) ? Vec<T>{} : largest;
    shrink[x] = exp2<T>(load(before + x * L) - top[x]);
    sum[x] = load(sums + x * L) * shrink[x];
    store(before + x * L, largest);
  }
  for (int n = 0; n < keys; ++n)
#pragma GCC unroll 4
    for (int x = 0; x < X; ++x) {
      T* at = s + n * kLd<T> + x * L;
      const Vec<T> p = exp2<T>(load(at) - top[x]);
      sum[x] += p;
      store(at, p);
    }
  for (int x = 0; x < X; ++x) store(sums + x * L, sum[x]);
  for (int c = 0; c < channels; ++c)
    for (int x = 0; x < X; ++x) {
      T* at = o + c * kLd<T> + x * L;
      store(at, load(at) * shrink[x]);
    }
}

template <class T>
__attribute__((noinline)) void softmax_step(int keys, int vectors, int channels, T* s, T* o,
                                            T* before, const T* now, T* sums) {
  constexpr int X = 4, L = kLanes<T>;
  int x = 0;
  for (; x + X * L <= vectors * L; x += X * L)
    exponentials<X>(keys, channels, s + x, o + x, before + x, now + x, sums + x);
  for (; x < vectors * L; x += L)
    exponentials<1>(keys, channels, s + x, o + x, before + x, now + x, sums + x);
}

template <class S>
void forward_tile(const AttentionForward& p, int64_t b, int64_t h, const Tile& tile,
                  const ForwardWork<S>& work, Prefetch& prefetch) {
  using T = acc_t<S>;
  const AttentionShape& shape = p.in.shape;
  const int d = int(shape.head_dim), vectors = int(ceil_div(tile.queries(), kLanes<T>));
  const HeadView<S> out = query_view<S>(p.in, p.out, b, h);
  prefetch_tile(prefetch, out, tile, d);
  read_tile(query_view<const S>(p.in, p.in.q, b, h), tile, d, T(shape.scale * kLog2e), work.q);
  std::fill_n(work.maximum, vectors * kLanes<T>, -T(INFINITY));
  std::fill_n(work.top, vectors * kLanes<T>, -T(INFINITY));
  std::fill_n(work.sum, vectors * kLanes<T>, T(0));
  for (int64_t first = 0; first < shape.keys; first += kKeyTile) {
    const int keys = int(std::min<int64_t>(kKeyTile, shape.keys - first));
    scores<S>(p.in, work.head, b, h, tile, first, keys, work.q, work.s, work.top, prefetch);
    softmax_step(keys, vectors, first ? d : 0, work.s, work.o, work.maximum, work.top, work.sum);
    if (shape.dropout_p > 0) {
      dropout_factors(uint64_t(*p.in.seed), shape.dropout_p, b* shape.heads + h, tile, shape.width,
                      first, keys, work.factor);
      for (int64_t i = 0; i < keys * kLd<T>; ++i) work.s[i] *= work.factor[i];
    }
    multiply_values(first > 0, keys, tile.queries(), d, work.head.v + first * d,
                    key_stride(shape.keys), work.s, work.o, prefetch);
  }
  for (int m = 0; m < vectors * kLanes<T>; m += kLanes<T>) {
    const Vec<T> total = load(work.sum + m);
    store(work.sum + m, T(1) / total);
    store(work.maximum + m, (load(work.maximum + m) + log2<T>(total)) * T(kLn2));
  }
  write_tile(work.o, work.sum, tile, d, out);
  const MapView lse = contiguous_map(p.lse, shape.heads, shape.height, shape.width);
  std::fill_n(work.sum, vectors * kLanes<T>, T(1));
  write_tile(work.maximum, work.sum, tile, 1, head_view<T>(lse, b, h));
}

// Work on one head and image: `tile` counts over all tiles of all of them, images before heads, so
// that a head's table is read once.
struct Item {
  int64_t b, h, tile;

  Item(int64_t index, int64_t tiles, int64_t images)
      : b(index / tiles % images), h(index / tiles / images), tile(index % tiles) {}
};

// Announces the memory that an item starts with; its keys if it is a head's first.
template <class S>
void prefetch_item(Prefetch& prefetch, const AttentionInputs& in, const TileGrid& grid,
                   const Item& item) {
  const int d = int(in.shape.head_dim);
  prefetch_tile(prefetch, query_view<const S>(in, in.q, item.b, item.h), grid.tile(item.tile), d);
  if (item.tile) return;
  for (const MapView* map : {&in.k, &in.v})
    prefetch_keys(prefetch, key_view<const S>(in, *map, item.b, item.h), in.shape.keys, d);
}

template <class S>
void attention_forward(const AttentionForward& p, const Threads& threads) {
  const AttentionShape& shape = p.in.shape;
  const TileGrid grid = choose_tiles<acc_t<S>>(shape);
  const int64_t tiles = grid.count(), total = shape.batch * shape.heads * tiles;
  const int64_t step = std::max<int64_t>(1, std::min(tiles, total / (threads.count * 8)));
  std::atomic<int64_t> next{0};
  parallel(threads, threads.count, [&](int) {
    auto work = make_workspace<ForwardWork<S>>(shape);
    Prefetch prefetch;
    int64_t last_pair = -1, last_head = -1;
    for (int64_t begin; (begin = next.fetch_add(step)) < total;)
      for (int64_t i = begin; i < std::min(total, begin + step); ++i) {
        const Item item(i, tiles, shape.batch);
        if (i / tiles != last_pair) work.head.read(p.in, item.b, item.h, item.h != last_head);
        last_pair = i / tiles, last_head = item.h;
        prefetch.clear();
        if (i + 1 < total) prefetch_item<S>(prefetch, p.in, grid, Item(i + 1, tiles, shape.batch));
        forward_tile(p, item.b, item.h, grid.tile(item.tile), work, prefetch);
      }
  });
}

}  // namespace dat::cpu::DAT_SIMD

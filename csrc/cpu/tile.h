// Tiles: which queries are worked on at a time, and how they come into cache and leave it.
//
// A tile is a rectangle of the query lattice, its queries numbered row by row without gaps, so that
// products run over full vectors whatever the map's width. Tile buffers are [channel or key][query]
// with the fixed stride kLd; lanes past the last query hold leftovers, NaN among them, which never
// leave their lanes.
#pragma once

#include <algorithm>

#include "../math/convert.h"
#include "../params.h"
#include "gemm.h"
#include "kernels.h"

namespace dat::cpu::DAT_SIMD {

constexpr int kMaxQueries = 256;  // of a tile
constexpr int kMaxRows = 32;      // of a tile
constexpr int kMaxSlots = 64;     // table rows that a tile reaches, at slopes other than 1
constexpr int kKeyTile = 64;      // keys worked on at a time
// An odd number of cache lines, so that the rows of a tile buffer spread over the cache's sets.
template <class T>
constexpr int kLd = kMaxQueries + kLanes<T>;

DAT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
DAT_INLINE int64_t round_up(int64_t n) {
  return ceil_div(n, kLanes<T>) * kLanes<T>;
}

struct Tile {
  int64_t row, column;
  int rows, columns;

  int queries() const { return rows * columns; }
};

struct TileGrid {
  int64_t height, width;
  int64_t down, across;  // number of tiles

  int64_t count() const { return down * across; }
  Tile tile(int64_t index) const {
    const int64_t y = index / across, x = index % across;
    const int64_t y0 = height * y / down, x0 = width * x / across;
    return {y0, x0, int(height * (y + 1) / down - y0), int(width * (x + 1) / across - x0)};
  }
};

// The cut with the least work, estimated in vector instructions for one key: products and softmax
// over all lanes; the bias, by rows of the tile and of the table; copies, by runs of memory; and
// what each tile and key cost whatever the tile's size.
template <class T>
TileGrid choose_tiles(const AttentionShape& shape) {
  const double d = double(shape.head_dim);
  const TableAxis<T> y = table_axis<T>(shape.table_h, shape.height, shape.version);
  const TableAxis<T> x = table_axis<T>(shape.table_w, shape.width, shape.version);
  const bool unit = y.slope == 1 && x.slope == 1;
  TileGrid best{shape.height, shape.width, shape.height, shape.width};
  double best_cost = 1e300;
  for (int64_t across = ceil_div(shape.width, kMaxQueries); across <= shape.width; ++across) {
    const int64_t columns = ceil_div(shape.width, across);
    if (columns < 16 && across > 1) break;
    for (int64_t down = ceil_div(shape.height, kMaxRows); down <= shape.height; ++down) {
      const int64_t rows = ceil_div(shape.height, down), queries = rows * columns;
      if (queries > kMaxQueries) continue;
      const double vectors = double(ceil_div(columns, kLanes<T>));
      const double slots = double(rows - 1) * double(y.slope) + 3;
      if (slots > kMaxSlots) continue;
      const double bias = unit ? vectors * (7 * double(rows) + 10)
                               : vectors * (5 * double(rows) + 10 * slots + 20) + 20;
      const double products = double(ceil_div(queries, kLanes<T>)) * (2 * d + 20);
      const double runs = across == 1 ? 1 : double(rows);
      const double copies = 2 * d * runs * 20 / double(shape.keys);
      const double cost = products + (shape.table_h ? bias : 0) + copies + 40;
      if (double(down * across) * cost < best_cost)
        best_cost = double(down * across) * cost, best.down = down, best.across = across;
    }
  }
  return best;
}

// Hands out pieces of one block of memory; a first pass over a null block counts the bytes.
class Arena {
 public:
  explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// The calling thread's workspace W, a struct of pointers laid out by W(Arena&, arguments).
template <class W, class... Arguments>
W make_workspace(const Arguments&... arguments) {
  Arena count(nullptr);
  W(count, arguments...);
  Arena real(thread_scratch(count.used()));
  return W(real, arguments...);
}

// First element of one head in one image.
template <class S>
S* head_data(const MapView& map, int64_t batch, int64_t channel) {
  return static_cast<S*>(map.data) + batch * map.batch + channel * map.channel;
}

// One head of one image, or of one window (WindowRows). Results are contiguous or channels-last.
template <class S>
struct HeadView {
  S* data;
  int64_t channel, row, column;  // strides
  const int64_t* places;         // of a window's pixels, or null

  S* place(int64_t pixel) const { return data + places[pixel] * column; }
};

template <class S>
HeadView<S> head_view(const MapView& map, int64_t batch, int64_t channel,
                      const int64_t* rows = nullptr, int64_t pixels = 0) {
  return {head_data<S>(map, batch, channel), map.channel, map.row, map.column,
          rows ? rows + batch * pixels : nullptr};
}
// Of q, out and their gradients, and of k, v and theirs.
template <class S>
HeadView<S> query_view(const AttentionInputs& in, const MapView& map, int64_t b, int64_t h) {
  return head_view<S>(map, b, h * in.shape.head_dim, in.windows.queries, in.shape.queries());
}
template <class S>
HeadView<S> key_view(const AttentionInputs& in, const MapView& map, int64_t b, int64_t h) {
  return head_view<S>(map, b, h * in.shape.head_dim, in.windows.keys, in.shape.keys);
}

// MapView of a contiguous [B, C, H, W].
inline MapView contiguous_map(void* data, int64_t channels, int64_t height, int64_t width) {
  return {data, channels * height * width, height * width, width, 1};
}

// Calls f(pointer into the map, query number, count) for each run of queries that are neighbours
// in memory along the map's columns: whole tiles where rows follow each other, else rows.
template <class S, class F>
DAT_INLINE void for_each_run(const HeadView<S>& head, int channel, const Tile& tile, const F& f) {
  S* first = head.data + channel * head.channel + tile.row * head.row + tile.column * head.column;
  const bool joined = head.row == tile.columns * head.column;
  const int runs = joined ? 1 : tile.rows, count = joined ? tile.queries() : tile.columns;
  for (int run = 0; run < runs; ++run) f(first + run * head.row, run * count, count);
}

template <class S, class T>
DAT_INLINE void read_run(const S* from, int64_t stride, int count, T scale, T* to) {
  if (stride == 1)
    for (int i = 0; i < count; ++i) to[i] = T(to_acc(from[i])) * scale;
  else
    for (int i = 0; i < count; ++i) to[i] = T(to_acc(from[i * stride])) * scale;
}

// Calls f(query, its place in the tile, count) for each run of queries that follow each other.
template <class F>
DAT_INLINE void for_each_query_run(const Tile& tile, int64_t width, const F& f) {
  const bool joined = tile.columns == width;
  const int runs = joined ? 1 : tile.rows, count = joined ? tile.queries() : tile.columns;
  for (int run = 0; run < runs; ++run)
    f((tile.row + run) * width + tile.column, run * count, count);
}

// to[c * to_stride + i] = scale * from(i)[c]: of pixels that lie channels-last in memory.
template <class T, class From>
DAT_INLINE void read_transposed(const From& from, int count, int channels, T scale, T* to,
                                int64_t to_stride) {
  constexpr int L = kLanes<T>;
  int blocked = 0, across = 0;  // pixels and channels that whole blocks cover
  if constexpr (std::is_same_v<decltype(from(0)), const T*>) {
    blocked = count / L * L, across = channels / L * L;
    for (int i = 0; i < blocked; i += L)
      for (int c = 0; c < across; c += L)
        transpose_block<T>([&](int row) { return from(i + row) + c; },
                           [&](int row) { return to + (c + row) * to_stride + i; }, splat(scale));
  }
  for (int i = 0; i < count; ++i)
    for (int c = i < blocked ? across : 0; c < channels; ++c)
      to[c * to_stride + i] = T(to_acc(from(i)[c])) * scale;
}

// to(i)[c] = from[c * kLd + i] * scale[i]
template <class T, class To>
DAT_INLINE void write_transposed(const T* from, const T* scale, int count, int channels,
                                 const To& to) {
  using S = std::remove_pointer_t<decltype(to(0))>;
  constexpr int L = kLanes<T>;
  int blocked = 0, across = 0;
  if constexpr (std::is_same_v<S, T>) {
    blocked = count / L * L, across = channels / L * L;
    for (int i = 0; i < blocked; i += L)
      for (int c = 0; c < across; c += L)
        transpose_block<T>([&](int row) { return from + (c + row) * kLd<T> + i; },
                           [&](int row) { return to(i + row) + c; }, load(scale + i));
  }
  for (int i = 0; i < count; ++i)
    for (int c = i < blocked ? across : 0; c < channels; ++c)
      to(i)[c] = from_acc<S>(from[c * kLd<T> + i] * scale[i]);
}

// tile_buffer[c][query] = scale * head[c, query]; lanes past the last query are 0.
template <class S, class T>
__attribute__((noinline)) void read_tile(const HeadView<const S>& head, const Tile& tile,
                                         int channels, T scale, T* to) {
  const int queries = tile.queries(), padded = int(round_up<T>(queries));
  if (head.places)
    read_transposed([&](int i) { return head.place(tile.column + i); }, queries, channels, scale,
                    to, kLd<T>);
  else if (head.channel == 1)
    for_each_run(head, 0, tile, [&](const S* from, int query, int count) {
      read_transposed([&](int i) { return from + i * head.column; }, count, channels, scale,
                      to + query, kLd<T>);
    });
  else
    for (int c = 0; c < channels; ++c)
      for_each_run(head, c, tile, [&](const S* from, int query, int count) {
        read_run(from, head.column, count, scale, to + c * kLd<T> + query);
      });
  for (int c = 0; c < channels; ++c)
    for (int i = queries; i < padded; ++i) to[c * kLd<T> + i] = 0;
}

// head[c, query] = tile_buffer[c][query] * scale[query]
template <class S, class T>
__attribute__((noinline)) void write_tile(const T* from, const T* scale, const Tile& tile,
                                          int channels, const HeadView<S>& head) {
  if (head.places)
    write_transposed(from, scale, tile.queries(), channels,
                     [&](int i) { return head.place(tile.column + i); });
  else if (head.channel == 1)
    for_each_run(head, 0, tile, [&](S* to, int query, int count) {
      write_transposed(from + query, scale + query, count, channels,
                       [&](int i) { return to + i * head.column; });
    });
  else
    for (int c = 0; c < channels; ++c, from += kLd<T>)
      for_each_run(head, c, tile, [&](S* to, int query, int count) {
        for (int i = 0; i < count; ++i) to[i] = from_acc<S>(from[query + i] * scale[query + i]);
      });
}

// Announces a tile's, or a list of keys', memory.
template <class S>
void prefetch_tile(Prefetch& prefetch, const HeadView<S>& head, const Tile& tile, int channels) {
  if (head.column != 1 || head.places) return;
  const int64_t size = sizeof(S), channel = head.channel * size;
  const S* first = head.data + tile.row * head.row + tile.column;
  if (head.row == tile.columns)
    return prefetch.add(first, tile.queries() * size, channels, channel);
  prefetch.add(first, tile.columns * size, tile.rows, head.row * size, channels, channel);
}
template <class S>
void prefetch_keys(Prefetch& prefetch, const HeadView<S>& head, int64_t keys, int channels) {
  const int64_t size = sizeof(S);
  if (head.column == 1 && !head.places)
    prefetch.add(head.data, keys * size, channels, head.channel * size);
}

// Keys or values of one head as [key tile][channel][key_stride]: in place if they lie so, else read
// into `copy`; what follows the last key is never read.
DAT_INLINE int key_stride(int64_t keys) { return int(std::min<int64_t>(keys, kKeyTile)); }

template <class S, class T>
__attribute__((noinline)) const T* read_keys(const HeadView<const S>& head, int64_t keys,
                                             int channels, T* copy) {
  const int stride = key_stride(keys);
  if (!head.places && keys <= kKeyTile && head.channel == keys * head.column) {
    if constexpr (std::is_same_v<S, T>)
      if (head.column == 1) return head.data;
    read_run(head.data, head.column, channels * int(keys), T(1), copy);
    return copy;
  }
  T* to = copy;
  for (int64_t first = 0; first < keys; first += kKeyTile, to += channels * stride) {
    const int count = int(std::min<int64_t>(kKeyTile, keys - first));
    const S* data = head.data + first * head.column;
    if (head.places)
      read_transposed([&](int i) { return head.place(first + i); }, count, channels, T(1), to,
                      stride);
    else if (head.channel == 1)
      read_transposed([&](int i) { return data + i * head.column; }, count, channels, T(1), to,
                      stride);
    else
      for (int c = 0; c < channels; ++c)
        read_run(data + c * head.channel, head.column, count, T(1), to + c * stride);
  }
  return copy;
}

// The products of attention on one tile: `keys` of one key tile, `queries` of its lanes.
//   s[n][m] (+)= sum over c of k[c][n] * q[c][m];  top[m] = max(top[m], s[n][m])
template <class T>
__attribute__((noinline)) void multiply_keys(bool accumulate, int keys, int queries, int channels,
                                             const T* k, int k_stride, const T* q, T* s, T* top,
                                             Prefetch& prefetch) {
  gemm<kBlockRows, kBlockVectors>(accumulate, keys, queries, channels, Operand<T>{k, 1, k_stride},
                                  q, kLd<T>, s, kLd<T>, top, &prefetch);
}
//   o[c][m] (+)= sum over n of v[c][n] * p[n][m]
template <class T>
__attribute__((noinline)) void multiply_values(bool accumulate, int keys, int queries, int channels,
                                               const T* v, int v_stride, const T* p, T* o,
                                               Prefetch& prefetch) {
  gemm<kBlockRows, kBlockVectors>(accumulate, channels, queries, keys, Operand<T>{v, v_stride, 1},
                                  p, kLd<T>, o, kLd<T>, static_cast<T*>(nullptr), &prefetch);
}
//   g[n][c] (+)= sum over m of p[n][m] * o[m][c], with padded channels. A tile's part is a sum
// of its own: one running over all queries of a large map would lose digits.
template <class T>
__attribute__((noinline)) void multiply_queries(bool accumulate, int keys, int queries,
                                                int64_t padded, const T* p, const T* o, T* g,
                                                Prefetch& prefetch) {
  gemm<kTallRows, kTallVectors>(accumulate, keys, int(padded), queries, Operand<T>{p, kLd<T>, 1}, o,
                                padded, g, padded, static_cast<T*>(nullptr), &prefetch);
}

}  // namespace dat::cpu::DAT_SIMD

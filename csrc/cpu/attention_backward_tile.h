// deform_attention, backward, one tile: the scores are computed again from the saved log-sum-exp.
//
// With p the probabilities and dp = grad_out . v, the scores' gradient is ds = p (dp - row_sum),
// and
//   grad_v[n] += p grad_out,  grad_k[n] += scale ds q,  grad_q[m] = scale ds k,
// and ds is the gradient of the bias. The row sums, over keys, are those of p dp; where a tile does
// not meet all keys at once they must be known before, and are those of grad_out out over channels.
// grad_v and grad_k sum over queries: they stay with the thread (KeySums) until it leaves the head
// and image.
#pragma once

#include "attention_forward.h"

namespace dat::cpu::DAT_SIMD {

// Sums over the queries of one head and image, in the units they are added up in.
template <class T>
struct KeySums {
  // [N, padded channels], both padded for blocks, where nothing is written;
  // k times 1 / (scale * log2(e)).
  T *k, *v;
  T* pos;  // [N][2][lanes], in cells, times log2(e)

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
  T *q, *grad_out, *grad_q;   // tile buffers of channels
  T *q_rows, *grad_out_rows;  // [query][padded channels]
  T *p, *ds, *factor;         // tile buffers of keys
  T *lse, *row_sum;           // [query]
  T *before, *top, *sum;      // [query], of coarse rows

  BackwardWork(Arena& arena, const AttentionShape& shape)
      : head(arena, shape),
        grad_table(arena, shape),
        key_sums(arena.take<T>(KeySums<T>::size(shape))),
        q(arena.take<T>(channel_rows(shape) * kLd<T>)),
        grad_out(arena.take<T>(channel_rows(shape) * kLd<T>)),
        grad_q(arena.take<T>(shape.head_dim * kLd<T>)),
        q_rows(arena.take<T>(KeySums<T>::padded(shape) * kLd<T>)),
        grad_out_rows(arena.take<T>(KeySums<T>::padded(shape) * kLd<T>)),
        p(arena.take<T>((kKeyTile + 1) * kLd<T>)),
        ds(arena.take<T>((kKeyTile + 1) * kLd<T>)),
        factor(arena.take<T>(shape.dropout_p > 0 ? kKeyTile * kLd<T> : 0)),
        lse(arena.take<T>(kLd<T>)),
        row_sum(arena.take<T>(kLd<T>)),
        before(arena.take<T>(kLd<T>)),
        top(arena.take<T>(kLd<T>)),
        sum(arena.take<T>(kLd<T>)) {}

  // Tile buffers of channels that are transposed have the padding channels, too.
  static int64_t channel_rows(const AttentionShape& shape) { return KeySums<T>::padded(shape); }
};

// Whether the row sums come from `out`.
inline bool needs_out(const AttentionShape& shape) { return shape.keys > kKeyTile; }

// [channel][query] -> [query][padded channel]
template <class T>
__attribute__((noinline)) void transpose_tile(const T* from, int queries, int64_t padded, T* to) {
  for (int m = 0; m < queries; m += kLanes<T>)
    for (int64_t c = 0; c < padded; c += kLanes<T>)
      transpose_block(from + c * kLd<T> + m, kLd<T>, to + m * padded + c, padded);
}

// p = 2^(s - lse), and what the values' gradient multiplies: p times the dropout factor, in s;
// ds = the scores' gradient from dp, the probabilities' one. No row_sum: these are all keys.
template <class T>
__attribute__((noinline)) void softmax_backward(int keys, int vectors, const T* lse,
                                                const T* row_sum, const T* factor, T* s, T* dp) {
  constexpr int L = kLanes<T>;
  for (int x = 0; x < vectors * L; x += L) {
    const Vec<T> log_sum = load(lse + x);
    const auto probability = [=](int at) { return exp2<T>(load(s + at) - log_sum); };
    const auto kept = [=](int at, Vec<T> y) { return factor ? y * load(factor + at) : y; };
    const int end = keys * kLd<T>;
    Vec<T> sum{}, total{};
    if (row_sum) {
      sum = load(row_sum + x);
    } else {
      for (int at = x; at < end; at += kLd<T>) {
        const Vec<T> p = probability(at);
        sum += p * kept(at, load(dp + at));
        total += p;
        store(s + at, p);
      }
      // The total is 1 but for the rounding of lse, which would move all ds of a row.
      sum = sum / total;
    }
    for (int at = x; at < end; at += kLd<T>) {
      const Vec<T> p = row_sum ? probability(at) : load(s + at);
      store(s + at, kept(at, p));
      store(dp + at, softmax_vjp(p, kept(at, load(dp + at)), sum));
    }
  }
}

// Adds a tile's ds [n][m] to grad_bias [.., M, N].
template <class T>
void add_dense_grad(const T* ds, const Tile& tile, int64_t width, int64_t keys_total, int64_t first,
                    int keys, T* grad) {
  constexpr int L = kLanes<T>;
  for_each_query_run(tile, width, [&](int64_t query, int place, int count) {
    const T* from = ds + place;
    T* to = grad + query * keys_total + first;
    const int blocked = count / L * L, across = keys / L * L;
    T block[L * L];
    for (int m = 0; m < blocked; m += L)
      for (int n = 0; n < across; n += L) {
        transpose_block(from + n * kLd<T> + m, kLd<T>, block, L);
        for (int i = 0; i < L; ++i) {
          T* row = to + (m + i) * keys_total + n;
          store(row, load(row) + load(block + i * L));
        }
      }
    for (int m = 0; m < count; ++m)
      for (int n = m < blocked ? across : 0; n < keys; ++n)
        to[m * keys_total + n] += from[n * kLd<T> + m];
  });
}

// row_sum[m] = sum over channels of grad_out * out; `out` is a tile buffer to read it into.
template <class S, class T>
void read_row_sums(const AttentionBackward& p, int64_t b, int64_t h, const Tile& tile,
                   const T* grad_out, T* out, T* row_sum) {
  const int d = int(p.in.shape.head_dim), queries = tile.queries();
  read_tile(query_view<const S>(p.in, p.out, b, h), tile, d, T(1), out);
  std::fill_n(row_sum, kLd<T>, T(0));
  for (int c = 0; c < d; ++c)
    for (int m = 0; m < queries; ++m) row_sum[m] += out[c * kLd<T> + m] * grad_out[c * kLd<T> + m];
}

// Loads what a tile needs once: q, grad_out, both transposed, and the saved lse.
template <class S>
void load_tile(const AttentionBackward& p, int64_t b, int64_t h, const Tile& tile,
               const BackwardWork<S>& work) {
  using T = acc_t<S>;
  const AttentionShape& shape = p.in.shape;
  const int d = int(shape.head_dim), queries = tile.queries();
  const int64_t padded = KeySums<T>::padded(shape);
  read_tile(query_view<const S>(p.in, p.grad_out, b, h), tile, d, T(1), work.grad_out);
  read_tile(query_view<const S>(p.in, p.in.q, b, h), tile, d, T(shape.scale * kLog2e), work.q);
  const MapView lse =
      contiguous_map(const_cast<void*>(p.lse), shape.heads, shape.height, shape.width);
  read_tile(head_view<const T>(lse, b, h), tile, 1, T(kLog2e), work.lse);
  std::fill_n(work.q + d * kLd<T>, (padded - d) * kLd<T>, T(0));
  std::fill_n(work.grad_out + d * kLd<T>, (padded - d) * kLd<T>, T(0));
  transpose_tile(work.q, queries, padded, work.q_rows);
  transpose_tile(work.grad_out, queries, padded, work.grad_out_rows);
}

// The larger lse is, the fewer digits of the sum of exponentials are left in it: of a row that a
// finite bias masks altogether, none. Says whether a tile has rows where it is coarse. They are
// measured again: top becomes their largest score, to be subtracted from all, and 0 for other rows;
// lse the logarithm alone.
template <class S>
bool measure_coarse_rows(const AttentionInputs& in, int64_t b, int64_t h, const Tile& tile,
                         const BackwardWork<S>& work) {
  using T = acc_t<S>;
  constexpr T kCoarse = 4096;
  const int queries = tile.queries(), vectors = int(ceil_div(queries, kLanes<T>));
  IVec<T> any{};
  for (int x = 0; x < vectors * kLanes<T>; x += kLanes<T>)
    any |= ~(absolute<T>(load(work.lse + x)) < kCoarse);
  bool is_coarse = false;
  for (int i = 0; i < kLanes<T>; ++i) is_coarse |= any[i] != 0;
  if (!is_coarse) return false;
  std::fill_n(work.before, kLd<T>, -T(INFINITY));
  std::fill_n(work.top, kLd<T>, -T(INFINITY));
  std::fill_n(work.sum, kLd<T>, T(0));
  Prefetch none;
  for (int64_t first = 0; first < in.shape.keys; first += kKeyTile) {
    const int keys = int(std::min<int64_t>(kKeyTile, in.shape.keys - first));
    scores<S>(in, work.head, b, h, tile, first, keys, work.q, work.p, work.top, none);
    softmax_step(keys, vectors, 0, work.p, work.grad_q, work.before, work.top, work.sum);
  }
  for (int m = 0; m < queries; ++m)
    if (std::abs(work.lse[m]) < kCoarse)
      work.top[m] = 0;
    else
      work.lse[m] = std::log2(work.sum[m]);
  return true;
}

template <class T>
void subtract_top(int keys, int vectors, const T* top, T* s) {
  for (int n = 0; n < keys; ++n, s += kLd<T>)
    for (int m = 0; m < vectors * kLanes<T>; m += kLanes<T>)
      store(s + m, load(s + m) - load(top + m));
}

// Adds to the key sums; the products start theirs with the first tile.
template <class S>
void backward_tile(const AttentionBackward& p, int64_t b, int64_t h, const Tile& tile,
                   bool first_tile, const BackwardWork<S>& work, Prefetch& prefetch) {
  using T = acc_t<S>;
  const AttentionInputs& in = p.in;
  const AttentionShape& shape = in.shape;
  const int d = int(shape.head_dim), queries = tile.queries();
  const int vectors = int(ceil_div(queries, kLanes<T>)), stride = key_stride(shape.keys);
  const int64_t padded = KeySums<T>::padded(shape);
  const KeySums<T> sums(work.key_sums, shape);
  const T* factor = shape.dropout_p > 0 ? work.factor : nullptr;
  const HeadView<S> grad_q = query_view<S>(in, p.grad_q, b, h);
  prefetch_tile(prefetch, grad_q, tile, d);
  load_tile(p, b, h, tile, work);
  const T* row_sum = needs_out(shape) ? work.row_sum : nullptr;
  if (row_sum)  // grad_q's buffer serves to read out
    read_row_sums<S>(p, b, h, tile, work.grad_out, work.grad_q, work.row_sum);
  const bool is_coarse = measure_coarse_rows(in, b, h, tile, work);
  for (int64_t first = 0; first < shape.keys; first += kKeyTile) {
    const int keys = int(std::min<int64_t>(kKeyTile, shape.keys - first));
    scores<S>(in, work.head, b, h, tile, first, keys, work.q, work.p, static_cast<T*>(nullptr),
              prefetch);
    if (is_coarse) subtract_top(keys, vectors, work.top, work.p);
    multiply_keys(false, keys, queries, d, work.head.v + first * d, stride, work.grad_out, work.ds,
                  static_cast<T*>(nullptr), prefetch);
    if (factor)
      dropout_factors(uint64_t(*in.seed), shape.dropout_p, b* shape.heads + h, tile, shape.width,
                      first, keys, work.factor);
    softmax_backward(keys, vectors, work.lse, row_sum, factor, work.p, work.ds);
    multiply_queries(!first_tile, keys, queries, padded, work.p, work.grad_out_rows,
                     sums.v + first * padded, prefetch);
    multiply_queries(!first_tile, keys, queries, padded, work.ds, work.q_rows,
                     sums.k + first * padded, prefetch);
    multiply_values(first > 0, keys, queries, d, work.head.k + first * d, stride, work.ds,
                    work.grad_q, prefetch);
    if (in.table) work.head.bias.backward(tile, first, keys, work.ds, work.grad_table, sums.pos);
    if (p.grad_bias)
      add_dense_grad(work.ds, tile, shape.width, shape.keys, first, keys,
                     static_cast<T*>(p.grad_bias) + b * p.grad_bias_batch + h * p.grad_bias_head);
  }
  std::fill_n(work.row_sum, queries, T(shape.scale));
  write_tile(work.grad_q, work.row_sum, tile, d, grad_q);
}

}  // namespace dat::cpu::DAT_SIMD

// deform_attention with nothing shared and nothing tuned: float64, which is there to check
// gradients. Few kernels that compile in seconds, need no shared memory, and are exact.
//
// Forward and backward over queries: a warp owns a query. Lane l computes the weights, or gradients
// of scores, of keys l, l + 32, ..; one after the other they are handed to all lanes, which sum for
// channels l, l + 32, .. Backward over keys: the same with keys and queries exchanged. No barriers,
// and sums in a fixed order; but for the table's gradient, which is made of atomic additions:
// deterministic, one warp makes all of a head's, lane after lane.
#pragma once

#include "attention_tiles.cuh"

namespace dat::cuda {

constexpr int kPlainWarps = 4, kMostChannels = 128;

// What a Scorer wants to know of an engine.
template <class T>
struct Plain {
  using Storage = T;
  using Acc = acc_t<T>;
  static constexpr int kStack = 1;
};

// The channels of a query or key; `width` of them make a row of the map.
template <class T>
struct Column {
  using A = acc_t<T>;
  const T* channels;
  int64_t stride;

  __device__ Column(const MapView& view, const AttentionShape& shape, const BlockPlace& at,
                    int64_t width, int64_t i)
      : channels(head_data<T>(view, shape, at) + i / width * view.row + i % width * view.column),
        stride(view.channel) {}
  __device__ A operator[](int c) const { return to_acc(channels[c * stride]); }
  __device__ A product(const Column& with, int head_dim) const {
    A sum = 0;
    for (int c = 0; c < head_dim; ++c) sum += (*this)[c] * with[c];
    return sum;
  }
};

// The queries and keys of one (image, head).
template <class T>
struct Pairs {
  using A = acc_t<T>;
  const AttentionInputs& in;
  const Plan& plan;
  BlockPlace at;
  int head_dim;
  Scorer<Plain<T>, Bias::direct> scorer;

  __device__ Pairs(const AttentionInputs& in_, const Plan& plan_, int batch_head)
      : in(in_),
        plan(plan_),
        at(in.shape, 1, batch_head),
        head_dim(int(in.shape.head_dim)),
        scorer(in, plan, at, nullptr) {}
  Pairs(const Pairs&) = delete;  // the scorer refers to `at`

  __device__ Column<T> query(const MapView& view, int64_t m) const {
    return {view, in.shape, at, in.shape.width, m};
  }
  __device__ Column<T> key(const MapView& view, int n) const {
    return {view, in.shape, at, in.shape.keys, n};
  }
  __device__ int row(int64_t m) const { return int(m / in.shape.width); }
  __device__ int column(int64_t m) const { return int(m % in.shape.width); }

  // The score as an exponent of 2.
  __device__ A exponent(int64_t m, int n) const {
    const A bias = as_exponent(scorer.unusual(0, n, row(m), column(m)));
    return fused(query(in.q, m).product(key(in.k, n), head_dim), scorer.factor(), bias);
  }
  // What dropout multiplies the weight by.
  __device__ A kept(int64_t m, int n) const {
    if (!plan.drops) return 1;
    const Dropper dropper(in, plan, at.batch_head);
    return dropper.keeps(m, n) ? A(dropper.rule.scale) : A(0);
  }

  struct Gradient {
    A weight, score;  // the weight that meets v, and the gradient of the score
  };
  __device__ Gradient gradient(const AttentionBackward& p, int64_t m, int n, A lse, A delta) const {
    const A weight = fast_exp2(exponent(m, n) - lse * A(kLog2e)), scale = kept(m, n);
    const A of_weight = query(p.grad_out, m).product(key(in.v, n), head_dim) * scale;
    return {weight * scale, softmax_vjp(weight, of_weight, delta)};
  }
};

// Weighted sums of channels, of which a lane has some.
template <class A>
struct ChannelSums {
  A m[kMostChannels / kWarp] = {};

  template <class F>
  __device__ void each(int head_dim, const F& f) {
#pragma unroll
    for (int i = 0; i < kMostChannels / kWarp; ++i) {
      const int c = threadIdx.x % kWarp + i * kWarp;
      if (c < head_dim) f(c, m[i]);
    }
  }
  // Lane j < count has the weight of column_of(j).
  template <class F>
  __device__ void add(A weight, int count, int head_dim, const F& column_of) {
    for (int j = 0; j < count; ++j) {
      const A other = __shfl_sync(kAllLanes, weight, j);
      const auto column = column_of(j);
      each(head_dim, [&](int c, A& sum) { sum += other * column[c]; });
    }
  }
  // To the channels of a contiguous map or list of `size` places.
  template <class T>
  __device__ void store(void* to, const BlockPlace& at, int head_dim, int64_t size, int64_t i,
                        A factor) {
    T* channels = static_cast<T*>(to) + at.batch_head * head_dim * size + i;
    each(head_dim, [&](int c, A sum) { channels[c * size] = from_acc<T>(sum * factor); });
  }
};

// use(first, count) for runs of up to 32 of `all`, one for each lane.
template <class F>
__device__ void each_run(int64_t all, const F& use) {
  for (int64_t first = 0; first < all; first += kWarp)
    use(first, int(min(all - first, int64_t(kWarp))));
}

__device__ inline int64_t warp_index() {
  return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}

template <class T>
__global__ void __launch_bounds__(kPlainWarps* kWarp)
    attention_plain_forward_kernel(const __grid_constant__ AttentionForward p,
                                   const __grid_constant__ Plan plan) {
  using A = acc_t<T>;
  const AttentionShape& shape = p.in.shape;
  const int64_t queries = shape.queries(), batch_head = warp_index() / queries;
  const int64_t m = warp_index() % queries;
  if (batch_head >= shape.batch * shape.heads) return;
  const Pairs<T> pairs(p.in, plan, int(batch_head));
  const int lane = threadIdx.x % kWarp, keys = int(shape.keys);
  A top = -INFINITY, total = 0;
  for (int n = lane; n < keys; n += kWarp) top = max(top, pairs.exponent(m, n));
  top = max_lanes(top, kWarp - 1);
  if (!(top > A(-INFINITY))) top = 0;  // all masked: their weights are 0, and out 0 / 0
  ChannelSums<A> sums;
  each_run(keys, [&](int64_t first, int count) {
    A weight = 0;
    const int n = int(first) + lane;
    if (lane < count) {
      weight = fast_exp2(pairs.exponent(m, n) - top);
      total += weight;
      weight *= pairs.kept(m, n);
    }
    sums.add(weight, count, pairs.head_dim,
             [&](int j) { return pairs.key(p.in.v, int(first) + j); });
  });
  total = sum_lanes(total, kWarp - 1);
  sums.template store<T>(p.out.data, pairs.at, pairs.head_dim, queries, m, 1 / total);
  if (lane == 0)
    static_cast<A*>(p.lse)[batch_head * queries + m] = (fast_log2(total) + top) * A(kLn2);
}

// grad_q, the gradient of a dense bias, and delta, the sums over channels of grad_out * out.
template <class T>
__global__ void __launch_bounds__(kPlainWarps* kWarp)
    attention_plain_queries_kernel(const __grid_constant__ AttentionBackward p,
                                   const __grid_constant__ Plan plan,
                                   acc_t<T>* const all_delta) {  // [B, h, M]
  using A = acc_t<T>;
  const AttentionShape& shape = p.in.shape;
  const int64_t queries = shape.queries(), batch_head = warp_index() / queries;
  const int64_t m = warp_index() % queries, index = warp_index();
  if (batch_head >= shape.batch * shape.heads) return;
  const Pairs<T> pairs(p.in, plan, int(batch_head));
  const BlockPlace& at = pairs.at;
  const int lane = threadIdx.x % kWarp;
  const A lse = static_cast<const A*>(p.lse)[index];
  const A delta = pairs.query(p.out, m).product(pairs.query(p.grad_out, m), pairs.head_dim);
  if (lane == 0) all_delta[index] = delta;
  const BiasGradient<A> grad_bias(p, at);
  ChannelSums<A> sums;
  each_run(shape.keys, [&](int64_t first, int count) {
    const int n = int(first) + lane;
    const A grad = lane < count ? pairs.gradient(p, m, n, lse, delta).score : A(0);
    if (p.grad_bias && lane < count) grad_bias.add(m, n, grad);
    sums.add(grad, count, pairs.head_dim, [&](int j) { return pairs.key(p.in.k, int(first) + j); });
  });
  sums.template store<T>(p.grad_q.data, at, pairs.head_dim, queries, m, A(shape.scale));
}

// grad_k, grad_v, grad_pos of a key, and what it adds to the table's gradient.
template <class T>
__device__ void plain_key_gradients(const AttentionBackward& p, const Plan& plan,
                                    const acc_t<T>* all_delta, bool in_turn, int64_t batch_head,
                                    int n) {
  using A = acc_t<T>;
  const AttentionShape& shape = p.in.shape;
  const Pairs<T> pairs(p.in, plan, int(batch_head));
  const int lane = threadIdx.x % kWarp;
  const int64_t queries = shape.queries();
  A* table = static_cast<A*>(p.grad_table) + pairs.at.head * shape.table_h * shape.table_w;
  ChannelSums<A> grad_k, grad_v;
  A slopes[2] = {};
  each_run(queries, [&](int64_t first, int count) {
    const int64_t m = first + lane, index = batch_head * queries + m;
    typename Pairs<T>::Gradient grad{};
    if (lane < count)
      grad = pairs.gradient(p, m, n, static_cast<const A*>(p.lse)[index], all_delta[index]);
    grad_k.add(grad.score, count, pairs.head_dim,
               [&](int j) { return pairs.query(p.in.q, first + j); });
    grad_v.add(grad.weight, count, pairs.head_dim,
               [&](int j) { return pairs.query(p.grad_out, first + j); });
    if (!p.in.table) return;
    const auto to_table = [&] {
      const A* pos = pairs.scorer.pos(n);
      const int row = pairs.row(m), column = pairs.column(m);
      const Bilinear<A> b = pairs.scorer.table().value(pos[0], pos[1], row, column);
      slopes[0] += grad.score * b.d_y, slopes[1] += grad.score * b.d_x;
      pairs.scorer.table().scatter(pos[0], pos[1], row, column, grad.score,
                                   [&](int64_t cell, A value) { atomicAdd(table + cell, value); });
    };
    for (int turn = 0; turn < (in_turn ? count : 1); ++turn) {
      if (in_turn ? lane == turn : lane < count) to_table();
      __syncwarp();
    }
  });
  const BlockPlace& at = pairs.at;
  grad_k.template store<T>(p.grad_k.data, at, pairs.head_dim, shape.keys, n, A(shape.scale));
  grad_v.template store<T>(p.grad_v.data, at, pairs.head_dim, shape.keys, n, A(1));
  if (!p.in.table) return;
  A* grad_pos = static_cast<A*>(p.grad_pos) + (batch_head * shape.keys + n) * 2;
  const A y = sum_lanes(slopes[0], kWarp - 1), x = sum_lanes(slopes[1], kWarp - 1);
  if (lane == 0)
    grad_pos[0] = y * -plan.axis_y<A>().quarter, grad_pos[1] = x * -plan.axis_x<A>().quarter;
}

// A warp takes a key of an (image, head), or, where the table's gradient has to be deterministic,
// all keys of a head, in all images.
template <class T>
__global__ void __launch_bounds__(kPlainWarps* kWarp)
    attention_plain_keys_kernel(const __grid_constant__ AttentionBackward p,
                                const __grid_constant__ Plan plan, const acc_t<T>* const all_delta,
                                const bool in_turn) {
  const AttentionShape& shape = p.in.shape;
  const int64_t keys = shape.batch * shape.keys, head = warp_index() / (in_turn ? 1 : keys);
  if (head >= shape.heads) return;
  const int64_t own = warp_index() % keys;
  for (int64_t i = in_turn ? 0 : own; i < (in_turn ? keys : own + 1); ++i)
    plain_key_gradients<T>(p, plan, all_delta, in_turn, i / shape.keys * shape.heads + head,
                           int(i % shape.keys));
}

}  // namespace dat::cuda

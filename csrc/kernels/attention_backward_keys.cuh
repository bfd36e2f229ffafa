// deform_attention, backward over keys: grad_k, grad_v, grad_pos and grad_rpe_table; and grad_q
// where there are few keys (plan.with_q), which makes the pass over queries unnecessary.
//
// A block owns up to 64 keys of one (image, head) and a column of query tiles of the map; it walks
// down the tiles. Four warps: each takes 16 of the keys, and warps of the same keys take turns at
// the units of a tile. Scores are computed transposed, so that weights and score gradients are in
// registers what their products with grad_out and q want; a lane sums for two keys. For grad_q, the
// score gradients of a tile meet in shared memory, and each warp multiplies those of whole units
// with k; where blocks share the queries, this is a part of it.
//
// The table's gradient is collected in a window in shared memory with atomic additions, and added
// to global memory once a block. Deterministic: lane after lane, warp after warp adds to a table in
// global memory that the block has for itself, and attention_backward_finish.cuh sums these. Of
// several blocks with the same keys, or queries, the last one to come sums what all have.
//
// Barriers: two a tile, before and after its use, and three more for grad_q; one for each turn at
// the table where deterministic; one a turn when the warps' sums are combined; three to see who is
// the last.
#pragma once

#include "attention_backward_finish.cuh"
#include "key_unit.cuh"

namespace dat::cuda {

// Adds up, warp after warp, what warps have of the same keys, and stores it: [kChannels][key_stage]
// in shared memory, then [.., N] in global memory.
template <class E, class Sums>
__device__ void combine_and_store(Sums& sums, typename E::Acc scale, typename E::Acc* shared,
                                  void* result, void* partial, const AttentionShape& shape,
                                  const Plan& plan, const KeyPlace& place, int groups, int part,
                                  int key) {
  using A = typename E::Acc;
  A* own = shared + key;
  const int pitch = E::key_pitch(plan);
  for (int turn = 0; turn < kKeyWarps / groups; ++turn) {
    __syncthreads();
    if (part != turn) continue;
    if (turn == 0)
      sums.each([&](int n, int c, A value) { own[c * pitch + n] = value; });
    else
      sums.each([&](int n, int c, A value) { own[c * pitch + n] += value; });
  }
  __syncthreads();
  const int count = min(plan.key_stage, int(shape.keys) - place.first_key);
  const int64_t base = place.at.batch_head * shape.head_dim * shape.keys + place.first_key;
  const int64_t all = shape.batch * shape.heads * shape.head_dim * shape.keys;
  const auto store = [&](auto* to) {
    using To = std::remove_pointer_t<decltype(to)>;
    for (int n = threadIdx.x % kWarp; n < count; n += kWarp)
      each_channel<E::kChannels>(
          int(threadIdx.x / kWarp), kKeyWarps, int(shape.head_dim),
          [&](const A* from, To* at, bool exists) {
            if (exists) *at = from_acc<To>(*from * scale);
          },
          Channels<const A, To>{shared + n, pitch, to + n, shape.keys});
  };
  if (partial)
    store(static_cast<A*>(partial) + place.split * all + base);
  else
    store(static_cast<typename E::Storage*>(result) + base);
  __syncthreads();
}

template <class E>
__device__ void store_grad_pos(typename E::Acc (&slopes)[2][2], typename E::Acc* shared,
                               const AttentionBackward& p, const BackwardScratch& scratch,
                               const Plan& plan, const KeyPlace& place, int groups, int part,
                               int key) {
  using A = typename E::Acc;
  const AttentionShape& shape = p.in.shape;
  for (int turn = 0; turn < kKeyWarps / groups; ++turn) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const A value = sum_lanes(slopes[i / 2][i % 2], E::kKeyLanes);
      A& to = shared[(key + E::g() + i / 2 * 8) * 2 + i % 2];
      if (part == turn && E::t() == 0) to = turn ? to + value : value;
    }
  }
  __syncthreads();
  const int count = min(plan.key_stage, int(shape.keys) - place.first_key) * 2;
  A* to = static_cast<A*>(scratch.grad_pos ? scratch.grad_pos : p.grad_pos) +
          ((scratch.grad_pos ? place.split * shape.batch * shape.heads : 0) + place.at.batch_head) *
              shape.keys * 2 +
          place.first_key * 2;
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    to[i] = shared[i] * -(i % 2 ? plan.axis_x<A>() : plan.axis_y<A>()).quarter;
}

// Whether the block is the last to come of `count`: what the others have written is in global
// memory by then. `last`: in shared memory.
__device__ inline bool arrives_last(int* arrivals, int count, int* last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(arrivals, 1) == count - 1;
  __syncthreads();
  const bool is_last = *last;
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

// Sums what the blocks of a split have of their keys, in the last of them.
template <class E>
__device__ void sum_splits(const AttentionBackward& p, const BackwardScratch& scratch,
                           const Plan& plan, const KeyPlace& place) {
  using T = typename E::Storage;
  const AttentionShape& shape = p.in.shape;
  const int keys = int(shape.keys), count = min(plan.key_stage, keys - place.first_key);
  const int64_t heads = shape.batch * shape.heads;
#pragma unroll 1
  for (int i = 0; i < 2; ++i)
    sum_rows<T>({i ? scratch.grad_v : scratch.grad_k, (i ? p.grad_v : p.grad_k).data,
                 heads * shape.head_dim * keys, plan.splits, true},
                place.at.batch_head * shape.head_dim * keys + place.first_key, int(shape.head_dim),
                keys, count);
  if (p.in.table)
    sum_rows<T>({scratch.grad_pos, p.grad_pos, heads * keys * 2, plan.splits, false},
                (int64_t(place.at.batch_head) * keys + place.first_key) * 2, 1, 0, count * 2);
}

// What plan.with_q adds to the walk: delta of a tile's queries, which takes the place of the pass
// over queries, and grad_q.
template <class E>
struct QueryGradients {
  using T = typename E::Storage;
  using S = typename E::Shared;
  using A = typename E::Acc;
  const AttentionBackward& p;
  const Plan& plan;
  const KeyPlace& place;
  A* parts;                 // of grad_q, unscaled, of all tiles of keys in global memory, or null
  S *q, *grad_out, *grads;  // grads: out at first, then scores' gradients [key][query]

  // f(unit of the tile) for those that are on the map, a warp each.
  template <class F>
  __device__ void each_unit(TileOrigin origin, const F& f) const {
    const int units = plan.rows / kUnitRows * (plan.columns / kUnitColumns);
    for (int i = threadIdx.x / kWarp; i < units; i += kKeyWarps) {
      const UnitPlace unit(plan, i);
      if (origin.row + unit.row < p.in.shape.height &&
          origin.column + unit.column < p.in.shape.width)
        f(i * kWarp);
    }
  }

  // The block meets in here.
  __device__ void make_delta(float* delta, TileOrigin origin) const {
    each_unit(origin, [&](int slot) {
      E::inner_products(
          grad_out + slot, grads + slot, E::query_pitch(plan),
          [&](int row, int column, float sum) { delta[slot + row * kUnitColumns + column] = sum; });
    });
    __syncthreads();
  }

  __device__ int slots() const { return plan.rows * plan.columns; }
  // A tile of a part.
  __device__ A* part_of(int key_tile, int tile) const {
    const AttentionShape& shape = p.in.shape;
    const int64_t head = key_tile * shape.batch * shape.heads + place.at.batch_head;
    return parts +
           ((head * plan.splits + place.split) * plan.tiles_down + tile) * E::kChannels * slots();
  }

  // From the score gradients of the block's keys. q's memory is free, and holds grad_q in the end.
  __device__ void make_grad_q(const S* k, int tile, TileOrigin origin) const {
    __syncthreads();
    A* part = parts ? part_of(place.first_key / plan.key_stage, tile) : nullptr;
    each_unit(origin, [&](int slot) {
      typename E::Sums sums;
      sums.clear();
      sums.add_stored(grads + slot, E::query_pitch(plan), k, E::key_pitch(plan), plan.key_stage);
      if (part) return sums.store(part + slot, slots());
      const float scale = float(p.in.shape.scale);
      const typename E::Rows factor = {{scale, scale, scale, scale}};
      sums.scale(factor);
      sums.store(q + slot, E::query_pitch(plan));
    });
    if (!part) store_tile(origin);
  }

  __device__ void store_tile(TileOrigin origin) const {
    __syncthreads();
    const AttentionShape& shape = p.in.shape;
    T* to = static_cast<T*>(p.grad_q.data) + place.at.batch_head * shape.head_dim * shape.queries();
    store_queries<E>(to, q, shape, plan, origin, plan.out_vec);
  }

  // In the last block of these queries.
  __device__ void sum_grad_q() const {
    const AttentionShape& shape = p.in.shape;
    const int key_tiles = KeyPlace::key_tiles(shape, plan);
    const int64_t step = part_of(1, 0) - part_of(0, 0);
    for (int tile = 0; tile < plan.tiles_down; ++tile) {
      const TileOrigin origin = {place.at.origin.row + tile * plan.rows, place.at.origin.column};
      if (origin.row >= shape.height) break;
      const A* first = part_of(0, tile);
      for (int i = threadIdx.x * 4; i < slots() * E::kChannels; i += blockDim.x * 4) {
        const int slot = i % slots();
        const auto [row, column] = place_of(plan, origin, slot);
        if (row >= shape.height || column >= shape.width) continue;
        Vec<A, 4> sum{};
        const A* part = first + i;
        for (int n = 0; n < key_tiles; ++n, part += step) {
          Vec<A, 4> more;
          load_others(more, part);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum.at[e] += more.at[e];
        }
        Vec<S, 4> narrow;
#pragma unroll
        for (int e = 0; e < 4; ++e) narrow.at[e] = from_acc<S>(sum.at[e] * A(shape.scale));
        *reinterpret_cast<Vec<S, 4>*>(q + i / slots() * E::query_pitch(plan) + slot) = narrow;
      }
      store_tile(origin);
      __syncthreads();
    }
  }
};

template <class E, Bias kBias>
__global__ void __launch_bounds__(kKeyWarps* kWarp, E::kChannels <= 64 ? 2 : 1)
    attention_backward_keys_kernel(const __grid_constant__ AttentionBackward p,
                                   const __grid_constant__ Plan plan,
                                   const __grid_constant__ BackwardScratch scratch) {
  if constexpr (is_compiled<E>()) {
    using T = typename E::Storage;
    using S = typename E::Shared;
    using A = typename E::Acc;
    extern __shared__ __align__(16) char shared[];
    const AttentionInputs& in = p.in;
    const AttentionShape& shape = in.shape;
    const KeyPlace place(shape, plan, blockIdx.x);
    const BlockPlace& at = place.at;
    const int warp = threadIdx.x / kWarp;
    const int groups = plan.key_stage / kKeysOfWarp, parts = kKeyWarps / groups;
    const int key = warp % groups * kKeysOfWarp, part = warp / groups;

    S* q = reinterpret_cast<S*>(shared + plan.at_q);
    S* grad_out = reinterpret_cast<S*>(shared + plan.at_grad_out);
    S* k = reinterpret_cast<S*>(shared + plan.at_k);
    S* v = reinterpret_cast<S*>(shared + plan.at_v);
    S* grads = reinterpret_cast<S*>(shared + plan.at_grads);
    S* exchange = reinterpret_cast<S*>(shared + plan.at_scratch) + warp * E::kScratch;
    const RowStatistics<A> rows(shared + plan.at_rows, plan);
    load_keys<E, true>(k, v, key_lists<T>(in, at), in, plan, place.first_key);
    commit_copies();
    Scorer<E, kBias, Walk::queries> scorer(in, plan, at, shared);
    scorer.load();
    const TableGradient<E, kBias> table(p, plan, scratch, place, shared);
    table.clear();
    wait_for_copies<0>();
    scorer.stage(place.first_key);

    const typename E::Keys keys_k(k + key, E::key_pitch(plan)), keys_v(v + key, E::key_pitch(plan));
    typename E::KeySums grad_k, grad_v;
    grad_k.clear(), grad_v.clear();
    A slopes[2][2] = {};
    const auto query_gradients = [&] {
      return QueryGradients<E>{p, plan, place, static_cast<A*>(scratch.grad_q), q, grad_out, grads};
    };
    const int across = plan.columns / kUnitColumns, units = plan.rows / kUnitRows * across;
    for (int tile = 0; tile < plan.tiles_down; ++tile) {
      const TileOrigin origin = {at.origin.row + tile * plan.rows, at.origin.column};
      if (origin.row >= shape.height) break;
      load_query_tiles<E, gives_grad_q(E::kTensorCores, E::kChannels)>(
          q, grad_out, plan.with_q ? grads : nullptr, p, plan, at, origin);
      rows.load(p, plan.with_q ? nullptr : scratch.delta, plan, at, origin);
      wait_for_copies<0>();
      __syncthreads();
      if constexpr (gives_grad_q(E::kTensorCores, E::kChannels))
        if (plan.with_q) query_gradients().make_delta(rows.delta, origin);
      for (int first = 0; first < units; first += parts) {
        const UnitPlace unit(plan, first + part);
        const bool active = part < parts && first + part < units &&
                            origin.row + unit.row < shape.height &&
                            origin.column + unit.column < shape.width;
        const KeyUnit<E, kBias> of{scorer, place, key, tile * plan.rows + unit.row, unit.column};
        A grad[kUnitRows][2][2];
        if (active) {
          const int slot = (first + part) * kWarp;
          A s[kUnitRows][2][2];
          E::scores(s, keys_k, q + slot, E::query_pitch(plan));
          E::scores(grad, keys_v, grad_out + slot, E::query_pitch(plan));
          const auto add_near = [&](int n, const auto& taps, const auto& scores) {
            if constexpr (kBias != Bias::direct)
              if (!table.ordered) table.add_near(slopes[n], of, scores, n, taps);
          };
          of.weigh(s, grad, rows, slot, add_near);
          grad_v.add(s, grad_out + slot, E::query_pitch(plan), exchange);
          grad_k.add(grad, q + slot, E::query_pitch(plan), exchange);
          if constexpr (gives_grad_q(E::kTensorCores, E::kChannels))
            if (plan.with_q)
              E::store_scores(grads + key * E::query_pitch(plan) + slot, grad,
                              E::query_pitch(plan));
          if (in.table && !table.ordered) table.add_far(slopes, of, grad);
        }
        if (in.table && table.ordered) table.add_in_turn(slopes, of, grad, active);
      }
      if constexpr (gives_grad_q(E::kTensorCores, E::kChannels))
        if (plan.with_q) query_gradients().make_grad_q(k, tile, origin);
      __syncthreads();
    }
    if (in.table) table.flush();
    // The tile's memory is free now.
    A* sums = reinterpret_cast<A*>(shared + plan.at_q);
    combine_and_store<E>(grad_k, A(shape.scale), sums, p.grad_k.data, scratch.grad_k, shape, plan,
                         place, groups, part, key);
    combine_and_store<E>(grad_v, A(1), sums, p.grad_v.data, scratch.grad_v, shape, plan, place,
                         groups, part, key);
    if (in.table) store_grad_pos<E>(slopes, sums, p, scratch, plan, place, groups, part, key);
    int* last = reinterpret_cast<int*>(shared + plan.at_q);
    if (plan.splits > 1 &&
        arrives_last(scratch.arrivals + blockIdx.x / plan.splits, plan.splits, last))
      sum_splits<E>(p, scratch, plan, place);
    if constexpr (gives_grad_q(E::kTensorCores, E::kChannels))
      if (scratch.grad_q &&
          arrives_last(scratch.grad_q_arrivals + at.batch_head * plan.splits + place.split,
                       KeyPlace::key_tiles(shape, plan), last))
        query_gradients().sum_grad_q();
  }
}

}  // namespace dat::cuda

// deform_attention, backward over keys: grad_k, grad_v, grad_pos and grad_rpe_table.
//
// A block owns up to 64 keys of one (image, head) and a column of query tiles of the map; it walks
// down the tiles. Four warps: each takes 16 of the keys, and warps of the same keys take turns at
// the units of a tile. Scores are computed transposed, so that weights and score gradients are in
// registers what their products with grad_out and q want; a lane sums for two keys.
//
// The table's gradient is collected in a window in shared memory with atomic additions, and added
// to global memory once a block. Deterministic: lane after lane, warp after warp adds to a table in
// global memory that the block has for itself. attention_backward_finish.cuh sums what several
// blocks have of the same key or table.
//
// Barriers: two a tile, before and after its use; one for each turn at the table where
// deterministic; one a turn when the warps' sums are combined.
#pragma once

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
  const int parts = kKeyWarps / groups;
  for (int turn = 0; turn < parts; ++turn) {
    __syncthreads();
    if (part == turn)
      sums.each([&](int n, int c, A value) {
        A& to = shared[c * E::key_pitch(plan) + key + n];
        to = turn ? to + value : value;
      });
  }
  __syncthreads();
  const int count = min(plan.key_stage, int(shape.keys) - place.first_key);
  const int64_t base = place.at.batch_head * shape.head_dim * shape.keys + place.first_key;
  const int64_t all = shape.batch * shape.heads * shape.head_dim * shape.keys;
  for (int c = threadIdx.x / kWarp; c < shape.head_dim; c += kKeyWarps)
    for (int n = threadIdx.x % kWarp; n < count; n += kWarp) {
      const A value = shared[c * E::key_pitch(plan) + n] * scale;
      const int64_t at = base + c * shape.keys + n;
      if (partial)
        static_cast<A*>(partial)[place.split * all + at] = value;
      else
        static_cast<typename E::Storage*>(result)[at] = from_acc<typename E::Storage>(value);
    }
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
    S* exchange = reinterpret_cast<S*>(shared + plan.at_scratch) + warp * E::kScratch;
    const RowStatistics<A> rows(shared + plan.at_rows, plan);
    load_keys<E>(k, head_data<T>(in.k, shape, at), in.k, shape, plan, place.first_key, plan.k_vec);
    load_keys<E>(v, head_data<T>(in.v, shape, at), in.v, shape, plan, place.first_key, plan.v_vec);
    commit_copies();
    Scorer<E, kBias> scorer(in, plan, at, shared);
    scorer.load();
    const TableGradient<E, kBias> table(p, plan, scratch, place, shared);
    table.clear();
    wait_for_copies<0>();
    scorer.stage(place.first_key);

    const typename E::Keys keys_k(k + key, E::key_pitch(plan)), keys_v(v + key, E::key_pitch(plan));
    typename E::KeySums grad_k, grad_v;
    grad_k.clear(), grad_v.clear();
    A slopes[2][2] = {};
    const int across = plan.columns / kUnitColumns, units = plan.rows / kUnitRows * across;
    for (int tile = 0; tile < plan.tiles_down; ++tile) {
      const TileOrigin origin = {at.origin.row + tile * plan.rows, at.origin.column};
      if (origin.row >= shape.height) break;
      load_queries<E>(q, head_data<T>(in.q, shape, at), in.q, shape, plan, origin, plan.q_vec);
      load_queries<E>(grad_out, head_data<T>(p.grad_out, shape, at), p.grad_out, shape, plan,
                      origin, plan.grad_out_vec);
      commit_copies();
      rows.load(p, scratch.delta, plan, at, origin);
      wait_for_copies<0>();
      __syncthreads();
      for (int first = 0; first < units; first += parts) {
        const UnitPlace unit(plan, first + part);
        const bool active = part < parts && first + part < units &&
                            origin.row + unit.row < shape.height &&
                            origin.column + unit.column < shape.width;
        const KeyUnit<E, kBias> of{scorer, place, key, tile * plan.rows + unit.row, unit.column};
        A grad[kUnitRows][2][2];
        if (active) {
          const int slot = unit.row * plan.columns + unit.column;
          A s[kUnitRows][2][2];
          E::scores(s, keys_k, q + slot, E::query_pitch(plan), plan.columns);
          of.weigh(s, rows.lse + slot, plan.columns);
          E::scores(grad, keys_v, grad_out + slot, E::query_pitch(plan), plan.columns);
          unsigned kept = ~0u;
          A scale = 1;
          if (shape.dropout_p > 0) {
            const Dropper dropper(in, at.batch_head);
            kept = of.kept(dropper), scale = A(dropper.rule.scale);
          }
#pragma unroll
          for (int i = 0; i < kUnitRows * 4; ++i) {
            A &weight = (&s[0][0][0])[i], &value = (&grad[0][0][0])[i];
            const A delta = rows.delta[slot + i / 4 * plan.columns + 2 * E::t() + i % 2];
            const A factor = kept >> i & 1 ? scale : A(0);
            value = softmax_vjp(weight, value * factor, delta);
            weight *= factor;
          }
          grad_v.add(s, grad_out + slot, E::query_pitch(plan), plan.columns, exchange);
          grad_k.add(grad, q + slot, E::query_pitch(plan), plan.columns, exchange);
          if (in.table && !table.ordered) table.add(slopes, of, grad);
        }
        if (in.table && table.ordered) table.add_in_turn(slopes, of, grad, active);
      }
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
  }
}

}  // namespace dat::cuda

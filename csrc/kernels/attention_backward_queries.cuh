// deform_attention, backward over queries: grad_q, the gradient of a dense bias, and for the pass
// over keys the sums delta = sum_c grad_out * out. Where there are few keys (plan.with_q), the pass
// over keys does this as well.
//
// Laid out as the forward (attention_forward.cuh): a block owns a tile of queries, a warp a unit of
// it, and the block walks over the keys. Weights come from the forward's log-sum-exp, so no running
// maximum; the two score-like products q k and grad_out v give the scores' gradient, whose product
// with k is grad_q. It replaces q in shared memory.
//
// The pass over keys computes the weights again, rather than this one adding to grad_k and grad_v:
// that would need atomics or partial sums as large as the queries, for a saving of two products out
// of seven. This way both passes give the same bits every time.
#pragma once

#include "attention_tiles.cuh"

namespace dat::cuda {

// delta of the tile's queries to shared and global memory; one thread for each.
template <class E>
__device__ void row_sums(typename E::Acc* rows, typename E::Acc* delta,
                         const typename E::Shared* grad_out, const AttentionBackward& p,
                         const Plan& plan, const BlockPlace& at, TileOrigin origin) {
  using A = typename E::Acc;
  const AttentionShape& shape = p.in.shape;
  const int slot = threadIdx.x;
  const auto [row, column] = place_of(plan, origin, slot);
  A sum = 0;
  if (row < shape.height && column < shape.width) {
    const auto* out =
        head_data<typename E::Storage>(p.out, shape, at) + row * p.out.row + column * p.out.column;
    const int head_dim = int(shape.head_dim);
#pragma unroll 4
    for (int c = 0; c < head_dim; ++c)
      sum += to_acc(out[c * p.out.channel]) * to_acc(grad_out[c * E::query_pitch(plan) + slot]);
    delta[at.batch_head * shape.queries() + int64_t(row) * shape.width + column] = sum;
  }
  rows[slot] = sum;
}

template <class E>
__device__ void store_grad_bias(const typename E::Scores& grad, const AttentionBackward& p,
                                const BlockPlace& at, UnitPlace unit, int key) {
  const AttentionShape& shape = p.in.shape;
  const BiasGradient<typename E::Acc> to(p, at);
  const int column = at.origin.column + unit.column + E::g();
#pragma unroll
  for (int r = 0; r < kUnitRows; ++r) {
    const int row = at.origin.row + unit.row + r;
#pragma unroll
    for (int i = 0; i < E::kTiles * 2; ++i) {
      const int n = key + i / 2 * 8 + 2 * E::t() + i % 2;
      if (row >= shape.height || column >= shape.width || n >= shape.keys) continue;
      to.add(int64_t(row) * shape.width + column, n, grad[0][r][i / 2][i % 2]);
    }
  }
}

template <class E, Bias kBias>
__global__ void __launch_bounds__(kMaxUnits* kWarp, kResident<E>)
    attention_backward_queries_kernel(const __grid_constant__ AttentionBackward p,
                                      const __grid_constant__ Plan plan,
                                      const __grid_constant__ BackwardScratch scratch) {
  if constexpr (is_compiled<E>()) {
    using T = typename E::Storage;
    using S = typename E::Shared;
    using A = typename E::Acc;
    extern __shared__ __align__(16) char shared[];
    const AttentionInputs& in = p.in;
    const AttentionShape& shape = in.shape;
    const BlockPlace at(shape, plan, blockIdx.x);
    const int warp = threadIdx.x / kWarp;
    const UnitPlace unit(plan, warp);

    S* q = reinterpret_cast<S*>(shared + plan.at_q);
    S* grad_out = reinterpret_cast<S*>(shared + plan.at_grad_out);
    A* rows = reinterpret_cast<A*>(shared + plan.at_rows);
    S* exchange = reinterpret_cast<S*>(shared + plan.at_scratch) + warp * E::kScratch;
    const int slot = warp * kWarp;
    KeyStages<E> stages(in, plan, at, shared);
    Scorer<E, kBias> scorer(in, plan, at, shared);
    stages.template load<true>(0, 0);
    scorer.load();
    for (int tile = 0; tile < plan.tiles_down; ++tile) {
      const TileOrigin origin = {at.origin.row + tile * plan.rows, at.origin.column};
      if (origin.row >= shape.height) break;
      load_query_tiles<E, false>(q, grad_out, nullptr, p, plan, at, origin);
      wait_for_copies<0>();
      __syncthreads();
      row_sums<E>(rows, static_cast<A*>(scratch.delta), grad_out, p, plan, at, origin);

      const int row = origin.row + unit.row, column = origin.column + unit.column + E::g();
      const bool active = row < shape.height && column - E::g() < shape.width;
      const UnitPlace in_block(tile * plan.rows + unit.row, unit.column);
      typename E::Rows shift, start = {};  // minus the log-sum-exp, as exponent of 2 and product
#pragma unroll
      for (int r = 0; r < kUnitRows; ++r) {
        const int64_t i = at.batch_head * shape.queries() + (row + r) * shape.width + column;
        const bool inside = row + r < shape.height && column < shape.width;
        shift[0][r] = inside ? static_cast<const A*>(p.lse)[i] * A(-kLog2e) : A(0);
        if (kStartsShifted<E, kBias>) start[0][r] = shift[0][r] * scorer.inverse_factor();
      }
      typename E::Sums sums;
      sums.clear();
      stages.walk(scorer, tile, [&](const S* k, const S* v, int first, int count) {
        for (int chunk = 0; chunk < count && active; chunk += 8 * E::kTiles) {
          const int left = count - chunk, tiles = min(int(unsigned(left + 7) / 8), E::kTiles);
          typename E::Scores s, grad;
          E::scores(s, typename E::Queries(q + slot, E::query_pitch(plan)), k + chunk,
                    E::key_pitch(plan), tiles, start);
          exponents<E, kBias>(s, shift, scorer, in_block, first, chunk, left, tiles);
          E::scores(grad, typename E::Queries(grad_out + slot, E::query_pitch(plan)), v + chunk,
                    E::key_pitch(plan), tiles);
          if (plan.drops)
            drop_weights<E>(grad, in, plan, at, in_block, first + chunk, A(plan.dropout.scale));
#pragma unroll
          for (int r = 0; r < kUnitRows; ++r) {
            const A delta = rows[slot + r * kUnitColumns + E::g()];
#pragma unroll
            for (int i = 0; i < E::kTiles * 2; ++i) {
              const A weight = fast_exp2(s[0][r][i / 2][i % 2]);
              A& value = grad[0][r][i / 2][i % 2];
              value = i / 2 < tiles ? softmax_vjp(weight, value, delta) : A(0);
            }
          }
          if (kBias == Bias::direct && p.grad_bias)
            store_grad_bias<E>(grad, p, at, in_block, first + chunk);
          sums.add(grad, k + chunk, E::key_pitch(plan), tiles, exchange);
        }
      });
      const A scale = A(shape.scale);
      const typename E::Rows factor = {{scale, scale, scale, scale}};
      sums.scale(factor);
      sums.store(q + slot, E::query_pitch(plan));
      __syncthreads();
      T* grad_q = static_cast<T*>(p.grad_q.data) + at.batch_head * shape.head_dim * shape.queries();
      store_queries<E>(grad_q, q, shape, plan, origin, plan.out_vec);
      __syncthreads();
    }
  }
}

}  // namespace dat::cuda

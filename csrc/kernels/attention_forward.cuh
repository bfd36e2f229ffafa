// deform_attention, forward.
//
// A block owns a tile of queries of one (image, head), a warp a unit of it, 4 rows of 8 columns, or
// a stack of two, whose queries and sums stay in registers. The block walks over the keys, up to 64
// in shared memory at a time; with more of them, the next ones are on their way while these are
// used. A warp takes a few tiles of 8 keys at a time: products q k, bias, weights and their sums,
// products with v (mma.cuh and simt.cuh say which lane holds what). q is replaced by out in shared
// memory, so that global memory sees straight copies only.
//
// Barriers: two for each load of keys, one after loading and one after use; one before out is
// stored. Shared memory: plan.h.
#pragma once

#include "attention_tiles.cuh"

namespace dat::cuda {

// Running softmax of the queries that a lane holds of its column. Weights are relative to a
// reference, an exponent of 2, that is 0 until a step's sums are found above 2^kSlack, or, while a
// row has no weight yet, below 2^-kSlack: moving it costs the step two more computations of its
// scores, and weights up to 2^kSlack do no harm in any dtype.
template <class E>
struct RunningSoftmax {
  using A = typename E::Acc;
  using Rows = typename E::Rows;
  using Scores = typename E::Scores;
  static constexpr int kRows = E::kStack * kUnitRows, kSlack = 8, kFar = 1024;
  Rows shift;  // minus the reference
  Rows start;  // the same as a product q k
  Rows sum;    // of this lane's keys
  A least;     // sums below it move the reference; 0 once all rows have weights

  __device__ RunningSoftmax() : shift{}, start{}, sum{}, least(A(1) / (1 << kSlack)) {}

  // Exponents become weights; `sum` are those of this step.
  __device__ static void weigh(Scores& s, Rows& sum, int tiles) {
    // Two tiles are taken as they are: the mask makes zeros of keys that are not there.
    constexpr bool kAll = E::kTiles == 2;
#pragma unroll
    for (int nt = 0; nt < E::kTiles; ++nt) {
      if (!kAll && nt >= tiles) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        A(&own)[2] = s[r / kUnitRows][r % kUnitRows][nt];
        A& to = sum[r / kUnitRows][r % kUnitRows];
        own[0] = fast_exp2(own[0]), own[1] = fast_exp2(own[1]);
        to = nt ? to + own[0] + own[1] : own[0] + own[1];
      }
    }
    if constexpr (!kAll) {
      if (tiles == E::kTiles) return;
#pragma unroll
      for (int nt = 1; nt < E::kTiles; nt += 2) {  // products take tiles in twos
        if (nt != tiles) continue;
#pragma unroll
        for (int i = 0; i < kRows * 2; ++i) s[i / 2 / kUnitRows][i / 2 % kUnitRows][nt][i % 2] = 0;
      }
    }
  }

  // Whether the reference may stay with these sums of a step, for all lanes. NaN does not move it.
  __device__ bool settled(const Rows& sum) {
    A top = sum[0][0], bottom = least;
#pragma unroll
    for (int r = 1; r < kRows; ++r) top = max(top, (&sum[0][0])[r]);
    if (least > 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) bottom = min(bottom, (&sum[0][0])[r]);
    }
    if (__any_sync(kAllLanes, top > A(1 << kSlack) || bottom < least)) return false;
    least = 0;
    return true;
  }

  __device__ void accept(const Rows& more) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) (&sum[0][0])[r] += (&more[0][0])[r];
  }

  // Moves the reference to the highest of these exponents, which are relative to it and have to be
  // computed again; not down, once a row has weights. Returns whether it moved so far that they had
  // lost digits.
  template <class Sums>
  __device__ bool move(const Scores& s, int tiles, Sums& sums, A inverse_factor) {
    Rows factor;
    bool empty = false, far = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto& own = s[r / kUnitRows][r % kUnitRows];
      A& sum_of = (&sum[0][0])[r];
      A highest = own[0][0];
#pragma unroll
      for (int i = 1; i < E::kTiles * 2; ++i)
        if (i < 2 || E::kTiles == 2 || i / 2 < tiles) highest = max(highest, own[i / 2][i % 2]);
      const A top = max_lanes(highest, E::kKeyLanes), total = sum_lanes(sum_of, E::kKeyLanes);
      const bool fresh = total == 0, masked = fresh && !(top > A(-INFINITY));
      const A by = masked ? A(0) : fresh ? top : max(top, A(0));
      empty |= masked;
      far |= by > A(kFar) || by < A(-kFar);
      (&shift[0][0])[r] -= by;
      (&start[0][0])[r] = (&shift[0][0])[r] * inverse_factor;
      const A by_factor = fresh ? A(1) : fast_exp2(-by);
      (&factor[0][0])[r] = by_factor;
      sum_of *= by_factor;
    }
    sums.scale(factor);
    if (!__any_sync(kAllLanes, empty)) least = 0;
    return __any_sync(kAllLanes, far);
  }

  // Normalises; the log-sum-exp in natural units.
  template <class Sums>
  __device__ void finish(Rows& lse, Sums& sums) {
    Rows factor;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const A total = sum_lanes((&sum[0][0])[r], E::kKeyLanes);
      (&factor[0][0])[r] = fast_reciprocal(total);
      (&lse[0][0])[r] = (fast_log2(total) - (&shift[0][0])[r]) * A(kLn2);
    }
    sums.scale(factor);
  }
};

template <class E, Bias kBias>
__global__ void __launch_bounds__(kMaxUnits* kWarp, kResident<E>)
    attention_forward_kernel(const __grid_constant__ AttentionForward p,
                             const __grid_constant__ Plan plan) {
  if constexpr (is_compiled<E>()) {
    using T = typename E::Storage;
    using S = typename E::Shared;
    using A = typename E::Acc;
    extern __shared__ __align__(16) char shared[];
    const AttentionInputs& in = p.in;
    const AttentionShape& shape = in.shape;
    const BlockPlace at(shape, plan, blockIdx.x);
    const int warp = threadIdx.x / kWarp;
    const UnitPlace unit(plan, warp, E::kStack);

    S* q = reinterpret_cast<S*>(shared + plan.at_q);
    S* own = q + unit.slot(plan);
    const int below = plan.columns * kUnitRows;
    S* scratch = reinterpret_cast<S*>(shared + plan.at_scratch) + warp * E::kScratch;
    KeyStages<E> stages(in, plan, at, shared);
    Scorer<E, kBias> scorer(in, plan, at, shared);
    stages.template load<true>(0, 0);
    scorer.load();
    for (int tile = 0; tile < plan.tiles_down; ++tile) {
      const TileOrigin origin = {at.origin.row + tile * plan.rows, at.origin.column};
      if (origin.row >= shape.height) break;
      load_queries<E>(shape, plan, origin, plan.q_vec,
                      QueryTile<S, T>{q, head_data<T>(in.q, shape, at), in.q});
      commit_copies();
      const int row = origin.row + unit.row, column = origin.column + unit.column + E::g();
      const bool active = row < shape.height && column - E::g() < shape.width;
      const UnitPlace in_block(tile * plan.rows + unit.row, unit.column);
      typename E::Sums sums;
      sums.clear();
      RunningSoftmax<E> softmax;
      typename E::Queries queries;
      stages.walk(scorer, tile, [&](const S* k, const S* v, int first, int count) {
        if (!active) return;
        // Kept for all keys where there are registers for it.
        if (first == 0 || E::kStack == 1) queries = {own, E::query_pitch(plan), below};
        // A step is repeated where the reference has to move: to see where to, then with weights.
        // tries: 0, -1 and on for looks, 1 for weights after that.
        int tries = 0;
        for (int chunk = 0; chunk < count;) {
          const int left = count - chunk, tiles = min(int(unsigned(left + 7) / 8), E::kTiles);
          typename E::Scores s;
          typename E::Rows zeros = {};
          E::scores(s, queries, k + chunk, E::key_pitch(plan), tiles,
                    kStartsShifted<E, kBias> ? softmax.start : zeros);
          exponents<E, kBias>(s, softmax.shift, scorer, in_block, first, chunk, left, tiles);
          if (tries < 0) {
            const bool again = softmax.move(s, tiles, sums, scorer.inverse_factor()) && tries > -4;
            tries = again ? tries - 1 : 1;
            continue;
          }
          typename E::Rows sum;
          softmax.weigh(s, sum, tiles);
          if (!tries && !softmax.settled(sum)) {
            tries = -1;
            continue;
          }
          softmax.accept(sum);
          if (plan.drops) drop_weights<E>(s, in, plan, at, in_block, first + chunk, A(1));
          sums.add(s, v + chunk, E::key_pitch(plan), tiles, scratch);
          chunk += 8 * E::kTiles, tries = 0;
        }
      });
      typename E::Rows lse;
      softmax.finish(lse, sums);
      if (plan.drops) {  // not before: half precision might not hold the weights then
        const A scale = A(plan.dropout.scale);
        typename E::Rows factor;
#pragma unroll
        for (int r = 0; r < softmax.kRows; ++r) (&factor[0][0])[r] = scale;
        sums.scale(factor);
      }
      sums.store(own, E::query_pitch(plan), below);
      A* to = static_cast<A*>(p.lse) + at.batch_head * shape.queries() + row * shape.width + column;
      const int rows = E::t() == 0 && column < shape.width ? int(shape.height) - row : 0;
#pragma unroll
      for (int r = 0; r < softmax.kRows; ++r, to += shape.width)
        if (r < rows) *to = (&lse[0][0])[r];
      __syncthreads();
      T* out = static_cast<T*>(p.out.data) + at.batch_head * shape.head_dim * shape.queries();
      store_queries<E>(out, q, shape, plan, origin, plan.out_vec);
      __syncthreads();
    }
  }
}

}  // namespace dat::cuda

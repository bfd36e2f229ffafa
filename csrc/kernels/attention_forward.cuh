// deform_attention, forward.
//
// A block owns a tile of queries of one (image, head), a warp a unit of it: 4 rows of 8 columns,
// whose queries and sums stay in registers. The block walks over the keys, up to 64 in shared
// memory at a time; with more of them, the next ones are on their way while these are used. A warp
// takes a few tiles of 8 keys at a time: products q k, bias, running maximum and sum, products with
// v (mma.cuh and simt.cuh say which lane holds what). q is replaced by out in shared memory, so
// that global memory sees straight copies only.
//
// Barriers: two for each load of keys, one after loading and one after use; one before out is
// stored. Shared memory: plan.h.
#pragma once

#include "attention_tiles.cuh"

namespace dat::cuda {

// Running softmax of the four queries that a lane holds of its column. Weights are relative to a
// reference, an exponent of 2, that is 0 until scores are found kSlack above it, or, while a row
// has no weight yet, below: moving it costs shuffles and a pass over the sums, and weights up to
// 2^kSlack do no harm in any dtype.
template <class E>
struct RunningSoftmax {
  using A = typename E::Acc;
  using Exponents = A[kUnitRows][E::kTiles][2];
  static constexpr float kSlack = 8, kFar = 1024;
  A shift[kUnitRows];  // minus the reference
  A sum[kUnitRows];    // of this lane's keys
  A floor;             // below it the reference moves down; -inf once all rows have weights

  __device__ RunningSoftmax() : floor(-kSlack) {
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r) shift[r] = sum[r] = 0;
  }

  // Moves the reference where exponents, relative to it, ask for that. Returns whether they are as
  // they should be; if not, they have to be computed again.
  template <class Sums>
  __device__ bool settle(Exponents& s, Sums& sums) {
    A highest[kUnitRows];
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r) {
      highest[r] = s[r][0][0];
#pragma unroll
      for (int i = 1; i < E::kTiles * 2; ++i) highest[r] = max(highest[r], (&s[r][0][0])[i]);
    }
    const A top = max(max(highest[0], highest[1]), max(highest[2], highest[3]));
    const A bottom = min(min(highest[0], highest[1]), min(highest[2], highest[3]));
    if (__any_sync(kAllLanes, top > A(kSlack) || bottom < floor)) return move(s, highest, sums);
    floor = -INFINITY;
    return true;
  }

  template <class Sums>
  __device__ bool move(Exponents& s, const A (&highest)[kUnitRows], Sums& sums) {
    A factor[kUnitRows];
    bool empty = false, far = false;
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r) {
      const A top = max_lanes(highest[r], E::kKeyLanes);
      const bool fresh = sum_lanes(sum[r], E::kKeyLanes) == 0;
      // Of rows that are masked so far: any will do.
      const A by = fresh && top > A(-INFINITY) ? top : max(top, A(0));
      empty |= fresh && !(top > A(-INFINITY));
      // Exponents have lost digits to a reference that far away.
      far |= by > A(kFar) || by < A(-kFar);
      shift[r] -= by;
      factor[r] = fresh ? A(1) : fast_exp2(-by);
      sum[r] *= factor[r];
#pragma unroll
      for (int i = 0; i < E::kTiles * 2; ++i) (&s[r][0][0])[i] -= by;
    }
    sums.scale(factor);
    far = __any_sync(kAllLanes, far);
    floor = __any_sync(kAllLanes, empty) || far ? A(-kSlack) : A(-INFINITY);
    return !far;
  }

  // Exponents become weights.
  __device__ void weigh(Exponents& s) {
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r)
#pragma unroll
      for (int i = 0; i < E::kTiles * 2; ++i) {
        A& weight = (&s[r][0][0])[i];
        weight = fast_exp2(weight);
        sum[r] += weight;
      }
  }

  // Normalises; the log-sum-exp in natural units.
  template <class Sums>
  __device__ void finish(A (&lse)[kUnitRows], Sums& sums) {
    A factor[kUnitRows];
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r) {
      const A total = sum_lanes(sum[r], E::kKeyLanes);
      factor[r] = fast_reciprocal(total);
      lse[r] = (fast_log2(total) - shift[r]) * A(kLn2);
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
    const UnitPlace unit(plan, warp);

    S* q = reinterpret_cast<S*>(shared + plan.at_q);
    S* own = q + warp * kWarp;
    S* scratch = reinterpret_cast<S*>(shared + plan.at_scratch) + warp * E::kScratch;
    KeyStages<E> stages(in, plan, at, shared);
    Scorer<E, kBias> scorer(in, plan, at, shared);
    stages.load(0, 0);
    scorer.load();
    for (int tile = 0; tile < plan.tiles_down; ++tile) {
      const TileOrigin origin = {at.origin.row + tile * plan.rows, at.origin.column};
      if (origin.row >= shape.height) break;
      load_queries<E>(q, head_data<T>(in.q, shape, at), in.q, shape, plan, origin, plan.q_vec);
      commit_copies();
      const int row = origin.row + unit.row, column = origin.column + unit.column + E::g();
      const bool active = row < shape.height && column - E::g() < shape.width;
      const UnitPlace in_block(tile * plan.rows + unit.row, unit.column);
      typename E::Sums sums;
      sums.clear();
      RunningSoftmax<E> softmax;
      stages.walk(scorer, tile, [&](const S* k, const S* v, int first, int count) {
        if (!active) return;
        const typename E::Queries queries(own, E::query_pitch(plan));
        for (int chunk = 0; chunk < count; chunk += 8 * E::kTiles) {
          const int tiles = min(int(unsigned(count - chunk + 7) / 8), E::kTiles);
          A s[kUnitRows][E::kTiles][2];
          // Again where the reference moved far: once more if its new place was rounded.
          for (int attempt = 0; attempt < 4; ++attempt) {
            E::scores(s, queries, k + chunk, E::key_pitch(plan), tiles);
            exponents<E, kBias>(s, softmax.shift, scorer, in_block, first, chunk, tiles);
            if (softmax.settle(s, sums)) break;
          }
          softmax.weigh(s);
          if (shape.dropout_p > 0) drop_weights<E>(s, in, at, in_block, first + chunk);
          sums.add(s, v + chunk, E::key_pitch(plan), tiles, scratch);
        }
      });
      A lse[kUnitRows];
      softmax.finish(lse, sums);
      sums.store(own, E::query_pitch(plan));
      A* to = static_cast<A*>(p.lse) + at.batch_head * shape.queries() + row * shape.width + column;
      const int rows = E::t() == 0 && column < shape.width ? int(shape.height) - row : 0;
#pragma unroll
      for (int r = 0; r < kUnitRows; ++r, to += shape.width)
        if (r < rows) *to = lse[r];
      __syncthreads();
      T* out = static_cast<T*>(p.out.data) + at.batch_head * shape.head_dim * shape.queries();
      store_queries<E>(out, q, shape, plan, origin, plan.out_vec);
      __syncthreads();
    }
  }
}

}  // namespace dat::cuda

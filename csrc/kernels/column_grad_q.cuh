// grad_q in the backward of small maps: from the gradients of the scores of a block's keys, and of
// the other blocks' that have the same (image, head).
//
// Where there are others, a block's share of grad_q is a part, in float32, unscaled, in global
// memory, in the order in which lanes have it. The last block to come here keeps its own in
// registers, waits until the others have stored theirs, and adds all of them in the order of the
// keys, so that the sum is the same in every run. Only the last waits, and only for blocks that are
// running.
#pragma once

#include "column_window.cuh"

namespace dat::cuda {

template <class T>
struct ColumnGradQ {
  using E = Columns<T>;
  static constexpr int kRun = divide_up(E::kRows, E::kMostTiles);  // rows of a warp at a time
  // Channels g and g + 8 by slots 2 t and 2 t + 1, of a half of the channels and one of the slots.
  using Four = Vec<float, 4>;
  using Half = Four[kRun][2];  // of the slots: [row][half of the channels]
  using Sums = Half[2];
  static constexpr int kPart = E::kSlots * E::kChannels;
  static constexpr int kStored = 1 << 16;
  static_assert(kMostParts < kStored && kMostParts < (1 << 30) / kStored);

  const AttentionShape& shape;
  float* parts;   // of this (image, head), `step` values apart; null where there is one block
  int* arrivals;  // blocks that have come, and kStored for each that has stored its part
  int64_t step;
  int own, blocks;  // this block's number, of so many

  __device__ ColumnGradQ(const AttentionShape& shape_, const BackwardScratch& scratch,
                         const Plan& plan, const KeyPlace& place)
      : shape(shape_),
        parts(static_cast<float*>(scratch.grad_q)),
        arrivals(scratch.grad_q_arrivals + place.at.batch_head),
        step(shape_.batch * shape_.heads * kPart),
        own(place.first_key / plan.key_stage),
        blocks(KeyPlace::key_tiles(shape_, plan)) {
    if (parts) parts += place.at.batch_head * int64_t(kPart);
  }

  // For one thread: whether its block is the last to come.
  __device__ bool arrives_last() const {
    return !parts || atomicAdd(arrivals, 1) % kStored == blocks - 1;
  }
  // For one thread, once all of the block have stored their part, and met.
  __device__ void stored() const {
    __threadfence();
    atomicAdd(arrivals, kStored);
  }

  // f(sums, first row, rows) for each run of the warp.
  template <class F>
  __device__ void each_run(const T* k, const T* grads, int tiles, const F& f) const {
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, height = int(shape.height);
    for (int first = threadIdx.x / kWarp * kRun; first < height; first += warps * kRun) {
      const int rows = min(height - first, kRun);
      unsigned at_k = shared_address(k + lane % 16 * E::kKeyPitch + lane / 16 * 8);
      unsigned at_grads =
          shared_address(grads + lane % 16 * E::kQueryPitch + lane / 16 * 8 + first * E::kWidth);
      Sums sums;
      add_tile<true>(sums, rows, at_k, at_grads);
#pragma unroll 1
      for (int tile = 1; tile < tiles; ++tile) {
        at_k += 16 * int(sizeof(T)), at_grads += 16 * E::kQueryPitch * int(sizeof(T));
        add_tile<false>(sums, rows, at_k, at_grads);
      }
      f(sums, first, rows);
      __syncwarp();
    }
  }

  template <bool kFirst>
  static __device__ void add_tile(Sums& sums, int rows, unsigned at_k, unsigned at_grads) {
    unsigned a[2][4];
    load_matrices<false>(a[0], at_k);
    load_matrices<false, 16 * E::kKeyPitch* int(sizeof(T))>(a[1], at_k);
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      if (r >= rows) continue;
      unsigned b[4];
      load_matrices<true>(b, at_grads + r * E::kWidth * int(sizeof(T)));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float (&c)[4] = sums[j / 2][r][j % 2].at;
        mma<T, kFirst>(c[0], c[1], c[2], c[3], a[j % 2], b[j / 2 * 2], b[j / 2 * 2 + 1]);
      }
    }
  }

  // f(row, half of the channels, place in a run of a part) for the lane's fours that are on the
  // map.
  template <class F>
  __device__ void each_four(int half, int rows, const F& f) const {
    // Lanes of a channel whose slots are columns of the map: they are neighbours in the part.
    const int lanes = min((int(shape.width) + 3 - 2 * half) / 4, 4);
    const int at = (E::g() * lanes + E::t()) * 4;
    if (E::t() >= lanes) return;
#pragma unroll
    for (int r = 0; r < kRun; ++r)
      if (r < rows)
#pragma unroll
        for (int i = 0; i < 2; ++i) f(r, i, at + ((r * 2 + half) * 2 + i) * kWarp * 4);
  }

  __device__ float* part_of(int block, int row) const {
    return parts + block * step + row * (E::kWidth * E::kChannels);
  }

  __device__ void store_part(const T* k, const T* grads, int tiles) const {
    each_run(k, grads, tiles, [&](Sums& sums, int first, int rows) {
      float* part = part_of(own, first);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        each_four(half, rows, [&](int r, int i, int at) {
          const auto& [a, b, c, d] = sums[half][r][i].at;
          __stcg(reinterpret_cast<float4*>(part + at), make_float4(a, b, c, d));
        });
    });
  }

  // The sum of all parts, scaled, as a tile [channel][slot].
  __device__ void sum_to(T* tile, const T* k, const T* grads, int tiles) const {
    const float scale = float(shape.scale);
    each_run(k, grads, tiles, [&](Sums& sums, int first, int rows) {
      if (parts) {
        while (load_acquire(arrivals) / kStored < blocks - 1) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) add_others(sums[half], half, first, rows);
      }
      T* to = tile + E::g() * E::kQueryPitch + first * E::kWidth + 2 * E::t();
#pragma unroll
      for (int r = 0; r < kRun; ++r)
        if (r < rows)
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float (&sum)[4] = sums[i % 2][r][i / 4].at;
            T* at = to + i / 2 * 8 * E::kQueryPitch + r * E::kWidth + i % 2 * 8;
            *reinterpret_cast<unsigned*>(at) =
                pack<T>(sum[i / 2 % 2 * 2] * scale, sum[i / 2 % 2 * 2 + 1] * scale);
          }
    });
  }

  __device__ void add_others(Half& sums, int half, int first, int rows) const {
    if (own > 0) {
      Half before;
      load(before, 0, half, first, rows);
      for (int n = 1; n < own; ++n) add(before, n, half, first, rows);
      add(sums, before, half, rows);
    }
    for (int n = own + 1; n < blocks; ++n) add(sums, n, half, first, rows);
  }
  __device__ void load(Half& to, int block, int half, int first, int rows) const {
    const float* part = part_of(block, first);
    each_four(half, rows, [&](int r, int i, int at) { load_others(to[r][i], part + at); });
  }
  __device__ void add(Half& to, int block, int half, int first, int rows) const {
    Half other;  // all of it is on its way before any is used
    load(other, block, half, first, rows);
    add(to, other, half, rows);
  }
  __device__ void add(Half& to, const Half& more, int half, int rows) const {
    each_four(half, rows, [&](int r, int i, int) {
#pragma unroll
      for (int e = 0; e < 4; ++e) to[r][i].at[e] += more[r][i].at[e];
    });
  }
};

}  // namespace dat::cuda

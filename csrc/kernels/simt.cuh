// Matrix products of a warp on CUDA cores, in float32: for float32, and for half precision on
// devices before sm_80. Same interface as mma.cuh.
//
// Lane l = g + 8 t, so that lanes of one key read the same address. Scores are laid out over g and
// t as in mma.cuh; weights pass through a scratch of the warp to reach the lanes that sum with
// them.
#pragma once

#include "plan.h"
#include "ptx.cuh"

namespace dat::cuda {

template <class T, int kChannels_>
struct Simt {
  using Storage = T;
  using Acc = acc_t<T>;
  using Shared = Acc;
  static constexpr bool kTensorCores = false;
  static constexpr int kChannels = kChannels_;
  static constexpr int kTiles = 2, kStack = 1;
  static constexpr bool kWholeRows = false;
  using Short = Simt;
  using Tall = Simt;
  static constexpr int kUnit = kUnitRows * kUnitColumns;
  static constexpr int kScratch = 16 * kUnit;
  static constexpr int kKeyLanes = 24;
  static constexpr int kOwn = kChannels / 4;  // channels of a lane's sums: t, t + 4, ..
  // Steps of the loops around them that are written out: those of long heads are long enough.
  static constexpr int kUnrolled = kOwn < 16 ? 8 : 1;

  __device__ static int query_pitch(const Plan& plan) { return plan.query_pitch; }
  __device__ static int key_pitch(const Plan& plan) { return plan.key_pitch; }

  __device__ static int g() { return threadIdx.x % 8; }
  __device__ static int t() { return threadIdx.x % kWarp / 8; }

  using Rows = Acc[kStack][kUnitRows];
  using Scores = Acc[kStack][kUnitRows][kTiles][2];

  struct Queries {
    const Acc* unit;
    int pitch;
    Queries() = default;
    __device__ Queries(const Acc* unit_, int pitch_, int = 0) : unit(unit_ + g()), pitch(pitch_) {}
  };

  // Products start at 0: sums in full precision are not to lose digits to another start.
  static constexpr bool kStarts = false;
  __device__ static void scores(Scores& scores, const Queries& q, const Acc* keys, int pitch, int,
                                const Rows& = Rows{}) {
    auto& s = scores[0];
    keys += 2 * t();
#pragma unroll
    for (int i = 0; i < kUnitRows * kTiles * 2; ++i) (&s[0][0][0])[i] = 0;
    const Acc* unit = q.unit;
#pragma unroll 8
    for (int c = 0; c < kChannels; ++c, unit += q.pitch, keys += pitch) {
      Acc rows[kUnitRows];
#pragma unroll
      for (int r = 0; r < kUnitRows; ++r) rows[r] = unit[r * kUnitColumns];
#pragma unroll
      for (int nt = 0; nt < kTiles; ++nt) {
        const auto pair = *reinterpret_cast<const Vec<Acc, 2>*>(keys + nt * 8);
#pragma unroll
        for (int r = 0; r < kUnitRows; ++r)
#pragma unroll
          for (int e = 0; e < 2; ++e) s[r][nt][e] += rows[r] * pair.at[e];
      }
    }
  }

  struct Sums {
    Acc m[kUnitRows][kOwn];

    __device__ void clear() {
#pragma unroll
      for (int i = 0; i < kUnitRows * kOwn; ++i) (&m[0][0])[i] = 0;
    }

    __device__ void add(const Scores& weights_of, const Acc* values, int pitch, int, Acc* scratch) {
      const auto& p = weights_of[0];
      // scratch [key][g][row]
#pragma unroll
      for (int nt = 0; nt < kTiles; ++nt)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Vec<Acc, 4> rows;
#pragma unroll
          for (int r = 0; r < kUnitRows; ++r) rows.at[r] = p[r][nt][e];
          *reinterpret_cast<Vec<Acc, 4>*>(scratch + ((nt * 8 + 2 * t() + e) * 8 + g()) * 4) = rows;
        }
      __syncwarp();
      values += t() * pitch;
#pragma unroll kUnrolled
      for (int n = 0; n < kTiles * 8; n += 4) {
        Vec<Acc, 4> weights[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          weights[i] = *reinterpret_cast<const Vec<Acc, 4>*>(scratch + ((n + i) * 8 + g()) * 4);
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          const auto four = *reinterpret_cast<const Vec<Acc, 4>*>(values + 4 * c * pitch + n);
#pragma unroll
          for (int r = 0; r < kUnitRows; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) m[r][c] += weights[i].at[r] * four.at[i];
        }
      }
      __syncwarp();
    }

    __device__ void scale(const Rows& factor) {
#pragma unroll
      for (int r = 0; r < kUnitRows; ++r)
#pragma unroll
        for (int c = 0; c < kOwn; ++c) m[r][c] *= factor[0][r];
    }

    __device__ void store(Acc* unit, int pitch, int = 0) const {
      unit += t() * pitch + g();
#pragma unroll
      for (int c = 0; c < kOwn; ++c)
#pragma unroll
        for (int r = 0; r < kUnitRows; ++r) unit[4 * c * pitch + r * kUnitColumns] = m[r][c];
    }
  };

  struct Keys {
    const Acc* keys;
    int pitch;
    __device__ Keys(const Acc* keys_, int pitch_) : keys(keys_ + g()), pitch(pitch_) {}
  };

  __device__ static void scores(Acc (&s)[kUnitRows][2][2], const Keys& from, const Acc* unit,
                                int pitch) {
    const Acc* keys = from.keys;
    unit += 2 * t();
#pragma unroll
    for (int i = 0; i < kUnitRows * 4; ++i) (&s[0][0][0])[i] = 0;
#pragma unroll 8
    for (int c = 0; c < kChannels; ++c, unit += pitch, keys += from.pitch) {
      const Acc key[2] = {keys[0], keys[8]};
#pragma unroll
      for (int r = 0; r < kUnitRows; ++r) {
        const auto pair = *reinterpret_cast<const Vec<Acc, 2>*>(unit + r * kUnitColumns);
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int e = 0; e < 2; ++e) s[r][k][e] += key[k] * pair.at[e];
      }
    }
  }

  struct KeySums {
    Acc m[2][kOwn];

    __device__ void clear() {
#pragma unroll
      for (int i = 0; i < 2 * kOwn; ++i) (&m[0][0])[i] = 0;
    }

    __device__ void add(const Acc (&p)[kUnitRows][2][2], const Acc* unit, int pitch, Acc* scratch) {
      // scratch [key][row][column]
#pragma unroll
      for (int r = 0; r < kUnitRows; ++r)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const Vec<Acc, 2> pair{p[r][k][0], p[r][k][1]};
          *reinterpret_cast<Vec<Acc, 2>*>(scratch + (g() + 8 * k) * kUnit + r * 8 + 2 * t()) = pair;
        }
      __syncwarp();
      unit += t() * pitch;
#pragma unroll kUnrolled
      for (int q = 0; q < kUnit; q += 4) {
        Vec<Acc, 4> weights[2];
#pragma unroll
        for (int k = 0; k < 2; ++k)
          weights[k] = *reinterpret_cast<const Vec<Acc, 4>*>(scratch + (g() + 8 * k) * kUnit + q);
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          const auto four = *reinterpret_cast<const Vec<Acc, 4>*>(unit + 4 * c * pitch + q);
#pragma unroll
          for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) m[k][c] += weights[k].at[i] * four.at[i];
        }
      }
      __syncwarp();
    }

    template <class F>
    __device__ void each(const F& f) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int c = 0; c < kOwn; ++c) f(g() + 8 * k, 4 * c + t(), m[k][c]);
    }
  };
};

}  // namespace dat::cuda

// Matrix products of a warp on tensor cores: float16 or bfloat16 operands from shared memory, float
// accumulators in registers.
//
// Lane l = 4 g + t. A unit's scores are s[r][nt][e]: query (row r, column g), key 8 nt + 2 t + e;
// transposed, s[r][k][c]: key g + 8 k, query (row r, column 2 t + c). Both are the layout of an
// accumulator, and at the same time that of the operand of the product that follows, so scores
// never pass through shared memory.
#pragma once

#include "plan.h"
#include "ptx.cuh"

namespace dat::cuda {

// kTiles_: how many tiles of 8 keys a step of the loop over keys takes. kStack_: how many units,
// one below the other, a warp takes at a time in the forward.
template <class T, int kChannels_, int kTiles_ = 4, int kStack_ = 1>
struct Mma {
  using Storage = T;  // in global memory
  using Shared = T;
  using Acc = float;
  static constexpr bool kTensorCores = true;
  static constexpr int kChannels = kChannels_;
  static constexpr int kTiles = kTiles_, kStack = kStack_;
  static constexpr bool kWholeRows = false;  // of a tile's slots (place_of)
  using Short = Mma<T, kChannels_, 2>;       // the same with shorter steps, in fewer registers
  using Tall = Mma<T, kChannels_, 2, 2>;     // and with two units
  static constexpr int kScratch = 0;         // values of shared memory for each warp
  static constexpr int kKeyLanes = 3;        // bits of the lane that tell keys of a query apart
  static constexpr int kSteps = kChannels / 16;

  // Between channels in shared memory: such that eight of them start in different banks, and known
  // to the compiler.
  static constexpr int kQueryPitch = kStack * most_units(true, kChannels) * kWarp + 8;
  static constexpr int kKeyPitch = kMaxKeys + 8;
  __device__ static int query_pitch(const Plan&) { return kQueryPitch; }
  __device__ static int key_pitch(const Plan&) { return kKeyPitch; }

  __device__ static int g() { return threadIdx.x % kWarp / 4; }
  __device__ static int t() { return threadIdx.x % 4; }

  // What there is of a unit's queries in the units of a stack.
  using Rows = float[kStack][kUnitRows];
  using Scores = float[kStack][kUnitRows][kTiles][2];

  // Queries as the left operand. Kept in registers where there is room.
  struct Queries {
    static constexpr bool kKept = kChannels <= 32;
    using Operand = unsigned[kStack][2][4];
    Operand m[kKept ? kSteps : 1];
    unsigned address;
    int pitch, below;

    Queries() = default;
    // unit: channel 0, first row and column; the next one of the stack starts `below` values on.
    __device__ Queries(const T* unit, int pitch_, int below_ = 0) : pitch(pitch_), below(below_) {
      const int lane = threadIdx.x % kWarp;
      const int c = lane % 8 + lane / 16 * 8, row = lane / 8 % 2;
      address = shared_address(unit + c * pitch + row * kUnitColumns);
      if constexpr (kKept)
        for (int k = 0; k < kSteps; ++k) load(m[k], k);
    }
    __device__ void load(Operand& to, int k) const {
#pragma unroll
      for (int u = 0; u < kStack; ++u) {
        const unsigned at = address + (k * 16 * pitch + u * below) * int(sizeof(T));
        load_matrices<true>(to[u][0], at);
        load_matrices<true>(to[u][1], at + 2 * kUnitColumns * int(sizeof(T)));
      }
    }
  };

  // s = start of the row + q k, for `tiles` tiles of keys from key 0 of `keys` on.
  static constexpr bool kStarts = true;
  __device__ static void scores(Scores& s, const Queries& q, const T* keys, int pitch, int tiles,
                                const Rows& start = Rows{}) {
    const int lane = threadIdx.x % kWarp;
    const unsigned at = shared_address(keys + (lane % 16) * pitch + lane / 16 * 8);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      typename Queries::Operand a;
      if constexpr (Queries::kKept)
        for (int i = 0; i < kStack * 8; ++i) (&a[0][0][0])[i] = (&q.m[k][0][0][0])[i];
      else
        q.load(a, k);
#pragma unroll
      for (int nt = 0; nt < kTiles; nt += 2) {
        if (nt && nt >= tiles) continue;
        unsigned b[4];
        load_matrices<true>(b, at + (k * 16 * pitch + nt * 8) * int(sizeof(T)));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half && nt + 1 >= tiles) continue;
#pragma unroll
          for (int i = 0; i < kStack * 2; ++i) {
            const int u = i / 2, m = i % 2;
            float (&top)[2] = s[u][2 * m][nt + half], (&bottom)[2] = s[u][2 * m + 1][nt + half];
            if (k == 0)
              mma<T, true>(top[0], top[1], bottom[0], bottom[1], a[u][m], b[2 * half],
                           b[2 * half + 1], start[u][2 * m], start[u][2 * m + 1]);
            else
              mma<T>(top[0], top[1], bottom[0], bottom[1], a[u][m], b[2 * half], b[2 * half + 1]);
          }
        }
      }
    }
  }

  // Weighted sums over keys, transposed: rows are channels, columns the queries of one row.
  struct Sums {
    static constexpr int kRows = kStack * kUnitRows;
    float m[kSteps][kRows][4];

    __device__ void clear() {
#pragma unroll
      for (int i = 0; i < kSteps * kRows * 4; ++i) (&m[0][0][0])[i] = 0;
    }

    // += values p for `tiles` tiles of keys from key 0 of `values` on; p is 0 past them.
    __device__ void add(const Scores& p, const T* values, int pitch, int tiles, T*) {
      const int lane = threadIdx.x % kWarp;
      const unsigned at = shared_address(values + lane % 16 * pitch + lane / 16 * 8);
#pragma unroll
      for (int nt = 0; nt < kTiles; nt += 2) {
        if (nt && nt >= tiles) continue;
        unsigned b[kRows][2];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const auto& own = p[r / kUnitRows][r % kUnitRows];
          b[r][0] = pack<T>(own[nt][0], own[nt][1]);
          b[r][1] = pack<T>(own[nt + 1][0], own[nt + 1][1]);
        }
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          unsigned a[4];
          load_matrices<false>(a, at + (k * 16 * pitch + nt * 8) * int(sizeof(T)));
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float (&c)[4] = m[k][r];
            mma<T>(c[0], c[1], c[2], c[3], a, b[r][0], b[r][1]);
          }
        }
      }
    }

    // += weights, 16-bit in shared memory as [key][query] with the unit's first query first, for
    // `keys` keys, a multiple of 16.
    __device__ void add_stored(const T* weights, int weights_pitch, const T* values, int pitch,
                               int keys) {
      const int lane = threadIdx.x % kWarp;
      unsigned at_weights =
          shared_address(weights + lane % 16 * weights_pitch + lane / 16 * kUnitColumns);
      unsigned at_values = shared_address(values + lane % 16 * pitch + lane / 16 * 8);
      for (int n = 0; n < keys; n += 16) {
        unsigned b[2][4];  // two rows of queries each
        load_matrices<true>(b[0], at_weights);
        load_matrices<true>(b[1], at_weights + 2 * kUnitColumns * int(sizeof(T)));
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          unsigned a[4];
          load_matrices<false>(a, at_values + k * 16 * pitch * int(sizeof(T)));
#pragma unroll
          for (int r = 0; r < kUnitRows; ++r) {
            float (&c)[4] = m[k][r];
            mma<T>(c[0], c[1], c[2], c[3], a, b[r / 2][r % 2 * 2], b[r / 2][r % 2 * 2 + 1]);
          }
        }
        at_weights += 16 * weights_pitch * int(sizeof(T)), at_values += 16 * int(sizeof(T));
      }
    }

    // *= factor of each query, which the lanes of column g hold.
    __device__ void scale(const Rows& factor) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float own = factor[r / kUnitRows][r % kUnitRows];
        const float even = __shfl_sync(kAllLanes, own, t() * 8);
        const float odd = __shfl_sync(kAllLanes, own, t() * 8 + 4);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          m[k][r][0] *= even, m[k][r][2] *= even;
          m[k][r][1] *= odd, m[k][r][3] *= odd;
        }
      }
    }

    // As values of T, or as they are.
    template <class To>
    __device__ void store(To* unit, int pitch, int below = 0) const {
      unit += g() * pitch + 2 * t();
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            To* to = unit + (k * 16 + half * 8) * pitch + r / kUnitRows * below +
                     r % kUnitRows * kUnitColumns;
            const float left = m[k][r][2 * half], right = m[k][r][2 * half + 1];
            if constexpr (std::is_same_v<To, T>)
              *reinterpret_cast<unsigned*>(to) = pack<T>(left, right);
            else
              *reinterpret_cast<Vec<float, 2>*>(to) = {left, right};
          }
    }
  };

  // 16 keys as the left operand. Kept in registers where there is room.
  struct Keys {
    static constexpr bool kKept = kChannels <= 32;
    unsigned m[kKept ? kSteps : 1][4];
    unsigned address;
    int pitch;

    __device__ Keys(const T* keys, int pitch_) : pitch(pitch_) {
      const int lane = threadIdx.x % kWarp;
      address = shared_address(keys + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
      if constexpr (kKept)
        for (int k = 0; k < kSteps; ++k) load(m[k], k);
    }
    __device__ void load(unsigned (&to)[4], int k) const {
      load_matrices<true>(to, address + k * 16 * pitch * int(sizeof(T)));
    }
  };

  // s = k q, transposed, for a unit.
  __device__ static void scores(float (&s)[kUnitRows][2][2], const Keys& keys, const T* unit,
                                int pitch) {
    const int lane = threadIdx.x % kWarp;
    // Two rows of queries at a time: matrices (channels 0-7, 8-15) of either.
    const unsigned at = shared_address(unit + lane % 16 * pitch + lane / 16 * kUnitColumns);
#pragma unroll
    for (int r = 0; r < kUnitRows; r += 2) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        unsigned a[4], b[4];
        if constexpr (Keys::kKept)
          for (int i = 0; i < 4; ++i) a[i] = keys.m[k][i];
        else
          keys.load(a, k);
        load_matrices<true>(b, at + (k * 16 * pitch + r * kUnitColumns) * int(sizeof(T)));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float (&c)[2][2] = s[r + half];
          if (k == 0)
            mma<T, true>(c[0][0], c[0][1], c[1][0], c[1][1], a, b[2 * half], b[2 * half + 1]);
          else
            mma<T>(c[0][0], c[0][1], c[1][0], c[1][1], a, b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }

  // f(row, column, sum over channels of a b) for a unit's queries in two tiles.
  template <class F>
  __device__ static void inner_products(const T* a_unit, const T* b_unit, int pitch, const F& f) {
    const int lane = threadIdx.x % kWarp;
    const Queries queries(a_unit, pitch);
    const unsigned at = shared_address(b_unit + lane % 16 * pitch + lane / 16 * kUnitColumns);
    float c[kUnitRows][4];  // of row r, all columns with all columns: wanted is the diagonal
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      static_assert(kStack == 1);
      typename Queries::Operand a;
      if constexpr (Queries::kKept)
        for (int i = 0; i < 8; ++i) (&a[0][0][0])[i] = (&queries.m[k][0][0][0])[i];
      else
        queries.load(a, k);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        unsigned b[4];
        load_matrices<true>(b, at + (k * 16 * pitch + 2 * m * kUnitColumns) * int(sizeof(T)));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float (&to)[4] = c[2 * m + half];
          if (k == 0)
            mma<T, true>(to[0], to[1], to[2], to[3], a[0][m], b[2 * half], b[2 * half + 1]);
          else
            mma<T>(to[0], to[1], to[2], to[3], a[0][m], b[2 * half], b[2 * half + 1]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (g() == 2 * t() + e) f(r, g(), c[r][r % 2 * 2 + e]);
  }

  // Scores' gradients of 16 keys and a unit, to shared memory as [key][query].
  __device__ static void store_scores(T* to, const float (&s)[kUnitRows][2][2], int pitch) {
    to += g() * pitch + 2 * t();
#pragma unroll
    for (int k = 0; k < 2; ++k, to += 8 * pitch)
#pragma unroll
      for (int r = 0; r < kUnitRows; ++r)
        *reinterpret_cast<unsigned*>(to + r * kUnitColumns) = pack<T>(s[r][k][0], s[r][k][1]);
  }

  // Weighted sums over queries: [16 keys][channels].
  struct KeySums {
    float m[kChannels / 8][4];

    __device__ void clear() {
#pragma unroll
      for (int i = 0; i < kChannels / 2; ++i) (&m[0][0])[i] = 0;
    }

    // += p unit, over the unit's queries.
    __device__ void add(const float (&p)[kUnitRows][2][2], const T* unit, int pitch, T*) {
      const int lane = threadIdx.x % kWarp;
      const unsigned at =
          shared_address(unit + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * kUnitColumns);
#pragma unroll
      for (int r = 0; r < kUnitRows; r += 2) {
        const unsigned a[4] = {pack<T>(p[r][0][0], p[r][0][1]), pack<T>(p[r][1][0], p[r][1][1]),
                               pack<T>(p[r + 1][0][0], p[r + 1][0][1]),
                               pack<T>(p[r + 1][1][0], p[r + 1][1][1])};
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          unsigned b[4];
          load_matrices<false>(b, at + (k * 16 * pitch + r * kUnitColumns) * int(sizeof(T)));
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float (&c)[4] = m[2 * k + half];
            mma<T>(c[0], c[1], c[2], c[3], a, b[2 * half], b[2 * half + 1]);
          }
        }
      }
    }

    // f(key of 16, channel, value) for what this lane holds.
    template <class F>
    __device__ void each(const F& f) {
#pragma unroll
      for (int i = 0; i < kChannels / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) f(g() + j / 2 * 8, i * 8 + 2 * t() + j % 2, m[i][j]);
    }
  };
};

}  // namespace dat::cuda

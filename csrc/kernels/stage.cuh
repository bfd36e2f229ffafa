// Tiles between global and shared memory.
#pragma once

#include "plan.h"
#include "ptx.cuh"

namespace dat::cuda {

// One access of kVec values from global to shared memory; zeros unless `inside`, where `global`
// must be readable all the same.
template <int kVec, class S, class T>
__device__ __forceinline__ void copy(S* shared, const T* global, bool inside) {
  static_assert(kVec == 1 || std::is_same_v<S, T>);
  if constexpr (kVec * sizeof(T) >= 4 && std::is_same_v<S, T>) {
    copy_async<kVec * sizeof(T)>(shared_address(shared), global, inside);
  } else if constexpr (std::is_same_v<S, T>) {
    // Masked, not branched around.
    const unsigned short bits = *reinterpret_cast<const unsigned short*>(global);
    *reinterpret_cast<unsigned short*>(shared) = inside ? bits : 0;
  } else {
    const S value = from_acc<S>(to_acc(*global));
    *shared = inside ? value : S(0);
  }
}

// Channels are taken in runs: places of a run in shared memory are known to the compiler.
constexpr int kRun = 4;

// Calls f(channel of a run, place in the run, pointer to it, whether it exists) for runs `run`,
// run + runs, .. of kChannels channels, head_dim of which exist.
template <int kChannels, int kRun = dat::cuda::kRun, class P, class F>
__device__ __forceinline__ void each_channel(P* data, int64_t stride, int run, int runs,
                                             int head_dim, const F& f) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  stride *= sizeof(P);
  const int64_t skip = (runs - 1) * kRun * stride;
  auto* at = reinterpret_cast<Byte*>(data) + run * kRun * stride;
  for (int c = run * kRun; c < kChannels; c += runs * kRun, at += skip) {
    if (c + kRun <= head_dim) {
#pragma unroll
      for (int i = 0; i < kRun; ++i, at += stride) f(c, i, reinterpret_cast<P*>(at), true);
    } else {
#pragma unroll 1
      for (int i = 0; i < kRun; ++i, at += stride)
        f(c, i, reinterpret_cast<P*>(at), c + i < head_dim);
    }
  }
}

// Channels of one place, by `runs` threads that take turns at runs. Zeros unless `inside` and past
// head_dim; `from` must be a place of the tensor in any case.
template <int kVec, class E, class S, class T>
__device__ __forceinline__ void copy_channels(S* to, int pitch, const T* from, int64_t stride,
                                              int run, int runs, int head_dim, bool inside) {
  each_channel<E::kChannels>(
      from, stride, run, runs, head_dim, [&](int c, int i, const T* at, bool exists) {
        copy<kVec>(to + c * pitch + i * pitch, exists ? at : from, inside && exists);
      });
}

// Calls f with the vector length as a compile-time constant; S and T differ: always 1.
template <class S, class T, class F>
__device__ __forceinline__ void with_vector(int vec, const F& f) {
  if constexpr (std::is_same_v<S, T> && sizeof(T) <= 4) {
    if (vec == 4) return f(std::integral_constant<int, 4>());
    if (vec == 2) return f(std::integral_constant<int, 2>());
    if constexpr (sizeof(T) == 2)
      if (vec == 8) return f(std::integral_constant<int, 8>());
  } else if constexpr (std::is_same_v<S, T>) {
    if (vec == 2) return f(std::integral_constant<int, 2>());
  }
  f(std::integral_constant<int, 1>());
}

// A rectangle of the query map.
struct TileOrigin {
  int row, column;
};

// Where slot `slot` of a tile is: units one after the other, each by rows.
__device__ __forceinline__ TileOrigin place_of(const Plan& plan, TileOrigin origin, unsigned slot) {
  const unsigned across = unsigned(plan.columns) / kUnitColumns, unit = slot / kWarp;
  const unsigned row = unit / across * kUnitRows + slot / kUnitColumns % kUnitRows;
  const unsigned column = unit % across * kUnitColumns + slot % kUnitColumns;
  return {origin.row + int(row), origin.column + int(column)};
}

// map [head_dim, H, W] -> shared [channels][slots]; zeros outside the map and past
// head_dim. Asynchronous.
template <class E, class S, class T>
__device__ void load_queries(S* shared, const T* map, const MapView& view,
                             const AttentionShape& shape, const Plan& plan, TileOrigin origin,
                             int vec) {
  const int area = plan.rows * plan.columns, pitch = E::query_pitch(plan);
  const int head_dim = int(shape.head_dim);
  if (vec == 0) {
    for (int i = threadIdx.x; i < area * E::kChannels; i += blockDim.x) {
      const int c = i % E::kChannels, slot = i / E::kChannels;
      const auto [row, column] = place_of(plan, origin, slot);
      const bool inside = row < shape.height && column < shape.width && c < head_dim;
      copy<1>(shared + c * pitch + slot,
              map + (inside ? row * view.row + column * view.column + c : 0), inside);
    }
    return;
  }
  with_vector<S, T>(vec, [&](auto v) {
    constexpr int kVec = decltype(v)::value;
    const int positions = area / kVec, step = blockDim.x / positions;
    const int slot = threadIdx.x % positions * kVec, c = threadIdx.x / positions;
    if (c >= step) return;  // threads left over
    const auto [row, column] = place_of(plan, origin, slot);
    const bool inside = row < shape.height && column < shape.width;
    copy_channels<kVec, E>(shared + slot, pitch,
                           map + (inside ? row * view.row + column * view.column : 0), view.channel,
                           c, step, head_dim, inside);
  });
}

// shared [channels][slots] -> out [head_dim, H, W], contiguous.
template <class E, class S, class T>
__device__ void store_queries(T* out, const S* shared, const AttentionShape& shape,
                              const Plan& plan, TileOrigin origin, int vec) {
  const int64_t area = shape.queries();
  with_vector<S, T>(vec, [&](auto v) {
    constexpr int kVec = decltype(v)::value;
    const int positions = plan.rows * plan.columns / kVec, step = blockDim.x / positions;
    const int slot = threadIdx.x % positions * kVec, head_dim = int(shape.head_dim);
    const auto [row, column] = place_of(plan, origin, slot);
    const int run = threadIdx.x / positions;
    if (run >= step || row >= shape.height || column >= shape.width) return;
    out += row * int(shape.width) + column;
    each_channel<E::kChannels>(
        out, area, run, step, head_dim, [&](int c, int i, T* to, bool exists) {
          const S* from = shared + c * E::query_pitch(plan) + i * E::query_pitch(plan) + slot;
          if (!exists) return;
          if constexpr (std::is_same_v<S, T>)
            *reinterpret_cast<Vec<T, kVec>*>(to) = *reinterpret_cast<const Vec<T, kVec>*>(from);
          else
            *to = from_acc<T>(*from);
        });
  });
}

// Of a list of 16-bit values that 4-byte accesses do not fit, every list of 49 keys for one: a lane
// takes two neighbouring keys of a channel.
template <class E, class T>
__device__ void load_key_pairs(T* shared, const T* list, const MapView& view,
                               const AttentionShape& shape, const Plan& plan, int first) {
  const int n = threadIdx.x % kWarp * 2, left = int(shape.keys) - first - n;
  if (n >= plan.key_stage) return;
  const unsigned mask = left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0;
  const int64_t right = left > 1 ? view.column : 0;
  const auto* keys =
      reinterpret_cast<const unsigned short*>(list) + (left > 0 ? (first + n) * view.column : 0);
  constexpr int kKeyRun = E::kChannels / 4;  // for four warps
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  each_channel<E::kChannels, kKeyRun>(
      keys, view.channel, warp, warps, int(shape.head_dim),
      [&](int c, int i, const unsigned short* at, bool exists) {
        T* to = shared + c * E::key_pitch(plan) + i * E::key_pitch(plan) + n;
        const unsigned pair = exists ? at[0] | unsigned(at[right]) << 16 : 0;
        *reinterpret_cast<unsigned*>(to) = pair & mask;
      });
}

// Keys [first, first + key_stage) of list [head_dim, N] -> shared [channels][key_stage]; zeros past
// N and head_dim. Asynchronous.
template <class E, class S, class T>
__device__ void load_keys(S* shared, const T* list, const MapView& view,
                          const AttentionShape& shape, const Plan& plan, int first, int vec) {
  const int pitch = E::key_pitch(plan), head_dim = int(shape.head_dim);
  if (vec == 0) {
    for (int i = threadIdx.x; i < plan.key_stage * E::kChannels; i += blockDim.x) {
      const int c = i % E::kChannels, n = i / E::kChannels;
      const bool inside = first + n < shape.keys && c < head_dim;
      copy<1>(shared + c * pitch + n, list + (inside ? (first + n) * view.column + c : 0), inside);
    }
    return;
  }
  if constexpr (std::is_same_v<S, T> && sizeof(T) == 2)
    if (vec == 1) return load_key_pairs<E>(shared, list, view, shape, plan, first);
  with_vector<S, T>(vec, [&](auto v) {
    constexpr int kVec = decltype(v)::value;
    // A warp takes whole channels: several at a time if they are short.
    const int lanes = min(plan.key_stage / kVec, kWarp), together = kWarp / lanes;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int n = lane % lanes * kVec; n < plan.key_stage; n += kWarp * kVec) {
      const bool inside = first + n < shape.keys;
      copy_channels<kVec, E>(shared + n, pitch, list + (inside ? (first + n) * view.column : 0),
                             view.channel, warp * together + lane / lanes,
                             blockDim.x / kWarp * together, head_dim, inside);
    }
  });
}

}  // namespace dat::cuda

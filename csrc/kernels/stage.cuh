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

// Channels of a place, in shared and in global memory.
template <class S, class P>
struct Channels {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  S* shared;
  int pitch;  // values from one to the next
  Byte* at;
  int64_t stride;  // bytes

  __device__ Channels(S* shared_, int pitch_, P* global_, int64_t stride_)
      : shared(shared_),
        pitch(pitch_),
        at(reinterpret_cast<Byte*>(global_)),
        stride(stride_ * int64_t(sizeof(P))) {}
  __device__ P* global() const { return reinterpret_cast<P*>(at); }
  __device__ void move(int channels) { shared += channels * pitch, at += channels * stride; }
};

// Calls f(place in shared memory, place in global memory, whether the channel exists) for runs
// `run`, run + runs, .. of kRun channels, out of kChannels, head_dim of which exist; for several
// places side by side.
template <int kChannels, int kRun = 4, class F, class... Places>
__device__ __forceinline__ void each_channel(int run, int runs, int head_dim, const F& f,
                                             Places... places) {
  int c = run * kRun;
  (places.move(c), ...);
#pragma unroll 1
  for (; c + kRun <= head_dim; c += runs * kRun, (places.move((runs - 1) * kRun), ...))
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      (f(places.shared, places.global(), true), ...), (places.move(1), ...);
#pragma unroll 1
  for (; c < kChannels; c += runs * kRun, (places.move((runs - 1) * kRun), ...))
#pragma unroll 1
    for (int i = 0; i < kRun; ++i)
      (f(places.shared, places.global(), c + i < head_dim), ...), (places.move(1), ...);
}

// Calls f with the vector length as a compile-time constant; S and T differ: always 1.
template <class S, class T, class F>
__device__ __forceinline__ void with_vector(int vec, const F& f) {
  if constexpr (std::is_same_v<S, T>) {
    if (vec == 4) return f(std::integral_constant<int, 4>());
    if (vec == 2) return f(std::integral_constant<int, 2>());
    if constexpr (sizeof(T) == 2)
      if (vec == 8) return f(std::integral_constant<int, 8>());
  }
  f(std::integral_constant<int, 1>());
}

// Channels of a run, where accesses are of kVec values.
template <int kVec>
constexpr int kRunOf = kVec > 4 ? 4 : 8;

// Lest every kind of copy is made ready for ahead of the loops.
__device__ __forceinline__ unsigned this_thread() { return opaque(threadIdx.x); }

// A rectangle of the query map.
struct TileOrigin {
  int row, column;
};

// Where slot `slot` of a tile is: units one after the other, each by rows. kWholeRows: rows of 16
// slots, where the neighbours that a lane's accumulators have of 8 slots are next to those that it
// has of the 8 others.
template <bool kWholeRows = false>
__device__ __forceinline__ TileOrigin place_of(const Plan& plan, TileOrigin origin, unsigned slot) {
  if (kWholeRows)
    return {origin.row + int(slot / 16),
            origin.column + int(slot / 2 % 4 * 4 + slot / 8 % 2 * 2 + slot % 2)};
  const unsigned across = unsigned(plan.columns) / kUnitColumns, unit = slot / kWarp;
  const unsigned row = unit / across * kUnitRows + slot / kUnitColumns % kUnitRows;
  const unsigned column = unit % across * kUnitColumns + slot % kUnitColumns;
  return {origin.row + int(row), origin.column + int(column)};
}

// A map [head_dim, H, W] and the tile [channels][slots] in shared memory that it is copied to.
template <class S, class T>
struct QueryTile {
  S* shared;
  const T* map;
  const MapView& view;
};

// Tiles of one or several maps that allow accesses of `vec` values; zeros outside the map and past
// head_dim. Asynchronous.
template <class E, class S, class T, class... More>
__device__ void load_queries(const AttentionShape& shape, const Plan& plan, TileOrigin origin,
                             int vec, const QueryTile<S, T>& first, const More&... more) {
  const int area = plan.rows * plan.columns, pitch = E::query_pitch(plan);
  const int head_dim = int(shape.head_dim);
  const auto each_tile = [&](const auto& f) { f(first), (f(more), ...); };
  if (vec == 0) {
    for (int i = int(this_thread()); i < area * E::kChannels; i += blockDim.x) {
      const int c = i % E::kChannels, slot = i / E::kChannels;
      const auto [row, column] = place_of<E::kWholeRows>(plan, origin, slot);
      const bool inside = row < int(shape.height) && column < int(shape.width) && c < head_dim;
      each_tile([&, row = row, column = column](const QueryTile<S, T>& tile) {
        const MapView& view = tile.view;
        copy<1>(tile.shared + c * pitch + slot,
                tile.map + (inside ? row * view.row + column * view.column + c : 0), inside);
      });
    }
    return;
  }
  with_vector<S, T>(vec, [&](auto v) {
    constexpr int kVec = decltype(v)::value;
    const int positions = area / kVec, runs = max(blockDim.x / positions, 1);
    // Once, but for tiles of more positions than threads.
    for (int i = int(this_thread()); i < positions * runs; i += blockDim.x) {
      const int slot = unsigned(i) % positions * kVec;
      const auto [row_, column_] = place_of<E::kWholeRows>(plan, origin, slot);
      const int row = row_, column = column_;
      const bool inside = row < int(shape.height) && column < int(shape.width);
      const auto channels = [&](const QueryTile<S, T>& tile) {
        const int64_t at = inside ? row * tile.view.row + column * tile.view.column : 0;
        return Channels<S, const T>{tile.shared + slot, pitch, tile.map + at, tile.view.channel};
      };
      each_channel<E::kChannels, kRunOf<kVec>>(
          unsigned(i) / positions, runs, head_dim,
          [&](S* to, const T* at, bool exists) {
            copy<kVec>(to, exists ? at : first.map, inside && exists);
          },
          channels(first), channels(more)...);
    }
  });
}

// shared [channels][slots] -> out [head_dim, H, W], contiguous.
template <class E, class S, class T>
__device__ void store_queries(T* out, const S* shared, const AttentionShape& shape,
                              const Plan& plan, TileOrigin origin, int vec) {
  const int64_t area = shape.queries();
  with_vector<S, T>(vec, [&](auto v) {
    constexpr int kVec = decltype(v)::value;
    const int positions = plan.rows * plan.columns / kVec, runs = max(blockDim.x / positions, 1);
    for (int i = int(this_thread()); i < positions * runs; i += blockDim.x) {
      const int slot = unsigned(i) % positions * kVec;
      const auto [row, column] = place_of<E::kWholeRows>(plan, origin, slot);
      if (row >= int(shape.height) || column >= int(shape.width)) continue;
      each_channel<E::kChannels, kRunOf<kVec>>(
          unsigned(i) / positions, runs, int(shape.head_dim),
          [&](const S* from, T* to, bool exists) {
            if (!exists) return;
            if constexpr (std::is_same_v<S, T>)
              *reinterpret_cast<Vec<T, kVec>*>(to) = *reinterpret_cast<const Vec<T, kVec>*>(from);
            else
              *to = from_acc<T>(*from);
          },
          Channels<const S, T>{shared + slot, E::query_pitch(plan),
                               out + (row * int(shape.width) + column), area});
    }
  });
}

// Keys and values, of one (image, head).
template <class T>
struct KeyLists {
  const T *k, *v;
};

// Of lists of 16-bit values that 4-byte accesses do not fit, all lists of 49 keys for one: a lane
// takes two neighbouring keys of a channel.
template <class E, class T>
__device__ void load_key_pairs(T* k, T* v, const KeyLists<T>& from, const AttentionInputs& in,
                               const Plan& plan, int first) {
  const unsigned thread = this_thread();
  const int n = thread % kWarp * 2, left = int(in.shape.keys) - first - n;
  if (n >= plan.key_stage) return;
  const unsigned mask = left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0;
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const MapView& view = i ? in.v : in.k;
    const int64_t right = left > 1 ? view.column : 0;
    const auto* keys = reinterpret_cast<const unsigned short*>(i ? from.v : from.k) +
                       (left > 0 ? (first + n) * view.column : 0);
    // One run for each of four warps: its loads are under way all at once.
    each_channel<E::kChannels, E::kChannels / 4>(
        int(thread / kWarp), int(blockDim.x / kWarp), int(in.shape.head_dim),
        [&](T* to, const unsigned short* at, bool exists) {
          const unsigned pair = exists ? at[0] | unsigned(at[right]) << 16 : 0;
          *reinterpret_cast<unsigned*>(to) = pair & mask;
        },
        Channels<T, const unsigned short>{(i ? v : k) + n, E::key_pitch(plan), keys, view.channel});
  }
}

// The same of lists of an odd number of keys that lie end to end (Plan::key_words). Of two
// channels, the first is in words as it will be; a pair of the second is half of a word and half of
// the next, which the next lane has.
template <class E, class T>
__device__ void load_key_words(T* k, T* v, const KeyLists<T>& from, const AttentionInputs& in,
                               const Plan& plan) {
  const unsigned thread = this_thread();
  const int lane = thread % kWarp, keys = int(in.shape.keys), half = unsigned(keys) / 2;
  const int left = keys - lane * 2;
  const unsigned mask = left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0;
  const int word = min(lane, half);
  const auto place = [&](T* to, const T* list) {
    return Channels<unsigned, const unsigned>{reinterpret_cast<unsigned*>(to) + lane,
                                              E::key_pitch(plan),
                                              reinterpret_cast<const unsigned*>(list) + word, keys};
  };
  each_channel<E::kChannels / 2, E::kChannels / 8>(
      __shfl_sync(kAllLanes, int(thread / kWarp), 0), int(blockDim.x / kWarp),
      int(unsigned(in.shape.head_dim) / 2),
      [&](unsigned* to, const unsigned* at, bool exists) {
        const unsigned pair = exists ? at[0] : 0, odd = exists ? at[half] : 0;
        const unsigned next = __shfl_down_sync(kAllLanes, odd, 1);
        to[0] = pair & mask;
        to[E::key_pitch(plan) / 2] = __funnelshift_r(odd, next, 16) & mask;
      },
      place(k, from.k), place(v, from.v));
}

// Keys [first, first + key_stage) of lists [head_dim, N] -> shared [channels][key_stage]; zeros
// past N and head_dim. Asynchronous. kFirst: it may be that these are all.
template <class E, bool kFirst, class S, class T>
__device__ void load_keys(S* k, S* v, const KeyLists<T>& from, const AttentionInputs& in,
                          const Plan& plan, int first) {
  const int pitch = E::key_pitch(plan), head_dim = int(in.shape.head_dim);
  const int keys = int(in.shape.keys);
  const unsigned thread = this_thread();
  if (plan.key_vec == 0) {
    for (int i = int(thread); i < plan.key_stage * E::kChannels; i += blockDim.x) {
      const int c = i % E::kChannels, n = i / E::kChannels, to = c * pitch + n;
      const bool inside = first + n < keys && c < head_dim;
      copy<1>(k + to, from.k + (inside ? (first + n) * in.k.column + c : 0), inside);
      copy<1>(v + to, from.v + (inside ? (first + n) * in.v.column + c : 0), inside);
    }
    return;
  }
  if constexpr (std::is_same_v<S, T> && sizeof(T) == 2) {
    if (kFirst && plan.key_words) return load_key_words<E>(k, v, from, in, plan);
    if (plan.key_vec == 1) return load_key_pairs<E>(k, v, from, in, plan, first);
  }
  with_vector<S, T>(plan.key_vec, [&](auto vec) {
    constexpr int kVec = decltype(vec)::value;
    // A warp takes whole channels: several at a time if they are short.
    constexpr int kLanes = kVec > 2 ? kMaxKeys / kVec : kWarp;
    for (int n = int(thread % kLanes) * kVec; n < plan.key_stage; n += kLanes * kVec) {
      const bool inside = first + n < keys;
      const int key = inside ? first + n : 0;
      each_channel<E::kChannels>(
          int(thread / kLanes), int(blockDim.x / kLanes), head_dim,
          [&](S* to, const T* at, bool exists) {
            copy<kVec>(to, exists ? at : from.k, inside && exists);
          },
          Channels<S, const T>{k + n, pitch, from.k + key * in.k.column, in.k.channel},
          Channels<S, const T>{v + n, pitch, from.v + key * in.v.column, in.v.channel});
    }
  });
}

}  // namespace dat::cuda

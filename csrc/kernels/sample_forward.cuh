// deform_sample: offsets to positions to bilinear features, in one launch.
//
// A block owns one image and group, a tile of keys and a chunk of the group's channels. It places
// each of its keys on the map once, a thread a key, and keeps the taps in shared memory; the blocks
// of the first chunk write the tile's positions as well. What a thread then owns follows x:
//
// - x contiguous along pixels, or strided anyhow: one key, whose taps move to registers, and every
//   rows-th channel. Lanes run along keys, then channels, as `sampled` lies in memory: stores are
//   contiguous, and the taps of neighbouring keys share sectors where anything can.
// - x contiguous along channels: a lane owns a channel and a warp every eighth key, so that a tap
//   is one contiguous read. Results cross shared memory, [channel][key], to be stored along keys;
//   its rows are an odd number of banks apart, which keeps both directions free of conflicts.
//
// Barriers: one after the taps, and in the second layout one more before the stores.
#pragma once

#include "../math/bilinear.h"
#include "common.cuh"

namespace dat::cuda {

constexpr int kSampleThreads = 256;
constexpr int kSampleKeys = 64;              // most keys of a tile
constexpr int kSampleChannelsPerThread = 4;  // where lanes run along keys

// How a launch is cut into blocks. Chunks run fastest, then key tiles, then images and groups.
struct SampleForwardTiles {
  int keys, key_tiles;   // keys of a tile
  int channels, chunks;  // channels of a chunk
  int64_t group_channels;
  bool along_channels;  // x is contiguous along channels
};

// Lanes come from different branches here: they meet first, for a barrier is passed by whole warps.
__device__ __forceinline__ void sync_block() {
  __syncwarp();
  __syncthreads();
}

// Only for what no thread of the launch writes: the compiler may then read ahead of stores.
template <class T>
__device__ __forceinline__ acc_t<T> read(const T* from) {
  return to_acc(__ldg(from));
}

// A key along one axis: 0 is y, 1 is x.
template <class A>
struct KeyAxis {
  BoundedPosition<A> bounded;
  Cell<A> cell;
};

template <class Offset, class A>
__device__ __forceinline__ KeyAxis<A> locate(const SampleShape& shape,
                                             const Offset* offset,  // [B * G, 2, Hk, Wk]
                                             int64_t bg, int axis, int64_t row, int64_t column) {
  const int64_t count = axis ? shape.keys_w : shape.keys_h;
  const int64_t size = axis ? shape.width : shape.height;
  const A value = read(offset + ((bg * 2 + axis) * shape.keys_h + row) * shape.keys_w + column);
  const A reference = reference_point<A>(axis ? column : row, count, shape.version);
  const BoundedPosition<A> bounded =
      bound_offset(value, reference, A(shape.offset_range_factor), count, shape.version);
  return {bounded, cell_of(map_coordinate(bounded.pos, size), size)};
}

// A key's taps as they lie in x, [y][x].
template <class A>
struct KeyTaps {
  int64_t first;    // tap (0, 0) in a channel of x, by its strides
  A fy, fx;         // from there
  unsigned inside;  // bit: is the tap on the map? Those that are not count as zero.
};

template <class A>
__device__ __forceinline__ KeyTaps<A> taps_of(const SampleShape& shape, const MapView& x,
                                              const Cell<A>& row, const Cell<A>& column) {
  KeyTaps<A> taps{row.index * x.row + column.index * x.column, row.fraction, column.fraction, 0};
  // NaN in one coordinate makes the value, hence both derivatives, NaN.
  const A both = taps.fy + taps.fx;
  if (both != both) taps.fy = taps.fx = both;
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    const int i = row.index + tap / 2, j = column.index + tap % 2;
    if (i >= 0 && i < shape.height && j >= 0 && j < shape.width) taps.inside |= 1u << tap;
  }
  return taps;
}

template <class T, class A = acc_t<T>>
__device__ __forceinline__ Bilinear<A> interpolate(
    const T* plane,  // [H, W], a channel of x, by its strides
    const MapView& x, const KeyTaps<A>& taps) {
  A value[4];
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    const int64_t at = taps.first + (tap / 2) * x.row + (tap % 2) * x.column;
    value[tap] = taps.inside >> tap & 1 ? read(plane + at) : A(0);
  }
  return bilinear(value[0], value[1], value[2], value[3], taps.fy, taps.fx);
}

// The part of the tensors that a block owns.
template <class T>
struct SampleTile {
  int keys, channels;
  const T* x;                     // [channels, H, W], by the strides of x
  T* sampled;                     // [channels, keys], rows shape.keys() apart
  const KeyTaps<acc_t<T>>* taps;  // [keys], shared
};

template <class T>
__device__ __forceinline__ void sample_along_keys(const SampleForward& p,
                                                  const SampleTile<T>& tile) {
  const int rows = kSampleThreads / tile.keys;
  const int key = threadIdx.x % tile.keys, row = threadIdx.x / tile.keys;
  if (row >= rows) return;
  const auto taps = tile.taps[key];
  const int64_t keys = p.shape.keys();
#pragma unroll 4
  for (int c = row; c < tile.channels; c += rows) {
    const T* plane = tile.x + c * p.x.channel;
    tile.sampled[c * keys + key] = from_acc<T>(interpolate(plane, p.x, taps).value);
  }
}

template <class T>
__device__ __forceinline__ void sample_along_channels(const SampleForward& p,
                                                      const SampleTile<T>& tile) {
  constexpr int kPad = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
  __shared__ T staged[kWarp][kSampleKeys + kPad];
  const int lane = threadIdx.x % kWarp;
  if (lane < tile.channels) {
#pragma unroll 4
    for (int key = threadIdx.x / kWarp; key < tile.keys; key += kSampleThreads / kWarp)
      staged[lane][key] = from_acc<T>(interpolate(tile.x + lane, p.x, tile.taps[key]).value);
  }
  sync_block();

  const int rows = kSampleThreads / tile.keys;
  const int key = threadIdx.x % tile.keys, row = threadIdx.x / tile.keys;
  if (row >= rows) return;
  const int64_t keys = p.shape.keys();
  for (int c = row; c < tile.channels; c += rows) tile.sampled[c * keys + key] = staged[c][key];
}

// Four blocks on a multiprocessor leave registers for the loads of four channels at once.
template <class T, class Offset>
__global__ void __launch_bounds__(kSampleThreads, 4)
    sample_forward_kernel(const SampleForward p, const SampleForwardTiles tiles) {
  using A = acc_t<T>;
  __shared__ KeyTaps<A> taps[kSampleKeys];
  const int chunk = blockIdx.x % tiles.chunks, pair = blockIdx.x / tiles.chunks;
  const int bg = pair / tiles.key_tiles, groups = int(p.shape.groups), b = bg / groups;
  const int64_t first_key = int64_t(pair % tiles.key_tiles) * tiles.keys, keys = p.shape.keys();
  const int64_t first_channel = int64_t(chunk) * tiles.channels;
  const int64_t channel = bg % groups * tiles.group_channels + first_channel;
  const SampleTile<T> tile{
      int(min(int64_t(tiles.keys), keys - first_key)),
      int(min(int64_t(tiles.channels), tiles.group_channels - first_channel)),
      static_cast<const T*>(p.x.data) + b * p.x.batch + channel * p.x.channel,
      static_cast<T*>(p.sampled.data) + (b * p.shape.channels + channel) * keys + first_key, taps};

  if (threadIdx.x < tile.keys) {
    const auto* offset = static_cast<const Offset*>(p.offset);
    const int64_t key = first_key + threadIdx.x;
    const int64_t row = key / p.shape.keys_w, column = key - row * p.shape.keys_w;
    const auto y = locate<Offset, A>(p.shape, offset, bg, 0, row, column);
    const auto x = locate<Offset, A>(p.shape, offset, bg, 1, row, column);
    taps[threadIdx.x] = taps_of(p.shape, p.x, y.cell, x.cell);
    if (chunk == 0)
      static_cast<Vec<A, 2>*>(p.pos)[bg * keys + key] = {{y.bounded.pos, x.bounded.pos}};
  }
  sync_block();
  if (tiles.along_channels)
    sample_along_channels(p, tile);
  else
    sample_along_keys(p, tile);
}

}  // namespace dat::cuda

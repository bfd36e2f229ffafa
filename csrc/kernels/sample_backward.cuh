// The gradients of deform_sample, in one launch that adds in a fixed order. The first blocks of the
// grid make grad_offset, the others grad_x.
//
// A grad_offset block owns one image and group and 16 keys, over all channels of the group. A
// thread owns one key and every 16th channel; the 16 sums of a key meet in shared memory and are
// added there in order. Lanes run along keys, or along channels where x is contiguous along them.
// Barriers: after the keys' taps, after the sums.
//
// A grad_x block owns one image and group, a run of up to 128 pixels and a chunk of the channels,
// which it takes in passes; a thread owns one pixel and, in each pass, every rows-th channel, as
// many as it has registers for. Lanes run along pixels, then channels, as grad_x lies in memory.
// Each pixel must hear of the keys whose 2x2 cell covers it. The keys come in rounds of 256, for
// which shared memory holds the cells and, for each pixel, a set of bits, one a key. A key sets up
// to four bits, whichever thread comes first; a pixel takes its keys in the order of the bits. So
// the result does not depend on the order of threads, a pixel without keys costs next to nothing,
// and any number of keys may meet in one pixel. Every block looks at every key of its group, which
// is kept short: a key whose rows are not the run's is dropped before its x is known, a round that
// covers no pixel ends there, and where one round holds all keys, all passes share it.
// Barriers of a round: before and after the bits are cleared, after they are set.
#pragma once

#include "sample_forward.cuh"

namespace dat::cuda {

constexpr int kGradThreads = 256;
constexpr int kGradOffsetKeys = 16;
constexpr int kGradOffsetSlots = kGradThreads / kGradOffsetKeys;
constexpr int kGradPixels = 128;  // most pixels of a run
constexpr int kGradChannelsPerThread = 16;
constexpr int kGradRound = kGradThreads;  // keys of a round
constexpr int kWord = 32;

// How a launch is cut into blocks. Of grad_x's, runs of pixels run fastest, then chunks of
// channels, then images and groups.
struct SampleBackwardTiles {
  int offset_blocks, key_tiles;
  int pixels, runs;  // pixels of a run
  int rows;          // threads of a block that share a pixel
  int64_t channels;  // of a chunk
  int chunks;
  int64_t group_channels;
  int64_t grad_step, plane_step;  // between a thread's channels in grad_sampled and in grad_x
  int rounds, last_words;         // words of bits in the last round
  int round_rows, round_columns;  // from a key to the one a round later, on the grid of keys
  bool along_channels;            // x is contiguous along channels
};

template <class A>
struct GradOffsetShared {
  KeyTaps<A> taps[kGradOffsetKeys];
  A slope[2][kGradOffsetKeys];  // d pos / d offset
  A sums[2][kGradOffsetSlots][kGradOffsetKeys];
};

// The 2x2 cell of the map that a key lies in: its first pixel, which may be outside, and how far.
template <class A>
struct KeyCell {
  int y, x;
  A fy, fx;
};

template <class A>
struct GradXShared {
  KeyCell<A> cells[kGradRound];                        // of keys that cover a pixel
  unsigned covering[kGradRound / kWord][kGradPixels];  // bit: does the key's cell cover the pixel?
};

template <class A>
union SampleBackwardShared {
  GradOffsetShared<A> offset;
  GradXShared<A> x;
};

// A thread's share of the gradient in a key's coordinates, in cells: (y, x).
template <class T, class A>
__device__ __forceinline__ Vec<A, 2> sum_over_channels(const SampleBackward& p, int64_t channels,
                                                       int bg, int64_t key, int slot,
                                                       const KeyTaps<A>& taps) {
  const int groups = int(p.shape.groups), b = bg / groups;
  const int64_t first = bg % groups * channels;
  const T* x = static_cast<const T*>(p.x.data) + b * p.x.batch + first * p.x.channel;
  const T* grad = static_cast<const T*>(p.grad_sampled.data) + b * p.grad_sampled.batch +
                  first * p.grad_sampled.channel + key * p.grad_sampled.column;
  Vec<A, 2> sum{};
#pragma unroll 2
  for (int64_t c = slot; c < channels; c += kGradOffsetSlots) {
    const A g = read(grad + c * p.grad_sampled.channel);
    const Bilinear<A> at = interpolate(x + c * p.x.channel, p.x, taps);
    sum.at[0] += g * at.d_y;
    sum.at[1] += g * at.d_x;
  }
  return sum;
}

template <class T, class Offset, class A>
__device__ __forceinline__ void grad_offset_block(const SampleBackward& p,
                                                  const SampleBackwardTiles& tiles, int block,
                                                  GradOffsetShared<A>& shared) {
  const SampleShape& shape = p.shape;
  const int thread = threadIdx.x;
  const int64_t bg = block / tiles.key_tiles, all_keys = shape.keys();
  const int64_t first_key = int64_t(block % tiles.key_tiles) * kGradOffsetKeys;
  const int keys = int(min(int64_t(kGradOffsetKeys), all_keys - first_key));
  if (thread < keys) {
    const auto* offset = static_cast<const Offset*>(p.offset);
    const int64_t row = (first_key + thread) / shape.keys_w;
    const int64_t column = first_key + thread - row * shape.keys_w;
    const auto y = locate<Offset, A>(shape, offset, bg, 0, row, column);
    const auto x = locate<Offset, A>(shape, offset, bg, 1, row, column);
    shared.taps[thread] = taps_of(shape, p.x, y.cell, x.cell);
    shared.slope[0][thread] = y.bounded.slope;
    shared.slope[1][thread] = x.bounded.slope;
  }
  sync_block();

  const int fast = thread % kGradOffsetKeys, slow = thread / kGradOffsetKeys;
  const int key = tiles.along_channels ? slow : fast, slot = tiles.along_channels ? fast : slow;
  if (key < keys) {
    const auto sum = sum_over_channels<T>(p, tiles.group_channels, int(bg), first_key + key, slot,
                                          shared.taps[key]);
    shared.sums[0][slot][key] = sum.at[0];
    shared.sums[1][slot][key] = sum.at[1];
  }
  sync_block();

  const int axis = slow;
  if (axis > 1 || fast >= keys) return;
  A grad = 0;
#pragma unroll
  for (int i = 0; i < kGradOffsetSlots; ++i) grad += shared.sums[axis][i][fast];
  grad *= map_coordinate_slope<A>(axis ? shape.width : shape.height);
  const int64_t at = first_key + fast;
  if (p.grad_pos) grad += static_cast<const A*>(p.grad_pos)[(bg * all_keys + at) * 2 + axis];
  static_cast<Offset*>(p.grad_offset)[(bg * 2 + axis) * all_keys + at] =
      from_acc<Offset>(grad * shared.slope[axis][fast]);
}

// A grad_x block's pixels, of one image and group.
struct PixelRun {
  int bg, count;
  int64_t first;
};

// Enters the cell of a thread's key, at (row, column) of the grid of keys, if it may cover a pixel
// of the run, and tells those it covers.
template <class Offset, class A>
__device__ __forceinline__ bool enter_key(const SampleBackward& p, const PixelRun& run, int row,
                                          int column, GradXShared<A>& shared) {
  const SampleShape& shape = p.shape;
  const auto* offset = static_cast<const Offset*>(p.offset);
  const Cell<A> y = locate<Offset, A>(shape, offset, run.bg, 0, row, column).cell;
  const int64_t upper = y.index * shape.width - run.first;  // where the cell's two rows begin
  if (upper >= run.count || upper + 2 * shape.width <= 0) return false;
  const Cell<A> x = locate<Offset, A>(shape, offset, run.bg, 1, row, column).cell;
  const int slot = threadIdx.x;
  shared.cells[slot] = {y.index, x.index, y.fraction, x.fraction};
  bool covers = false;
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    const int j = x.index + tap % 2;
    const int64_t at = upper + tap / 2 * shape.width + j;
    if (j < 0 || j >= shape.width || at < 0 || at >= run.count) continue;
    atomicOr(&shared.covering[slot / kWord][at], 1u << slot % kWord);
    covers = true;
  }
  return covers;
}

// Enters a round of keys; those of the last threads may lie below the grid of keys. Says whether
// any covers a pixel; `dirty` is what it said before.
template <class Offset, class A>
__device__ __forceinline__ bool enter_round(const SampleBackward& p, const PixelRun& run, int row,
                                            int column, bool dirty, GradXShared<A>& shared) {
  if (dirty) {
    sync_block();
    unsigned* words = shared.covering[0];
#pragma unroll
    for (int i = 0; i < kGradRound / kWord * kGradPixels; i += kGradThreads)
      words[i + threadIdx.x] = 0;
    sync_block();
  }
  const bool covers = row < p.shape.keys_h && enter_key<Offset>(p, run, row, column, shared);
  __syncwarp();
  return __syncthreads_or(covers);
}

// What one key's sample takes from pixel (y, x), one of the four of its cell.
template <class A>
__device__ __forceinline__ A weight_of(const KeyCell<A>& cell, int y, int x) {
  const TapWeights<A> w = tap_weights(cell.fy, cell.fx);
  const bool left = x == cell.x;
  return y == cell.y ? (left ? w.w00 : w.w01) : (left ? w.w10 : w.w11);
}

// What a thread owns in a pass: a pixel and `channels` channels, none if it has no pixel or row.
template <class T>
struct GradXThread {
  int pixel, y, x;  // in the run; on the map
  int channels;
  int64_t step, column;  // of grad_sampled: between its channels, between keys
  const T* grad;         // its first channel of grad_sampled [B, C, N], by its strides
  T* grad_x;             // its pixel in the first channel of grad_x [B, C, H, W]
};

template <class T, class A>
__device__ __forceinline__ void add_round(const GradXThread<T>& own,
                                          const T* grad,  // own.grad, from the round's first key
                                          int words, const GradXShared<A>& shared,
                                          A (&sum)[kGradChannelsPerThread]) {
  if (own.channels == 0) return;
  for (int word = 0; word < words; ++word)
    for (unsigned left = shared.covering[word][own.pixel]; left; left &= left - 1) {
      const int slot = word * kWord + __ffs(left) - 1;
      const A weight = weight_of(shared.cells[slot], own.y, own.x);
      const T* from = grad + slot * own.column;
#pragma unroll
      for (int c = 0; c < kGradChannelsPerThread; ++c, from += own.step)
        if (c < own.channels) sum[c] += weight * read(from);
    }
}

template <class T, class Offset, class A>
__device__ __forceinline__ void grad_x_block(const SampleBackward& p,
                                             const SampleBackwardTiles& tiles, int block,
                                             GradXShared<A>& shared) {
  const SampleShape& shape = p.shape;
  const int thread = threadIdx.x, keys_w = int(shape.keys_w);
  const int64_t area = shape.height * shape.width;
  const int pair = block / tiles.runs, bg = pair / tiles.chunks, b = bg / int(shape.groups);
  const int64_t first = int64_t(block - pair * tiles.runs) * tiles.pixels;
  const PixelRun run{bg, int(min(int64_t(tiles.pixels), area - first)), first};
  const int row = thread / tiles.pixels, pixel = thread - row * tiles.pixels;
  const int y = int((first + pixel) / shape.width);
  const int64_t in_group = (pair - bg * tiles.chunks) * tiles.channels;
  const int64_t channel = (bg - b * int(shape.groups)) * tiles.group_channels + in_group + row;
  const T* grad_sampled = static_cast<const T*>(p.grad_sampled.data);
  GradXThread<T> own{
      pixel,
      y,
      int(first + pixel - y * shape.width),
      0,
      tiles.grad_step,
      p.grad_sampled.column,
      grad_sampled + b * p.grad_sampled.batch + channel * p.grad_sampled.channel,
      static_cast<T*>(p.grad_x.data) + (b * shape.channels + channel) * area + first + pixel};

  const bool owns = row < tiles.rows && pixel < run.count;
  const int per_pass = tiles.rows * kGradChannelsPerThread;
  int64_t left = min(tiles.channels, tiles.group_channels - in_group);
  bool covered = true;
  for (bool entered = false; left > 0; left -= per_pass) {
    if (owns) own.channels = divide_up(int(min(left, int64_t(per_pass))) - row, tiles.rows);
    A sum[kGradChannelsPerThread] = {};
    const T* grad = own.grad;
    int key_row = thread / keys_w, key_column = thread - key_row * keys_w;
    for (int round = 0; round < tiles.rounds; ++round, grad += kGradRound * own.column) {
      if (!entered) covered = enter_round<Offset>(p, run, key_row, key_column, covered, shared);
      const int words = round + 1 < tiles.rounds ? kGradRound / kWord : tiles.last_words;
      if (covered) add_round(own, grad, words, shared, sum);
      key_row += tiles.round_rows, key_column += tiles.round_columns;
      if (key_column >= keys_w) ++key_row, key_column -= keys_w;
    }
    entered = tiles.rounds == 1;
    own.grad += kGradChannelsPerThread * own.step;
#pragma unroll
    for (int c = 0; c < kGradChannelsPerThread; ++c, own.grad_x += tiles.plane_step)
      if (c < own.channels) *own.grad_x = from_acc<T>(sum[c]);
  }
}

// The blocks asked for on a multiprocessor are what the sums leave registers for.
template <class T, class Offset>
__global__ void __launch_bounds__(kGradThreads, sizeof(T) == 8 ? 2 : 3)
    sample_backward_kernel(const SampleBackward p, const SampleBackwardTiles tiles) {
  __shared__ SampleBackwardShared<acc_t<T>> shared;
  const int block = blockIdx.x;
  if (block < tiles.offset_blocks)
    grad_offset_block<T, Offset>(p, tiles, block, shared.offset);
  else
    grad_x_block<T, Offset>(p, tiles, block - tiles.offset_blocks, shared.x);
}

}  // namespace dat::cuda

// Launchers of deform_sample: how the work is cut into blocks, and which kernel takes it.
#include <algorithm>

#include "../kernels/sample_backward.cuh"
#include "../kernels/sample_forward.cuh"
#include "launch.cuh"

namespace dat::cuda {
namespace {

template <class T_, class Offset_>
struct SampleTypes {
  using T = T_;            // of x and sampled
  using Offset = Offset_;  // of offset and its gradient
};

template <class F>
void dispatch(const SampleShape& shape, const F& f) {
  switch (shape.dtype) {
    case DType::f32: return f(SampleTypes<float, float>());
    case DType::f64: return f(SampleTypes<double, double>());
    case DType::f16:
      return shape.offset_in_dtype ? f(SampleTypes<__half, __half>())
                                   : f(SampleTypes<__half, float>());
    case DType::bf16:
      return shape.offset_in_dtype ? f(SampleTypes<__nv_bfloat16, __nv_bfloat16>())
                                   : f(SampleTypes<__nv_bfloat16, float>());
  }
}

// Tiles of one size that share `count` evenly, `most` at a time. Where there are several, their
// size is a multiple of 16, so that rows that start on a sector keep doing so.
int tile_size(int64_t count, int most) {
  if (count <= most) return int(count);
  const int64_t even = divide_up(count, divide_up(count, int64_t(most)));
  return int(divide_up(even, int64_t(16)) * 16);
}

// Several for every multiprocessor of the largest devices.
constexpr int64_t kEnoughBlocks = 1024;

bool lies_along_channels(const MapView& x) { return x.channel == 1 && x.column != 1; }

}  // namespace

void sample_forward(const SampleForward& p, Stream stream) {
  const SampleShape& shape = p.shape;
  SampleForwardTiles tiles{};
  tiles.group_channels = shape.channels / shape.groups;
  tiles.along_channels = lies_along_channels(p.x);
  tiles.keys = tile_size(shape.keys(), kSampleKeys);
  tiles.channels =
      tiles.along_channels ? kWarp : kSampleThreads / tiles.keys * kSampleChannelsPerThread;
  // At least one chunk: its blocks write the positions.
  const int64_t chunks =
      std::max<int64_t>(1, divide_up(tiles.group_channels, int64_t(tiles.channels)));
  const int64_t key_tiles = divide_up(shape.keys(), int64_t(tiles.keys));
  tiles.chunks = int(chunks), tiles.key_tiles = int(key_tiles);
  const int64_t blocks = shape.batch * shape.groups * key_tiles * chunks;
  dispatch(shape, [&](auto types) {
    using Types = decltype(types);
    launch("sample_forward", sample_forward_kernel<typename Types::T, typename Types::Offset>,
           blocks, kSampleThreads, 0, stream, p, tiles);
  });
}

void sample_backward(const SampleBackward& p, Stream stream) {
  const SampleShape& shape = p.shape;
  const int64_t pairs = shape.batch * shape.groups, area = shape.height * shape.width;
  SampleBackwardTiles tiles{};
  tiles.group_channels = shape.channels / shape.groups;
  tiles.along_channels = lies_along_channels(p.x);
  const int64_t rounds = divide_up(shape.keys(), int64_t(kGradRound));
  tiles.rounds = int(rounds);
  tiles.last_words = divide_up(int(shape.keys() - (rounds - 1) * kGradRound), kWord);
  tiles.round_rows = int(kGradRound / shape.keys_w);
  tiles.round_columns = int(kGradRound % shape.keys_w);
  tiles.pixels = tile_size(area, kGradPixels);
  tiles.rows = kGradThreads / tiles.pixels;
  tiles.grad_step = tiles.rows * p.grad_sampled.channel, tiles.plane_step = tiles.rows * area;

  // Blocks start slowly: where there are more than enough, each makes several passes.
  const int64_t runs = divide_up(area, int64_t(tiles.pixels));
  const int64_t per_pass = tiles.rows * kGradChannelsPerThread;
  const int64_t passes = divide_up(tiles.group_channels, per_pass);
  const int64_t most = passes * pairs * runs, together = std::max<int64_t>(1, most / kEnoughBlocks);
  const int64_t chunks = divide_up(passes, together);
  tiles.channels = together * per_pass;
  tiles.runs = int(runs), tiles.chunks = int(chunks);

  const int64_t key_tiles = divide_up(shape.keys(), int64_t(kGradOffsetKeys));
  tiles.key_tiles = int(key_tiles), tiles.offset_blocks = int(pairs * key_tiles);
  const int64_t blocks = pairs * (key_tiles + runs * chunks);
  dispatch(shape, [&](auto types) {
    using Types = decltype(types);
    launch("sample_backward", sample_backward_kernel<typename Types::T, typename Types::Offset>,
           blocks, kGradThreads, 0, stream, p, tiles);
  });
}

}  // namespace dat::cuda

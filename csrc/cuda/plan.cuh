// Plans: how many queries a block takes, which way the bias goes, what shared memory holds.
#pragma once

#include <algorithm>

#include "../kernels/mma.cuh"
#include "../kernels/simt.cuh"
#include "../kernels/table.cuh"
#include "launch.cuh"

namespace dat::cuda {

// What this device allows.
struct Device {
  int major, shared_per_block, shared_per_sm;

  static Device current() {
    return {device_attribute(cudaDevAttrComputeCapabilityMajor),
            device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }
};

// Values that one access may move along the contiguous dimension of `size` (see Plan).
inline int vector_length(const MapView& view, int64_t size, DType dtype, bool converted) {
  if (view.column != 1) return view.channel == 1 ? 0 : 1;
  if (converted) return 1;
  const int bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  int vec = 16 / bytes;
  const int64_t address = int64_t(reinterpret_cast<uintptr_t>(view.data) / bytes);
  const int64_t all = size | view.row | view.channel | view.batch | address;
  while (all % vec) vec /= 2;
  return vec;
}

struct AttentionProblem {
  const AttentionInputs& in;
  bool tensor_cores;
  int channels;  // head_dim, padded
  Bias bias;

  size_t shared_bytes() const {  // of a value in shared memory
    return in.shape.dtype == DType::f64 ? 8 : tensor_cores ? 2 : 4;
  }
  size_t acc_bytes() const { return in.shape.dtype == DType::f64 ? 8 : 4; }
  int vector_of(const MapView& view, int64_t size) const {
    const bool converted =
        !tensor_cores && in.shape.dtype != DType::f64 && in.shape.dtype != DType::f32;
    return vector_length(view, size, in.shape.dtype, converted);
  }
  size_t tile_bytes(const Plan& plan) const {
    return size_t(channels) * plan.query_pitch * shared_bytes();
  }
  size_t keys_bytes(const Plan& plan) const {
    return size_t(channels) * plan.key_pitch * shared_bytes();
  }
};

inline int padded_channels(int64_t head_dim) {
  for (int channels : {16, 32, 64, 128})
    if (head_dim <= channels) return channels;
  throw LaunchError("dat_cuda: head_dim = C / heads must be at most 128 on CUDA, got " +
                    std::to_string(head_dim) + "; use dat_cuda.backend('reference')");
}

inline void plan_axes(Plan& plan, const AttentionShape& shape) {
  if (!shape.table_h) return;
  plan.y = table_axis<double>(shape.table_h, shape.height, shape.version);
  plan.x = table_axis<double>(shape.table_w, shape.width, shape.version);
  plan.narrow_y = table_axis<float>(shape.table_h, shape.height, shape.version);
  plan.narrow_x = table_axis<float>(shape.table_w, shape.width, shape.version);
}

inline Bias wanted_bias(const AttentionInputs& in) {
  Plan plan{};
  plan_axes(plan, in.shape);
  if (!in.table || in.bias.data || plan.y.slope > 1) return Bias::direct;
  if (plan.y.slope == 1 && plan.x.slope == 1) return Bias::unit;
  return plan.y.slope <= 1. / 3 ? Bias::shallow : Bias::slope;
}

// Blocks, for every multiprocessor several, below which tiles are not put into one block.
constexpr int64_t kEnoughBlocks = 264;

// Cuts the map into tiles of at most `units` units, as equal as can be, and gives a block at most
// `tiles` of them: `blocks_per_split` blocks share a split, over (image, head) and maybe keys.
inline void plan_tiles(Plan& plan, const AttentionProblem& problem, int units, int tiles,
                       int64_t blocks_per_split) {
  const AttentionShape& shape = problem.in.shape;
  const int strips = int(divide_up<int64_t>(shape.width, kUnitColumns));
  const int bands = int(divide_up<int64_t>(shape.height, kUnitRows));
  plan.across = divide_up(strips, units);
  const int wide = divide_up(strips, plan.across);
  plan.down = divide_up(bands, units / wide);
  plan.columns = wide * kUnitColumns;
  plan.rows = divide_up(bands, plan.down) * kUnitRows;
  plan.query_pitch = (problem.tensor_cores ? kMaxUnits * kWarp : plan.rows * plan.columns) + 8;
  plan.tiles_down = std::min(tiles, plan.down);
  do {
    plan.splits = plan.across * divide_up(plan.down, plan.tiles_down);
    if (plan.splits * blocks_per_split >= kEnoughBlocks || plan.tiles_down == 1) break;
    plan.tiles_down = divide_up(plan.tiles_down, 2);
  } while (true);
}

// Hands out shared memory.
struct SharedLayout {
  size_t used = 0;
  int take(size_t bytes) {
    const size_t at = used;
    used = divide_up<size_t>(used + bytes, 16) * 16;
    return int(at);
  }
  int total() const { return int(std::min(used, size_t(1) << 30)); }
};

// Keys in shared memory at a time: all of them, or `most`.
inline void plan_keys(Plan& plan, const AttentionProblem& problem, int least, int most) {
  plan.key_stage = least;
  while (plan.key_stage < most && plan.key_stage < problem.in.shape.keys) plan.key_stage *= 2;
  plan.key_pitch = (problem.tensor_cores ? 64 : plan.key_stage) + 8;
  plan.k_vec = problem.vector_of(problem.in.k, problem.in.shape.keys);
  plan.v_vec = problem.vector_of(problem.in.v, problem.in.shape.keys);
}

inline void plan_window(Plan& plan, const AttentionProblem& problem, SharedLayout& layout) {
  if (problem.bias == Bias::direct) return;
  plan.window_rows = window_cells(plan.y, plan.rows * plan.tiles_down);
  plan.window_columns = window_cells(plan.x, plan.columns);
  const int pitch = window_pitch(problem.bias);
  if (plan.window_columns > pitch) layout.take(size_t(1) << 30);  // fits nowhere
  const size_t cells = size_t(plan.window_rows) * pitch;
  plan.at_window = layout.take(cells * (problem.bias == Bias::unit ? 1 : 2) * problem.acc_bytes());
  plan.at_keys = layout.take(plan.key_stage * (2 * problem.acc_bytes() + sizeof(int)));
}

// What a plan is made of; the order in best_plan is that of preference.
struct Choice {
  int units, keys, buffers, tiles;
};

// The first plan that leaves room for a second block on a multiprocessor, else the first that fits:
// large tiles before many keys at a time. A table whose window fits nowhere is read from global
// memory.
template <class Make>
Plan best_plan(AttentionProblem& problem, const Device& device, const char* name,
               const Make& make) {
  const int half = std::min(device.shared_per_sm / 2 - 1024, device.shared_per_block);
  for (;;) {
    for (const int room : {half, device.shared_per_block})
      for (const int keys : {64, 32, 16})
        for (const int units : {kMaxUnits, 2, 1})
          for (const int buffers : {2, 1})
            for (int tiles = 32; tiles; tiles /= 2) {
              const Plan plan = make(Choice{units, keys, buffers, tiles});
              if (plan.shared <= room) return plan;
            }
    if (problem.bias == Bias::direct) break;
    problem.bias = Bias::direct;
  }
  throw LaunchError(std::string("dat_cuda: ") + name + " with head_dim " +
                    std::to_string(problem.in.shape.head_dim) +
                    " needs more shared memory than this device has; use a shorter dtype or "
                    "dat_cuda.backend('reference')");
}

// Calls run with a tag of the engine for this dtype and number of channels.
template <class E>
struct EngineTag {
  using type = E;
};

template <template <class, int> class Engine, class T, class F>
void with_channels(int channels, const F& run) {
  switch (channels) {
    case 16: return run(EngineTag<Engine<T, 16>>());
    case 32: return run(EngineTag<Engine<T, 32>>());
    case 64: return run(EngineTag<Engine<T, 64>>());
    default: return run(EngineTag<Engine<T, 128>>());
  }
}

template <class T, class F>
void with_engine(const AttentionShape& shape, const Device& device, const F& run) {
  const int channels = padded_channels(shape.head_dim);
  if constexpr (sizeof(T) == 2)
    if (device.major >= 8) return with_channels<Mma, T>(channels, run);
  with_channels<Simt, T>(channels, run);
}

// Calls run with the bias as a compile-time constant.
template <class F>
void with_bias(Bias bias, const F& run) {
  switch (bias) {
    case Bias::direct: return run(std::integral_constant<Bias, Bias::direct>());
    case Bias::unit: return run(std::integral_constant<Bias, Bias::unit>());
    case Bias::slope: return run(std::integral_constant<Bias, Bias::slope>());
    case Bias::shallow: return run(std::integral_constant<Bias, Bias::shallow>());
  }
}

}  // namespace dat::cuda

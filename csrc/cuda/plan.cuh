// Plans: how many queries a block takes, which way the bias goes, what shared memory holds.
#pragma once

#include <algorithm>

#include "../kernels/mma.cuh"
#include "../kernels/simt.cuh"
#include "../kernels/window.cuh"
#include "launch.cuh"

namespace dat::cuda {

// What this device allows.
struct Device {
  int major, multiprocessors, shared_per_block, shared_per_sm;

  static Device current() {
    return {device_attribute(cudaDevAttrComputeCapabilityMajor),
            device_attribute(cudaDevAttrMultiProcessorCount),
            device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }
};

// Values that one access may move along the contiguous dimension of `size` (see Plan).
inline int vector_length(const MapView& view, int64_t size, DType dtype, bool converted) {
  if (view.column != 1) return view.channel == 1 ? 0 : 1;
  if (converted) return 1;
  const int bytes = dtype == DType::f32 ? 4 : 2;
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
  int multiprocessors;
  int stack = 1;  // units of a warp

  size_t shared_bytes() const { return tensor_cores ? 2 : 4; }  // of a value in shared memory
  size_t acc_bytes() const { return 4; }
  int vector_of(const MapView& view, int64_t size) const {
    const bool converted = !tensor_cores && in.shape.dtype != DType::f32;
    return vector_length(view, size, in.shape.dtype, converted);
  }
  int most_units() const { return cuda::most_units(tensor_cores, channels); }
  // Values between channels in shared memory, for `most` of them if the engine knows the pitch at
  // compile time, else for those that are there; apart, lest accesses meet in the same banks. A
  // little less for long heads on CUDA cores, for which 7.5 has just enough shared memory.
  int pitch(int most, int count) const {
    return tensor_cores ? most + 8 : count + (channels > 64 ? 4 : 8);
  }
  size_t tile_bytes(const Plan& plan) const {
    return size_t(channels) * plan.query_pitch * shared_bytes();
  }
  size_t keys_bytes(const Plan& plan) const {
    return size_t(channels) * plan.key_pitch * shared_bytes();
  }
};

// Of head_dim. Refuses what the kernels do not take.
inline int padded_channels(const AttentionShape& shape) {
  const auto require = [](bool fits, const char* what, int64_t got) {
    if (!fits)
      throw LaunchError(std::string("dat_cuda: ") + what + " on CUDA, got " + std::to_string(got) +
                        "; use dat_cuda.backend('reference')");
  };
  require(shape.queries() < int64_t(1) << 31, "H * W of q must be below 2^31", shape.queries());
  require(shape.head_dim <= 128, "head_dim = C / heads must be at most 128", shape.head_dim);
  for (int channels : {16, 32, 64})
    if (shape.head_dim <= channels) return channels;
  return 128;
}

// How scores come about.
inline void plan_scores(Plan& plan, const AttentionShape& shape) {
  plan.factor = shape.scale * kLog2e;
  plan.narrow_factor = float(plan.factor);
  // Products that start at a value of exponents need an inverse: a scale of 0 counts as 2^-100,
  // which leaves of finite products what no exponent shows.
  if (shape.dtype != DType::f64 && std::abs(plan.narrow_factor) < 0x1p-100f)
    plan.narrow_factor = 0x1p-100f;
  plan.inverse_factor = 1 / plan.narrow_factor;
  plan.group_heads = int(shape.heads / shape.groups);
  plan.drops = shape.dropout_p > 0;
  plan.dropout = dropout_rule(shape.dropout_p);
  if (!shape.table_h) return;
  plan.table_dtype = shape.table_in_dtype        ? shape.dtype
                     : shape.dtype == DType::f64 ? DType::f64
                                                 : DType::f32;
  const bool half = plan.table_dtype == DType::f16 || plan.table_dtype == DType::bf16;
  plan.table_stride = shape.table_h * shape.table_w *
                      (half                             ? 2
                       : plan.table_dtype == DType::f64 ? 8
                                                        : 4);
  plan.y = table_axis<double>(shape.table_h, shape.height, shape.version);
  plan.x = table_axis<double>(shape.table_w, shape.width, shape.version);
  plan.narrow_y = table_axis<float>(shape.table_h, shape.height, shape.version);
  plan.narrow_x = table_axis<float>(shape.table_w, shape.width, shape.version);
}

inline Bias wanted_bias(const AttentionInputs& in) {
  Plan plan{};
  plan_scores(plan, in.shape);
  if (!in.table || in.bias.data || plan.y.slope > 1) return Bias::direct;
  if (plan.y.slope == 1 && plan.x.slope == 1) return Bias::unit;
  return plan.y.slope > 1. / 3 ? Bias::slope : Bias::shallow;
}

// What a block costs beside its units, in units: its own start, and the sums of what it shares with
// others of a split.
struct BlockCosts {
  double start, share;
};
// Fitted to instructions counted on the emulated device.
constexpr BlockCosts kForwardCosts{1, 0}, kQueriesCosts{1, 0}, kKeysCosts{1.25, 0.6};

// A way to cut the map: into tiles of so many units or stacks of them, `tiles` of them a block.
struct Cut {
  int tall, wide, tiles, stack;

  void apply(Plan& plan, int strips, int bands) const {
    plan.across = divide_up(strips, wide);
    plan.down = divide_up(bands, tall);
    plan.rows = tall * stack * kUnitRows;
    plan.columns = wide * kUnitColumns;
    plan.tiles_down = std::min(tiles, plan.down);
    plan.splits = plan.across * divide_up(plan.down, plan.tiles_down);
  }
};

// Takes the cut into tiles of at most `units` units (stacks), at most `tiles` a block, that keeps
// the multiprocessors busy the shortest: `blocks_per_split` blocks share a split, over (image,
// head) and maybe keys. Smaller tiles, with fewer warps a block, only where larger ones leave
// multiprocessors without a block.
inline void plan_tiles(Plan& plan, const AttentionProblem& problem, int units, int tiles,
                       int64_t blocks_per_split, BlockCosts costs) {
  const AttentionShape& shape = problem.in.shape;
  const int strips = int(divide_up<int64_t>(shape.width, kUnitColumns));
  const int bands = int(divide_up<int64_t>(shape.height, kUnitRows * problem.stack));
  double least = INFINITY;
  Cut best{};
  bool idle = true;
  for (; units && idle; --units)
    for (int most = 1; most <= std::min(units, strips); ++most) {
      const int wide = divide_up(strips, divide_up(strips, most));
      const int tall = divide_up(bands, divide_up(bands, units / wide));
      for (int t = tiles; t; t /= 2) {
        const Cut cut{tall, wide, t, problem.stack};
        cut.apply(plan, strips, bands);
        double block = plan.tiles_down * tall * wide * problem.stack + costs.start;
        if (plan.splits > 1) block += costs.share;
        // 32 cells of the window take as many instructions as six keys' scores of a unit.
        if (problem.bias != Bias::direct)
          block += window_cells(plan.y, plan.rows * plan.tiles_down) *
                   divide_up(window_cells(plan.x, plan.columns), kWarp) / (6. * shape.keys);
        const double blocks = plan.splits * std::max(1., double(blocks_per_split));
        const double busy = std::min<double>(blocks, problem.multiprocessors);
        const double time = block * blocks / busy;
        if (time < least) least = time, best = cut, idle = busy < problem.multiprocessors;
      }
    }
  best.apply(plan, strips, bands);
  plan.query_pitch =
      problem.pitch(problem.most_units() * problem.stack * kWarp, plan.rows * plan.columns);
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

// Whether channels of 16-bit values lie end to end, each of them an odd number of keys, so that
// every other one starts at a 4-byte word.
inline bool is_odd_list(const MapView& view, const AttentionShape& shape) {
  return view.column == 1 && view.channel == shape.keys && shape.keys % 2 &&
         shape.head_dim % 2 == 0 && view.batch % 2 == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % 4 == 0;
}

// Keys in shared memory at a time: all of them, or `most`.
inline void plan_keys(Plan& plan, const AttentionProblem& problem, int least, int most) {
  plan.adds = problem.in.table || problem.in.bias.data;
  plan.key_stage = least;
  while (plan.key_stage < most && plan.key_stage < problem.in.shape.keys) plan.key_stage *= 2;
  plan.key_pitch = problem.pitch(kMaxKeys, plan.key_stage);
  const int k_vec = problem.vector_of(problem.in.k, problem.in.shape.keys);
  const int v_vec = problem.vector_of(problem.in.v, problem.in.shape.keys);
  plan.key_words = problem.tensor_cores && problem.in.shape.keys <= plan.key_stage &&
                   is_odd_list(problem.in.k, problem.in.shape) &&
                   is_odd_list(problem.in.v, problem.in.shape);
  plan.key_vec = k_vec && v_vec ? std::min(k_vec, v_vec) : k_vec || v_vec ? 1 : 0;
}

inline size_t round_up(size_t bytes, size_t to) { return divide_up(bytes, to) * to; }

// Gradients: a second window for them.
inline void plan_window(Plan& plan, const AttentionProblem& problem, SharedLayout& layout,
                        Walk kind, bool gradients) {
  if (problem.bias == Bias::direct) return;
  const bool pairs = problem.bias != Bias::unit;
  plan.window_rows = window_cells(plan.y, plan.rows * plan.tiles_down);
  plan.window_columns = window_cells(plan.x, plan.columns);
  // A little less, for rounding.
  plan.near_y = float(plan.window_rows - kWindowBelow - 0x1p-8 -
                      plan.y.slope * (plan.rows * plan.tiles_down - 1));
  plan.near_x = float(plan.window_columns - 2 - 0x1p-8 - plan.x.slope * (plan.columns - 1));
  plan.window_pitch = kind == Walk::keys ? window_pitch(problem.bias) : plan.window_columns + pairs;
  // Where keys are near each other, rows that start in far banks keep them apart.
  if (kind == Walk::queries && plan.window_pitch < 64)
    plan.window_pitch += (8 - plan.window_pitch % 32 + 32) % 32;
  if (plan.window_columns + pairs > plan.window_pitch) layout.take(size_t(1) << 30);  // never fits
  const size_t cells = size_t(plan.window_rows) * plan.window_pitch, bytes = problem.acc_bytes();
  plan.at_window =
      pairs
          ? layout.take((cells + TableWindow<float, Bias::slope, Walk::keys>::kBefore) * 2 * bytes)
          : layout.take(cells * bytes);
  if (gradients) plan.at_grad_window = layout.take(round_up(cells, 4) * bytes);
  const int bands = pairs && kind == Walk::keys ? plan.rows / kUnitRows : 0;
  plan.at_keys = layout.take((plan.key_stage * 4 + kMaxKeys * 2 * bands) * bytes);
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
      for (const int keys : {kMaxKeys, kMaxKeys / 2, kMaxKeys / 4})
        for (int units = problem.most_units(); units; units /= 2)
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
  const int channels = padded_channels(shape);
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

// deform_attention, backward of small maps: all gradients in one pass, with a bias table of slopes
// near 1 (version "dat" at training resolution).
//
// A block owns up to 64 keys of one (image, head), 16 for each warp, and all queries. A warp walks
// down the rows of the map (column_walk.cuh); grad_k, grad_v and grad_pos stay in its registers and
// are its own in the end. The scores' gradients of all queries meet in shared memory, and each warp
// multiplies those of whole rows with k, for grad_q (column_grad_q.cuh).
//
// Barriers: with the window empty, with tiles and keys there, with delta, behind the walk, with all
// results there.
#pragma once

#include "column_grad_q.cuh"
#include "column_walk.cuh"

namespace dat::cuda {

// What products start at: [2][slots], minus the log-sum-exp, so that scores come out as
// exponents of 2, and minus delta.
struct ProductStarts {
  static constexpr int kSlots = Columns<__half>::kSlots;
  float* start;

  __device__ void load(const AttentionBackward& p, const Plan& plan, const KeyPlace& place) const {
    const AttentionShape& shape = p.in.shape;
    const float* lse = static_cast<const float*>(p.lse) + place.at.batch_head * shape.queries();
    const float factor = -float(kLog2e) * plan.inverse_factor;
    for (int slot = threadIdx.x; slot < kSlots; slot += blockDim.x) {
      const auto [row, column] = place_of<true>(plan, TileOrigin{}, slot);
      const bool inside = row < int(shape.height) && column < int(shape.width);
      // Weights of queries that are not there: 2^-inf.
      start[slot] = inside ? lse[row * int(shape.width) + column] * factor
                           : copysignf(INFINITY, -plan.inverse_factor);
    }
  }
  // The block has met in between.
  template <class E>
  __device__ void make_delta(const typename E::Shared* out, const typename E::Shared* grad_out) {
    for (int first = threadIdx.x / kWarp * kWarp; first < kSlots; first += blockDim.x)
      E::inner_products(out + first, grad_out + first, E::kQueryPitch,
                        [&](int row, int column, float sum) {
                          start[kSlots + first + row * kUnitColumns + column] = -sum;
                        });
  }
};

// Lists [channel][key] of the block's keys -> [head_dim][N] from its first key on; N is even.
template <class E, class T>
__device__ void store_lists(T* grad_k, T* grad_v, const T* lists_k, const T* lists_v,
                            const AttentionShape& shape, int count) {
  const int n = threadIdx.x % kWarp * 2, keys = int(shape.keys);
  if (n >= count) return;
  each_channel<E::kChannels>(
      int(threadIdx.x / kWarp), int(blockDim.x / kWarp), int(shape.head_dim),
      [&](const T* from, T* to, bool exists) {
        if (exists) *reinterpret_cast<unsigned*>(to) = *reinterpret_cast<const unsigned*>(from);
      },
      Channels<const T, T>{lists_k + n, E::kKeyPitch, grad_k + n, keys},
      Channels<const T, T>{lists_v + n, E::kKeyPitch, grad_v + n, keys});
}

template <class T>
__global__ void __launch_bounds__(Columns<T>::kMostTiles* kWarp, 2)
    attention_backward_columns_kernel(const __grid_constant__ AttentionBackward p,
                                      const __grid_constant__ Plan plan,
                                      const __grid_constant__ BackwardScratch scratch) {
  using E = Columns<T>;
  if constexpr (is_compiled<E>()) {
    extern __shared__ __align__(16) char shared[];
    const AttentionInputs& in = p.in;
    const AttentionShape& shape = in.shape;
    const KeyPlace place(shape, plan, blockIdx.x);
    const int keys = min(plan.key_stage, int(shape.keys) - place.first_key);

    T* q = reinterpret_cast<T*>(shared + plan.at_q);
    T* grad_out = reinterpret_cast<T*>(shared + plan.at_grad_out);
    T* k = reinterpret_cast<T*>(shared + plan.at_k);
    T* v = reinterpret_cast<T*>(shared + plan.at_v);
    T* grads = reinterpret_cast<T*>(shared + plan.at_grads);  // at first, out
    ProductStarts starts{reinterpret_cast<float*>(shared + plan.at_rows)};
    const ColumnWindow window(shared, plan);

    load_keys<E, true>(k, v, key_lists<T>(in, place.at), in, plan, place.first_key);
    load_query_tiles<E, true>(q, grad_out, grads, p, plan, place.at, TileOrigin{});
    window.clear();
    starts.load(p, plan, place);
    __syncthreads();
    const WholeTable<float> table(in, plan, place.at.head);
    if (shape.table_in_dtype)
      window.load(static_cast<const T*>(table.data));
    else
      window.load(static_cast<const float*>(table.data));
    bool far = false;
    for (int n = threadIdx.x; n < plan.key_stage; n += blockDim.x)
      far |= window.stage_key(
          n, n < keys ? key_pos<float>(in, plan, place.at, place.first_key + n) : nullptr);
    wait_for_copies<0>();
    far = __syncthreads_or(far);
    starts.template make_delta<E>(grads, grad_out);
    const int64_t head = place.at.batch_head, first = head * shape.keys + place.first_key;
    ColumnWalk<T> walk(p, plan, place, window, far, k, v);
    __syncthreads();

    const ColumnGradQ<T> grad_q(shape, scratch, plan, place);
    const int tiles = divide_up(keys, kKeysOfWarp);
    const bool walks = int(threadIdx.x / kWarp) < tiles;
    if (walks)
      walk.run(q, grad_out, starts.start, grads, static_cast<float*>(p.grad_pos) + first * 2);
    const bool last = __syncthreads_or(threadIdx.x == 0 && grad_q.arrives_last());
    // The tiles' memory is free now.
    T *lists_k = grad_out, *lists_v = lists_k + E::kChannels * E::kKeyPitch;
    if (walks) {
      walk.keep(lists_k, walk.grad_k, float(shape.scale));
      walk.keep(lists_v, walk.grad_v, 1);
    }
    if (last)
      grad_q.sum_to(q, k, grads, tiles);
    else
      grad_q.store_part(k, grads, tiles);
    __syncthreads();
    if (!last && threadIdx.x == 0) grad_q.stored();
    window.flush(static_cast<float*>(p.grad_table) + place.at.head * shape.table_h * shape.table_w);
    const int64_t lists = head * shape.head_dim * shape.keys + place.first_key;
    store_lists<E>(static_cast<T*>(p.grad_k.data) + lists, static_cast<T*>(p.grad_v.data) + lists,
                   lists_k, lists_v, shape, keys);
    if (last)
      store_queries<E>(static_cast<T*>(p.grad_q.data) + head * shape.head_dim * shape.queries(), q,
                       shape, plan, TileOrigin{}, plan.out_vec);
  }
}

}  // namespace dat::cuda

// deform_attention, backward of small maps: all gradients in one pass, with a bias table of slopes
// near 1 (version "dat" at training resolution).
//
// A block owns up to 128 keys of one (image, head), 16 for each warp, and all queries. A warp walks
// down the rows of the map (column_walk.cuh); grad_k, grad_v and grad_pos stay in its registers and
// are its own in the end. The scores' gradients of all queries meet in shared memory, and each warp
// multiplies those of whole rows with k: grad_q, or the block's part of it in global memory, in
// float32; the last of the blocks that share an (image, head) sums the parts in a fixed order.
//
// Barriers: with the window empty, with tiles and keys there, with delta, behind the walk, two for
// grad_q; three to see who is the last.
#pragma once

#include "attention_backward_keys.cuh"
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

// grad_q [channel][slot] of the block's keys, without its scale where it is a part, from grads
// [key][slot].
template <class E, class To>
__device__ void column_grad_q(To* to, const typename E::Shared* k, const typename E::Shared* grads,
                              int rows, int tiles, float scale) {
  using T = typename E::Shared;
  constexpr bool kPart = sizeof(To) > 2;
  constexpr int kPitch = kPart ? E::kSlots : E::kQueryPitch, kRun = 3;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  // A warp takes runs of rows, so that it reads k once for them.
  for (int first = threadIdx.x / kWarp; first < rows; first += warps * kRun) {
    unsigned at_k = shared_address(k + lane % 16 * E::kKeyPitch + lane / 16 * 8);
    unsigned at_grads = shared_address(grads + lane % 16 * E::kQueryPitch + lane / 16 * 8);
    float sums[kRun][2][2][4] = {};
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      unsigned a[2][4];
      load_matrices<false>(a[0], at_k);
      load_matrices<false, 16 * E::kKeyPitch* int(sizeof(T))>(a[1], at_k);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int row = first + i * warps;
        if (row >= rows) continue;
        unsigned b[4];
        load_matrices<true>(b, at_grads + row * E::kWidth * int(sizeof(T)));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float (&c)[4] = sums[i][j / 2][j % 2];
          mma<T>(c[0], c[1], c[2], c[3], a[j / 2], b[j % 2 * 2], b[j % 2 * 2 + 1]);
        }
      }
      at_k += 16 * int(sizeof(T)), at_grads += 16 * E::kQueryPitch * int(sizeof(T));
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int row = first + i * warps;
      if (row >= rows) continue;
      To* own = to + E::g() * kPitch + 2 * E::t() + row * E::kWidth;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float (&sum)[4] = sums[i][j / 4][j / 2 % 2];
        const float left = sum[j % 2 * 2], right = sum[j % 2 * 2 + 1];
        To* at = own + (j / 4 * 16 + j % 2 * 8) * kPitch + j / 2 % 2 * 8;
        if constexpr (kPart)
          __stcg(reinterpret_cast<float2*>(at), make_float2(left, right));
        else
          *reinterpret_cast<unsigned*>(at) = pack<T>(left * scale, right * scale);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(Columns<T>::kMostTiles* kWarp)
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
    __syncthreads();

    const int64_t head = place.at.batch_head;
    if (threadIdx.x / kWarp * kKeysOfWarp < keys) {
      ColumnWalk<T> walk(p, plan, place, window, far, k, v);
      walk.run(q, grad_out, starts.start, grads,
               static_cast<float*>(p.grad_pos) + (head * shape.keys + place.first_key) * 2);
      const int64_t first = head * shape.head_dim * shape.keys + place.first_key;
      walk.store(static_cast<T*>(p.grad_k.data) + first, walk.grad_k, float(shape.scale));
      walk.store(static_cast<T*>(p.grad_v.data) + first, walk.grad_v, 1);
    }
    __syncthreads();
    window.flush(static_cast<float*>(p.grad_table) + place.at.head * shape.table_h * shape.table_w);
    const int tiles = divide_up(keys, kKeysOfWarp);
    const QueryGradients<E> queries{p, plan,     place, static_cast<float*>(scratch.grad_q),
                                    q, grad_out, grads};
    if (!scratch.grad_q) {
      column_grad_q<E>(q, k, grads, int(shape.height), tiles, float(shape.scale));
      queries.store_tile(TileOrigin{});
    } else {
      column_grad_q<E>(queries.part_of(place.first_key / plan.key_stage, 0), k, grads,
                       int(shape.height), tiles, float(shape.scale));
      if (arrives_last(scratch.grad_q_arrivals + head, KeyPlace::key_tiles(shape, plan),
                       reinterpret_cast<int*>(shared + plan.at_rows)))
        queries.sum_grad_q();
    }
  }
}

}  // namespace dat::cuda

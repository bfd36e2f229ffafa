// The backward over keys, piece by piece: the places of a block, a warp's keys against a unit of
// queries, and where the table's gradient goes.
#pragma once

#include "attention_tiles.cuh"

namespace dat::cuda {

constexpr int kKeyWarps = 4, kKeysOfWarp = 16;

// Which keys, strip and split a block owns; the strip's tiles begin at origin.
struct KeyPlace {
  BlockPlace at;
  int first_key, split;

  __device__ KeyPlace(const AttentionShape& shape, const Plan& plan, int block)
      : at(shape, 1, block / (plan.splits * key_tiles(shape, plan))) {
    split = block % plan.splits;
    first_key = block / plan.splits % key_tiles(shape, plan) * plan.key_stage;
    at.origin = {split / plan.across * plan.tiles_down * plan.rows,
                 split % plan.across * plan.columns};
  }
  __host__ __device__ static int key_tiles(const AttentionShape& shape, const Plan& plan) {
    return int(divide_up<int64_t>(shape.keys, plan.key_stage));
  }
};

// What the block keeps of a tile's queries beside q and grad_out: lse and delta.
template <class A>
struct RowStatistics {
  A *lse, *delta;  // [rows][columns]

  __device__ RowStatistics(void* shared, const Plan& plan)
      : lse(static_cast<A*>(shared)), delta(lse + plan.rows * plan.columns) {}

  __device__ void load(const AttentionBackward& p, const void* all_delta, const Plan& plan,
                       const BlockPlace& at, TileOrigin origin) const {
    const AttentionShape& shape = p.in.shape;
    for (int slot = threadIdx.x; slot < plan.rows * plan.columns; slot += blockDim.x) {
      const int row = origin.row + slot / plan.columns,
                column = origin.column + slot % plan.columns;
      const bool inside = row < shape.height && column < shape.width;
      const int64_t i = at.batch_head * shape.queries() + int64_t(row) * shape.width + column;
      // Weights of queries that are not there: e^-inf.
      lse[slot] = inside ? static_cast<const A*>(p.lse)[i] : A(INFINITY);
      delta[slot] = inside ? static_cast<const A*>(all_delta)[i] : A(0);
    }
  }
};

// One warp's 16 keys against one unit of queries.
template <class E, Bias kBias>
struct KeyUnit {
  using A = typename E::Acc;
  using Scores = A[kUnitRows][2][2];  // [row][key g + 8 k][column 2 t + c]

  const Scorer<E, kBias>& scorer;
  const KeyPlace& place;
  int key;     // first of the warp's, counted from the block's
  int row;     // of the unit, from the block's first query
  int column;  //   "

  __device__ int local_key(int k) const { return key + E::g() + 8 * k; }
  __device__ int local_column(int c) const { return column + 2 * E::t() + c; }

  // Products q k become weights.
  __device__ void weigh(Scores& s, const A* lse, int columns) const {
    const A scale = scorer.scale();
    const int keys = int(scorer.in.shape.keys) - place.first_key;
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int n = local_key(k);
        A bias[kUnitRows] = {};
        if constexpr (kBias != Bias::direct) {
          scorer.window.values(bias, n, row, local_column(c));
          if (scorer.far && scorer.window.is_far(n)) {
#pragma unroll
            for (int r = 0; r < kUnitRows; ++r) bias[r] = 0;
          }
        }
#pragma unroll
        for (int r = 0; r < kUnitRows; ++r)
          s[r][k][c] = n < keys ? s[r][k][c] * scale + bias[r] : A(-INFINITY);
      }
    if (scorer.has_unusual()) add_unusual(s);
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          s[r][k][c] = weight_of<E>(s[r][k][c], lse[r * columns + 2 * E::t() + c]);
  }

  __device__ void add_unusual(Scores& s) const {
#pragma unroll 1
    for (int i = 0; i < kUnitRows * 4; ++i) {
      const A value =
          scorer.unusual(place.first_key, local_key(i / 2 % 2), row + i / 4, local_column(i % 2));
#pragma unroll
      for (int j = 0; j < kUnitRows * 4; ++j)
        if (j == i) (&s[0][0][0])[j] += value;
    }
  }

  // Bit i: weight i is kept.
  __device__ unsigned kept(const Dropper& dropper) const {
    unsigned bits = 0;
#pragma unroll 1
    for (int i = 0; i < kUnitRows * 4; ++i) {
      const int64_t query = int64_t(place.at.origin.row + row + i / 4) * scorer.in.shape.width +
                            place.at.origin.column + local_column(i % 2);
      bits |= unsigned(dropper.keeps(query, place.first_key + local_key(i / 2 % 2))) << i;
    }
    return bits;
  }

  // Whether the bias of the lane's key comes from the window.
  __device__ bool near(int n) const {
    if constexpr (kBias == Bias::direct) return false;
    return place.first_key + n < scorer.in.shape.keys && !(scorer.far && scorer.window.is_far(n));
  }

  // grad is the gradient of the scores. Adds to `slopes`, of the lane's two keys, its product with
  // d bias / d coordinate, and gives the table's gradient away: near_cell(cell of the window,
  // value) and far_cell(cell of the table, value).
  template <class Near, class Far>
  __device__ void bias_backward(A (&slopes)[2][2], const Scores& grad, const Near& near_cell,
                                const Far& far_cell) const {
    if constexpr (kBias != Bias::direct) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (!near(local_key(k))) continue;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const A g[kUnitRows] = {grad[0][k][c], grad[1][k][c], grad[2][k][c], grad[3][k][c]};
          scorer.window.backward(slopes[k], g, local_key(k), row, local_column(c), near_cell);
        }
      }
    }
    if (!scorer.has_unusual()) return;
#pragma unroll 1
    for (int i = 0; i < kUnitRows * 4; ++i) {
      const int n = local_key(i / 2 % 2);
      if (near(n) || place.first_key + n >= scorer.in.shape.keys) continue;
      A g = 0;
#pragma unroll
      for (int j = 0; j < kUnitRows * 4; ++j) g = j == i ? (&grad[0][0][0])[j] : g;
      const A* p = scorer.pos(place.first_key + n);
      const int query_row = place.at.origin.row + row + i / 4;
      const int query_column = place.at.origin.column + local_column(i % 2);
      const Bilinear<A> b = scorer.table().value(p[0], p[1], query_row, query_column);
      scorer.table().scatter(p[0], p[1], query_row, query_column, g, far_cell);
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (k == i / 2 % 2) slopes[k][0] += g * b.d_y, slopes[k][1] += g * b.d_x;
    }
  }
};

// Where a block's gradients of the table go.
template <class E, Bias kBias>
struct TableGradient {
  using A = typename E::Acc;
  A* window;  // in shared memory, or null: straight to the table
  A* table;   // [Th, Tw]; this block's own where deterministic
  const Plan& plan;
  int start_y, start_x;
  bool ordered;

  __device__ TableGradient(const AttentionBackward& p, const Plan& plan_,
                           const BackwardScratch& scratch, const KeyPlace& place, char* shared)
      : window(nullptr),
        plan(plan_),
        start_y(window_start(plan_.axis_y<A>(), place.at.origin.row)),
        start_x(window_start(plan_.axis_x<A>(), place.at.origin.column)),
        ordered(scratch.grad_table != nullptr) {
    const AttentionShape& shape = p.in.shape;
    const int64_t area = shape.table_h * shape.table_w;
    if (ordered) {
      const int block = place.first_key / plan.key_stage * plan.splits + place.split;
      table = static_cast<A*>(scratch.grad_table) +
              (block * shape.batch * shape.heads + place.at.batch_head) * area;
    } else {
      table = static_cast<A*>(p.grad_table) + place.at.head * area;
      if (kBias != Bias::direct) window = reinterpret_cast<A*>(shared + plan.at_grad_window);
    }
  }

  __device__ void clear() const {
    if (!window) return;
    for (int i = threadIdx.x; i < plan.window_rows * window_pitch(kBias); i += blockDim.x)
      window[i] = 0;
  }

  // f(row and column of the table) for a cell of the window; -1 where that is outside.
  __device__ int64_t cell_of_window(int cell) const {
    const int row = start_y + cell / window_pitch(kBias);
    const int column = start_x + cell % window_pitch(kBias);
    const bool inside =
        unsigned(row) < unsigned(plan.y.size) && unsigned(column) < unsigned(plan.x.size);
    return inside ? int64_t(row) * plan.x.size + column : -1;
  }

  using Unit = KeyUnit<E, kBias>;

  __device__ void add(A (&slopes)[2][2], const Unit& unit,
                      const typename Unit::Scores& grad) const {
    unit.bias_backward(
        slopes, grad, [&](int cell, A value) { atomicAdd(window + cell, value); },
        [&](int64_t cell, A value) { atomicAdd(table + cell, value); });
  }

  // The same in a fixed order. Every warp of the block comes here, `active` or not.
  __device__ void add_in_turn(A (&slopes)[2][2], const Unit& unit,
                              const typename Unit::Scores& grad, bool active) const {
    const auto far = [&](int64_t cell, A value) { table[cell] += value; };
    const auto near = [&](int cell, A value) {
      const int64_t to = cell_of_window(cell);
      if (to >= 0) table[to] += value;
    };
    for (int warp = 0; warp < kKeyWarps; ++warp) {
      if (active && threadIdx.x / kWarp == warp)
        for (int lane = 0; lane < kWarp; ++lane) {
          if (threadIdx.x % kWarp == lane) unit.bias_backward(slopes, grad, near, far);
          __syncwarp();
        }
      __syncthreads();
    }
  }

  __device__ void flush() const {
    if (!window) return;
    for (int i = threadIdx.x; i < plan.window_rows * window_pitch(kBias); i += blockDim.x) {
      const int64_t to = cell_of_window(i);
      if (to >= 0 && window[i] != 0) atomicAdd(table + to, window[i]);
    }
  }
};

}  // namespace dat::cuda

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

// What the block keeps of a tile's queries beside q and grad_out: minus the log-sum-exp, as an
// exponent of 2, and delta.
template <class A>
struct RowStatistics {
  A *shift, *delta;  // [slots]

  __device__ RowStatistics(void* shared, const Plan& plan)
      : shift(static_cast<A*>(shared)), delta(shift + plan.rows * plan.columns) {}

  // all_delta: [B, h, M], or null: delta is left alone.
  __device__ void load(const AttentionBackward& p, const void* all_delta, const Plan& plan,
                       const BlockPlace& at, TileOrigin origin) const {
    const AttentionShape& shape = p.in.shape;
    for (int slot = threadIdx.x; slot < plan.rows * plan.columns; slot += blockDim.x) {
      const auto [row, column] = place_of(plan, origin, slot);
      const bool inside = row < shape.height && column < shape.width;
      const int64_t i = at.batch_head * shape.queries() + int64_t(row) * shape.width + column;
      // Weights of queries that are not there: 2^-inf.
      shift[slot] = inside ? static_cast<const A*>(p.lse)[i] * A(-kLog2e) : A(-INFINITY);
      if (all_delta) delta[slot] = inside ? static_cast<const A*>(all_delta)[i] : A(0);
    }
  }
};

// One warp's 16 keys against one unit of queries.
template <class E, Bias kBias>
struct KeyUnit {
  using A = typename E::Acc;
  using Scores = A[kUnitRows][2][2];  // [row][key g + 8 k][column 2 t + c]

  using Window = typename Scorer<E, kBias, Walk::queries>::Window;
  using Taps = typename Window::Taps;

  const Scorer<E, kBias, Walk::queries>& scorer;
  const KeyPlace& place;
  int key;     // first of the warp's, counted from the block's
  int row;     // of the unit, from the block's first query
  int column;  //   "

  __device__ int local_key(int k) const { return key + E::g() + 8 * k; }
  __device__ int local_column(int c) const { return column + 2 * E::t() + c; }
  __device__ int keys_left(int k) const {  // of the lanes' k-th keys, all lanes together
    return int(scorer.in.shape.keys) - place.first_key - key - 8 * k;
  }

  // Products q k (s) and grad_out v (grad) become weights and the gradients of scores. use(k, taps,
  // grad) has those of one key of each lane, with the taps that their bias came from.
  template <class Use>
  __device__ void weigh(Scores& s, Scores& grad, const RowStatistics<A>& rows, int slot,
                        const Use& use) const {
    using Pair = Vec<A, 2>;
    const A factor = scorer.factor();
    Pair shift[kUnitRows], delta[kUnitRows];  // of the lane's columns
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r) {
      const int at = slot + r * kUnitColumns + 2 * E::t();
      shift[r] = *reinterpret_cast<const Pair*>(rows.shift + at);
      delta[r] = *reinterpret_cast<const Pair*>(rows.delta + at);
    }
    const bool drops = scorer.plan.drops;
    A kept_scale = 1;
    const unsigned bits = drops ? kept(kept_scale) : 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      // Of keys that are not there, k and v are 0, and the products with them, too.
      if (keys_left(k) <= 0) continue;
      Taps taps[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        A bias[kUnitRows];
#pragma unroll
        for (int r = 0; r < kUnitRows; ++r) bias[r] = shift[r].at[c];
        if constexpr (kBias != Bias::direct) {
          taps[c] = Taps(scorer.window, local_key(k), row, local_column(c));
          taps[c].add(bias);
        }
#pragma unroll
        for (int r = 0; r < kUnitRows; ++r) s[r][k][c] = fused(s[r][k][c], factor, bias[r]);
      }
      if (scorer.has_unusual()) add_unusual(s, k);
      if (keys_left(k) < 8 && E::g() >= keys_left(k)) {
#pragma unroll
        for (int i = 0; i < kUnitRows * 2; ++i) s[i / 2][k][i % 2] = -INFINITY;
      }
      if (drops) drop(grad, k, bits, kept_scale);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int r = 0; r < kUnitRows; ++r) {
          s[r][k][c] = fast_exp2(s[r][k][c]);
          grad[r][k][c] = softmax_vjp(s[r][k][c], grad[r][k][c], delta[r].at[c]);
        }
      if (drops) drop(s, k, bits, kept_scale);
      use(k, taps, grad);
    }
  }

  __device__ void add_unusual(Scores& s, int k) const {
#pragma unroll 1
    for (int i = 0; i < kUnitRows * 2; ++i) {
      const A value = as_exponent(
          scorer.unusual(place.first_key, local_key(k), row + i / 2, local_column(i % 2)));
#pragma unroll
      for (int j = 0; j < kUnitRows * 2; ++j)
        if (j == i) s[j / 2][k][j % 2] += value;
    }
  }

  __device__ static void drop(Scores& x, int k, unsigned bits, A scale) {
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) x[r][k][c] *= bits >> (r * 4 + k * 2 + c) & 1 ? scale : A(0);
  }

  // Bit i: weight i is kept, and multiplied by the scale.
  __device__ unsigned kept(A& scale) const {
    const Dropper dropper(scorer.in, scorer.plan, place.at.batch_head);
    unsigned bits = 0;
    scale = A(dropper.rule.scale);
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

  // The gradients of the lane's scores with its k-th key.
  using KeyGrads = A[2][kUnitRows];  // [column]
  __device__ static void take(KeyGrads& of_key, const Scores& grad, int k) {
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c) of_key[c][r] = k ? grad[r][1][c] : grad[r][0][c];
  }

  // Adds to `slopes`, of the lane's k-th key, the product of the gradients with
  // d bias / d coordinate, and gives the table's gradient away: near_cell(place in the window
  // in bytes, values of three cells from there on, or two).
  template <class Near>
  __device__ void near_backward(A (&slopes)[2], const KeyGrads& grad, int k, const Taps (&taps)[2],
                                const Near& near_cell) const {
    if (!near(local_key(k))) return;
    A grad_h[2][Window::Group::kReads];
#pragma unroll
    for (int c = 0; c < 2; ++c) taps[c].backward(slopes, grad_h[c], grad[c]);
    Window::scatter(taps, grad_h, near_cell);
  }

  // The same for keys that the window does not hold: far_cell(cell of the table, value).
  template <class Far>
  __device__ void far_backward(A (&slopes)[2][2], const Scores& grad, const Far& far_cell) const {
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
  using Unit = KeyUnit<E, kBias>;
  using Taps = typename Unit::Taps;
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

  // The window's memory is taken in fours: its size is rounded up.
  __device__ void clear() const {
    if (!window) return;
    for (int i = threadIdx.x * 4; i < plan.window_rows * plan.window_pitch; i += blockDim.x * 4)
      *reinterpret_cast<Vec<A, 4>*>(window + i) = Vec<A, 4>{};
  }

  __device__ void add_near(A (&slopes)[2], const Unit& unit, const typename Unit::Scores& grad,
                           int k, const Taps (&taps)[2]) const {
    typename Unit::KeyGrads of_key;
    Unit::take(of_key, grad, k);
    unit.near_backward(slopes, of_key, k, taps, [&](int place, const auto&... values) {
      A* to = reinterpret_cast<A*>(reinterpret_cast<char*>(window) + place);
      (atomicAdd(to++, values), ...);
    });
  }

  __device__ void add_far(A (&slopes)[2][2], const Unit& unit,
                          const typename Unit::Scores& grad) const {
    unit.far_backward(slopes, grad, [&](int64_t cell, A value) { atomicAdd(table + cell, value); });
  }

  // Both in a fixed order. Every warp of the block comes here, `active` or not.
  __device__ void add_in_turn(A (&slopes)[2][2], const Unit& unit,
                              const typename Unit::Scores& grad, bool active) const {
    const auto far = [&](int64_t cell, A value) { table[cell] += value; };
    const auto near = [&](int place, const auto&... values) {
      const int cell = place / int(sizeof(A));
      const int row = start_y + cell / plan.window_pitch;
      int column = start_x + cell % plan.window_pitch;
      const auto add = [&](A value) {
        if (unsigned(row) < unsigned(plan.y.size) && unsigned(column) < unsigned(plan.x.size))
          table[int64_t(row) * plan.x.size + column] += value;
        ++column;
      };
      (add(values), ...);
    };
    for (int warp = 0; warp < kKeyWarps; ++warp) {
      if (active && threadIdx.x / kWarp == warp)
        for (int lane = 0; lane < kWarp; ++lane) {
          if (threadIdx.x % kWarp == lane) {
            if constexpr (kBias != Bias::direct) {
#pragma unroll 1
              for (int k = 0; k < 2; ++k) {
                const int n = unit.local_key(k);
                const Taps taps[2] = {{unit.scorer.window, n, unit.row, unit.local_column(0)},
                                      {unit.scorer.window, n, unit.row, unit.local_column(1)}};
                typename Unit::KeyGrads of_key;
                Unit::take(of_key, grad, k);
                A more[2] = {};
                unit.near_backward(more, of_key, k, taps, near);
#pragma unroll
                for (int i = 0; i < 4; ++i) slopes[i / 2][i % 2] += i / 2 == k ? more[i % 2] : A(0);
              }
            }
            unit.far_backward(slopes, grad, far);
          }
          __syncwarp();
        }
      __syncthreads();
    }
  }

  __device__ void flush() const {
    if (!window) return;
    const int width = int(plan.x.size), pitch = plan.window_pitch;
    // Rows and columns of the window that the table has.
    const int bottom = min(plan.window_rows, int(plan.y.size) - start_y);
    const int right = min(plan.window_columns, width - start_x);
    for (int c = max(-start_x, 0) + threadIdx.x % kWarp; c < right; c += kWarp) {
      int r = max(-start_y, 0) + threadIdx.x / kWarp;
      const A* from = window + r * pitch + c;
      A* to = table + int64_t(start_y + r) * width + start_x + c;
#pragma unroll 1
      for (; r < bottom; r += kKeyWarps, from += kKeyWarps * pitch, to += kKeyWarps * width)
        if (*from != 0) atomicAdd(to, *from);
    }
  }
};

}  // namespace dat::cuda

// What the passes of deform_attention share: which queries and keys a block and a warp own, the
// walk over the keys, scores with their bias, dropout.
#pragma once

#include "../math/random.h"
#include "mma.cuh"
#include "simt.cuh"
#include "stage.cuh"
#include "table.cuh"
#include "window.cuh"

namespace dat::cuda {

// Blocks of a multiprocessor that registers are left for.
template <class E>
constexpr int kResident = E::kStack > 1        ? 2
                          : E::kChannels <= 32 ? 3
                          : E::kChannels <= 64 ? 2
                                               : 1;

// Which (image, head) a block owns, and where its tiles begin.
struct BlockPlace {
  int batch, head, batch_head;
  TileOrigin origin;

  __device__ BlockPlace(const AttentionShape& shape, int tiles, int block) {
    const int heads = int(shape.heads);
    batch_head = block / tiles;
    batch = batch_head / heads, head = batch_head % heads;
    origin = {};
  }
  __device__ BlockPlace(const AttentionShape& shape, const Plan& plan, int block)
      : BlockPlace(shape, plan.splits, block) {
    const int split = block % plan.splits;
    origin = {split / plan.across * plan.tiles_down * plan.rows,
              split % plan.across * plan.columns};
  }
};

template <class T>
__device__ const T* head_data(const MapView& view, const AttentionShape& shape,
                              const BlockPlace& at) {
  return static_cast<const T*>(view.data) + at.batch * view.batch +
         at.head * shape.head_dim * view.channel;
}

// pos [2] of a key, in the group of the block's head.
template <class A>
__device__ const A* key_pos(const AttentionInputs& in, const Plan& plan, const BlockPlace& at,
                            int key) {
  const int group = at.head / plan.group_heads;
  return static_cast<const A*>(in.pos) +
         ((at.batch * in.shape.groups + group) * in.shape.keys + key) * 2;
}

template <class T>
__device__ KeyLists<T> key_lists(const AttentionInputs& in, const BlockPlace& at) {
  return {head_data<T>(in.k, in.shape, at), head_data<T>(in.v, in.shape, at)};
}

// Tiles of q, grad_out, and out where it is given. Asynchronous.
template <class E, bool kOut>
__device__ void load_query_tiles(typename E::Shared* q, typename E::Shared* grad_out,
                                 typename E::Shared* out, const AttentionBackward& p,
                                 const Plan& plan, const BlockPlace& at, TileOrigin origin) {
  using T = typename E::Storage;
  using Tile = QueryTile<typename E::Shared, T>;
  const AttentionShape& shape = p.in.shape;
  const auto tile = [&](typename E::Shared* to, const MapView& view) {
    return Tile{to, head_data<T>(view, shape, at), view};
  };
  if constexpr (kOut)
    if (out && plan.q_vec == plan.grad_out_vec && plan.q_vec == plan.read_out_vec) {
      load_queries<E>(shape, plan, origin, plan.q_vec, tile(q, p.in.q), tile(grad_out, p.grad_out),
                      tile(out, p.out));
      return commit_copies();
    }
  // A loop, so that the code for all kinds of copies is there once.
#pragma unroll 1
  for (int i = 0; i < (out ? 3 : 2); ++i)
    load_queries<E>(shape, plan, origin,
                    i == 0   ? plan.q_vec
                    : i == 1 ? plan.grad_out_vec
                             : plan.read_out_vec,
                    tile(i == 0   ? q
                         : i == 1 ? grad_out
                                  : out,
                         i == 0   ? p.in.q
                         : i == 1 ? p.grad_out
                                  : p.out));
  commit_copies();
}

// Products of a warp's unit with some tiles of keys become scores: scaled and with their bias.
template <class E, Bias kBias, Walk kWalk = Walk::keys>
struct Scorer {
  using A = typename E::Acc;
  using Window = TableWindow<A, kBias == Bias::direct ? Bias::unit : kBias, kWalk,
                             (kBias == Bias::slope ? E::kStack : 1) * kUnitRows>;

  const AttentionInputs& in;
  const Plan& plan;
  const BlockPlace& at;
  Window window;
  bool far;  // some key in shared memory is

  __device__ Scorer(const AttentionInputs& in_, const Plan& plan_, const BlockPlace& at_,
                    char* shared)
      : in(in_),
        plan(plan_),
        at(at_),
        window(shared + plan.at_window, shared + plan.at_keys, plan, at.origin.row,
               at.origin.column) {
    far = false;
  }

  // Made where they are used: kept, they would cost registers in the loop over keys.
  __device__ WholeTable<A> table() const { return {in, plan, int(opaque(at.head))}; }
  __device__ const A* pos(int key) const { return key_pos<A>(in, plan, at, key); }

  __device__ void load() const {
    if constexpr (kBias != Bias::direct) {
      const void* data = table().data;
      if (in.shape.table_in_dtype)
        window.load(static_cast<const typename E::Storage*>(data), plan);
      else
        window.load(static_cast<const A*>(data), plan);
    }
  }

  // Keys from `first` on, for the tile that starts at row `tile_row` of the block's queries. The
  // block meets in here.
  __device__ void stage(int first, int tile_row = 0) {
    if constexpr (kBias != Bias::direct) {
      window.tile_row = tile_row;
      bool mine = false;
      for (int n = threadIdx.x; n < plan.key_stage; n += blockDim.x) {
        const bool real = first + n < int(in.shape.keys);
        const A* p = pos(first + n);
        mine |= window.stage_key(n, real ? p[0] : A(0), real ? p[1] : A(0), plan, at.origin.row,
                                 at.origin.column);
      }
      far = __syncthreads_or(mine);
    } else {
      __syncthreads();
    }
  }

  // Whether add_unusual() has something to add. Read anew each time: kept, it costs registers.
  __device__ bool has_unusual() const { return kBias == Bias::direct ? opaque(plan.adds) : far; }

  // What the window does not hold, for query (row, column) of the tile and key first + n: the
  // table's value for far keys, the dense bias.
  __device__ A unusual(int first, int n, int row, int column) const {
    A value = 0;
    if (first + n >= in.shape.keys) return value;
    if (kBias == Bias::direct ? in.table != nullptr : window.is_far(n)) {
      const A* p = pos(first + n);
      value = table().value(p[0], p[1], at.origin.row + row, at.origin.column + column).value;
    }
    if (kBias == Bias::direct && in.bias.data) value += dense(first + n, row, column);
    return value;
  }

  // The dense bias of a query and key.
  __device__ A dense(int key, int row, int column) const {
    const int i = at.origin.row + row, j = at.origin.column + column;
    if (i >= in.shape.height || j >= in.shape.width || key >= in.shape.keys) return 0;
    const auto* data = static_cast<const typename E::Storage*>(in.bias.data);
    return to_acc(data[at.batch * in.bias.batch + at.head * in.bias.head +
                       (i * in.shape.width + j) * in.bias.query + key * in.bias.key]);
  }

  // From products q k to the exponent of 2, and back.
  __device__ A factor() const { return sizeof(A) == 8 ? plan.factor : plan.narrow_factor; }
  __device__ A inverse_factor() const { return A(plan.inverse_factor); }
};

// Where the gradient of the dense bias goes; added up where the bias is broadcast.
template <class A>
struct BiasGradient {
  A* data;  // [M, N]
  int64_t keys;
  bool alone;

  __device__ BiasGradient(const AttentionBackward& p, const BlockPlace& at)
      : data(static_cast<A*>(p.grad_bias) + at.batch * p.grad_bias_batch +
             at.head * p.grad_bias_head),
        keys(p.in.shape.keys),
        alone((p.grad_bias_batch || p.in.shape.batch == 1) &&
              (p.grad_bias_head || p.in.shape.heads == 1)) {}
  __device__ void add(int64_t query, int key, A value) const {
    A* to = data + query * keys + key;
    if (alone)
      *to = value;
    else
      atomicAdd(to, value);
  }
};

// Which weights dropout keeps: counter-based, see math/random.h.
struct Dropper {
  Dropout rule;
  uint64_t seed;
  int64_t batch_head;

  __device__ Dropper(const AttentionInputs& in, const Plan& plan, int64_t batch_head_)
      : rule(plan.dropout), seed(uint64_t(*in.seed)), batch_head(batch_head_) {}

  __device__ bool keeps(int64_t query, int key) const {
    const Random4 draw = dropout_draw(seed, batch_head, query, key / 4);
    const uint32_t value = key % 4 == 0   ? draw.value[0]
                           : key % 4 == 1 ? draw.value[1]
                           : key % 4 == 2 ? draw.value[2]
                                          : draw.value[3];
    return value >= rule.threshold;
  }
};

// The block's walk over the keys: k and v in shared memory, a stage at a time; with two buffers the
// next stage is on its way while one is used. Keys that fit in one stage stay there for all tiles.
template <class E>
struct KeyStages {
  using T = typename E::Storage;
  using S = typename E::Shared;
  const AttentionInputs& in;
  const Plan& plan;
  const BlockPlace& at;
  S *k, *v;

  __device__ KeyStages(const AttentionInputs& in_, const Plan& plan_, const BlockPlace& at_,
                       char* shared)
      : in(in_),
        plan(plan_),
        at(at_),
        k(reinterpret_cast<S*>(shared + plan.at_k)),
        v(reinterpret_cast<S*>(shared + plan.at_v)) {}

  // Keys from `first` on, to one of the buffers.
  template <bool kFirst = false>
  __device__ void load(int first, int buffer) const {
    const int to = buffer * E::kChannels * E::key_pitch(plan);
    load_keys<E, kFirst>(k + to, v + to, key_lists<T>(in, at), in, plan, first);
    commit_copies();
  }

  // Calls use(k, v, first key, number of keys) for every stage. Stage 0 is loaded for tile 0 by the
  // caller.
  template <class Scorer, class Use>
  __device__ void walk(Scorer& scorer, int tile, const Use& use) const {
    const int keys = int(in.shape.keys), stage = plan.key_stage;
    if (tile && keys > stage) load(0, 0);
    for (int first = 0, buffer = 0; first < keys; first += stage) {
      if (first && plan.buffers == 1) load(first, 0);
      wait_for_copies<0>();
      if (tile == 0 || keys > stage || Scorer::Window::kBands)
        scorer.stage(first, tile * plan.rows);
      else
        __syncthreads();
      if (plan.buffers == 2 && first + stage < keys) load(first + stage, buffer ^ 1);
      const int at_stage = buffer * E::kChannels * E::key_pitch(plan);
      use(k + at_stage, v + at_stage, first, min(stage, keys - first));
      __syncthreads();
      buffer ^= plan.buffers - 1;
    }
  }
};

// A warp's unit of the tile, as offsets in it.
struct UnitPlace {
  int row, column;

  __device__ UnitPlace(int row_, int column_) : row(row_), column(column_) {}
  // The first of a stack of units.
  __device__ UnitPlace(const Plan& plan, int index, int stack = 1) {
    const unsigned across = unsigned(plan.columns) / kUnitColumns;
    row = int(unsigned(index) / across * stack * kUnitRows);
    column = int(unsigned(index) % across * kUnitColumns);
  }
  // Where its queries start among those of the tile.
  __device__ int slot(const Plan& plan) const {
    return row * plan.columns + column / kUnitColumns * kWarp;
  }
};

// Adds to exponents of keys from first + chunk on what the window does not hold.
template <class E, class Scorer>
__device__ void add_unusual(typename E::Scores& s, const Scorer& scorer, UnitPlace unit, int first,
                            int chunk, int tiles) {
  using A = typename E::Acc;
  constexpr int kRows = E::kStack * kUnitRows;
  const int column = unit.column + E::g();
#pragma unroll 1
  for (int i = 0; i < tiles * 2; ++i) {
    const int n = chunk + i / 2 * 8 + 2 * E::t() + i % 2;
    // Selected, not indexed: registers have no addresses.
    A extra[kRows];
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      const A value = as_exponent(scorer.unusual(first, n, unit.row + r, column));
#pragma unroll
      for (int j = 0; j < kRows; ++j) extra[j] = j == r ? value : extra[j];
    }
#pragma unroll
    for (int j = 0; j < E::kTiles * 2; ++j)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (j == i) s[r / kUnitRows][r % kUnitRows][j / 2][j % 2] += extra[r];
  }
}

// Whether products q k start at the row's shift, which saves an addition; only beside a window.
template <class E, Bias kBias>
constexpr bool kStartsShifted = E::kStarts && kBias != Bias::direct;

// Products q k become exponents of 2: scaled, with their bias and `shift` of the query's row. In
// full precision it is added last: the exponent that the reference is becomes 0, and the weight of
// a query's only key 1. Keys from first + chunk on, `left` of which are there: -inf for others of
// their tiles.
template <class E, Bias kBias>
__device__ void exponents(typename E::Scores& s, const typename E::Rows& shift,
                          const Scorer<E, kBias>& scorer, UnitPlace unit, int first, int chunk,
                          int left, int tiles) {
  using A = typename E::Acc;
  using Window = typename Scorer<E, kBias>::Window;
  constexpr int kRows = E::kStack * kUnitRows;
  const A factor = scorer.factor();
  const int column = unit.column + E::g();
  const auto row_of = [&](int r) -> auto& { return s[r / kUnitRows][r % kUnitRows]; };
#pragma unroll
  for (int nt = 0; nt < E::kTiles; ++nt) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // Of 49 keys the last tile has one.
      if (e == 0 || E::kStack > 1 ? nt && nt >= tiles : nt * 8 + 1 >= left) continue;
#pragma unroll
      for (int first_row = 0; first_row < kRows; first_row += Window::kRows) {
        A bias[Window::kRows] = {};
        if constexpr (kBias != Bias::direct)
          typename Window::Taps(scorer.window, chunk + nt * 8 + 2 * E::t() + e,
                                unit.row + first_row, column)
              .template add<true>(bias);
#pragma unroll
        for (int r = 0; r < Window::kRows; ++r) {
          A& value = row_of(first_row + r)[nt][e];
          const bool shifts = E::kStarts && !kStartsShifted<E, kBias>;
          value = fused(value, factor, shifts ? shift[0][r] : bias[r]);
        }
      }
    }
  }
  if (left < E::kTiles * 8) {
#pragma unroll
    for (int nt = 0; nt < E::kTiles; ++nt) {
      if (nt * 8 + 8 <= left || (E::kTiles > 2 && nt && nt >= tiles)) continue;
#pragma unroll
      for (int i = 0; i < kRows * 2; ++i)
        if (nt * 8 + 2 * E::t() + i % 2 >= left) row_of(i / 2)[nt][i % 2] = -INFINITY;
    }
  }
  if (scorer.has_unusual()) add_unusual<E>(s, scorer, unit, first, chunk, tiles);
  if constexpr (!E::kStarts) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < E::kTiles * 2; ++i) row_of(r)[i / 2][i % 2] += shift[0][r];
  }
}

// Multiplies by `scale` what is kept, and by 0 what is not.
template <class E>
__device__ void drop_weights(typename E::Scores& p, const AttentionInputs& in, const Plan& plan,
                             const BlockPlace& at, UnitPlace unit, int key, typename E::Acc scale) {
  constexpr int kKeys = E::kTiles * 2, kOfUnit = kUnitRows * kKeys;
  static_assert(kOfUnit <= 32);
  const Dropper dropper(in, plan, at.batch_head);
  int64_t first = int64_t(at.origin.row + int(opaque(unit.row))) * in.shape.width +
                  at.origin.column + unit.column + E::g();
#pragma unroll
  for (int u = 0; u < E::kStack; ++u, first += kUnitRows * in.shape.width) {
    unsigned kept = 0;
#pragma unroll 1
    for (int i = 0; i < kOfUnit; ++i) {
      const int n = key + i % kKeys / 2 * 8 + 2 * E::t() + i % 2;
      kept |= unsigned(dropper.keeps(first + i / kKeys * in.shape.width, n)) << i;
    }
#pragma unroll
    for (int i = 0; i < kOfUnit; ++i)
      (&p[u][0][0][0])[i] *= kept >> i & 1 ? scale : typename E::Acc(0);
  }
}

}  // namespace dat::cuda

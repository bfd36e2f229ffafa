// How an attention problem is cut into blocks: decided once by the launcher, read by the kernels.
//
// A warp's unit of queries is 4 rows of 8 neighbouring columns of the query map; a block's tile is
// a rectangle of units. Query tiles lie in shared memory as [channel][row][column], keys and values
// as [channel][key]: as in global memory, so that copies are straight and every matrix product
// finds its operands with ldmatrix, transposed or not.
#pragma once

#include "../math/random.h"
#include "../params.h"

namespace dat::cuda {

constexpr int kUnitRows = 4, kUnitColumns = 8;

// Units, or stacks of them, of a tile at most. As many warps a block, three blocks a
// multiprocessor, leave 168 registers a thread; of eight warps that share a table, each would have
// too few.
constexpr int kMaxUnits = 4;

// The same by engine: of long heads on tensor cores, two tiles of more units and keys would take
// more shared memory than most GPUs have.
__host__ __device__ constexpr int most_units(bool tensor_cores, int channels) {
  return tensor_cores && channels > 64 ? 2 : kMaxUnits;
}

// Keys in shared memory at a time, at most.
constexpr int kMaxKeys = 64;

// Where the pass over keys gives grad_q as well, each tile of keys has a part of it in global
// memory: so many parts and bytes at most.
constexpr int kMostParts = 4;
constexpr int64_t kMostPartBytes = int64_t(1) << 29;

// Whether the pass over keys can give grad_q: of long heads, its sums do not fit in registers
// beside those of keys.
__host__ __device__ constexpr bool gives_grad_q(bool tensor_cores, int channels) {
  return tensor_cores && channels <= 64;
}

// How the bias reaches the scores.
enum class Bias : int {
  direct,   // none, dense, or a table read from global memory: any slope, any size
  unit,     // table at slope 1: a window of it in shared memory
  slope,    // table at slopes from 1/3 to 1 (along y): a unit's rows meet five table rows
  shallow,  // table at slopes up to 1/3 (along y): three
};

struct Plan {
  int rows, columns;  // of a query tile
  int down, across;   // tiles of the map
  int tiles_down;     // tiles that a block takes, one below the other
  int splits;         // backward over keys: blocks that share the queries of a key
  int key_stage;      // keys in shared memory at a time: 16, 32 or 64; for small maps also 48
  int query_pitch;    // values between channels in shared memory
  int key_pitch;      //   "
  int buffers;        // for keys, 1 or 2
  int window_rows, window_columns, window_pitch;  // of the table in shared memory
  float near_y, near_x;  // where the first query is in it, at most, lest the last one leaves it
  int group_heads;       // heads that share positions
  int adds;              // a table or a dense bias
  int drops;             // dropout
  Dropout dropout;       //   "
  bool with_q;           // backward: the pass over keys gives grad_q as well
  DType table_dtype;
  int64_t table_stride;  // from a head's table to the next, in bytes
  TableAxis<double> y, x;
  TableAxis<float> narrow_y, narrow_x;  // the same
  double factor;                        // from products q k to the exponent of 2
  float narrow_factor;                  //   "
  float inverse_factor;                 // 1 / factor

  template <class A>
  DAT_HD const TableAxis<A>& axis_y() const {
    if constexpr (sizeof(A) == 8)
      return y;
    else
      return narrow_y;
  }
  template <class A>
  DAT_HD const TableAxis<A>& axis_x() const {
    if constexpr (sizeof(A) == 8)
      return x;
    else
      return narrow_x;
  }
  // Values that one access moves; 1 where strides or alignment want it. 0: channels are the
  // contiguous dimension.
  int q_vec, key_vec, grad_out_vec;  // key_vec: of k and v
  bool key_words;    // of k and v two channels are a whole number of 4-byte words (load_key_words)
  int out_vec;       // of what is written for queries: out, grad_q
  int read_out_vec;  // of out, in the backward
  // Where things are in shared memory, in bytes.
  int at_q, at_grad_out, at_k, at_v, at_rows, at_window, at_grad_window, at_keys, at_scratch,
      at_grads, shared;
};

// Scratch in global memory of the backward, all in the accumulation type.
struct BackwardScratch {
  void* delta;            // [B, h, M], sum over channels of grad_out * out
  void *grad_k, *grad_v;  // [splits, B, C, N], or null: one split writes the result
  void* grad_pos;         // [splits, B, h, N, 2], or null: as above
  int* arrivals;          // [B, h, tiles of keys] zeroed: blocks of a split that are done, or null
  void* grad_q;           // [tiles of keys, B, h, splits, tiles_down, channels, slots], or null;
                          //   small maps: a part's order is that of column_grad_q.cuh
  int* grad_q_arrivals;   // [B, h, splits] zeroed: counts blocks of the same queries, or null
  void* grad_table;       // deterministic: [blocks of a head, B, h, Th, Tw] zeroed, else null
};

}  // namespace dat::cuda

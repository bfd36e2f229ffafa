// The bias table as the backward of small maps sees it (column_walk.cuh): one window for all
// queries, and what a lane has of a key on its way down the columns of the map.
#pragma once

#include "key_unit.cuh"

namespace dat::cuda {

// Products for tiles of whole rows of the map, 16 slots each (place_of in stage.cuh).
template <class T>
struct Columns : Mma<T, 32> {
  static constexpr bool kWholeRows = true;
  static constexpr int kRows = 14, kWidth = 16, kSlots = kRows * kWidth;
  // Of 16 keys, a warp each: registers for two such blocks a multiprocessor.
  static constexpr int kMostTiles = 4;
  static constexpr int kQueryPitch = kSlots + 8, kKeyPitch = kMostTiles * 16 + 8;
  __device__ static int query_pitch(const Plan&) { return kQueryPitch; }
  __device__ static int key_pitch(const Plan&) { return kKeyPitch; }
};

// The window, values times log2(e), and after it one for gradients, in shared memory. To the right
// of what keys near the map meet are columns that leave no weight, for keys that do not exist; in
// the second window columns where all is 0, for keys that are far away (Scorer).
struct ColumnWindow {
  static constexpr int kPads = 5, kRows = 39, kPitch = 49, kMostColumns = kPitch - kPads;
  static constexpr int kSize = kRows * kPitch;
  enum class Kind : int { near, far, absent };
  struct alignas(16) Key {
    float x, y;  // of query (0, 0): the column, and how far it is past the row
    int row;     // the row's place
    Kind kind;
  };

  float* cells;
  Key* keys;
  const Plan& plan;
  int start_y, start_x;

  __device__ ColumnWindow(char* shared, const Plan& plan_)
      : cells(reinterpret_cast<float*>(shared + plan_.at_window)),
        keys(reinterpret_cast<Key*>(shared + plan_.at_keys)),
        plan(plan_),
        start_y(window_start(plan_.narrow_y, 0)),
        start_x(window_start(plan_.narrow_x, 0)) {}

  __device__ void clear() const {
    for (int i = threadIdx.x * 4; i < 2 * kSize; i += blockDim.x * 4)
      *reinterpret_cast<Vec<float, 4>*>(cells + i) = Vec<float, 4>{};
  }

  // f(cell of the window, cell of the table) for those that are in both.
  template <class F>
  __device__ void each_cell(const F& f) const {
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, width = int(plan.x.size);
    const int bottom = min(int(plan.y.size), start_y + plan.window_rows);
    const int right = min(width, start_x + plan.window_columns);
    for (int c = max(start_x, 0) + threadIdx.x % kWarp; c < right; c += kWarp)
#pragma unroll 4
      for (int r = max(start_y, 0) + warp; r < bottom; r += warps)
        f(cells + (r - start_y) * kPitch + c - start_x, r * width + c);
  }

  template <class T>
  __device__ void load(const T* table) const {
    each_cell([&](float* cell, int i) { *cell = to_acc(table[i]) * float(kLog2e); });
    for (int i = threadIdx.x; i < kRows * kPads; i += blockDim.x)
      cells[i / kPads * kPitch + kMostColumns + i % kPads] = -1e30f;
  }

  __device__ void flush(float* table) const {
    each_cell([&](const float* cell, int i) {
      if (cell[kSize] != 0) atomicAdd(table + i, cell[kSize]);
    });
  }

  // pos: of the key, or null. Returns whether it is far.
  __device__ bool stage_key(int n, const float* pos) const {
    if (!pos) {
      keys[n] = {float(kMostColumns), 0, 0, Kind::absent};
      return false;
    }
    const float y = plan.narrow_y.shift(pos[0]) - float(start_y);
    const float x = plan.narrow_x.shift(pos[1]) - float(start_x);
    // Written so that NaN is far.
    const bool near = y >= 0 && x >= 0 && y < plan.near_y && x < plan.near_x;
    const float row = floorf(y);
    keys[n] = near ? Key{x, y - row, int(row) * kPitch, Kind::near}
                   : Key{float(kMostColumns), 0, kSize, Kind::far};
    return !near;
  }
  __device__ bool is_far(int n) const { return keys[n].kind == Kind::far; }
};

// What the lane before this one has, or the one after it.
__device__ __forceinline__ float of_left(float x) {
  float y;
  asm volatile("shfl.sync.up.b32 %0, %1, 1, 0, -1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float of_right(float x) {
  float y;
  asm volatile("shfl.sync.down.b32 %0, %1, 1, 31, -1;" : "=f"(y) : "f"(x));
  return y;
}

// Adds to a value in shared memory, kOffset bytes from an address.
template <int kOffset>
__device__ __forceinline__ void add_shared(unsigned address, float value) {
  asm volatile("red.shared.add.f32 [%0+%2], %1;" ::"r"(address), "f"(value), "n"(kOffset)
               : "memory");
}

// One key of a lane and its four columns, on the way down. Columns are near cells as rows are near
// rows: column c near cell c, counted from the first column's. Of the cells between two lanes of a
// key, one has them, and lends.
struct WalkedKey {
  float x[4];                          // how far the columns are past their cells
  float keep[4], right[4], left[4];    // what cells c, c + 1 and c - 1 get of column c
  float y;                             // how far the first query is past its own table row
  const float* next;                   // the table row to be read next
  float h[4], step[4];                 // values of the query's own row, less those of the one above
  float d_above[4], d[4], d_below[4];  // derivatives in x of those rows and the next
  float above[4], own[4];              // gradients of those rows so far
  float slopes[4];                     // the steps that the row of queries is on
  float up, stay, down;                // how it shares its gradients with the three table rows
  float along_y, along_x;
  bool near;  // in the window

  __device__ WalkedKey(const ColumnWindow& window, int n) {
    const ColumnWindow::Key key = window.keys[n];
    const int first = threadIdx.x % 4 * 4;
    const Parts at = parts_of(key.x);
    y = key.y, along_y = along_x = 0, near = key.kind == ColumnWindow::Kind::near;
    next = window.cells + key.row + int(at.whole) + (near ? first : 0);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      x[c] = fused(float(first + c), window.plan.narrow_x.slope - 1, at.fraction);
      // Opaque, lest they are made again and again.
      right[c] = opaque(max(x[c], 0.f)), left[c] = opaque(right[c] - x[c]);
      keep[c] = opaque(1 - right[c] - left[c]);
      above[c] = own[c] = step[c] = d_above[c] = 0;
    }
    read(h, d);
  }

  __device__ void read(float (&value)[4], float (&derivative)[4]) {
    float cell[4], steps[5];
#pragma unroll
    for (int i = 0; i < 4; ++i) cell[i] = next[i];
    next += ColumnWindow::kPitch;
    // The first lane's first column is never before its cell; what lies behind the last lane's
    // last cell, no query is near.
    steps[0] = cell[0] - of_left(cell[3]);
    steps[4] = of_right(cell[0]) - cell[3];
#pragma unroll
    for (int i = 1; i < 4; ++i) steps[i] = cell[i] - cell[i - 1];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      derivative[c] = x[c] >= 0 ? steps[c + 1] : steps[c];
      value[c] = fused(x[c], derivative[c], cell[c]);
    }
  }

  // Makes exponents of a row's products.
  __device__ void add(float (&s)[2][2][2], int k, float factor, float slope, float row) {
    const float past = fused(row, slope, y);
    down = max(past, 0.f), up = down - past, stay = 1 - down - up;
    float below[4];
    read(below, d_below);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float& value = s[c / 2][k][c % 2];
      const float to_below = below[c] - h[c];
      slopes[c] = past >= 0 ? to_below : step[c];
      value = fused(past, slopes[c], fused(value, factor, h[c]));
      step[c] = to_below, h[c] = below[c];
    }
  }

  // Takes the gradients of the row's scores and gives those of the table row above it away.
  __device__ void take(const float (&grad)[2][2][2], int k, bool first) {
    float done[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float g = grad[c / 2][k][c % 2];
      along_y = fused(g, slopes[c], along_y);
      done[c] = fused(up, g, above[c]);
      above[c] = fused(stay, g, own[c]), own[c] = down * g;
    }
    if (!first) give<3>(done);
#pragma unroll
    for (int c = 0; c < 4; ++c) d_above[c] = d[c], d[c] = d_below[c];
  }

  // What the last two table rows have got.
  __device__ void finish() {
    give<2>(above);
#pragma unroll
    for (int c = 0; c < 4; ++c) d_above[c] = d[c];
    give<1>(own);
  }

  // To the table row kRows above the next, whose derivatives are d_above.
  template <int kRows>
  __device__ void give(const float (&grad)[4]) {
    constexpr int kTo = (ColumnWindow::kSize - kRows * ColumnWindow::kPitch) * int(sizeof(float));
    const int t = threadIdx.x % 4;
    float sums[4];
    const float from_left = of_left(right[3] * grad[3]);
    const float from_right = of_right(left[0] * grad[0]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float lent = i == 0 && t > 0 ? from_left : i == 3 && t < 3 ? from_right : 0;
      sums[i] = i % 3 ? keep[i] * grad[i] : fused(keep[i], grad[i], lent);
      if (i > 0) sums[i] = fused(right[i - 1], grad[i - 1], sums[i]);
      if (i < 3) sums[i] = fused(left[i + 1], grad[i + 1], sums[i]);
    }
    if (near) {
      const unsigned at = shared_address(next);
      add_shared<kTo>(at, sums[0]), add_shared<kTo + 4>(at, sums[1]);
      add_shared<kTo + 8>(at, sums[2]), add_shared<kTo + 12>(at, sums[3]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) along_x = fused(grad[c], d_above[c], along_x);
  }
};

}  // namespace dat::cuda

// A warp's 16 keys against a small map of queries, row after row: the work of
// attention_backward_columns.cuh.
//
// Lane l = 4 g + t has keys g and g + 8 and columns 4 t to 4 t + 3. Scores of a row are
// s[half][k][e]: key g + 8 k, column 4 t + 2 half + e. A row's 16 slots are as deep as a product on
// tensor cores is, so weights and gradients are operands as they are.
#pragma once

#include "column_window.cuh"

namespace dat::cuda {

// The walk of a warp.
template <class T>
struct ColumnWalk {
  using E = Columns<T>;
  using Scores = float[2][2][2];
  const AttentionBackward& p;
  const Plan& plan;
  const KeyPlace& place;
  const ColumnWindow& window;
  bool far;             // some key of the block is
  float factor, slope;  // of products; by how much queries and table rows drift apart
  int key;              // the warp's first, counted from the block's
  unsigned k[2][4], v[2][4];
  float grad_k[2][2][4], grad_v[2][2][4];  // [16 channels][8 keys]

  __device__ ColumnWalk(const AttentionBackward& p_, const Plan& plan_, const KeyPlace& place_,
                        const ColumnWindow& window_, bool far_, const T* keys, const T* values)
      : p(p_), plan(plan_), place(place_), window(window_), far(far_) {
    key = threadIdx.x / kWarp * kKeysOfWarp;
    factor = opaque(plan.narrow_factor), slope = opaque(plan.narrow_y.slope - 1);
    const typename E::Keys keys_k(keys + key, E::kKeyPitch), keys_v(values + key, E::kKeyPitch);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      (&k[0][0])[i] = (&keys_k.m[0][0])[i], (&v[0][0])[i] = (&keys_v.m[0][0])[i];
      for (int j = 0; j < 2; ++j)
        (&grad_k[0][0][0])[2 * i + j] = 0, (&grad_v[0][0][0])[2 * i + j] = 0;
    }
  }

  __device__ int local_key(int i) const { return key + E::g() + 8 * i; }

  static constexpr int kNext = 16 * E::kQueryPitch * int(sizeof(T));  // 16 channels on
  // s = start of the column + keys x, for a row's slots; [channel][slot] at `address`.
  __device__ static void products(Scores& s, const unsigned (&keys)[2][4], unsigned address,
                                  const float* start) {
    using Pair = Vec<float, 2>;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned b[4];
      i ? load_matrices<true, kNext>(b, address) : load_matrices<true>(b, address);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float (&c)[2][2] = s[half];
        if (i == 0) {
          const Pair pair = *reinterpret_cast<const Pair*>(start + half * 8);
          c[0][0] = c[1][0] = pair.at[0], c[0][1] = c[1][1] = pair.at[1];
        }
        mma<T>(c[0][0], c[0][1], c[1][0], c[1][1], keys[i], b[2 * half], b[2 * half + 1]);
      }
    }
  }

  // sums += x weights, over a row's slots: weights as pairs [half][key].
  __device__ static void add(float (&sums)[2][2][4], unsigned address,
                             const unsigned (&weights)[2][2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned a[4];
      i ? load_matrices<false, kNext>(a, address) : load_matrices<false>(a, address);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float (&c)[4] = sums[i][n];
        mma<T>(c[0], c[1], c[2], c[3], a, weights[0][n], weights[1][n]);
      }
    }
  }

  __device__ static void pack_row(unsigned (&to)[2][2], const Scores& s) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < 2; ++n) to[half][n] = pack<T>(s[half][n][0], s[half][n][1]);
  }

  // Row r of the map, as a number `at`; `start`: of its products q k, and kSlots on of grad_out v.
  __device__ void row(WalkedKey (&keys)[2], int r, float at, unsigned q, unsigned grad_out,
                      const float* start, T* grads) {
    Scores s, grad;
    products(s, k, q, start), products(grad, v, grad_out, start + E::kSlots);
    if (far) add_far(s, r);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      keys[i].add(s, i, factor, slope, at);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& weight = s[c / 2][i][c % 2];
        weight = fast_exp2(weight), grad[c / 2][i][c % 2] *= weight;
      }
      keys[i].take(grad, i, r == 0);
    }
    if (far) take_far(keys, grad, r);
    unsigned packed[2][2];
    pack_row(packed, s);
    add(grad_v, grad_out, packed);
    pack_row(packed, grad);
    add(grad_k, q, packed);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<unsigned*>(grads + i / 2 * 8 + i % 2 * 8 * E::kQueryPitch) =
          packed[i / 2][i % 2];
  }

  // All rows: grads is where the scores' gradients go, [key][slot].
  __device__ void run(const T* q, const T* grad_out, const float* starts, T* grads,
                      float* grad_pos) {
    const int lane = threadIdx.x % kWarp;
    const int at = lane % 16 * E::kQueryPitch + lane / 16 * 8;
    unsigned at_q = shared_address(q + at), at_grad_out = shared_address(grad_out + at);
    const float* start = starts + 2 * E::t();
    T* to = grads + (key + E::g()) * E::kQueryPitch + 2 * E::t();
    WalkedKey keys[2] = {{window, local_key(0)}, {window, local_key(1)}};
    // So many rows at a time that what is carried to the next is not moved.
    constexpr int kStep = E::kRows / 2, kSlots = kStep * E::kWidth;
    float number = 0;  // of the row, counted: conversions would be made for each use
#pragma unroll 1
    for (int first = 0; first < E::kRows; first += kStep) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        row(keys, first + i, number, at_q, at_grad_out, start + i * E::kWidth, to + i * E::kWidth);
        number += 1;
        at_q += E::kWidth * int(sizeof(T)), at_grad_out += E::kWidth * int(sizeof(T));
      }
      start += kSlots, to += kSlots;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      keys[i].finish();
      const int n = local_key(i);
      const float units = window.is_far(n) ? 1 : float(kLn2);
      const float y = sum_lanes(keys[i].along_y, 3) * units * -plan.narrow_y.quarter;
      const float x = sum_lanes(keys[i].along_x, 3) * units * -plan.narrow_x.quarter;
      if (E::t() == 0 && place.first_key + n < int(p.in.shape.keys))
        *reinterpret_cast<Vec<float, 2>*>(grad_pos + 2 * n) = {y, x};
    }
  }

  // Sums as a list [channel][key].
  __device__ void keep(T* list, const float (&sums)[2][2][4], float scale) const {
    T* to = list + E::g() * E::kKeyPitch + key + 2 * E::t();
#pragma unroll
    for (int c = 0; c < 4; ++c, to += 8 * E::kKeyPitch)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (&sum)[4] = sums[c / 2][i];
        *reinterpret_cast<unsigned*>(to + 8 * i) =
            pack<T>(sum[c % 2 * 2] * scale, sum[c % 2 * 2 + 1] * scale);
      }
  }

  // What the window does not hold: biases of far keys, added to products,
  __device__ void add_far(Scores& s, int r) const {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const int n = local_key(i / 2 % 2), column = 4 * E::t() + i / 4 * 2 + i % 2;
      if (!window.is_far(n)) continue;
      const auto [table, pos] = far_place(n);
      const float value =
          as_exponent(table.value(pos[0], pos[1], r, column).value) * plan.inverse_factor;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j == i) (&s[0][0][0])[j] += value;
    }
  }
  // and their gradients.
  __device__ void take_far(WalkedKey (&keys)[2], const Scores& grad, int r) const {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const int n = local_key(i / 2 % 2), column = 4 * E::t() + i / 4 * 2 + i % 2;
      if (!window.is_far(n)) continue;
      float g = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) g = j == i ? (&grad[0][0][0])[j] : g;
      const auto [table, pos] = far_place(n);
      const Bilinear<float> b = table.value(pos[0], pos[1], r, column);
      float* to = static_cast<float*>(p.grad_table) +
                  place.at.head * p.in.shape.table_h * p.in.shape.table_w;
      table.scatter(pos[0], pos[1], r, column, g,
                    [&](int64_t cell, float value) { atomicAdd(to + cell, value); });
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (j == i / 2 % 2) keys[j].along_y += g * b.d_y, keys[j].along_x += g * b.d_x;
    }
  }
  struct FarPlace {
    WholeTable<float> table;
    const float* pos;
  };
  __device__ FarPlace far_place(int n) const {
    return {{p.in, plan, int(opaque(place.at.head))},
            key_pos<float>(p.in, plan, place.at, place.first_key + n)};
  }
};

}  // namespace dat::cuda

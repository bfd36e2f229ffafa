// The offset network behind its depthwise convolution: layer norm, GELU, and the product that makes
// two offsets, along y and x, of a key's channels.
//
// A key is a row of channels, and a lane a channel. Rows are cut into parts that do not depend on
// the number of threads, so that sums over them come out the same.
#pragma once

#include <cmath>
#include <memory>

#include "../math/gelu.h"
#include "tile.h"

namespace dat::cpu::DAT_SIMD {

// Cumulative and density of the normal distribution.
template <class T>
struct Normal {
  Vec<T> cumulative, density;

  DAT_INLINE explicit Normal(Vec<T> x) {
    const Vec<T> bell = exp2<T>(x * x * T(-0.5 * kLog2e));
    density = bell * T(kInverseRootTwoPi);
    if constexpr (sizeof(T) == 4) {
      const Vec<T> tail = mills_ratio(absolute<T>(x)) * bell;
      cumulative = x < 0 ? tail : 1 - tail;
    } else {
      for (int i = 0; i < kLanes<T>; ++i) cumulative[i] = std::erfc(x[i] * -M_SQRT1_2) / 2;
    }
  }
};

// A row of channels by vectors; the last one's lanes may be past the end, and are 0.
template <class T>
struct ChannelVectors {
  int64_t channels;

  template <class F>
  DAT_INLINE void each(const T* row, const F& f) const {
    constexpr int L = kLanes<T>;
    const int64_t whole = channels / L * L;
    for (int64_t c = 0; c < whole; c += L) f(c, load(row + c), IVec<T>{} == IVec<T>{});
    if (whole == channels) return;
    T lanes[L] = {};
    std::copy(row + whole, row + channels, lanes);
    f(whole, load(lanes), lane_index<T>() < Int<T>(channels - whole));
  }
  DAT_INLINE void store_at(T* row, int64_t c, Vec<T> value) const {
    if (c + kLanes<T> <= channels) return store(row + c, value);
    for (int64_t i = c; i < channels; ++i) row[i] = value[i - c];
  }
};

// The parameters, padded with zeros to whole vectors, and sums of their gradients.
template <class T>
struct OffsetHeadWork {
  static constexpr int kParameters = 4;  // norm's weight and bias, the product's rows y and x
  const OffsetHeadShape& shape;
  const ChannelVectors<T> vectors{shape.channels};
  T* parameter[kParameters];
  T* row;

  static int64_t padded(const OffsetHeadShape& shape) { return round_up<T>(shape.channels); }
  OffsetHeadWork(Arena& arena, const OffsetHeadInputs& in) : shape(in.shape) {
    for (T*& p : parameter) p = arena.take<T>(padded(shape));
    row = arena.take<T>(padded(shape));
  }
  void take(const OffsetHeadInputs& in) const {
    const int64_t channels = shape.channels, padding = padded(shape) - channels;
    const T* weight = static_cast<const T*>(in.weight);
    const T* from[kParameters] = {static_cast<const T*>(in.norm_weight),
                                  static_cast<const T*>(in.norm_bias), weight, weight + channels};
    for (int i = 0; i < kParameters; ++i)
      std::fill_n(std::copy_n(from[i], channels, parameter[i]), padding, T(0));
  }

  struct Moments {
    T mean, scale;  // scale: 1 / standard deviation
  };
  DAT_INLINE Moments moments(const T* features) const {
    Vec<T> sum{}, squares{};
    vectors.each(features, [&](int64_t, Vec<T> f, IVec<T>) { sum += f; });
    const T mean = lane_sum<T>(sum) / T(shape.channels);
    vectors.each(features, [&](int64_t, Vec<T> f, IVec<T> exists) {
      const Vec<T> apart = exists ? f - mean : Vec<T>{};
      squares += apart * apart;
    });
    const T variance = lane_sum<T>(squares) / T(shape.channels);
    return {mean, 1 / std::sqrt(variance + T(shape.eps))};
  }

  void forward(const T* features, T& y, T& x) const {
    const auto [mean, scale] = moments(features);
    Vec<T> sum_y{}, sum_x{};
    vectors.each(features, [&, mean = mean, scale = scale](int64_t c, Vec<T> f, IVec<T>) {
      const Vec<T> n = (f - mean) * scale * load(parameter[0] + c) + load(parameter[1] + c);
      const Vec<T> active = gelu(n, Normal<T>(n).cumulative);
      sum_y += active * load(parameter[2] + c), sum_x += active * load(parameter[3] + c);
    });
    y = lane_sum<T>(sum_y), x = lane_sum<T>(sum_x);
  }

  // Adds to grads [kParameters][padded].
  void backward(const T* features, T grad_y, T grad_x, T* grad_features, T* grads) const {
    const auto [mean, scale] = moments(features);
    T* grad[kParameters];
    for (int i = 0; i < kParameters; ++i) grad[i] = grads + i * padded(shape);
    // Of the normalised features: their gradients' sum, and that of the products with them.
    Vec<T> sum{}, product{};
    vectors.each(features, [&, mean = mean, scale = scale](int64_t c, Vec<T> f, IVec<T> exists) {
      const Vec<T> normal = exists ? (f - mean) * scale : Vec<T>{};
      const Vec<T> n = normal * load(parameter[0] + c) + load(parameter[1] + c);
      const Normal<T> at(n);
      const Vec<T> active = gelu(n, at.cumulative);
      const Vec<T> arrives = grad_y * load(parameter[2] + c) + grad_x * load(parameter[3] + c);
      const Vec<T> of_n = arrives * gelu_slope(n, at.cumulative, at.density);
      const Vec<T> of_normal = of_n * load(parameter[0] + c);
      const Vec<T> added[kParameters] = {of_n * normal, of_n, grad_y * active, grad_x * active};
      for (int i = 0; i < kParameters; ++i) store(grad[i] + c, load(grad[i] + c) + added[i]);
      store(row + c, of_normal);
      sum += of_normal, product += of_normal * normal;
    });
    const T mean_grad = lane_sum<T>(sum) / T(shape.channels);
    const T mean_product = lane_sum<T>(product) / T(shape.channels);
    vectors.each(features, [&, mean = mean, scale = scale](int64_t c, Vec<T> f, IVec<T>) {
      const Vec<T> normal = (f - mean) * scale;
      vectors.store_at(grad_features, c,
                       (load(row + c) - mean_grad - normal * mean_product) * scale);
    });
  }
};

constexpr int kRowParts = 8;

// Calls f(work, part, row, the row's features, place of its offset along y in [images, 2, keys])
// for all rows.
template <class T, class F>
void for_each_row(const OffsetHeadInputs& in, const Threads& threads, const F& f) {
  const OffsetHeadShape& shape = in.shape;
  parallel(threads, kRowParts, [&](int part) {
    const auto work = make_workspace<OffsetHeadWork<T>>(in);
    work.take(in);
    const int64_t end = shape.rows() * (part + 1) / kRowParts;
    for (int64_t row = shape.rows() * part / kRowParts; row < end; ++row) {
      const int64_t image = row / shape.keys, key = row % shape.keys;
      f(work, part, row, static_cast<const T*>(in.features) + row * shape.channels,
        image * 2 * shape.keys + key);
    }
  });
}

template <class T>
void offset_head_forward(const OffsetHeadForward& p, const Threads& threads) {
  T* offset = static_cast<T*>(p.offset);
  for_each_row<T>(p.in, threads,
                  [&](const auto& work, int, int64_t, const T* features, int64_t at) {
                    work.forward(features, offset[at], offset[at + p.in.shape.keys]);
                  });
}

template <class T>
void offset_head_backward(const OffsetHeadBackward& p, const Threads& threads) {
  const OffsetHeadShape& shape = p.in.shape;
  const T* grad = static_cast<const T*>(p.grad_offset);
  T* grad_features = static_cast<T*>(p.grad_features);
  const int64_t padded = OffsetHeadWork<T>::padded(shape);
  const int64_t size = OffsetHeadWork<T>::kParameters * padded;
  const std::unique_ptr<T[]> sums(new T[size_t(kRowParts * size)]());
  for_each_row<T>(p.in, threads,
                  [&](const auto& work, int part, int64_t row, const T* features, int64_t at) {
                    work.backward(features, grad[at], grad[at + shape.keys],
                                  grad_features + row * shape.channels, sums.get() + part * size);
                  });
  T* weight = static_cast<T*>(p.grad_weight);
  T* to[] = {static_cast<T*>(p.grad_norm_weight), static_cast<T*>(p.grad_norm_bias), weight,
             weight + shape.channels};
  for (int i = 0; i < OffsetHeadWork<T>::kParameters; ++i)
    for (int64_t c = 0; c < shape.channels; ++c) {
      T sum = 0;
      for (int part = 0; part < kRowParts; ++part) sum += sums[part * size + i * padded + c];
      to[i][c] = sum;
    }
}

}  // namespace dat::cpu::DAT_SIMD

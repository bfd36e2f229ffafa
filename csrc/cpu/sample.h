// deform_sample: offsets to positions to bilinear features, and its backward.
#pragma once

#include <atomic>
#include <memory>

#include "../math/bilinear.h"
#include "../math/grid.h"
#include "tile.h"

namespace dat::cpu::DAT_SIMD {

// One key's four taps on the map, [y][x]: where they are, and whether they count.
template <class T>
struct Taps {
  int64_t element[4];  // in x, by its strides
  int64_t cell[4];     // in a contiguous plane
  bool inside[4];
  T fy, fx;
};

template <class T>
DAT_INLINE Taps<T> locate(const SampleShape& shape, const MapView& x, T pos_y, T pos_x) {
  const Cell<T> y = cell_of(map_coordinate(pos_y, shape.height), shape.height);
  const Cell<T> c = cell_of(map_coordinate(pos_x, shape.width), shape.width);
  Taps<T> taps{{}, {}, {}, y.fraction, c.fraction};
  // NaN in one coordinate makes the value, hence both derivatives, NaN.
  if (std::isnan(y.fraction + c.fraction)) taps.fy = taps.fx = T(NAN);
  for (int tap = 0; tap < 4; ++tap) {
    const int64_t i = y.index + tap / 2, j = c.index + tap % 2;
    if (i < 0 || i >= shape.height || j < 0 || j >= shape.width) continue;
    taps.inside[tap] = true;
    taps.element[tap] = i * x.row + j * x.column;
    taps.cell[tap] = i * shape.width + j;
  }
  return taps;
}

template <class T>
DAT_INLINE BoundedPosition<T> bounded(const SampleShape& shape, const void* offset, int64_t bg,
                                      int axis, int64_t key) {
  const int64_t n = shape.keys(), count = axis ? shape.keys_w : shape.keys_h;
  const int64_t index = axis ? key % shape.keys_w : key / shape.keys_w;
  const T value = static_cast<const T*>(offset)[(bg * 2 + axis) * n + key];
  return bound_offset(value, reference_point<T>(index, count, shape.version),
                      T(shape.offset_range_factor), count, shape.version);
}

// Taps of all keys of one (image, group).
template <class T>
void locate_all(const SampleShape& shape, const MapView& x, const void* offset, int64_t bg,
                Taps<T>* taps, T* pos) {
  for (int64_t n = 0; n < shape.keys(); ++n) {
    const auto y = bounded<T>(shape, offset, bg, 0, n), c = bounded<T>(shape, offset, bg, 1, n);
    taps[n] = locate(shape, x, y.pos, c.pos);
    if (pos) pos[2 * n] = y.pos, pos[2 * n + 1] = c.pos;
  }
}

template <class S, class T>
DAT_INLINE Bilinear<T> interpolate(const S* plane, const Taps<T>& taps) {
  T value[4];
  for (int i = 0; i < 4; ++i) value[i] = taps.inside[i] ? T(to_acc(plane[taps.element[i]])) : T(0);
  return bilinear(value[0], value[1], value[2], value[3], taps.fy, taps.fx);
}

// Channels of a group are cut into this many parts, whatever the number of threads, so that sums
// over channels come out the same.
constexpr int64_t kChannelParts = 4;

// Calls f(image-and-group, part, first channel in the map, end) for all parts, in parallel.
template <class F>
void for_each_part(const SampleShape& shape, const Threads& threads, const F& f) {
  const int64_t per_group = shape.channels / shape.groups;
  const int64_t total = shape.batch * shape.groups * kChannelParts;
  std::atomic<int64_t> next{0};
  parallel(threads, threads.count, [&](int) {
    for (int64_t i; (i = next.fetch_add(1)) < total;) {
      const int64_t bg = i / kChannelParts, part = i % kChannelParts;
      const int64_t first = bg % shape.groups * per_group;
      f(bg, part, first + per_group * part / kChannelParts,
        first + per_group * (part + 1) / kChannelParts);
    }
  });
}

template <class S>
void sample_forward(const SampleForward& p, const Threads& threads) {
  using T = acc_t<S>;
  const SampleShape& shape = p.shape;
  const int64_t keys = shape.keys();
  for_each_part(shape, threads, [&](int64_t bg, int64_t part, int64_t first, int64_t end) {
    auto* taps = static_cast<Taps<T>*>(thread_scratch(size_t(keys) * sizeof(Taps<T>)));
    T* pos = part ? nullptr : static_cast<T*>(p.pos) + bg * keys * 2;
    locate_all<T>(shape, p.x, p.offset, bg, taps, pos);
    const int64_t b = bg / shape.groups;
    for (int64_t c = first; c < end; ++c) {
      const S* plane = head_data<const S>(p.x, b, c);
      S* to = static_cast<S*>(p.sampled) + (b * shape.channels + c) * keys;
      for (int64_t n = 0; n < keys; ++n) to[n] = from_acc<S>(interpolate(plane, taps[n]).value);
    }
  });
}

template <class S>
struct SampleBackwardWork {
  using T = acc_t<S>;

  Taps<T>* taps;
  T* plane;  // [H, W] gradient of one channel, in the accumulation type

  SampleBackwardWork(Arena& arena, const SampleShape& shape)
      : taps(arena.take<Taps<T>>(shape.keys())), plane(arena.take<T>(shape.height * shape.width)) {}
};

// One channel: writes its grad_x plane and adds to the positions' gradient, [N, 2] in cells.
template <class S, class T = acc_t<S>>
void sample_backward_channel(const SampleBackward& p, int64_t b, int64_t c,
                             const SampleBackwardWork<S>& work, T* grad_cell) {
  const SampleShape& shape = p.shape;
  const int64_t area = shape.height * shape.width;
  const S* plane = head_data<const S>(p.x, b, c);
  const S* grad = head_data<const S>(p.grad_sampled, b, c);
  std::fill_n(work.plane, area, T(0));
  for (int64_t n = 0; n < shape.keys(); ++n) {
    const Taps<T>& taps = work.taps[n];
    const T g = T(to_acc(grad[n * p.grad_sampled.column]));
    const Bilinear<T> at = interpolate(plane, taps);
    grad_cell[2 * n] += g * at.d_y;
    grad_cell[2 * n + 1] += g * at.d_x;
    const TapWeights<T> w = tap_weights(taps.fy, taps.fx);
    const T weight[4] = {w.w00, w.w01, w.w10, w.w11};
    for (int i = 0; i < 4; ++i)
      if (taps.inside[i]) work.plane[taps.cell[i]] += g * weight[i];
  }
  S* to = static_cast<S*>(p.grad_x) + (b * shape.channels + c) * area;
  for (int64_t i = 0; i < area; ++i) to[i] = from_acc<S>(work.plane[i]);
}

template <class S>
void sample_backward(const SampleBackward& p, const Threads& threads) {
  using T = acc_t<S>;
  const SampleShape& shape = p.shape;
  const int64_t keys = shape.keys(), pairs = shape.batch * shape.groups;
  // Gradient in cells, [part][B * G][N, 2]: each part of the channels has its own.
  const std::unique_ptr<T[]> grad_cell(new T[size_t(kChannelParts * pairs * keys * 2)]());
  for_each_part(shape, threads, [&](int64_t bg, int64_t part, int64_t first, int64_t end) {
    const auto work = make_workspace<SampleBackwardWork<S>>(shape);
    locate_all<T>(shape, p.x, p.offset, bg, work.taps, static_cast<T*>(nullptr));
    T* grad = grad_cell.get() + (part * pairs + bg) * keys * 2;
    for (int64_t c = first; c < end; ++c)
      sample_backward_channel(p, bg / shape.groups, c, work, grad);
  });
  const T along_y = map_coordinate_slope<T>(shape.height);
  const T along_x = map_coordinate_slope<T>(shape.width);
  const T* grad_pos = static_cast<const T*>(p.grad_pos);
  T* grad_offset = static_cast<T*>(p.grad_offset);
  for (int64_t bg = 0; bg < pairs; ++bg)
    for (int64_t n = 0; n < keys; ++n) {
      T y = 0, x = 0;
      for (int64_t part = 0; part < kChannelParts; ++part) {
        const T* grad = grad_cell.get() + ((part * pairs + bg) * keys + n) * 2;
        y += grad[0] * along_y, x += grad[1] * along_x;
      }
      if (grad_pos) y += grad_pos[(bg * keys + n) * 2], x += grad_pos[(bg * keys + n) * 2 + 1];
      const auto slope_y = bounded<T>(shape, p.offset, bg, 0, n).slope;
      const auto slope_x = bounded<T>(shape, p.offset, bg, 1, n).slope;
      grad_offset[bg * 2 * keys + n] = y * slope_y;
      grad_offset[(bg * 2 + 1) * keys + n] = x * slope_x;
    }
}

}  // namespace dat::cpu::DAT_SIMD

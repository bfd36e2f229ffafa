// deform_sample: offsets to positions to bilinear features, and its backward.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

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

// Calls f(image-and-group, key, y, x) for all bounded positions, in parallel: a hyperbolic tangent
// costs as much as a dozen channels.
template <class T, class F>
void for_each_position(const SampleShape& shape, const void* offset, const Threads& threads,
                       const F& f) {
  parallel(threads, int(shape.batch * shape.groups), [&](int bg) {
    for (int64_t n = 0; n < shape.keys(); ++n)
      f(bg, n, bounded<T>(shape, offset, bg, 0, n), bounded<T>(shape, offset, bg, 1, n));
  });
}

// Taps of all keys of one (image, group), from pos [N, 2].
template <class T>
void locate_all(const SampleShape& shape, const MapView& x, const T* pos, Taps<T>* taps) {
  for (int64_t n = 0; n < shape.keys(); ++n) taps[n] = locate(shape, x, pos[2 * n], pos[2 * n + 1]);
}

template <class S, class T>
DAT_INLINE Bilinear<T> interpolate(const S* plane, const Taps<T>& taps) {
  T value[4];
  for (int i = 0; i < 4; ++i) value[i] = taps.inside[i] ? T(to_acc(plane[taps.element[i]])) : T(0);
  return bilinear(value[0], value[1], value[2], value[3], taps.fy, taps.fx);
}

// Channels of a group are cut into so many parts, whatever the number of threads, so that sums over
// channels come out the same: enough of them to share, each worth the way to its keys' taps.
inline int64_t channel_parts(const SampleShape& shape) {
  return std::clamp<int64_t>(shape.channels / shape.groups / 64, 1, 4);
}

// Calls f(image-and-group, part, first channel in the map, end) for all parts, in parallel.
template <class F>
void for_each_part(const SampleShape& shape, const Threads& threads, const F& f) {
  const int64_t per_group = shape.channels / shape.groups, parts = channel_parts(shape);
  const int64_t total = shape.batch * shape.groups * parts;
  std::atomic<int64_t> next{0};
  parallel(threads, threads.count, [&](int) {
    for (int64_t i; (i = next.fetch_add(1)) < total;) {
      const int64_t bg = i / parts, part = i % parts;
      const int64_t first = bg % shape.groups * per_group;
      f(bg, part, first + per_group * part / parts, first + per_group * (part + 1) / parts);
    }
  });
}

// Lanes of channels from c on.
template <class S, class T = acc_t<S>>
DAT_INLINE Vec<T> load_channels(const S* from, int64_t stride = 1) {
  if constexpr (std::is_same_v<S, T>)
    if (stride == 1) return load(from);
  T lanes[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = T(to_acc(from[i * stride]));
  return load(lanes);
}

// The four taps' channels, from the map's pixel 0 on; `zeros` stand for those outside.
template <class S>
struct TapRows {
  const S* row[4];

  template <class T>
  TapRows(const S* map, const Taps<T>& taps, const S* zeros) {
    for (int i = 0; i < 4; ++i) row[i] = taps.inside[i] ? map + taps.element[i] : zeros;
  }
  template <class T = acc_t<S>>
  Bilinear<Vec<T>> lanes(int64_t c, const Taps<T>& taps) const {
    return bilinear<Vec<T>>(load_channels(row[0] + c), load_channels(row[1] + c),
                            load_channels(row[2] + c), load_channels(row[3] + c), splat(taps.fy),
                            splat(taps.fx));
  }
  template <class T = acc_t<S>>
  Bilinear<T> one(int64_t c, const Taps<T>& taps) const {
    return bilinear(T(to_acc(row[0][c])), T(to_acc(row[1][c])), T(to_acc(row[2][c])),
                    T(to_acc(row[3][c])), taps.fy, taps.fx);
  }
};

// Channels [first, end) of all keys where a pixel's channels are neighbours in memory.
template <class S, class T = acc_t<S>>
void sample_rows(const SampleForward& p, int64_t b, int64_t first, int64_t end,
                 const Taps<T>* taps) {
  constexpr int L = kLanes<T>;
  const int64_t count = end - first;
  const std::vector<S> zeros(size_t(count), from_acc<S>(T(0)));
  for (int64_t n = 0; n < p.shape.keys(); ++n) {
    const TapRows<S> rows(head_data<const S>(p.x, b, first), taps[n], zeros.data());
    S* to = head_data<S>(p.sampled, b, first) + n * p.sampled.column;
    int64_t c = 0;
    for (; c + L <= count; c += L) {
      const Vec<T> value = rows.lanes(c, taps[n]).value;
      if constexpr (std::is_same_v<S, T>)
        store(to + c, value);
      else
        for (int i = 0; i < L; ++i) to[c + i] = from_acc<S>(value[i]);
    }
    for (; c < count; ++c) to[c] = from_acc<S>(rows.one(c, taps[n]).value);
  }
}

template <class S>
void sample_forward(const SampleForward& p, const Threads& threads) {
  using T = acc_t<S>;
  const SampleShape& shape = p.shape;
  const int64_t keys = shape.keys();
  T* pos = static_cast<T*>(p.pos);
  for_each_position<T>(shape, p.offset, threads, [&](int64_t bg, int64_t n, auto y, auto x) {
    pos[(bg * keys + n) * 2] = y.pos, pos[(bg * keys + n) * 2 + 1] = x.pos;
  });
  for_each_part(shape, threads, [&](int64_t bg, int64_t, int64_t first, int64_t end) {
    auto* taps = static_cast<Taps<T>*>(thread_scratch(size_t(keys) * sizeof(Taps<T>)));
    locate_all(shape, p.x, pos + bg * keys * 2, taps);
    const int64_t b = bg / shape.groups;
    if (p.x.channel == 1) return sample_rows<S>(p, b, first, end, taps);
    for (int64_t c = first; c < end; ++c) {
      const S* plane = head_data<const S>(p.x, b, c);
      S* to = head_data<S>(p.sampled, b, c);
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
  S* to = head_data<S>(p.grad_x, b, c);
  for (int64_t i = 0; i < area; ++i) to[i * p.grad_x.column] = from_acc<S>(work.plane[i]);
}

// Channels [first, end) as sample_rows; sums up where grad_x lies.
template <class T>
void sample_backward_rows(const SampleBackward& p, int64_t b, int64_t first, int64_t end,
                          const Taps<T>* all_taps, T* grad_cell) {
  constexpr int L = kLanes<T>;
  const int64_t count = end - first, stride = p.grad_sampled.channel;
  const std::vector<T> zeros(size_t(count), T(0));
  T* grad_x = head_data<T>(p.grad_x, b, first);
  for (int64_t i = 0; i < p.shape.height * p.shape.width; ++i)
    std::fill_n(grad_x + i * p.grad_x.column, count, T(0));
  for (int64_t n = 0; n < p.shape.keys(); ++n) {
    const Taps<T>& taps = all_taps[n];
    const TapRows<T> rows(head_data<const T>(p.x, b, first), taps, zeros.data());
    const T* grad = head_data<const T>(p.grad_sampled, b, first) + n * p.grad_sampled.column;
    const TapWeights<T> w = tap_weights(taps.fy, taps.fx);
    const T weight[4] = {w.w00, w.w01, w.w10, w.w11};
    Vec<T> sum_y{}, sum_x{};
    int64_t c = 0;
    for (; c + L <= count; c += L) {
      const Vec<T> g = load_channels(grad + c * stride, stride);
      const Bilinear<Vec<T>> at = rows.lanes(c, taps);
      sum_y += g * at.d_y, sum_x += g * at.d_x;
      for (int i = 0; i < 4; ++i) {
        T* to = grad_x + taps.cell[i] * p.grad_x.column + c;
        if (taps.inside[i]) store(to, load(to) + g * weight[i]);
      }
    }
    T y = lane_sum<T>(sum_y), x = lane_sum<T>(sum_x);
    for (; c < count; ++c) {
      const T g = grad[c * stride];
      const Bilinear<T> at = rows.one(c, taps);
      y += g * at.d_y, x += g * at.d_x;
      for (int i = 0; i < 4; ++i)
        if (taps.inside[i]) grad_x[taps.cell[i] * p.grad_x.column + c] += g * weight[i];
    }
    grad_cell[2 * n] += y, grad_cell[2 * n + 1] += x;
  }
}

template <class S>
void sample_backward(const SampleBackward& p, const Threads& threads) {
  using T = acc_t<S>;
  const SampleShape& shape = p.shape;
  const int64_t keys = shape.keys(), pairs = shape.batch * shape.groups;
  const int64_t parts = channel_parts(shape);
  // Positions and their slopes in the offset, [B * G][N, 2].
  const std::unique_ptr<T[]> pos(new T[size_t(pairs * keys * 2)]);
  const std::unique_ptr<T[]> slope(new T[size_t(pairs * keys * 2)]);
  for_each_position<T>(shape, p.offset, threads, [&](int64_t bg, int64_t n, auto y, auto x) {
    const int64_t at = (bg * keys + n) * 2;
    pos[at] = y.pos, pos[at + 1] = x.pos;
    slope[at] = y.slope, slope[at + 1] = x.slope;
  });
  // Gradient in cells, [part][B * G][N, 2]: each part of the channels has its own.
  const std::unique_ptr<T[]> grad_cell(new T[size_t(parts * pairs * keys * 2)]());
  for_each_part(shape, threads, [&](int64_t bg, int64_t part, int64_t first, int64_t end) {
    const auto work = make_workspace<SampleBackwardWork<S>>(shape);
    locate_all(shape, p.x, pos.get() + bg * keys * 2, work.taps);
    T* grad = grad_cell.get() + (part * pairs + bg) * keys * 2;
    const int64_t b = bg / shape.groups;
    if constexpr (std::is_same_v<S, T>)  // halves are summed up in planes, not as halves
      if (p.x.channel == 1) return sample_backward_rows(p, b, first, end, work.taps, grad);
    for (int64_t c = first; c < end; ++c) sample_backward_channel(p, b, c, work, grad);
  });
  const T along_y = map_coordinate_slope<T>(shape.height);
  const T along_x = map_coordinate_slope<T>(shape.width);
  const T* grad_pos = static_cast<const T*>(p.grad_pos);
  T* grad_offset = static_cast<T*>(p.grad_offset);
  for (int64_t bg = 0; bg < pairs; ++bg)
    for (int64_t n = 0; n < keys; ++n) {
      T y = 0, x = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const T* grad = grad_cell.get() + ((part * pairs + bg) * keys + n) * 2;
        y += grad[0] * along_y, x += grad[1] * along_x;
      }
      if (grad_pos) y += grad_pos[(bg * keys + n) * 2], x += grad_pos[(bg * keys + n) * 2 + 1];
      grad_offset[bg * 2 * keys + n] = y * slope[(bg * keys + n) * 2];
      grad_offset[(bg * 2 + 1) * keys + n] = x * slope[(bg * keys + n) * 2 + 1];
    }
}

}  // namespace dat::cpu::DAT_SIMD

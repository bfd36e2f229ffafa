// The depthwise convolution of the offset network, and its backward.
//
// A lane is a channel, and a tap of the filter is one step. Maps in rows of channels are read and
// written where they lie; of others a block of channels is transposed on the way in and out.
//
// A task has a block of channels of some images. The parts that the images are cut into do not
// depend on the number of threads, so that sums over them come out the same.
#pragma once

#include <atomic>
#include <memory>

#include "tile.h"

namespace dat::cpu::DAT_SIMD {

constexpr int64_t kImageParts = 8;

// Pixels of a map, or results, in rows of channels.
template <class T>
struct ChannelRows {
  T* data;
  int64_t row, column;  // strides

  DAT_INLINE T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// Some channels of one image [channels][H][W], in any layout.
template <class S>
struct ChannelPlanes {
  S* data;
  const MapView& view;
  int64_t channels, height, width;

  // Calls block(first pixel) for runs of L pixels of L planes, else one(pixel, its first channel).
  template <int L, class Block, class One>
  DAT_INLINE void each(const Block& block, const One& one) const {
    const int64_t pixels = height * width;
    int64_t pixel = 0;
    if (channels == L && view.column == 1 && (view.row == width || height == 1))
      for (; pixel + L <= pixels; pixel += L) block(pixel);
    for (; pixel < pixels; ++pixel)
      one(pixel, data + pixel / width * view.row + pixel % width * view.column);
  }
};

// From planes to rows of `pitch` channels, and back.
template <class T>
void to_rows(const ChannelPlanes<const T>& from, T* to, int64_t pitch) {
  from.template each<kLanes<T>>(
      [&](int64_t pixel) {
        transpose_block(from.data + pixel, from.view.channel, to + pixel * pitch, pitch);
      },
      [&](int64_t pixel, const T* at) {
        if (from.view.channel == 1) return void(std::copy_n(at, from.channels, to + pixel * pitch));
        for (int64_t c = 0; c < from.channels; ++c)
          to[pixel * pitch + c] = at[c * from.view.channel];
      });
}
template <class T>
void from_rows(const T* from, int64_t pitch, const ChannelPlanes<T>& to) {
  to.template each<kLanes<T>>(
      [&](int64_t pixel) {
        transpose_block(from + pixel * pitch, pitch, to.data + pixel, to.view.channel);
      },
      [&](int64_t pixel, T* at) {
        for (int64_t c = 0; c < to.channels; ++c) at[c * to.view.channel] = from[pixel * pitch + c];
      });
}

// Numbers [first, end).
struct Span {
  int64_t first, end;
};
// i with 0 <= i * stride + shift < size, of [0, count).
inline Span multiples(int64_t stride, int64_t shift, int64_t size, int64_t count) {
  const int64_t first = shift >= 0 ? 0 : ceil_div(-shift, stride);
  return {first, size <= shift ? 0 : std::min(ceil_div(size - shift, stride), count)};
}

// A task's work on blocks of N vectors of channels.
template <class T, int N>
struct DepthwiseWork {
  static constexpr int kWidth = N * kLanes<T>;
  const DepthwiseShape& shape;
  T *weight, *grad_weight;        // [taps][kWidth]
  T *bias, *grad_bias;            // [kWidth]
  T *x_rows, *grad_rows, *grads;  // maps', their gradients' and results' gradients' rows
  Span* columns;                  // of results that a column of the map is under, [W]

  DepthwiseWork(Arena& arena, const DepthwiseShape& shape_, bool direct, bool gradients)
      : shape(shape_) {
    const int64_t pixels = direct ? 0 : shape.height * shape.width * kWidth;
    weight = arena.take<T>(shape.taps() * kWidth);
    bias = arena.take<T>(kWidth);
    x_rows = arena.take<T>(pixels);
    if (!gradients) return;
    grad_weight = arena.take<T>(shape.taps() * kWidth);
    grad_bias = arena.take<T>(kWidth);
    grad_rows = arena.take<T>(pixels);
    grads = arena.take<T>(shape.results() * kWidth);
    columns = arena.take<Span>(shape.width);
  }

  // The rows of a block that may have fewer channels: `to`, unless they lie like that.
  template <class S>
  ChannelRows<S> rows_of(const ChannelPlanes<S>& planes, T* to) const {
    if (to) return {to, planes.width * kWidth, kWidth};
    return {planes.data, planes.view.row, planes.view.column};
  }
  // Those of a map or of results, taken.
  ChannelRows<const T> take(const ChannelPlanes<const T>& from, T* to) const {
    if (to) to_rows(from, to, kWidth);
    return rows_of(from, to);
  }

  void take_weights(const void* all, int64_t channel, int64_t count) const {
    const T* from = static_cast<const T*>(all) + channel * shape.taps();
    for (int64_t tap = 0; tap < shape.taps(); ++tap)
      for (int64_t c = 0; c < kWidth; ++c)
        weight[tap * kWidth + c] = c < count ? from[c * shape.taps() + tap] : T(0);
  }

  using Sums = Vec<T>[N];
  DAT_INLINE static void load_sums(Sums& sums, const T* from) {
    for (int n = 0; n < N; ++n) sums[n] = load(from + n * kLanes<T>);
  }
  DAT_INLINE static void store_sums(T* to, const Sums& sums) {
    for (int n = 0; n < N; ++n) store(to + n * kLanes<T>, sums[n]);
  }
  DAT_INLINE static void add_product(Sums& sums, const T* a, const T* b) {
    for (int n = 0; n < N; ++n) sums[n] += load(a + n * kLanes<T>) * load(b + n * kLanes<T>);
  }

  // The taps of results in row or column i that are on a map of `size` rows or columns.
  Span taps_of(int64_t i, int64_t size) const {
    const int64_t start = i * shape.stride - shape.padding;
    return {std::max<int64_t>(-start, 0), std::min(shape.kernel, size - start)};
  }
  // Results that have row or column i of the map under one of their taps.
  Span results_over(int64_t i, int64_t count) const {
    const int64_t at = i + shape.padding;
    return {at < shape.kernel ? 0 : (at - shape.kernel) / shape.stride + 1,
            std::min(at / shape.stride + 1, count)};
  }

  // f(i, j, sums): what is stored at result (i, j).
  template <class F>
  void forward(const ChannelRows<const T>& x, const F& f) const {
    for (int64_t i = 0; i < shape.out_h; ++i) {
      const Span us = taps_of(i, shape.height);
      for (int64_t j = 0; j < shape.out_w; ++j) {
        const Span vs = taps_of(j, shape.width);
        Sums sums;
        load_sums(sums, bias);
        for (int64_t u = us.first; u < us.end; ++u) {
          const T* from = x.at(i * shape.stride - shape.padding + u,
                               j * shape.stride - shape.padding + vs.first);
          const T* w = weight + (u * shape.kernel + vs.first) * kWidth;
          for (int64_t v = vs.first; v < vs.end; ++v, from += x.column, w += kWidth)
            add_product(sums, from, w);
        }
        f(i, j, sums);
      }
    }
  }

  void clear_sums() const {
    std::fill_n(grad_weight, shape.taps() * kWidth, T(0));
    std::fill_n(grad_bias, kWidth, T(0));
    for (int64_t column = 0; column < shape.width; ++column)
      columns[column] = results_over(column, shape.out_w);
  }

  void add_grad_weight(const ChannelRows<const T>& x) const {
    T* to = grad_weight;
    for (int64_t u = 0; u < shape.kernel; ++u) {
      const Span is = multiples(shape.stride, u - shape.padding, shape.height, shape.out_h);
      for (int64_t v = 0; v < shape.kernel; ++v, to += kWidth) {
        const Span js = multiples(shape.stride, v - shape.padding, shape.width, shape.out_w);
        Sums sums;
        load_sums(sums, to);
        for (int64_t i = is.first; i < is.end; ++i) {
          const T* from = x.at(i * shape.stride - shape.padding + u,
                               js.first * shape.stride - shape.padding + v);
          const T* g = grads + (i * shape.out_w + js.first) * kWidth;
          for (int64_t j = js.first; j < js.end; ++j, from += shape.stride * x.column, g += kWidth)
            add_product(sums, from, g);
        }
        store_sums(to, sums);
      }
    }
    Sums sums;
    load_sums(sums, grad_bias);
    for (int64_t i = 0; i < shape.results(); ++i)
      for (int n = 0; n < N; ++n) sums[n] += load(grads + i * kWidth + n * kLanes<T>);
    store_sums(grad_bias, sums);
  }

  // `more`: what is added to, or null; may be grad_x itself.
  void make_grad_x(const ChannelRows<const T>& more, const ChannelRows<T>& grad_x) const {
    for (int64_t row = 0; row < shape.height; ++row) {
      const Span is = results_over(row, shape.out_h);
      for (int64_t column = 0; column < shape.width; ++column) {
        const Span js = columns[column];
        Sums sums = {};
        if (more.data) load_sums(sums, more.at(row, column));
        for (int64_t i = is.first; i < is.end; ++i) {
          const int64_t u = row + shape.padding - i * shape.stride;
          const int64_t v = column + shape.padding - js.first * shape.stride;
          const T* w = weight + (u * shape.kernel + v) * kWidth;
          const T* g = grads + (i * shape.out_w + js.first) * kWidth;
          for (int64_t j = js.first; j < js.end; ++j, w -= shape.stride * kWidth, g += kWidth)
            add_product(sums, g, w);
        }
        store_sums(grad_x.at(row, column), sums);
      }
    }
  }
};

// A block of channels of one image, of a map [B, C, H, W].
template <class S>
ChannelPlanes<S> map_planes(const MapView& map, const DepthwiseShape& shape, int64_t image,
                            int64_t channel, int64_t count) {
  const int64_t first = image % shape.groups * shape.filters() + channel;
  return {head_data<S>(map, image / shape.groups, first), map, count, shape.height, shape.width};
}

// Calls f(vectors of a block as a constant): as many as fit rows of channels, which are then taken
// where they lie (`direct`); one of planes.
template <class T, class F>
void with_block(const DepthwiseShape& shape, bool rows, const F& f) {
  const auto fits = [&](int n) { return rows && shape.filters() % (n * kLanes<T>) == 0; };
  if (fits(4)) return f(std::integral_constant<int, 4>(), true);
  if (fits(2)) return f(std::integral_constant<int, 2>(), true);
  f(std::integral_constant<int, 1>(), fits(1));
}

// Calls f(first channel of a filter, how many, first image, end, part) for all tasks, in parallel.
template <class F>
void for_each_task(const DepthwiseShape& shape, int width, const Threads& threads, const F& f) {
  const int64_t images = shape.images(), parts = std::min(images, kImageParts);
  const int64_t total = ceil_div(shape.filters(), width) * parts;
  std::atomic<int64_t> next{0};
  parallel(threads, int(std::min<int64_t>(total, threads.count)), [&](int) {
    for (int64_t i; (i = next.fetch_add(1)) < total;) {
      const int64_t channel = i / parts * width, part = i % parts;
      f(channel, std::min<int64_t>(width, shape.filters() - channel), images * part / parts,
        images * (part + 1) / parts, part);
    }
  });
}

template <class T>
void depthwise_forward(const DepthwiseForward& p, const Threads& threads) {
  const DepthwiseShape& shape = p.shape;
  with_block<T>(shape, p.x.channel == 1, [&](auto n, bool direct) {
    using Work = DepthwiseWork<T, decltype(n)::value>;
    for_each_task(
        shape, Work::kWidth, threads,
        [&](int64_t channel, int64_t count, int64_t image, int64_t end, int64_t) {
          const auto work = make_workspace<Work>(shape, direct, false);
          work.take_weights(p.weight, channel, count);
          std::fill_n(work.bias, Work::kWidth, T(0));
          std::copy_n(static_cast<const T*>(p.bias) + channel, count, work.bias);
          for (; image < end; ++image) {
            const auto x = work.take(map_planes<const T>(p.x, shape, image, channel, count),
                                     direct ? nullptr : work.x_rows);
            T* out = static_cast<T*>(p.out) + image * shape.results() * shape.filters() + channel;
            work.forward(x, [&](int64_t i, int64_t j, const typename Work::Sums& sums) {
              T* to = out + (i * shape.out_w + j) * shape.filters();
              if (count == Work::kWidth) return Work::store_sums(to, sums);
              T lanes[Work::kWidth];
              Work::store_sums(lanes, sums);
              std::copy_n(lanes, count, to);
            });
          }
        });
  });
}

template <class T>
void depthwise_backward(const DepthwiseBackward& p, const Threads& threads) {
  const DepthwiseShape& shape = p.shape;
  const int64_t filters = shape.filters(), taps = shape.taps();
  const int64_t parts = std::min(shape.images(), kImageParts), size = (taps + 1) * filters;
  // [part][channel][tap], then the bias's [channel].
  const std::unique_ptr<T[]> sums(new T[size_t(parts * size)]);
  // Without `more` its strides are 0.
  const bool in_rows = p.x.channel == 1 && p.grad_x.channel == 1 && p.more.channel <= 1;
  with_block<T>(shape, in_rows, [&](auto n, bool direct) {
    using Work = DepthwiseWork<T, decltype(n)::value>;
    for_each_task(
        shape, Work::kWidth, threads,
        [&](int64_t channel, int64_t count, int64_t image, int64_t end, int64_t part) {
          const auto work = make_workspace<Work>(shape, direct, true);
          work.take_weights(p.weight, channel, count);
          work.clear_sums();
          for (; image < end; ++image) {
            work.take({head_data<const T>(p.grad, image, channel), p.grad, count, shape.out_h,
                       shape.out_w},
                      work.grads);
            work.add_grad_weight(work.take(map_planes<const T>(p.x, shape, image, channel, count),
                                           direct ? nullptr : work.x_rows));
            const auto grad_x = map_planes<T>(p.grad_x, shape, image, channel, count);
            T* rows = direct ? nullptr : work.grad_rows;
            ChannelRows<const T> more{};
            if (p.more.data)
              more = work.take(map_planes<const T>(p.more, shape, image, channel, count), rows);
            work.make_grad_x(more, work.rows_of(grad_x, rows));
            if (rows) from_rows(rows, Work::kWidth, grad_x);
          }
          T* own = sums.get() + part * size;
          for (int64_t c = 0; c < count; ++c) {
            for (int64_t tap = 0; tap < taps; ++tap)
              own[(channel + c) * taps + tap] = work.grad_weight[tap * Work::kWidth + c];
            own[filters * taps + channel + c] = work.grad_bias[c];
          }
        });
  });
  for (int64_t i = 0; i < size; ++i) {
    T sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * size + i];
    (i < filters * taps ? static_cast<T*>(p.grad_weight)[i]
                        : static_cast<T*>(p.grad_bias)[i - filters * taps]) = sum;
  }
}

}  // namespace dat::cpu::DAT_SIMD

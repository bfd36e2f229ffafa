// What crosses from tensors to kernels: plain data, no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "math/grid.h"

namespace dat {

// Storage type of features (x, q, k, v, bias, out). Everything else (offset, pos, rpe_table, lse)
// has the accumulation type: double for f64, float for the others; or, where its shape says so, the
// features' own.
enum class DType : int { f32, f64, f16, bf16 };

// A feature map [B, C, H, W] or feature list [B, C, N] (H = 1, W = N) with any strides.
struct MapView {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;  // strides in elements
};

struct SampleShape {
  int64_t batch, groups, channels, height, width, keys_h, keys_w;
  double offset_range_factor;
  Version version;
  DType dtype;
  bool offset_in_dtype = false;  // offset and its gradient have the features' dtype

  DAT_HD int64_t keys() const { return keys_h * keys_w; }
};

struct SampleForward {
  SampleShape shape;
  MapView x;           // [B, C, H, W]
  const void* offset;  // [B * G, 2, Hk, Wk]
  MapView sampled;     // [B, C, N], contiguous unless kernels say that they write any layout
  void* pos;           // [B, G, N, 2]
};

struct SampleBackward {
  SampleShape shape;
  MapView x;
  MapView grad_sampled;  // [B, C, N]
  const void* offset;
  const void* grad_pos;  // [B, G, N, 2] or null
  MapView grad_x;        // [B, C, H, W], laid out as `sampled` above
  void* grad_offset;     // [B * G, 2, Hk, Wk]
};

struct AttentionShape {
  int64_t batch, heads, groups, height, width, keys, head_dim;
  int64_t table_h = 0, table_w = 0;  // 0: no table
  double scale;
  double dropout_p;
  Version version;
  DType dtype;
  bool table_in_dtype = false;  // rpe_table has the features' dtype

  DAT_HD int64_t queries() const { return height * width; }
};

// Dense additive bias [B, h, M, N] in the features' dtype; broadcast dimensions have stride 0.
struct DenseBias {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

// Attention within windows, on the CPU: an image is a window of one row, and pixel i of image b is
// at place rows[b * pixels + i] of a map whose batch stride is 0. Queries of different windows
// differ.
struct WindowRows {
  const int64_t *queries = nullptr, *keys = nullptr;  // [B, M], [B, N]
};

struct AttentionInputs {
  AttentionShape shape;
  MapView q;          // [B, C, H, W]
  MapView k, v;       // [B, C, N]
  const void* pos;    // [B, G, N, 2] or null
  const void* table;  // [h, Th, Tw] or null
  DenseBias bias;
  const int64_t* seed;  // [1], null without dropout
  WindowRows windows;
};

struct AttentionForward {
  AttentionInputs in;
  MapView out;  // [B, C, H, W], contiguous unless kernels say that they write any layout
  void* lse;    // [B, h, M], natural logarithm
};

struct AttentionBackward {
  AttentionInputs in;
  MapView out, grad_out;   // [B, C, H, W]
  const void* lse;         // [B, h, M]
  MapView grad_q;          // [B, C, H, W], laid out as `out` above
  MapView grad_k, grad_v;  // [B, C, N], as well
  void* grad_pos;          // [B, h, N, 2] one part for each head, or null
  void* grad_table;        // [h, Th, Tw] or null
  void* grad_bias;         // [B or 1, h or 1, M, N] in the accumulation type, or null
  int64_t grad_bias_batch, grad_bias_head;  // its strides, 0 where broadcast
};

// A depthwise convolution of the groups of a map: image b * groups + g has group g's channels of
// image b, and all of them the same filters.
struct DepthwiseShape {
  int64_t batch, groups, channels, height, width, out_h, out_w, kernel, stride, padding;
  DType dtype;  // f32 or f64

  int64_t images() const { return batch * groups; }
  int64_t filters() const { return channels / groups; }
  int64_t taps() const { return kernel * kernel; }
  int64_t results() const { return out_h * out_w; }
};

struct DepthwiseForward {
  DepthwiseShape shape;
  MapView x;           // [B, C, H, W]
  const void* weight;  // [C / G, kernel, kernel]
  const void* bias;    // [C / G]
  void* out;           // [B * G, out_h, out_w, C / G]
};

struct DepthwiseBackward {
  DepthwiseShape shape;
  MapView x;
  const void* weight;
  MapView grad;       // [B * G, C / G, out_h, out_w]
  MapView more;       // [B, C, H, W], added to grad_x, or null
  MapView grad_x;     // [B, C, H, W], contiguous or channels-last
  void* grad_weight;  // [C / G, kernel, kernel]
  void* grad_bias;    // [C / G]
};

// The offset network behind that: norm, GELU and a product over channels.
struct OffsetHeadShape {
  int64_t images, keys, channels;  // images: B * G
  double eps;                      // of the norm
  DType dtype;                     // f32 or f64

  int64_t rows() const { return images * keys; }
};

struct OffsetHeadInputs {
  OffsetHeadShape shape;
  const void* features;                 // [images, keys, channels]
  const void *norm_weight, *norm_bias;  // [channels]
  const void* weight;                   // [2, channels]
};

struct OffsetHeadForward {
  OffsetHeadInputs in;
  void* offset;  // [images, 2, keys]
};

struct OffsetHeadBackward {
  OffsetHeadInputs in;
  const void* grad_offset;  // [images, 2, keys]
  // Gradients of the inputs, of the same shapes.
  void *grad_features, *grad_norm_weight, *grad_norm_bias, *grad_weight;
};

struct Transpose {
  int64_t batch, rows, columns;
  DType dtype;                    // f32 or f64
  int64_t from_matrix, from_row;  // strides in elements
  const void* from;               // [batch, rows, columns]
  void* to;                       // [batch, columns, rows], contiguous
};

}  // namespace dat

// The operators, written once for all devices: schemas, and implementations over a Device, which is
// made from a tensor of features and has
//
//   run(params)                      for each kind of params; enqueues or computes
//   run(AttentionBackward, bool deterministic)
//   reads_feature_dtype              whether its kernels take offset and rpe_table in the dtype of
//                                    the features too, or in the accumulation type alone
//   adds_in_any_order                whether they sum up a broadcast bias's gradient atomically
//   writes_any_layout                whether they write channels-last results
#pragma once

#include "checks.h"
#include "cuda/launch.h"

namespace dat {

inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

// An offset or a table as the device's kernels read it. A dtype that is neither of the two stays,
// for the checks to refuse it.
template <class Device>
Tensor readable(const Tensor& t, const Tensor& features) {
  const bool read_as_it_is =
      Device::reads_feature_dtype || t.scalar_type() != features.scalar_type();
  return torch::stable::contiguous(read_as_it_is ? t : cast(t, accumulation_type(features)));
}

template <class Device>
OptionalTensor readable(const OptionalTensor& t, const Tensor& features) {
  return t ? OptionalTensor(readable<Device>(*t, features)) : t;
}

// What stands for an output that was not asked for.
inline Tensor none_like(const Tensor& t) { return torch::stable::new_empty(t, {0}); }

// New features [B, C, pixels]: in channels-last memory if t lies so and the device's kernels write
// any layout, else contiguous. functional.py says it, too.
template <class Device>
Tensor new_features(const Tensor& t, int64_t pixels) {
  const int64_t batch = t.size(0), channels = t.size(1);
  if (!Device::writes_any_layout || t.stride(1) != 1)
    return torch::stable::new_empty(t, {batch, channels, pixels});
  return torch::stable::transpose(torch::stable::new_empty(t, {batch, pixels, channels}), 1, 2);
}

// What is returned for features [B, C, H, W] or [B, C, N].
template <class Device>
Tensor laid_out_like(const Tensor& t) {
  if (t.dim() == 3) return new_features<Device>(t, t.size(2));
  return torch::stable::view(new_features<Device>(t, t.size(2) * t.size(3)),
                             {t.size(0), t.size(1), t.size(2), t.size(3)});
}

template <class Device>
std::tuple<Tensor, Tensor> sample_forward(const Tensor& x, const Tensor& offset_in, int64_t groups,
                                          double factor, const std::string& version) {
  const Tensor offset = readable<Device>(offset_in, x);
  const SampleShape shape = check_sample(x, offset, groups, factor, version);
  Tensor sampled = new_features<Device>(x, shape.keys());
  Tensor pos =
      torch::stable::new_empty(x, {shape.batch, groups, shape.keys(), 2}, accumulation_type(x));
  Device(x).run(
      SampleForward{shape, map_view(x), offset.data_ptr(), map_view(sampled), pos.data_ptr()});
  return {sampled, pos};
}

template <class Device>
std::tuple<Tensor, Tensor> sample_backward(const Tensor& grad_sampled,
                                           const OptionalTensor& grad_pos_in, const Tensor& x,
                                           const Tensor& offset_in, int64_t groups, double factor,
                                           const std::string& version) {
  const Tensor offset = readable<Device>(offset_in, x);
  const OptionalTensor grad_pos = contiguous(grad_pos_in);
  const SampleShape shape = check_sample(x, offset, groups, factor, version);
  check_shape(grad_sampled, "grad_sampled", {shape.batch, shape.channels, shape.keys()},
              "[B, C, N]");
  check_same_kind(grad_sampled, "grad_sampled", x, "x");
  if (grad_pos) {
    check_shape(*grad_pos, "grad_pos", {shape.batch, groups, shape.keys(), 2}, "[B, G, N, 2]");
    check_accumulation(*grad_pos, "grad_pos", x, "x");
  }
  Tensor grad_x = laid_out_like<Device>(x);
  Tensor grad_offset = torch::stable::new_empty(offset, offset.sizes());
  Device(x).run(SampleBackward{shape, map_view(x), map_view(grad_sampled), offset.data_ptr(),
                               data_or_null(grad_pos), map_view(grad_x), grad_offset.data_ptr()});
  return {grad_x, cast(grad_offset, offset_in.scalar_type())};
}

template <class Device>
std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& pos_in,
                                             const OptionalTensor& table_in,
                                             const OptionalTensor& bias, const OptionalTensor& seed,
                                             int64_t heads, double scale, double dropout_p,
                                             const std::string& version) {
  const OptionalTensor pos = contiguous(pos_in), table = readable<Device>(table_in, q);
  AttentionForward p{};
  p.in = check_attention(q, k, v, pos, table, bias, seed, heads, scale, dropout_p, version);
  const AttentionShape& shape = p.in.shape;
  Tensor out = laid_out_like<Device>(q);
  Tensor lse =
      torch::stable::new_empty(q, {shape.batch, heads, shape.queries()}, accumulation_type(q));
  p.out = map_view(out), p.lse = lse.data_ptr();
  if (shape.batch > 0) Device(q).run(p);
  return {out, lse};
}

// The bias's gradient is summed over the images or heads that it broadcasts over: by the kernels,
// or, if it is `full`, by sum_like. Its queries and keys must be expanded (functional.py).
inline Tensor new_grad_bias(const Tensor& bias, bool full, AttentionBackward& p) {
  const AttentionShape& shape = p.in.shape;
  const int64_t queries = shape.queries(), area = queries * shape.keys;
  check_shape(bias, "bias", {bias.size(0), bias.size(1), queries, shape.keys},
              "[B or 1, heads or 1, H * W, N]");
  const int64_t batch = full ? shape.batch : bias.size(0);
  const int64_t heads = full ? shape.heads : bias.size(1);
  Tensor grad =
      torch::stable::new_zeros(bias, {batch, heads, queries, shape.keys}, accumulation_type(bias));
  p.grad_bias = grad.data_ptr();
  p.grad_bias_batch = batch == 1 ? 0 : heads * area;
  p.grad_bias_head = heads == 1 ? 0 : area;
  return grad;
}

inline Tensor sum_like(Tensor grad, const Tensor& bias) {
  for (const int64_t dim : {0, 1}) {
    const int64_t dims[] = {dim};
    if (grad.size(dim) != bias.size(dim)) grad = torch::stable::sum(grad, dims, /*keepdim=*/true);
  }
  return grad;
}

// [B, h, N, 2] -> [B, G, N, 2]: a group's heads share their positions.
inline Tensor sum_heads(const Tensor& grad_pos, const AttentionShape& shape) {
  if (shape.heads == shape.groups) return grad_pos;
  const int64_t group_heads = shape.heads / shape.groups, dims[] = {2};
  return torch::stable::sum(
      torch::stable::view(grad_pos, {shape.batch, shape.groups, group_heads, shape.keys, 2}), dims);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& pos_in, const OptionalTensor& table_in, const OptionalTensor& bias,
    const OptionalTensor& seed, const Tensor& out, const Tensor& lse_in, int64_t heads,
    double scale, double dropout_p, const std::string& version, bool bias_grad,
    bool deterministic) {
  const OptionalTensor pos = contiguous(pos_in), table = readable<Device>(table_in, q);
  const Tensor lse = torch::stable::contiguous(lse_in);
  AttentionBackward p{};
  p.in = check_attention(q, k, v, pos, table, bias, seed, heads, scale, dropout_p, version);
  const AttentionShape& shape = p.in.shape;
  for (const auto& [t, name] : {std::pair{&out, "out"}, {&grad_out, "grad_out"}}) {
    check_shape(*t, name, {q.size(0), q.size(1), q.size(2), q.size(3)}, "[B, C, H, W]");
    check_same_kind(*t, name, q, "q");
  }
  check_shape(lse, "lse", {shape.batch, heads, shape.queries()}, "[B, heads, H * W]");
  check_accumulation(lse, "lse", q, "q");
  p.out = map_view(out), p.grad_out = map_view(grad_out), p.lse = lse.data_ptr();

  Tensor grad_q = laid_out_like<Device>(q);
  Tensor grad_k = laid_out_like<Device>(k), grad_v = laid_out_like<Device>(v);
  Tensor grad_pos, grad_table, grad_bias;
  p.grad_q = map_view(grad_q), p.grad_k = map_view(grad_k), p.grad_v = map_view(grad_v);
  if (table) {
    grad_pos = torch::stable::new_empty(*pos, {shape.batch, heads, shape.keys, 2});
    grad_table = torch::stable::new_empty(*table, table->sizes(), accumulation_type(q));
    if (shape.batch == 0) torch::stable::zero_(grad_table);
    p.grad_pos = grad_pos.data_ptr(), p.grad_table = grad_table.data_ptr();
  } else {
    grad_pos = none_like(lse), grad_table = none_like(lse);
  }
  bias_grad = bias_grad && bias;
  grad_bias = bias_grad ? new_grad_bias(*bias, Device::adds_in_any_order && deterministic, p)
                        : none_like(lse);
  if (shape.batch > 0) Device(q).run(p, deterministic);
  if (table) {
    grad_pos = sum_heads(grad_pos, shape);
    grad_table = cast(grad_table, table_in->scalar_type());
  }
  if (bias_grad) grad_bias = cast(sum_like(grad_bias, *bias), q.scalar_type());
  return {grad_q, grad_k, grad_v, grad_pos, grad_table, grad_bias};
}

// Everything that the CUDA kernels need of a device but the way to its stream.
struct CudaKernels {
  static constexpr bool reads_feature_dtype = true, adds_in_any_order = true;
  static constexpr bool writes_any_layout = false;

  const Tensor& features;
  cuda::Stream stream;

  void run(const SampleForward& p) const { cuda::sample_forward(p, stream); }
  void run(const SampleBackward& p) const { cuda::sample_backward(p, stream); }
  void run(const AttentionForward& p) const { cuda::attention_forward(p, stream); }
  void run(const AttentionBackward& p, bool deterministic) const {
    const int64_t bytes = cuda::attention_backward_scratch(p, deterministic);
    const Tensor scratch = torch::stable::new_empty(features, {bytes}, ScalarType::Byte);
    cuda::attention_backward(p, scratch.data_ptr(), deterministic, stream);
  }
};

using Library = torch::stable::detail::StableLibrary;

inline void define_operators(Library& m) {
  m.def(
      "deform_sample_forward(Tensor x, Tensor offset, int groups, float offset_range_factor, "
      "str version) -> (Tensor sampled, Tensor pos)");
  m.def(
      "deform_sample_backward(Tensor grad_sampled, Tensor? grad_pos, Tensor x, Tensor offset, "
      "int groups, float offset_range_factor, str version) -> (Tensor grad_x, Tensor grad_offset)");
  m.def(
      "deform_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? pos, Tensor? rpe_table, "
      "Tensor? bias, Tensor? seed, int heads, float scale, float dropout_p, str version) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "deform_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? pos, "
      "Tensor? rpe_table, Tensor? bias, Tensor? seed, Tensor out, Tensor lse, int heads, "
      "float scale, float dropout_p, str version, bool bias_grad, bool deterministic) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_pos, Tensor grad_rpe_table, "
      "Tensor grad_bias)");
}

template <class Device>
void implement_operators(Library& m) {
  m.impl("deform_sample_forward", TORCH_BOX(&sample_forward<Device>));
  m.impl("deform_sample_backward", TORCH_BOX(&sample_backward<Device>));
  m.impl("deform_attention_forward", TORCH_BOX(&attention_forward<Device>));
  m.impl("deform_attention_backward", TORCH_BOX(&attention_backward<Device>));
}

}  // namespace dat

// The offset network behind its depthwise convolution, on the CPU alone: what dat_cuda/offsets.py
// computes there.
//
//   features [images, Hk, Wk, C]; norm_weight, norm_bias [C]; weight [2, C];
//   offset [images, 2, Hk, Wk] = weight . GELU(LayerNorm(features)), images being B * G
#pragma once

#include "ops.h"
#include "threads.h"

namespace dat {

inline OffsetHeadInputs check_offset_head(const Tensor& features, const Tensor& norm_weight,
                                          const Tensor& norm_bias, const Tensor& weight,
                                          double eps) {
  check_dims(features, "features", 4, "[images, Hk, Wk, C]");
  const DType dtype = full_precision_dtype(features, "features");
  const int64_t channels = features.size(3);
  check_size(channels, "C of features");
  check_shape(norm_weight, "norm_weight", {channels}, "[C]");
  check_shape(norm_bias, "norm_bias", {channels}, "[C]");
  check_shape(weight, "weight", {2, channels}, "[2, C]");
  for (const auto& [t, name] : {std::pair{&features, "features"},
                                {&norm_weight, "norm_weight"},
                                {&norm_bias, "norm_bias"},
                                {&weight, "weight"}}) {
    check_same_kind(*t, name, features, "features");
    STD_TORCH_CHECK(t->is_contiguous(), name, " must be contiguous");
  }
  return {{features.size(0), features.size(1) * features.size(2), channels, eps, dtype},
          features.data_ptr(),
          norm_weight.data_ptr(),
          norm_bias.data_ptr(),
          weight.data_ptr()};
}

inline Tensor offset_head_forward(const Tensor& features, const Tensor& norm_weight,
                                  const Tensor& norm_bias, const Tensor& weight, double eps) {
  const OffsetHeadInputs in = check_offset_head(features, norm_weight, norm_bias, weight, eps);
  Tensor offset =
      torch::stable::new_empty(features, {features.size(0), 2, features.size(1), features.size(2)});
  cpu::kernels().offset_head_forward({in, offset.data_ptr()}, torch_threads());
  return offset;
}

// Gradients of features, norm_weight, norm_bias and weight.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> offset_head_backward(
    const Tensor& grad_in, const Tensor& features, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& weight, double eps) {
  const OffsetHeadInputs in = check_offset_head(features, norm_weight, norm_bias, weight, eps);
  check_shape(grad_in, "grad", {features.size(0), 2, features.size(1), features.size(2)},
              "[images, 2, Hk, Wk]");
  check_same_kind(grad_in, "grad", features, "features");
  const Tensor grad = torch::stable::contiguous(grad_in);
  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  const std::tuple<Tensor, Tensor, Tensor, Tensor> grads = {like(features), like(norm_weight),
                                                            like(norm_bias), like(weight)};
  const auto& [grad_features, grad_norm_weight, grad_norm_bias, grad_weight] = grads;
  cpu::kernels().offset_head_backward(
      {in, grad.data_ptr(), grad_features.data_ptr(), grad_norm_weight.data_ptr(),
       grad_norm_bias.data_ptr(), grad_weight.data_ptr()},
      torch_threads());
  return grads;
}

inline void define_offset_head_operators(torch::stable::detail::StableLibrary& m) {
  m.def(
      "offset_head_forward(Tensor features, Tensor norm_weight, Tensor norm_bias, Tensor weight, "
      "float eps) -> Tensor");
  m.def(
      "offset_head_backward(Tensor grad, Tensor features, Tensor norm_weight, Tensor norm_bias, "
      "Tensor weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
}

inline void implement_offset_head_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("offset_head_forward", TORCH_BOX(&offset_head_forward));
  m.impl("offset_head_backward", TORCH_BOX(&offset_head_backward));
}

}  // namespace dat

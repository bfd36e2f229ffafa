// The offset network's depthwise convolution, on the CPU alone: what dat_cuda/offsets.py computes
// there.
//
//   x [B, C, H, W]; weight [C / G, 1, K, K]; bias [C / G]; out [B * G, C / G, Hk, Wk], channels
//   last
//
// The groups of a map are images of their own, with the same filters; x is read where it lies.
#pragma once

#include "ops.h"
#include "threads.h"

namespace dat {

struct CpuLayout {
  static constexpr bool writes_any_layout = true;
};

inline DepthwiseShape check_depthwise(const Tensor& x, const Tensor& weight, int64_t stride,
                                      int64_t padding) {
  check_dims(x, "x", 4, "[B, C, H, W]"), check_dims(weight, "weight", 4, "[C / G, 1, K, K]");
  const int64_t filters = weight.size(0), kernel = weight.size(3);
  check_shape(weight, "weight", {filters, 1, kernel, kernel}, "[C / G, 1, K, K]");
  STD_TORCH_CHECK(filters >= 1 && x.size(1) % filters == 0, "weight has ", filters,
                  " filters, which must divide the ", x.size(1), " channels of x");
  const DType dtype = full_precision_dtype(x, "x");
  check_same_kind(weight, "weight", x, "x");
  STD_TORCH_CHECK(weight.is_contiguous(), "weight must be contiguous");
  check_size(x.size(2), "H of x"), check_size(x.size(3), "W of x"), check_size(kernel, "K");
  STD_TORCH_CHECK(stride >= 1 && padding >= 0, "stride must be positive and padding not negative, ",
                  "got ", stride, " and ", padding);
  const auto results = [&](int64_t size) { return (size + 2 * padding - kernel) / stride + 1; };
  STD_TORCH_CHECK(std::min(x.size(2), x.size(3)) + 2 * padding >= kernel, "x ", shape_string(x),
                  " with padding ", padding, " is smaller than the filters' ", kernel);
  return {x.size(0),
          x.size(1) / filters,
          x.size(1),
          x.size(2),
          x.size(3),
          results(x.size(2)),
          results(x.size(3)),
          kernel,
          stride,
          padding,
          dtype};
}

inline Tensor depthwise_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                int64_t stride, int64_t padding) {
  const DepthwiseShape shape = check_depthwise(x, weight, stride, padding);
  check_shape(bias, "bias", {shape.filters()}, "[C / G]");
  check_same_kind(bias, "bias", x, "x");
  STD_TORCH_CHECK(bias.is_contiguous(), "bias must be contiguous");
  Tensor out =
      torch::stable::new_empty(x, {shape.images(), shape.out_h, shape.out_w, shape.filters()});
  const DepthwiseForward p{shape, map_view(x), weight.data_ptr(), bias.data_ptr(), out.data_ptr()};
  if (shape.images() > 0) cpu::kernels().depthwise_forward(p, torch_threads());
  return torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
}

// Gradients of x, laid out as x if that is channels-last, else contiguous, of weight and of bias.
// `more` is added to x's.
inline std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const Tensor& grad,
                                                             const OptionalTensor& more,
                                                             const Tensor& x, const Tensor& weight,
                                                             int64_t stride, int64_t padding) {
  const DepthwiseShape shape = check_depthwise(x, weight, stride, padding);
  check_shape(grad, "grad", {shape.images(), shape.filters(), shape.out_h, shape.out_w},
              "[B * G, C / G, Hk, Wk]");
  check_same_kind(grad, "grad", x, "x");
  if (more) {
    check_shape(*more, "more", {x.size(0), x.size(1), x.size(2), x.size(3)}, "[B, C, H, W]");
    check_same_kind(*more, "more", x, "x");
  }
  Tensor grad_x = laid_out_like<CpuLayout>(x);
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_bias = torch::stable::new_empty(weight, {shape.filters()});
  const DepthwiseBackward p{shape,
                            map_view(x),
                            weight.data_ptr(),
                            map_view(grad),
                            more ? map_view(*more) : MapView{},
                            map_view(grad_x),
                            grad_weight.data_ptr(),
                            grad_bias.data_ptr()};
  if (shape.images() > 0) {
    cpu::kernels().depthwise_backward(p, torch_threads());
  } else {
    torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias);
  }
  return {grad_x, grad_weight, grad_bias};
}

inline void define_depthwise_operators(torch::stable::detail::StableLibrary& m) {
  m.def(
      "depthwise_forward(Tensor x, Tensor weight, Tensor bias, int stride, int padding) -> Tensor");
  m.def(
      "depthwise_backward(Tensor grad, Tensor? more, Tensor x, Tensor weight, int stride, "
      "int padding) -> (Tensor, Tensor, Tensor)");
}

inline void implement_depthwise_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("depthwise_forward", TORCH_BOX(&depthwise_forward));
  m.impl("depthwise_backward", TORCH_BOX(&depthwise_backward));
}

}  // namespace dat

// Attention within windows of rows, on the CPU alone: what dat_cuda/models/attend.py computes
// there.
//
//   qkv [R, 3 C]; queries [W, M] and keys [W, N]: which rows; bias [heads, M, N]; out [R, C]
//
// Each row is a query of one window at most. Rows are read, and results written or added, where
// they lie.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"
#include "threads.h"

namespace dat {

// Writes the windows' rows of out; returns lse [W, heads, M].
inline Tensor window_attention_forward(const Tensor& qkv, const Tensor& queries, const Tensor& keys,
                                       const Tensor& bias, const OptionalTensor& seed,
                                       int64_t heads, double scale, double dropout_p,
                                       const Tensor& out) {
  AttentionForward p{};
  p.in = check_windows(qkv, queries, keys, bias, seed, heads, scale, dropout_p);
  p.out = check_result(out, "out", qkv, qkv.size(1) / 3);
  Tensor lse = torch::stable::new_empty(qkv, {p.in.shape.batch, heads, p.in.shape.queries()},
                                        accumulation_type(qkv));
  p.lse = lse.data_ptr();
  if (p.in.shape.batch > 0) cpu::kernels().attention_forward(p, torch_threads());
  return lse;
}

// Into how many groups of neighbours the windows can be cut for the threads, such that groups that
// are not neighbours share no key (cpu/attention_windows.h).
inline int64_t window_groups(const AttentionInputs& in, int threads) {
  const AttentionShape& shape = in.shape;
  int64_t groups = std::min(shape.batch, (4 * threads + shape.heads - 1) / shape.heads);
  for (; groups > 2; groups = (groups + 1) / 2) {
    std::vector<int64_t> least, most;
    for (int64_t g = 0; g < groups; ++g) {
      const auto [low, high] =
          std::minmax_element(in.windows.keys + shape.batch * g / groups * shape.keys,
                              in.windows.keys + shape.batch * (g + 1) / groups * shape.keys);
      least.push_back(*low), most.push_back(*high);
    }
    bool apart = true;
    for (int64_t g = 2; g < groups; ++g)
      apart = apart && *std::max_element(most.begin(), most.begin() + g - 1) < least[size_t(g)];
    if (apart) break;
  }
  return groups;
}

// Writes the windows' rows of grad_qkv's first C columns, adds to the others; returns the bias's
// gradient.
inline Tensor window_attention_backward(const Tensor& grad_out, const Tensor& qkv,
                                        const Tensor& queries, const Tensor& keys,
                                        const Tensor& bias, const OptionalTensor& seed,
                                        const Tensor& out, const Tensor& lse, int64_t heads,
                                        double scale, double dropout_p, const Tensor& grad_qkv) {
  AttentionBackward p{};
  p.in = check_windows(qkv, queries, keys, bias, seed, heads, scale, dropout_p);
  const AttentionShape& shape = p.in.shape;
  const int64_t channels = qkv.size(1) / 3;
  p.out = check_result(out, "out", qkv, channels);
  p.grad_out = check_result(grad_out, "grad_out", qkv, channels);
  p.grad_q = check_result(grad_qkv, "grad_qkv", qkv, 3 * channels);
  p.grad_k = columns_view(grad_qkv, channels), p.grad_v = columns_view(grad_qkv, 2 * channels);
  check_shape(lse, "lse", {shape.batch, heads, shape.queries()}, "[windows, heads, M]");
  check_accumulation(lse, "lse", qkv, "qkv");
  STD_TORCH_CHECK(lse.is_contiguous(), "lse must be contiguous");
  p.lse = lse.data_ptr();
  const cpu::Threads threads = torch_threads();
  const int64_t groups = window_groups(p.in, threads.count), dims[] = {0};
  Tensor grad_bias = torch::stable::new_zeros(qkv, {groups, heads, shape.queries(), shape.keys},
                                              accumulation_type(qkv));
  p.grad_bias = grad_bias.data_ptr();
  p.grad_bias_head = shape.queries() * shape.keys;
  if (shape.batch > 0) cpu::kernels().window_backward(p, groups, threads);
  return torch::stable::to(torch::stable::sum(grad_bias, dims), bias.scalar_type());
}

inline void define_window_operators(torch::stable::detail::StableLibrary& m) {
  m.def(
      "window_attention_forward(Tensor qkv, Tensor queries, Tensor keys, Tensor bias, "
      "Tensor? seed, int heads, float scale, float dropout_p, Tensor(a!) out) -> Tensor lse");
  m.def(
      "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor queries, Tensor keys, "
      "Tensor bias, Tensor? seed, Tensor out, Tensor lse, int heads, float scale, "
      "float dropout_p, Tensor(a!) grad_qkv) -> Tensor grad_bias");
}

inline void implement_window_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("window_attention_forward", TORCH_BOX(&window_attention_forward));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}

}  // namespace dat

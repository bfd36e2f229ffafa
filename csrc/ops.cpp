// The operators: schemas, and their CPU implementations over csrc/cpu.
//
// They are written against LibTorch's stable ABI, so that one binary serves several releases of
// torch. Autograd, fake kernels and defaults are in dat_cuda/functional.py.
#include "checks.h"
#include "cpu/kernels.h"

namespace dat {
namespace {

void run_tasks(int tasks, void (*body)(void*, int), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(context, int(task));
  });
}

cpu::Threads torch_threads() { return {int(torch::stable::get_num_threads()), run_tasks}; }

ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

// What stands for an output that was not asked for.
Tensor none_like(const Tensor& t) { return torch::stable::new_empty(t, {0}); }

std::tuple<Tensor, Tensor> sample_forward(const Tensor& x, const Tensor& offset_in, int64_t groups,
                                          double factor, const std::string& version) {
  const Tensor offset = torch::stable::contiguous(offset_in);
  const SampleShape shape = check_sample(x, offset, groups, factor, version);
  Tensor sampled = torch::stable::new_empty(x, {shape.batch, shape.channels, shape.keys()});
  Tensor pos =
      torch::stable::new_empty(x, {shape.batch, groups, shape.keys(), 2}, accumulation_type(x));
  cpu::kernels().sample_forward(
      {shape, map_view(x), offset.data_ptr(), sampled.data_ptr(), pos.data_ptr()}, torch_threads());
  return {sampled, pos};
}

std::tuple<Tensor, Tensor> sample_backward(const Tensor& grad_sampled,
                                           const OptionalTensor& grad_pos_in, const Tensor& x,
                                           const Tensor& offset_in, int64_t groups, double factor,
                                           const std::string& version) {
  const Tensor offset = torch::stable::contiguous(offset_in);
  const OptionalTensor grad_pos = contiguous(grad_pos_in);
  const SampleShape shape = check_sample(x, offset, groups, factor, version);
  check_shape(grad_sampled, "grad_sampled", {shape.batch, shape.channels, shape.keys()},
              "[B, C, N]");
  check_same_kind(grad_sampled, "grad_sampled", x, "x");
  if (grad_pos) {
    check_shape(*grad_pos, "grad_pos", {shape.batch, groups, shape.keys(), 2}, "[B, G, N, 2]");
    check_accumulation(*grad_pos, "grad_pos", x, "x");
  }
  Tensor grad_x =
      torch::stable::new_empty(x, {shape.batch, shape.channels, shape.height, shape.width});
  Tensor grad_offset = torch::stable::new_empty(offset, offset.sizes());
  cpu::kernels().sample_backward(
      {shape, map_view(x), map_view(grad_sampled), offset.data_ptr(), data_or_null(grad_pos),
       grad_x.data_ptr(), grad_offset.data_ptr()},
      torch_threads());
  return {grad_x, grad_offset};
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& pos_in,
                                             const OptionalTensor& table_in,
                                             const OptionalTensor& bias, const OptionalTensor& seed,
                                             int64_t heads, double scale, double dropout_p,
                                             const std::string& version) {
  const OptionalTensor pos = contiguous(pos_in), table = contiguous(table_in);
  AttentionForward p{};
  p.in = check_attention(q, k, v, pos, table, bias, seed, heads, scale, dropout_p, version);
  const AttentionShape& shape = p.in.shape;
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor lse =
      torch::stable::new_empty(q, {shape.batch, heads, shape.queries()}, accumulation_type(q));
  p.out = out.data_ptr(), p.lse = lse.data_ptr();
  if (shape.batch > 0) cpu::kernels().attention_forward(p, torch_threads());
  return {out, lse};
}

// Gradients of what broadcasts over images or heads are summed over them; queries and keys of the
// bias must be expanded (functional.py).
Tensor new_grad_bias(const Tensor& bias, AttentionBackward& p) {
  const AttentionShape& shape = p.in.shape;
  const int64_t queries = shape.queries(), area = queries * shape.keys;
  check_shape(bias, "bias", {bias.size(0), bias.size(1), queries, shape.keys},
              "[B or 1, heads or 1, H * W, N]");
  Tensor grad = torch::stable::new_zeros(bias, {bias.size(0), bias.size(1), queries, shape.keys},
                                         accumulation_type(bias));
  p.grad_bias = grad.data_ptr();
  p.grad_bias_batch = bias.size(0) == 1 ? 0 : bias.size(1) * area;
  p.grad_bias_head = bias.size(1) == 1 ? 0 : area;
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& pos_in, const OptionalTensor& table_in, const OptionalTensor& bias,
    const OptionalTensor& seed, const Tensor& out, const Tensor& lse_in, int64_t heads,
    double scale, double dropout_p, const std::string& version, bool bias_grad) {
  const OptionalTensor pos = contiguous(pos_in), table = contiguous(table_in);
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

  Tensor grad_q = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor grad_k = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)});
  Tensor grad_v = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  Tensor grad_pos = none_like(lse), grad_table = none_like(lse), grad_bias = none_like(lse);
  p.grad_q = grad_q.data_ptr(), p.grad_k = grad_k.data_ptr(), p.grad_v = grad_v.data_ptr();
  if (table) {
    grad_pos = torch::stable::new_empty(*pos, {shape.batch, heads, shape.keys, 2});
    grad_table = torch::stable::new_empty(*table, table->sizes());
    if (shape.batch == 0) torch::stable::zero_(grad_table);
    p.grad_pos = grad_pos.data_ptr(), p.grad_table = grad_table.data_ptr();
  }
  if (bias && bias_grad) grad_bias = new_grad_bias(*bias, p);
  if (shape.batch > 0) cpu::kernels().attention_backward(p, torch_threads());
  if (table) {
    const int64_t groups = shape.groups;
    const Tensor by_head =
        torch::stable::view(grad_pos, {shape.batch, groups, heads / groups, shape.keys, 2});
    const int64_t head_dim[] = {2};
    grad_pos = torch::stable::sum(by_head, head_dim);
  }
  if (bias && bias_grad) grad_bias = torch::stable::to(grad_bias, q.scalar_type());
  return {grad_q, grad_k, grad_v, grad_pos, grad_table, grad_bias};
}

}  // namespace
}  // namespace dat

STABLE_TORCH_LIBRARY(dat_cuda, m) {
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
      "float scale, float dropout_p, str version, bool bias_grad) -> (Tensor grad_q, "
      "Tensor grad_k, Tensor grad_v, Tensor grad_pos, Tensor grad_rpe_table, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(dat_cuda, CPU, m) {
  m.impl("deform_sample_forward", TORCH_BOX(&dat::sample_forward));
  m.impl("deform_sample_backward", TORCH_BOX(&dat::sample_backward));
  m.impl("deform_attention_forward", TORCH_BOX(&dat::attention_forward));
  m.impl("deform_attention_backward", TORCH_BOX(&dat::attention_backward));
}

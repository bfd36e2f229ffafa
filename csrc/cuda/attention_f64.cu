// Launches the plain kernels, for float64.
#include "../kernels/attention_plain.cuh"
#include "plan.cuh"

namespace dat::cuda {

namespace {

Plan plain_plan(const AttentionShape& shape) {
  Plan plan{};
  padded_channels(shape);  // for its checks
  plan_scores(plan, shape);
  return plan;
}

// A warp for each of `items`.
template <class... Params, class... Args>
void launch_warps(const char* name, void (*kernel)(Params...), int64_t items, Stream stream,
                  const Args&... args) {
  launch(name, kernel, divide_up<int64_t>(items, kPlainWarps), kPlainWarps * kWarp, 0, stream,
         args...);
}

}  // namespace

template <class T>
void attention_forward_of(const AttentionForward& p, Stream stream) {
  const AttentionShape& shape = p.in.shape;
  launch_warps("attention_forward", attention_plain_forward_kernel<T>,
               shape.batch * shape.heads * shape.queries(), stream, p, plain_plan(shape));
}

template <class T>
size_t attention_backward_scratch_of(const AttentionBackward& p, bool) {
  const AttentionShape& shape = p.in.shape;
  return shape.batch * shape.heads * shape.queries() * sizeof(acc_t<T>);  // delta
}

template <class T>
void attention_backward_of(const AttentionBackward& p, void* scratch, bool deterministic,
                           Stream stream) {
  const AttentionShape& shape = p.in.shape;
  const Plan plan = plain_plan(shape);
  auto* delta = static_cast<acc_t<T>*>(scratch);
  const bool in_turn = deterministic && p.in.table;
  if (p.in.table)
    check(cudaMemsetAsync(p.grad_table, 0,
                          shape.heads * shape.table_h * shape.table_w * sizeof(acc_t<T>),
                          static_cast<cudaStream_t>(stream)),
          "clearing grad_rpe_table");
  launch_warps("attention_backward_queries", attention_plain_queries_kernel<T>,
               shape.batch * shape.heads * shape.queries(), stream, p, plan, delta);
  launch_warps("attention_backward_keys", attention_plain_keys_kernel<T>,
               shape.heads * (in_turn ? 1 : shape.batch * shape.keys), stream, p, plan, delta,
               in_turn);
}

template void attention_forward_of<double>(const AttentionForward&, Stream);
template size_t attention_backward_scratch_of<double>(const AttentionBackward&, bool);
template void attention_backward_of<double>(const AttentionBackward&, void*, bool, Stream);

}  // namespace dat::cuda

// Plans and launches the forward for one storage type; each attention_forward_*.cu instantiates
// one, so that they compile side by side.
#pragma once

#include "../kernels/attention_forward.cuh"
#include "plan.cuh"

namespace dat::cuda {

inline Plan plan_forward(const AttentionProblem& problem, const Choice& choice) {
  const AttentionShape& shape = problem.in.shape;
  Plan plan{};
  plan_scores(plan, shape);
  plan_tiles(plan, problem, choice.units, choice.tiles, shape.batch * shape.heads, {1.75, 0});
  plan_keys(plan, problem, problem.tensor_cores ? 32 : 16, choice.keys);
  plan.buffers = shape.keys > plan.key_stage ? choice.buffers : 1;
  plan.q_vec = problem.vector_of(problem.in.q, shape.width);
  plan.out_vec = problem.vector_of({nullptr, 0, shape.width, shape.width, 1}, shape.width);

  SharedLayout layout;
  plan.at_q = layout.take(problem.tile_bytes(plan));
  plan.at_k = layout.take(problem.keys_bytes(plan) * plan.buffers);
  plan.at_v = layout.take(problem.keys_bytes(plan) * plan.buffers);
  plan_window(plan, problem, layout, Pitch::fixed, false);
  const int warps = plan.rows * plan.columns / kWarp;
  if (!problem.tensor_cores)
    plan.at_scratch = layout.take(warps * 16 * kWarp * problem.shared_bytes());
  plan.shared = layout.total();
  return plan;
}

template <class T>
void attention_forward_of(const AttentionForward& p, Stream stream) {
  const AttentionShape& shape = p.in.shape;
  const Device device = Device::current();
  with_engine<T>(shape, device, [&](auto tag) {
    using E = typename decltype(tag)::type;
    AttentionProblem problem{p.in, E::kTensorCores, E::kChannels, wanted_bias(p.in),
                             device.multiprocessors};
    const Plan plan = best_plan(problem, device, "attention_forward", [&](const Choice& choice) {
      return plan_forward(problem, choice);
    });
    const int64_t blocks = plan.splits * shape.heads * shape.batch;
    with_bias<T>(problem.bias, [&](auto bias) {
      launch("attention_forward", attention_forward_kernel<E, decltype(bias)::value>, blocks,
             plan.rows * plan.columns, plan.shared, stream, p, plan);
    });
  });
}

}  // namespace dat::cuda

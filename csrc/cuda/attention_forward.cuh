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
  plan_tiles(plan, problem, choice.units, choice.tiles, shape.batch * shape.heads, kForwardCosts);
  plan_keys(plan, problem, problem.tensor_cores ? 32 : 16, choice.keys);
  plan.buffers = shape.keys > plan.key_stage ? choice.buffers : 1;
  plan.q_vec = problem.vector_of(problem.in.q, shape.width);
  plan.out_vec = problem.vector_of({nullptr, 0, shape.width, shape.width, 1}, shape.width);

  SharedLayout layout;
  plan.at_q = layout.take(problem.tile_bytes(plan));
  plan.at_k = layout.take(problem.keys_bytes(plan) * plan.buffers);
  plan.at_v = layout.take(problem.keys_bytes(plan) * plan.buffers);
  plan_window(plan, problem, layout, Walk::keys, false);
  const int warps = plan.rows * plan.columns / kWarp / problem.stack;
  if (!problem.tensor_cores)
    plan.at_scratch = layout.take(warps * 16 * kWarp * problem.shared_bytes());
  plan.shared = layout.total();
  return plan;
}

// Whether warps take two units at a time, one below the other: where eight queries share much of
// their way to the table's values.
template <class E>
constexpr bool kHasStacks = E::Tall::kStack == 2 && E::kChannels == 32;
inline bool wants_stacks(const AttentionProblem& problem) {
  const double slope = table_axis<double>(problem.in.shape.table_h, problem.in.shape.height,
                                          problem.in.shape.version)
                           .slope;
  return (problem.bias == Bias::slope && slope > 6. / 7 - 1e-6) || problem.bias == Bias::shallow;
}

template <class E, Bias kBias>
void launch_forward(const AttentionForward& p, const Plan& plan, Stream stream) {
  const AttentionShape& shape = p.in.shape;
  launch("attention_forward", attention_forward_kernel<E, kBias>,
         plan.splits * shape.heads * shape.batch, plan.rows * plan.columns / E::kStack, plan.shared,
         stream, p, plan);
}

template <class T>
void attention_forward_of(const AttentionForward& p, Stream stream) {
  const Device device = Device::current();
  with_engine<T>(p.in.shape, device, [&](auto tag) {
    using E = typename decltype(tag)::type;
    const auto plan_for = [&](AttentionProblem& problem) {
      return best_plan(problem, device, "attention_forward",
                       [&](const Choice& choice) { return plan_forward(problem, choice); });
    };
    AttentionProblem problem{p.in, E::kTensorCores, E::kChannels, wanted_bias(p.in),
                             device.multiprocessors};
    if constexpr (kHasStacks<E>)
      if (wants_stacks(problem)) {
        AttentionProblem stacks = problem;
        stacks.stack = 2;
        const Plan plan = plan_for(stacks);
        if (stacks.bias == Bias::slope)
          return launch_forward<typename E::Tall, Bias::slope>(p, plan, stream);
        if (stacks.bias == Bias::shallow)
          return launch_forward<typename E::Tall, Bias::shallow>(p, plan, stream);
      }
    const Plan plan = plan_for(problem);
    with_bias(problem.bias,
              [&](auto bias) { launch_forward<E, decltype(bias)::value>(p, plan, stream); });
  });
}

}  // namespace dat::cuda

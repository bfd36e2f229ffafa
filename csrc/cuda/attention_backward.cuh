// Plans and launches the backward for one storage type: the pass over queries, the pass over keys,
// and, deterministic, the sum of the blocks' tables.
#pragma once

#include "../kernels/attention_backward_finish.cuh"
#include "../kernels/attention_backward_keys.cuh"
#include "../kernels/attention_backward_queries.cuh"
#include "attention_backward_columns.cuh"
#include "plan.cuh"

namespace dat::cuda {

inline Plan plan_backward_queries(const AttentionProblem& problem, const AttentionBackward& p,
                                  const Choice& choice) {
  const AttentionShape& shape = problem.in.shape;
  Plan plan{};
  plan_scores(plan, shape);
  plan_tiles(plan, problem, choice.units, choice.tiles, shape.batch * shape.heads, kQueriesCosts);
  plan_keys(plan, problem, 16, choice.keys);
  plan.buffers = shape.keys > plan.key_stage ? choice.buffers : 1;
  plan.q_vec = problem.vector_of(problem.in.q, shape.width);
  plan.grad_out_vec = problem.vector_of(p.grad_out, shape.width);
  plan.out_vec = problem.vector_of({nullptr, 0, shape.width, shape.width, 1}, shape.width);

  SharedLayout layout;
  plan.at_q = layout.take(problem.tile_bytes(plan));
  plan.at_grad_out = layout.take(problem.tile_bytes(plan));
  plan.at_k = layout.take(problem.keys_bytes(plan) * plan.buffers);
  plan.at_v = layout.take(problem.keys_bytes(plan) * plan.buffers);
  const int area = plan.rows * plan.columns;
  plan.at_rows = layout.take(area * problem.acc_bytes());
  plan_window(plan, problem, layout, Walk::keys, false);
  if (!problem.tensor_cores)
    plan.at_scratch = layout.take(area / kWarp * 16 * kWarp * problem.shared_bytes());
  plan.shared = layout.total();
  return plan;
}

inline Plan plan_backward_keys(const AttentionProblem& problem, const AttentionBackward& p,
                               bool deterministic, const Choice& choice) {
  const AttentionShape& shape = problem.in.shape;
  Plan plan{};
  plan_scores(plan, shape);
  plan_keys(plan, problem, kKeysOfWarp, choice.keys);
  plan.buffers = 1;
  plan_tiles(plan, problem, choice.units, choice.tiles,
             shape.batch * shape.heads * divide_up<int64_t>(shape.keys, plan.key_stage),
             kKeysCosts);
  plan.q_vec = problem.vector_of(problem.in.q, shape.width);
  plan.grad_out_vec = problem.vector_of(p.grad_out, shape.width);
  plan.read_out_vec = problem.vector_of(p.out, shape.width);
  plan.out_vec = problem.vector_of({nullptr, 0, shape.width, shape.width, 1}, shape.width);

  SharedLayout layout;
  plan.at_q = layout.take(problem.tile_bytes(plan));
  plan.at_grad_out = layout.take(problem.tile_bytes(plan));
  plan.at_k = layout.take(problem.keys_bytes(plan));
  plan.at_v = layout.take(problem.keys_bytes(plan));
  plan.at_rows = layout.take(2 * plan.rows * plan.columns * problem.acc_bytes());
  plan_window(plan, problem, layout, Walk::queries, !deterministic);
  plan.with_q = gives_grad_q(problem.tensor_cores, problem.channels) && !problem.in.bias.data &&
                KeyPlace::key_tiles(shape, plan) <= kMostParts &&
                grad_q_parts(problem, plan) * int64_t(problem.acc_bytes()) <= kMostPartBytes;
  if (plan.with_q)
    plan.at_grads =
        layout.take(std::max(problem.tile_bytes(plan),
                             size_t(plan.key_stage) * plan.query_pitch * problem.shared_bytes()));
  if (!problem.tensor_cores) {  // of the warps that there are units for
    const int units = plan.rows * plan.columns / kWarp;
    const int warps = std::min(kKeyWarps, plan.key_stage / kKeysOfWarp * units);
    plan.at_scratch = layout.take(warps * 16 * kWarp * problem.shared_bytes());
  }
  // The sums take the place of the tiles in the end.
  const size_t sums = size_t(problem.channels) * plan.key_pitch * problem.acc_bytes();
  layout.used = std::max(layout.used, sums);
  plan.shared = layout.total();
  return plan;
}

inline int64_t key_blocks(const AttentionShape& shape, const Plan& plan) {
  return shape.batch * shape.heads * KeyPlace::key_tiles(shape, plan) * plan.splits;
}

// Cuts the scratch: from null, only measures.
struct BackwardLayout {
  BackwardScratch scratch{};
  size_t bytes = 0, zeros_at = 0, zeros_bytes = 0;
  int tables = 0;

  BackwardLayout(void* base, const AttentionProblem& problem, const Plan& plan,
                 bool deterministic) {
    const AttentionShape& shape = problem.in.shape;
    const auto take = [&](int64_t values) -> void* {
      void* at = base ? static_cast<char*>(base) + bytes : nullptr;
      bytes += divide_up<size_t>(values * problem.acc_bytes(), 256) * 256;
      return at;
    };
    const int64_t heads = shape.batch * shape.heads;
    const int64_t parts = plan.with_q ? grad_q_parts(problem, plan) : 0;
    if (!plan.with_q) scratch.delta = take(heads * shape.queries());
    if (parts) scratch.grad_q = take(parts);
    if (plan.splits > 1) {
      scratch.grad_k = take(plan.splits * heads * shape.head_dim * shape.keys);
      scratch.grad_v = take(plan.splits * heads * shape.head_dim * shape.keys);
      if (problem.in.table) scratch.grad_pos = take(plan.splits * heads * shape.keys * 2);
    }
    zeros_at = bytes;
    if (plan.splits > 1)
      scratch.arrivals = static_cast<int*>(take(key_blocks(shape, plan) / plan.splits));
    if (parts) scratch.grad_q_arrivals = static_cast<int*>(take(heads * plan.splits));
    if (deterministic && problem.in.table) {
      tables = int(key_blocks(shape, plan) / heads);
      scratch.grad_table = take(tables * heads * shape.table_h * shape.table_w);
    }
    zeros_bytes = bytes - zeros_at;
  }
};

template <class T>
struct Backward {
  const AttentionBackward& p;
  bool deterministic;
  Device device = Device::current();

  // Calls run(engine tag, problem, plan of the pass over keys, whether it walks down columns).
  template <class F>
  void with_plan(const F& run) const {
    with_engine<T>(p.in.shape, device, [&](auto tag) {
      using E = typename decltype(tag)::type;
      AttentionProblem problem{p.in, E::kTensorCores, E::kChannels, wanted_bias(p.in),
                               device.multiprocessors};
      Plan small;
      if (plan_backward_columns(small, problem, p, deterministic, device))
        return run(tag, problem, small, true);
      const Plan plan = best_plan(problem, device, "attention_backward", [&](const Choice& choice) {
        return plan_backward_keys(problem, p, deterministic, choice);
      });
      run(tag, problem, plan, false);
    });
  }

  size_t scratch_bytes() const {
    size_t bytes = 0;
    with_plan([&](auto, const AttentionProblem& problem, const Plan& plan, bool) {
      bytes = BackwardLayout(nullptr, problem, plan, deterministic).bytes;
    });
    return bytes;
  }

  void operator()(void* memory, Stream stream) const {
    const AttentionShape& shape = p.in.shape;
    with_plan([&](auto tag, const AttentionProblem& problem, const Plan& plan, bool columns) {
      using E = typename decltype(tag)::type;
      const BackwardLayout layout(memory, problem, plan, deterministic);
      const auto clear = [&](void* data, size_t bytes) {
        check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)),
              "clearing memory of attention_backward");
      };
      if (layout.zeros_bytes)
        clear(static_cast<char*>(memory) + layout.zeros_at, layout.zeros_bytes);
      if (p.in.table && !layout.tables)
        clear(p.grad_table, shape.heads * shape.table_h * shape.table_w * problem.acc_bytes());

      if constexpr (sizeof(T) == 2)
        if (columns)
          return launch("attention_backward_columns", attention_backward_columns_kernel<T>,
                        key_blocks(shape, plan), plan.key_stage / kKeysOfWarp * kWarp, plan.shared,
                        stream, p, plan, layout.scratch);
      if (!plan.with_q) over_queries(tag, problem, layout, stream);
      with_bias(problem.bias, [&](auto bias) {
        launch("attention_backward_keys", attention_backward_keys_kernel<E, decltype(bias)::value>,
               key_blocks(shape, plan), kKeyWarps * kWarp, plan.shared, stream, p, plan,
               layout.scratch);
      });
      if (layout.tables) sum_tables(layout, stream);
    });
  }

  // The pass over queries, where the one over keys does not do its work as well.
  template <class Tag>
  void over_queries(Tag, AttentionProblem problem, const BackwardLayout& layout,
                    Stream stream) const {
    using E = typename Tag::type::Short;
    const AttentionShape& shape = p.in.shape;
    problem.bias = wanted_bias(p.in);
    const Plan plan = best_plan(problem, device, "attention_backward", [&](const Choice& choice) {
      return plan_backward_queries(problem, p, choice);
    });
    with_bias(problem.bias, [&](auto bias) {
      launch("attention_backward_queries",
             attention_backward_queries_kernel<E, decltype(bias)::value>,
             plan.splits * shape.heads * shape.batch, plan.rows * plan.columns, plan.shared, stream,
             p, plan, layout.scratch);
    });
  }

  void sum_tables(const BackwardLayout& layout, Stream stream) const {
    const AttentionShape& shape = p.in.shape;
    const SumJob job{layout.scratch.grad_table, p.grad_table,
                     shape.heads * shape.table_h * shape.table_w, int(layout.tables * shape.batch),
                     false};
    launch("attention_backward_finish", attention_backward_finish_kernel<T>,
           divide_up<int64_t>(job.threads(), 256), 256, 0, stream, job);
  }
};

template <class T>
size_t attention_backward_scratch_of(const AttentionBackward& p, bool deterministic) {
  return Backward<T>{p, deterministic}.scratch_bytes();
}

template <class T>
void attention_backward_of(const AttentionBackward& p, void* scratch, bool deterministic,
                           Stream stream) {
  Backward<T>{p, deterministic}(scratch, stream);
}

}  // namespace dat::cuda

// Plans the backward of small maps.
#pragma once

#include "../kernels/attention_backward_columns.cuh"
#include "plan.cuh"

namespace dat::cuda {

// Values that all tiles of keys have of grad_q; 0 where there is one.
inline int64_t grad_q_parts(const AttentionProblem& problem, const Plan& plan) {
  const AttentionShape& shape = problem.in.shape;
  const int64_t tiles = KeyPlace::key_tiles(shape, plan);
  return tiles == 1 ? 0
                    : tiles * shape.batch * shape.heads * plan.splits * plan.tiles_down *
                          problem.channels * plan.rows * plan.columns;
}

// Of `blocks` that share an (image, head).
inline Plan plan_backward_columns(const AttentionProblem& problem, const AttentionBackward& p,
                                  int blocks) {
  using E = Columns<__half>;
  const AttentionShape& shape = problem.in.shape;
  Plan plan{};
  plan_scores(plan, shape);
  plan_keys(plan, problem, kKeysOfWarp, kMaxKeys);
  const int tiles = int(divide_up<int64_t>(shape.keys, kKeysOfWarp));
  plan.key_stage = divide_up(tiles, blocks) * kKeysOfWarp;
  plan.key_words = false;
  plan.rows = E::kRows, plan.columns = E::kWidth;
  plan.down = plan.across = plan.tiles_down = plan.splits = plan.buffers = 1;
  plan.with_q = true;
  // Two slots at a time are neighbours.
  plan.q_vec = std::min(problem.vector_of(problem.in.q, shape.width), 2);
  plan.grad_out_vec = std::min(problem.vector_of(p.grad_out, shape.width), 2);
  plan.read_out_vec = std::min(problem.vector_of(p.out, shape.width), 2);
  plan.out_vec =
      std::min(problem.vector_of({nullptr, 0, shape.width, shape.width, 1}, shape.width), 2);
  plan.window_rows = window_cells(plan.y, E::kRows);
  plan.window_columns = window_cells(plan.x, E::kWidth);
  // All that a walk meets is in the window.
  plan.near_y = float(plan.window_rows - E::kRows - 1);
  plan.near_x = float(plan.window_columns - E::kWidth);

  SharedLayout layout;
  const size_t tile = size_t(E::kChannels) * E::kQueryPitch * sizeof(__half);
  const size_t keys = size_t(E::kChannels) * E::kKeyPitch * sizeof(__half);
  plan.at_q = layout.take(tile);
  plan.at_grad_out = layout.take(tile);
  plan.at_k = layout.take(keys);
  plan.at_grads =
      layout.take(std::max(tile + keys, plan.key_stage * E::kQueryPitch * sizeof(__half)));
  plan.at_v = plan.at_grads + int(tile);  // both give way to gradients
  plan.at_rows = layout.take(2 * plan.rows * plan.columns * sizeof(float));
  plan.at_window = layout.take(round_up(2 * ColumnWindow::kSize, 4) * sizeof(float));
  plan.at_keys = layout.take(plan.key_stage * sizeof(ColumnWindow::Key));
  plan.shared = layout.total();
  return plan;
}

// Takes the fewest blocks that leave no multiprocessor without one. Returns whether the problem is
// of those that attention_backward_columns.cuh is for.
inline bool plan_backward_columns(Plan& plan, const AttentionProblem& problem,
                                  const AttentionBackward& p, bool deterministic,
                                  const Device& device) {
  using E = Columns<__half>;
  const AttentionShape& shape = problem.in.shape;
  if (!problem.tensor_cores || problem.channels != E::kChannels || problem.bias != Bias::slope ||
      deterministic || shape.dropout_p > 0 || shape.height > E::kRows || shape.width >= E::kWidth ||
      shape.keys % 2)
    return false;
  const int tiles = int(divide_up<int64_t>(shape.keys, kKeysOfWarp));
  int blocks = divide_up(tiles, E::kMostTiles);
  if (blocks > kMostParts) return false;
  while (blocks * shape.batch * shape.heads < device.multiprocessors &&
         blocks < std::min(tiles, kMostParts))
    ++blocks;
  plan = plan_backward_columns(problem, p, blocks);
  return plan.shared <= device.shared_per_block && plan.key_vec != 1 &&
         plan.window_rows <= ColumnWindow::kRows &&
         plan.window_columns <= ColumnWindow::kMostColumns &&
         grad_q_parts(problem, plan) * int64_t(sizeof(float)) <= kMostPartBytes &&
         plan.y.stays_near(shape.height) && plan.x.stays_near(shape.width);
}

}  // namespace dat::cuda

// Attention within windows (WindowRows), backward: who computes which window. The forward is
// deform_attention's: no two windows share a query.
//
// Windows may share keys, whose gradients are added up where they lie, and all share the bias. So a
// task takes one head of a group of windows that follow each other, one after the other, and sums
// the bias's gradient for its group alone. A group shares keys with its neighbours at most: even
// groups first, then odd ones, and no two tasks ever add to the same place.
#pragma once

#include "attention_backward.h"

namespace dat::cpu::DAT_SIMD {

template <class S>
void window_backward(const AttentionBackward& p, int64_t groups, const Threads& threads) {
  using T = acc_t<S>;
  const AttentionShape& shape = p.in.shape;
  const TileGrid grid = choose_tiles<T>(shape);
  for (const int64_t parity : {0, 1}) {
    const int64_t tasks = (groups + 1 - parity) / 2 * shape.heads;
    std::atomic<int64_t> next{0};
    parallel(threads, int(std::min<int64_t>(tasks, threads.count)), [&](int) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
        const int64_t group = task / shape.heads * 2 + parity, h = task % shape.heads;
        const Slice slice{shape.batch * group / groups, shape.batch * (group + 1) / groups, h,
                          h + 1};
        AttentionBackward mine = p;
        mine.grad_bias = static_cast<T*>(p.grad_bias) + group * shape.heads * p.grad_bias_head;
        SharedSums<T> none;  // the task has all queries of its windows
        backward_run<S>(mine, slice, grid, 0, slice.pairs() * grid.count(), none);
      }
    });
  }
}

}  // namespace dat::cpu::DAT_SIMD

// torch's threads for the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"

namespace dat {

inline cpu::Threads torch_threads() {
  return {int(torch::stable::get_num_threads()),
          [](int tasks, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task) body(context, int(task));
            });
          }};
}

}  // namespace dat

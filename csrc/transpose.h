// Matrices transposed on the CPU: what dat_cuda/projections.py does with maps there.
//
//   x [B, R, C], with gaps between rows as they come; out [B, C, R], contiguous
#pragma once

#include <limits>

#include "ops.h"
#include "threads.h"

namespace dat {

inline Tensor transpose(const Tensor& x) {
  check_dims(x, "x", 3, "[B, R, C]");
  const DType dtype = full_precision_dtype(x, "x");
  STD_TORCH_CHECK(x.stride(2) == 1 || x.size(2) == 1,
                  "x must have the elements of a row side by side, got stride ", x.stride(2));
  STD_TORCH_CHECK(std::max(x.size(1), x.size(0) * x.size(2)) <= std::numeric_limits<int>::max(),
                  "x must have fewer than 2^31 rows and 2^31 columns in all, got ",
                  shape_string(x));
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1)});
  const Transpose p{x.size(0),   x.size(1),   x.size(2),    dtype,
                    x.stride(0), x.stride(1), x.data_ptr(), out.data_ptr()};
  if (out.numel() > 0) cpu::kernels().transpose(p, torch_threads());
  return out;
}

inline void define_transpose_operator(torch::stable::detail::StableLibrary& m) {
  m.def("transpose(Tensor x) -> Tensor");
}

inline void implement_transpose_operator(torch::stable::detail::StableLibrary& m) {
  m.impl("transpose", TORCH_BOX(&transpose));
}

}  // namespace dat

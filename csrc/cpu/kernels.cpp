// One instruction set's table of kernels: this file is compiled once for each, with DAT_SIMD as its
// name.
#include "kernels.h"

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_windows.h"
#include "depthwise.h"
#include "offset_head.h"
#include "sample.h"
#include "transpose.h"

#define DAT_STRING_(x) #x
#define DAT_STRING(x) DAT_STRING_(x)

namespace dat::cpu::DAT_SIMD {
namespace {

// Calls run with a value of the storage type.
template <class F>
void for_dtype(DType dtype, const F& run) {
  switch (dtype) {
    case DType::f32: return run(float());
    case DType::f64: return run(double());
    case DType::f16: return run(half_t());
    case DType::bf16: return run(bfloat16_t());
  }
}

}  // namespace

extern const Kernels table;
const Kernels table = {
    DAT_STRING(DAT_SIMD),
    [](const SampleForward& p, const Threads& threads) {
      for_dtype(p.shape.dtype, [&](auto s) { sample_forward<decltype(s)>(p, threads); });
    },
    [](const SampleBackward& p, const Threads& threads) {
      for_dtype(p.shape.dtype, [&](auto s) { sample_backward<decltype(s)>(p, threads); });
    },
    [](const AttentionForward& p, const Threads& threads) {
      for_dtype(p.in.shape.dtype, [&](auto s) { attention_forward<decltype(s)>(p, threads); });
    },
    [](const AttentionBackward& p, const Threads& threads) {
      for_dtype(p.in.shape.dtype, [&](auto s) { attention_backward<decltype(s)>(p, threads); });
    },
    [](const AttentionBackward& p, int64_t groups, const Threads& threads) {
      for_dtype(p.in.shape.dtype,
                [&](auto s) { window_backward<decltype(s)>(p, groups, threads); });
    },
    [](const DepthwiseForward& p, const Threads& threads) {
      (p.shape.dtype == DType::f64 ? depthwise_forward<double> : depthwise_forward<float>)(p,
                                                                                           threads);
    },
    [](const DepthwiseBackward& p, const Threads& threads) {
      (p.shape.dtype == DType::f64 ? depthwise_backward<double>
                                   : depthwise_backward<float>)(p, threads);
    },
    [](const OffsetHeadForward& p, const Threads& threads) {
      (p.in.shape.dtype == DType::f64 ? offset_head_forward<double>
                                      : offset_head_forward<float>)(p, threads);
    },
    [](const OffsetHeadBackward& p, const Threads& threads) {
      (p.in.shape.dtype == DType::f64 ? offset_head_backward<double>
                                      : offset_head_backward<float>)(p, threads);
    },
    [](const Transpose& p, const Threads& threads) {
      (p.dtype == DType::f64 ? transpose<double> : transpose<float>)(p, threads);
    },
};

}  // namespace dat::cpu::DAT_SIMD

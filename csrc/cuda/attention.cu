// The attention's entry points: by storage type, which other files instantiate.
#include "../kernels/common.cuh"
#include "launch.cuh"

namespace dat::cuda {

template <class T>
void attention_forward_of(const AttentionForward& p, Stream stream);
template <class T>
size_t attention_backward_scratch_of(const AttentionBackward& p, bool deterministic);
template <class T>
void attention_backward_of(const AttentionBackward& p, void* scratch, bool deterministic,
                           Stream stream);

namespace {

// Calls run with a value of the storage type.
template <class F>
auto for_dtype(DType dtype, const F& run) {
  switch (dtype) {
    case DType::f32: return run(float());
    case DType::f64: return run(double());
    case DType::f16: return run(__half());
    default: return run(__nv_bfloat16());
  }
}

}  // namespace

void attention_forward(const AttentionForward& p, Stream stream) {
  for_dtype(p.in.shape.dtype, [&](auto t) { attention_forward_of<decltype(t)>(p, stream); });
}

size_t attention_backward_scratch(const AttentionBackward& p, bool deterministic) {
  return for_dtype(p.in.shape.dtype, [&](auto t) {
    return attention_backward_scratch_of<decltype(t)>(p, deterministic);
  });
}

void attention_backward(const AttentionBackward& p, void* scratch, bool deterministic,
                        Stream stream) {
  for_dtype(p.in.shape.dtype,
            [&](auto t) { attention_backward_of<decltype(t)>(p, scratch, deterministic, stream); });
}

}  // namespace dat::cuda

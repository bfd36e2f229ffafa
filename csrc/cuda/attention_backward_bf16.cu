#include "attention_backward.cuh"

namespace dat::cuda {

template size_t attention_backward_scratch_of<__nv_bfloat16>(const AttentionBackward&, bool);
template void attention_backward_of<__nv_bfloat16>(const AttentionBackward&, void*, bool, Stream);

}  // namespace dat::cuda

#include "attention_forward.cuh"

namespace dat::cuda {

template void attention_forward_of<__nv_bfloat16>(const AttentionForward&, Stream);

}  // namespace dat::cuda

#include "attention_forward.cuh"

namespace dat::cuda {

template void attention_forward_of<float>(const AttentionForward&, Stream);

}  // namespace dat::cuda

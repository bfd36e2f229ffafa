#include "attention_forward.cuh"

namespace dat::cuda {

template void attention_forward_of<__half>(const AttentionForward&, Stream);

}  // namespace dat::cuda

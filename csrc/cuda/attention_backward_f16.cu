#include "attention_backward.cuh"

namespace dat::cuda {

template size_t attention_backward_scratch_of<__half>(const AttentionBackward&, bool);
template void attention_backward_of<__half>(const AttentionBackward&, void*, bool, Stream);

}  // namespace dat::cuda

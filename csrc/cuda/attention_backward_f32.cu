#include "attention_backward.cuh"

namespace dat::cuda {

template size_t attention_backward_scratch_of<float>(const AttentionBackward&, bool);
template void attention_backward_of<float>(const AttentionBackward&, void*, bool, Stream);

}  // namespace dat::cuda

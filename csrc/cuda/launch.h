// The CUDA kernels' entry points: each enqueues its launches on a stream of the current device and
// returns. Torch-free; ops.cpp sets the device and owns every tensor.
#pragma once

#include <cstddef>
#include <stdexcept>

#include "../params.h"

namespace dat::cuda {

// The runtime refused something: names the kernel and its configuration.
struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Stream = void*;  // cudaStream_t

void sample_forward(const SampleForward& p, Stream stream);
void sample_backward(const SampleBackward& p, Stream stream);
void attention_forward(const AttentionForward& p, Stream stream);

// Scratch memory that the backward needs, in bytes.
size_t attention_backward_scratch(const AttentionBackward& p, bool deterministic);
void attention_backward(const AttentionBackward& p, void* scratch, bool deterministic,
                        Stream stream);

}  // namespace dat::cuda

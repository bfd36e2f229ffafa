// The CPU kernels' entry points. Each instruction set has a table of them; dispatch.cpp picks one.
#pragma once

#include <cstddef>

#include "../params.h"

namespace dat::cpu {

// How kernels use threads without knowing torch: run(tasks, body, context) calls
// body(context, task) for every task in [0, tasks), in any order, on at most `threads` threads.
struct Threads {
  int count;
  void (*run)(int tasks, void (*body)(void* context, int task), void* context);
};

template <class F>
void parallel(const Threads& threads, int tasks, const F& f) {
  threads.run(
      tasks, [](void* context, int task) { (*static_cast<const F*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

struct Kernels {
  const char* name;
  void (*sample_forward)(const SampleForward&, const Threads&);
  void (*sample_backward)(const SampleBackward&, const Threads&);
  void (*attention_forward)(const AttentionForward&, const Threads&);
  void (*attention_backward)(const AttentionBackward&, const Threads&);
  void (*window_backward)(const AttentionBackward&, int64_t groups, const Threads&);
  void (*depthwise_forward)(const DepthwiseForward&, const Threads&);
  void (*depthwise_backward)(const DepthwiseBackward&, const Threads&);
  void (*offset_head_forward)(const OffsetHeadForward&, const Threads&);
  void (*offset_head_backward)(const OffsetHeadBackward&, const Threads&);
  void (*transpose)(const Transpose&, const Threads&);
};

// The best table for this machine; DAT_SIMD=avx2|baseline in the environment asks for a lesser one.
const Kernels& kernels();
const char* simd_name();

// Zeroed scratch memory of the calling thread, aligned to 64 bytes, valid until its next call. Kept
// between calls: fresh pages cost more than the small problems' arithmetic.
void* thread_scratch(size_t bytes);

}  // namespace dat::cpu

// Which table of kernels this machine runs, and the threads' scratch memory.
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"

namespace dat::cpu {

namespace baseline {
extern const Kernels table;
}
#if defined(DAT_HAVE_AVX2)
namespace avx2 {
extern const Kernels table;
}
#endif
#if defined(DAT_HAVE_AVX512)
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("DAT_SIMD");
  [[maybe_unused]] const auto allowed = [wanted](const char* name) {
    return !wanted || !std::strcmp(wanted, name);
  };
#if defined(DAT_HAVE_AVX512)
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::table;
#endif
#if defined(DAT_HAVE_AVX2)
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return avx2::table;
#endif
  return baseline::table;
}

class Scratch {
 public:
  ~Scratch() { release(); }
  void* get(size_t bytes) {
    if (bytes > size_) {
      release();
      memory_ = ::operator new(bytes, std::align_val_t(64));
      std::memset(memory_, 0, bytes);
      size_ = bytes;
    }
    return memory_;
  }

 private:
  void release() { ::operator delete(memory_, std::align_val_t(64)); }
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

const char* simd_name() { return kernels().name; }

void* thread_scratch(size_t bytes) {
  thread_local Scratch scratch;
  return scratch.get(bytes);
}

}  // namespace dat::cpu

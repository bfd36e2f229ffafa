// Launching with a check, for the files beside this one.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <string>

#include "launch.h"

namespace dat::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is said here; leave nothing behind for the next launch
  throw LaunchError(std::string("dat_cuda: ") + what + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// One launch. `blocks` goes along x of the grid, whose limit is 2^31 - 1.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
            Stream stream, const Args&... args) {
  if (blocks == 0) return;
  char config[200];
  std::snprintf(config, sizeof config,
                "launch of %s with %lld blocks of %d threads, %zu bytes shared", name,
                static_cast<long long>(blocks), threads, shared);
  if (blocks > 0x7fffffffLL)
    throw LaunchError(std::string("dat_cuda: ") + config +
                      ": too many blocks, use a smaller batch");
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
          config);
  kernel<<<unsigned(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), config);
}

}  // namespace dat::cuda

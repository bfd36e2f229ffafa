// What every header in math/ needs: host/device qualifiers and a namespace of its own per build.
//
// The CPU kernels are compiled several times with different instruction sets. An inline function
// that two of those builds shared would be merged by the linker, and the machine could meet
// instructions it does not have; a namespace per build (DAT_SIMD) keeps them apart.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DAT_HD __host__ __device__ __forceinline__
#else
#define DAT_HD inline
#endif

#ifndef DAT_SIMD
#define DAT_SIMD generic
#endif

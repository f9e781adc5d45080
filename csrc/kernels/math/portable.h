// What both compilers need to read the mathematics: qualifiers, loops of up to 16 terms written out, and a bit cast
// that vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTVAE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTVAE_HOST_DEVICE inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define FASTVAE_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // the host's half of a CUDA file, which knows neither
#define FASTVAE_UNROLL
#else
#define FASTVAE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fastvae::math {

template <typename To, typename From>
FASTVAE_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
#if defined(__CUDACC__)
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
#else
  return __builtin_bit_cast(To, from);
#endif
}

}  // namespace fastvae::math

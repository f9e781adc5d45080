// What both compilers need to read the mathematics: qualifiers, and a bit cast that vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTVAE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTVAE_HOST_DEVICE inline __attribute__((always_inline))
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

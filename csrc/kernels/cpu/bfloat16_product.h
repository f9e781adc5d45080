// c[m, n] (+)= sum over k of a[m, k] b[k, n] in float32, of which a and b are rounded to bfloat16 on the way.
//
// 2 m n k FLOPs, twice as many a cycle as in float32. Products of a pair of k are exact, their sums in float32: an
// error of 2^-9 an operand, as it is for whoever keeps his numbers in bfloat16.
#pragma once

#include "matrix_product.h"

namespace fastvae::cpu {

// Whether the processor multiplies pairs of bfloat16 (AVX512_BF16: AMD from Zen 4, Intel from Cooper Lake).
#if defined(__x86_64__) && defined(__GNUC__)
inline const bool kMultipliesBfloat16 = kWideRegisters && __builtin_cpu_supports("avx512bf16") != 0;
#else
inline constexpr bool kMultipliesBfloat16 = false;
#endif

// Where kMultipliesBfloat16 is true.
void bfloat16_product(const MatrixProduct<float>& product);

}  // namespace fastvae::cpu

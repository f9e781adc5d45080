// SplitMix64, the counter-based generator of Steele, Lea and Flood ("Fast splittable pseudorandom number generators",
// OOPSLA 2014), and standard normal numbers from its bits.
//
//   bits(key, n)  = mix(key + (n + 1) gamma)                       n = 0, 1, ...: in any order, on any device
//   normal(bits)  = sqrt(-2 log u) cos(2 pi v)                     (Box, Muller); u, v from the two halves of 64 bits
//
// log and cos have no branches, so that a plain loop vectorises; a normal number is within 4 ulp. Cost: 3 integer
// products for the bits, about 60 FLOPs for a normal number.
#pragma once

#include <cmath>

#include "elementary.h"

namespace fastvae::math {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15;

// A bijection of 64 bits that leaves no pattern.
FASTVAE_HOST_DEVICE uint64_t mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB;
  return bits ^ (bits >> 31);
}

FASTVAE_HOST_DEVICE uint64_t keyed_bits(uint64_t key, uint64_t number) { return mix(key + (number + 1) * kGamma); }

// A word of a sample and what it is multiplied by in the sample's hash, a sum of products with odd numbers; folded, so
// that every bit counts in the low ones.
FASTVAE_HOST_DEVICE uint64_t hash_multiplier(uint64_t word_index) { return keyed_bits(0, word_index) | 1; }
FASTVAE_HOST_DEVICE uint64_t hash_fold(uint64_t word) { return word ^ (word >> 32); }

// An integer below 2^52 as a double, where instruction sets have no conversion of 64 bits: the mantissa of 2^52.
constexpr uint64_t kTwoTo52 = 0x4330000000000000;
FASTVAE_HOST_DEVICE double exact_double(uint64_t integer) { return bit_cast<double>(integer | kTwoTo52) - 0x1p52; }

// The middle of one of 2^32 equal parts of (0, 1).
FASTVAE_HOST_DEVICE double unit(uint64_t half) { return (exact_double(half) + 0.5) * 0x1p-32; }

// log(x), x positive, normal and finite. x = 2^e m, m in [sqrt(1/2), sqrt(2)): log m = 2 atanh((m - 1) / (m + 1)).
FASTVAE_HOST_DEVICE double log_normal_number(double x) {
  constexpr uint64_t kRootHalf = 0x3FE6A09E667F3BCD, kOne = 0x3FF0000000000000, kMantissa = 0x000FFFFFFFFFFFFF;
  const uint64_t bits = bit_cast<uint64_t>(x) + (kOne - kRootHalf);
  const double e = exact_double(bits >> 52) - 1023.0;
  const auto m = bit_cast<double>((bits & kMantissa) + kRootHalf);
  constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  return e * kLn2High + (twice_atanh((m - 1.0) / (m + 1.0)) + e * kLn2Low);
}

// cos(2 pi v), v in [0, 1]. v = n / 4 + r, |r| <= 1/8: a sine or cosine of |2 pi r| <= pi / 4, by Taylor.
FASTVAE_HOST_DEVICE double cos_turns(double v) {
  constexpr double kRound = 0x1.8p52;
  const double shifted = 4.0 * v + kRound;
  const double r = v - 0.25 * (shifted - kRound);
  const double t = 6.283185307179586476925 * r;
  const double t2 = t * t;
  double c = 1.0 / 20922789888000.0;
  c = c * t2 - 1.0 / 87178291200.0;
  c = c * t2 + 1.0 / 479001600.0;
  c = c * t2 - 1.0 / 3628800.0;
  c = c * t2 + 1.0 / 40320.0;
  c = c * t2 - 1.0 / 720.0;
  c = c * t2 + 1.0 / 24.0;
  c = c * t2 - 0.5;
  c = c * t2 + 1.0;
  double s = 1.0 / 355687428096000.0;
  s = s * t2 - 1.0 / 1307674368000.0;
  s = s * t2 + 1.0 / 6227020800.0;
  s = s * t2 - 1.0 / 39916800.0;
  s = s * t2 + 1.0 / 362880.0;
  s = s * t2 - 1.0 / 5040.0;
  s = s * t2 + 1.0 / 120.0;
  s = s * t2 - 1.0 / 6.0;
  s = s * t2 * t + t;
  const auto quarter = bit_cast<uint64_t>(shifted);
  const double magnitude = (quarter & 1) != 0 ? s : c;
  return ((quarter + 1) & 2) != 0 ? -magnitude : magnitude;
}

FASTVAE_HOST_DEVICE double normal(uint64_t bits) {
  const double radius = sqrt(-2.0 * log_normal_number(unit(bits >> 32)));
  return radius * cos_turns(unit(bits & 0xFFFFFFFF));
}

}  // namespace fastvae::math

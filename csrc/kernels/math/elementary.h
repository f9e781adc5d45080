// exp, expm1, log1p, tanh and erf without branches, so that a plain loop over them vectorises.
//
//   exp(x)    = 2^n e^r,  n = round(x / ln 2),  r = x - n ln 2 (two-term), |r| <= ln 2 / 2, Taylor in r
//   expm1(x)  = 2^n (e^r - 1) + (2^n - 1)                        (exact to rounding near 0, where n = 0)
//   exp_excess(x) = e^x - 1 - x:  2^n (e^r - 1) + (2^n - 1) - x, and where n = 0 the series without its first term
//   log(x)    = n ln 2 + 2 atanh((m - 1) / (m + 1)),  x = 2^n m: a series in s^2 <= 1/9
//   log1p(t)  = 2 atanh(t / (2 + t)) for t in [0, 1]; elsewhere log(1 + t), mended by what rounding took
//   erf(x)    = two polynomials, interpolated at Chebyshev nodes in 50 digits; see there
//
// Cost: about 12 (float) or 20 (double) FLOPs each, three times that for erf. Error against the exact result, in float
// and in double, with and without fused multiply-adds: exp within 1.1 ulp, erf within 1.5, expm1, log and log1p_unit
// within 2, log1p within 4, tanh, sigmoid and softplus within 3, where exp neither overflows nor becomes subnormal
// (arguments are clamped to that range; NaN passes through). Asserted by tests/cpp/test_math.cpp over the whole range
// for each instruction set.
#pragma once

#include <cmath>
#include <limits>

#include "portable.h"

namespace fastvae::math {

template <typename T>
struct Ieee;

template <>
struct Ieee<float> {
  using Int = int32_t;
  static constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to the nearest integer
  static constexpr float kLn2High = 0.693359375F;
  static constexpr float kLn2Low = -2.12194440e-4F;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kLowest = -87.3F;
  static constexpr float kHighest = 88.3F;
  static constexpr int kMantissaBits = 23;
  static constexpr Int kBias = 127;
};

template <>
struct Ieee<double> {
  using Int = int64_t;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static constexpr double kLowest = -708.0;
  static constexpr double kHighest = 709.0;
  static constexpr int kMantissaBits = 52;
  static constexpr Int kBias = 1023;
};

// e^r - 1 - r for |r| <= ln 2 / 2; the first dropped term is below half an ulp of r.
FASTVAE_HOST_DEVICE float excess_series(float r) {
  float p = 1.0F / 5040.0F;
  p = p * r + 1.0F / 720.0F;
  p = p * r + 1.0F / 120.0F;
  p = p * r + 1.0F / 24.0F;
  p = p * r + 1.0F / 6.0F;
  p = p * r + 0.5F;
  return p * (r * r);
}

FASTVAE_HOST_DEVICE double excess_series(double r) {
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  return p * (r * r);
}

template <typename T>
struct PowerOfTwo {
  T scale;  // 2^n
  T rest;   // e^r - 1
};

template <typename T>
FASTVAE_HOST_DEVICE PowerOfTwo<T> reduce_exponent(T x) {
  using F = Ieee<T>;
  x = x < F::kLowest ? F::kLowest : x;
  x = x > F::kHighest ? F::kHighest : x;
  const T shifted = x * static_cast<T>(1.4426950408889634074) + F::kRound;
  const T n = shifted - F::kRound;
  const T r = (x - n * F::kLn2High) - n * F::kLn2Low;
  using Int = typename F::Int;
  const Int bits = (bit_cast<Int>(shifted) - bit_cast<Int>(F::kRound) + F::kBias) << F::kMantissaBits;
  return {bit_cast<T>(bits), excess_series(r) + r};
}

template <typename T>
FASTVAE_HOST_DEVICE T exp(T x) {
  const PowerOfTwo<T> p = reduce_exponent(x);
  return p.scale * p.rest + p.scale;
}

template <typename T>
FASTVAE_HOST_DEVICE T expm1(T x) {
  const PowerOfTwo<T> p = reduce_exponent(x);
  return p.scale * p.rest + (p.scale - T(1));
}

// Infinite where e^x would be clamped: what a Kullback-Leibler divergence makes of it must not look finite.
template <typename T>
FASTVAE_HOST_DEVICE T exp_excess(T x) {
  const PowerOfTwo<T> p = reduce_exponent(x);
  const T far = p.scale * p.rest + (p.scale - T(1)) - x;
  const T value = p.scale == T(1) ? excess_series(x) : far;
  return x > Ieee<T>::kHighest ? Ieee<T>::kInfinity : value;
}

// 2 atanh(s) = log((1 + s) / (1 - s)) for |s| <= 1/3.
FASTVAE_HOST_DEVICE float twice_atanh(float s) {
  const float s2 = s * s;
  float p = 1.0F / 15.0F;
  p = p * s2 + 1.0F / 13.0F;
  p = p * s2 + 1.0F / 11.0F;
  p = p * s2 + 1.0F / 9.0F;
  p = p * s2 + 1.0F / 7.0F;
  p = p * s2 + 1.0F / 5.0F;
  p = p * s2 + 1.0F / 3.0F;
  p = p * s2;
  return 2.0F * (s * p + s);
}

FASTVAE_HOST_DEVICE double twice_atanh(double s) {
  const double s2 = s * s;
  double p = 1.0 / 33.0;
  p = p * s2 + 1.0 / 31.0;
  p = p * s2 + 1.0 / 29.0;
  p = p * s2 + 1.0 / 27.0;
  p = p * s2 + 1.0 / 25.0;
  p = p * s2 + 1.0 / 23.0;
  p = p * s2 + 1.0 / 21.0;
  p = p * s2 + 1.0 / 19.0;
  p = p * s2 + 1.0 / 17.0;
  p = p * s2 + 1.0 / 15.0;
  p = p * s2 + 1.0 / 13.0;
  p = p * s2 + 1.0 / 11.0;
  p = p * s2 + 1.0 / 9.0;
  p = p * s2 + 1.0 / 7.0;
  p = p * s2 + 1.0 / 5.0;
  p = p * s2 + 1.0 / 3.0;
  p = p * s2;
  return 2.0 * (s * p + s);
}

// log(1 + t) for t in [0, 1].
template <typename T>
FASTVAE_HOST_DEVICE T log1p_unit(T t) {
  return twice_atanh(t / (T(2) + t));
}

// log(x) for numbers that are neither infinite nor subnormal: -infinity for 0, NaN for what is below it or NaN.
template <typename T>
FASTVAE_HOST_DEVICE T log(T x) {
  using F = Ieee<T>;
  using Int = typename F::Int;
  // x = 2^k m, m in [sqrt(1/2), sqrt(2)).
  const Int bits = bit_cast<Int>(x);
  const Int k = (bits - bit_cast<Int>(static_cast<T>(0.70710678118654752440))) >> F::kMantissaBits;
  const T m = bit_cast<T>(bits - (k << F::kMantissaBits));
  const T n = bit_cast<T>(bit_cast<Int>(F::kRound) + k) - F::kRound;
  const T found = n * F::kLn2High + (n * F::kLn2Low + twice_atanh((m - T(1)) / (m + T(1))));
  return x > T(0) ? found : (x == T(0) ? -F::kInfinity : std::numeric_limits<T>::quiet_NaN());
}

// log(1 + t) for t > -1.
template <typename T>
FASTVAE_HOST_DEVICE T log1p(T t) {
  const T u = T(1) + t;
  // What rounding took of u: log(u) t / (u - 1), which near 0 is t.
  return u == T(1) ? t : math::log(u) * (t / (u - T(1)));
}

template <typename T>
FASTVAE_HOST_DEVICE T absolute(T x) {
  return x < T(0) ? -x : x;
}

// erf(x) / x - 1 in u = x^2 <= 1.
FASTVAE_HOST_DEVICE float erf_near(float u) {
  float p = 7.875875063e-5F;
  p = p * u - 0.0008016864287F;
  p = p * u + 0.005189087423F;
  p = p * u - 0.02685421201F;
  p = p * u + 0.1128359472F;
  p = p * u - 0.3761262667F;
  p = p * u + 0.1283791658F;
  return p;
}

FASTVAE_HOST_DEVICE double erf_near(double u) {
  double p = -7.7958988270021422416e-10;
  p = p * u + 1.3720064546777685604e-8;
  p = p * u - 1.6208483801871705902e-7;
  p = p * u + 1.644742470331736241e-6;
  p = p * u - 0.000014924736907419660338;
  p = p * u + 0.00012055294904839707917;
  p = p * u - 0.00085483259753896920806;
  p = p * u + 0.0052239776071164227321;
  p = p * u - 0.02686617064323777036;
  p = p * u + 0.11283791670945006266;
  p = p * u - 0.37612638903183540438;
  p = p * u + 0.12837916709551256654;
  return p;
}

// e^(x^2) erfc(x) in t = (x - 2) / (x + 2), 1 <= x <= 4.
FASTVAE_HOST_DEVICE float erfc_far(float t) {
  float p = -0.0008379754387F;
  p = p * t + 0.006811140131F;
  p = p * t + 0.003732371759F;
  p = p * t - 0.07896830613F;
  p = p * t + 0.2416582015F;
  p = p * t - 0.4271859898F;
  p = p * t + 0.2553956763F;
  return p;
}

// The same in t = (x - 3) / (x + 3), 1 <= x <= 6.
FASTVAE_HOST_DEVICE double erfc_far(double t) {
  double p = 1.2801900862962661938e-6;
  p = p * t + 2.0236031796417566352e-6;
  p = p * t - 8.0080213194126843348e-6;
  p = p * t - 0.000012848894512523528795;
  p = p * t + 0.000064061820735305467428;
  p = p * t + 0.000045254726354833541373;
  p = p * t - 0.00059706235170932842794;
  p = p * t + 0.00070774644439015373147;
  p = p * t + 0.0042691363475082563605;
  p = p * t - 0.024392499318273193125;
  p = p * t + 0.071665837197748743386;
  p = p * t - 0.15011593650078743912;
  p = p * t + 0.24560380171233194479;
  p = p * t - 0.32623356004303717477;
  p = p * t + 0.17900115118138995023;
  return p;
}

// The middle of erfc_far's range, and where erf is 1 to the last digit.
template <typename T>
struct ErfRange;
template <>
struct ErfRange<float> {
  static constexpr float kMiddle = 2.0F;
  static constexpr float kEnd = 4.0F;
};
template <>
struct ErfRange<double> {
  static constexpr double kMiddle = 3.0;
  static constexpr double kEnd = 6.0;
};

// erf(x) = x + x P(x^2) up to |x| = 1, and 1 - e^(-x^2) W(|x|) with the sign of x beyond; both are computed.
template <typename T>
FASTVAE_HOST_DEVICE T erf(T x) {
  using Range = ErfRange<T>;
  const T magnitude = absolute(x);
  const T inner = magnitude < T(1) ? x : T(1);
  const T near = inner * erf_near(inner * inner) + inner;
  T outer = magnitude < T(1) ? T(1) : magnitude;
  outer = outer > Range::kEnd ? Range::kEnd : outer;  // keeps a NaN
  const T far = T(1) - math::exp(-outer * outer) * erfc_far((outer - Range::kMiddle) / (outer + Range::kMiddle));
  return magnitude < T(1) ? near : (x < T(0) ? -far : far);
}

// tanh(x) = -E / (2 + E) with E = expm1(-2 |x|), and the sign of x.
template <typename T>
FASTVAE_HOST_DEVICE T tanh(T x) {
  const T e = math::expm1(T(-2) * absolute(x));
  const T magnitude = -e / (T(2) + e);
  return x < T(0) ? -magnitude : magnitude;
}

// sigmoid(x) and log(1 + e^x) from one exponential of -|x|, which never overflows.
template <typename T>
struct SigmoidSoftplus {
  T sigmoid;
  T softplus;
};

template <typename T>
FASTVAE_HOST_DEVICE T sigmoid(T x) {
  const T e = math::exp(-absolute(x));
  const T s = T(1) / (T(1) + e);
  return x < T(0) ? e * s : s;
}

template <typename T>
FASTVAE_HOST_DEVICE T softplus(T x) {
  const T e = math::exp(-absolute(x));
  return (x > T(0) ? x : T(0)) + log1p_unit(e);
}

template <typename T>
FASTVAE_HOST_DEVICE SigmoidSoftplus<T> sigmoid_softplus(T x) {
  const T e = math::exp(-absolute(x));
  const T s = T(1) / (T(1) + e);
  return {x < T(0) ? e * s : s, (x > T(0) ? x : T(0)) + log1p_unit(e)};
}

}  // namespace fastvae::math

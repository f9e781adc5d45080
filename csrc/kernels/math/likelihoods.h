// Likelihood heads ll(a; x) = log p(x | a) of one output, for natural parameters a.
//
//   Bernoulli    ll = x a - log(1 + e^a)                 r = x - p       S = -p (1 - p),  p = sigmoid(a) = x - r
//   Gaussian     ll = -((x - a)/s)^2 / 2 - log s - log(2 pi)/2     r = (x - a)/s^2     S = -1/s^2
//   Laplace      ll = -|x - a|/s - log(2 s)              r = sign(x - a)/s   S = 0
//   Poisson      ll = x log(m / x) - (m - x),  m = e^a    r = x - m     S = r - x
//   NegativeBinomial  ll = x log(1 + d w / x) + d log(1 - w),  w = (m - x) / (m + d)     r = -d w
//                S = -(x + d) q (1 - q), q = m / (m + d)
//   Categorical  ll = a_c - logsumexp(a)                 r = onehot(c) - p   S u = -p (u - <p, u>)
//
// r = d ll/d a and S = d^2 ll/d a^2 are what the reverse and the adjoint sweep start from. The adjoint recovers p, e^a
// or q from x and the stored r, so that a itself need not be kept. Of counts, ll is relative to what it is where the
// mean is x: small numbers, whose sums lose nothing (deviances; Loader, "Fast and accurate computation of binomial
// probabilities", 2000). The caller adds the rest once a sample (Likelihood.base_measure).
#pragma once

#include "elementary.h"

namespace fastvae {

// Likelihoods whose outputs are independent: each(kind, head) for all of them. What is particular to one is its head,
// and nowhere else: their text, kernels of both compilers and tests follow from this list.
#define FASTVAE_INDEPENDENT_HEADS(each)                                                                       \
  each(kBernoulli, math::BernoulliHead) each(kGaussian, math::GaussianHead) each(kLaplace, math::LaplaceHead) \
      each(kPoisson, math::PoissonHead) each(kNegativeBinomial, math::NegativeBinomialHead)

#define FASTVAE_ENUMERATOR(KIND, Head) KIND,
enum class Likelihood : int { FASTVAE_INDEPENDENT_HEADS(FASTVAE_ENUMERATOR) kCategorical };
#undef FASTVAE_ENUMERATOR

struct LikelihoodSpec {
  Likelihood kind = Likelihood::kBernoulli;
  double scale = 1.0;     // gaussian, laplace; of a negative binomial its dispersion
  int64_t classes = 256;  // categorical

  bool is_discrete() const;  // whether x is a class or a count
};

namespace math {

template <typename T>
struct HeadValue {
  T log_prob;
  T residual;
};

// What a head says besides its functions and kName, its name in a likelihood's text.
struct HeadFacts {
  static constexpr const char* kNumber = "";  // what LikelihoodSpec::scale is, the number that follows the name
  static constexpr bool kDiscrete = false;    // whether x is a count
};

template <typename T>
struct BernoulliHead : HeadFacts {
  static constexpr const char* kName = "bernoulli";
  FASTVAE_HOST_DEVICE explicit BernoulliHead(const LikelihoodSpec&) {}
  FASTVAE_HOST_DEVICE T residual(T a, T x) const { return x - math::sigmoid(a); }
  FASTVAE_HOST_DEVICE HeadValue<T> both(T a, T x) const {
    const SigmoidSoftplus<T> s = math::sigmoid_softplus(a);
    return {x * a - s.softplus, x - s.sigmoid};
  }
  FASTVAE_HOST_DEVICE T curvature(T r, T x) const {
    const T p = x - r;
    return -p * (T(1) - p);
  }
  FASTVAE_HOST_DEVICE T cross(T, T) const { return T(1); }  // d r / d x
};

template <typename T>
struct GaussianHead : HeadFacts {
  static constexpr const char* kName = "gaussian";
  static constexpr const char* kNumber = "SCALE";
  T precision;
  T constant;
  FASTVAE_HOST_DEVICE explicit GaussianHead(const LikelihoodSpec& spec)
      : precision(static_cast<T>(1.0 / (spec.scale * spec.scale))),
        constant(static_cast<T>(-std::log(spec.scale) - 0.91893853320467274178)) {}
  FASTVAE_HOST_DEVICE T residual(T a, T x) const { return (x - a) * precision; }
  FASTVAE_HOST_DEVICE HeadValue<T> both(T a, T x) const {
    const T r = (x - a) * precision;
    return {T(-0.5) * (x - a) * r + constant, r};
  }
  FASTVAE_HOST_DEVICE T curvature(T, T) const { return -precision; }
  FASTVAE_HOST_DEVICE T cross(T, T) const { return precision; }
};

template <typename T>
struct LaplaceHead : HeadFacts {
  static constexpr const char* kName = "laplace";
  static constexpr const char* kNumber = "SCALE";
  T slope;
  T constant;
  FASTVAE_HOST_DEVICE explicit LaplaceHead(const LikelihoodSpec& spec)
      : slope(static_cast<T>(1.0 / spec.scale)), constant(static_cast<T>(-std::log(2.0 * spec.scale))) {}
  FASTVAE_HOST_DEVICE T residual(T a, T x) const {
    const T off = x - a;
    // NaN stays NaN, and at 0 the derivative is taken as 0.
    return off > T(0) ? slope : (off < T(0) ? -slope : off * slope);
  }
  FASTVAE_HOST_DEVICE HeadValue<T> both(T a, T x) const {
    const T r = residual(a, x);
    return {constant - (x - a) * r, r};
  }
  FASTVAE_HOST_DEVICE T curvature(T, T) const { return T(0); }
  FASTVAE_HOST_DEVICE T cross(T, T) const { return T(0); }
};

// log(e^a / k) where t = e^a / k - 1 is given with all its digits: near t = -1, where 1 + t has lost them, as a - log
// k.
template <typename T>
FASTVAE_HOST_DEVICE T log_ratio(T a, T k, T t) {
  const bool is_near = t > T(-0.5);
  const T sum = T(1) + t, rounded = sum == T(1) ? T(1) : t / (sum - T(1));  // as in log1p
  const T found = math::log(is_near ? sum : k);
  return is_near ? (sum == T(1) ? t : found * rounded) : a - found;
}

// 1 for a count of 0, where it is multiplied by 0.
template <typename T>
FASTVAE_HOST_DEVICE T divisor_of_count(T x) {
  return x > T(0) ? x : T(1);
}

template <typename T>
struct PoissonHead : HeadFacts {
  static constexpr const char* kName = "poisson";
  static constexpr bool kDiscrete = true;
  FASTVAE_HOST_DEVICE explicit PoissonHead(const LikelihoodSpec&) {}
  FASTVAE_HOST_DEVICE T residual(T a, T x) const { return x - math::exp(a); }
  FASTVAE_HOST_DEVICE HeadValue<T> both(T a, T x) const {
    const T r = residual(a, x), k = divisor_of_count(x);
    return {x * log_ratio(a, k, -r / k) + r, r};
  }
  FASTVAE_HOST_DEVICE T curvature(T r, T x) const { return r - x; }
  FASTVAE_HOST_DEVICE T cross(T, T) const { return T(1); }
};

// Of a count x, a log mean a and a dispersion d.
template <typename T>
struct CountDeviance {
  T mean, off;  // m and w
  T rest;       // log(1 - w) = log((x + d) / (m + d))
  T log_prob;   // ll
  FASTVAE_HOST_DEVICE CountDeviance(T a, T x, T d) : mean(math::exp(a)) {
    const T n = x + d, sum = mean + d, k = divisor_of_count(x);
    off = (mean - x) / sum;
    rest = log_ratio(T(0), sum / n, -off);
    log_prob = x * log_ratio(a, sum * (k / n), d * off / k) + d * rest;
  }
};

template <typename T>
struct NegativeBinomialHead : HeadFacts {
  static constexpr const char* kName = "negative_binomial";
  static constexpr const char* kNumber = "DISPERSION";
  static constexpr bool kDiscrete = true;
  T dispersion;
  FASTVAE_HOST_DEVICE explicit NegativeBinomialHead(const LikelihoodSpec& spec)
      : dispersion(static_cast<T>(spec.scale)) {}
  FASTVAE_HOST_DEVICE T residual(T a, T x) const {
    const T m = math::exp(a);
    return dispersion * ((x - m) / (m + dispersion));
  }
  FASTVAE_HOST_DEVICE HeadValue<T> both(T a, T x) const {
    const CountDeviance<T> at(a, x, dispersion);
    return {at.log_prob, -dispersion * at.off};
  }
  FASTVAE_HOST_DEVICE T curvature(T r, T x) const { return (r - x) * (dispersion + r) / (x + dispersion); }
  FASTVAE_HOST_DEVICE T cross(T r, T x) const { return (dispersion + r) / (x + dispersion); }
};

// The class of a pixel given as a float in [0, 1]; clamped, so that a wrong x can never become a wild index.
template <typename T>
FASTVAE_HOST_DEVICE int64_t class_of(T x, int64_t classes) {
  const T last = static_cast<T>(classes - 1);
  const T scaled = std::rint(x * last);
  const T bounded = scaled > T(0) ? (scaled < last ? scaled : last) : T(0);  // NaN becomes 0
  return static_cast<int64_t>(bounded);
}

// 0, or NaN for a pixel that is NaN or infinite: added to what its class gives, so that such a sample shows it.
template <typename T>
FASTVAE_HOST_DEVICE T class_defect(T x) {
  return x * T(0);
}

}  // namespace math

inline bool LikelihoodSpec::is_discrete() const {
  switch (kind) {
#define FASTVAE_DISCRETE_CASE(KIND, Head) \
  case Likelihood::KIND:                  \
    return Head<double>::kDiscrete;
    FASTVAE_INDEPENDENT_HEADS(FASTVAE_DISCRETE_CASE)
#undef FASTVAE_DISCRETE_CASE
    case Likelihood::kCategorical:
      break;
  }
  return true;
}
}  // namespace fastvae

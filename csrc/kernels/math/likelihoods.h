// Likelihood heads ll(a; x) = log p(x | a) of one output, for natural parameters a.
//
//   Bernoulli    ll = x a - log(1 + e^a)                 r = x - p       S = -p (1 - p),  p = sigmoid(a) = x - r
//   Gaussian     ll = -((x - a)/s)^2 / 2 - log s - log(2 pi)/2     r = (x - a)/s^2     S = -1/s^2
//   Categorical  ll = a_c - logsumexp(a)                 r = onehot(c) - p   S u = -p (u - <p, u>)
//
// r = d ll/d a and S = d^2 ll/d a^2 are what the reverse and the adjoint sweep start from. The adjoint recovers p
// from x and the stored r, so that a itself need not be kept.
#pragma once

#include "elementary.h"

namespace fastvae {

enum class Likelihood : int { kBernoulli = 0, kGaussian, kCategorical };

struct LikelihoodSpec {
  Likelihood kind = Likelihood::kBernoulli;
  double scale = 1.0;     // gaussian
  int64_t classes = 256;  // categorical
};

namespace math {

template <typename T>
struct HeadValue {
  T log_prob;
  T residual;
};

template <typename T>
struct BernoulliHead {
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
  FASTVAE_HOST_DEVICE T cross(T) const { return T(1); }  // d r / d x
};

template <typename T>
struct GaussianHead {
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
  FASTVAE_HOST_DEVICE T cross(T) const { return precision; }
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
}  // namespace fastvae

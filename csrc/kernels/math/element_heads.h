// Likelihoods whose elements are independent, each with n outputs y of its own: ll(y; x), the residual r_i = d ll / d
// y_i and the second derivatives S_ij, from y. (A network in C++ keeps r alone, likelihoods.h, for those where it says
// all.)
//
//   one output      the heads of likelihoods.h
//   StudentT        u = (x - y) / s;  ll = -(d + 1)/2 log(1 + u^2 / d) + const      r = (d + 1)/s u / (u^2 + d)
//                   S = (d + 1)/s^2 (u^2 - d) / (u^2 + d)^2
//   ContinuousBernoulli  h = y / 2;  ll = (x - 1/2) y - log(sinh(h) / h)            r = x - 1/2 - L(h)/2
//                   S = -L'(h)/4,  L(h) = coth(h) - 1/h
//   Gaussian of a mean and a log scale l, at least a floor;  u = (x - y) e^-l;  ll = -u^2/2 - l + const
//                   r = u e^-l, u^2 - 1      S = -e^-2l, -2 u e^-l, -2 u^2
//   DiscretizedLogistic of mean and log scale: of class x with ends u, l and w = u - l
//                   ll = log sigmoid(u) + log sigmoid(-l) + log(1 - e^-w); the first or second alone at the ends
//   NegativeBinomial of a log mean a and a log dispersion l;  m = e^a, d = e^l, n = x + d, w = (m - x) / (m + d)
//                   ll = x log(1 + d w / x) + d log(1 - w) - log(1 + x / d)/2 + S(n) - S(d)       S, D: gamma.h
//                   r = -d w, d (w + log(1 - w) + D(n) - D(d));  S with q = m / (m + d):
//                   -n q (1 - q), -d q w, r_l + d^2 (w^2 / n + D'(n) - D'(d))
//   Gamma           of a log mean a and a concentration k, a number or e^l;  t = log x - a
//                   ll = -k (e^t - 1 - t) - log x + log(k / 2 pi)/2 - S(k)          r = k (e^t - 1), -k (e^t - 1 - t +
//                   D(k)) S = -k e^t, r_a, r_l - k^2 D'(k).  It is given log x for x
//   ZeroInflated    of a log mean, a logit g and maybe a log dispersion: sigmoid(g) [x = 0] + sigmoid(-g)
//   NegativeBinomial
//
// Of counts, ll is relative to what it is where the mean is x, as in likelihoods.h.
#pragma once

#include <string_view>

#include "gamma.h"
#include "likelihoods.h"

namespace fastvae {

// each(kind, rules) for all of them: their text, kernels of both compilers and tests follow from this list.
#define FASTVAE_ELEMENT_HEADS(each)                                                                                   \
  each(kBernoulli, math::BernoulliRules) each(kGaussian, math::GaussianRules) each(kLaplace, math::LaplaceRules)      \
      each(kPoisson, math::PoissonRules) each(kNegativeBinomial, math::NegativeBinomialRules)                         \
          each(kStudentT, math::StudentTRules) each(kContinuousBernoulli, math::ContinuousBernoulliRules)             \
              each(kGaussianHead, math::GaussianHeadRules) each(kDiscretizedLogistic, math::DiscretizedLogisticRules) \
                  each(kGamma, math::GammaRules) each(kGammaHead, math::GammaHeadRules)                               \
                      each(kDispersedCounts, math::DispersedCountsRules)                                              \
                          each(kZeroInflatedCounts, math::ZeroInflatedCountsRules)                                    \
                              each(kZeroInflatedDispersedCounts, math::ZeroInflatedDispersedCountsRules)

#define FASTVAE_ENUMERATOR(KIND, Rules) KIND,
enum class ElementHead : int { FASTVAE_ELEMENT_HEADS(FASTVAE_ENUMERATOR) };
#undef FASTVAE_ENUMERATOR

struct ElementHeadSpec {
  ElementHead kind = ElementHead::kBernoulli;
  double numbers[2] = {1.0, 1.0};  // that follow the name in its text
};

namespace math {

template <int kCount>
struct RulesFacts {
  static constexpr int kOutputs = kCount;
  static constexpr int kNumbers = 0;      // that follow the name
  static constexpr bool kIsHead = false;  // whether it is in likelihoods.h, too
};

// What needs r alone, here from y.
template <typename Head, typename T>
struct OneOutput : RulesFacts<1> {
  static constexpr const char* kName = Head::kName;
  static constexpr int kNumbers = std::string_view(Head::kNumber).empty() ? 0 : 1;
  static constexpr bool kIsHead = true;
  Head head;
  FASTVAE_HOST_DEVICE explicit OneOutput(const double* numbers) : head(LikelihoodSpec{Likelihood(), numbers[0]}) {}
  FASTVAE_HOST_DEVICE T first(const T* y, T x, T* r) const {
    const HeadValue<T> both = head.both(y[0], x);
    r[0] = both.residual;
    return both.log_prob;
  }
  FASTVAE_HOST_DEVICE void second(const T* y, T x, const T* v, T* out) const {
    out[0] = head.curvature(head.residual(y[0], x), x) * v[0];
  }
};
template <typename T>
using BernoulliRules = OneOutput<BernoulliHead<T>, T>;
template <typename T>
using GaussianRules = OneOutput<GaussianHead<T>, T>;
template <typename T>
using LaplaceRules = OneOutput<LaplaceHead<T>, T>;
template <typename T>
using PoissonRules = OneOutput<PoissonHead<T>, T>;
template <typename T>
using NegativeBinomialRules = OneOutput<NegativeBinomialHead<T>, T>;

template <typename T>
struct StudentTRules : RulesFacts<1> {
  static constexpr const char* kName = "student_t";
  static constexpr int kNumbers = 2;  // df, scale
  T df, precision, factor, constant;
  FASTVAE_HOST_DEVICE explicit StudentTRules(const double* numbers)
      : df(static_cast<T>(numbers[0])),
        precision(static_cast<T>(1.0 / numbers[1])),
        factor(static_cast<T>((numbers[0] + 1.0) / numbers[1])),
        constant(static_cast<T>(half_step_of_lgamma(numbers[0] / 2.0) -
                                0.5 * std::log(3.14159265358979323846 * numbers[0]) - std::log(numbers[1]))) {}
  FASTVAE_HOST_DEVICE T first(const T* y, T x, T* r) const {
    const T u = (x - y[0]) * precision, far = u * u / df;
    r[0] = factor * u / (u * u + df);
    const T growth = far < Ieee<T>::kInfinity ? math::log1p(far) : far;  // NaN stays NaN
    return constant - T(0.5) * (df + T(1)) * growth;
  }
  FASTVAE_HOST_DEVICE void second(const T* y, T x, const T* v, T* out) const {
    const T u = (x - y[0]) * precision, square = u * u, sum = square + df;
    out[0] = factor * precision * (square - df) / (sum * sum) * v[0];
  }

 private:
  // lgamma(y + 1/2) - lgamma(y), also for large y, where both are.
  FASTVAE_HOST_DEVICE static double half_step_of_lgamma(double y) {
    const double i = 1.0 / y, i2 = i * i;
    const double series = (-1.0 / 8 + i2 * (1.0 / 192 + i2 * (-1.0 / 640 + i2 * (17.0 / 14336)))) * i;
    return y < 50.0 ? std::lgamma(y + 0.5) - std::lgamma(y) : 0.5 * std::log(y) + series;
  }
};

// log(sinh(h) / h), coth(h) - 1/h and its derivative. Below h = 1/2 by series, whose terms fall as (h / pi)^2; the last
// two follow from the first one's, term by term.
template <typename T>
struct SinhRatio {
  T h, size, near;
  bool is_near;
  static constexpr int kTerms = 11;
  FASTVAE_HOST_DEVICE explicit SinhRatio(T half) : h(half) {
    const T positive = half < T(0) ? -half : half;
    is_near = positive < T(0.5);
    size = is_near ? T(0.5) : positive;
    near = is_near ? half * half : T(0);
  }
  FASTVAE_HOST_DEVICE static constexpr double coefficient(int n) {
    constexpr double kLog[kTerms] = {1.0 / 6,
                                     -1.0 / 180,
                                     1.0 / 2835,
                                     -1.0 / 37800,
                                     1.0 / 467775,
                                     -691.0 / 3831077250,
                                     2.0 / 127702575,
                                     -3617.0 / 2605132530000,
                                     43867.0 / 350813659321125,
                                     -174611.0 / 15313294652906250.0,
                                     155366.0 / 147926426347074375.0};
    return kLog[n];
  }
  // sum over n of near^n of the log's coefficients, times 2 (n + 1) once for L / h, and 2 n + 1 as well for L'.
  template <int kDerivatives>
  FASTVAE_HOST_DEVICE T series() const {
    T sum = T(0);
    FASTVAE_UNROLL
    for (int n = kTerms - 1; n >= 0; --n) {
      const double of_first = kDerivatives > 0 ? 2.0 * (n + 1) : 1.0, of_second = kDerivatives > 1 ? 2.0 * n + 1 : 1.0;
      sum = sum * near + static_cast<T>(coefficient(n) * of_first * of_second);
    }
    return sum;
  }
  FASTVAE_HOST_DEVICE T slope(T e) const {  // L(h), e = e^-2 size
    const T far = (T(1) + e) / (T(1) - e) - T(1) / size;
    return is_near ? h * series<1>() : (h < T(0) ? -far : far);
  }
  FASTVAE_HOST_DEVICE T decay() const { return math::exp(T(-2) * size); }
  FASTVAE_HOST_DEVICE T value(T e) const {
    const T far = size + math::log((T(1) - e) / (T(2) * size));
    return is_near ? near * series<0>() : far;
  }
  FASTVAE_HOST_DEVICE T bend() const {
    const T e = decay(), rest = T(1) - e;
    const T far = T(1) / (size * size) - T(4) * e / (rest * rest);
    return is_near ? series<2>() : far;
  }
};

template <typename T>
struct ContinuousBernoulliRules : RulesFacts<1> {
  static constexpr const char* kName = "continuous_bernoulli";
  FASTVAE_HOST_DEVICE explicit ContinuousBernoulliRules(const double*) {}
  FASTVAE_HOST_DEVICE T first(const T* y, T x, T* r) const {
    const SinhRatio<T> ratio(T(0.5) * y[0]);
    const T e = ratio.decay();
    r[0] = (x - T(0.5)) - T(0.5) * ratio.slope(e);
    return (x - T(0.5)) * y[0] - ratio.value(e);
  }
  FASTVAE_HOST_DEVICE void second(const T* y, T, const T* v, T* out) const {
    out[0] = T(-0.25) * SinhRatio<T>(T(0.5) * y[0]).bend() * v[0];
  }
};

// A log scale with a floor, below which there is no gradient to it.
template <typename T>
struct FlooredScale {
  T inverse, log_scale, counts;
  FASTVAE_HOST_DEVICE FlooredScale(T given, T floor) : log_scale(given < floor ? floor : given) {
    inverse = math::exp(-log_scale);
    counts = given < floor ? T(0) : T(1);
  }
};

template <typename T>
struct GaussianHeadRules : RulesFacts<2> {
  static constexpr const char* kName = "gaussian_head";
  static constexpr int kNumbers = 1;  // the least scale
  T floor;
  FASTVAE_HOST_DEVICE explicit GaussianHeadRules(const double* numbers) : floor(static_cast<T>(std::log(numbers[0]))) {}
  FASTVAE_HOST_DEVICE T first(const T* y, T x, T* r) const {
    const FlooredScale<T> scale(y[1], floor);
    const T u = (x - y[0]) * scale.inverse;
    r[0] = u * scale.inverse;
    r[1] = (u * u - T(1)) * scale.counts;
    return T(-0.5) * u * u - scale.log_scale - T(0.91893853320467274178);
  }
  FASTVAE_HOST_DEVICE void second(const T* y, T x, const T* v, T* out) const {
    const FlooredScale<T> scale(y[1], floor);
    const T u = (x - y[0]) * scale.inverse, twice = T(-2) * u * scale.counts;
    out[0] = scale.inverse * (twice * v[1] - scale.inverse * v[0]);
    out[1] = twice * (scale.inverse * v[0] + u * v[1]);
  }
};

template <typename T>
struct DiscretizedLogisticRules : RulesFacts<2> {
  static constexpr const char* kName = "discretized_logistic";
  static constexpr int kNumbers = 2;  // classes, the least scale; x is a class
  T last, floor;
  FASTVAE_HOST_DEVICE explicit DiscretizedLogisticRules(const double* numbers)
      : last(static_cast<T>(numbers[0] - 1.0)), floor(static_cast<T>(std::log(numbers[1]))) {}

  // Of the terms of ll: w, and the slopes 1 - sigmoid(u), sigmoid(l) and 1 / (e^w - 1), 0 where a class has none.
  struct Interval {
    FlooredScale<T> scale;
    T upper, lower, width, log_prob, of_upper, of_lower, of_width;
    FASTVAE_HOST_DEVICE Interval(const DiscretizedLogisticRules& rules, const T* y, T x) : scale(y[1], rules.floor) {
      width = scale.inverse / rules.last;
      upper = ((x + T(0.5)) / rules.last - y[0]) * scale.inverse;
      lower = ((x - T(0.5)) / rules.last - y[0]) * scale.inverse;
      const bool is_first = x == T(0), is_last = x == rules.last;
      const SigmoidSoftplus<T> above = math::sigmoid_softplus(-upper), below = math::sigmoid_softplus(lower);
      // log(1 - e^-w), with what rounding takes from a difference near 1; of a class without it log(1) = 0. (Choices
      // between operands, not between results: in a branch of its own the logarithm would keep the loop scalar.)
      const bool is_near = width < T(0.69314718055994530942);
      const T of_exp = math::exp(-width), of_expm1 = -math::expm1(-width);
      const T difference = is_near ? of_expm1 : T(1) - of_exp, lost = is_near ? T(0) : (T(1) - difference) - of_exp;
      const T e = is_first || is_last ? T(0) : of_exp, rest = is_first || is_last ? T(1) : difference;
      const T within = math::log(rest) + (is_first || is_last ? T(0) : lost) / rest;
      const T of_first = is_first ? T(0) : below.softplus, of_last = is_last ? T(0) : above.softplus;
      log_prob = within - of_first - of_last;
      of_upper = is_last ? T(0) : above.sigmoid;
      of_lower = is_first ? T(0) : below.sigmoid;
      of_width = e / rest;
    }
  };
  FASTVAE_HOST_DEVICE T first(const T* y, T x, T* r) const {
    const Interval at(*this, y, x);
    r[0] = (at.of_lower - at.of_upper) * at.scale.inverse;
    r[1] = (at.of_lower * at.lower - at.of_upper * at.upper - at.of_width * at.width) * at.scale.counts;
    return at.log_prob;
  }
  FASTVAE_HOST_DEVICE void second(const T* y, T x, const T* v, T* out) const {
    const Interval at(*this, y, x);
    const T a = at.of_upper, b = at.of_lower, q = at.of_width, inverse = at.scale.inverse;
    const T bent_a = a * (T(1) - a), bent_b = b * (T(1) - b), bent_q = q * (T(1) + q);
    const T au = bent_a * at.upper, bl = bent_b * at.lower, qw = bent_q * at.width;
    const T cross = (a - b - au - bl) * inverse * at.scale.counts;
    out[0] = cross * v[1] - (bent_a + bent_b) * inverse * inverse * v[0];
    out[1] = cross * v[0] + ((a - au) * at.upper - (b + bl) * at.lower + (q - qw) * at.width) * at.scale.counts * v[1];
  }
};

// A negative binomial's log probability n of x with its derivatives to log mean and log dispersion.
template <typename T>
struct CountTerms {
  T value;
  T of_mean, of_dispersion;
  T mean_mean, mean_dispersion, dispersion_dispersion;
};

// With a dispersion that is a number: nothing is said of its derivatives.
template <typename T>
struct FixedDispersion {
  static constexpr int kOutputs = 1, kNumbers = 1;
  NegativeBinomialHead<T> head;
  FASTVAE_HOST_DEVICE explicit FixedDispersion(const double* numbers)
      : head(LikelihoodSpec{Likelihood(), numbers[0]}) {}
  FASTVAE_HOST_DEVICE CountTerms<T> terms(T a, T, T x) const {
    const HeadValue<T> both = head.both(a, x);
    return {both.log_prob, both.residual, T(0), head.curvature(both.residual, x), T(0), T(0)};
  }
};

template <typename T>
struct GivenDispersion {
  static constexpr int kOutputs = 2, kNumbers = 0;
  FASTVAE_HOST_DEVICE explicit GivenDispersion(const double*) {}
  FASTVAE_HOST_DEVICE CountTerms<T> terms(T a, T l, T x) const {
    const T d = math::exp(l), n = x + d;
    const CountDeviance<T> at(a, x, d);
    const T q = at.mean / (at.mean + d), w = at.off;
    const StirlingRest<T> of_sum = stirling_rest(n), of_dispersion = stirling_rest(d);
    const T value = at.log_prob - T(0.5) * math::log1p(x / d) + (of_sum.value - of_dispersion.value);
    const T slope = d * ((w + at.rest) + (of_sum.slope - of_dispersion.slope));
    const T bend = d * (d * (w * w / n + (of_sum.bend - of_dispersion.bend)));
    return {value, -d * w, slope, -n * q * (T(1) - q), -d * q * w, slope + bend};
  }
};

template <typename T>
struct DispersedCountsRules : RulesFacts<2> {
  static constexpr const char* kName = "dispersed_counts";
  GivenDispersion<T> counts;
  FASTVAE_HOST_DEVICE explicit DispersedCountsRules(const double* numbers) : counts(numbers) {}
  FASTVAE_HOST_DEVICE T first(const T* y, T x, T* r) const {
    const CountTerms<T> at = counts.terms(y[0], y[1], x);
    r[0] = at.of_mean;
    r[1] = at.of_dispersion;
    return at.value;
  }
  FASTVAE_HOST_DEVICE void second(const T* y, T x, const T* v, T* out) const {
    const CountTerms<T> at = counts.terms(y[0], y[1], x);
    out[0] = at.mean_mean * v[0] + at.mean_dispersion * v[1];
    out[1] = at.mean_dispersion * v[0] + at.dispersion_dispersion * v[1];
  }
};

// Outputs: the log mean, the logit g of a zero whatever is counted, and the log dispersion where it is an output.
template <typename Counts, typename T>
struct ZeroInflated : RulesFacts<Counts::kOutputs + 1> {
  static constexpr int kNumbers = Counts::kNumbers;
  static constexpr int kLast = Counts::kOutputs;  // 1: no log dispersion
  Counts counts;
  FASTVAE_HOST_DEVICE explicit ZeroInflated(const double* numbers) : counts(numbers) {}

  FASTVAE_HOST_DEVICE T first(const T* y, T x, T* r) const {
    const CountTerms<T> at = counts.terms(y[0], y[kLast], x);
    const T n = at.value, g = y[1];
    const SigmoidSoftplus<T> logit = math::sigmoid_softplus(g), other = math::sigmoid_softplus(n - g);
    // log(sigmoid(g) + sigmoid(-g) e^n) = softplus(n - g) - softplus(-g), without the parts that cancel.
    const T larger = g < T(0) ? (n > g ? n : g) : T(0);
    const T zero = larger + math::log1p_unit(math::exp(-absolute(n - g))) - math::log1p_unit(math::exp(-absolute(g)));
    const bool is_zero = !(x > T(0));
    const T counted = is_zero ? other.sigmoid : T(1);  // the part of it that was counted
    r[0] = counted * at.of_mean;
    if constexpr (kLast == 2) {
      r[2] = counted * at.of_dispersion;
    }
    r[1] = (is_zero ? T(1) - other.sigmoid : T(0)) - logit.sigmoid;
    return is_zero ? zero : n - logit.softplus;
  }

  FASTVAE_HOST_DEVICE void second(const T* y, T x, const T* v, T* out) const {
    const CountTerms<T> at = counts.terms(y[0], y[kLast], x);
    const bool is_zero = !(x > T(0));
    const T of_zero = math::sigmoid(y[1]), share = math::sigmoid(at.value - y[1]);
    const T counted = is_zero ? share : T(1), spread = is_zero ? share * (T(1) - share) : T(0);
    // Along v: what n and g change, and the share with them.
    const T of_dispersion = kLast == 2 ? v[kLast] : T(0);
    const T moved = spread * (at.of_mean * v[0] + at.of_dispersion * of_dispersion - v[1]);
    out[0] = counted * (at.mean_mean * v[0] + at.mean_dispersion * of_dispersion) + moved * at.of_mean;
    if constexpr (kLast == 2) {
      out[2] =
          counted * (at.mean_dispersion * v[0] + at.dispersion_dispersion * of_dispersion) + moved * at.of_dispersion;
    }
    out[1] = -moved - of_zero * (T(1) - of_zero) * v[1];
  }
};

template <typename T>
struct ZeroInflatedCountsRules : ZeroInflated<FixedDispersion<T>, T> {
  static constexpr const char* kName = "zero_inflated_counts";
  using ZeroInflated<FixedDispersion<T>, T>::ZeroInflated;
};

template <typename T>
struct ZeroInflatedDispersedCountsRules : ZeroInflated<GivenDispersion<T>, T> {
  static constexpr const char* kName = "zero_inflated_dispersed_counts";
  using ZeroInflated<GivenDispersion<T>, T>::ZeroInflated;
};

// A gamma density, less what of it depends on the concentration k alone; x is the logarithm of the datum.
template <typename T>
struct GammaTerms {
  T excess;  // e^t - 1 - t
  T of_mean;
  FASTVAE_HOST_DEVICE GammaTerms(T log_mean, T k, T x) {
    const T t = x - log_mean;
    excess = math::exp_excess(t);
    of_mean = k * math::expm1(t);
  }
};

constexpr double kHalfLogTwoPi = 0.91893853320467274178;

template <typename T>
struct GammaRules : RulesFacts<1> {
  static constexpr const char* kName = "gamma";
  static constexpr int kNumbers = 1;  // k
  T k, constant;
  FASTVAE_HOST_DEVICE explicit GammaRules(const double* numbers)
      : k(static_cast<T>(numbers[0])),
        constant(static_cast<T>(0.5 * std::log(numbers[0]) - kHalfLogTwoPi - stirling_rest(numbers[0]).value)) {}
  FASTVAE_HOST_DEVICE T first(const T* y, T x, T* r) const {
    const GammaTerms<T> at(y[0], k, x);
    r[0] = at.of_mean;
    return (constant - x) - k * at.excess;
  }
  FASTVAE_HOST_DEVICE void second(const T* y, T x, const T* v, T* out) const {
    out[0] = -k * math::exp(x - y[0]) * v[0];
  }
};

template <typename T>
struct GammaHeadRules : RulesFacts<2> {
  static constexpr const char* kName = "gamma_head";
  FASTVAE_HOST_DEVICE explicit GammaHeadRules(const double*) {}
  FASTVAE_HOST_DEVICE T first(const T* y, T x, T* r) const {
    const T k = math::exp(y[1]);
    const StirlingRest<T> rest = stirling_rest(k);
    const GammaTerms<T> at(y[0], k, x);
    r[0] = at.of_mean;
    r[1] = -k * (at.excess + rest.slope);
    return (T(0.5) * y[1] - static_cast<T>(kHalfLogTwoPi) - rest.value - x) - k * at.excess;
  }
  // In v_a - v_l, of which no digits are lost where e^t is large and the two nearly agree.
  FASTVAE_HOST_DEVICE void second(const T* y, T x, const T* v, T* out) const {
    const T k = math::exp(y[1]), t = x - y[0], apart = v[0] - v[1];
    const StirlingRest<T> rest = stirling_rest(k);
    out[0] = -k * (math::exp(t) * apart + v[1]);
    out[1] = k * (math::expm1(t) * apart + (t - (rest.slope + k * rest.bend)) * v[1]);
  }
};

}  // namespace math
}  // namespace fastvae

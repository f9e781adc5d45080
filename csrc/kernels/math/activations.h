// Activations phi with the two derivatives that the four sweeps need.
//
//   value(a)            = phi(a)
//   slope(s)            = phi'(a)
//   curvature(s, e)     = phi''(a) * (A^T delta)       the factor of adot in the adjoint sweep
//
// An activation that is invertible enough "keeps" its output: s = h and e = delta = phi'(a) (A^T delta), so that
// curvature is (phi''/phi')(h) * delta. SiLU and GELU keep their input: s = a and e = A^T delta.
#pragma once

#include "elementary.h"

namespace fastvae {

// All of them: CASE(kind, ...) for every kind. What is particular to one is its Phi, and nowhere else: names, kernels
// of both compilers and tests follow from this list.
#define FASTVAE_ACTIVATION_KINDS(CASE, ...) \
  CASE(kIdentity, __VA_ARGS__)              \
  CASE(kRelu, __VA_ARGS__)                  \
  CASE(kLeakyRelu, __VA_ARGS__)             \
  CASE(kElu, __VA_ARGS__)                   \
  CASE(kSoftplus, __VA_ARGS__)              \
  CASE(kTanh, __VA_ARGS__)                  \
  CASE(kSigmoid, __VA_ARGS__)               \
  CASE(kSilu, __VA_ARGS__)                  \
  CASE(kGelu, __VA_ARGS__)                  \
  CASE(kGeluTanh, __VA_ARGS__)              \
  CASE(kSoftplusSharp, __VA_ARGS__)         \
  CASE(kMish, __VA_ARGS__)                  \
  CASE(kSelu, __VA_ARGS__)

#define FASTVAE_ENUMERATOR(KIND, ...) KIND,
enum class Activation : int { FASTVAE_ACTIVATION_KINDS(FASTVAE_ENUMERATOR) };
#undef FASTVAE_ENUMERATOR

struct ActivationSpec {
  Activation kind = Activation::kIdentity;
  double first = 0.0;   // leaky_relu: slope; elu: alpha; softplus: beta
  double second = 0.0;  // softplus: threshold
};

namespace math {

template <Activation kind, typename T>
struct Phi;

// What the Phi of an activation says besides its three functions and kName, its name in a network's text.
struct PhiFacts {
  static constexpr int kNumbers = 0;               // that follow the name: ActivationSpec's first, or both
  static constexpr bool kKeepsInput = false;       // the sweeps must keep a and A^T delta besides h and delta
  static constexpr bool kPiecewiseLinear = false;  // phi'' is zero
  // Whether its formulas hold for these numbers; two kinds may share a name. And what to say where they do not.
  static constexpr bool takes(double /*first*/, double /*second*/) { return true; }
  static constexpr const char* kExpected = "";
};

// math::exp never returns less than e^kLowest. Times an a or a^2 of 1e16 and more, that is no longer next to nothing
// where the true product is, so SiLU and GELU take an exact zero from there on.
template <typename T>
FASTVAE_HOST_DEVICE T zero_beyond(T value, bool beyond) {
  return beyond ? T(0) : value;
}

template <typename T>
struct Phi<Activation::kIdentity, T> : PhiFacts {
  static constexpr const char* kName = "identity";
  static constexpr bool kPiecewiseLinear = true;
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec&) {}
  FASTVAE_HOST_DEVICE T value(T a) const { return a; }
  FASTVAE_HOST_DEVICE T slope(T) const { return T(1); }
  FASTVAE_HOST_DEVICE T curvature(T, T) const { return T(0); }
};

template <typename T>
struct Phi<Activation::kRelu, T> : PhiFacts {
  static constexpr const char* kName = "relu";
  static constexpr bool kPiecewiseLinear = true;
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec&) {}
  FASTVAE_HOST_DEVICE T value(T a) const { return a < T(0) ? T(0) : a; }  // keeps a NaN
  FASTVAE_HOST_DEVICE T slope(T h) const { return h > T(0) ? T(1) : T(0); }
  FASTVAE_HOST_DEVICE T curvature(T, T) const { return T(0); }
};

template <typename T>
struct Phi<Activation::kLeakyRelu, T> : PhiFacts {
  static constexpr const char* kName = "leaky_relu";
  static constexpr int kNumbers = 1;
  static constexpr bool kPiecewiseLinear = true;
  // phi' is read off h, whose sign a negative slope would turn.
  static constexpr bool takes(double slope, double) { return slope >= 0.0; }
  static constexpr const char* kExpected = "expected a slope of at least 0";
  T negative;
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec& spec) : negative(static_cast<T>(spec.first)) {}
  FASTVAE_HOST_DEVICE T value(T a) const { return a > T(0) ? a : negative * a; }
  FASTVAE_HOST_DEVICE T slope(T h) const { return h > T(0) ? T(1) : negative; }
  FASTVAE_HOST_DEVICE T curvature(T, T) const { return T(0); }
};

template <typename T>
struct Phi<Activation::kElu, T> : PhiFacts {
  static constexpr const char* kName = "elu";
  static constexpr int kNumbers = 1;
  static constexpr bool takes(double alpha, double) { return alpha > 0.0; }
  static constexpr const char* kExpected = "expected alpha > 0";
  T alpha;
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec& spec) : alpha(static_cast<T>(spec.first)) {}
  FASTVAE_HOST_DEVICE T value(T a) const {
    const T negative = alpha * math::expm1(a > T(0) ? T(0) : a);
    return a > T(0) ? a : negative;
  }
  FASTVAE_HOST_DEVICE T slope(T h) const { return h > T(0) ? T(1) : h + alpha; }
  FASTVAE_HOST_DEVICE T curvature(T h, T delta) const { return h > T(0) ? T(0) : delta; }
};

// An ELU with the two numbers under which activations keep mean 0 and variance 1 (Klambauer et al., NeurIPS 2017).
template <typename T>
struct Phi<Activation::kSelu, T> : PhiFacts {
  static constexpr const char* kName = "selu";
  static constexpr T kScale = static_cast<T>(1.0507009873554804934);
  static constexpr T kFloor = static_cast<T>(1.0507009873554804934 * 1.6732632423543772848);  // minus phi(-infinity)
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec&) {}
  FASTVAE_HOST_DEVICE T value(T a) const {
    const T negative = kFloor * math::expm1(a > T(0) ? T(0) : a);
    return a > T(0) ? kScale * a : negative;
  }
  FASTVAE_HOST_DEVICE T slope(T h) const { return h > T(0) ? kScale : h + kFloor; }
  FASTVAE_HOST_DEVICE T curvature(T h, T delta) const { return h > T(0) ? T(0) : delta; }
};

// The threshold from which on the two branches of softplus meet.
constexpr double kSoftplusMeets = 20.0;

template <typename T>
struct Phi<Activation::kSoftplus, T> : PhiFacts {
  static constexpr const char* kName = "softplus";
  static constexpr int kNumbers = 2;
  static constexpr bool takes(double beta, double threshold) { return beta > 0.0 && threshold >= kSoftplusMeets; }
  static constexpr const char* kExpected = "expected beta > 0";
  T beta;
  T inverse;
  T threshold;
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec& spec)
      : beta(static_cast<T>(spec.first)),
        inverse(static_cast<T>(1.0 / spec.first)),
        threshold(static_cast<T>(spec.second)) {}
  FASTVAE_HOST_DEVICE T value(T a) const {
    const T scaled = beta * a;
    const T smooth = math::softplus(scaled) * inverse;
    return scaled > threshold ? a : smooth;
  }
  FASTVAE_HOST_DEVICE T slope(T h) const {
    const T scaled = beta * h;
    const T smooth = -math::expm1(-scaled);
    return scaled > threshold ? T(1) : smooth;
  }
  FASTVAE_HOST_DEVICE T curvature(T h, T delta) const {
    const T scaled = beta * h;
    const T smooth = beta * math::exp(-scaled) * delta;
    return scaled > threshold ? T(0) : smooth;
  }
};

// A softplus whose threshold is so low that the two branches do not meet: h no longer tells which one a took.
template <typename T>
struct Phi<Activation::kSoftplusSharp, T> : PhiFacts {
  static constexpr const char* kName = "softplus";
  static constexpr int kNumbers = 2;
  static constexpr bool kKeepsInput = true;
  static constexpr bool takes(double beta, double threshold) { return beta > 0.0 && !(threshold >= kSoftplusMeets); }
  static constexpr const char* kExpected = "expected beta > 0";
  T beta;
  T threshold;
  Phi<Activation::kSoftplus, T> smooth;
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec& spec)
      : beta(static_cast<T>(spec.first)), threshold(static_cast<T>(spec.second)), smooth(spec) {}
  FASTVAE_HOST_DEVICE T value(T a) const { return smooth.value(a); }
  FASTVAE_HOST_DEVICE T slope(T a) const {
    const T s = math::sigmoid(beta * a);
    return beta * a > threshold ? T(1) : s;
  }
  FASTVAE_HOST_DEVICE T curvature(T a, T g) const {
    const T s = math::sigmoid(beta * a);
    const T bent = beta * s * (T(1) - s) * g;
    return beta * a > threshold ? T(0) : bent;
  }
};

template <typename T>
struct Phi<Activation::kTanh, T> : PhiFacts {
  static constexpr const char* kName = "tanh";
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec&) {}
  FASTVAE_HOST_DEVICE T value(T a) const { return math::tanh(a); }
  FASTVAE_HOST_DEVICE T slope(T h) const { return T(1) - h * h; }
  FASTVAE_HOST_DEVICE T curvature(T h, T delta) const { return T(-2) * h * delta; }
};

template <typename T>
struct Phi<Activation::kSigmoid, T> : PhiFacts {
  static constexpr const char* kName = "sigmoid";
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec&) {}
  FASTVAE_HOST_DEVICE T value(T a) const { return math::sigmoid(a); }
  FASTVAE_HOST_DEVICE T slope(T h) const { return h * (T(1) - h); }
  FASTVAE_HOST_DEVICE T curvature(T h, T delta) const { return (T(1) - T(2) * h) * delta; }
};

template <typename T>
struct Phi<Activation::kSilu, T> : PhiFacts {
  static constexpr const char* kName = "silu";
  static constexpr bool kKeepsInput = true;
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec&) {}
  FASTVAE_HOST_DEVICE static T sigmoid(T a) { return zero_beyond(math::sigmoid(a), a < Ieee<T>::kLowest); }
  FASTVAE_HOST_DEVICE T value(T a) const { return a * sigmoid(a); }
  FASTVAE_HOST_DEVICE T slope(T a) const {
    const T s = sigmoid(a);
    return s * (T(1) + a * (T(1) - s));
  }
  FASTVAE_HOST_DEVICE T curvature(T a, T g) const {
    const T s = sigmoid(a);
    return s * (T(1) - s) * (T(2) + a * (T(1) - T(2) * s)) * g;
  }
};

// a t,  t = tanh(softplus(a)),  whose derivative is d = (1 - t^2) sigmoid(a).
template <typename T>
struct Phi<Activation::kMish, T> : PhiFacts {
  static constexpr const char* kName = "mish";
  static constexpr bool kKeepsInput = true;
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec&) {}
  struct Parts {
    T t, s, d;
  };
  FASTVAE_HOST_DEVICE static Parts parts(T a) {
    const SigmoidSoftplus<T> both = math::sigmoid_softplus(a);
    const bool beyond = a < Ieee<T>::kLowest;
    const T t = zero_beyond(math::tanh(both.softplus), beyond);
    const T s = zero_beyond(both.sigmoid, beyond);
    return {t, s, (T(1) - t * t) * s};
  }
  FASTVAE_HOST_DEVICE T value(T a) const { return a * parts(a).t; }
  FASTVAE_HOST_DEVICE T slope(T a) const {
    const Parts p = parts(a);
    return p.t + a * p.d;
  }
  FASTVAE_HOST_DEVICE T curvature(T a, T g) const {
    const Parts p = parts(a);
    return p.d * (T(2) + a * (T(1) - p.s - T(2) * p.t * p.s)) * g;
  }
};

// a cut off at +-limit.
template <typename T>
FASTVAE_HOST_DEVICE T cut_off(T a, T limit) {
  const T low = a < -limit ? -limit : a;  // keeps a NaN
  return low > limit ? limit : low;
}

// a Phi(a) with the normal distribution function.
template <typename T>
struct Phi<Activation::kGelu, T> : PhiFacts {
  static constexpr const char* kName = "gelu";
  static constexpr bool kKeepsInput = true;
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec&) {}
  FASTVAE_HOST_DEVICE static T cumulative(T a) {
    return T(0.5) + T(0.5) * math::erf(a * static_cast<T>(0.70710678118654752440));
  }
  FASTVAE_HOST_DEVICE static T density(T a) {
    const T exponent = T(-0.5) * a * a;
    const T d = static_cast<T>(0.39894228040143267794) * math::exp(exponent);
    return zero_beyond(d, exponent < Ieee<T>::kLowest);
  }
  FASTVAE_HOST_DEVICE T value(T a) const { return a * cumulative(a); }
  FASTVAE_HOST_DEVICE T slope(T a) const { return cumulative(a) + a * density(a); }
  FASTVAE_HOST_DEVICE T curvature(T a, T g) const {
    const T c = cut_off(a, T(100));  // where the density is zero, whose product with an infinite a^2 were none
    return (T(2) - c * c) * density(a) * g;
  }
};

// a/2 (1 + t),  t = tanh(c (a + 0.044715 a^3)),  c = sqrt(2 / pi)
template <typename T>
struct Phi<Activation::kGeluTanh, T> : PhiFacts {
  static constexpr const char* kName = "gelu_tanh";
  static constexpr bool kKeepsInput = true;
  FASTVAE_HOST_DEVICE explicit Phi(const ActivationSpec&) {}
  static constexpr double kScale = 0.79788456080286535588;
  static constexpr double kCubic = 0.044715;
  FASTVAE_HOST_DEVICE static T inner_tanh(T a) {
    return math::tanh(static_cast<T>(kScale) * (a + static_cast<T>(kCubic) * a * a * a));
  }
  FASTVAE_HOST_DEVICE static T inner_slope(T a) {
    return static_cast<T>(kScale) * (T(1) + static_cast<T>(3 * kCubic) * a * a);
  }
  FASTVAE_HOST_DEVICE T value(T a) const { return T(0.5) * a * (T(1) + inner_tanh(a)); }
  FASTVAE_HOST_DEVICE T slope(T a) const {
    const T c = cut_off(a, T(100));  // where 1 - t^2 is zero
    const T t = inner_tanh(c);
    return T(0.5) * (T(1) + t) + T(0.5) * c * (T(1) - t * t) * inner_slope(c);
  }
  FASTVAE_HOST_DEVICE T curvature(T a, T g) const {
    const T c = cut_off(a, T(100));  // where 1 - t^2 is zero
    const T t = inner_tanh(c);
    const T u = inner_slope(c);
    const T second = static_cast<T>(6 * kScale * kCubic) * c;
    return (T(1) - t * t) * (u + T(0.5) * c * (second - T(2) * t * u * u)) * g;
  }
};

}  // namespace math

// A fact of PhiFacts, by kind.
#define FASTVAE_FACT_CASE(KIND, FACT) \
  case Activation::KIND:              \
    return math::Phi<Activation::KIND, double>::FACT;
constexpr bool keeps_input(Activation kind) {
  switch (kind) { FASTVAE_ACTIVATION_KINDS(FASTVAE_FACT_CASE, kKeepsInput) }
  return false;
}
constexpr bool is_piecewise_linear(Activation kind) {
  switch (kind) { FASTVAE_ACTIVATION_KINDS(FASTVAE_FACT_CASE, kPiecewiseLinear) }
  return false;
}
#undef FASTVAE_FACT_CASE

// The cases of a switch over Activation: each calls LOOP<kind>(args, ...), with the arguments in scope at the use.
#define FASTVAE_ACTIVATION_CASE(KIND, LOOP)              \
  case ::fastvae::Activation::KIND:                      \
    LOOP<::fastvae::Activation::KIND>(args, begin, end); \
    break;
#define FASTVAE_EACH_ACTIVATION(LOOP) FASTVAE_ACTIVATION_KINDS(FASTVAE_ACTIVATION_CASE, LOOP)

}  // namespace fastvae

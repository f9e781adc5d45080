// The term of one entry v of a Jacobian, |v|^p for p = 1 or 2, and its derivative (0 at 0, as autograd takes it).
#pragma once

#include "activations.h"

namespace fastvae::math {

template <typename T>
struct JacobianTerm {
  T value;
  T slope;
};

template <typename T>
FASTVAE_HOST_DEVICE JacobianTerm<T> jacobian_term(T v, bool squared) {
  const T magnitude = v < T(0) ? -v : v;
  const T sign = v > T(0) ? T(1) : (v < T(0) ? T(-1) : v);  // keeps a NaN
  return {squared ? v * v : magnitude, squared ? v + v : sign};
}

// phi'(a), and the factor that turns e (kernels.h) into phi''(a) adot: curvature() is linear in its second argument.
template <typename T>
struct Bend {
  T slope;
  T factor;
};

template <Activation kind, typename T>
FASTVAE_HOST_DEVICE Bend<T> bend(const Phi<kind, T>& phi, T s) {
  return {phi.slope(s), phi.curvature(s, T(1))};
}

}  // namespace fastvae::math

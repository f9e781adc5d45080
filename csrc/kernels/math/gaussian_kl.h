// One coordinate of KL(N(m_q, e^l_q) || N(m_p, e^l_p)), and of its gradient.
//
//   KL = 1/2 (e^l - 1 - l + m^2 w),   l = l_q - l_p,   m = m_q - m_p,   w = e^-l_p
//
// e^l - 1 - l in one piece (exp_excess): close to l^2/2 where q and p are nearly alike, which is where a consistency
// term lives and where the difference of its parts would be rounding. A standard normal p has l_p = m_p = 0, w = 1.
#pragma once

#include "elementary.h"

namespace fastvae::math {

template <typename T>
FASTVAE_HOST_DEVICE T gaussian_kl(T gap, T log_ratio, T precision) {
  return T(0.5) * (exp_excess(log_ratio) + gap * gap * precision);
}

// To m_q (minus that to m_p), to l_q and to l_p.
template <typename T>
struct GaussianKlCotangent {
  T mu;
  T logvar_q;
  T logvar_p;
};

template <typename T>
FASTVAE_HOST_DEVICE GaussianKlCotangent<T> gaussian_kl_backward(T grad, T gap, T log_ratio, T precision) {
  const T scaled = gap * precision;
  const T excess = math::expm1(log_ratio);
  return {grad * scaled, T(0.5) * grad * excess, T(-0.5) * grad * (excess + gap * scaled)};
}

}  // namespace fastvae::math

// One number's step of Adam (Kingma, Ba, 2015, algorithm 1) in the form of torch.optim.Adam, weight decay being part of
// the gradient:
//
//   g += decay w;  m += (1 - beta1)(g - m);  v = beta2 v + (1 - beta2) g^2;  w -= lr_t m / (sqrt(v) / root_t + eps)
//
// with lr_t = lr / (1 - beta1^t) and root_t = sqrt(1 - beta2^t), worked out in double on the host.
#pragma once

#include <cmath>

#include "portable.h"

namespace fastvae::math {

template <typename T>
struct Adam {
  T to_mean;                 // 1 - beta1
  T keep_square, to_square;  // beta2, 1 - beta2
  T eps, decay;
};

template <typename T>
struct AdamRate {
  T step;          // lr_t
  T inverse_root;  // 1 / root_t
};

template <typename T>
FASTVAE_HOST_DEVICE void adam(T& w, T& m, T& v, T grad, const Adam<T>& settings, const AdamRate<T>& rate) {
  const T g = grad + settings.decay * w;
  m += settings.to_mean * (g - m);
  v = settings.keep_square * v + settings.to_square * g * g;
  w -= rate.step * m / (std::sqrt(v) * rate.inverse_root + settings.eps);
}

}  // namespace fastvae::math

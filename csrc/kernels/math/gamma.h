// What remains of the logarithm of the gamma function beside Stirling's formula, with its first two derivatives:
//
//   S(y) = log Gamma(y) - ((y - 1/2) log y - y + log(2 pi) / 2)        D(y) = psi(y) - log y,  psi = (log Gamma)'
//
// By series in 1/y from 8 on, whose first dropped term is below 1e-15; below it by the recurrence over 8 steps,
// Gamma(y + 8) = y (y + 1) ... (y + 7) Gamma(y). Error: some units of the last place of log Gamma, not of S.
#pragma once

#include "elementary.h"

namespace fastvae::math {

template <typename T>
struct StirlingRest {
  T value;  // S(y)
  T slope;  // D(y)
  T bend;   // D'(y)
};

// For y > 0; what is so small that 1 / y^2 is infinite counts as the least that is not.
template <typename T>
FASTVAE_HOST_DEVICE StirlingRest<T> stirling_rest(T given) {
  const T least = sizeof(T) == 4 ? T(1e-18) : T(1e-150), y = given < least ? least : given;
  const bool is_near = y < T(8);
  const T far = is_near ? y + T(8) : y;
  const T i = T(1) / far, i2 = i * i;
  T value = T(1.0 / 156);
  value = value * i2 - T(691.0 / 360360);
  value = value * i2 + T(1.0 / 1188);
  value = value * i2 - T(1.0 / 1680);
  value = value * i2 + T(1.0 / 1260);
  value = value * i2 - T(1.0 / 360);
  value = (value * i2 + T(1.0 / 12)) * i;
  T slope = T(1.0 / 12);  // psi(y) - log y + 1 / (2 y)
  slope = slope * i2 - T(691.0 / 32760);
  slope = slope * i2 + T(1.0 / 132);
  slope = slope * i2 - T(1.0 / 240);
  slope = slope * i2 + T(1.0 / 252);
  slope = slope * i2 - T(1.0 / 120);
  slope = -(slope * i2 + T(1.0 / 12)) * i2;
  T bend = T(7.0 / 6);  // its derivative
  bend = bend * i2 - T(691.0 / 2730);
  bend = bend * i2 + T(5.0 / 66);
  bend = bend * i2 - T(1.0 / 30);
  bend = bend * i2 + T(1.0 / 42);
  bend = bend * i2 - T(1.0 / 30);
  bend = (bend * i2 + T(1.0 / 6)) * i2 * i;
  slope -= T(0.5) * i;
  bend += T(0.5) * i2;
  // Far from 8 the steps are taken of 1, and their parts left out.
  const T start = is_near ? y : T(1);
  T product = T(1), inverses = T(0), squares = T(0);
  FASTVAE_UNROLL
  for (int k = 0; k < 8; ++k) {
    const T step = start + T(k), inverse = T(1) / step;
    product *= step;
    inverses += inverse;
    squares += inverse * inverse;
  }
  const T log_far = math::log(start + T(8)), log_near = math::log(start);
  const T steps = (start + T(7.5)) * log_far - T(8) - math::log(product) - (start - T(0.5)) * log_near;
  const T apart = log_far - log_near, between = T(1) / start - T(1) / (start + T(8));
  return {is_near ? value + steps : value, is_near ? slope + (apart - inverses) : slope,
          is_near ? bend + (squares - between) : bend};
}

}  // namespace fastvae::math

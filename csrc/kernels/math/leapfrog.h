// One coordinate of a leapfrog step with tempering, and of its gradient.
//
//   rho~   = rho + eps/2 F(z)          z' = z + eps rho~          rho' = alpha (rho~ + eps/2 F(z'))
//
// Caterini, Doucet, Sejdinovic (2018), algorithm 1; F = grad_z log p(x, z) = grad_z ll - z for a standard normal
// prior. The force at z' is the force at the start of the next step, so K steps need K + 1 of them.
#pragma once

#include "portable.h"

namespace fastvae::math {

template <typename T>
struct Drifted {
  T z;
  T rho_half;
};

template <typename T>
FASTVAE_HOST_DEVICE Drifted<T> kick_drift(T z, T rho, T force, T step) {
  const T rho_half = rho + T(0.5) * step * force;
  return {z + step * rho_half, rho_half};
}

template <typename T>
FASTVAE_HOST_DEVICE T kick_temper(T rho_half, T force, T step, T alpha) {
  return alpha * (rho_half + T(0.5) * step * force);
}

// From the cotangent of rho' to those of the untempered momentum, of F(z') and of alpha and eps.
template <typename T>
struct TemperCotangent {
  T momentum;  // of rho~ + eps/2 F(z')
  T force;     // of F(z'), from this half kick
  T alpha;
  T step;
};

template <typename T>
FASTVAE_HOST_DEVICE TemperCotangent<T> kick_temper_backward(T grad, T rho_half, T force, T step, T alpha) {
  const T momentum = alpha * grad;
  return {momentum, T(0.5) * step * momentum, grad * (rho_half + T(0.5) * step * force), T(0.5) * momentum * force};
}

// From the cotangents of z' and rho~ to those of rho, of F(z) and of eps. The cotangent of z is that of z'.
template <typename T>
struct DriftCotangent {
  T rho;
  T force;
  T step;
};

template <typename T>
FASTVAE_HOST_DEVICE DriftCotangent<T> kick_drift_backward(T grad_z, T grad_rho_half, T rho, T force, T step) {
  const T rho_half = rho + T(0.5) * step * force;
  const T total = grad_rho_half + step * grad_z;
  return {total, T(0.5) * step * total, grad_z * rho_half + T(0.5) * total * force};
}

}  // namespace fastvae::math

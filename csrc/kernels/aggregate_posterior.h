// The mixture q(z) = 1/N sum_n N(z; mu_n, diag e^logvar_n) of the posteriors of N images at M codes, and its marginals:
//
//   l_mnj = -1/2 ((z_mj - mu_nj)^2 e^-logvar_nj + logvar_nj + log 2 pi)
//   log q(z_m) = log 1/N sum_n exp sum_j l_mnj          log q(z_mj) = log 1/N sum_n exp l_mnj
//
// Of cotangents g_m and G_mj, with the posterior probabilities w of the components and d = z_mj - mu_nj, p =
// e^-logvar_nj,
//
//   c_mnj = g_m w_mn + G_mj w_mnj:   dz_mj = -sum_n c d p     dmu_nj = sum_m c d p     dlogvar_nj = 1/2 sum_m c (d^2 p
//   - 1)
//
// w_mn = exp(sum_j l_mnj - log N - log q(z_m)), w_mnj likewise. Nothing of M N d numbers is kept: an exponential for
// each of them forward, and one in each of the two kernels backward.
#pragma once

#include "kernels.h"
#include "math/elementary.h"

namespace fastvae {

namespace math {

// One coordinate of a code under one component.
template <typename T>
struct ComponentTerm {
  T gap;          // d
  T scaled;       // d p
  T log_density;  // l
  FASTVAE_HOST_DEVICE ComponentTerm(T z, T mu, T logvar, T precision) : gap(z - mu), scaled(gap * precision) {
    log_density = T(-0.5) * (gap * scaled + logvar) - static_cast<T>(0.91893853320467274178);
  }
};

// One more term of log sum_i e^v_i = largest + log(sum), at first -infinity and 0.
template <typename T>
FASTVAE_HOST_DEVICE void add_to_log_sum(T value, T& largest, T& sum) {
  const T next = value > largest ? value : largest;
  const T base = next > -Ieee<T>::kInfinity ? next : T(0);  // of nothing but -infinity so far
  sum = sum * math::exp(largest - base) + math::exp(value - base);
  largest = next;
}

}  // namespace math

// Index: codes.
template <typename T>
struct AggregatePosterior {
  const T* z;          // [codes, dim]
  const T* mu;         // [components, dim]
  const T* logvar;     // [components, dim]
  const T* precision;  // [components, dim], e^-logvar
  T* log_q;            // [codes]
  T* log_marginals;    // [codes, dim]
  int64_t codes;
  int64_t components;
  int64_t dim;
  T log_components;
  int64_t moved_numbers() const { return codes * (2 * dim + 1) + 3 * components * dim; }
};

template <typename T>
struct AggregateCotangents {
  const T* of_log_q;      // [codes], g
  const T* of_marginals;  // [codes, dim], G
  const T* z;
  const T* mu;
  const T* logvar;
  const T* precision;
  const T* log_q;
  const T* log_marginals;
  int64_t codes;
  int64_t components;
  int64_t dim;
  T log_components;
  int64_t read_numbers() const { return codes * (3 * dim + 2) + 3 * components * dim; }
};

// Index: codes.
template <typename T>
struct AggregateToCodes : AggregateCotangents<T> {
  T* grad_z;  // [codes, dim]
  int64_t moved_numbers() const { return this->read_numbers() + this->codes * this->dim; }
};

// Index: components.
template <typename T>
struct AggregateToComponents : AggregateCotangents<T> {
  T* grad_mu;      // [components, dim]
  T* grad_logvar;  // [components, dim]
  int64_t moved_numbers() const { return this->read_numbers() + 2 * this->components * this->dim; }
};

FASTVAE_DECLARE_KERNEL(aggregate_posterior, AggregatePosterior)
FASTVAE_DECLARE_KERNEL(aggregate_to_codes, AggregateToCodes)
FASTVAE_DECLARE_KERNEL(aggregate_to_components, AggregateToComponents)

}  // namespace fastvae

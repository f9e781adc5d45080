// The mixture of posteriors and its gradient (aggregate_posterior.h gives formulas and costs).
//
// A block of codes, or of components in the gradient to them, lies with its numbers side by side, coordinate by
// coordinate; the others pass by one at a time. So every loop over a block vectorises, whatever the dimension, and no
// sum runs across lanes.
#include "../aggregate_posterior.h"

#include <algorithm>
#include <vector>

#include "clones.h"

namespace fastvae::cpu {

constexpr int64_t kBlock = 64;

// Rows first, ... of [rows, dim] as [dim, kBlock].
template <typename T>
FASTVAE_INLINE void gather_block(const T* rows, int64_t first, int64_t count, int64_t dim, T* block) {
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t j = 0; j < dim; ++j) {
      block[j * kBlock + lane] = rows[(first + lane) * dim + j];
    }
  }
}

template <typename T>
FASTVAE_INLINE void scatter_block(const T* block, int64_t first, int64_t count, int64_t dim, T* rows) {
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t j = 0; j < dim; ++j) {
      rows[(first + lane) * dim + j] = block[j * kBlock + lane];
    }
  }
}

template <typename T>
FASTVAE_INLINE void aggregate_posterior_template(const AggregatePosterior<T>& args, int64_t begin, int64_t end) {
  const int64_t dim = args.dim;
  std::vector<T> of_block(3 * dim * kBlock);
  T* z = of_block.data();
  T* largest = z + dim * kBlock;
  T* sums = largest + dim * kBlock;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    gather_block(args.z, first, count, dim, z);
    std::fill(largest, sums, -math::Ieee<T>::kInfinity);
    std::fill(sums, sums + dim * kBlock, T(0));
    T largest_whole[kBlock], sums_whole[kBlock];
    std::fill(largest_whole, largest_whole + kBlock, -math::Ieee<T>::kInfinity);
    std::fill(sums_whole, sums_whole + kBlock, T(0));
    for (int64_t n = 0; n < args.components; ++n) {
      T whole[kBlock] = {};
      for (int64_t j = 0; j < dim; ++j) {
        const T mu = args.mu[n * dim + j], logvar = args.logvar[n * dim + j], precision = args.precision[n * dim + j];
#pragma GCC ivdep
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t at = j * kBlock + lane;
          const T value = math::ComponentTerm<T>(z[at], mu, logvar, precision).log_density;
          whole[lane] += value;
          largest[at] = value > largest[at] ? value : largest[at];
        }
      }
#pragma GCC ivdep
      for (int64_t lane = 0; lane < count; ++lane) {
        math::add_to_log_sum(whole[lane], largest_whole[lane], sums_whole[lane]);
      }
    }
    for (int64_t n = 0; n < args.components; ++n) {
      for (int64_t j = 0; j < dim; ++j) {
        const T mu = args.mu[n * dim + j], logvar = args.logvar[n * dim + j], precision = args.precision[n * dim + j];
#pragma GCC ivdep
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t at = j * kBlock + lane;
          const T value = math::ComponentTerm<T>(z[at], mu, logvar, precision).log_density;
          const T base = largest[at] > -math::Ieee<T>::kInfinity ? largest[at] : T(0);
          sums[at] += math::exp(value - base);
        }
      }
    }
#pragma GCC ivdep
    for (int64_t lane = 0; lane < count; ++lane) {
      args.log_q[first + lane] = largest_whole[lane] + (math::log(sums_whole[lane]) - args.log_components);
    }
    for (int64_t j = 0; j < dim; ++j) {
#pragma GCC ivdep
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t at = j * kBlock + lane;
        largest[at] += math::log(sums[at]) - args.log_components;
      }
    }
    scatter_block(largest, first, count, dim, args.log_marginals);
  }
}

template <typename T>
FASTVAE_INLINE void aggregate_to_codes_template(const AggregateToCodes<T>& args, int64_t begin, int64_t end) {
  const int64_t dim = args.dim;
  std::vector<T> of_block(4 * dim * kBlock);
  T* z = of_block.data();
  T* log_marginals = z + dim * kBlock;
  T* of_marginals = log_marginals + dim * kBlock;
  T* found = of_marginals + dim * kBlock;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    gather_block(args.z, first, count, dim, z);
    gather_block(args.log_marginals, first, count, dim, log_marginals);
    gather_block(args.of_marginals, first, count, dim, of_marginals);
    std::fill(found, found + dim * kBlock, T(0));
    for (int64_t n = 0; n < args.components; ++n) {
      T whole[kBlock] = {};
      for (int64_t j = 0; j < dim; ++j) {
        const T mu = args.mu[n * dim + j], logvar = args.logvar[n * dim + j], precision = args.precision[n * dim + j];
#pragma GCC ivdep
        for (int64_t lane = 0; lane < count; ++lane) {
          whole[lane] += math::ComponentTerm<T>(z[j * kBlock + lane], mu, logvar, precision).log_density;
        }
      }
#pragma GCC ivdep
      for (int64_t lane = 0; lane < count; ++lane) {
        const T share = math::exp(whole[lane] - args.log_components - args.log_q[first + lane]);
        whole[lane] = args.of_log_q[first + lane] * share;
      }
      for (int64_t j = 0; j < dim; ++j) {
        const T mu = args.mu[n * dim + j], logvar = args.logvar[n * dim + j], precision = args.precision[n * dim + j];
#pragma GCC ivdep
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t at = j * kBlock + lane;
          const math::ComponentTerm<T> term(z[at], mu, logvar, precision);
          const T share = math::exp(term.log_density - args.log_components - log_marginals[at]);
          found[at] -= (whole[lane] + of_marginals[at] * share) * term.scaled;
        }
      }
    }
    scatter_block(found, first, count, dim, args.grad_z);
  }
}

template <typename T>
FASTVAE_INLINE void aggregate_to_components_template(const AggregateToComponents<T>& args, int64_t begin, int64_t end) {
  const int64_t dim = args.dim;
  std::vector<T> of_block(5 * dim * kBlock);
  T* mu = of_block.data();
  T* logvar = mu + dim * kBlock;
  T* precision = logvar + dim * kBlock;
  T* to_mu = precision + dim * kBlock;
  T* to_logvar = to_mu + dim * kBlock;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    gather_block(args.mu, first, count, dim, mu);
    gather_block(args.logvar, first, count, dim, logvar);
    gather_block(args.precision, first, count, dim, precision);
    std::fill(to_mu, to_mu + 2 * dim * kBlock, T(0));
    for (int64_t m = 0; m < args.codes; ++m) {
      T whole[kBlock] = {};
      for (int64_t j = 0; j < dim; ++j) {
        const T z = args.z[m * dim + j];
#pragma GCC ivdep
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t at = j * kBlock + lane;
          whole[lane] += math::ComponentTerm<T>(z, mu[at], logvar[at], precision[at]).log_density;
        }
      }
      const T of_log_q = args.of_log_q[m], of_whole = args.log_components + args.log_q[m];
#pragma GCC ivdep
      for (int64_t lane = 0; lane < count; ++lane) {
        whole[lane] = of_log_q * math::exp(whole[lane] - of_whole);
      }
      for (int64_t j = 0; j < dim; ++j) {
        const T z = args.z[m * dim + j], of_marginal = args.of_marginals[m * dim + j];
        const T of_each = args.log_components + args.log_marginals[m * dim + j];
#pragma GCC ivdep
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t at = j * kBlock + lane;
          const math::ComponentTerm<T> term(z, mu[at], logvar[at], precision[at]);
          const T c = whole[lane] + of_marginal * math::exp(term.log_density - of_each);
          to_mu[at] += c * term.scaled;
          to_logvar[at] += T(0.5) * c * (term.gap * term.scaled - T(1));
        }
      }
    }
    scatter_block(to_mu, first, count, dim, args.grad_mu);
    scatter_block(to_logvar, first, count, dim, args.grad_logvar);
  }
}

FASTVAE_DEFINE_CPU(aggregate_posterior, AggregatePosterior)
FASTVAE_DEFINE_CPU(aggregate_to_codes, AggregateToCodes)
FASTVAE_DEFINE_CPU(aggregate_to_components, AggregateToComponents)

}  // namespace fastvae::cpu

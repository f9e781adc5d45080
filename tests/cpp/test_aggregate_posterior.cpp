// The mixture of posteriors and its gradient: on a CPU against the formulas in long double, the gradient against
// differences of these, and the CUDA kernels, executed by the host, against the CPU's.
#include "aggregate_posterior.h"

#include "cases.h"

namespace cases {
namespace {

#define FASTVAE_TEST_KERNEL(NAME, ARGS)                              \
  template <typename T>                                              \
  void cpu_kernel(const ARGS<T>& args, int64_t begin, int64_t end) { \
    fastvae::cpu::NAME(args, begin, end);                            \
  }                                                                  \
  template <typename T>                                              \
  void cuda_kernel(const ARGS<T>& args) {                            \
    fastvae::cuda::NAME(args, nullptr);                              \
  }
FASTVAE_TEST_KERNEL(aggregate_posterior, AggregatePosterior)
FASTVAE_TEST_KERNEL(aggregate_to_codes, AggregateToCodes)
FASTVAE_TEST_KERNEL(aggregate_to_components, AggregateToComponents)

struct Sizes {
  int64_t codes, components, dim;
};

// Posteriors as they are in practice, far narrower than the prior for some coordinates.
template <typename T, typename Args>
void give(Args& args, const Sizes& sizes, Arena<T>& arena) {
  const int64_t numbers = sizes.components * sizes.dim;
  args.z = arena.random(sizes.codes * sizes.dim);
  args.mu = arena.random(numbers);
  const T* logvar = arena.random(numbers, -4.0, 0.5);
  T* precision = arena.filled(numbers, T(0));
  for (int64_t i = 0; i < numbers; ++i) {
    precision[i] = std::exp(-logvar[i]);
  }
  args.logvar = logvar;
  args.precision = precision;
  args.codes = sizes.codes;
  args.components = sizes.components;
  args.dim = sizes.dim;
  args.log_components = static_cast<T>(std::log(static_cast<double>(sizes.components)));
}

template <typename T>
AggregatePosterior<T> forward(const Sizes& sizes, Arena<T>& arena) {
  AggregatePosterior<T> args{};
  give(args, sizes, arena);
  args.log_q = arena.output(sizes.codes);
  args.log_marginals = arena.output(sizes.codes * sizes.dim);
  return args;
}

template <template <typename> typename Args, typename T>
Args<T> backward(const Sizes& sizes, Arena<T>& arena) {
  const AggregatePosterior<T> found = forward(sizes, arena);
  cpu_kernel(found, 0, sizes.codes);
  Args<T> args{};
  static_cast<AggregateCotangents<T>&>(args) = {arena.random(sizes.codes),
                                                arena.random(sizes.codes * sizes.dim),
                                                found.z,
                                                found.mu,
                                                found.logvar,
                                                found.precision,
                                                found.log_q,
                                                found.log_marginals,
                                                found.codes,
                                                found.components,
                                                found.dim,
                                                found.log_components};
  return args;
}

template <typename T>
AggregateToCodes<T> to_codes(const Sizes& sizes, Arena<T>& arena) {
  auto args = backward<AggregateToCodes>(sizes, arena);
  args.grad_z = arena.output(sizes.codes * sizes.dim);
  return args;
}

template <typename T>
AggregateToComponents<T> to_components(const Sizes& sizes, Arena<T>& arena) {
  auto args = backward<AggregateToComponents>(sizes, arena);
  args.grad_mu = arena.output(sizes.components * sizes.dim);
  args.grad_logvar = arena.output(sizes.components * sizes.dim);
  return args;
}

// sum_m (g_m log q(z_m) + sum_j G_mj log q(z_mj)), or one of these logarithms.
struct Exact {
  std::vector<long double> z, mu, logvar;
  Sizes sizes;

  template <typename Args>
  Exact(const Args& args, const Sizes& of)
      : z(args.z, args.z + of.codes * of.dim),
        mu(args.mu, args.mu + of.components * of.dim),
        logvar(args.logvar, args.logvar + of.components * of.dim),
        sizes(of) {}

  long double term(int64_t m, int64_t n, int64_t j) const {
    const long double gap = z[m * sizes.dim + j] - mu[n * sizes.dim + j], l = logvar[n * sizes.dim + j];
    return -0.5L * (gap * gap * expl(-l) + l + logl(2 * acosl(-1.0L)));
  }
  long double marginal(int64_t m, int64_t j) const {
    long double sum = 0;
    for (int64_t n = 0; n < sizes.components; ++n) {
      sum += expl(term(m, n, j));
    }
    return logl(sum / sizes.components);
  }
  long double whole(int64_t m) const {
    long double sum = 0;
    for (int64_t n = 0; n < sizes.components; ++n) {
      long double density = 0;
      for (int64_t j = 0; j < sizes.dim; ++j) {
        density += term(m, n, j);
      }
      sum += expl(density);
    }
    return logl(sum / sizes.components);
  }
  template <typename Args>
  long double objective(const Args& args) const {
    long double sum = 0;
    for (int64_t m = 0; m < sizes.codes; ++m) {
      sum += args.of_log_q[m] * whole(m);
      for (int64_t j = 0; j < sizes.dim; ++j) {
        sum += args.of_marginals[m * sizes.dim + j] * marginal(m, j);
      }
    }
    return sum;
  }
};

template <typename T>
void check_near(T found, long double expected, double tolerance, const char* what, const Sizes& sizes) {
  const auto error = static_cast<double>(fabsl(found - expected) / (1 + fabsl(expected)));
  CHECK(error <= tolerance, "%s of [%d, %d], %d components: %g, not %g", what, static_cast<int>(sizes.codes),
        static_cast<int>(sizes.dim), static_cast<int>(sizes.components), static_cast<double>(found),
        static_cast<double>(expected));
}

template <typename T>
void test_values(const Sizes& sizes) {
  Arena<T> arena;
  const AggregatePosterior<T> args = forward(sizes, arena);
  cpu_kernel(args, 0, sizes.codes);
  const Exact exact(args, sizes);
  // Quadratic forms of up to 200 in size.
  const double tolerance = 100.0 * std::numeric_limits<T>::epsilon();
  for (int64_t m = 0; m < sizes.codes; ++m) {
    check_near(args.log_q[m], exact.whole(m), tolerance, "log q", sizes);
    for (int64_t j = 0; j < sizes.dim; ++j) {
      check_near(args.log_marginals[m * sizes.dim + j], exact.marginal(m, j), tolerance, "a marginal", sizes);
    }
  }
}

// By central differences in long double: h^2 is 1e-12, and rounding 1e-19 / h.
void test_gradients(const Sizes& sizes) {
  constexpr long double h = 1e-6L;
  Arena<double> arena, other;
  const AggregateToCodes<double> codes = to_codes(sizes, arena);
  const AggregateToComponents<double> components = to_components(sizes, other);
  cpu_kernel(codes, 0, sizes.codes);
  cpu_kernel(components, 0, sizes.components);
  const auto check = [&](const auto& args, std::vector<long double> Exact::* of, const double* found,
                         const char* what) {
    Exact exact(args, sizes);
    for (size_t i = 0; i < (exact.*of).size(); ++i) {
      long double& number = (exact.*of)[i];
      const long double middle = number;
      number = middle + h;
      const long double up = exact.objective(args);
      number = middle - h;
      const long double slope = (up - exact.objective(args)) / (2 * h);
      number = middle;
      check_near(found[i], slope, 1e-9, what, sizes);
    }
  };
  check(codes, &Exact::z, codes.grad_z, "dz");
  check(components, &Exact::mu, components.grad_mu, "dmu");
  check(components, &Exact::logvar, components.grad_logvar, "dlogvar");
}

template <typename T, typename Make>
void test_on_cuda(const Sizes& sizes, int64_t count, const char* what, const Make& make) {
  Arena<T> on_cpu, on_cuda, in_parts;
  cpu_kernel(make(sizes, on_cpu), 0, count);
  cuda_kernel(make(sizes, on_cuda));
  const auto parts = make(sizes, in_parts);
  cpu_kernel(parts, 0, count / 3);
  cpu_kernel(parts, count / 3, count);
  // The exponentials are of sums of dim terms of up to 200, which are rounded in another order; the factors are up to
  // 200.
  const double tolerance = 2000.0 * std::numeric_limits<T>::epsilon() * static_cast<double>(1 + sizes.dim),
               error = difference(on_cuda, on_cpu);
  CHECK(error <= tolerance, "%s on CUDA, [%d, %d]: off by %g", what, static_cast<int>(sizes.codes),
        static_cast<int>(sizes.dim), error);
  CHECK(difference(in_parts, on_cpu) <= 20.0 * std::numeric_limits<T>::epsilon(), "%s in parts", what);
}

template <typename T>
void test_all() {
  for (const Sizes& sizes : {Sizes{1, 1, 1}, {5, 3, 2}, {67, 9, 5}, {3, 130, 33}, {9, 70, 1}, {2, 3, 150}}) {
    test_values<T>(sizes);
    test_on_cuda<T>(sizes, sizes.codes, "aggregate_posterior", forward<T>);
    test_on_cuda<T>(sizes, sizes.codes, "aggregate_to_codes", to_codes<T>);
    test_on_cuda<T>(sizes, sizes.components, "aggregate_to_components", to_components<T>);
  }
}

// A code far from every component: densities that are zero are not NaN; and a NaN is not lost.
template <typename T>
void test_extremes() {
  const T far[] = {T(1e30), T(0), std::numeric_limits<T>::quiet_NaN()}, mu[] = {T(0), T(1)}, logvar[] = {T(0), T(0)};
  T log_q[3], log_marginals[3];
  const AggregatePosterior<T> args{far, mu, logvar, mu + 1, log_q, log_marginals, 3, 1, 1, T(0)};
  cpu_kernel(args, 0, 3);
  const bool right = (log_q[0] < T(-1e30)) && log_q[1] == log_marginals[1] && std::isnan(log_q[2]);
  CHECK(right && !std::isnan(log_marginals[0]) && std::isnan(log_marginals[2]), "extremes: %g, %g, %g",
        static_cast<double>(log_q[0]), static_cast<double>(log_q[1]), static_cast<double>(log_q[2]));
}

}  // namespace
}  // namespace cases

int main() {
  cases::test_all<float>();
  cases::test_all<double>();
  cases::test_gradients({3, 4, 3});
  cases::test_gradients({5, 2, 1});
  cases::test_extremes<float>();
  cases::test_extremes<double>();
  return check::finish("test_aggregate_posterior");
}

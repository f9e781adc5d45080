// Each CPU kernel against the formula of kernels.h in the plainest loop, and split into ranges: bitwise the same.
#include <cmath>
#include <type_traits>

#include "cases.h"

namespace cases {
namespace {

// --- the formulas, element by element
// ---------------------------------------------------------------------------------

template <typename T, template <Activation, typename> typename Call>
auto by_kind(const ActivationSpec& spec, T first, T second) {
  switch (spec.kind) {
#define CASE(KIND)       \
  case Activation::KIND: \
    return Call<Activation::KIND, T>::of(spec, first, second);
    CASE(kIdentity)
    CASE(kRelu)
    CASE(kLeakyRelu)
    CASE(kElu)
    CASE(kSoftplus)
    CASE(kTanh)
    CASE(kSigmoid)
    CASE(kSilu)
    CASE(kGelu)
    CASE(kGeluTanh)
    CASE(kSoftplusSharp)
#undef CASE
  }
  return T(0);
}

template <Activation kind, typename T>
struct Value {
  static T of(const ActivationSpec& spec, T a, T) { return math::Phi<kind, T>(spec).value(a); }
};
template <Activation kind, typename T>
struct Slope {
  static T of(const ActivationSpec& spec, T s, T) { return math::Phi<kind, T>(spec).slope(s); }
};
template <Activation kind, typename T>
struct Curvature {
  static T of(const ActivationSpec& spec, T s, T e) { return math::Phi<kind, T>(spec).curvature(s, e); }
};

template <typename T>
void naive(const BiasActivation<T>& args) {
  for (int64_t i = 0; i < args.rows * args.channels; ++i) {
    const T a = args.a[i] + (args.bias == nullptr ? T(0) : args.bias[i % args.channels]);
    args.h[i] = by_kind<T, Value>(args.activation, a, T(0));
    if (args.kept != nullptr) {
      args.kept[i] = a;
    }
  }
}

template <typename T>
void naive(const ActivationReverse<T>& args) {
  for (int64_t i = 0; i < args.size; ++i) {
    args.delta[i] = by_kind<T, Slope>(args.activation, args.s[i], T(0)) * args.g[i];
  }
}

template <typename T>
void naive(const ActivationTangent<T>& args) {
  for (int64_t i = 0; i < args.size; ++i) {
    const T adot = args.adot[i];
    if (args.curvature != nullptr) {
      args.curvature[i] = by_kind<T, Curvature>(args.activation, args.s[i], args.e[i]) * adot;
    }
    args.hdot[i] = by_kind<T, Slope>(args.activation, args.s[i], T(0)) * adot;
  }
}

template <typename T>
void naive(const ActivationAdjoint<T>& args) {
  for (int64_t i = 0; i < args.size; ++i) {
    const T curvature = args.curvature == nullptr ? T(0) : args.curvature[i];
    args.delta_dot[i] = by_kind<T, Slope>(args.activation, args.s[i], T(0)) * args.g[i] + curvature;
  }
}

template <typename T>
int64_t class_at(T x, int64_t classes) {
  return static_cast<int64_t>(std::lround(x * static_cast<T>(classes - 1)));
}

template <typename T>
void naive(const HeadResidual<T>& args) {
  const int64_t classes = args.likelihood.kind == Likelihood::kCategorical ? args.likelihood.classes : 1;
  const int64_t outputs = args.positions * args.channels / classes;
  const auto scale = static_cast<long double>(args.likelihood.scale);
  std::vector<long double> a(classes);
  for (int64_t sample = 0; sample < args.samples; ++sample) {
    long double log_prob = 0;
    for (int64_t output = 0; output < outputs; ++output) {
      const int64_t index = sample * outputs + output;
      long double sum = 0;
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t i = index * classes + c;
        a[c] = args.a[i] + (args.bias == nullptr ? T(0) : args.bias[i % args.channels]);
        sum += expl(a[c]);
      }
      const auto x = static_cast<long double>(args.x[index]);
      for (int64_t c = 0; c < classes; ++c) {
        long double r = 0;
        if (args.likelihood.kind == Likelihood::kBernoulli) {
          r = x - 1 / (1 + expl(-a[c]));
          log_prob += x * a[c] - log1pl(expl(a[c]));
        } else if (args.likelihood.kind == Likelihood::kGaussian) {
          r = (x - a[c]) / (scale * scale);
          log_prob += -0.5L * (x - a[c]) * r - logl(scale) - 0.5L * logl(2 * acosl(-1));
        } else {
          const bool chosen = c == class_at(args.x[index], classes);
          r = (chosen ? 1 : 0) - expl(a[c]) / sum;
          log_prob += chosen ? a[c] - logl(sum) : 0;
        }
        if (args.residual != nullptr) {
          args.residual[index * classes + c] = static_cast<T>(r);
        }
      }
    }
    if (args.log_prob != nullptr) {
      args.log_prob[sample] = static_cast<T>(log_prob);
    }
  }
}

template <typename T>
void naive(const HeadTangent<T>& args) {
  const bool categorical = args.likelihood.kind == Likelihood::kCategorical;
  const int64_t classes = categorical ? args.likelihood.classes : 1;
  const int64_t outputs = args.positions * args.channels / classes;
  const auto scale = static_cast<long double>(args.likelihood.scale);
  for (int64_t index = 0; index < args.samples * outputs; ++index) {
    const long double cotangent = args.cotangent == nullptr ? 0 : args.cotangent[index / outputs];
    const auto x = static_cast<long double>(args.x[index]);
    const T* residual = args.residual + index * classes;
    const std::vector<T> u(args.adot + index * classes, args.adot + (index + 1) * classes);
    std::vector<long double> p(classes);
    long double mean = 0;
    for (int64_t c = 0; c < classes; ++c) {
      p[c] = (categorical ? static_cast<long double>(c == class_at(args.x[index], classes)) : x) - residual[c];
      mean += p[c] * u[c];
    }
    for (int64_t c = 0; c < classes; ++c) {
      long double curved = 0;
      if (args.likelihood.kind == Likelihood::kBernoulli) {
        curved = -p[c] * (1 - p[c]) * u[c];
      } else if (args.likelihood.kind == Likelihood::kGaussian) {
        curved = -u[c] / (scale * scale);
      } else {
        curved = -p[c] * (u[c] - mean);
      }
      args.delta_dot[index * classes + c] = static_cast<T>(curved + cotangent * residual[c]);
    }
    if (args.grad_x != nullptr) {
      args.grad_x[index] +=
          static_cast<T>(args.likelihood.kind == Likelihood::kGaussian ? u[0] / (scale * scale) : u[0]);
    }
  }
}

template <typename T>
void naive(const KickDrift<T>& args) {
  for (int64_t i = 0; i < args.samples * args.dim; ++i) {
    const T step = args.step[args.step_stride * (i % args.dim)];
    args.rho_half[i] = args.rho[i] + step / 2 * args.force[i];
    args.z_next[i] = args.z[i] + step * args.rho_half[i];
  }
}

template <typename T>
void naive(const KickTemper<T>& args) {
  for (int64_t i = 0; i < args.samples * args.dim; ++i) {
    const T step = args.step[args.step_stride * (i % args.dim)];
    const T force = args.force[i] - (args.z == nullptr ? T(0) : args.z[i]);
    args.rho_next[i] = *args.alpha * (args.rho_half[i] + step / 2 * force);
    if (args.force_out != nullptr) {
      args.force_out[i] = force;
    }
  }
}

template <typename T>
void naive(const KickTemperBackward<T>& args) {
  for (int64_t i = 0; i < args.samples * args.dim; ++i) {
    const T step = args.step[args.step_stride * (i % args.dim)];
    const T momentum = *args.alpha * args.grad[i];
    const T pending = args.pending == nullptr ? T(0) : args.pending[i];
    args.grad_momentum[i] = momentum;
    args.grad_force[i] = pending + step / 2 * momentum;
    if (args.alpha_terms != nullptr) {
      args.alpha_terms[i] = args.grad[i] * (args.rho_half[i] + step / 2 * args.force[i]);
    }
    if (args.step_terms != nullptr) {
      args.step_terms[i] = momentum * args.force[i] / 2;
    }
  }
}

template <typename T>
void naive(const KickDriftBackward<T>& args) {
  for (int64_t i = 0; i < args.samples * args.dim; ++i) {
    const T step = args.step[args.step_stride * (i % args.dim)];
    const T grad_z = args.grad_z[i] + (args.hessian == nullptr ? T(0) : args.hessian[i] - args.through_force[i]);
    const T rho_half = args.rho[i] + step / 2 * args.force[i];
    const T total = args.grad_rho_half[i] + step * grad_z;
    if (args.alpha_terms != nullptr) {
      args.alpha_terms[i] = args.grad_rho_next[i] * (rho_half + step / 2 * args.force_next[i]);
    }
    args.grad_z_out[i] = grad_z;
    args.grad_rho[i] = total;
    args.grad_force[i] = step / 2 * total;
    if (args.step_terms != nullptr) {
      const T before = args.accumulate_step ? args.step_terms[i] : T(0);
      args.step_terms[i] = before + grad_z * rho_half + total * args.force[i] / 2;
    }
  }
}

// --- the tests
// --------------------------------------------------------------------------------------------------------

template <typename T>
void test_kernels(const char* type) {
  // Sums of up to 1,300 terms of size one, each off by a few units of rounding.
  const double tolerance = 40.0 * std::numeric_limits<T>::epsilon();
  for_each_case<T>([&](const std::string& name, int64_t count, auto build) {
    Arena<T> expected;
    naive(build(expected));
    Arena<T> whole;
    cpu_kernel(build(whole), 0, count);
    const double error = difference(whole, expected);
    CHECK(error <= tolerance, "%s %s: off by %g", name.c_str(), type, error);

    for (const int64_t part : {int64_t{1}, int64_t{3}, int64_t{50}}) {
      Arena<T> split;
      const auto args = build(split);
      for (int64_t begin = 0; begin < count; begin += part) {
        cpu_kernel(args, begin, std::min(count, begin + part));
      }
      CHECK(same_bits(whole, split), "%s %s: in ranges of %d it gives other bits", name.c_str(), type,
            static_cast<int>(part));
    }
    Arena<T> untouched;
    Arena<T> before;
    build(before);
    cpu_kernel(build(untouched), count / 2, count / 2);
    CHECK(same_bits(untouched, before), "%s %s: an empty range writes", name.c_str(), type);
  });
}

template <typename T>
void test_gram_product(const char* type) {
  const double tolerance = 40.0 * std::numeric_limits<T>::epsilon();
  constexpr int64_t kShapes[][4] = {{1, 1, 1, 1}, {5, 1, 37, 1}, {3, 4, 5, 16}, {2, 3, 3, 35}, {4, 3, 7, 1}};
  for (const auto& [samples_a, terms_a, samples_b, terms_b] : kShapes) {
    for (const bool accumulate : {false, true}) {
      Arena<T> expected, found;
      naive_gram_product(gram_product_case(expected, samples_a, terms_a, samples_b, terms_b, accumulate));
      const GramProduct<T> args = gram_product_case(found, samples_a, terms_a, samples_b, terms_b, accumulate);
      for (int64_t i = 0; i < samples_a; ++i) {
        fastvae::cpu::gram_product(args, i, i + 1);
      }
      const double error = difference(found, expected);
      CHECK(error <= tolerance, "gram_product %s: off by %g", type, error);
    }
  }
}

}  // namespace
}  // namespace cases

int main() {
  cases::test_kernels<float>("float");
  cases::test_kernels<double>("double");
  cases::test_gram_product<float>("float");
  cases::test_gram_product<double>("double");
  return check::finish("test_kernels");
}

// Arguments for every kernel of kernels.h at small, odd sizes, made the same way as often as a test asks: once for each
// of the implementations that it compares.
//
// Arrays live in an Arena, each an allocation of its own, so that AddressSanitizer sees every step past an end. What a
// kernel wrote is found by comparing whole arenas: inputs must not have changed, and outputs must agree.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "examples.h"
#include "kernels.h"

namespace cases {

using namespace fastvae;  // NOLINT(google-build-using-namespace): a test's header

// Memory aligned as torch aligns it.
template <typename T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};
  Aligned() = default;
  template <typename U>
  explicit Aligned(const Aligned<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kAlignment)); }
  void deallocate(T* data, size_t) { ::operator delete(data, kAlignment); }
  bool operator==(const Aligned&) const { return true; }
};

template <typename T>
using Array = std::vector<T, Aligned<T>>;

template <typename T>
class Arena {
 public:
  T* random(int64_t size, double lowest = -2.0, double highest = 2.0) {
    std::uniform_real_distribution<double> uniform(lowest, highest);
    T* data = filled(size, T(0));
    for (int64_t i = 0; i < size; ++i) {
      data[i] = static_cast<T>(uniform(generator_));
    }
    return data;
  }

  T* filled(int64_t size, T value) { return arrays_.emplace_back(static_cast<size_t>(size), value).data(); }

  // An output, filled with something that no kernel computes.
  T* output(int64_t size) { return filled(size, T(-12345)); }

  // Room for a kernel's own use, which nobody compares.
  T* scratch(int64_t size) { return unseen_.emplace_back(static_cast<size_t>(size)).data(); }

  const std::deque<Array<T>>& arrays() const { return arrays_; }

 private:
  std::mt19937_64 generator_{7};
  std::deque<Array<T>> unseen_;
  std::deque<Array<T>> arrays_;
};

// The largest |a - b| / (1 + |b|), NaN counted as infinite.
template <typename T>
double difference(const Arena<T>& a, const Arena<T>& b) {
  double worst = 0.0;
  for (size_t k = 0; k < a.arrays().size(); ++k) {
    for (size_t i = 0; i < a.arrays()[k].size(); ++i) {
      const double x = static_cast<double>(a.arrays()[k][i]);
      const double y = static_cast<double>(b.arrays()[k][i]);
      const double error = std::abs(x - y) / (1.0 + std::abs(y));
      worst = error <= worst ? worst : (std::isnan(error) ? HUGE_VAL : error);
    }
  }
  return worst;
}

template <typename T>
bool same_bits(const Arena<T>& a, const Arena<T>& b) {
  for (size_t k = 0; k < a.arrays().size(); ++k) {
    const Array<T>& x = a.arrays()[k];
    if (std::memcmp(x.data(), b.arrays()[k].data(), x.size() * sizeof(T)) != 0) {
      return false;
    }
  }
  return true;
}

// --- pointwise
// --------------------------------------------------------------------------------------------------------

template <typename T, typename Visitor>
void for_each_pointwise(int64_t rows, int64_t channels, const ActivationSpec& activation, Visitor visit) {
  const std::string where = " activation " + std::to_string(static_cast<int>(activation.kind)) + " [" +
                            std::to_string(rows) + ", " + std::to_string(channels) + "]";
  const int64_t size = rows * channels;
  const bool linear = is_piecewise_linear(activation.kind);
  for (const bool biased : {true, false}) {
    for (const bool kept : {true, false}) {
      visit("bias_activation" + where + (biased ? " biased" : "") + (kept ? " kept" : " in place"), rows,
            [=](Arena<T>& arena) {
              BiasActivation<T> args{};
              T* a = arena.random(size, -3.0, 3.0);
              args.a = a;
              args.bias = biased ? arena.random(channels) : nullptr;
              args.h = kept ? arena.output(size) : a;
              args.kept = kept ? arena.output(size) : nullptr;
              args.rows = rows;
              args.channels = channels;
              args.activation = activation;
              return args;
            });
    }
  }
  for (const bool in_place : {true, false}) {
    const std::string mode = in_place ? " in place" : "";
    // s is an output of the activation (positive for softplus) or an input; in (0, 1) it can be either.
    visit("activation_reverse" + where + mode, size, [=](Arena<T>& arena) {
      ActivationReverse<T> args{};
      T* g = arena.random(size);
      args.g = g;
      args.s = arena.random(size, 0.01, 0.99);
      args.delta = in_place ? g : arena.output(size);
      args.size = size;
      args.activation = activation;
      return args;
    });
    visit("activation_tangent" + where + mode, size, [=](Arena<T>& arena) {
      ActivationTangent<T> args{};
      T* adot = arena.random(size);
      args.adot = adot;
      args.s = arena.random(size, 0.01, 0.99);
      args.e = linear ? nullptr : arena.random(size);
      args.hdot = in_place ? adot : arena.output(size);
      args.curvature = linear ? nullptr : arena.output(size);
      args.size = size;
      args.activation = activation;
      return args;
    });
    visit("activation_adjoint" + where + mode, size, [=](Arena<T>& arena) {
      ActivationAdjoint<T> args{};
      args.g = arena.random(size);
      args.s = arena.random(size, 0.01, 0.99);
      T* curvature = linear ? nullptr : arena.random(size);
      args.curvature = curvature;
      args.delta_dot = in_place && !linear ? curvature : arena.output(size);
      args.size = size;
      args.activation = activation;
      return args;
    });
  }
}

// --- heads
// ------------------------------------------------------------------------------------------------------------

template <typename T, typename Visitor>
void for_each_head(const LikelihoodSpec& likelihood, int64_t samples, int64_t positions, int64_t channels,
                   Visitor visit) {
  const bool categorical = likelihood.kind == Likelihood::kCategorical;
  const std::string where = " likelihood " + std::to_string(static_cast<int>(likelihood.kind)) + " [" +
                            std::to_string(samples) + ", " + std::to_string(positions) + ", " +
                            std::to_string(channels) + "]";
  const int64_t size = samples * positions * channels;
  const bool of_counts = likelihood.is_discrete() && !categorical;
  const int64_t observed = categorical ? size / likelihood.classes : size;
  for (const bool biased : {true, false}) {
    for (const int wanted : {0, 1, 2, 3}) {  // residual only; both; log probability only; both, in place
      visit("head_residual" + where + (biased ? " biased" : "") + " wanted " + std::to_string(wanted), samples,
            [=](Arena<T>& arena) {
              HeadResidual<T> args{};
              T* a = arena.random(size, -4.0, 4.0);
              args.a = a;
              args.bias = biased ? arena.random(channels) : nullptr;
              args.x = arena.random(observed, 0.0, of_counts ? 9.0 : 1.0);
              args.residual = wanted == 2 ? nullptr : (wanted == 3 ? a : arena.output(size));
              args.log_prob = wanted == 0 ? nullptr : arena.output(samples);
              args.samples = samples;
              args.positions = positions;
              args.channels = channels;
              args.likelihood = likelihood;
              const int64_t chunks = head_chunks(likelihood, positions, channels);
              args.partial = wanted != 0 && chunks > 1 ? arena.scratch(samples * chunks) : nullptr;
              return args;
            });
    }
  }
  for (const bool with_cotangent : {true, false}) {
    for (const bool with_grad_x : {true, false}) {
      if (with_grad_x && categorical) {
        continue;
      }
      visit("head_tangent" + where + (with_cotangent ? " cotangent" : "") + (with_grad_x ? " grad_x" : " in place"),
            samples, [=](Arena<T>& arena) {
              HeadTangent<T> args{};
              T* adot = arena.random(size);
              args.adot = adot;
              args.residual = arena.random(size, -0.9, 0.9);
              args.x = arena.random(observed, 0.0, 1.0);
              args.cotangent = with_cotangent ? arena.random(samples) : nullptr;
              args.delta_dot = with_grad_x ? arena.output(size) : adot;
              args.grad_x = with_grad_x ? arena.random(size) : nullptr;
              args.samples = samples;
              args.positions = positions;
              args.channels = channels;
              args.likelihood = likelihood;
              return args;
            });
    }
  }
}

template <typename T, typename Visitor>
void for_each_element_head(const ElementExample& of, int64_t samples, int64_t size, Visitor visit) {
  const std::string where = " likelihood " + std::to_string(static_cast<int>(of.spec.kind)) + " [" +
                            std::to_string(samples) + ", " + std::to_string(size) + "]";
  const int64_t all = samples * of.outputs * size;
  for (const bool weighted : {true, false}) {
    const auto data = [=](Arena<T>& arena, auto& args) {
      args.y = arena.random(all, -4.0, 4.0);
      T* x = arena.random(samples * size, 0.0, 5.0);
      T* weight = weighted ? arena.random(samples * size, -1.0, 2.0) : nullptr;
      for (int64_t i = 0; i < samples * size; ++i) {
        x[i] = std::floor(x[i]);
        if (weighted && weight[i] < T(0)) {
          weight[i] = T(0);
          x[i] = T(1e30);  // whatever it is
        }
      }
      args.x = x;
      args.weight = weight;
      args.samples = samples;
      args.size = size;
      args.likelihood = of.spec;
    };
    for (const int wanted : {0, 1, 2}) {  // residual only; both; log probability only
      visit("element_head_residual" + where + (weighted ? " weighted" : "") + " wanted " + std::to_string(wanted),
            samples, [=](Arena<T>& arena) {
              ElementHeadResidual<T> args{};
              data(arena, args);
              args.residual = wanted == 2 ? nullptr : arena.output(all);
              args.log_prob = wanted == 0 ? nullptr : arena.output(samples);
              const int64_t chunks = element_head_chunks(size);
              args.partial = wanted != 0 && chunks > 1 ? arena.scratch(samples * chunks) : nullptr;
              return args;
            });
    }
    for (const bool with_cotangent : {true, false}) {
      visit("element_head_tangent" + where + (weighted ? " weighted" : "") + (with_cotangent ? " cotangent" : ""),
            samples, [=](Arena<T>& arena) {
              ElementHeadTangent<T> args{};
              data(arena, args);
              args.dot = arena.random(all);
              args.residual = with_cotangent ? arena.random(all) : nullptr;
              args.cotangent = with_cotangent ? arena.random(samples) : nullptr;
              args.delta_dot = arena.output(all);
              return args;
            });
    }
  }
}

// --- leapfrog
// ---------------------------------------------------------------------------------------------------------

template <typename T, typename Visitor>
void for_each_leapfrog(int64_t samples, int64_t dim, int64_t step_stride, Visitor visit) {
  const std::string where =
      " [" + std::to_string(samples) + ", " + std::to_string(dim) + "] stride " + std::to_string(step_stride);
  const int64_t size = samples * dim;
  const int64_t steps = step_stride == 0 ? 1 : dim;
  visit("kick_drift" + where, samples, [=](Arena<T>& arena) {
    KickDrift<T> args{};
    args.z = arena.random(size);
    args.rho = arena.random(size);
    args.force = arena.random(size);
    args.step = arena.random(steps, 0.1, 0.5);
    args.step_stride = step_stride;
    args.z_next = arena.output(size);
    args.rho_half = arena.output(size);
    args.samples = samples;
    args.dim = dim;
    return args;
  });
  for (const bool in_flow : {true, false}) {
    const std::string mode = in_flow ? " in a flow" : "";
    visit("kick_temper" + where + mode, samples, [=](Arena<T>& arena) {
      KickTemper<T> args{};
      args.rho_half = arena.random(size);
      args.force = arena.random(size);
      args.z = in_flow ? arena.random(size) : nullptr;
      args.step = arena.random(steps, 0.1, 0.5);
      args.step_stride = step_stride;
      args.alpha = arena.random(1, 0.5, 1.0);
      args.rho_next = arena.output(size);
      args.force_out = in_flow ? arena.output(size) : nullptr;
      args.samples = samples;
      args.dim = dim;
      return args;
    });
    visit("kick_temper_backward" + where + mode, samples, [=](Arena<T>& arena) {
      KickTemperBackward<T> args{};
      args.grad = arena.random(size);
      args.rho_half = in_flow ? nullptr : arena.random(size);
      args.force = arena.random(size);
      args.step = arena.random(steps, 0.1, 0.5);
      args.step_stride = step_stride;
      args.alpha = arena.random(1, 0.5, 1.0);
      T* pending = in_flow ? arena.random(size) : nullptr;
      args.pending = pending;
      args.grad_momentum = arena.output(size);
      args.grad_force = in_flow ? pending : arena.output(size);
      args.alpha_terms = in_flow ? nullptr : arena.output(size);
      args.step_terms = arena.output(size);
      args.samples = samples;
      args.dim = dim;
      return args;
    });
    visit("kick_drift_backward" + where + mode, samples, [=](Arena<T>& arena) {
      KickDriftBackward<T> args{};
      T* grad_z = arena.random(size);
      T* grad_rho_next = in_flow ? arena.random(size) : nullptr;
      args.grad_z = grad_z;
      args.grad_rho_half = arena.random(size);
      args.hessian = in_flow ? arena.random(size) : nullptr;
      args.through_force = in_flow ? arena.random(size) : nullptr;
      args.rho = arena.random(size);
      args.force = arena.random(size);
      args.grad_rho_next = grad_rho_next;
      args.force_next = in_flow ? arena.random(size) : nullptr;
      args.step = arena.random(steps, 0.1, 0.5);
      args.step_stride = step_stride;
      args.grad_z_out = in_flow ? grad_z : arena.output(size);
      args.grad_rho = in_flow ? grad_rho_next : arena.output(size);
      args.grad_force = arena.output(size);
      args.step_terms = arena.random(size);
      args.alpha_terms = in_flow ? arena.output(size) : nullptr;
      args.accumulate_step = in_flow;
      args.samples = samples;
      args.dim = dim;
      return args;
    });
  }
}

// --- divergence of Gaussians
// ------------------------------------------------------------------------------------------

template <typename T, typename Visitor>
void for_each_gaussian_kl(int64_t samples, int64_t dim, Visitor visit) {
  const int64_t size = samples * dim;
  for (const bool standard : {true, false}) {
    const std::string where =
        " [" + std::to_string(samples) + ", " + std::to_string(dim) + "]" + (standard ? " standard" : "");
    const auto prior = [=](Arena<T>& arena) { return standard ? nullptr : arena.random(size); };
    const auto output = [=](Arena<T>& arena) { return standard ? nullptr : arena.output(size); };
    visit("gaussian_kl" + where, samples, [=](Arena<T>& arena) {
      GaussianKl<T> args{};
      args.mu_q = arena.random(size);
      args.logvar_q = arena.random(size);
      args.mu_p = prior(arena);
      args.logvar_p = prior(arena);
      args.kl = arena.output(samples);
      args.samples = samples;
      args.dim = dim;
      return args;
    });
    visit("gaussian_kl_backward" + where, samples, [=](Arena<T>& arena) {
      GaussianKlBackward<T> args{};
      args.grad = arena.random(samples);
      args.mu_q = arena.random(size);
      args.logvar_q = arena.random(size);
      args.mu_p = prior(arena);
      args.logvar_p = prior(arena);
      args.grad_mu_q = arena.output(size);
      args.grad_logvar_q = arena.output(size);
      args.grad_mu_p = output(arena);
      args.grad_logvar_p = output(arena);
      args.samples = samples;
      args.dim = dim;
      return args;
    });
  }
}

// --- Jacobian sweeps
// --------------------------------------------------------------------------------------------------

template <typename T, typename Visitor>
void for_each_jacobian(int64_t samples, int64_t latents, int64_t numel, const ActivationSpec& activation,
                       Visitor visit) {
  const std::string where = " activation " + std::to_string(static_cast<int>(activation.kind)) + " [" +
                            std::to_string(samples) + ", " + std::to_string(latents) + ", " + std::to_string(numel) +
                            "]";
  const int64_t size = samples * latents * numel;
  const bool linear = is_piecewise_linear(activation.kind);
  const bool identity = activation.kind == Activation::kIdentity;
  for (const bool shared : {true, false}) {
    visit("jacobian_tangent" + where + (shared ? " shared" : " in place"), samples, [=](Arena<T>& arena) {
      JacobianTangent<T> args{};
      T* adot = arena.random(shared ? latents * numel : size);
      args.adot = adot;
      args.s = identity ? nullptr : arena.random(samples * numel, 0.01, 0.99);
      args.hdot = shared ? arena.output(size) : adot;
      args.shared = shared;
      args.samples = samples;
      args.latents = latents;
      args.numel = numel;
      args.activation = activation;
      return args;
    });
    for (const bool from_above : {true, false}) {
      visit("jacobian_adjoint" + where + (shared ? " shared" : "") + (from_above ? " hbar" : ""), samples,
            [=](Arena<T>& arena) {
              JacobianAdjoint<T> args{};
              T* hdotbar = arena.random(size);
              T* hbar = from_above ? arena.random(samples * numel) : nullptr;
              args.hdotbar = hdotbar;
              args.s = identity ? nullptr : arena.random(samples * numel, 0.01, 0.99);
              args.e = linear ? nullptr : arena.random(shared ? latents * numel : size);
              args.hbar = hbar;
              args.adotbar = hdotbar;
              args.abar = from_above ? hbar : (linear ? nullptr : arena.output(samples * numel));
              args.shared = shared;
              args.samples = samples;
              args.latents = latents;
              args.numel = numel;
              args.activation = activation;
              return args;
            });
    }
  }
  for (const bool squared : {true, false}) {
    for (const int wanted : {0, 1, 2}) {  // the terms alone; the adjoint; the adjoint in place, weighted
      visit("jacobian_head" + where + (squared ? " squared" : "") + " wanted " + std::to_string(wanted),
            samples * jacobian_chunks(numel), [=](Arena<T>& arena) {
              const int64_t first = 3;
              JacobianHead<T> args{};
              T* adot = arena.random(size);
              args.adot = adot;
              args.s = identity ? nullptr : arena.random(samples * (numel + 5), 0.01, 0.99);
              args.weight = wanted == 2 ? arena.random(samples) : nullptr;
              args.terms = arena.output(samples * jacobian_chunks(numel));
              args.adotbar = wanted == 0 ? nullptr : (wanted == 2 ? adot : arena.output(size));
              args.abar = wanted == 0 || linear ? nullptr : arena.output(samples * (numel + 5));
              args.squared = squared;
              args.samples = samples;
              args.latents = latents;
              args.numel = numel;
              args.outputs = numel + 5;
              args.first = first;
              args.activation = activation;
              return args;
            });
    }
  }
}

// --- dot products of per-sample gradients
// --------------------------------------------------------------------------------------------------------

// The two Gram matrices of a layer's tile given.
template <typename T>
GramProduct<T> gram_product_case(Arena<T>& arena, int64_t samples_a, int64_t terms_a, int64_t samples_b,
                                 int64_t terms_b, bool accumulate) {
  const int64_t size = samples_a * terms_a * samples_b * terms_b, stride = samples_b + 3;
  GramProduct<T> args{};
  args.of_inputs = arena.random(size);
  args.of_grads = arena.random(size);
  args.out = arena.random(samples_a * stride);
  args.out_stride = stride;
  args.samples_a = samples_a;
  args.terms_a = terms_a;
  args.samples_b = samples_b;
  args.terms_b = terms_b;
  args.bias = accumulate;
  args.accumulate = accumulate;
  return args;
}

template <typename T, typename Visitor>
void for_each_gram_product(Visitor visit) {
  // One term and several, more pairs than a block has threads, and more terms.
  constexpr int64_t kShapes[][4] = {{1, 1, 1, 1}, {5, 1, 137, 1}, {3, 4, 45, 16}, {2, 3, 3, 135}, {4, 3, 7, 1}};
  for (const auto& [samples_a, terms_a, samples_b, terms_b] : kShapes) {
    for (const bool accumulate : {false, true}) {
      visit("gram_product [" + std::to_string(samples_a) + ", " + std::to_string(samples_b) + "]", samples_a,
            [a = samples_a, t = terms_a, b = samples_b, u = terms_b, accumulate](Arena<T>& arena) {
              return gram_product_case(arena, a, t, b, u, accumulate);
            });
    }
  }
}

// --- convolutions
// --------------------------------------------------------------------------------------------------------

template <typename T, typename Visitor>
void for_each_window(int64_t samples, const ConvolutionWindow& w, Visitor visit) {
  const int64_t image = samples * w.big_height * w.big_width * w.channels;
  const int64_t columns = samples * w.height * w.width * w.kernel_height * w.kernel_width * w.channels;
  const std::string where = " [" + std::to_string(w.big_height) + ", " + std::to_string(w.big_width) + "]";
  visit("unfold" + where, samples, [=](Arena<T>& arena) {
    const T* in = arena.random(image);
    return Unfold<T>{in, arena.output(columns), w, samples};
  });
  visit("fold" + where, samples, [=](Arena<T>& arena) {
    const T* in = arena.random(columns);
    return Fold<T>{in, arena.output(image), w, samples};
  });
}

// Calls visit(name, count, build) for every case; build(arena) gives the argument struct, count is the kernel's index.
template <typename T, typename Visitor>
void for_each_case(Visitor visit) {
  for (const ActivationSpec& activation : activations()) {
    for_each_pointwise<T>(5, 37, activation, visit);
  }
  for (const Activation kind : {Activation::kRelu, Activation::kSoftplus}) {
    const ActivationSpec activation = examples(kind)[0];
    for_each_pointwise<T>(1, 1, activation, visit);
    for_each_pointwise<T>(7, 3, activation, visit);
    for_each_pointwise<T>(3, 400, activation, visit);
  }
#define FASTVAE_KIND(kind, Head) Likelihood::kind,
  for (const Likelihood kind : {FASTVAE_INDEPENDENT_HEADS(FASTVAE_KIND)}) {
#undef FASTVAE_KIND
    const LikelihoodSpec likelihood{kind, 0.7};
    for_each_head<T>(likelihood, 1, 1, 1, visit);
    for_each_head<T>(likelihood, 5, 3, 7, visit);
    for_each_head<T>(likelihood, 6, 1, 301, visit);
    for_each_head<T>(likelihood, 2, 173, 2, visit);
  }
  for_each_head<T>({Likelihood::kBernoulli}, 2, 1, 5000, visit);
  for (const ElementExample& of : element_heads()) {
    for_each_element_head<T>(of, 3, 37, visit);
  }
  for_each_element_head<T>(element_heads().back(), 2, 5000, visit);
  for_each_head<T>({Likelihood::kCategorical, 1.0, 256}, 2, 5, 512, visit);
  for_each_head<T>({Likelihood::kCategorical, 1.0, 300}, 2, 3, 300, visit);
  for_each_head<T>({Likelihood::kCategorical, 1.0, 3}, 3, 45, 6, visit);
  for_each_head<T>({Likelihood::kCategorical, 1.0, 5}, 6, 19, 15, visit);
  for_each_head<T>({Likelihood::kCategorical, 1.0, 33}, 1, 1, 33, visit);
  for (const ActivationSpec& activation : activations()) {
    for_each_jacobian<T>(2, 3, 37, activation, visit);
  }
  for_each_jacobian<T>(1, 1, 1, examples(Activation::kGelu)[0], visit);
  for_each_jacobian<T>(1, 2, kJacobianChunk + 130, examples(Activation::kSigmoid)[0], visit);
  for_each_gram_product<T>(visit);
  for_each_gaussian_kl<T>(1, 1, visit);
  for_each_gaussian_kl<T>(11, 67, visit);
  for_each_gaussian_kl<T>(301, 5, visit);
  for (const int64_t step_stride : {0, 1}) {
    for_each_leapfrog<T>(1, 1, step_stride, visit);
    for_each_leapfrog<T>(5, 3, step_stride, visit);
    for_each_leapfrog<T>(3, 130, step_stride, visit);
    for_each_leapfrog<T>(67, 17, step_stride, visit);
  }
}

// cpu_kernel(args, begin, end) for each argument struct.
#define FASTVAE_TEST_CPU(NAME, ARGS)                                 \
  template <typename T>                                              \
  void cpu_kernel(const ARGS<T>& args, int64_t begin, int64_t end) { \
    fastvae::cpu::NAME(args, begin, end);                            \
  }
FASTVAE_FOR_EACH_KERNEL(FASTVAE_TEST_CPU)
#undef FASTVAE_TEST_CPU

}  // namespace cases

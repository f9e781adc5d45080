// Each CPU kernel against the formula of kernels.h in the plainest loop, and split into ranges: bitwise the same.
#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>

#include "cases.h"
#include "math/splitmix.h"
#include "noise_cases.h"

namespace cases {
namespace {

// --- the formulas, element by element
// ---------------------------------------------------------------------------------

template <typename T, template <Activation, typename> typename Call>
auto by_kind(const ActivationSpec& spec, T first, T second) {
  switch (spec.kind) {
#define CASE(KIND, ...)  \
  case Activation::KIND: \
    return Call<Activation::KIND, T>::of(spec, first, second);
    FASTVAE_ACTIVATION_KINDS(CASE)
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
        } else if (args.likelihood.kind == Likelihood::kLaplace) {
          r = (x > a[c] ? 1 : -1) / scale;
          log_prob += -fabsl(x - a[c]) / scale - logl(2 * scale);
        } else if (args.likelihood.kind == Likelihood::kPoisson) {
          r = x - expl(a[c]);
          log_prob += (x > 0 ? x * (a[c] - logl(x)) : 0) - (expl(a[c]) - x);
        } else if (args.likelihood.kind == Likelihood::kNegativeBinomial) {
          r = x - (x + scale) * expl(a[c]) / (expl(a[c]) + scale);
          log_prob += (x > 0 ? x * (a[c] - logl(x)) : 0) - (x + scale) * logl((expl(a[c]) + scale) / (x + scale));
        } else if (args.likelihood.kind == Likelihood::kCategorical) {
          const bool chosen = c == class_at(args.x[index], classes);
          r = (chosen ? 1 : 0) - expl(a[c]) / sum;
          log_prob += chosen ? a[c] - logl(sum) : 0;
        } else {  // by itself in float64, which test_math compares with differences
          const auto own = with_head(args.likelihood, [&](const auto& head) {
            return head.both(static_cast<double>(a[c]), static_cast<double>(x));
          });
          r = own.residual;
          log_prob += own.log_prob;
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
    long double mean = 0, q = 0;
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
      } else if (args.likelihood.kind == Likelihood::kLaplace) {
        curved = 0;
      } else if (args.likelihood.kind == Likelihood::kPoisson) {
        curved = -p[c] * u[c];
      } else if (args.likelihood.kind == Likelihood::kNegativeBinomial) {
        q = p[c] / (x + scale);
        curved = -(x + scale) * q * (1 - q) * u[c];
      } else if (categorical) {
        curved = -p[c] * (u[c] - mean);
      } else {
        curved = with_head(args.likelihood,
                           [&](const auto& head) {
                             return head.curvature(static_cast<double>(residual[c]), static_cast<double>(x));
                           }) *
                 u[c];
      }
      args.delta_dot[index * classes + c] = static_cast<T>(curved + cotangent * residual[c]);
    }
    if (args.grad_x != nullptr) {
      long double cross = 1 - q;  // q is 0 but of a negative binomial
      if (args.likelihood.kind == Likelihood::kGaussian) {
        cross = 1 / (scale * scale);
      } else if (args.likelihood.kind != Likelihood::kBernoulli && args.likelihood.kind != Likelihood::kPoisson &&
                 args.likelihood.kind != Likelihood::kNegativeBinomial) {
        cross = with_head(args.likelihood, [&](const auto& head) {
          return head.cross(static_cast<double>(residual[0]), static_cast<double>(x));
        });
      }
      args.grad_x[index] += static_cast<T>(cross * u[0]);
    }
  }
}

// use(rules, an element's outputs, x and weight, where its outputs lie) for each element of a call.
template <typename Args, typename Use>
void each_element(const Args& args, const Use& use) {
  with_element_head(args.likelihood, [&](const auto& rules) {
    constexpr int kOutputs = std::decay_t<decltype(rules)>::kOutputs;
    for (int64_t sample = 0; sample < args.samples; ++sample) {
      for (int64_t j = 0; j < args.size; ++j) {
        double y[kOutputs];
        std::array<int64_t, kOutputs> places;
        for (int i = 0; i < kOutputs; ++i) {
          places[i] = (sample * kOutputs + i) * args.size + j;
          y[i] = args.y[places[i]];
        }
        const int64_t at = sample * args.size + j;
        const double weight = args.weight == nullptr ? 1.0 : args.weight[at];
        use(rules, y, weight == 0 ? 0.0 : static_cast<double>(args.x[at]), weight, places, sample);
      }
    }
  });
}

template <typename T>
void naive(const ElementHeadResidual<T>& args) {
  std::vector<double> sums(args.samples, 0.0);
  each_element(args, [&](const auto& rules, const double* y, double x, double w, const auto& places, int64_t sample) {
    double r[3];
    sums[sample] += w * rules.first(y, x, r);
    for (size_t i = 0; i < places.size() && args.residual != nullptr; ++i) {
      args.residual[places[i]] = static_cast<T>(w * r[i]);
    }
  });
  for (int64_t sample = 0; sample < args.samples && args.log_prob != nullptr; ++sample) {
    args.log_prob[sample] = static_cast<T>(sums[sample]);
  }
}

template <typename T>
void naive(const ElementHeadTangent<T>& args) {
  each_element(args, [&](const auto& rules, const double* y, double x, double w, const auto& places, int64_t sample) {
    double v[3], bent[3];
    for (size_t i = 0; i < places.size(); ++i) {
      v[i] = args.dot[places[i]];
    }
    rules.second(y, x, v, bent);
    for (size_t i = 0; i < places.size(); ++i) {
      const double of_value = args.cotangent == nullptr ? 0.0 : args.cotangent[sample] * args.residual[places[i]];
      args.delta_dot[places[i]] = static_cast<T>(w * bent[i] + of_value);
    }
  });
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

template <typename T>
T slope_at(const ActivationSpec& activation, const T* s, int64_t i) {
  return s == nullptr ? T(1) : by_kind<T, Slope>(activation, s[i], T(0));
}
template <typename T>
T curvature_at(const ActivationSpec& activation, const T* s, int64_t i, T e) {
  return s == nullptr ? T(0) : by_kind<T, Curvature>(activation, s[i], e);
}

template <typename T>
void naive(const GaussianKl<T>& args) {
  for (int64_t sample = 0; sample < args.samples; ++sample) {
    double sum = 0.0;
    for (int64_t i = sample * args.dim; i < (sample + 1) * args.dim; ++i) {
      const double logvar_p = args.mu_p == nullptr ? 0.0 : static_cast<double>(args.logvar_p[i]);
      const double gap = static_cast<double>(args.mu_q[i]) - (args.mu_p == nullptr ? 0.0 : args.mu_p[i]);
      const double log_ratio = static_cast<double>(args.logvar_q[i]) - logvar_p;
      sum += 0.5 * (std::exp(log_ratio) - 1.0 - log_ratio + gap * gap * std::exp(-logvar_p));
    }
    args.kl[sample] = static_cast<T>(sum);
  }
}

template <typename T>
void naive(const GaussianKlBackward<T>& args) {
  for (int64_t i = 0; i < args.samples * args.dim; ++i) {
    const double grad = args.grad[i / args.dim];
    const double logvar_p = args.mu_p == nullptr ? 0.0 : static_cast<double>(args.logvar_p[i]);
    const double gap = static_cast<double>(args.mu_q[i]) - (args.mu_p == nullptr ? 0.0 : args.mu_p[i]);
    const double ratio = std::exp(static_cast<double>(args.logvar_q[i]) - logvar_p);
    const double scaled = gap * std::exp(-logvar_p);
    args.grad_mu_q[i] = static_cast<T>(grad * scaled);
    args.grad_logvar_q[i] = static_cast<T>(grad * 0.5 * (ratio - 1.0));
    if (args.mu_p != nullptr) {
      args.grad_mu_p[i] = static_cast<T>(-grad * scaled);
      args.grad_logvar_p[i] = static_cast<T>(grad * 0.5 * (1.0 - ratio - gap * scaled));
    }
  }
}

template <typename T>
void naive(const JacobianTangent<T>& args) {
  for (int64_t i = 0; i < args.samples * args.latents * args.numel; ++i) {
    const int64_t of_sample = i / (args.latents * args.numel) * args.numel + i % args.numel;
    args.hdot[i] =
        slope_at(args.activation, args.s, of_sample) * args.adot[args.shared ? i % (args.latents * args.numel) : i];
  }
}

template <typename T>
void naive(const JacobianAdjoint<T>& args) {
  for (int64_t of_sample = 0; of_sample < args.samples * args.numel; ++of_sample) {
    const int64_t rows = of_sample / args.numel * args.latents * args.numel + of_sample % args.numel;
    const T slope = slope_at(args.activation, args.s, of_sample);
    T abar = args.hbar == nullptr ? T(0) : slope * args.hbar[of_sample];
    for (int64_t i = 0; i < args.latents; ++i) {
      const int64_t at = rows + i * args.numel;
      if (args.e != nullptr) {
        const T e = args.e[args.shared ? i * args.numel + of_sample % args.numel : at];
        abar += curvature_at(args.activation, args.s, of_sample, e) * args.hdotbar[at];
      }
      args.adotbar[at] = slope * args.hdotbar[at];
    }
    if (args.abar != nullptr) {
      args.abar[of_sample] = abar;
    }
  }
}

template <typename T>
void naive(const JacobianHead<T>& args) {
  const int64_t chunks = jacobian_chunks(args.numel);
  std::fill_n(args.terms, args.samples * chunks, T(0));
  for (int64_t k = 0; k < args.samples * args.numel; ++k) {
    const int64_t sample = k / args.numel;
    const int64_t column = k % args.numel;
    const int64_t output = sample * args.outputs + args.first + column;
    const T slope = slope_at(args.activation, args.s, output);
    const T weight = args.weight == nullptr ? T(1) : args.weight[sample];
    T abar = T(0);
    for (int64_t i = 0; i < args.latents; ++i) {
      const int64_t at = (sample * args.latents + i) * args.numel + column;
      const T adot = args.adot[at];
      const T ydot = slope * adot;
      const T sign = ydot > T(0) ? T(1) : (ydot < T(0) ? T(-1) : T(0));
      const T bar = weight * (args.squared ? 2 * ydot : sign);
      args.terms[sample * chunks + column / kJacobianChunk] += args.squared ? ydot * ydot : std::abs(ydot);
      if (args.adotbar != nullptr) {
        args.adotbar[at] = slope * bar;
      }
      abar += curvature_at(args.activation, args.s, output, keeps_input(args.activation.kind) ? adot : ydot) * bar;
    }
    if (args.abar != nullptr) {
      args.abar[output] = abar;
    }
  }
}

template <typename T>
void naive(const GramProduct<T>& args) {
  for (int64_t i = 0; i < args.samples_a; ++i) {
    for (int64_t j = 0; j < args.samples_b; ++j) {
      T* out = args.out + i * args.out_stride + j;
      double total = args.accumulate ? static_cast<double>(*out) : 0.0;
      for (int64_t t = 0; t < args.terms_a; ++t) {
        for (int64_t u = 0; u < args.terms_b; ++u) {
          const int64_t at = ((i * args.terms_a + t) * args.samples_b + j) * args.terms_b + u;
          total += (static_cast<double>(args.of_inputs[at]) + args.bias) * static_cast<double>(args.of_grads[at]);
        }
      }
      *out = static_cast<T>(total);
    }
  }
}

// --- transposed convolutions, each against the scatter that defines it

template <typename T>
struct ConvProblem {
  ConvolutionWindow window;
  int64_t in_channels, samples;

  // Calls body(x, w, y): places in the input, in a weight [in_channels, channels, kernel_height, kernel_width], and in
  // the output, that meet.
  template <typename Body>
  void each(Body body) const {
    const ConvolutionWindow& w = window;
    for (int64_t position = 0; position < samples * w.height * w.width; ++position) {
      const int64_t sample = position / (w.height * w.width);
      const int64_t y = position / w.width % w.height;
      const int64_t x = position % w.width;
      for (int64_t tap = 0; tap < w.kernel_height * w.kernel_width; ++tap) {
        const int64_t row = y * w.stride_height - w.padding_height + tap / w.kernel_width;
        const int64_t column = x * w.stride_width - w.padding_width + tap % w.kernel_width;
        if (row < 0 || row >= w.big_height || column < 0 || column >= w.big_width) {
          continue;
        }
        for (int64_t pair = 0; pair < in_channels * w.channels; ++pair) {
          const int64_t channel = pair % w.channels;
          body(position * in_channels + pair / w.channels, pair * w.kernel_height * w.kernel_width + tap,
               ((sample * w.big_height + row) * w.big_width + column) * w.channels + channel);
        }
      }
    }
  }
};

template <typename T>
void test_direct_convolution(const char* type, const ConvProblem<T>& p) {
  const ConvolutionWindow& w = p.window;
  const int64_t taps = w.kernel_height * w.kernel_width;
  const int64_t weights = p.in_channels * w.channels * taps;
  const int64_t inputs = p.samples * w.height * w.width * p.in_channels;
  const int64_t outputs = p.samples * w.big_height * w.big_width * w.channels;
  Arena<T> inside;
  const T* weight = inside.random(weights);
  const T* in = inside.random(inputs);
  const T* delta = inside.random(outputs);
  T* forward = inside.output(weights);
  T* backward = inside.output(weights);
  for (int64_t k = 0; k < weights; ++k) {
    const int64_t tap = k % taps, i = tap / w.kernel_width, j = tap % w.kernel_width;
    const int64_t ci = k / taps / w.channels, co = k / taps % w.channels;
    // Phases in order; the taps of one in descending order.
    int64_t place = 0;
    for (int64_t phase = 0; phase < w.stride_width; ++phase) {
      for (int64_t other = w.kernel_width - 1; other >= 0; --other) {
        if ((phase + w.padding_width - other) % w.stride_width == 0) {
          if (other == j) {
            forward[((i * w.kernel_width + place) * p.in_channels + ci) * w.channels + co] = weight[k];
          }
          ++place;
        }
      }
    }
    backward[((i * w.kernel_width + j) * w.channels + co) * p.in_channels + ci] = weight[k];
  }
  constexpr int64_t kTasks = 2;
  Arena<T> expected, actual;
  T* y = expected.filled(outputs, T(0));
  T* h = expected.filled(inputs, T(0));
  T* dw = expected.filled(weights, T(0));
  p.each([&](int64_t at_in, int64_t at_weight, int64_t at_out) {
    y[at_out] += weight[at_weight] * in[at_in];
    h[at_in] += weight[at_weight] * delta[at_out];
    dw[at_weight] += in[at_in] * delta[at_out];
  });
  T* out = actual.output(outputs);
  T* reverse = actual.output(inputs);
  T* gradient = actual.output(weights);
  const DirectConvTranspose<T> apply{in, forward, out, p.in_channels, w};
  const DirectConvTransposeReverse<T> transpose{delta, backward, reverse, p.in_channels, w};
  Arena<T> partial;
  T* parts = partial.output(kTasks * weights);
  const DirectConvTransposeGradient<T> differentiate{delta, in, parts, p.in_channels, p.samples, kTasks, w};
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    cpu::direct_conv_transpose(apply, sample, sample + 1);
    cpu::direct_conv_transpose_reverse(transpose, sample, sample + 1);
  }
  for (int64_t task = 0; task < kTasks; ++task) {
    cpu::direct_conv_transpose_gradient(differentiate, task, task + 1);
  }
  for (int64_t k = 0; k < weights; ++k) {
    const int64_t tap = k % taps, ci = k / taps / w.channels, co = k / taps % w.channels;
    const int64_t at = (tap * w.channels + co) * p.in_channels + ci;
    gradient[k] = parts[at] + parts[weights + at];
  }
  if (w.channels <= 3) {
    T* narrow = inside.output(weights);
    T* narrow_out = actual.output(outputs);
    std::copy_n(y, outputs, expected.output(outputs));
    for (int64_t k = 0; k < weights; ++k) {
      const int64_t ci = k / taps / w.channels, co = k / taps % w.channels;
      narrow[(ci * taps + k % taps) * w.channels + co] = weight[k];
    }
    cpu::narrow_conv_transpose(NarrowConvTranspose<T>{in, narrow, narrow_out, p.in_channels, w}, 0, p.samples);
  }
  // The same outputs handed to a head: as it reads them from memory.
  const LikelihoodSpec head{w.channels % 4 == 0 ? Likelihood::kCategorical : Likelihood::kBernoulli, 1.0, 4};
  const int64_t positions = w.big_height * w.big_width;
  const T* bias = inside.random(w.channels);
  const T* x = inside.random(outputs);
  cpu::head_residual(
      HeadResidual<T>{y, bias, x, nullptr, expected.output(p.samples), p.samples, positions, w.channels, head}, 0,
      p.samples);
  cpu::conv_transpose_log_prob(ConvTransposeLogProb<T>{apply, bias, x, actual.output(p.samples), head}, 0, p.samples);
  const double error = difference(actual, expected);
  CHECK(error <= 400.0 * std::numeric_limits<T>::epsilon(),
        "direct_conv_transpose %s %dx%d kernel, %d to %d channels: off by %g", type, static_cast<int>(w.kernel_height),
        static_cast<int>(w.kernel_width), static_cast<int>(p.in_channels), static_cast<int>(w.channels), error);
}

template <typename T>
void test_direct_convolutions(const char* type) {
  // channels, height, width, big_height, big_width, kernel, stride, padding, dilation; in_channels, samples
  test_direct_convolution<T>(type, {{8, 4, 4, 8, 8, 4, 4, 2, 2, 1, 1, 1, 1}, 16, 3});
  test_direct_convolution<T>(type, {{33, 3, 5, 6, 9, 3, 3, 2, 2, 1, 1, 1, 1}, 9, 2});
  test_direct_convolution<T>(type, {{20, 2, 11, 7, 20, 5, 2, 3, 2, 0, 1, 1, 1}, 37, 2});
  test_direct_convolution<T>(type, {{3, 2, 3, 5, 7, 1, 2, 3, 3, 0, 0, 1, 1}, 50, 3});  // gaps between the taps
  test_direct_convolution<T>(type, {{1, 1, 1, 4, 4, 4, 4, 1, 1, 0, 0, 1, 1}, 1, 1});   // fewer samples than tasks
  test_direct_convolution<T>(type, {{12, 3, 3, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1}, 64, 2});
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

// Byte by byte, and in ranges of one row.
void test_noise() {
  struct InRanges {
    void operator()(const SampleKeys& args) const {
      for (int64_t i = 0; i < args.samples; ++i) {
        fastvae::cpu::sample_keys(args, i, i + 1);
      }
    }
    void operator()(const KeyedNumbers& args) const {
      for (int64_t i = 0; i < args.rows; ++i) {
        fastvae::cpu::keyed_numbers(args, i, i + 1);
      }
    }
  };
  for_each_noise(false, [](int64_t samples, int64_t row_bytes, int64_t count, uint64_t first) {
    Noise found = noise_case(samples, row_bytes, count);
    fill(found, samples, row_bytes, count, first, InRanges{});
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t words = (row_bytes + 7) / 8;
      uint64_t sum = 8 * static_cast<uint64_t>(words);
      for (int64_t w = 0; w < words; ++w) {
        uint64_t word = 0;
        for (int64_t byte = std::min<int64_t>(8, row_bytes - 8 * w) - 1; byte >= 0; --byte) {
          word = word << 8 | found.bytes[static_cast<size_t>(i * row_bytes + 8 * w + byte)];
        }
        const auto number = static_cast<uint64_t>(w) + 1;
        sum += (word ^ word >> 32) * (math::mix(number * 0x9E3779B97F4A7C15) | 1);
      }
      CHECK(found.keys[static_cast<size_t>(i)] == math::mix(sum), "sample_keys: row %d of %d bytes",
            static_cast<int>(i), static_cast<int>(row_bytes));
      for (int64_t j = 0; j < count; ++j) {
        const auto place = static_cast<size_t>(i * count + j);
        const uint64_t number = first + static_cast<uint64_t>(j) + 1;
        const uint64_t bits = math::mix(found.keys[static_cast<size_t>(i)] + number * 0x9E3779B97F4A7C15);
        CHECK(found.bits[place] == bits, "keyed_numbers: bits %d of row %d", static_cast<int>(j), static_cast<int>(i));
        const double error = std::abs(found.normal[place] - math::normal(bits)) / std::abs(math::normal(bits));
        CHECK(error < 1e-14, "keyed_numbers: normal %d of row %d", static_cast<int>(j), static_cast<int>(i));
      }
    }
  });
}

}  // namespace
}  // namespace cases

int main() {
  cases::test_kernels<float>("float");
  cases::test_kernels<double>("double");
  cases::test_noise();
  cases::test_direct_convolutions<float>("float");
  cases::test_direct_convolutions<double>("double");
  return check::finish("test_kernels");
}

// The CPU kernels of the small-network flow: the trajectory against plain loops in float64, one sample at a time, and
// every gradient against differences of that.
#include "flow_cases.h"

namespace cases {
namespace {

template <Activation kind>
void apply(const ActivationSpec& spec, double a, double& h, double& slope) {
  const math::Phi<kind, double> phi(spec);
  h = phi.value(a);
  slope = phi.slope(keeps_input(kind) ? a : h);
}

void apply(const ActivationSpec& spec, double a, double& h, double& slope) {
  switch (spec.kind) {
#define CASE(KIND, ...)                         \
  case Activation::KIND:                        \
    apply<Activation::KIND>(spec, a, h, slope); \
    break;
    FASTVAE_ACTIVATION_KINDS(CASE)
#undef CASE
  }
}

// A flow of one sample, in float64.
struct Plain {
  std::vector<int64_t> widths;
  std::vector<ActivationSpec> activations;
  LikelihoodSpec likelihood;
  std::vector<double> parameters;  // for each layer: weight, then bias
  std::vector<double> z, rho, x, step, alpha;

  // The trajectory, [steps + 1, dim], [steps + 1, dim], [steps + 1].
  std::vector<double> z_steps, rho_steps, log_px_steps;

  // grad_z ll at z, and ll.
  std::vector<double> gradient(const std::vector<double>& at, double& log_px) const {
    std::vector<double> h = at;
    std::vector<std::vector<double>> slopes;
    const double* weight = parameters.data();
    for (size_t l = 0; l < activations.size(); ++l) {
      const int64_t in = widths[l], out = widths[l + 1];
      std::vector<double> next(out), slope(out);
      for (int64_t r = 0; r < out; ++r) {
        double a = weight[in * out + r];
        for (int64_t c = 0; c < in; ++c) {
          a += weight[r * in + c] * h[c];
        }
        apply(activations[l], a, next[r], slope[r]);
      }
      weight += (in + 1) * out;
      h = next;
      slopes.push_back(slope);
    }
    std::vector<double> delta(h.size());
    log_px = 0.0;
    for (size_t j = 0; j < h.size(); ++j) {
      const double scale = likelihood.scale;
      if (likelihood.kind == Likelihood::kBernoulli) {
        delta[j] = x[j] - 1.0 / (1.0 + std::exp(-h[j]));
        log_px += x[j] * h[j] - std::log1p(std::exp(h[j]));
      } else {
        delta[j] = (x[j] - h[j]) / (scale * scale);
        log_px += -0.5 * (x[j] - h[j]) * delta[j] - std::log(scale) - 0.5 * std::log(2.0 * std::acos(-1.0));
      }
    }
    for (size_t l = activations.size(); l-- > 0;) {
      const int64_t in = widths[l], out = widths[l + 1];
      weight -= (in + 1) * out;
      std::vector<double> below(in, 0.0);
      for (int64_t r = 0; r < out; ++r) {
        for (int64_t c = 0; c < in; ++c) {
          below[c] += weight[r * in + c] * delta[r] * slopes[l][r];
        }
      }
      delta = below;
    }
    return delta;
  }

  void run() {
    const size_t dim = z.size();
    std::vector<double> q = z, p = rho;
    double log_px = 0.0;
    std::vector<double> force = gradient(q, log_px);
    z_steps = q;
    rho_steps = p;
    log_px_steps = {log_px};
    for (size_t k = 0; k < alpha.size(); ++k) {
      for (size_t j = 0; j < dim; ++j) {
        p[j] += step[k * dim + j] / 2 * (force[j] - q[j]);
        q[j] += step[k * dim + j] * p[j];
      }
      force = gradient(q, log_px);
      for (size_t j = 0; j < dim; ++j) {
        p[j] = alpha[k] * (p[j] + step[k * dim + j] / 2 * (force[j] - q[j]));
      }
      z_steps.insert(z_steps.end(), q.begin(), q.end());
      rho_steps.insert(rho_steps.end(), p.begin(), p.end());
      log_px_steps.push_back(log_px);
    }
  }
};

template <typename T>
std::vector<double> part(const T* data, int64_t first, int64_t count) {
  return {data + first, data + first + count};
}

template <typename Args>
Plain plain_sample(const FlowCase& flow, const SmallNetwork<Args>& network, const Args* z, const Args* rho,
                   const Args* x, const Args* step, const Args* alpha, int64_t sample) {
  Plain plain;
  plain.widths = flow.widths;
  plain.activations = flow.activations;
  plain.likelihood = flow.likelihood;
  for (int l = 0; l < flow.depth(); ++l) {
    for (int64_t i = 0; i < network.in[l] * network.out[l]; ++i) {
      plain.parameters.push_back(network.weight[l][i]);
    }
    for (int64_t r = 0; r < network.out[l]; ++r) {
      plain.parameters.push_back(network.bias[l] == nullptr ? 0.0 : network.bias[l][r]);
    }
  }
  const int64_t dim = flow.widths[0];
  plain.z = part(z, sample * dim, dim);
  plain.rho = part(rho, sample * dim, dim);
  plain.x = part(x, sample * flow.outputs(), flow.outputs());
  plain.step = part(step, 0, flow.steps * dim);
  plain.alpha = part(alpha, 0, flow.steps);
  return plain;
}

// The largest |got - expected| / (1 + |expected|) seen.
struct Worst {
  double error = 0.0;
  void operator()(double got, double expected) {
    const double off = std::abs(got - expected) / (1.0 + std::abs(expected));
    error = off <= error ? error : (std::isnan(off) ? HUGE_VAL : off);
  }
};

template <typename T>
void test_forward(const FlowCase& flow, const char* type) {
  // Some 1,000 operations a step, each off by a rounding error, through a map whose derivative is of order one.
  const double tolerance = 400.0 * std::numeric_limits<T>::epsilon();
  Arena<T> arena;
  const SmallFlow<T> args = make_flow(flow, arena);
  fastvae::cpu::small_flow(args, 0, flow_blocks<T>(flow));
  Worst worst;
  for (int64_t sample = 0; sample < flow.samples; ++sample) {
    Plain plain = plain_sample(flow, args.network, args.z, args.rho, args.x, args.step, args.alpha, sample);
    plain.run();
    for (int64_t k = 0; k <= flow.steps; ++k) {
      for (int64_t j = 0; j < args.dim; ++j) {
        const int64_t i = (k * flow.samples + sample) * args.dim + j;
        worst(args.z_steps[i], plain.z_steps[k * args.dim + j]);
        worst(args.rho_steps[i], plain.rho_steps[k * args.dim + j]);
      }
      if (args.log_px_steps != nullptr) {
        worst(args.log_px_steps[k * flow.samples + sample], plain.log_px_steps[k]);
      }
    }
    worst(args.log_px[sample], plain.log_px_steps.back());
  }
  CHECK(worst.error <= tolerance, "small_flow %s %s: off by %g", flow.name.c_str(), type, worst.error);
}

// The trajectory as make_flow draws it, since the arguments of the gradient no longer hold its start.
template <typename T>
std::vector<Plain> plain_samples(const FlowCase& flow) {
  Arena<T> arena;
  const SmallFlow<T> args = make_flow(flow, arena);
  std::vector<Plain> samples;
  for (int64_t sample = 0; sample < flow.samples; ++sample) {
    samples.push_back(plain_sample(flow, args.network, args.z, args.rho, args.x, args.step, args.alpha, sample));
  }
  return samples;
}

template <typename T>
void test_backward(const FlowCase& flow, const char* type) {
  // The differences themselves are good to 1e-8 (h^2 times a third derivative, rounding over h).
  const double tolerance = std::max(1e-7, 400.0 * std::numeric_limits<T>::epsilon());
  Arena<T> arena;
  const SmallFlowBackward<T> args = make_flow_backward_on_cpu(flow, arena);
  fastvae::cpu::small_flow_backward(args, 0, args.tasks);
  const int64_t dim = args.dim;
  const int64_t parameters = small_flow_parameter_numel(args.network);
  std::vector<double> grad_parameters(parameters, 0.0);
  Worst worst;
  int64_t sample = 0;
  for (Plain& plain : plain_samples<T>(flow)) {
    const auto objective = [&] {
      plain.run();
      double sum = static_cast<double>(args.grad_log_px[sample]) * plain.log_px_steps.back();
      for (int64_t j = 0; j < dim; ++j) {
        const int64_t i = sample * dim + j;
        sum += (args.grad_z_in == nullptr ? 0.0 : args.grad_z_in[i]) * plain.z_steps[flow.steps * dim + j];
        sum += (args.grad_rho_in == nullptr ? 0.0 : args.grad_rho_in[i]) * plain.rho_steps[flow.steps * dim + j];
      }
      return sum;
    };
    const auto slope = [&](double& number) {
      constexpr double kStep = 1e-5;
      const double centre = number;
      number = centre + kStep;
      const double up = objective();
      number = centre - kStep;
      const double down = objective();
      number = centre;
      return (up - down) / (2 * kStep);
    };
    for (int64_t j = 0; j < dim; ++j) {
      worst(args.grad_z[sample * dim + j], slope(plain.z[j]));
      worst(args.grad_rho[sample * dim + j], slope(plain.rho[j]));
    }
    for (int64_t j = 0; args.grad_x != nullptr && j < flow.outputs(); ++j) {
      worst(args.grad_x[sample * flow.outputs() + j], slope(plain.x[j]));
    }
    for (int64_t k = 0; args.step_terms != nullptr && k < flow.steps; ++k) {
      for (int64_t j = 0; j < dim; ++j) {
        worst(args.step_terms[(k * flow.samples + sample) * dim + j], slope(plain.step[k * dim + j]));
      }
      worst(args.alpha_terms[k * flow.samples + sample], slope(plain.alpha[k]));
    }
    for (int64_t i = 0; args.grad_parameters != nullptr && i < parameters; ++i) {
      grad_parameters[i] += slope(plain.parameters[i]);
    }
    ++sample;
  }
  for (int64_t i = 0; args.grad_parameters != nullptr && i < parameters; ++i) {
    double sum = 0.0;
    for (int64_t task = 0; task < args.tasks; ++task) {
      sum += args.grad_parameters[task * parameters + i];
    }
    worst(sum, grad_parameters[i]);
  }
  CHECK(worst.error <= tolerance, "small_flow_backward %s %s: off by %g", flow.name.c_str(), type, worst.error);
}

// Done in parts, in whatever order, a kernel gives the same bits; an empty part writes nothing.
template <typename T, typename Make>
void test_parts(const char* kernel, const FlowCase& flow, const char* type, int64_t count, Make make) {
  Arena<T> whole, parts, untouched, before;
  cpu_kernel(make(flow, whole), 0, count);
  const auto args = make(flow, parts);
  for (int64_t i = count; i-- > 0;) {
    cpu_kernel(args, i, i + 1);
  }
  CHECK(same_bits(whole, parts), "%s %s %s: in parts it gives other bits", kernel, flow.name.c_str(), type);
  make(flow, before);
  cpu_kernel(make(flow, untouched), count / 2, count / 2);
  CHECK(same_bits(untouched, before), "%s %s %s: an empty range writes", kernel, flow.name.c_str(), type);
}

template <typename T>
void test_flows(const char* type) {
  for (const FlowCase& flow : flow_cases()) {
    test_forward<T>(flow, type);
    test_backward<T>(flow, type);
    test_parts<T>("small_flow", flow, type, flow_blocks<T>(flow), make_flow<T>);
    test_parts<T>("small_flow_backward", flow, type, std::min(flow.tasks, flow_blocks<T>(flow)),
                  make_flow_backward_on_cpu<T>);
  }
}

}  // namespace
}  // namespace cases

int main() {
  cases::test_flows<float>("float");
  cases::test_flows<double>("double");
  return check::finish("test_small_flow");
}

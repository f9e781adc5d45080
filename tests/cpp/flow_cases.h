// Arguments of the small-network flow and of its gradient, as cases.h makes those of the other kernels: every
// activation and head, with and without biases, numbers of samples that leave lanes empty, widths that no vector
// divides.
#pragma once

#include <algorithm>

#include "cases.h"

namespace cases {

struct FlowCase {
  std::string name;
  std::vector<int64_t> widths;  // latent variables, hidden layers, outputs
  std::vector<ActivationSpec> activations;
  LikelihoodSpec likelihood;
  int64_t samples;
  int64_t steps;
  int64_t tasks;
  bool biased = true;
  bool every = true;  // every output and gradient that may be left out; without: only what may not

  int depth() const { return static_cast<int>(activations.size()); }
  int64_t outputs() const { return widths.back(); }
};

inline std::vector<FlowCase> flow_cases() {
  const LikelihoodSpec bernoulli{Likelihood::kBernoulli};
  const LikelihoodSpec gaussian{Likelihood::kGaussian, 0.7};
  const ActivationSpec linear{Activation::kIdentity};
  const ActivationSpec tanh{Activation::kTanh};
  const ActivationSpec silu{Activation::kSilu};
  std::vector<FlowCase> all;
  for (const ActivationSpec& activation : activations()) {
    const std::string name = "activation " + std::to_string(static_cast<int>(activation.kind));
    all.push_back({name, {3, 7, 5, 6}, {activation, activation, linear}, bernoulli, 5, 1, 2});
  }
  all.push_back({"gaussian", {3, 7, 5, 6}, {tanh, silu, linear}, gaussian, 5, 3, 1});
  all.push_back({"one layer", {7, 3}, {linear}, bernoulli, 3, 2, 1});
  all.push_back({"one layer, gaussian", {2, 9}, {linear}, gaussian, 17, 1, 3});
  all.push_back({"one number", {1, 1}, {linear}, bernoulli, 1, 1, 1});
  all.push_back({"wide", {2, 41, 70}, {tanh, linear}, bernoulli, 3, 1, 1});
  all.push_back({"many latent variables", {67, 4, 3}, {silu, linear}, gaussian, 2, 2, 1});
  all.push_back({"eight layers",
                 {2, 3, 4, 3, 2, 3, 4, 3, 2},
                 {tanh, silu, tanh, examples(Activation::kRelu)[0], silu, examples(Activation::kElu)[0], tanh, linear},
                 bernoulli,
                 19,
                 2,
                 2});
  all.push_back({"no bias", {3, 5, 4}, {tanh, linear}, gaussian, 6, 2, 1, false});
  all.push_back({"the least", {3, 5, 4}, {silu, linear}, bernoulli, 6, 2, 1, true, false});
  return all;
}

template <typename T>
int64_t flow_blocks(const FlowCase& flow) {
  return (flow.samples + kSmallFlowLanes<T> - 1) / kSmallFlowLanes<T>;
}

template <typename T>
SmallNetwork<T> make_network(const FlowCase& flow, Arena<T>& arena) {
  SmallNetwork<T> network{};
  network.depth = flow.depth();
  network.likelihood = flow.likelihood;
  for (int l = 0; l < flow.depth(); ++l) {
    network.in[l] = flow.widths[l];
    network.out[l] = flow.widths[l + 1];
    network.activation[l] = flow.activations[l];
    const double width = 1.7 / std::sqrt(static_cast<double>(flow.widths[l]));
    network.weight[l] = arena.random(network.in[l] * network.out[l], -width, width);
    network.bias[l] = flow.biased ? arena.random(network.out[l], -0.5, 0.5) : nullptr;
  }
  return network;
}

template <typename T>
SmallFlow<T> make_flow(const FlowCase& flow, Arena<T>& arena) {
  const int64_t dim = flow.widths[0];
  const int64_t of_steps = (flow.steps + 1) * flow.samples;
  SmallFlow<T> args{};
  args.network = make_network(flow, arena);
  args.z = arena.random(flow.samples * dim);
  args.rho = arena.random(flow.samples * dim);
  args.x = arena.random(flow.samples * flow.outputs(), 0.0, 1.0);
  args.step = arena.random(flow.steps * dim, 0.05, 0.3);
  args.alpha = arena.random(flow.steps, 0.7, 1.0);
  args.z_steps = arena.output(of_steps * dim);
  args.rho_steps = arena.output(of_steps * dim);
  args.log_px = arena.output(flow.samples);
  args.log_px_steps = flow.every ? arena.output(of_steps) : nullptr;
  args.tape = arena.scratch(flow_blocks<T>(flow) * (flow.steps + 1) * small_point_layout(args.network, dim).numel *
                            kSmallFlowLanes<T>);
  args.samples = flow.samples;
  args.dim = dim;
  args.steps = flow.steps;
  return args;
}

// With the tape that the forward kernel leaves, whose order within a part is each device's own.
template <typename T, typename Forward>
SmallFlowBackward<T> make_flow_backward(const FlowCase& flow, Arena<T>& arena, const Forward& run) {
  const SmallFlow<T> forward = make_flow(flow, arena);
  run(forward);
  const int64_t size = flow.samples * forward.dim;
  SmallFlowBackward<T> args{};
  args.network = forward.network;
  args.x = forward.x;
  args.step = forward.step;
  args.alpha = forward.alpha;
  args.tape = forward.tape;
  args.grad_z_in = flow.every ? arena.random(size) : nullptr;
  args.grad_rho_in = flow.every ? arena.random(size) : nullptr;
  args.grad_log_px = arena.random(flow.samples);
  args.grad_z = arena.output(size);
  args.grad_rho = arena.output(size);
  args.samples = flow.samples;
  args.dim = forward.dim;
  args.steps = flow.steps;
  args.tasks = std::min(flow.tasks, flow_blocks<T>(flow));
  args.tangents = arena.scratch(args.tasks * (flow.steps + 1) * small_tangent_layout(args.network, args.dim).numel *
                                kSmallFlowLanes<T>);
  if (flow.every) {
    args.grad_x = arena.output(flow.samples * flow.outputs());
    args.step_terms = arena.output(flow.steps * size);
    args.alpha_terms = arena.output(flow.steps * flow.samples);
    args.grad_parameters = arena.output(args.tasks * small_flow_parameter_numel(args.network));
  }
  return args;
}

template <typename T>
SmallFlowBackward<T> make_flow_backward_on_cpu(const FlowCase& flow, Arena<T>& arena) {
  return make_flow_backward(flow, arena,
                            [&](const SmallFlow<T>& forward) { cpu_kernel(forward, 0, flow_blocks<T>(flow)); });
}

}  // namespace cases

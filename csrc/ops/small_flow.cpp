// The route of hamiltonian_flow for networks whose weights fit in a core's cache, or in the shared memory of a GPU's
// blocks: one kernel for the whole trajectory.

#include <algorithm>

#include "../common/aten.h"
#include "../common/launch.h"
#include "flow.h"

namespace fastvae {
namespace {

// Half a megabyte of L2 is the least that today's cores have; activations and tape need the other half.
constexpr int64_t kSmallWeightBytes = 256 * 1024;

template <typename T>
SmallNetwork<T> bind(const Program& program, const LikelihoodSpec& likelihood,
                     const std::vector<at::Tensor>& parameters) {
  SmallNetwork<T> network{};
  network.depth = static_cast<int>(program.stages.size());
  network.likelihood = likelihood;
  for (int l = 0; l < network.depth; ++l) {
    const Stage& stage = program.stages[l];
    network.weight[l] = parameters.empty() ? nullptr : parameters[stage.weight].const_data_ptr<T>();
    network.bias[l] = parameters.empty() || stage.bias < 0 ? nullptr : parameters[stage.bias].const_data_ptr<T>();
    network.in[l] = stage.in.channels;
    network.out[l] = stage.out.channels;
    network.activation[l] = stage.activation;
  }
  return network;
}

std::vector<at::Tensor> dense(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    result.push_back(tensor.contiguous());
  }
  return result;
}

int64_t lanes_of(int64_t element_size) {
  return element_size == sizeof(float) ? kSmallFlowLanes<float> : kSmallFlowLanes<double>;
}

// Parts of the parameters' gradients on a GPU: about two a multiprocessor of the largest.
constexpr int64_t kCudaTasks = 256;

bool fits_cuda([[maybe_unused]] const Program& program, [[maybe_unused]] int64_t dim,
               [[maybe_unused]] int64_t element_size, [[maybe_unused]] at::Device device) {
#ifdef FASTVAE_HAS_CUDA_KERNELS
  return element_size == sizeof(float) ? cuda::small_flow_fits(bind<float>(program, {}, {}), dim, device.index())
                                       : cuda::small_flow_fits(bind<double>(program, {}, {}), dim, device.index());
#else
  return false;
#endif
}

// [tasks, all parameters] of a CPU, added to the gradients.
template <typename T>
void sum_tasks(const Program& program, const SmallFlowBackward<T>& args, const std::vector<at::Tensor>& gradients) {
  const T* first = args.grad_parameters;
  const int64_t numel = small_flow_parameter_numel(args.network);
  const auto take = [&](int64_t index, int64_t count) {
    if (index >= 0 && gradients[index].defined()) {
      T* gradient = gradients[index].template mutable_data_ptr<T>();
      for (int64_t task = 0; task < args.tasks; ++task) {
        for (int64_t i = 0; i < count; ++i) {
          gradient[i] += first[task * numel + i];
        }
      }
    }
    first += count;
  };
  for (const Stage& stage : program.stages) {
    take(stage.weight, stage.out.channels * stage.in.channels);
    take(stage.bias, stage.out.channels);
  }
}

// The tape as a GPU's kernels read it, 16 bytes at a time: whoever kept it may hand back a view at any number.
at::Tensor aligned(const at::Tensor& tape) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(tape.const_data_ptr()) % 16 == 0;
  return is_aligned || !runs_cuda(tape) ? tape : tape.clone();
}

// out [K, n] = the sum of terms [K, B, n] over the samples. On a CPU without an ATen call, which would cost as much as
// a step.
template <typename T>
void sum_samples(const at::Tensor& terms, const at::Tensor& out) {
  if (runs_cuda(terms)) {
    aten::sum_out(out, terms, /*dim=*/1);
    return;
  }
  const int64_t steps = terms.size(0), samples = terms.size(1), width = terms.size(2);
  const T* term = terms.const_data_ptr<T>();
  T* total = out.mutable_data_ptr<T>();
  std::fill_n(total, steps * width, T(0));
  for (int64_t k = 0; k < steps; ++k, total += width) {
    for (int64_t b = 0; b < samples; ++b, term += width) {
      for (int64_t j = 0; j < width; ++j) {
        total[j] += term[j];
      }
    }
  }
}

#ifdef FASTVAE_HAS_CUDA_KERNELS
template <typename T>
SmallFlowSum<T> sum_of(const Program& program, const SmallFlowBackward<T>& args,
                       const std::vector<at::Tensor>& gradients) {
  SmallFlowSum<T> sum{};
  sum.grad_parameters = args.grad_parameters;
  sum.tasks = args.tasks;
  sum.depth = args.network.depth;
  const auto gradient = [&](int64_t index) { return index < 0 ? nullptr : mutable_data_or_null<T>(gradients[index]); };
  for (int l = 0; l < sum.depth; ++l) {
    sum.in[l] = args.network.in[l];
    sum.out[l] = args.network.out[l];
    sum.weight[l] = gradient(program.stages[l].weight);
    sum.bias[l] = gradient(program.stages[l].bias);
  }
  return sum;
}
#endif

}  // namespace

bool takes_small_flow(const Program& program, const LikelihoodSpec& likelihood, int64_t dim, int64_t element_size,
                      at::Device device) {
  if (likelihood.kind == Likelihood::kCategorical || program.stages.size() > kSmallFlowDepth) {
    return false;
  }
  int64_t weights = 0;
  for (const Stage& stage : program.stages) {
    if (stage.affine != Affine::kLinear || stage.normed) {
      return false;
    }
    weights += stage.in.channels * stage.out.channels;
  }
  if (program.stages.back().activation.kind != Activation::kIdentity) {
    return false;
  }
  return runs_cuda(device) ? fits_cuda(program, dim, element_size, device)
                           : weights * element_size <= kSmallWeightBytes;
}

StashShape small_flow_stash(const Program& program, int64_t dim, int64_t element_size) {
  return {small_point_layout(bind<float>(program, {}, {}), dim).numel, lanes_of(element_size)};
}

void run_small_flow(const Flow& flow, const FlowPath& path) {
  FASTVAE_DISPATCH(flow.z, {
    const std::vector<at::Tensor> parameters = dense(flow.parameters);
    SmallFlow<scalar_t> args{};
    args.network = bind<scalar_t>(*flow.program, flow.likelihood, parameters);
    args.z = flow.z.const_data_ptr<scalar_t>();
    args.rho = flow.rho.const_data_ptr<scalar_t>();
    args.x = flow.x.const_data_ptr<scalar_t>();
    args.step = flow.step_size.const_data_ptr<scalar_t>();
    args.alpha = flow.alpha.const_data_ptr<scalar_t>();
    args.z_steps = path.z_steps.mutable_data_ptr<scalar_t>();
    args.rho_steps = path.rho_steps.mutable_data_ptr<scalar_t>();
    args.log_px = path.log_px.mutable_data_ptr<scalar_t>();
    args.log_px_steps = path.log_px_steps.size(0) > 0 ? path.log_px_steps.mutable_data_ptr<scalar_t>() : nullptr;
    args.tape = path.stash.mutable_data_ptr<scalar_t>();
    args.samples = flow.samples;
    args.dim = flow.dim;
    args.steps = flow.steps;
    const int64_t lanes = kSmallFlowLanes<scalar_t>;
    FASTVAE_LAUNCH(small_flow, flow.z.device(), args, (args.samples + lanes - 1) / lanes, kGrain);
  });
}

void run_small_flow_backward(const Flow& flow, const FlowPath& path, const FlowCotangents& cotangents,
                             FlowResult& out) {
  const at::TensorOptions options = flow.z.options();
  const int64_t K = flow.steps, B = flow.samples, d = flow.dim;
  if (out.wants_x) {
    out.x = aten::empty(flow.x.sizes(), options);
  }
  const at::Tensor step_terms = out.step_size.defined() ? aten::empty({K, B, d}, options) : at::Tensor();
  const at::Tensor alpha_terms = out.alpha.defined() ? aten::empty({K, B, 1}, options) : at::Tensor();
  const at::Tensor tape = aligned(path.stash);
  FASTVAE_DISPATCH(flow.z, {
    const std::vector<at::Tensor> parameters = dense(flow.parameters);
    SmallFlowBackward<scalar_t> args{};
    args.network = bind<scalar_t>(*flow.program, flow.likelihood, parameters);
    args.x = flow.x.const_data_ptr<scalar_t>();
    args.step = flow.step_size.const_data_ptr<scalar_t>();
    args.alpha = flow.alpha.const_data_ptr<scalar_t>();
    args.tape = tape.const_data_ptr<scalar_t>();
    args.grad_z_in = data_or_null<scalar_t>(cotangents.z);
    args.grad_rho_in = data_or_null<scalar_t>(cotangents.rho);
    args.grad_log_px = data_or_null<scalar_t>(cotangents.log_px);
    args.grad_z = out.z.mutable_data_ptr<scalar_t>();
    args.grad_rho = out.rho.mutable_data_ptr<scalar_t>();
    args.grad_x = mutable_data_or_null<scalar_t>(out.x);
    args.step_terms = mutable_data_or_null<scalar_t>(step_terms);
    args.alpha_terms = mutable_data_or_null<scalar_t>(alpha_terms);
    args.samples = B;
    args.dim = d;
    args.steps = K;
    const int64_t lanes = kSmallFlowLanes<scalar_t>;
    const bool on_cpu = !runs_cuda(flow.z);
    args.tasks = std::min<int64_t>((B + lanes - 1) / lanes, on_cpu ? int64_t{at::get_num_threads()} : kCudaTasks);
    at::Tensor partial, tangents;
    const bool wants_parameters = out.wants_parameters();
    if (wants_parameters) {
      partial = aten::empty({args.tasks, small_flow_parameter_numel(args.network)}, options);
      args.grad_parameters = partial.mutable_data_ptr<scalar_t>();
    }
    if (!on_cpu) {
      const int64_t numel = small_tangent_layout(args.network, args.dim).numel;
      tangents = aten::empty({args.tasks * (args.steps + 1) * numel * lanes}, options);
      args.tangents = tangents.mutable_data_ptr<scalar_t>();
    }
    FASTVAE_LAUNCH(small_flow_backward, flow.z.device(), args, args.tasks, kGrain);
    if (step_terms.defined()) {
      sum_samples<scalar_t>(step_terms, out.step_size);
    }
    if (alpha_terms.defined()) {
      sum_samples<scalar_t>(alpha_terms, out.alpha.view({K, 1}));
    }
    if (!wants_parameters) {
      return;
    }
    if (on_cpu) {
      sum_tasks(*flow.program, args, out.parameters);
    }
#ifdef FASTVAE_HAS_CUDA_KERNELS
    else {
      cuda::small_flow_sum(sum_of(*flow.program, args, out.parameters), current_stream(flow.z.device()));
    }
#endif
  });
}

}  // namespace fastvae

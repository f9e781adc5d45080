#include "small_flow.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "../common/launch.h"

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

int64_t lanes_of(int64_t element_size) {
  return element_size == sizeof(float) ? kSmallFlowLanes<float> : kSmallFlowLanes<double>;
}

// Parts of the parameters' gradients on a GPU: about two a multiprocessor of the largest.
constexpr int64_t kCudaTasks = 256;

bool fits_cuda([[maybe_unused]] const Program& program, [[maybe_unused]] int64_t dim,
               [[maybe_unused]] int64_t element_size, [[maybe_unused]] at::Device device) {
#ifdef FASTVAE_WITH_CUDA
  return element_size == sizeof(float) ? cuda::small_flow_fits(bind<float>(program, {}, {}), dim, device.index())
                                       : cuda::small_flow_fits(bind<double>(program, {}, {}), dim, device.index());
#else
  return false;
#endif
}

// [tasks, all parameters] of a CPU to one dense gradient each.
template <typename T>
void take_gradients(const Program& program, const SmallFlowBackward<T>& args, std::vector<at::Tensor>& gradients) {
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

#ifdef FASTVAE_WITH_CUDA
template <typename T>
SmallFlowSum<T> sum_of(const Program& program, const SmallFlowBackward<T>& args, std::vector<at::Tensor>& gradients) {
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
    if (stage.affine != Affine::kLinear) {
      return false;
    }
    weights += stage.in.channels * stage.out.channels;
  }
  if (program.stages.back().activation.kind != Activation::kIdentity) {
    return false;
  }
  return device.is_cpu() ? weights * element_size <= kSmallWeightBytes : fits_cuda(program, dim, element_size, device);
}

StashShape small_flow_stash(const Program& program, int64_t dim, int64_t element_size) {
  return {small_point_layout(bind<float>(program, {}, {}), dim).numel, lanes_of(element_size)};
}

void run_small_flow(const Program& program, const LikelihoodSpec& likelihood, const SmallFlowTensors& in,
                    const at::Tensor& z_steps, const at::Tensor& rho_steps, const at::Tensor& log_px,
                    const at::Tensor& log_px_steps, const at::Tensor& stash) {
  FASTVAE_DISPATCH(in.z, {
    SmallFlow<scalar_t> args{};
    args.network = bind<scalar_t>(program, likelihood, in.parameters);
    args.z = in.z.const_data_ptr<scalar_t>();
    args.rho = in.rho.const_data_ptr<scalar_t>();
    args.x = in.x.const_data_ptr<scalar_t>();
    args.step = in.step_size.const_data_ptr<scalar_t>();
    args.alpha = in.alpha.const_data_ptr<scalar_t>();
    args.z_steps = z_steps.mutable_data_ptr<scalar_t>();
    args.rho_steps = rho_steps.mutable_data_ptr<scalar_t>();
    args.log_px = log_px.mutable_data_ptr<scalar_t>();
    args.log_px_steps = log_px_steps.size(0) > 0 ? log_px_steps.mutable_data_ptr<scalar_t>() : nullptr;
    args.tape = stash.mutable_data_ptr<scalar_t>();
    args.samples = in.z.size(0);
    args.dim = in.z.size(1);
    args.steps = in.alpha.size(0);
    const int64_t lanes = kSmallFlowLanes<scalar_t>;
    FASTVAE_LAUNCH(small_flow, in.z.device(), args, (args.samples + lanes - 1) / lanes, kGrain);
  });
}

void run_small_flow_backward(const Program& program, const LikelihoodSpec& likelihood, const SmallFlowTensors& in,
                             const at::Tensor& stash, const at::Tensor& cotangent_z, const at::Tensor& cotangent_rho,
                             const at::Tensor& cotangent_log_px, const at::Tensor& grad_z, const at::Tensor& grad_rho,
                             const at::Tensor& grad_x, const at::Tensor& step_terms, const at::Tensor& alpha_terms,
                             std::vector<at::Tensor>& gradients) {
  FASTVAE_DISPATCH(in.z, {
    SmallFlowBackward<scalar_t> args{};
    args.network = bind<scalar_t>(program, likelihood, in.parameters);
    args.x = in.x.const_data_ptr<scalar_t>();
    args.step = in.step_size.const_data_ptr<scalar_t>();
    args.alpha = in.alpha.const_data_ptr<scalar_t>();
    args.tape = stash.const_data_ptr<scalar_t>();
    args.grad_z_in = data_or_null<scalar_t>(cotangent_z);
    args.grad_rho_in = data_or_null<scalar_t>(cotangent_rho);
    args.grad_log_px = data_or_null<scalar_t>(cotangent_log_px);
    args.grad_z = grad_z.mutable_data_ptr<scalar_t>();
    args.grad_rho = grad_rho.mutable_data_ptr<scalar_t>();
    args.grad_x = mutable_data_or_null<scalar_t>(grad_x);
    args.step_terms = mutable_data_or_null<scalar_t>(step_terms);
    args.alpha_terms = mutable_data_or_null<scalar_t>(alpha_terms);
    args.samples = in.z.size(0);
    args.dim = in.z.size(1);
    args.steps = in.alpha.size(0);
    const int64_t lanes = kSmallFlowLanes<scalar_t>;
    const bool on_cpu = in.z.is_cpu();
    args.tasks =
        std::min<int64_t>((args.samples + lanes - 1) / lanes, on_cpu ? int64_t{at::get_num_threads()} : kCudaTasks);
    at::Tensor partial, tangents;
    const bool wants_parameters =
        std::any_of(gradients.begin(), gradients.end(), [](const at::Tensor& g) { return g.defined(); });
    if (wants_parameters) {
      partial = at::empty({args.tasks, small_flow_parameter_numel(args.network)}, in.z.options());
      args.grad_parameters = partial.mutable_data_ptr<scalar_t>();
    }
    if (!on_cpu) {
      const int64_t numel = small_tangent_layout(args.network, args.dim).numel;
      tangents = at::empty({args.tasks * (args.steps + 1) * numel * lanes}, in.z.options());
      args.tangents = tangents.mutable_data_ptr<scalar_t>();
    }
    FASTVAE_LAUNCH(small_flow_backward, in.z.device(), args, args.tasks, kGrain);
    if (!wants_parameters) {
      return;
    }
    if (on_cpu) {
      take_gradients(program, args, gradients);
    }
#ifdef FASTVAE_WITH_CUDA
    else {
      cuda::small_flow_sum(sum_of(program, args, gradients),
                           c10::cuda::getCurrentCUDAStream(in.z.get_device()).stream());
    }
#endif
  });
}

}  // namespace fastvae

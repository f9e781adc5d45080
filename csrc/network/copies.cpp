#include "copies.h"

#include <cmath>
#include <limits>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/product.h"
#include "affine.h"

namespace fastvae {
namespace {

constexpr const char* kOp = "network_copies";

bool is_plain(const Stage& stage) { return stage.activation.kind == Activation::kIdentity; }

bool only_moves(const Stage& stage) {
  return stage.affine == Affine::kIdentity || stage.affine == Affine::kToImage || stage.affine == Affine::kToFlat;
}

bool has_parameters(const Stage& stage) { return stage.weight >= 0 || stage.bias >= 0; }

// One position, which sees the whole input: channel last, the order of its window is that of the input.
bool sees_all(const Stage& stage, const ConvolutionWindow& window) {
  return stage.out.positions() == 1 && window.kernel_height == window.big_height &&
         window.kernel_width == window.big_width && window.padding_height == 0 && window.padding_width == 0 &&
         (window.dilation_height == 1 || window.kernel_height == 1) &&
         (window.dilation_width == 1 || window.kernel_width == 1);
}

at::Tensor for_each_sample(const at::Tensor& tensor, int64_t samples) {
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes.insert(sizes.begin(), samples);
  return aten::empty(sizes, tensor.options())
      .copy_(tensor);  // a dense expansion to one sample would be the tensor itself
}

}  // namespace

NetworkCopies::NetworkCopies(const std::string& network, const std::vector<at::Tensor>& parameters, const at::Tensor& x,
                             const AdamSettings& settings, int64_t steps)
    : settings_(settings), max_steps_(steps), tensors_(parameters.size()) {
  const EntryGuard guard(kOp, x);
  check_floating(kOp, "x", x);
  FASTVAE_CHECK_VALUE(x.dim() == 2 && x.size(0) > 0 && x.size(1) > 0, kOp, "x", "shape [B, n] with B, n > 0",
                      describe(x));
  // Rows count the steps that they have seen in 32 bits.
  FASTVAE_CHECK_VALUE(steps > 0 && steps <= std::numeric_limits<int32_t>::max(), kOp, "steps", "1 to 2147483647",
                      steps);
  for (const at::Tensor& parameter : parameters) {
    check_like(kOp, "parameters", parameter, x, "x");
  }
  samples_ = x.size(0);
  // Of the likelihoods, only the categorical one asks something of a network.
  program_ = find_program(kOp, network, parameters, x.size(1), {}, Norms::kApart);
  check_room(kOp, "x", *program_, samples_);
  layers_.resize(depth());
  rates_ = aten::empty({steps, 2}, at::TensorOptions().dtype(at::kDouble));
  for (int64_t step = 0; step < steps; ++step) {
    const math::AdamRate<double> of_step = rate(step);
    rates_.mutable_data_ptr<double>()[2 * step] = of_step.step;
    rates_.mutable_data_ptr<double>()[2 * step + 1] = of_step.inverse_root;
  }
  rates_ = rates_.to(x.options());
  taken_ = aten::zeros({1}, x.options().dtype(at::kInt));
  first_ = depth();
  for (size_t l = depth(); l-- > 0;) {
    first_ = has_parameters(stage(l)) ? l : first_;
  }
  FASTVAE_CHECK_VALUE(first_ < depth(), kOp, "network", "a layer with parameters", "'" + network + "'");
  input_ = x.contiguous().view({-1});
  for (size_t l = 0; l < depth(); ++l) {
    prepare(l, parameters, x.options());
  }
  for (size_t l = 0; l < first_; ++l) {
    activate(l, affine(l));
    input_ = layers_[l].h;
  }
  if (layers_[first_].columns.defined()) {
    unfold(first_);
  }
}

math::AdamRate<double> NetworkCopies::rate(int64_t step) const {
  const auto taken = static_cast<double>(step + 1);
  return {settings_.lr / (1.0 - std::pow(settings_.beta1, taken)),
          1.0 / std::sqrt(1.0 - std::pow(settings_.beta2, taken))};
}

template <typename T>
math::Adam<T> NetworkCopies::adam() const {
  return {T(1.0 - settings_.beta1), T(settings_.beta2), T(1.0 - settings_.beta2), T(settings_.eps), T(settings_.decay)};
}

void NetworkCopies::prepare(size_t l, const std::vector<at::Tensor>& parameters, const at::TensorOptions& options) {
  const Stage& stage = this->stage(l);
  Layer& layer = layers_[l];
  const auto room = [&](const SampleShape& shape) { return aten::empty({samples_ * shape.numel()}, options); };
  const auto trained = [&](const at::Tensor& value, bool stores_gradient) {
    const at::Tensor own = for_each_sample(value, samples_);
    return Trained{own, aten::zeros_like(own), aten::zeros_like(own),
                   stores_gradient ? aten::zeros_like(own) : at::Tensor()};
  };
  layer.a = room(stage.out);
  layer.h = keeps_input(stage.activation.kind) ? room(stage.out) : layer.a;
  layer.delta = room(stage.out);
  layer.grad_in = l > first_ ? room(stage.in) : at::Tensor();
  switch (stage.affine) {
    case Affine::kIdentity:
    case Affine::kToImage:
    case Affine::kToFlat:
      return;
    case Affine::kBatchNorm: {
      const at::Tensor one = aten::ones({stage.in.channels}, options);
      layer.mean = parameters[stage.running_mean].contiguous();
      layer.rstd = parameters[stage.running_var].add(stage.eps).rsqrt();
      // Where there is no weight or no bias, its place keeps 1 or 0.
      const at::Tensor weight = stage.weight >= 0 ? parameters[stage.weight] : one;
      const at::Tensor bias = stage.bias >= 0 ? parameters[stage.bias] : aten::zeros_like(one);
      const at::Tensor value = aten::stack({for_each_sample(weight, samples_), for_each_sample(bias, samples_)});
      layer.weight = {value, aten::zeros_like(value), aten::zeros_like(value), aten::zeros_like(value)};
      return;
    }
    case Affine::kLinear:
      layer.dense = true;
      break;
    default: {
      FASTVAE_CHECK_VALUE(stage.affine == Affine::kConv2d && stage.groups == 1, kOp, "network",
                          "linear, conv2d of one group, batch_norm, reshape and activations", "another layer");
      const at::Tensor& weight = parameters[stage.weight];
      layer.window = {stage.in.channels, stage.out.height,  stage.out.width,  stage.in.height, stage.in.width,
                      weight.size(2),    weight.size(3),    stage.stride[0],  stage.stride[1], stage.padding[0],
                      stage.padding[1],  stage.dilation[0], stage.dilation[1]};
      layer.dense = sees_all(stage, layer.window);
    }
  }
  // [out, in] or [out, C, kh, kw] to [kh kw C, out].
  const at::Tensor& weight = parameters[stage.weight];
  at::Tensor value = (weight.dim() == 2 ? weight.t() : weight.permute({2, 3, 1, 0})).reshape({-1, weight.size(0)});
  if (layer.dense) {
    if (stage.bias >= 0) {
      value = aten::cat({value, parameters[stage.bias].unsqueeze(0)});
    }
    layer.seen = aten::zeros({samples_, value.size(0)}, options.dtype(at::kInt));
    // Where the input's own slope is zero at zero, nobody reads the gradient to it.
    size_t below = l;
    while (below > first_ && is_plain(this->stage(below - 1)) && only_moves(this->stage(below - 1))) {
      --below;
    }
    layer.flat_at_zero = below > first_ && this->stage(below - 1).activation.kind == Activation::kRelu;
  } else {
    layer.columns = aten::empty({samples_, stage.out.positions(), value.size(0)}, options);
    layer.grad_columns = l > first_ ? aten::empty_like(layer.columns) : at::Tensor();
    if (stage.bias >= 0) {
      layer.bias = trained(parameters[stage.bias].unsqueeze(0), true);
    }
  }
  layer.weight = trained(value, !layer.dense);
}

template <typename T>
CopiedRows<T> NetworkCopies::rows(const Layer& layer, const Stage& stage) const {
  return {layer.weight.value.mutable_data_ptr<T>(),
          layer.weight.mean.mutable_data_ptr<T>(),
          layer.weight.square.mutable_data_ptr<T>(),
          layer.seen.mutable_data_ptr<int32_t>(),
          samples_,
          stage.in.numel(),
          stage.out.numel(),
          stage.bias >= 0 ? 1 : 0,
          taken_.const_data_ptr<int32_t>(),
          reinterpret_cast<const math::AdamRate<T>*>(rates_.const_data_ptr<T>()),
          adam<T>()};
}

void NetworkCopies::unfold(size_t l) {
  const Layer& layer = layers_[l];
  FASTVAE_DISPATCH(input_, {
    const Unfold<scalar_t> args{input(l).const_data_ptr<scalar_t>(), layer.columns.mutable_data_ptr<scalar_t>(),
                                layer.window, samples_};
    FASTVAE_LAUNCH(unfold, input_.device(), args, samples_, layer.columns.stride(0));
  });
}

// Room in which the blocks of a GPU sum over the rows of a dense layer.
at::Tensor NetworkCopies::partial_sums(const Stage& stage) const {
  const int64_t chunks = copies_chunks(stage.in.numel() + (stage.bias >= 0 ? 1 : 0));
  return runs_cuda(input_) && chunks > 1 ? aten::empty({samples_ * chunks * stage.out.numel()}, input_.options())
                                         : at::Tensor();
}

// A h + b: the tensor that holds it, the layer's own or, of a stage that is its activation alone, the input.
at::Tensor NetworkCopies::affine(size_t l) {
  const Stage& stage = this->stage(l);
  Layer& layer = layers_[l];
  const at::Tensor& in = l < first_ ? input_ : input(l);
  if (only_moves(stage)) {
    return affine_apply(stage, {}, in, layer.a);
  }
  if (stage.affine == Affine::kBatchNorm) {
    FASTVAE_DISPATCH(in, {
      const CopiesNorm<scalar_t> args{in.const_data_ptr<scalar_t>(),
                                      layer.mean.const_data_ptr<scalar_t>(),
                                      layer.rstd.const_data_ptr<scalar_t>(),
                                      layer.weight.value.const_data_ptr<scalar_t>(),
                                      layer.a.mutable_data_ptr<scalar_t>(),
                                      samples_,
                                      stage.in.positions(),
                                      stage.in.channels};
      FASTVAE_LAUNCH(copies_norm, in.device(), args, samples_, stage.in.numel());
    });
  } else if (layer.dense) {
    if (l == first_ && product_ready_) {
      return layer.a;
    }
    const at::Tensor partial = partial_sums(stage);
    FASTVAE_DISPATCH(in, {
      const CopiesProduct<scalar_t> args{rows<scalar_t>(layer, stage), in.const_data_ptr<scalar_t>(),
                                         layer.a.mutable_data_ptr<scalar_t>(), mutable_data_or_null<scalar_t>(partial)};
      FASTVAE_LAUNCH(copies_product, in.device(), args, samples_, layer.weight.value.stride(0));
    });
  } else {
    if (l > first_) {
      unfold(l);
    }
    at::Tensor out = layer.a.view({samples_, stage.out.positions(), stage.out.channels});
    if (layer.bias.value.defined()) {
      multiply_each(out, layer.bias.value, layer.columns, layer.weight.value);
    } else {
      multiply_each(out, layer.columns, layer.weight.value);
    }
  }
  return layer.a;
}

void NetworkCopies::activate(size_t l, const at::Tensor& a) {
  const Stage& stage = this->stage(l);
  Layer& layer = layers_[l];
  if (is_plain(stage)) {
    layer.h = a;
    return;
  }
  if (keeps_input(stage.activation.kind)) {
    layer.a = a;
  }
  FASTVAE_DISPATCH(a, {
    const BiasActivation<scalar_t> args{a.const_data_ptr<scalar_t>(),
                                        nullptr,
                                        layer.h.mutable_data_ptr<scalar_t>(),
                                        nullptr,
                                        a.numel() / stage.out.channels,
                                        stage.out.channels,
                                        stage.activation};
    FASTVAE_LAUNCH(bias_activation, a.device(), args, args.rows, args.channels);
  });
}

at::Tensor NetworkCopies::forward() {
  const EntryGuard guard(kOp, input_);
  for (size_t l = first_; l < depth(); ++l) {
    activate(l, affine(l));
  }
  product_ready_ = false;
  evaluated_ = true;
  return layers_.back().h.view({samples_, -1}).clone();
}

void NetworkCopies::step(const Trained& trained) const {
  FASTVAE_DISPATCH(trained.value, {
    const AdamUpdate<scalar_t> args{
        trained.value.mutable_data_ptr<scalar_t>(),
        trained.mean.mutable_data_ptr<scalar_t>(),
        trained.square.mutable_data_ptr<scalar_t>(),
        trained.grad.const_data_ptr<scalar_t>(),
        trained.value.numel(),
        adam<scalar_t>(),
        reinterpret_cast<const math::AdamRate<scalar_t>*>(rates_.const_data_ptr<scalar_t>()),
        taken_.const_data_ptr<int32_t>()};
    FASTVAE_LAUNCH(adam_update, trained.value.device(), args, args.size, 1);
  });
}

// Steps the layer's parameters and gives the gradient to its input; undefined where nobody asks for it.
at::Tensor NetworkCopies::affine_reverse(size_t l, const at::Tensor& delta) {
  const Stage& stage = this->stage(l);
  Layer& layer = layers_[l];
  if (only_moves(stage)) {
    return affine_transpose(stage, {}, delta, layer.grad_in);
  }
  if (stage.affine == Affine::kBatchNorm) {
    FASTVAE_DISPATCH(delta, {
      const CopiesNormReverse<scalar_t> args{delta.const_data_ptr<scalar_t>(),
                                             input(l).const_data_ptr<scalar_t>(),
                                             layer.mean.const_data_ptr<scalar_t>(),
                                             layer.rstd.const_data_ptr<scalar_t>(),
                                             layer.weight.value.const_data_ptr<scalar_t>(),
                                             layer.weight.grad.mutable_data_ptr<scalar_t>(),
                                             mutable_data_or_null<scalar_t>(layer.grad_in),
                                             samples_,
                                             stage.in.positions(),
                                             stage.in.channels};
      FASTVAE_LAUNCH(copies_norm_reverse, delta.device(), args, samples_, stage.in.numel());
    });
    if (has_parameters(stage)) {
      const int64_t first = stage.weight >= 0 ? 0 : 1, count = stage.weight >= 0 && stage.bias >= 0 ? 2 : 1;
      const auto part = [&](const at::Tensor& both) { return both.narrow(0, first, count); };
      step({part(layer.weight.value), part(layer.weight.mean), part(layer.weight.square), part(layer.weight.grad)});
    }
    return layer.grad_in;
  }
  if (!layer.dense) {
    return convolution_reverse(l, delta);
  }
  const at::Tensor partial = partial_sums(stage);
  FASTVAE_DISPATCH(delta, {
    const CopiesUpdate<scalar_t> args{rows<scalar_t>(layer, stage),
                                      input(l).const_data_ptr<scalar_t>(),
                                      delta.const_data_ptr<scalar_t>(),
                                      mutable_data_or_null<scalar_t>(layer.grad_in),
                                      l == first_ ? layer.a.mutable_data_ptr<scalar_t>() : nullptr,
                                      layer.flat_at_zero,
                                      mutable_data_or_null<scalar_t>(partial)};
    FASTVAE_LAUNCH(copies_update, delta.device(), args, samples_, layer.weight.value.stride(0));
  });
  product_ready_ = product_ready_ || l == first_;
  return layer.grad_in;
}

at::Tensor NetworkCopies::convolution_reverse(size_t l, const at::Tensor& delta) {
  const Stage& stage = this->stage(l);
  Layer& layer = layers_[l];
  const at::Tensor rows = delta.view({samples_, stage.out.positions(), stage.out.channels});
  multiply_each(layer.weight.grad, layer.columns.transpose(1, 2), rows);
  if (layer.grad_in.defined()) {
    multiply_each(layer.grad_columns, rows, layer.weight.value.transpose(1, 2));
    FASTVAE_DISPATCH(delta, {
      const Fold<scalar_t> args{layer.grad_columns.const_data_ptr<scalar_t>(),
                                layer.grad_in.mutable_data_ptr<scalar_t>(), layer.window, samples_};
      FASTVAE_LAUNCH(fold, delta.device(), args, samples_, layer.grad_columns.stride(0));
    });
  }
  step(layer.weight);
  if (layer.bias.value.defined()) {
    aten::sum_out(layer.bias.grad, rows, /*dim=*/1, /*keepdim=*/true);
    step(layer.bias);
  }
  return layer.grad_in;
}

void NetworkCopies::update(const at::Tensor& grad) {
  const EntryGuard guard(kOp, grad);
  check_like(kOp, "grad", grad, input_, "x");
  check_sizes(kOp, "grad", grad, {samples_, program_->output().numel()});
  FASTVAE_CHECK_VALUE(steps_ < max_steps_, kOp, "update", c10::str("at most ", max_steps_, " steps"), steps_ + 1);
  FASTVAE_CHECK_VALUE(evaluated_, kOp, "update", "a call of forward before each", "none since the last");
  const at::Tensor dense = grad.contiguous();
  at::Tensor g = dense.view({-1});
  for (size_t l = depth(); l-- > first_;) {
    const Stage& stage = this->stage(l);
    Layer& layer = layers_[l];
    if (!is_plain(stage)) {
      const at::Tensor& slope = keeps_input(stage.activation.kind) ? layer.a : layer.h;
      FASTVAE_DISPATCH(g, {
        const ActivationReverse<scalar_t> args{g.const_data_ptr<scalar_t>(), slope.const_data_ptr<scalar_t>(),
                                               layer.delta.mutable_data_ptr<scalar_t>(), g.numel(), stage.activation};
        FASTVAE_LAUNCH(activation_reverse, g.device(), args, args.size, 1);
      });
      g = layer.delta;
    }
    g = affine_reverse(l, g);
  }
  taken_.add_(1);  // not on the host: a CUDA graph replays this
  ++steps_;
  evaluated_ = false;
}

std::vector<at::Tensor> NetworkCopies::parameters() {
  const EntryGuard guard(kOp, input_);
  std::vector<at::Tensor> found(tensors_);
  for (size_t l = first_; l < depth(); ++l) {
    const Stage& stage = this->stage(l);
    const Layer& layer = layers_[l];
    if (!has_parameters(stage)) {
      continue;
    }
    if (stage.affine == Affine::kBatchNorm) {
      if (stage.weight >= 0) {
        found[stage.weight] = layer.weight.value[0].clone();
      }
      if (stage.bias >= 0) {
        found[stage.bias] = layer.weight.value[1].clone();
      }
      continue;
    }
    if (layer.dense) {
      FASTVAE_DISPATCH(input_, {
        const CopiesCatchUp<scalar_t> args{rows<scalar_t>(layer, stage)};
        FASTVAE_LAUNCH(copies_catch_up, input_.device(), args, samples_, layer.weight.value.stride(0));
      });
    }
    const int64_t taps = layer.weight.value.size(1) - (layer.dense && stage.bias >= 0 ? 1 : 0);
    const at::Tensor weight = layer.weight.value.narrow(1, 0, taps);
    found[stage.weight] =
        stage.affine == Affine::kLinear
            ? weight.transpose(1, 2).contiguous()
            : weight.view({samples_, layer.window.kernel_height, layer.window.kernel_width, stage.in.channels, -1})
                  .permute({0, 4, 3, 1, 2})
                  .contiguous();
    if (stage.bias >= 0) {
      found[stage.bias] =
          layer.dense ? layer.weight.value.select(1, taps).clone() : layer.bias.value.select(1, 0).clone();
    }
  }
  return found;
}

}  // namespace fastvae

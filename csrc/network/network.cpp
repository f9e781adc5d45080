#include "network.h"

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/recycling.h"
#include "affine.h"

namespace fastvae {
namespace {

// Channels of an image below which its rows are too short for a vector.
constexpr int64_t kNarrow = 8;

int64_t rows_of(const at::Tensor& flat, const SampleShape& shape) { return flat.numel() / shape.channels; }

bool is_plain(const Stage& stage) { return stage.activation.kind == Activation::kIdentity; }

// Some samples of a flat tensor, or none of an undefined one.
at::Tensor part(const at::Tensor& flat, int64_t first, int64_t count, const SampleShape& shape) {
  return flat.defined() ? flat.narrow(0, first * shape.numel(), count * shape.numel()) : flat;
}

// Bytes of a stage's input and output that a core works on at a time, so that the activation finds in its cache what
// the convolution wrote.
constexpr int64_t kBlockBytes = int64_t{1} << 19;

// Calls body(first, count) for blocks of samples: of a convolution by our kernels, so many as stay in the caches of the
// cores that share them; of all else, whose products want many rows, all samples at once.
template <typename Body>
void for_each_block(const Stage& stage, const at::Tensor& weight, int64_t samples, const Body& body) {
  int64_t block = samples;
  if (affine_in_blocks(stage, weight)) {
    const int64_t each = (stage.in.numel() + stage.out.numel()) * static_cast<int64_t>(weight.element_size());
    block = std::max<int64_t>(1, kBlockBytes / each) * at::get_num_threads();
  }
  for (int64_t first = 0; first < samples; first += block) {
    body(first, std::min(block, samples - first));
  }
}

bool is_wanted(const std::vector<at::Tensor>& gradients, int64_t index) {
  return index >= 0 && gradients[index].defined();
}

// A number for each output channel, to be multiplied with the weight.
at::Tensor over_outputs(const Stage& stage, const at::Tensor& channels) {
  switch (stage.affine) {
    case Affine::kLinear:
      return channels.view({-1, 1});
    case Affine::kConv2d:
      return channels.view({-1, 1, 1, 1});
    default:
      return channels.view({1, -1, 1, 1});
  }
}

// result = delta [B, n] -> sum over rows, added to gradient.
void add_column_sums(const at::Tensor& rows, int64_t channels, at::Tensor& gradient) {
  gradient.add_(rows.view({-1, channels}).sum(0));
}

}  // namespace

Network::Network(const char* op, const Program& program, const LikelihoodSpec& likelihood, at::TensorList tensors,
                 const at::Tensor& like)
    : program_(program),
      likelihood_(likelihood),
      options_(like.options()),
      weight_(program.stages.size()),
      bias_(program.stages.size()),
      mean_(program.stages.size()),
      rstd_(program.stages.size()),
      scale_(program.stages.size()),
      plain_(program.stages.size()) {
  for (const at::Tensor& tensor : tensors) {
    check_like(op, "parameters", tensor, like, "z");
  }
  for (size_t l = 0; l < depth(); ++l) {
    const Stage& stage = program.stages[l];
    if (stage.weight >= 0 && !stage.normed) {
      weight_[l] = affine_pack(stage, tensors[stage.weight]);
    }
    if (stage.bias >= 0) {
      bias_[l] = tensors[stage.bias].contiguous();
    }
    if (stage.normed) {
      rstd_[l] = tensors[stage.running_var].add(stage.eps).rsqrt();
      scale_[l] = stage.norm_weight >= 0 ? rstd_[l].mul(tensors[stage.norm_weight]) : rstd_[l];
      mean_[l] = bias_[l].defined() ? tensors[stage.running_mean].sub(bias_[l]) : tensors[stage.running_mean];
      const at::Tensor of_mean = mean_[l].mul(scale_[l]);
      bias_[l] = stage.norm_bias >= 0 ? tensors[stage.norm_bias].sub(of_mean) : of_mean.neg();
      plain_[l] = tensors[stage.weight];
      weight_[l] = affine_pack(stage, plain_[l].mul(over_outputs(stage, scale_[l])));
    } else if (stage.affine == Affine::kBatchNorm) {
      mean_[l] = tensors[stage.running_mean];
      rstd_[l] = tensors[stage.running_var].add(stage.eps).rsqrt();
      weight_[l] = stage.weight >= 0 ? weight_[l].mul(rstd_[l]) : rstd_[l];
      const at::Tensor of_mean = mean_[l].mul(weight_[l]);
      bias_[l] = stage.bias >= 0 ? bias_[l].sub(of_mean) : of_mean.neg();
    }
  }
}

Tape Network::tape(const at::Tensor& storage, int64_t steps, int64_t samples, int64_t first, int64_t count) const {
  Tape tape;
  int64_t offset = 0;
  const auto next = [&](int64_t numel) {
    at::Tensor part = storage.narrow(0, steps * samples * offset + first * samples * numel, count * samples * numel);
    offset += numel;
    return part;
  };
  for (size_t l = 0; l < depth(); ++l) {
    const Stage& stage = program_.stages[l];
    const int64_t numel = stage.out.numel();
    const bool last = l + 1 == depth();
    const bool keeps = !last && keeps_input(stage.activation.kind);
    tape.delta.push_back(next(numel));
    tape.h.push_back(last ? at::Tensor() : next(numel));
    tape.kept_a.push_back(keeps ? next(numel) : at::Tensor());
    tape.kept_g.push_back(keeps ? next(numel) : at::Tensor());
  }
  return tape;
}

Tape Network::forward_tape(const at::Tensor& storage, int64_t samples) const {
  Tape tape;
  int64_t offset = 0;
  const auto next = [&](int64_t numel) {
    at::Tensor part = storage.narrow(0, samples * offset, samples * numel);
    offset += numel;
    return part;
  };
  for (size_t l = 0; l < depth(); ++l) {
    const int64_t numel = program_.stages[l].out.numel();
    const bool last = l + 1 == depth();
    tape.delta.push_back(last ? next(numel) : at::Tensor());
    tape.h.push_back(last ? at::Tensor() : next(numel));
    tape.kept_a.push_back(!last && keeps_input(program_.stages[l].activation.kind) ? next(numel) : at::Tensor());
    tape.kept_g.emplace_back();
  }
  return tape;
}

Tape Network::with_reverse_room(const Tape& tape) const {
  Tape found = tape;
  for (size_t l = 0; l + 1 < depth(); ++l) {
    found.delta[l] = reused({tape.h[l].numel()}, options_);
  }
  return found;
}

TangentTape Network::make_tangent_tape(int64_t rows) const {
  TangentTape tape;
  for (size_t l = 0; l < depth(); ++l) {
    const int64_t numel = rows * program_.stages[l].out.numel();
    tape.delta_dot.push_back(reused({numel}, options_));
    tape.hdot.push_back(l + 1 == depth() ? at::Tensor() : reused({numel}, options_));
  }
  return tape;
}

at::Tensor Network::observed_to_rows(const at::Tensor& x) const {
  const SampleShape& out = program_.output();
  if (out.positions() == 1) {
    const at::Tensor dense = x.contiguous();
    return dense.view({-1});
  }
  const int64_t channels =
      likelihood_.kind == Likelihood::kCategorical ? out.channels / likelihood_.classes : out.channels;
  const at::Tensor rows = x.reshape({x.size(0), channels, out.positions()}).transpose(1, 2).contiguous();
  return rows.view({-1});
}

at::Tensor Network::observed_from_rows(const at::Tensor& x) const {
  const SampleShape& out = program_.output();
  const at::Tensor flat = x.view({-1, out.positions(), out.channels}).transpose(1, 2).contiguous();
  return flat.view({-1, out.numel()});
}

at::Tensor Network::apply(size_t l, const at::Tensor& in, const at::Tensor& out) const {
  return affine_apply(program_.stages[l], weight_[l], in, out);
}

at::Tensor Network::apply_transpose(size_t l, const at::Tensor& delta, const at::Tensor& out) const {
  return affine_transpose(program_.stages[l], weight_[l], delta, out);
}

void Network::forward_stage(size_t l, const at::Tensor& in, const at::Tensor& h, const at::Tensor& kept) const {
  const Stage& stage = program_.stages[l];
  for_each_block(stage, weight_[l], in.numel() / stage.in.numel(), [&](int64_t first, int64_t count) {
    const at::Tensor to = part(h, first, count, stage.out);
    const at::Tensor raw = apply(l, part(in, first, count, stage.in), to);
    const at::Tensor kept_part = part(kept, first, count, stage.out);
    FASTVAE_DISPATCH(raw, {
      const BiasActivation<scalar_t> args{raw.const_data_ptr<scalar_t>(),
                                          data_or_null<scalar_t>(bias_[l]),
                                          to.mutable_data_ptr<scalar_t>(),
                                          mutable_data_or_null<scalar_t>(kept_part),
                                          rows_of(raw, stage.out),
                                          stage.out.channels,
                                          stage.activation};
      if (args.a != args.h || args.bias != nullptr || !is_plain(stage)) {
        FASTVAE_LAUNCH(bias_activation, raw.device(), args, args.rows, args.channels);
      }
    });
  });
}

const at::Tensor& Network::kept_slope(size_t l, const Tape& tape) const {
  return tape.kept_a[l].defined() ? tape.kept_a[l] : tape.h[l];
}

const at::Tensor& Network::kept_error(size_t l, const Tape& tape) const {
  return tape.kept_g[l].defined() ? tape.kept_g[l] : tape.delta[l];
}

void Network::head(at::Tensor raw, const at::Tensor& x, const at::Tensor& residual, const at::Tensor& log_prob) const {
  const at::Tensor& bias = bias_.back();
  const SampleShape& out = program_.output();
  // With one to three channels the kernel would run over rows that short; without a bias a sample is one run.
  const bool narrow =
      bias.defined() && out.channels < kNarrow && out.positions() > 1 && likelihood_.kind != Likelihood::kCategorical;
  if (narrow) {
    raw = raw.view({-1, out.channels}).add(bias);
  }
  const int64_t samples = raw.numel() / out.numel();
  const int64_t chunks = head_chunks(likelihood_, out.positions(), out.channels);
  const bool apart = runs_cuda(raw) && log_prob.defined() && chunks > 1;
  const at::Tensor partial = apart ? aten::empty({samples * chunks}, options_) : at::Tensor();
  FASTVAE_DISPATCH(raw, {
    const HeadResidual<scalar_t> args{raw.const_data_ptr<scalar_t>(),
                                      narrow ? nullptr : data_or_null<scalar_t>(bias),
                                      x.const_data_ptr<scalar_t>(),
                                      mutable_data_or_null<scalar_t>(residual),
                                      mutable_data_or_null<scalar_t>(log_prob),
                                      samples,
                                      out.positions(),
                                      out.channels,
                                      likelihood_,
                                      mutable_data_or_null<scalar_t>(partial)};
    FASTVAE_LAUNCH(head_residual, raw.device(), args, args.samples, out.numel());
  });
}

at::Tensor Network::forward(const at::Tensor& in, const Tape& tape) const {
  at::Tensor h = in.view({-1});
  for (size_t l = 0; l + 1 < depth(); ++l) {
    forward_stage(l, h, tape.h[l], tape.kept_a[l]);
    h = tape.h[l];
  }
  return apply(depth() - 1, h, tape.delta[depth() - 1]);
}

void Network::reverse(const Tape& tape) const {
  for (size_t l = depth() - 1; l > 0; --l) {
    const Stage &stage = program_.stages[l], &below = program_.stages[l - 1];
    const bool keeps = tape.kept_g[l - 1].defined();
    for_each_block(stage, weight_[l], tape.delta[l].numel() / stage.out.numel(), [&](int64_t first, int64_t count) {
      const at::Tensor delta = part(tape.delta[l - 1], first, count, stage.in);
      const at::Tensor slope = part(kept_slope(l - 1, tape), first, count, stage.in);
      const at::Tensor place = keeps ? part(tape.kept_g[l - 1], first, count, stage.in) : delta;
      at::Tensor g = apply_transpose(l, part(tape.delta[l], first, count, stage.out), place);
      if (keeps && !g.is_same(place)) {
        place.copy_(g);
      }
      FASTVAE_DISPATCH(g, {
        const ActivationReverse<scalar_t> args{g.const_data_ptr<scalar_t>(), slope.const_data_ptr<scalar_t>(),
                                               delta.mutable_data_ptr<scalar_t>(), g.numel(), below.activation};
        if (args.g != args.delta || !is_plain(below)) {
          FASTVAE_LAUNCH(activation_reverse, g.device(), args, args.size, 1);
        }
      });
    });
  }
}

void Network::forward_residual(const at::Tensor& z, const at::Tensor& x, const Tape& tape,
                               const at::Tensor& log_prob) const {
  head(forward(z, tape), x, tape.delta.back(), log_prob);
}

at::Tensor Network::forward_reverse(const at::Tensor& z, const at::Tensor& x, const Tape& tape,
                                    const at::Tensor& log_prob, double scale) const {
  const int64_t samples = z.size(0);
  forward_residual(z, x, tape, log_prob);
  if (scale != 1) {
    tape.delta.back().mul_(scale);
  }
  reverse(tape);
  const at::Tensor grad_z = aten::empty({samples, program_.in_features()}, options_);
  return apply_transpose(0, tape.delta[0], grad_z.view({-1})).view(grad_z.sizes());
}

at::Tensor Network::tangent_adjoint(const at::Tensor& u, const at::Tensor& x, const at::Tensor& cotangent,
                                    const Tape& tape, const TangentTape& out, const at::Tensor& grad_x) const {
  at::Tensor in = u.view({-1});
  const int64_t samples = u.size(0);
  for (size_t l = 0; l + 1 < depth(); ++l) {
    const Stage& stage = program_.stages[l];
    const at::Tensor raw = apply(l, in, out.hdot[l]);
    FASTVAE_DISPATCH(raw, {
      const ActivationTangent<scalar_t> args{raw.const_data_ptr<scalar_t>(),
                                             kept_slope(l, tape).const_data_ptr<scalar_t>(),
                                             kept_error(l, tape).const_data_ptr<scalar_t>(),
                                             out.hdot[l].mutable_data_ptr<scalar_t>(),
                                             out.delta_dot[l].mutable_data_ptr<scalar_t>(),
                                             raw.numel(),
                                             stage.activation};
      if (args.adot != args.hdot || !is_plain(stage)) {
        FASTVAE_LAUNCH(activation_tangent, raw.device(), args, args.size, 1);
      }
    });
    in = out.hdot[l];
  }
  const size_t last = depth() - 1;
  const SampleShape& shape = program_.output();
  const at::Tensor raw = apply(last, in, out.delta_dot[last]);
  FASTVAE_DISPATCH(raw, {
    const HeadTangent<scalar_t> args{raw.const_data_ptr<scalar_t>(),
                                     tape.delta[last].const_data_ptr<scalar_t>(),
                                     x.const_data_ptr<scalar_t>(),
                                     data_or_null<scalar_t>(cotangent),
                                     out.delta_dot[last].mutable_data_ptr<scalar_t>(),
                                     mutable_data_or_null<scalar_t>(grad_x),
                                     samples,
                                     shape.positions(),
                                     shape.channels,
                                     likelihood_};
    FASTVAE_LAUNCH(head_tangent, raw.device(), args, args.samples, shape.numel());
  });
  for (size_t l = last; l > 0; --l) {
    const Stage& below = program_.stages[l - 1];
    // The curvature term waits in delta_dot of the stage below, so the product needs a place of its own.
    const bool curved = !is_piecewise_linear(below.activation.kind);
    const at::Tensor place = curved ? reused(out.delta_dot[l - 1].sizes(), options_) : out.delta_dot[l - 1];
    const at::Tensor g = apply_transpose(l, out.delta_dot[l], place);
    FASTVAE_DISPATCH(g, {
      scalar_t* delta_dot = out.delta_dot[l - 1].mutable_data_ptr<scalar_t>();
      const ActivationAdjoint<scalar_t> args{g.const_data_ptr<scalar_t>(),
                                             kept_slope(l - 1, tape).const_data_ptr<scalar_t>(),
                                             curved ? delta_dot : nullptr,
                                             delta_dot,
                                             g.numel(),
                                             below.activation};
      if (args.g != args.delta_dot || !is_plain(below)) {
        FASTVAE_LAUNCH(activation_adjoint, g.device(), args, args.size, 1);
      }
    });
  }
  const at::Tensor grad_z = aten::empty({samples, program_.in_features()}, options_);
  return apply_transpose(0, out.delta_dot[0], grad_z.view({-1})).view(grad_z.sizes());
}

void Network::accumulate_parameters(const at::Tensor& z, const at::Tensor& u, const Tape& tape,
                                    const TangentTape& tangents, std::vector<at::Tensor>& gradients) const {
  for (size_t l = 0; l < depth(); ++l) {
    add_affine_gradient(l, tangents.delta_dot[l], l == 0 ? z.reshape({-1}) : tape.h[l - 1], gradients);
    add_linear_gradient(l, tape.delta[l], l == 0 ? u.reshape({-1}) : tangents.hdot[l - 1], gradients);
  }
}

// a = s (W h + b - mean) + norm_bias with s = norm_weight rstd, and G the gradient to s W:  dW = s G,
// d norm_weight = rstd (sum of W G + (b - mean) sum of delta)  for each output channel.
void Network::add_normed_gradient(size_t l, const at::Tensor& sums, const at::Tensor& of_product,
                                  std::vector<at::Tensor>& gradients) const {
  const Stage& stage = program_.stages[l];
  const at::Tensor scale = over_outputs(stage, scale_[l]);
  if (sums.defined() && is_wanted(gradients, stage.bias)) {
    gradients[stage.bias].addcmul_(sums, scale_[l]);
  }
  if (sums.defined() && is_wanted(gradients, stage.norm_bias)) {
    gradients[stage.norm_bias].add_(sums);
  }
  if (is_wanted(gradients, stage.norm_weight)) {
    at::Tensor of_scale = of_product.mul(plain_[l]).sum_to_size(scale.sizes()).view({-1});
    if (sums.defined()) {
      of_scale.addcmul_(sums, mean_[l], -1);
    }
    gradients[stage.norm_weight].addcmul_(of_scale, rstd_[l]);
  }
  if (is_wanted(gradients, stage.weight)) {
    gradients[stage.weight].addcmul_(of_product, scale);
  }
}

void Network::add_affine_gradient(size_t l, const at::Tensor& delta, const at::Tensor& h,
                                  std::vector<at::Tensor>& gradients) const {
  const Stage& stage = program_.stages[l];
  const int64_t channels = stage.out.channels;
  if (stage.normed) {
    const bool of_product = is_wanted(gradients, stage.weight) || is_wanted(gradients, stage.norm_weight);
    const bool of_sums = is_wanted(gradients, stage.bias) || is_wanted(gradients, stage.norm_bias) ||
                         is_wanted(gradients, stage.norm_weight);
    add_normed_gradient(
        l, of_sums ? delta.view({-1, channels}).sum(0) : at::Tensor(),
        of_product ? affine_weight_gradient(stage, weight_[l], delta, h, plain_[l].sizes()) : at::Tensor(), gradients);
    return;
  }
  if (is_wanted(gradients, stage.weight)) {
    at::Tensor& gradient = gradients[stage.weight];
    if (stage.affine == Affine::kBatchNorm) {
      // a = weight xhat + bias with xhat = (h - mean) rstd, channel by channel.
      const at::Tensor xhat = h.view({-1, channels}).sub(mean_[l]).mul(rstd_[l]);
      gradient.add_(delta.view({-1, channels}).mul(xhat).sum(0));
    } else {
      affine_add_weight_gradient(stage, weight_[l], delta, h, gradient);
    }
  }
  if (is_wanted(gradients, stage.bias)) {
    add_column_sums(delta, channels, gradients[stage.bias]);
  }
}

std::vector<at::Tensor> Network::affine_gradients(const at::Tensor& in, const Tape& tape, at::TensorList tensors,
                                                  at::IntArrayRef needs) const {
  std::vector<at::Tensor> found(tensors.size());
  const auto is_new = [&](int64_t index) { return index >= 0 && needs[index] != 0 && !found[index].defined(); };
  for (size_t l = 0; l < depth(); ++l) {
    const Stage& stage = program_.stages[l];
    const at::Tensor h = l == 0 ? in.view({-1}) : tape.h[l - 1];
    const at::Tensor& delta = tape.delta[l];
    // A convolution's or a product's gradient is made by it, without zeros that would be written and read again.
    at::Tensor made;
    if (stage.affine != Affine::kBatchNorm && !stage.normed && is_new(stage.weight)) {
      made = affine_weight_gradient(stage, weight_[l], delta, h, tensors[stage.weight].sizes());
    }
    for (const int64_t index : {stage.weight, stage.bias, stage.norm_weight, stage.norm_bias}) {
      if (is_new(index) && !(made.defined() && index == stage.weight)) {
        found[index] = aten::zeros(tensors[index].sizes(), options_);
      }
    }
    // While the weight's is apart, this adds the bias' alone.
    add_affine_gradient(l, delta, h, found);
    if (made.defined()) {
      found[stage.weight] = std::move(made);
    }
  }
  return found;
}

void Network::add_linear_gradient(size_t l, const at::Tensor& delta, const at::Tensor& hdot,
                                  std::vector<at::Tensor>& gradients) const {
  const Stage& stage = program_.stages[l];
  if (stage.normed) {
    if (is_wanted(gradients, stage.weight) || is_wanted(gradients, stage.norm_weight)) {
      add_normed_gradient(l, {}, affine_weight_gradient(stage, weight_[l], delta, hdot, plain_[l].sizes()), gradients);
    }
    return;
  }
  if (!is_wanted(gradients, stage.weight)) {
    return;
  }
  at::Tensor& gradient = gradients[stage.weight];
  if (stage.affine == Affine::kBatchNorm) {
    const int64_t channels = stage.out.channels;
    gradient.addcmul_(delta.view({-1, channels}).mul(hdot.view({-1, channels})).sum(0), rstd_[l]);
  } else {
    affine_add_weight_gradient(stage, weight_[l], delta, hdot, gradient);
  }
}

at::Tensor Network::with_bias(const at::Tensor& raw) const {
  const at::Tensor rows = raw.view({-1, program_.output().channels});
  return bias_.back().defined() ? rows.add(bias_.back()) : rows;
}

std::vector<StageFactors> Network::factors(const at::Tensor& z, const at::Tensor& u, const Tape& tape,
                                           const TangentTape& tangents, int64_t steps) const {
  const auto seen = [&](const at::Tensor& flat, const SampleShape& shape) {
    const at::Tensor rows = steps == 0 ? flat.reshape({-1, shape.positions(), shape.channels})
                                       : flat.reshape({steps, -1, shape.positions(), shape.channels});
    if (shape.flat) {
      return rows.flatten(-2);
    }
    return rows.unflatten(-2, {shape.height, shape.width}).movedim(-1, -3);
  };
  const bool tangent = u.defined();
  std::vector<StageFactors> found;
  for (size_t l = 0; l < depth(); ++l) {
    const Stage& stage = program_.stages[l];
    if (stage.weight < 0 && stage.bias < 0) {
      continue;
    }
    StageFactors of{
        stage.weight, stage.bias, seen(l == 0 ? z : tape.h[l - 1], stage.in), seen(tape.delta[l], stage.out), {}, {}};
    if (tangent) {
      of.hdot = seen(l == 0 ? u : tangents.hdot[l - 1], stage.in);
      of.delta_dot = seen(tangents.delta_dot[l], stage.out);
    }
    found.push_back(of);
  }
  return found;
}

void Network::add_observed_gradient(const at::Tensor& z, const Tape& tape, const at::Tensor& cotangent,
                                    const at::Tensor& grad_x) const {
  const at::Tensor weight = cotangent.unsqueeze(1);
  const at::Tensor gradient = grad_x.view({z.size(0), -1});
  const size_t last = depth() - 1;
  if (likelihood_.kind != Likelihood::kBernoulli) {  // of x - a alone
    gradient.addcmul_(weight, tape.delta[last].view({z.size(0), -1}), -1);
    return;
  }
  // Bernoulli: d ll/d x = a_L, which the tape does not keep; one pass of the last layer gives it back.
  const at::Tensor in = last == 0 ? z.view({-1}) : tape.h[last - 1];
  const at::Tensor raw = apply(last, in, aten::empty_like(tape.delta[last])).view({-1, program_.output().channels});
  const at::Tensor a = bias_[last].defined() ? raw.add(bias_[last]) : raw;
  gradient.addcmul_(weight, a.view({z.size(0), -1}));
}

TangentTape TangentTape::rows(int64_t first, int64_t count, int64_t slots) const {
  const auto narrow = [&](const at::Tensor& whole) {
    const int64_t slot = whole.defined() ? whole.numel() / slots : 0;
    return whole.defined() ? whole.narrow(0, first * slot, count * slot) : whole;
  };
  TangentTape part;
  for (size_t l = 0; l < delta_dot.size(); ++l) {
    part.hdot.push_back(narrow(hdot[l]));
    part.delta_dot.push_back(narrow(delta_dot[l]));
  }
  return part;
}

}  // namespace fastvae

#include "jacobian.h"

#include <algorithm>

#include "../common/aten.h"
#include "../common/launch.h"
#include "../common/product.h"
#include "../common/recycling.h"
#include "affine.h"

namespace fastvae {
namespace {

// Bytes of tangents of a last Linear layer that exist at a time: on a CPU they stay in the caches between the products
// that write and read them.
constexpr int64_t kColumnBytesOnCpu = int64_t{4} << 20;
constexpr int64_t kColumnBytesOnCuda = int64_t{64} << 20;
constexpr int64_t kColumnMultiple = 64;

bool is_identity(const Stage& stage) {
  return stage.affine == Affine::kIdentity && stage.activation.kind == Activation::kIdentity;
}

// Stages, but for the identity that a likelihood head would follow.
size_t depth_of(const Program& program) {
  const size_t stages = program.stages.size();
  return stages > 1 && is_identity(program.stages.back()) ? stages - 1 : stages;
}

// Whether the tangents of a last stage need not exist all at once.
bool is_by_columns(const Stage& last) { return last.affine == Affine::kLinear && !last.normed; }

// Rows `latents` of a matrix; no index tensor, which would have to be copied to the device.
at::Tensor select_rows(const at::Tensor& matrix, at::IntArrayRef latents) {
  std::vector<at::Tensor> rows;
  rows.reserve(latents.size());
  for (const int64_t latent : latents) {
    rows.push_back(matrix.select(0, latent));
  }
  return aten::stack(rows);
}

}  // namespace

int64_t JacobianSweep::numel_per_latent(const Program& program) {
  const size_t depth = depth_of(program);
  int64_t kept = 0, widest = 0;
  for (size_t l = 0; l + 1 < depth; ++l) {
    const int64_t numel = program.stages[l].out.numel();
    kept += numel * (keeps_input(program.stages[l].activation.kind) ? 2 : 1);
    widest = std::max(widest, numel);
  }
  const Stage& last = program.stages[depth - 1];
  const bool by_columns = depth > 1 && is_by_columns(last);
  return kept + 2 * (by_columns ? widest : std::max(widest, last.out.numel()));
}

int64_t JacobianSweep::numel_per_sample(const Program& program) {
  int64_t numel = 0;
  for (const Stage& stage : program.stages) {
    numel += 2 * stage.out.numel();
  }
  return numel;
}

JacobianSweep::JacobianSweep(const Network& network, at::IntArrayRef latents, bool squared, int64_t samples,
                             std::vector<at::Tensor>& gradients, bool grad_z)
    : network_(network),
      gradients_(gradients),
      squared_(squared),
      latents_(static_cast<int64_t>(latents.size())),
      depth_(depth_of(network.program())),
      h_(depth_),
      a_(depth_),
      hdot_(depth_),
      adot_(depth_) {
  lowest_ = find_lowest(grad_z);
  const at::TensorOptions options = network.options();
  const int64_t rows = samples * latents_;
  const size_t last = depth_ - 1;
  int64_t widest = 0;
  for (size_t l = 0; l < depth_; ++l) {
    const int64_t numel = stage(l).out.numel();
    const bool keeps = keeps_input(stage(l).activation.kind);
    if (l < last || stage(l).activation.kind != Activation::kIdentity) {
      h_[l] = reused({samples * numel}, options);
      a_[l] = keeps ? reused({samples * numel}, options) : at::Tensor();
    }
    if (l < last) {
      hdot_[l] = reused({rows * numel}, options);
      adot_[l] = keeps && l > 0 ? reused({rows * numel}, options) : at::Tensor();
      widest = std::max(widest, numel);
    }
  }
  columns_ = stage(last).out.numel();
  if (last > 0 && is_by_columns(stage(last))) {
    const int64_t bytes = runs_cuda(options.device()) ? kColumnBytesOnCuda : kColumnBytesOnCpu;
    const int64_t fit =
        std::max<int64_t>(1, bytes / (std::max<int64_t>(1, rows) * static_cast<int64_t>(options.dtype().itemsize())));
    // Blocks of about one size, in whole vectors.
    const int64_t blocks = (columns_ + fit - 1) / fit;
    const int64_t even = (columns_ + blocks - 1) / blocks;
    columns_ = std::min(columns_, (even + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple);
  }
  bars_[0] = reused({rows * (with_gradient() ? std::max(widest, columns_) : columns_)}, options);
  bars_[1] = reused({with_gradient() ? rows * widest : 0}, options);

  const int64_t d = network.program().in_features();
  seeds_ = select_rows(aten::eye(d, options), latents);
  first_ = stage(0).affine == Affine::kLinear
               ? select_rows(network.weight(0).t(), latents)
               : network.apply(0, seeds_.view({-1}), aten::empty({latents_ * stage(0).out.numel()}, options));
  if (lowest_ == 0) {
    first_bar_ = aten::zeros({latents_, stage(0).out.numel()}, options);
  }
}

size_t JacobianSweep::find_lowest(bool grad_z) const {
  // Under piecewise linear activations the Jacobian depends neither on z nor on a bias below them.
  bool bends = false;
  std::vector<bool> bent_above(depth_);
  for (size_t l = depth_; l-- > 0;) {
    bends = bends || curved(l);
    bent_above[l] = bends;
  }
  if (grad_z && bends) {
    return 0;
  }
  const auto wanted = [&](int64_t index) { return index >= 0 && gradients_[index].defined(); };
  for (size_t l = 0; l < depth_; ++l) {
    if (wanted(stage(l).weight) || wanted(stage(l).norm_weight) ||
        (bent_above[l] && (wanted(stage(l).bias) || wanted(stage(l).norm_bias)))) {
      return l;
    }
  }
  return depth_;
}

at::Tensor JacobianSweep::kept(size_t l) const {
  if (stage(l).activation.kind == Activation::kIdentity) {
    return {};
  }
  return of_samples(a_[l].defined() ? a_[l] : h_[l], stage(l).out.numel());
}

void JacobianSweep::forward(const at::Tensor& z) const {
  at::Tensor in = z.view({-1});
  for (size_t l = 0; l < depth_ && h_[l].defined(); ++l) {
    const int64_t numel = stage(l).out.numel();
    const at::Tensor h = of_samples(h_[l], numel);
    network_.forward_stage(l, in, h, a_[l].defined() ? of_samples(a_[l], numel) : at::Tensor());
    in = h;
  }
}

void JacobianSweep::tangents() {
  for (size_t l = 0; l + 1 < depth_; ++l) {
    const int64_t numel = stage(l).out.numel();
    const at::Tensor hdot = of_rows(hdot_[l], numel);
    const bool shared = l == 0;
    at::Tensor raw = first_;
    if (!shared) {
      const bool keeps = adot_[l].defined();
      raw = network_.apply(l, of_rows(hdot_[l - 1], stage(l).in.numel()), keeps ? of_rows(adot_[l], numel) : hdot);
      if (keeps && raw.const_data_ptr() != adot_[l].const_data_ptr()) {
        of_rows(adot_[l], numel).copy_(raw);
      }
    }
    const at::Tensor s = kept(l);
    FASTVAE_DISPATCH(raw, {
      const JacobianTangent<scalar_t> args{raw.const_data_ptr<scalar_t>(),
                                           data_or_null<scalar_t>(s),
                                           hdot.mutable_data_ptr<scalar_t>(),
                                           shared,
                                           count_,
                                           latents_,
                                           numel,
                                           stage(l).activation};
      if (args.adot != args.hdot || args.s != nullptr) {
        FASTVAE_LAUNCH(jacobian_tangent, raw.device(), args, args.samples, args.latents * args.numel);
      }
    });
  }
}

void JacobianSweep::launch_head(const at::Tensor& adot, int64_t first, const at::Tensor& weight,
                                const at::Tensor& terms, const at::Tensor& abar) const {
  const int64_t numel = adot.numel() / (count_ * latents_);
  const int64_t chunks = jacobian_chunks(numel);
  const at::Tensor partial = aten::empty({count_, chunks}, adot.options());
  const at::Tensor s = kept(depth_ - 1);
  FASTVAE_DISPATCH(adot, {
    JacobianHead<scalar_t> args{};
    args.adot = adot.const_data_ptr<scalar_t>();
    args.s = data_or_null<scalar_t>(s);
    args.weight = data_or_null<scalar_t>(weight);
    args.terms = partial.mutable_data_ptr<scalar_t>();
    args.adotbar = with_gradient() ? adot.mutable_data_ptr<scalar_t>() : nullptr;
    args.abar = mutable_data_or_null<scalar_t>(abar);
    args.squared = squared_;
    args.samples = count_;
    args.latents = latents_;
    args.numel = numel;
    args.outputs = stage(depth_ - 1).out.numel();
    args.first = first;
    args.activation = stage(depth_ - 1).activation;
    FASTVAE_LAUNCH(jacobian_head, adot.device(), args, count_ * chunks, numel * latents_ / chunks);
  });
  terms.add_(partial.sum(1));
}

at::Tensor JacobianSweep::head(const at::Tensor& weight, const at::Tensor& terms, const at::Tensor& abar) {
  const size_t last = depth_ - 1;
  const int64_t numel = stage(last).out.numel();
  at::Tensor adot = of_rows(bars_[0], numel);
  if (last == 0) {
    adot.view({count_, latents_, numel}).copy_(first_.view({1, latents_, numel}));
  } else {
    adot = network_.apply(last, of_rows(hdot_[last - 1], stage(last).in.numel()), adot);
    if (adot.const_data_ptr() == hdot_[last - 1].const_data_ptr()) {
      // An activation alone: the head writes in place, and hdot is still wanted.
      adot = of_rows(bars_[0], numel).copy_(adot);
    }
  }
  launch_head(adot, 0, weight, terms, abar);
  if (!with_gradient()) {
    return {};
  }
  add_gradients(last, adot, {}, {});
  return last > lowest_ ? transpose(last, adot) : at::Tensor();
}

at::Tensor JacobianSweep::head_by_columns(const at::Tensor& weight, const at::Tensor& terms, const at::Tensor& abar) {
  const size_t last = depth_ - 1;
  const int64_t inputs = stage(last).in.numel(), outputs = stage(last).out.numel();
  const at::Tensor hdot = of_rows(hdot_[last - 1], inputs);
  at::Tensor hdotbar = last > lowest_ ? of_rows(bars_[1], inputs).view({-1, inputs}) : at::Tensor();
  Stage part = stage(last);
  for (int64_t first = 0; first < outputs; first += columns_) {
    const int64_t width = std::min(columns_, outputs - first);
    part.out.channels = width;
    const at::Tensor matrix = network_.weight(last).narrow(0, first, width);
    const at::Tensor adot = affine_apply(part, matrix, hdot, of_rows(bars_[0], width));
    launch_head(adot, first, weight, terms, abar);
    if (!with_gradient()) {
      continue;
    }
    if (gradients_[part.weight].defined()) {
      at::Tensor gradient = gradients_[part.weight].narrow(0, first, width);
      affine_add_weight_gradient(part, matrix, adot, hdot, gradient);
    }
    if (hdotbar.defined()) {
      const at::Tensor adotbar = adot.view({-1, width});
      first == 0 ? multiply(hdotbar, adotbar, matrix) : add_product(hdotbar, adotbar, matrix);
    }
  }
  return hdotbar.defined() ? hdotbar.view({-1}) : hdotbar;
}

at::Tensor JacobianSweep::bend(size_t l, const at::Tensor& hdotbar, const at::Tensor& hbar) const {
  const int64_t numel = stage(l).out.numel();
  const at::Tensor s = kept(l);
  const bool keeps = keeps_input(stage(l).activation.kind);
  const bool shared = keeps && l == 0;
  at::Tensor e;
  if (curved(l)) {
    e = shared ? first_ : of_rows(keeps ? adot_[l] : hdot_[l], numel);
  }
  const at::Tensor abar = hbar.defined() || !e.defined() ? hbar : aten::empty({count_ * numel}, hdotbar.options());
  FASTVAE_DISPATCH(hdotbar, {
    const JacobianAdjoint<scalar_t> args{hdotbar.const_data_ptr<scalar_t>(),
                                         data_or_null<scalar_t>(s),
                                         data_or_null<scalar_t>(e),
                                         data_or_null<scalar_t>(hbar),
                                         hdotbar.mutable_data_ptr<scalar_t>(),
                                         mutable_data_or_null<scalar_t>(abar),
                                         shared,
                                         count_,
                                         latents_,
                                         numel,
                                         stage(l).activation};
    if (args.s != nullptr) {
      FASTVAE_LAUNCH(jacobian_adjoint, hdotbar.device(), args, args.samples, args.latents * args.numel);
    }
  });
  return abar;
}

void JacobianSweep::add_gradients(size_t l, const at::Tensor& adotbar, const at::Tensor& abar, const at::Tensor& z) {
  if (l == 0) {
    first_bar_.add_(adotbar.view({count_, latents_, -1}).sum(0));
  } else {
    network_.add_linear_gradient(l, adotbar, of_rows(hdot_[l - 1], stage(l).in.numel()), gradients_);
  }
  if (abar.defined()) {
    network_.add_affine_gradient(l, abar, l == 0 ? z.view({-1}) : of_samples(h_[l - 1], stage(l).in.numel()),
                                 gradients_);
  }
}

at::Tensor JacobianSweep::transpose(size_t l, const at::Tensor& adotbar) const {
  const at::Tensor& place = bars_[adotbar.const_data_ptr() == bars_[1].const_data_ptr() ? 0 : 1];
  return network_.apply_transpose(l, adotbar, of_rows(place, stage(l).in.numel()));
}

void JacobianSweep::run(const at::Tensor& z, const at::Tensor& weight, const at::Tensor& terms,
                        const at::Tensor& grad_z) {
  count_ = z.size(0);
  forward(z);
  tangents();
  const size_t last = depth_ - 1;
  at::Tensor abar =
      with_gradient() && curved(last) ? aten::empty({count_ * stage(last).out.numel()}, z.options()) : at::Tensor();
  at::Tensor hdotbar =
      last > 0 && is_by_columns(stage(last)) ? head_by_columns(weight, terms, abar) : head(weight, terms, abar);
  if (!with_gradient()) {
    return;
  }
  const auto transpose_shared = [&](size_t l) {
    return abar.defined() ? network_.apply_transpose(l, abar, aten::empty({count_ * stage(l).in.numel()}, z.options()))
                          : abar;
  };
  if (abar.defined()) {
    network_.add_affine_gradient(
        last, abar, last == 0 ? z.view({-1}) : of_samples(h_[last - 1], stage(last).in.numel()), gradients_);
  }
  for (size_t l = last; l > lowest_; --l) {
    abar = bend(l - 1, hdotbar, transpose_shared(l));
    add_gradients(l - 1, hdotbar, abar, z);
    if (l - 1 > lowest_) {
      hdotbar = transpose(l - 1, hdotbar);
    }
  }
  if (grad_z.defined() && abar.defined()) {
    const at::Tensor dz = transpose_shared(0);
    grad_z.add_(dz.view(grad_z.sizes()));
  }
}

void JacobianSweep::finish() {
  if (first_bar_.defined()) {
    network_.add_linear_gradient(0, first_bar_.view({-1}), seeds_.view({-1}), gradients_);
  }
}

}  // namespace fastvae

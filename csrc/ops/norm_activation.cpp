// The rules of a norm and an activation: check, lay out, launch. Formulas: kernels/cpu/norm_activation.cpp.
#include "norm_activation.h"

#include <c10/core/MemoryFormat.h>

#include <array>
#include <utility>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../network/activation_words.h"
#include "../network/words.h"

namespace fastvae {
namespace {

constexpr const char* kOp = "norm_activation";

// The activation's own words, with the errors of this entry.
struct Words {
  std::vector<std::string> words;

  void expect(bool condition, const std::string& what) const {
    FASTVAE_CHECK_VALUE(condition, kOp, "activation", what, words.empty() ? "nothing" : words.front());
  }
  void expect_numbers(size_t count) const { expect(words.size() == count + 1, c10::str(count, " numbers")); }
  double number(size_t index) const { return to_number(kOp, "activation", words[index]); }
};

ActivationSpec read_activation(const std::string& text) {
  const Words words{split(text, ' ')};
  words.expect(!words.words.empty(), "an activation");
  return activation_of(words.words.front(), words);
}

Statistics read_statistics(const std::string& text) {
  static constexpr std::array<std::pair<std::string_view, Statistics>, 4> kNames{
      std::pair{"none", Statistics::kNone},
      {"given", Statistics::kGiven},
      {"groups", Statistics::kOfGroups},
      {"root_square", Statistics::kRootSquare}};
  for (const auto& [name, statistics] : kNames) {
    if (text == name) {
      return statistics;
    }
  }
  FASTVAE_CHECK_VALUE(false, kOp, "statistics", "'none', 'given', 'groups' or 'root_square'", text);
}

// The layout in which x lies: with the channels last, or contiguous.
at::MemoryFormat layout_of(const at::Tensor& x) {
  if (x.dim() == 4 && !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    return at::MemoryFormat::ChannelsLast;
  }
  if (x.dim() == 5 && !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast3d)) {
    return at::MemoryFormat::ChannelsLast3d;
  }
  return at::MemoryFormat::Contiguous;
}

}  // namespace

NormActivationRules::NormActivationRules(const std::string& statistics, int64_t groups, double eps,
                                         const std::string& activation)
    : statistics_(read_statistics(statistics)), groups_(groups), eps_(eps), activation_(read_activation(activation)) {
  FASTVAE_CHECK_VALUE(groups > 0, kOp, "groups", "at least 1", groups);
}

// What the four entries have in common; tensors stay alive until the kernel has run.
struct NormActivationRules::Call {
  const NormActivationRules& rules;
  at::MemoryFormat layout;
  at::Tensor x;
  at::Tensor gain, bias, mean, s;
  int64_t affine_samples = 1;
  std::vector<at::Tensor> held;

  Call(const NormActivationRules& all, const at::Tensor& input, const OptionalTensor& of_gain,
       const OptionalTensor& of_bias, const OptionalTensor& of_mean, const OptionalTensor& of_s)
      : rules(all) {
    check_floating(kOp, "x", input);
    FASTVAE_CHECK_VALUE(input.is_cpu(), kOp, "x", "a CPU tensor", describe(input));
    FASTVAE_CHECK_VALUE(input.dim() >= 2, kOp, "x", "shape [B, C, ...]", describe(input));
    FASTVAE_CHECK_VALUE(input.size(1) % rules.groups_ == 0, kOp, "x",
                        c10::str("channels in ", rules.groups_, " equal groups"), describe(input));
    layout = layout_of(input);
    x = input.contiguous(layout);
    const bool grouped = rules.statistics_ == Statistics::kOfGroups || rules.statistics_ == Statistics::kRootSquare;
    const std::vector<int64_t> channels{x.size(1)}, groups{x.size(0), rules.groups_};
    for (const OptionalTensor& affine : {of_gain, of_bias}) {
      if (affine.has_value() && affine->defined() && affine->dim() == 2) {
        affine_samples = affine->size(0);
        FASTVAE_CHECK_VALUE(affine_samples > 0 && input.size(0) % affine_samples == 0, kOp, "gain, bias",
                            c10::str("rows that divide the ", input.size(0), " of x"), describe(*affine));
      }
    }
    const std::vector<int64_t> of_samples{affine_samples, input.size(1)};
    gain = checked("gain", of_gain, affine_samples == 1 && !is_matrix(of_gain) ? channels : of_samples);
    bias = checked("bias", of_bias, affine_samples == 1 && !is_matrix(of_bias) ? channels : of_samples);
    mean = checked("mean", of_mean, grouped ? groups : channels);
    s = checked("s", of_s, grouped ? groups : channels);
  }

  static bool is_matrix(const OptionalTensor& given) {
    return given.has_value() && given->defined() && given->dim() == 2;
  }

  // Of a gradient [rows, channels] what belongs to each gain.
  at::Tensor summed(const at::Tensor& each, const OptionalTensor& of) const {
    if (!is_matrix(of)) {
      return each.sum(at::IntArrayRef{0});
    }
    FASTVAE_CHECK_VALUE(each.size(0) == x.size(0), kOp, "dy", "as many rows as x where gains are of samples",
                        describe(each));
    return each.size(0) == affine_samples ? each : each.view({affine_samples, -1, each.size(1)}).sum(1);
  }

  at::Tensor checked(const char* name, const OptionalTensor& given, at::IntArrayRef sizes) const {
    if (!given.has_value() || !given->defined()) {
      return {};
    }
    check_like(kOp, name, *given, x, "x");
    check_sizes(kOp, name, *given, sizes);
    return given->contiguous();
  }

  void expect_statistics() const {
    const bool centred = rules.statistics_ == Statistics::kGiven || rules.statistics_ == Statistics::kOfGroups;
    FASTVAE_CHECK_VALUE(!centred || mean.defined(), kOp, "mean", "a tensor", "None");
    FASTVAE_CHECK_VALUE(rules.statistics_ == Statistics::kNone || s.defined(), kOp, "s", "a tensor", "None");
  }

  // A dot row [L B, C, ...] in x's layout; undefined: zero.
  at::Tensor row(const char* name, const OptionalTensor& given) {
    if (!given.has_value() || !given->defined()) {
      return {};
    }
    check_like(kOp, name, *given, x, "x");
    FASTVAE_CHECK_VALUE(given->dim() == x.dim() && given->sizes().slice(1) == x.sizes().slice(1) &&
                            (x.size(0) > 0 ? given->size(0) % x.size(0) == 0 : given->size(0) == 0),
                        kOp, name, c10::str("rows as x has, ", x.sizes()), describe(*given));
    held.push_back(given->contiguous(layout));
    return held.back();
  }

  at::Tensor room(at::IntArrayRef sizes) const { return aten::empty(sizes, x.options().memory_format(layout)); }

  template <typename T>
  NormActivation<T> arguments(const at::Tensor& out) const {
    NormActivation<T> args{};
    args.x = x.const_data_ptr<T>();
    args.gain = data_or_null<T>(gain);
    args.bias = data_or_null<T>(bias);
    args.mean = mutable_data_or_null<T>(mean);
    args.s = mutable_data_or_null<T>(s);
    args.out = out.mutable_data_ptr<T>();
    args.samples = out.size(0);
    args.x_samples = x.size(0);
    args.affine_samples = affine_samples;
    args.channels = x.size(1);
    args.positions = x.numel() / std::max<int64_t>(1, x.size(0) * x.size(1));
    args.groups = rules.groups_;
    args.eps = rules.eps_;
    // A row without positions is one position of all channels.
    args.channels_last = layout != at::MemoryFormat::Contiguous || args.positions == 1;
    args.statistics = rules.statistics_;
    args.activation = rules.activation_;
    return args;
  }
};

std::tuple<at::Tensor, NormActivationRules::OptionalTensor, NormActivationRules::OptionalTensor>
NormActivationRules::forward(const at::Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias,
                             const OptionalTensor& mean, const OptionalTensor& s) const {
  const EntryGuard guard(kOp, x);
  Call call(*this, x, gain, bias, mean, s);
  if (statistics_ == Statistics::kOfGroups || statistics_ == Statistics::kRootSquare) {
    const std::vector<int64_t> sizes{x.size(0), groups_};
    call.mean = statistics_ == Statistics::kOfGroups ? aten::empty(sizes, x.options()) : at::Tensor();
    call.s = aten::empty(sizes, x.options());
  }
  call.expect_statistics();
  at::Tensor y = call.room(x.sizes());
  if (x.numel() > 0) {
    FASTVAE_DISPATCH(x, {
      const NormActivation<scalar_t> args = call.arguments<scalar_t>(y);
      FASTVAE_LAUNCH_CPU(norm_activation_forward, args, args.samples, args.channels * args.positions);
    });
  }
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
  };
  return {y, optional(call.mean), optional(call.s)};
}

std::tuple<at::Tensor, NormActivationRules::OptionalTensor, NormActivationRules::OptionalTensor>
NormActivationRules::reverse(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& gain,
                             const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& s,
                             bool affine) const {
  const EntryGuard guard(kOp, x);
  Call call(*this, x, gain, bias, mean, s);
  call.expect_statistics();
  const at::Tensor of_y = call.row("dy", dy);
  FASTVAE_CHECK_TYPE(of_y.defined(), kOp, "dy", "a tensor", "None");
  at::Tensor dx = call.room(of_y.sizes());
  const std::vector<int64_t> each{of_y.size(0), x.size(1)};
  const at::Tensor d_gain = affine ? aten::zeros(each, x.options()) : at::Tensor();
  const at::Tensor d_bias = affine ? aten::zeros(each, x.options()) : at::Tensor();
  if (of_y.numel() > 0) {
    FASTVAE_DISPATCH(x, {
      NormActivation<scalar_t> args = call.arguments<scalar_t>(dx);
      args.dy = of_y.const_data_ptr<scalar_t>();
      args.d_gain = mutable_data_or_null<scalar_t>(d_gain);
      args.d_bias = mutable_data_or_null<scalar_t>(d_bias);
      FASTVAE_LAUNCH_CPU(norm_activation_reverse, args, args.samples, args.channels * args.positions);
    });
  }
  if (!affine) {
    return {dx, std::nullopt, std::nullopt};
  }
  return {dx, call.summed(d_gain, gain), call.summed(d_bias, bias)};
}

at::Tensor NormActivationRules::tangent(const at::Tensor& x_dot, const at::Tensor& x, const OptionalTensor& gain,
                                        const OptionalTensor& bias, const OptionalTensor& mean,
                                        const OptionalTensor& s) const {
  const EntryGuard guard(kOp, x);
  Call call(*this, x, gain, bias, mean, s);
  call.expect_statistics();
  const at::Tensor dot = call.row("x_dot", x_dot);
  FASTVAE_CHECK_TYPE(dot.defined(), kOp, "x_dot", "a tensor", "None");
  at::Tensor y_dot = call.room(dot.sizes());
  if (dot.numel() > 0) {
    FASTVAE_DISPATCH(x, {
      NormActivation<scalar_t> args = call.arguments<scalar_t>(y_dot);
      args.x_dot = dot.const_data_ptr<scalar_t>();
      FASTVAE_LAUNCH_CPU(norm_activation_tangent, args, args.samples, args.channels * args.positions);
    });
  }
  return y_dot;
}

std::tuple<at::Tensor, NormActivationRules::OptionalTensor, NormActivationRules::OptionalTensor>
NormActivationRules::adjoint(const OptionalTensor& dy_dot, const OptionalTensor& dy, const at::Tensor& x_dot,
                             const at::Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias,
                             const OptionalTensor& mean, const OptionalTensor& s, bool affine) const {
  const EntryGuard guard(kOp, x);
  Call call(*this, x, gain, bias, mean, s);
  call.expect_statistics();
  const at::Tensor dot = call.row("x_dot", x_dot);
  FASTVAE_CHECK_TYPE(dot.defined(), kOp, "x_dot", "a tensor", "None");
  const at::Tensor of_dot = call.row("dy", dy), of_y = call.row("dy_dot", dy_dot);
  for (const at::Tensor& other : {of_dot, of_y}) {
    FASTVAE_CHECK_VALUE(!other.defined() || other.size(0) == dot.size(0), kOp, "dy, dy_dot", "as many rows as x_dot",
                        describe(other));
  }
  at::Tensor dx = call.room(dot.sizes());
  const std::vector<int64_t> each{dot.size(0), x.size(1)};
  const at::Tensor d_gain = affine ? aten::zeros(each, x.options()) : at::Tensor();
  const at::Tensor d_bias = affine ? aten::zeros(each, x.options()) : at::Tensor();
  if (dot.numel() > 0) {
    FASTVAE_DISPATCH(x, {
      NormActivation<scalar_t> args = call.arguments<scalar_t>(dx);
      args.x_dot = dot.const_data_ptr<scalar_t>();
      args.dy = data_or_null<scalar_t>(of_dot);
      args.dy_dot = data_or_null<scalar_t>(of_y);
      args.d_gain = mutable_data_or_null<scalar_t>(d_gain);
      args.d_bias = mutable_data_or_null<scalar_t>(d_bias);
      FASTVAE_LAUNCH_CPU(norm_activation_adjoint, args, args.samples, args.channels * args.positions);
    });
  }
  if (!affine) {
    return {dx, std::nullopt, std::nullopt};
  }
  return {dx, call.summed(d_gain, gain), call.summed(d_bias, bias)};
}

}  // namespace fastvae

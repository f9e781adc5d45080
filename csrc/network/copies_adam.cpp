#include "copies_adam.h"

#include <cmath>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"

namespace fastvae {
namespace {

constexpr const char* kOp = "copies_adam";

bool is_given(const std::optional<at::Tensor>& tensor) { return tensor.has_value() && tensor->defined(); }

}  // namespace

CopiesAdam::CopiesAdam(const std::vector<at::Tensor>& values, const AdamSettings& settings)
    : values_(values), settings_(settings) {
  for (const at::Tensor& value : values) {
    const EntryGuard guard(kOp, value);
    check_floating(kOp, "values", value);
    FASTVAE_CHECK_VALUE(value.is_cpu() && value.is_contiguous() && value.dim() > 0, kOp, "values",
                        "contiguous CPU tensors [B, ...]", describe(value));
    check_like(kOp, "values", value, values.front(), "the first one");
    means_.push_back(aten::zeros_like(value));
    squares_.push_back(aten::zeros_like(value));
  }
}

void CopiesAdam::step(const std::vector<std::optional<at::Tensor>>& gradients,
                      const std::vector<std::optional<at::Tensor>>& inputs) {
  FASTVAE_CHECK_VALUE(gradients.size() == values_.size() && inputs.size() == values_.size(), kOp, "gradients, inputs",
                      c10::str(values_.size(), " each"), c10::str(gradients.size(), " and ", inputs.size()));
  const auto taken = static_cast<double>(++steps_);
  const math::AdamRate<double> rate{settings_.lr / (1.0 - std::pow(settings_.beta1, taken)),
                                    1.0 / std::sqrt(1.0 - std::pow(settings_.beta2, taken))};
  constexpr int32_t kFirst = 0;
  for (size_t i = 0; i < values_.size(); ++i) {
    const at::Tensor& value = values_[i];
    if (!is_given(gradients[i])) {
      continue;
    }
    const EntryGuard guard(kOp, value);
    check_like(kOp, "gradients", *gradients[i], value, "values");
    const at::Tensor gradient = gradients[i]->contiguous();
    at::Tensor input;
    if (is_given(inputs[i])) {
      FASTVAE_CHECK_VALUE(value.dim() == 3, kOp, "inputs", "a value [B, out, in]", describe(value));
      check_like(kOp, "inputs", *inputs[i], value, "values");
      check_sizes(kOp, "gradients", gradient, {value.size(0), value.size(1)});
      check_sizes(kOp, "inputs", *inputs[i], {value.size(0), value.size(2)});
      input = inputs[i]->contiguous();
    } else {
      check_sizes(kOp, "gradients", gradient, value.sizes());
    }
    FASTVAE_DISPATCH(value, {
      const math::Adam<scalar_t> adam{scalar_t(1.0 - settings_.beta1), scalar_t(settings_.beta2),
                                      scalar_t(1.0 - settings_.beta2), scalar_t(settings_.eps),
                                      scalar_t(settings_.decay)};
      const math::AdamRate<scalar_t> now{scalar_t(rate.step), scalar_t(rate.inverse_root)};
      scalar_t* const values = value.mutable_data_ptr<scalar_t>();
      scalar_t* const means = means_[i].mutable_data_ptr<scalar_t>();
      scalar_t* const squares = squares_[i].mutable_data_ptr<scalar_t>();
      const scalar_t* const of_value = gradient.const_data_ptr<scalar_t>();
      if (input.defined()) {
        const AdamOuter<scalar_t> args{
            values,        means,         squares, of_value, input.const_data_ptr<scalar_t>(),
            value.size(1), value.size(2), adam,    now};
        FASTVAE_LAUNCH_CPU(adam_outer, args, value.size(0) * value.size(1), value.size(2));
      } else {
        const AdamUpdate<scalar_t> args{values, means, squares, of_value, value.numel(), adam, &now, &kFirst};
        FASTVAE_LAUNCH_CPU(adam_update, args, args.size, 1);
      }
    });
  }
}

}  // namespace fastvae

#include "operator.h"

#include <memory>

namespace fastvae {
namespace {

bool is_differentiated_by_func(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::FuncTorchGradWrapper);
}

struct RefusedGradient : Function<RefusedGradient> {
  static constexpr const char* kMessage = "message";

  static variable_list forward(AutogradContext* ctx, at::TensorList, const std::function<variable_list()>& compute,
                               const std::string& message) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data[kMessage] = message;
    return compute();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, ctx->saved_data[kMessage].toStringRef());
  }
};

variable_list tensors_of(c10::ArrayRef<c10::IValue> values) {
  variable_list found;
  for (const c10::IValue& value : values) {
    if (value.isTensor()) {
      found.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      const std::vector<at::Tensor> list = value.toTensorVector();
      found.insert(found.end(), list.begin(), list.end());
    }
  }
  return found;
}

bool any_requires_grad(const variable_list& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

class RefusesGradient final : public c10::OperatorKernel {
 public:
  explicit RefusesGradient(std::string message) : message_(std::move(message)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) const {
    const variable_list inputs = tensors_of(torch::jit::last(*stack, op.schema().arguments().size()));
    refuse_transformed(op.schema().name(), inputs);
    if (!at::GradMode::is_enabled() || !any_requires_grad(inputs)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      op.callBoxed(stack);
      return;
    }
    const auto results = [&] { return torch::jit::last(*stack, op.schema().returns().size()); };
    const auto compute = [&] {
      op.callBoxed(stack);
      return tensors_of(results());
    };
    // Autograd's history is on the tensors themselves, which the stack holds.
    RefusedGradient::apply(at::TensorList(inputs), std::function<variable_list()>(compute), message_);
  }

 private:
  std::string message_;
};

std::string about_second_derivative(const std::string& name) {
  return "fastvae::" + name +
         ": differentiable once; its second derivative is not implemented. For create_graph=True use "
         "fastvae.reference." +
         name + ", which PyTorch can differentiate twice";
}

}  // namespace

void refuse_transformed(const std::string& op, const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(), op,
                              ": forward-mode differentiation is not supported and would give zeros; use the same "
                              "function of fastvae.reference");
  TORCH_CHECK_NOT_IMPLEMENTED(!is_differentiated_by_func(tensor), op,
                              ": torch.func transforms (grad, vjp, jvp, ...) are not supported; use the same function "
                              "of fastvae.reference inside them");
}

Autograd refuses_gradient(std::string message) {
  return {torch::CppFunction::makeFromBoxedFunctor(std::make_unique<RefusesGradient>(std::move(message)))};
}

Autograd differentiated_once(const std::string& name) { return refuses_gradient(about_second_derivative(name)); }

variable_list differentiated_once(const std::string& name, const variable_list& inputs,
                                  const std::function<variable_list()>& compute) {
  return RefusedGradient::apply(at::TensorList(inputs), compute, about_second_derivative(name));
}

}  // namespace fastvae

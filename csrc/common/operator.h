// How an operator stands in its own file: schema, function and gradient, registered together. fastvae._C binds whatever
// is registered (bindings.cpp); autocast and fake kernels are in fastvae/ops.
//
//   TORCH_LIBRARY_FRAGMENT(fastvae, m) {
//     define_operator<&f>(m, "f(Tensor x) -> Tensor", differentiable<&f, Calls<&f_backward>>());
//     define_operator<&f_backward>(m, "f_backward(Tensor grad, Tensor x) -> Tensor", differentiated_once("f"));
//   }
//
// What only fastvae itself calls, and nothing differentiates, is in a library of its own, without gradient and fake
// kernel:  TORCH_LIBRARY_FRAGMENT(fastvae_internal, m) { define_internal<&f>(m, "f(Tensor x) -> Tensor"); }
//
// Forward-mode tangents, and tensors of torch.func.grad, vjp or jvp, are refused where a function is registered: below
// autograd PyTorch hands on the plain tensors, and the tangent would be zero in silence.
//
// Autograd is in C++ because a Python registration costs about 0.5 ms a call for an op that takes a list of tensors,
// more than the flow through a small network itself [measured].
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace fastvae {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

// The name under which a function was registered.
template <auto kFunction>
std::string& registered_name() {
  static std::string name;
  return name;
}

// What is registered at the autograd key, by a function that asks refuse_transformed first.
struct Autograd {
  torch::CppFunction function;
};

inline std::string name_of(const std::string& schema) { return schema.substr(0, schema.find('(')); }

// A build without CUDA kernels answers a CUDA tensor from the same function, with an error that says what to do.
template <auto kFunction>
void define_operator(torch::Library& m, const std::string& schema, Autograd autograd) {
  const std::string name = name_of(schema);
  registered_name<kFunction>() = "fastvae::" + name;
  m.def(schema.c_str());
  m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CPU, kFunction));
  m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CUDA, kFunction));
  m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Autograd, std::move(autograd.function)));
}

// A registered function through the dispatcher: one key below autograd inside forward(), from the top inside
// backward().
template <auto kFunction>
struct Op;
template <typename Result, typename... Args, Result (*kFunction)(Args...)>
struct Op<kFunction> {
  static Result call(Args... args) {
    static const auto handle = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow(registered_name<kFunction>().c_str(), "")
                                   .template typed<Result(Args...)>();
    return handle.call(std::forward<Args>(args)...);
  }
};

// --- the tensors of an argument or a result

template <typename T>
constexpr bool kIsTensors = std::is_same_v<T, at::Tensor> || std::is_same_v<T, OptionalTensor> ||
                            std::is_same_v<T, at::TensorList> || std::is_same_v<T, variable_list>;

// Calls visit(tensor, whether autograd counts it among the inputs) for every tensor of an argument or a result.
template <typename Visitor, typename T>
void each_tensor(const Visitor& visit, const T& value) {
  if constexpr (std::is_same_v<T, at::Tensor>) {
    visit(value, true);
  } else if constexpr (std::is_same_v<T, OptionalTensor>) {
    const at::Tensor tensor = value.value_or(at::Tensor());
    visit(tensor, tensor.defined());
  } else if constexpr (std::is_same_v<T, std::vector<OptionalTensor>>) {
    std::for_each(value.begin(), value.end(), [&](const OptionalTensor& each) { each_tensor(visit, each); });
  } else if constexpr (kIsTensors<T>) {
    std::for_each(value.begin(), value.end(), [&](const at::Tensor& tensor) { visit(tensor, true); });
  }
}

// --- what is refused before a function is called

// Raises for a tensor with a forward-mode tangent or one that torch.func differentiates; `op` is fastvae::<name>.
void refuse_transformed(const std::string& op, const at::Tensor& tensor);

template <typename... Args>
void refuse_transformed(const std::string& op, const Args&... args) {
  (each_tensor([&op](const at::Tensor& tensor, bool) { refuse_transformed(op, tensor); }, args), ...);
}

// A function, the registered one or its autograd, behind that question.
template <auto kRegistered, auto kCalled = kRegistered>
struct Untransformed;
template <auto kRegistered, typename Result, typename... Args, Result (*kCalled)(Args...)>
struct Untransformed<kRegistered, kCalled> {
  static Result call(Args... args) {
    refuse_transformed(registered_name<kRegistered>(), static_cast<const std::decay_t<Args>&>(args)...);
    return kCalled(std::forward<Args>(args)...);
  }
};

template <auto kFunction>
void define_internal(torch::Library& m, const std::string& schema) {
  registered_name<kFunction>() = "fastvae::" + name_of(schema);
  m.def(schema.c_str(), &Untransformed<kFunction>::call);
}

// --- operators without a derivative, among them every gradient: a missing formula would silently drop terms

// The autograd of such an operator, whatever its signature: a gradient that is wanted of it raises the message.
Autograd refuses_gradient(std::string message);
// The same for the gradient of the operator `name`; or for what a function computes of some inputs, below autograd.
Autograd differentiated_once(const std::string& name);
variable_list differentiated_once(const std::string& name, const variable_list& inputs,
                                  const std::function<variable_list()>& compute);

// --- operators with a gradient in closed form

inline OptionalTensor optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Operators return empty tensors in the place of gradients that nobody needs; autograd wants undefined ones.
inline void drop_unneeded(variable_list& gradients, const std::vector<int64_t>& needs) {
  for (size_t i = 0; i < needs.size(); ++i) {
    if (needs[i] == 0) {
      gradients[i] = at::Tensor();
    }
  }
}

// The tensors of several arguments or results, one after the other.
template <typename... Parts>
variable_list flattened(const Parts&... parts) {
  variable_list found;
  (each_tensor([&found](const at::Tensor& tensor, bool) { found.push_back(tensor); }, parts), ...);
  return found;
}
template <typename... Parts>
variable_list flattened(const std::tuple<Parts...>& parts) {
  return std::apply([](const Parts&... each) { return flattened(each...); }, parts);
}

// What a gradient is formed from, besides the inputs.
template <size_t kOutputs>
struct Recorded {
  const variable_list& grads;         // of the outputs
  const variable_list& kept;          // the outputs that the rule keeps
  const std::vector<int64_t>& needs;  // for each tensor of the inputs, 1 where its gradient is needed
};

// The rule of a gradient that is an operator of its own: from the cotangents of all outputs, the inputs and, where it
// takes them, the needs to a gradient for each tensor of the inputs.
template <auto kBackward>
struct Calls {
  static constexpr std::array<size_t, 0> kKept{};        // outputs that are saved for the gradient
  static constexpr size_t kDifferentiable = ~size_t{0};  // the first so many outputs
  static constexpr bool kZeros = true;                   // as the cotangents of outputs that nobody used

  template <size_t kOutputs, typename... Args>
  static variable_list gradient(const Recorded<kOutputs>& recorded, const Args&... inputs) {
    return call(std::make_index_sequence<kOutputs>(), recorded, inputs...);
  }

 private:
  template <size_t... kOutput, typename Of, typename... Args>
  static variable_list call(std::index_sequence<kOutput...>, const Of& recorded, const Args&... inputs) {
    if constexpr (std::is_invocable_v<decltype(kBackward), decltype(recorded.grads[kOutput])..., const Args&...>) {
      return flattened(Op<kBackward>::call(recorded.grads[kOutput]..., inputs...));
    } else {
      return flattened(Op<kBackward>::call(recorded.grads[kOutput]..., inputs..., recorded.needs));
    }
  }
};

template <typename T>
struct Outputs : std::integral_constant<size_t, 1> {};
template <typename... Parts>
struct Outputs<std::tuple<Parts...>> : std::integral_constant<size_t, sizeof...(Parts)> {};

// An argument as it waits for the gradient: tensors among the saved ones, of a list here its length.
template <typename T>
using Waiting = std::conditional_t<
    std::is_same_v<T, at::TensorList>, size_t,
    std::conditional_t<
        kIsTensors<T>, std::monostate,
        std::conditional_t<std::is_same_v<T, std::string_view>, std::string,
                           std::conditional_t<std::is_same_v<T, at::IntArrayRef>, std::vector<int64_t>, T>>>>;

template <typename... Args>
struct WaitingArguments : torch::CustomClassHolder {
  explicit WaitingArguments(const Args&... args) : all(waiting(args)...) {}
  std::tuple<Waiting<Args>...> all;

 private:
  template <typename T>
  static Waiting<T> waiting(const T& value) {
    if constexpr (std::is_same_v<T, at::TensorList>) {
      return value.size();
    } else if constexpr (std::is_same_v<T, at::IntArrayRef>) {
      return value.vec();
    } else if constexpr (kIsTensors<T>) {
      return {};
    } else {
      return Waiting<T>(value);
    }
  }
};

// The argument again, its tensors from `next` on among the saved ones.
template <typename T>
T restored(const Waiting<T>& waiting, const variable_list& saved, size_t& next) {
  if constexpr (std::is_same_v<T, at::Tensor>) {
    return saved[next++];
  } else if constexpr (std::is_same_v<T, OptionalTensor>) {
    return optional_of(saved[next++]);
  } else if constexpr (std::is_same_v<T, at::TensorList>) {
    next += waiting;
    return at::TensorList(saved).slice(next - waiting, waiting);
  } else {
    return waiting;
  }
}

// The autograd of an operator by a rule such as Calls. Of its arguments those with tensors come first.
template <auto kForward, typename Rule>
struct Differentiable;
template <typename Result, typename... Args, Result (*kForward)(Args...), typename Rule>
struct Differentiable<kForward, Rule> : Function<Differentiable<kForward, Rule>> {
  using Arguments = WaitingArguments<std::decay_t<Args>...>;
  static constexpr size_t kOutputs = Outputs<Result>::value;
  static constexpr size_t kOthers = (size_t{0} + ... + (kIsTensors<std::decay_t<Args>> ? 0 : 1));
  static constexpr const char* kArguments = "arguments";

  static variable_list forward(AutogradContext* ctx, Args... args) {
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list outputs = flattened(Op<kForward>::call(args...));
    variable_list saved;
    for (const size_t kept : Rule::kKept) {
      saved.push_back(outputs[kept]);
    }
    const variable_list inputs = flattened<std::decay_t<Args>...>(args...);
    saved.insert(saved.end(), inputs.begin(), inputs.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data[kArguments] = c10::IValue::make_capsule(c10::make_intrusive<Arguments>(args...));
    if constexpr (Rule::kDifferentiable < kOutputs) {
      ctx->mark_non_differentiable(variable_list(outputs.begin() + Rule::kDifferentiable, outputs.end()));
    }
    if constexpr (!Rule::kZeros) {
      ctx->set_materialize_grads(false);
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto& arguments = static_cast<const Arguments&>(*ctx->saved_data[kArguments].toCapsule());
    const size_t kept = Rule::kKept.size();
    size_t next = kept;
    const auto inputs = std::apply(
        [&](const auto&... each) {
          return std::tuple<std::decay_t<Args>...>{restored<std::decay_t<Args>>(each, saved, next)...};
        },
        arguments.all);
    std::vector<int64_t> needs;
    size_t edge = 0;
    const auto note_need = [&](const at::Tensor&, bool counted) {
      needs.push_back(counted && ctx->needs_input_grad(edge) ? 1 : 0);
      edge += counted ? 1 : 0;
    };
    std::apply([&](const auto&... each) { (each_tensor(note_need, each), ...); }, inputs);
    // Nothing to record, and so no need of the op's own autograd, unless this gradient is to be differentiated.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) {
      below.emplace();
    }
    const variable_list kept_outputs(saved.begin(), saved.begin() + static_cast<int64_t>(kept));
    variable_list gradients = std::apply(
        [&](const auto&... each) { return Rule::gradient(Recorded<kOutputs>{grads, kept_outputs, needs}, each...); },
        inputs);
    drop_unneeded(gradients, needs);
    gradients.resize(gradients.size() + kOthers);
    return gradients;
  }

  static Result call(Args... args) {
    bool wanted = false;
    if (at::GradMode::is_enabled()) {
      const auto look = [&](const at::Tensor& tensor, bool) { wanted = wanted || tensor.requires_grad(); };
      (each_tensor(look, static_cast<const std::decay_t<Args>&>(args)), ...);
    }
    if (!wanted) {
      const at::AutoDispatchBelowADInplaceOrView below;
      return Op<kForward>::call(args...);
    }
    const variable_list outputs = Differentiable::apply(args...);
    if constexpr (std::is_same_v<Result, at::Tensor>) {
      return outputs[0];
    } else {
      return as_tuple(outputs, std::make_index_sequence<kOutputs>());
    }
  }

 private:
  template <size_t... kOutput>
  static Result as_tuple(const variable_list& outputs, std::index_sequence<kOutput...>) {
    return {outputs[kOutput]...};
  }
};

// The autograd of an operator by a function of its own, with the operator's arguments.
template <auto kForward, auto kAutograd>
Autograd differentiated_by() {
  return {torch::CppFunction(&Untransformed<kForward, kAutograd>::call)};
}

template <auto kForward, typename Rule>
Autograd differentiable() {
  return differentiated_by<kForward, &Differentiable<kForward, Rule>::call>();
}

}  // namespace fastvae

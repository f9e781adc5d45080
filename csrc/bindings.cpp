// fastvae._C: what this build is, every registered operator by its own schema, and the classes that keep something
// between calls. All calls are made with the GIL released.
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <deque>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/operator.h"
#include "common/product.h"
#include "common/recycling.h"
#include "kernels/cpu/bfloat16_product.h"
#include "network/copies.h"
#include "network/copies_adam.h"
#include "ops/copied_convolution.h"
#include "ops/elbo_terms.h"
#include "ops/norm_activation.h"
#include "straight_code.h"

#ifdef FASTVAE_EMULATE_CUDA
namespace fastvae {
void bind_emulation(pybind11::module_& m);  // tests/cpp/emulated_launches.cpp
}
#endif

namespace {

std::string cpu_instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
    return "AVX-512";
  }
  return __builtin_cpu_supports("avx2") ? "AVX2" : "SSE2";
#else
  return "portable";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
#ifdef FASTVAE_WITH_CUDA
  info["cuda"] = true;
  info["cuda_architectures"] = FASTVAE_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_architectures"] = "";
#endif
#ifdef FASTVAE_EMULATE_CUDA
  info["cuda_emulated"] = true;
#else
  info["cuda_emulated"] = false;
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef __clang__
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["cpu_instruction_set"] = cpu_instruction_set();
  info["cpu_products"] = fastvae::are_products_ours() ? "kernel" : "library";
  info["cpu_bfloat16"] = fastvae::are_products_ours() && fastvae::cpu::kMultipliesBfloat16;
  return info;
}

// A registered operator with its autograd, or a function of fastvae_internal, called by its schema.
struct BoundOperator {
  explicit BoundOperator(const c10::OperatorHandle& handle)
      : op(handle), name(handle.operator_name().name), doc(c10::str(handle.schema())) {
    name.erase(0, name.rfind(':') + 1);
  }
  c10::OperatorHandle op;
  std::string name, doc;
  PyMethodDef method{};
};

// The value of the argument at a place beyond the `given` ones: by its name, `used` up then, or the default.
c10::IValue named_or_default(const c10::FunctionSchema& schema, size_t place, PyObject* const* values, PyObject* names,
                             size_t& used) {
  const c10::Argument& argument = schema.arguments()[place];
  for (Py_ssize_t k = 0; names != nullptr && k < PyTuple_GET_SIZE(names); ++k) {
    if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, k), argument.name().c_str()) == 0) {
      ++used;
      return torch::jit::argumentToIValue(schema, place, values[k]);
    }
  }
  TORCH_CHECK_TYPE(argument.default_value().has_value(), schema.name(), ": missing argument '", argument.name(),
                   "' of ", schema);
  return *argument.default_value();
}

// Without pybind11, which makes a tuple and a dictionary of every call's arguments.
PyObject* call_operator(PyObject* self, PyObject* const* values, Py_ssize_t count, PyObject* names) {
  HANDLE_TH_ERRORS
  const auto* bound = static_cast<const BoundOperator*>(PyCapsule_GetPointer(self, nullptr));
  const c10::FunctionSchema& schema = bound->op.schema();
  const auto given = static_cast<size_t>(count);
  const size_t named = names == nullptr ? 0 : static_cast<size_t>(PyTuple_GET_SIZE(names));
  torch::jit::Stack stack;
  stack.reserve(schema.arguments().size());
  size_t used = 0;
  for (size_t place = 0; place < schema.arguments().size(); ++place) {
    stack.push_back(place < given ? torch::jit::argumentToIValue(schema, place, values[place])
                                  : named_or_default(schema, place, values + count, names, used));
  }
  TORCH_CHECK_TYPE(given <= schema.arguments().size() && used == named, schema.name(),
                   ": too many arguments, or one of an unknown name or given twice, for ", schema);
  {
    const pybind11::gil_scoped_release unlocked;
    bound->op.callBoxed(&stack);
  }
  return torch::jit::createPyObjectForStack(std::move(stack)).release().ptr();
  END_HANDLE_TH_ERRORS
}

void bind_operators(pybind11::module_& m) {
  static std::deque<BoundOperator> all;  // as long as their functions may live
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto space = name.getNamespace();
    if (space != "fastvae" && space != "fastvae_internal") {
      continue;
    }
    BoundOperator& bound =
        all.emplace_back(c10::Dispatcher::singleton().findSchemaOrThrow(name.name.c_str(), name.overload_name.c_str()));
    // The compiler allows no cast from a function of four arguments to one of two by itself.
    bound.method = {bound.name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_operator)),
                    METH_FASTCALL | METH_KEYWORDS, bound.doc.c_str()};
    const pybind11::capsule self(&bound);
    m.attr(bound.name.c_str()) = pybind11::reinterpret_steal<pybind11::object>(
        PyCFunction_NewEx(&bound.method, self.ptr(), m.attr("__name__").ptr()));
  }
}

// A function or a method that is no operator, behind the question that is asked where operators are registered.
template <typename Result, typename... Args, typename Called>
auto untransformed_call(const char* name, Called called) {
  return [op = std::string("fastvae::") + name, called](Args... args) -> Result {
    fastvae::refuse_transformed(op, static_cast<const std::decay_t<Args>&>(args)...);
    return called(std::forward<Args>(args)...);
  };
}
template <typename Result, typename... Args>
auto untransformed(const char* name, Result (*function)(Args...)) {
  return untransformed_call<Result, Args...>(name, function);
}
template <typename Class, typename Result, typename... Args>
auto untransformed(const char* name, Result (Class::*method)(Args...)) {
  return untransformed_call<Result, Class&, Args...>(name, std::mem_fn(method));
}
template <typename Class, typename Result, typename... Args>
auto untransformed(const char* name, Result (Class::*method)(Args...) const) {
  return untransformed_call<Result, const Class&, Args...>(name, std::mem_fn(method));
}

// A function of Python's, from cotangents and to gradients as lists with None in the place of zero.
class GradientInPython final : public fastvae::DifferentiableGradient {
 public:
  explicit GradientInPython(pybind11::function function) : function_(std::move(function)) {}
  GradientInPython(const GradientInPython&) = delete;
  GradientInPython& operator=(const GradientInPython&) = delete;
  ~GradientInPython() override {
    const pybind11::gil_scoped_acquire locked;  // it may die while nobody holds the lock
    function_ = pybind11::function();
  }
  fastvae::variable_list operator()(const fastvae::variable_list& cotangents, const at::Tensor& x,
                                    const at::Tensor& noise) const override {
    const pybind11::gil_scoped_acquire locked;
    pybind11::list given;
    for (const at::Tensor& cotangent : cotangents) {
      given.append(cotangent.defined() ? pybind11::cast(cotangent) : pybind11::object(pybind11::none()));
    }
    fastvae::variable_list found;
    for (const pybind11::handle gradient : pybind11::list(function_(given, x, noise))) {
      found.push_back(gradient.is_none() ? at::Tensor() : gradient.cast<at::Tensor>());
    }
    return found;
  }

 private:
  pybind11::function function_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  using pybind11::arg;
  constexpr const char *kCopies = "network_copies", *kAdam = "copies_adam", *kCopied = "copied_convolution",
                       *kRules = "norm_activation";
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.doc() = "The operators of fastvae by their schemas; use fastvae.ops.";
  m.def("build_info", &build_info, "What this shared object was built with.");
  fastvae::bind_straight_code(m);
  bind_operators(m);
#ifdef FASTVAE_EMULATE_CUDA
  fastvae::bind_emulation(m);
#endif
  pybind11::class_<fastvae::NetworkCopies>(m, "NetworkCopies", "A copy of a network for each sample, trained by Adam.")
      .def(pybind11::init(untransformed(
               kCopies,
               +[](const std::string& network, const std::vector<at::Tensor>& parameters, const at::Tensor& x,
                   double lr, double beta1, double beta2, double eps, double weight_decay, int64_t steps) {
                 return std::make_unique<fastvae::NetworkCopies>(
                     network, parameters, x, fastvae::AdamSettings{lr, beta1, beta2, eps, weight_decay}, steps);
               })),
           unlocked, arg("network"), arg("parameters"), arg("x"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"),
           arg("weight_decay"), arg("steps"))
      .def("forward", &fastvae::NetworkCopies::forward, unlocked)
      .def("update", untransformed(kCopies, &fastvae::NetworkCopies::update), unlocked, arg("grad"))
      .def("parameters", &fastvae::NetworkCopies::parameters, unlocked);
  pybind11::class_<fastvae::CopiesAdam>(m, "CopiesAdam", "Adam on the parameters of every sample, on a CPU.")
      .def(pybind11::init(untransformed(
               kAdam,
               +[](const std::vector<at::Tensor>& values, double lr, double beta1, double beta2, double eps,
                   double weight_decay) {
                 return std::make_unique<fastvae::CopiesAdam>(
                     values, fastvae::AdamSettings{lr, beta1, beta2, eps, weight_decay});
               })),
           unlocked, arg("values"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"), arg("weight_decay"))
      .def("step", untransformed(kAdam, &fastvae::CopiesAdam::step), unlocked, arg("gradients"), arg("inputs"));
  using Copied = fastvae::CopiedConvolutionRules;
  pybind11::class_<Copied>(m, "CopiedConvolutionRules", "A convolution with weights of every sample's own, on a CPU.")
      .def(pybind11::init<const std::vector<int64_t>&, const std::vector<int64_t>&, const std::vector<int64_t>&,
                          const std::vector<int64_t>&, int64_t>(),
           arg("kernel"), arg("stride"), arg("padding"), arg("dilation"), arg("groups"))
      .def("smaller", untransformed(kCopied, &Copied::smaller), unlocked, arg("larger"), arg("weight"), arg("bias"))
      .def("larger", untransformed(kCopied, &Copied::larger), unlocked, arg("smaller"), arg("weight"), arg("bias"),
           arg("sizes"))
      .def("weight", untransformed(kCopied, &Copied::weight), unlocked, arg("larger"), arg("smaller"), arg("samples"));
  using Rules = fastvae::NormActivationRules;
  pybind11::class_<Rules>(m, "NormActivationRules", "The four rules of a norm and the activation behind it, on a CPU.")
      .def(pybind11::init<const std::string&, int64_t, double, const std::string&>(), arg("statistics"), arg("groups"),
           arg("eps"), arg("activation"))
      .def("forward", untransformed(kRules, &Rules::forward), unlocked, arg("x"), arg("gain"), arg("bias"), arg("mean"),
           arg("s"))
      .def("reverse", untransformed(kRules, &Rules::reverse), unlocked, arg("dy"), arg("x"), arg("gain"), arg("bias"),
           arg("mean"), arg("s"), arg("affine"))
      .def("tangent", untransformed(kRules, &Rules::tangent), unlocked, arg("x_dot"), arg("x"), arg("gain"),
           arg("bias"), arg("mean"), arg("s"))
      .def("adjoint", untransformed(kRules, &Rules::adjoint), unlocked, arg("dy_dot"), arg("dy"), arg("x_dot"),
           arg("x"), arg("gain"), arg("bias"), arg("mean"), arg("s"), arg("affine"));
  pybind11::class_<fastvae::Recycling>(m, "Recycling", "Inside, large results take the memory of those that died.")
      .def(pybind11::init<>())
      .def("__reduce__",
           [](const pybind11::object& self) {
             return pybind11::make_tuple(self.attr("__class__"), pybind11::tuple());  // a copy begins without memory
           })
      .def("__enter__", &fastvae::Recycling::enter)
      .def("__exit__", [](fastvae::Recycling& self, const pybind11::args&) { self.leave(); });
  m.def("differentiable_elbo_terms",
        untransformed(
            "elbo_terms",
            +[](const at::Tensor& x, const at::Tensor& noise, const std::vector<at::Tensor>& encoder_parameters,
                const std::vector<at::Tensor>& decoder_parameters, const std::string& encoder,
                const std::string& decoder, const std::string& likelihood, pybind11::function again) {
              const auto gradient = c10::make_intrusive<GradientInPython>(std::move(again));
              const pybind11::gil_scoped_release unlocked_here;
              return fastvae::differentiable_elbo_terms(x, noise, encoder_parameters, decoder_parameters, encoder,
                                                        decoder, likelihood, gradient);
            }),
        arg("x"), arg("noise"), arg("encoder_parameters"), arg("decoder_parameters"), arg("encoder"), arg("decoder"),
        arg("likelihood"), arg("again"),
        "The operator elbo_terms with autograd; again: its gradient in operations that can be differentiated.");
}

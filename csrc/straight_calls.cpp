#include "straight_calls.h"

#include <torch/csrc/jit/python/pybind_utils.h>

#include <string>
#include <utility>

namespace fastvae {
namespace {

namespace py = pybind11;
using c10::IValue;
using torch::jit::Stack;

IValue list_of(const Argument& argument, const Variables& variables) {
  if (argument.may_lack) {
    c10::List<std::optional<at::Tensor>> found;
    found.reserve(argument.items.size());
    for (const int64_t item : argument.items) {
      found.push_back(item == kNone ? std::optional<at::Tensor>() : variables[item].toTensor());
    }
    return found;
  }
  c10::List<at::Tensor> found;
  found.reserve(argument.items.size());
  for (const int64_t item : argument.items) {
    found.push_back(variables[item].toTensor());
  }
  return found;
}

// An object of Python's as a variable.
class Object final : public torch::CustomClassHolder {
 public:
  explicit Object(py::handle object) : object_(py::reinterpret_borrow<py::object>(object)) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() override {
    const py::gil_scoped_acquire locked;  // it may die while nobody holds the lock
    object_ = py::object();
  }
  const py::object& get() const { return object_; }

 private:
  py::object object_;
};

// Results of a call are taken one by one.
class Results {
 public:
  Results(const Call& call, Variables& variables) : call_(call), variables_(variables) {}

  void take(IValue value) {
    TORCH_CHECK(next_ < call_.results.size(), "straight code: a call gave more results than it did at first");
    const int64_t variable = call_.results[next_++];
    if (variable != kNone) {
      variables_[variable] = std::move(value);
    }
  }
  void end() const {
    TORCH_CHECK(next_ == call_.results.size(), "straight code: a call gave fewer results than it did at first");
  }

 private:
  const Call& call_;
  Variables& variables_;
  size_t next_ = 0;
};

// Tensors, and objects of the kind `held`, in tuples and lists.
void take_all(py::handle found, py::handle held, Results& results) {
  if (THPVariable_Check(found.ptr()) || py::isinstance(found, held)) {
    results.take(from_python(found));
  } else if (py::isinstance<py::tuple>(found) || py::isinstance<py::list>(found)) {
    for (const py::handle each : py::reinterpret_borrow<py::sequence>(found)) {
      take_all(each, held, results);
    }
  }
}

Argument decoded_argument(const c10::FunctionSchema* schema, size_t at, const py::tuple& encoded) {
  const auto kind = encoded[0].cast<std::string>();
  Argument found;
  if (kind == "variable") {
    found.variable = encoded[1].cast<int64_t>();
  } else if (kind == "list") {
    found.items = encoded[1].cast<std::vector<int64_t>>();
    found.is_list = true;
    found.may_lack = schema->arguments().at(at).type()->isSubtypeOf(c10::ListType::ofOptionalTensors());
  } else if (kind == "default") {
    const std::optional<IValue>& value = schema->arguments().at(at).default_value();
    TORCH_CHECK(value.has_value(), "straight code: no default for argument ", at, " of ", schema->name());
    found.constant = *value;
  } else {
    const torch::jit::ToIValueAllowNumbersAsTensors numbers(true);
    const c10::Argument& argument = schema->arguments().at(at);
    found.constant = torch::jit::toIValue(encoded[1], argument.real_type(), argument.N());
  }
  return found;
}

}  // namespace

Call decoded_call(const py::tuple& encoded) {
  Call found;
  const c10::FunctionSchema* schema = nullptr;
  if (py::isinstance<py::tuple>(encoded[0])) {
    const auto name = encoded[0].cast<std::pair<std::string, std::string>>();
    found.op = c10::Dispatcher::singleton().findSchemaOrThrow(name.first.c_str(), name.second.c_str());
    schema = &found.op->schema();
  } else {
    found.function = encoded[0].cast<int64_t>();
  }
  const auto arguments = encoded[1].cast<std::vector<py::tuple>>();
  for (size_t at = 0; at < arguments.size(); ++at) {
    found.arguments.push_back(decoded_argument(schema, at, arguments[at]));
  }
  found.results = encoded[2].cast<std::vector<int64_t>>();
  found.gone = encoded[3].cast<std::vector<int64_t>>();
  return found;
}

bool depends_on_numbers(const c10::OperatorHandle& op) {
  const bool is_index = op.schema().name() == "aten::index";  // by no mask: the recorder refuses those
  return (op.hasTag(at::Tag::dynamic_output_shape) && !is_index) || op.hasTag(at::Tag::data_dependent_output) ||
         op.hasTag(at::Tag::nondeterministic_seeded);
}

py::object to_python(const IValue& value) {
  if (value.isTensor()) {
    return py::cast(value.toTensor());
  }
  return value.isCapsule() ? static_cast<const Object&>(*value.toCapsule()).get() : py::none();
}

IValue from_python(py::handle object) {
  if (THPVariable_Check(object.ptr())) {
    return THPVariable_Unpack(object.ptr());
  }
  return IValue::make_capsule(c10::make_intrusive<Object>(object));
}

void call_operator(const Call& call, Variables& variables, Stack& stack) {
  stack.clear();
  for (const Argument& argument : call.arguments) {
    if (argument.is_list) {
      stack.push_back(list_of(argument, variables));
    } else {
      stack.push_back(argument.variable == kNone ? argument.constant : variables[argument.variable]);
    }
  }
  call.op->callBoxed(&stack);
  Results results(call, variables);
  for (IValue& value : stack) {
    if (value.isTensor()) {
      results.take(std::move(value));
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) {
        results.take(tensor);
      }
    }
  }
  results.end();
}

void call_python(const Call& call, const py::tuple& functions, const py::object& held, Variables& variables) {
  const py::gil_scoped_acquire locked;
  py::tuple given(call.arguments.size());
  for (size_t at = 0; at < call.arguments.size(); ++at) {
    given[at] = to_python(variables[call.arguments[at].variable]);
  }
  const auto found =
      py::reinterpret_steal<py::object>(PyObject_CallObject(functions[call.function].ptr(), given.ptr()));
  if (!found) {
    throw py::error_already_set();
  }
  Results results(call, variables);
  take_all(found, held, results);
  results.end();
}

}  // namespace fastvae

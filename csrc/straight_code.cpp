#include "straight_code.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/launch.h"
#include "common/operator.h"
#include "common/replay.h"

namespace fastvae {
namespace {

namespace py = pybind11;
using c10::IValue;
using torch::jit::Stack;

constexpr int64_t kNone = -1;
const std::string kOp = "fastvae::straight_code";

// Variables by number; what has died is empty.
using Variables = std::vector<IValue>;

// One argument of a call.
struct Argument {
  IValue constant;             // where it is one
  int64_t variable = kNone;    // a tensor, or another object of Python's
  std::vector<int64_t> items;  // a list of tensors
  bool is_list = false;
  bool may_lack = false;  // a list with places for no tensor
};

struct Call {
  std::optional<c10::OperatorHandle> op;
  int64_t function = kNone;  // of Python, by its place, where there is no operator
  std::vector<Argument> arguments;
  std::vector<int64_t> results;  // variables; kNone: nobody uses it
  std::vector<int64_t> gone;     // variables that nobody uses after it
};

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

// What one run leaves for another.
class Kept {
 public:
  Kept(std::vector<IValue> values, std::shared_ptr<const void> lease)
      : values(std::move(values)), lease(std::move(lease)) {}
  std::vector<IValue> values;
  std::shared_ptr<const void> lease;  // of their memory, or null; see common/replay.h
};

bool depends_on_numbers(const c10::OperatorHandle& op) {
  const bool is_index = op.schema().name() == "aten::index";  // by no mask: the recorder refuses those
  return (op.hasTag(at::Tag::dynamic_output_shape) && !is_index) || op.hasTag(at::Tag::data_dependent_output) ||
         op.hasTag(at::Tag::nondeterministic_seeded);
}

class StraightCode {
 public:
  // As fastvae/network/straight.py encodes it.
  StraightCode(const py::list& calls, int64_t variables, std::vector<int64_t> inputs, std::vector<int64_t> taken,
               std::vector<int64_t> outputs, std::vector<int64_t> kept, py::object held, bool leaves_inputs)
      : variables_(variables),
        inputs_(std::move(inputs)),
        taken_(std::move(taken)),
        outputs_(std::move(outputs)),
        kept_(std::move(kept)),
        held_(std::move(held)) {
    for (const py::handle each : calls) {
      calls_.push_back(decoded(py::reinterpret_borrow<py::tuple>(each)));
    }
    expect_variables();
    is_replayable_ = leaves_inputs && std::all_of(calls_.begin(), calls_.end(), [](const Call& call) {
                       return call.op.has_value() && !depends_on_numbers(*call.op);
                     });
    find_read_inputs();
  }

  // The outputs, and what is kept. The functions come with each run: whoever holds them here, no collector sees.
  py::tuple run(const py::tuple& functions, const py::sequence& given, const Kept* before) const {
    TORCH_CHECK(given.size() == inputs_.size(), "straight code: expected ", inputs_.size(), " inputs, got ",
                given.size());
    TORCH_CHECK((before == nullptr ? 0 : before->values.size()) == taken_.size(),
                "straight code: what was kept is not what is taken");
    Variables variables(variables_);
    for (size_t at = 0; at < inputs_.size(); ++at) {
      variables[inputs_[at]] = from_python(given[at]);
      if (variables[inputs_[at]].isTensor()) {
        refuse_transformed(kOp, variables[inputs_[at]].toTensor());
      }
    }
    for (size_t at = 0; at < taken_.size(); ++at) {
      variables[taken_[at]] = before->values[at];
    }
    if (is_replayable_ && (before == nullptr || before->lease != nullptr) && are_on_one_gpu(variables)) {
      return replay(variables);
    }
    run_calls(functions, variables);
    std::vector<IValue> kept;
    kept.reserve(kept_.size());
    for (const int64_t each : kept_) {
      kept.push_back(variables[each]);
    }
    return results_of([&](size_t at) { return variables[outputs_[at]]; }, std::move(kept), nullptr);
  }

  size_t size() const { return calls_.size(); }

 private:
  static Argument decoded_argument(const c10::FunctionSchema* schema, size_t at, const py::tuple& encoded) {
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

  void expect_variables() const {
    const auto expect = [this](const std::vector<int64_t>& numbers, int64_t least) {
      for (const int64_t number : numbers) {
        TORCH_CHECK_VALUE(number >= least && number < variables_, "straight code: expected a variable below ",
                          variables_, ", got ", number);
      }
    };
    expect(inputs_, 0);
    expect(taken_, 0);
    expect(outputs_, kNone);
    expect(kept_, 0);
    for (const Call& call : calls_) {
      for (const Argument& argument : call.arguments) {
        expect({argument.variable}, call.op.has_value() ? kNone : 0);
        expect(argument.items, argument.may_lack ? kNone : 0);
      }
      expect(call.results, kNone);
      expect(call.gone, 0);
    }
  }

  // (name, overload) or a function's place; arguments; results; gone.
  static Call decoded(const py::tuple& encoded) {
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

  // Of the inputs those that something is made of: no object of Python's, where no call is one of Python's.
  void find_read_inputs() {
    std::set<int64_t> read(outputs_.begin(), outputs_.end());
    read.insert(kept_.begin(), kept_.end());
    for (const Call& call : calls_) {
      for (const Argument& argument : call.arguments) {
        read.insert(argument.variable);
        read.insert(argument.items.begin(), argument.items.end());
      }
    }
    std::copy_if(inputs_.begin(), inputs_.end(), std::back_inserter(read_inputs_),
                 [&read](int64_t input) { return read.count(input) != 0; });
  }

  bool are_on_one_gpu(const Variables& variables) const {
    const auto is_there = [&](int64_t number) {
      return variables[number].isTensor() && runs_cuda(variables[number].toTensor()) &&
             variables[number].toTensor().device() == variables[read_inputs_[0]].toTensor().device();
    };
    return !read_inputs_.empty() && std::all_of(read_inputs_.begin(), read_inputs_.end(), is_there) &&
           std::all_of(taken_.begin(), taken_.end(), is_there);
  }

  // What a run returns: the outputs, of which `output` gives each, and what is kept, whose memory the lease is of.
  template <typename Output>
  py::tuple results_of(const Output& output, std::vector<IValue> kept, std::shared_ptr<const void> lease) const {
    py::tuple outputs(outputs_.size());
    for (size_t at = 0; at < outputs_.size(); ++at) {
      outputs[at] = outputs_[at] == kNone ? py::none() : to_python(output(at));
    }
    return py::make_tuple(std::move(outputs), std::make_unique<Kept>(std::move(kept), std::move(lease)));
  }

  py::tuple replay(const Variables& variables) const {
    std::vector<at::Tensor> given;
    for (const auto& numbers : {read_inputs_, taken_}) {
      for (const int64_t each : numbers) {
        given.push_back(variables[each].toTensor());
      }
    }
    Replayed run;
    std::vector<at::Tensor> owned;
    {
      const py::gil_scoped_release unlocked;
      const c10::DeviceGuard there(given[0].device());
      const at::AutoDispatchBelowADInplaceOrView no_views_to_track;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      run = replays_.run("", given, {0, taken_.size()},
                         [this](const std::vector<at::Tensor>& from) { return called(from); });
      const auto end = run.results.begin() + static_cast<int64_t>(outputs_.size());
      owned = kept_results({{run.results.begin(), end}, run.lease}, outputs_.size());
    }
    std::vector<IValue> kept(run.results.begin() + static_cast<int64_t>(outputs_.size()), run.results.end());
    const auto output = [&](size_t at) {
      // An input that is handed on is the caller's own.
      const bool is_input = std::find(inputs_.begin(), inputs_.end(), outputs_[at]) != inputs_.end();
      return is_input ? variables[outputs_[at]] : IValue(owned[at]);
    };
    return results_of(output, std::move(kept), std::move(run.lease));
  }

  // Outputs and what is kept of the inputs that are read and what is taken, where all calls are operators.
  std::vector<at::Tensor> called(const std::vector<at::Tensor>& from) const {
    Variables variables(variables_);
    for (size_t at = 0; at < from.size(); ++at) {
      variables[at < read_inputs_.size() ? read_inputs_[at] : taken_[at - read_inputs_.size()]] = from[at];
    }
    Stack stack;
    for (const Call& call : calls_) {
      call_operator(call, variables, stack);
      for (const int64_t each : call.gone) {
        variables[each] = IValue();
      }
    }
    std::vector<at::Tensor> results;
    for (const auto& numbers : {outputs_, kept_}) {
      for (const int64_t each : numbers) {
        results.push_back(each == kNone ? at::Tensor() : variables[each].toTensor());
      }
    }
    return results;
  }

  void run_calls(const py::tuple& functions, Variables& variables) const {
    const py::gil_scoped_release unlocked;
    // A function of Python's may ask autograd, and finds the keys that its caller had.
    const c10::impl::LocalDispatchKeySet usual = c10::impl::tls_local_dispatch_key_set();
    const at::AutoDispatchBelowADInplaceOrView no_views_to_track;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Stack stack;
    for (const Call& call : calls_) {
      if (call.op.has_value()) {
        call_operator(call, variables, stack);
      } else {
        const c10::impl::ForceDispatchKeyGuard as_usual(usual);
        call_python(call, functions, held_, variables);
      }
      for (const int64_t each : call.gone) {
        variables[each] = IValue();
      }
    }
  }

  std::vector<Call> calls_;
  bool is_replayable_ = false;
  mutable Replays replays_;
  int64_t variables_;
  std::vector<int64_t> inputs_, read_inputs_, taken_, outputs_, kept_;
  py::object held_;
};

// All of values that a sweep may depend on besides tensors' numbers, for comparison: bytes, and what is no tensor.
void append_forms(py::handle values, std::string& text, py::list& others) {
  for (const py::handle value : py::reinterpret_borrow<py::sequence>(values)) {
    if (THPVariable_Check(value.ptr())) {
      append_form(text, THPVariable_Unpack(value.ptr()));
    } else if (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value)) {
      append_number(text, -1);
      append_forms(value, text, others);
      append_number(text, -2);
    } else {
      append_number(text, -3);
      others.append(value);
    }
  }
}

py::tuple form_of(const py::sequence& values) {
  std::string text;
  py::list others;
  append_forms(values, text, others);
  return py::make_tuple(py::bytes(text), py::tuple(others));
}

// The place of the first tensor that is not dense, or has not the memory that it stands for; kNone: all are well.
int64_t first_without_memory(const std::vector<at::Tensor>& tensors) {
  for (size_t at = 0; at < tensors.size(); ++at) {
    const at::Tensor& tensor = tensors[at];
    if (tensor.layout() != at::kStrided) {
      return static_cast<int64_t>(at);
    }
    if (tensor.numel() == 0 || tensor.is_meta()) {
      continue;
    }
    int64_t reach = tensor.storage_offset() + 1;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      reach += (tensor.size(dim) - 1) * tensor.stride(dim);
    }
    if (reach * static_cast<int64_t>(tensor.element_size()) > static_cast<int64_t>(tensor.storage().nbytes())) {
      return static_cast<int64_t>(at);
    }
  }
  return kNone;
}

}  // namespace

void bind_straight_code(py::module_& m) {
  using py::arg;
  m.def("replay_counts", &replay_counts,
        "Captures and replays of CUDA graphs so far in this process, and the bytes that the graphs hold.");
  m.def("release_graphs", &release_graphs, py::call_guard<py::gil_scoped_release>(),
        "Forget all CUDA graphs of operators and straight code.");
  m.def("form_of", &form_of, arg("values"), "All of values, nested, that straight code depends on besides numbers.");
  m.def("first_without_memory", &first_without_memory, arg("tensors"),
        "The place of a tensor that is not dense or without the memory that it stands for; -1: none is.");
  py::class_<Kept>(m, "Kept", "What one run of straight code leaves for another.");
  py::class_<StraightCode>(m, "StraightCode", "Calls that were written down; see fastvae/network/straight.py.")
      .def(py::init<const py::list&, int64_t, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>,
                    std::vector<int64_t>, py::object, bool>(),
           arg("calls"), arg("variables"), arg("inputs"), arg("taken"), arg("outputs"), arg("kept"), arg("held"),
           arg("leaves_inputs"))
      .def("__call__", &StraightCode::run, arg("functions"), arg("given"), arg("before"))
      .def("__len__", &StraightCode::size);
}

}  // namespace fastvae

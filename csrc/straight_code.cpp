#include "straight_code.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/launch.h"
#include "common/operator.h"
#include "common/replay.h"
#include "straight_calls.h"

namespace fastvae {
namespace {

namespace py = pybind11;
using c10::IValue;
using torch::jit::Stack;

const std::string kOp = "fastvae::straight_code";

// What one run leaves for another.
class Kept {
 public:
  Kept(std::vector<IValue> values, std::shared_ptr<const void> lease)
      : values(std::move(values)), lease(std::move(lease)) {}
  std::vector<IValue> values;
  std::shared_ptr<const void> lease;  // of their memory, or null; see common/replay.h
};

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
      calls_.push_back(decoded_call(py::reinterpret_borrow<py::tuple>(each)));
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

// The calls of straight code: what one is, how Python writes it, and how it is made.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fastvae {

constexpr int64_t kNone = -1;

// Variables by number; what has died is empty.
using Variables = std::vector<c10::IValue>;

// One argument of a call.
struct Argument {
  c10::IValue constant;        // where it is one
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

// (name, overload) or a function's place; arguments; results; gone.
Call decoded_call(const pybind11::tuple& encoded);
// Whether it may do something else where numbers are others, or draws some.
bool depends_on_numbers(const c10::OperatorHandle& op);

// As a variable, and back: a tensor, or another object of Python's; what has died is None.
c10::IValue from_python(pybind11::handle object);
pybind11::object to_python(const c10::IValue& value);

// The stack is room for arguments and results.
void call_operator(const Call& call, Variables& variables, torch::jit::Stack& stack);
// Its results: tensors, and objects of the kind `held`, in tuples and lists.
void call_python(const Call& call, const pybind11::tuple& functions, const pybind11::object& held,
                 Variables& variables);

}  // namespace fastvae

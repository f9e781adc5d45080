// What an extension that emulates CUDA says of its launches (setup.py, FASTVAE_EMULATE_CUDA): how often each kernel of
// ours was launched; and, where it is asked to write them down, each launch of a call in order, PyTorch's among them.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <set>
#include <sstream>
#include <vector>

#include "emulated_memory.h"
#include "host_cuda.h"

namespace fastvae {
namespace {

namespace py = pybind11;

// unfold_kernel<float, 4, int>
std::string name_of(const void* kernel) {
  Dl_info found{};
  if (dladdr(kernel, &found) == 0 || found.dli_sname == nullptr) {
    return "a kernel without a name";
  }
  char* const demangled = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
  std::string name = demangled == nullptr ? found.dli_sname : demangled;
  std::free(demangled);
  // "void fastvae::cuda::NAME<TYPES>(ARGUMENTS)", of whose types some have parentheses.
  size_t end = 0;
  for (int depth = 0; end < name.size() && (depth > 0 || name[end] != '('); ++end) {
    depth += name[end] == '<' ? 1 : (name[end] == '>' ? -1 : 0);
  }
  name.resize(end);
  const std::string space = "fastvae::cuda::";
  const size_t begin = name.find(space);
  return begin == std::string::npos ? name : name.substr(begin + space.size());
}

std::map<std::string, int64_t> launches() {
  const std::lock_guard<std::mutex> lock(host_cuda::mutex);
  std::map<std::string, int64_t> found;
  for (const auto& [kernel, known] : host_cuda::kernels) {
    if (known.launches > 0) {
      found[name_of(kernel)] += known.launches;
    }
  }
  return found;
}

void reset_launches() {
  const std::lock_guard<std::mutex> lock(host_cuda::mutex);
  for (auto& [kernel, known] : host_cuda::kernels) {
    known.launches = 0;
  }
}

// --- written down ----------------------------------------------------------------------------------------------------

// A launch of ours, or a call of PyTorch's: its name, and all that it is called with but numbers of tensors.
struct Written {
  host_cuda::Launch launch{};
  int64_t strangers = 0;  // addresses among its arguments that are none of a tensor's memory
  std::string op, form;
};
std::vector<Written> written;
std::mutex written_mutex;

void write(Written&& one) {
  const std::lock_guard<std::mutex> lock(written_mutex);
  written.push_back(std::move(one));
}

void append_value(std::ostream& text, const c10::IValue& value) {
  if (value.isTensor()) {
    const at::Tensor& tensor = value.toTensor();
    if (tensor.defined()) {
      text << tensor.scalar_type() << tensor.sizes() << tensor.strides();
    }
  } else if (value.isList()) {
    for (const c10::IValue& each : value.toListRef()) {
      append_value(text, each);
      text << ',';
    }
  } else if (!value.isGenerator()) {
    text << value;
  }
  text << ';';
}

// Whether a GPU would have something to do: neither calls of others, nor views, nor memory that is asked for.
bool computes(const c10::OperatorHandle& op) {
  static const std::set<std::string> nothing = {
      "aten::empty",          "aten::empty_like",   "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
      "aten::empty_permuted", "aten::_unsafe_view", "aten::resize_",       "aten::set_",      "aten::lift_fresh",
      "aten::is_same_size",   "aten::equal_shapes", "aten::result_type"};
  const auto& returns = op.schema().returns();
  const auto is_view = [](const c10::Argument& one) {
    return one.alias_info() != nullptr && !one.alias_info()->isWrite();
  };
  return op.schema().name().rfind("aten::", 0) == 0 && nothing.count(op.schema().name()) == 0 &&
         !op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) &&
         !std::any_of(returns.begin(), returns.end(), is_view);
}

// What a call calls in its turn is the CPU's way.
thread_local int inside = 0;
struct Inside final : at::ObserverContext {};

std::unique_ptr<at::ObserverContext> begin_call(const at::RecordFunction& call) {
  const auto name = call.operator_name();
  const auto op = name ? c10::Dispatcher::singleton().findOp(*name) : std::nullopt;
  if (!op || !computes(*op)) {
    return nullptr;
  }
  if (inside++ == 0) {
    std::ostringstream form;
    for (const c10::IValue& value : call.inputs()) {
      append_value(form, value);
    }
    write({{}, 0, op->schema().name() + "." + op->schema().overload_name(), form.str()});
  }
  return std::make_unique<Inside>();
}

void end_call(const at::RecordFunction&, at::ObserverContext* context) { inside -= context == nullptr ? 0 : 1; }

void write_launches(bool on) {
  static at::CallbackHandle handle = 0;
  if (handle != 0) {
    at::removeCallback(handle);
    handle = 0;
  }
  {
    const std::lock_guard<std::mutex> lock(host_cuda::mutex);
    host_cuda::note = nullptr;
    if (on) {
      host_cuda::note = [](host_cuda::Launch&& launch) {
        const int64_t strangers = DeviceMemory::one().strangers(launch.arguments);
        write({std::move(launch), strangers, {}, {}});
      };
    }
  }
  if (on) {
    handle = at::addGlobalCallback(
        at::RecordFunctionCallback(&begin_call, &end_call).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  }
}

py::list taken_launches() {
  std::vector<Written> found;
  {
    const std::lock_guard<std::mutex> lock(written_mutex);
    found.swap(written);
  }
  py::list taken;
  for (const Written& each : found) {
    const host_cuda::Launch& launch = each.launch;
    if (launch.kernel == nullptr) {
      taken.append(py::make_tuple(each.op, each.form));
    } else {
      taken.append(py::make_tuple(name_of(launch.kernel), launch.blocks, launch.threads, launch.shared_bytes,
                                  launch.moved_bytes, each.strangers, py::bytes(launch.arguments)));
    }
  }
  return taken;
}

}  // namespace

void bind_emulation(py::module_& m) {
  DeviceMemory::install();
  m.def("emulated_launches", &launches, "How often each CUDA kernel was launched since the last reset, by its name.");
  m.def("reset_emulated_launches", &reset_launches, "From now on no kernel was launched.");
  m.def("write_emulated_launches", &write_launches, py::arg("on"), "From now on write launches down, or no longer.");
  m.def(
      "taken_emulated_launches", &taken_launches,
      "Those written down since the last call, in order. Of ours: name, blocks, threads, dynamic shared memory, bytes "
      "that it has to move, addresses among its arguments that are no memory of a living tensor, their bytes. Of "
      "PyTorch's: operator, and what it was called with.");
}

}  // namespace fastvae

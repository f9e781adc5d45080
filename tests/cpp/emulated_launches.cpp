// What an extension that emulates CUDA says of its launches (setup.py, FASTVAE_EMULATE_CUDA).
#include <cxxabi.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "host_cuda.h"

namespace fastvae {
namespace {

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

}  // namespace

void bind_emulation(pybind11::module_& m) {
  m.def("emulated_launches", &launches, "How often each CUDA kernel was launched since the last reset, by its name.");
  m.def("reset_emulated_launches", &reset_launches, "From now on no kernel was launched.");
}

}  // namespace fastvae

// Checks that name the op, the argument, what was expected and what came.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>

namespace fastvae {

inline std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return "an undefined tensor";
  }
  return c10::str(tensor.sizes(), " ", tensor.scalar_type(), " on ", tensor.device());
}

// ValueError for shapes and values, TypeError for dtypes.
#define FASTVAE_CHECK_VALUE(CONDITION, OP, ARGUMENT, EXPECTED, GOT) \
  TORCH_CHECK_VALUE(CONDITION, "fastvae::", OP, ": ", ARGUMENT, ": expected ", EXPECTED, ", got ", GOT)
#define FASTVAE_CHECK_TYPE(CONDITION, OP, ARGUMENT, EXPECTED, GOT) \
  TORCH_CHECK_TYPE(CONDITION, "fastvae::", OP, ": ", ARGUMENT, ": expected ", EXPECTED, ", got ", GOT)

// A dense tensor with the memory that its sizes and strides reach: its owner may have emptied it, storage().resize_(0).
inline void check_storage(const char* op, const char* argument, const at::Tensor& tensor) {
  if (tensor.is_meta() || !tensor.has_storage()) {
    return;  // no kernel takes these
  }
  const size_t needed = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size(),
                                                         static_cast<size_t>(tensor.storage_offset()));
  FASTVAE_CHECK_VALUE(needed <= tensor.storage().nbytes(), op, argument,
                      c10::str("a storage of at least ", needed, " bytes"),
                      c10::str(tensor.storage().nbytes(), " bytes behind ", describe(tensor)));
}

// A dense tensor whose numbers lie there as they are: not a view that stands for their negative or conjugate.
inline void check_memory(const char* op, const char* argument, const at::Tensor& tensor) {
  FASTVAE_CHECK_VALUE(tensor.layout() == at::kStrided, op, argument, "a dense tensor", tensor.layout());
  FASTVAE_CHECK_VALUE(!tensor.is_neg() && !tensor.is_conj(), op, argument,
                      "a tensor without lazy negation or conjugation (resolve_neg, resolve_conj)", describe(tensor));
  check_storage(op, argument, tensor);
}

// Such a tensor on a device that this build has kernels for.
inline void check_device(const char* op, const char* argument, const at::Tensor& tensor) {
  check_memory(op, argument, tensor);
#ifdef FASTVAE_WITH_CUDA
  const bool supported = tensor.is_cpu() || tensor.is_cuda();
  const char* expected = "a CPU or CUDA tensor";
#else
  const bool supported = tensor.is_cpu();
  const char* expected =
      "a CPU tensor, because this build of fastvae has no CUDA kernels (install nvcc and a CUDA build of torch, then "
      "run in a checkout of fastvae: FASTVAE_CUDA=1 pip install .)";
#endif
  FASTVAE_CHECK_VALUE(supported, op, argument, expected, describe(tensor));
}

// A float32 or float64 one.
inline void check_floating(const char* op, const char* argument, const at::Tensor& tensor) {
  FASTVAE_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, op, argument,
                     "float32 or float64", describe(tensor));
  check_device(op, argument, tensor);
}

inline void check_like(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& model,
                       const char* model_name) {
  FASTVAE_CHECK_TYPE(tensor.scalar_type() == model.scalar_type(), op, argument,
                     c10::str(model.scalar_type(), " as ", model_name), describe(tensor));
  FASTVAE_CHECK_VALUE(tensor.device() == model.device(), op, argument, c10::str(model.device(), " as ", model_name),
                      describe(tensor));
  check_memory(op, argument, tensor);
}

inline void check_sizes(const char* op, const char* argument, const at::Tensor& tensor, at::IntArrayRef sizes) {
  FASTVAE_CHECK_VALUE(tensor.sizes() == sizes, op, argument, c10::str("shape ", sizes), describe(tensor));
}

}  // namespace fastvae

// A product of matrices as torch.matmul gives it, by the kernel where that is faster (common/product.h): for the sweeps
// in Python.
#include "../common/product.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <vector>

#include "../common/check.h"

namespace fastvae {
namespace {

// What only ATen can do: tensors that are transformed, traced or recorded, and other dtypes and devices.
bool is_for_kernel(const at::Tensor& tensor, const at::Tensor& like) {
  return tensor.is_cpu() && tensor.scalar_type() == like.scalar_type() && tensor.layout() == at::kStrided &&
         !tensor.is_neg() && !at::isTensorSubclassLike(tensor) &&
         !(c10::GradMode::is_enabled() && tensor.requires_grad()) && !tensor._fw_grad(/*level=*/0).defined();
}

// [..., m, k] [k, n] -> [..., m, n]
at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b) {
  FASTVAE_CHECK_VALUE(a.device() == b.device(), "matrix_product", "b", c10::str("a tensor on ", a.device()),
                      describe(b));
  const bool floating = a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble;
  if (!floating || a.dim() < 2 || b.dim() != 2 || a.size(-1) != b.size(0) || !is_for_kernel(a, a) ||
      !is_for_kernel(b, a) || !are_products_ours()) {
    return a.matmul(b);
  }
  if (a.dim() == 2) {
    return product(a, b);
  }
  std::vector<int64_t> sizes = a.sizes().vec();
  sizes.back() = b.size(1);
  return product(a.flatten(0, -2), b).view(sizes);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae_internal, m) { m.def("matrix_product(Tensor a, Tensor b) -> Tensor", &matrix_product); }

}  // namespace fastvae

// Products of matrices on either device: our kernel's on a CPU whose registers BLAS does not use, else ATen's. Both
// follow torch.set_float32_matmul_precision: at "medium" operands are rounded to bfloat16 where the processor gains by
// it.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastvae {

// out = a b of matrices, or out += a b; out may be a view, and is returned.
const at::Tensor& multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
const at::Tensor& add_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

// out[i] = a[i] b[i], or out[i] = c[i] + a[i] b[i], where c broadcasts.
const at::Tensor& multiply_each(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
const at::Tensor& multiply_each(const at::Tensor& out, const at::Tensor& c, const at::Tensor& a, const at::Tensor& b);

// Whether the products of this process on a CPU are our kernel's. By the processor: an AMD with AVX-512, of which MKL
// uses half [measured, Zen 5]; or by FASTVAE_PRODUCTS, "kernel" (where there is AVX-512) or "library".
bool are_products_ours();

}  // namespace fastvae

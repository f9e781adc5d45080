#include "product.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>
#include <type_traits>

#include "../kernels/cpu/bfloat16_product.h"
#include "../kernels/cpu/matrix_product.h"
#include "aten.h"
#include "launch.h"

namespace fastvae {
namespace {

// FLOPs below which threads are not worth waking.
constexpr int64_t kSplitWork = int64_t{1} << 21;

bool is_amd() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("amd") != 0;
#else
  return false;
#endif
}

// c's rows lie in order; a and b as they come.
template <typename T>
cpu::MatrixProduct<T> product_of(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  return {a.const_data_ptr<T>(),     a.stride(-2),   a.stride(-1), b.const_data_ptr<T>(), b.stride(-2), b.stride(-1),
          out.mutable_data_ptr<T>(), out.stride(-2), out.size(-2), out.size(-1),          a.size(-1),   accumulate};
}

template <typename T>
cpu::MatrixProduct<T> rows_from(const cpu::MatrixProduct<T>& product, int64_t first, int64_t count) {
  cpu::MatrixProduct<T> part = product;
  part.a += first * part.a_m;
  part.c += first * part.c_m;
  part.m = count;
  return part;
}

template <typename T>
cpu::MatrixProduct<T> columns_from(const cpu::MatrixProduct<T>& product, int64_t first, int64_t count) {
  cpu::MatrixProduct<T> part = product;
  part.b += first * part.b_n;
  part.c += first;
  part.n = count;
  return part;
}

// How much longer than a part of a fair split the longest one is.
double imbalance(int64_t units, int64_t threads) {
  return static_cast<double>((units + threads - 1) / threads * threads) / static_cast<double>(units);
}

template <typename T>
using ProductKernel = void (*)(const cpu::MatrixProduct<T>&);

// In bfloat16 only where torch.set_float32_matmul_precision("medium") asks for it.
template <typename T>
ProductKernel<T> product_kernel() {
  if constexpr (std::is_same_v<T, float>) {
    if (cpu::kMultipliesBfloat16 &&
        at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL) ==
            at::Float32Precision::BF16) {
      return &cpu::bfloat16_product;
    }
  }
  return &cpu::matrix_product;
}

// Threads take columns, so that each copies its own panels of b, or rows where those are the fairer split.
template <typename T>
void split_product(ProductKernel<T> multiply, const cpu::MatrixProduct<T>& product) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads == 1 || 2 * product.m * product.n * product.k < kSplitWork) {
    multiply(product);
    return;
  }
  const auto split = [&](int64_t size, int64_t unit, auto part) {
    const int64_t units = (size + unit - 1) / unit;
    at::parallel_for(0, units, (units + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * unit;
      multiply(part(product, first, std::min(end * unit, size) - first));
    });
  };
  constexpr int64_t kColumns = cpu::kProductColumns<T>;
  const int64_t panels = (product.n + kColumns - 1) / kColumns,
                blocks = (product.m + cpu::kWideRows - 1) / cpu::kWideRows;
  if (imbalance(blocks, threads) + 0.1 < imbalance(panels, threads)) {
    split(product.m, cpu::kWideRows, rows_from<T>);
  } else {
    split(product.n, kColumns, columns_from<T>);
  }
}

// A dispatch mode, which counts FLOPs perhaps, is shown ATen's products.
bool is_ours(const at::Tensor& out, const at::Tensor& a) {
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Python)) {
    return false;
  }
  const bool in_rows = out.size(-1) == 1 || out.stride(-1) == 1;
  return out.is_cpu() && !runs_cuda(out) && are_products_ours() && in_rows && out.numel() > 0 && a.size(-1) > 0;
}

void product_by_kernel(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  FASTVAE_DISPATCH(out, { split_product(product_kernel<scalar_t>(), product_of<scalar_t>(out, a, b, accumulate)); });
}

void products_by_kernel(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  const int64_t count = out.size(0), work = 2 * out.size(1) * out.size(2) * a.size(2);
  FASTVAE_DISPATCH(out, {
    const ProductKernel<scalar_t> multiply = product_kernel<scalar_t>();
    const auto first = product_of<scalar_t>(out, a, b, accumulate);
    const auto each = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        cpu::MatrixProduct<scalar_t> product = first;
        product.a += i * a.stride(0);
        product.b += i * b.stride(0);
        product.c += i * out.stride(0);
        split_product(multiply, product);
      }
    };
    if (count < at::get_num_threads()) {
      each(0, count);
    } else {
      at::parallel_for(0, count, std::max<int64_t>(1, kSplitWork / std::max<int64_t>(1, work)), each);
    }
  });
}

}  // namespace

bool are_products_ours() {
  static const bool ours = [] {
    const char* chosen = std::getenv("FASTVAE_PRODUCTS");
    const std::string_view products = chosen == nullptr ? "" : chosen;
    TORCH_CHECK_VALUE(products.empty() || products == "kernel" || products == "library",
                      "fastvae: the environment variable FASTVAE_PRODUCTS: expected 'kernel' or 'library', got '",
                      products, "'");
    return cpu::kWideRegisters && (products == "kernel" || (products.empty() && is_amd()));
  }();
  return ours;
}

const at::Tensor& multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (!is_ours(out, a)) {
    return aten::mm_out(out, a, b);
  }
  product_by_kernel(out, a, b, /*accumulate=*/false);
  return out;
}

const at::Tensor& add_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (!is_ours(out, a)) {
    return out.addmm_(a, b);
  }
  product_by_kernel(out, a, b, /*accumulate=*/true);
  return out;
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return multiply(aten::empty({a.size(0), b.size(1)}, a.options()), a, b);
}

const at::Tensor& multiply_each(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (!is_ours(out, a)) {
    return aten::bmm_out(out, a, b);
  }
  products_by_kernel(out, a, b, /*accumulate=*/false);
  return out;
}

const at::Tensor& multiply_each(const at::Tensor& out, const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
  if (!is_ours(out, a)) {
    return aten::baddbmm_out(out, c, a, b);
  }
  out.copy_(c.expand_as(out));
  products_by_kernel(out, a, b, /*accumulate=*/true);
  return out;
}

}  // namespace fastvae

// KL(q || p) between diagonal Gaussians: check, allocate, launch.
#include "gaussian_kl.h"

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/operator.h"

namespace fastvae {
namespace {

at::Tensor tensor_or_undefined(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }

// The four parts [B, d]; mu_p and logvar_p both undefined or neither.
void check_gaussians(const char* op, const at::Tensor& mu_q, const at::Tensor& logvar_q, const at::Tensor& mu_p,
                     const at::Tensor& logvar_p) {
  check_floating(op, "mu_q", mu_q);
  FASTVAE_CHECK_VALUE(mu_q.dim() == 2, op, "mu_q", "shape [B, d]", describe(mu_q));
  check_like(op, "logvar_q", logvar_q, mu_q, "mu_q");
  check_sizes(op, "logvar_q", logvar_q, mu_q.sizes());
  FASTVAE_CHECK_VALUE(mu_p.defined() == logvar_p.defined(), op, mu_p.defined() ? "logvar_p" : "mu_p",
                      "both of mu_p and logvar_p, or neither", "only the other");
  if (mu_p.defined()) {
    check_like(op, "mu_p", mu_p, mu_q, "mu_q");
    check_sizes(op, "mu_p", mu_p, mu_q.sizes());
    check_like(op, "logvar_p", logvar_p, mu_q, "mu_q");
    check_sizes(op, "logvar_p", logvar_p, mu_q.sizes());
  }
}

at::Tensor dense(const at::Tensor& tensor) { return tensor.defined() ? tensor.contiguous() : tensor; }

}  // namespace

at::Tensor gaussian_kl(const at::Tensor& mu_q, const at::Tensor& logvar_q, const OptionalTensor& mu_p,
                       const OptionalTensor& logvar_p) {
  constexpr const char* op = "gaussian_kl";
  const at::Tensor mean = tensor_or_undefined(mu_p), logvar = tensor_or_undefined(logvar_p);
  const EntryGuard guard(op, mu_q);
  check_gaussians(op, mu_q, logvar_q, mean, logvar);
  const at::Tensor mu_q_ = dense(mu_q), logvar_q_ = dense(logvar_q), mu_p_ = dense(mean), logvar_p_ = dense(logvar);
  at::Tensor kl = aten::empty({mu_q.size(0)}, mu_q.options());
  FASTVAE_DISPATCH(mu_q, {
    GaussianKl<scalar_t> args{};
    args.mu_q = mu_q_.const_data_ptr<scalar_t>();
    args.logvar_q = logvar_q_.const_data_ptr<scalar_t>();
    args.mu_p = data_or_null<scalar_t>(mu_p_);
    args.logvar_p = data_or_null<scalar_t>(logvar_p_);
    args.kl = kl.mutable_data_ptr<scalar_t>();
    args.samples = mu_q.size(0);
    args.dim = mu_q.size(1);
    FASTVAE_LAUNCH(gaussian_kl, mu_q.device(), args, args.samples, args.dim);
  });
  return kl;
}

namespace {

// Gradients to the four (the last two empty where there is no p).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gaussian_kl_backward(const at::Tensor& grad,
                                                                                const at::Tensor& mu_q,
                                                                                const at::Tensor& logvar_q,
                                                                                const OptionalTensor& mu_p,
                                                                                const OptionalTensor& logvar_p) {
  constexpr const char* op = "gaussian_kl_backward";
  const at::Tensor mean = tensor_or_undefined(mu_p), logvar = tensor_or_undefined(logvar_p);
  const EntryGuard guard(op, mu_q);
  check_gaussians(op, mu_q, logvar_q, mean, logvar);
  check_like(op, "grad", grad, mu_q, "mu_q");
  check_sizes(op, "grad", grad, mu_q.sizes().slice(0, 1));
  const at::Tensor grad_ = dense(grad);
  const at::Tensor mu_q_ = dense(mu_q), logvar_q_ = dense(logvar_q), mu_p_ = dense(mean), logvar_p_ = dense(logvar);
  const std::vector<int64_t> none{0};
  const at::IntArrayRef of_p = mean.defined() ? mu_q.sizes() : at::IntArrayRef(none);
  at::Tensor grad_mu_q = aten::empty(mu_q.sizes(), mu_q.options());
  at::Tensor grad_logvar_q = aten::empty(mu_q.sizes(), mu_q.options());
  at::Tensor grad_mu_p = aten::empty(of_p, mu_q.options());
  at::Tensor grad_logvar_p = aten::empty(of_p, mu_q.options());
  FASTVAE_DISPATCH(mu_q, {
    GaussianKlBackward<scalar_t> args{};
    args.grad = grad_.const_data_ptr<scalar_t>();
    args.mu_q = mu_q_.const_data_ptr<scalar_t>();
    args.logvar_q = logvar_q_.const_data_ptr<scalar_t>();
    args.mu_p = data_or_null<scalar_t>(mu_p_);
    args.logvar_p = data_or_null<scalar_t>(logvar_p_);
    args.grad_mu_q = grad_mu_q.mutable_data_ptr<scalar_t>();
    args.grad_logvar_q = grad_logvar_q.mutable_data_ptr<scalar_t>();
    args.grad_mu_p = mean.defined() ? grad_mu_p.mutable_data_ptr<scalar_t>() : nullptr;
    args.grad_logvar_p = mean.defined() ? grad_logvar_p.mutable_data_ptr<scalar_t>() : nullptr;
    args.samples = mu_q.size(0);
    args.dim = mu_q.size(1);
    FASTVAE_LAUNCH(gaussian_kl_backward, mu_q.device(), args, args.samples, args.dim);
  });
  return {grad_mu_q, grad_logvar_q, grad_mu_p, grad_logvar_p};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_operator<&gaussian_kl>(m,
                                "gaussian_kl(Tensor mu_q, Tensor logvar_q, Tensor? mu_p, Tensor? logvar_p) -> Tensor",
                                differentiable<&gaussian_kl, Calls<&gaussian_kl_backward>>());
  define_operator<&gaussian_kl_backward>(
      m,
      "gaussian_kl_backward(Tensor grad, Tensor mu_q, Tensor logvar_q, Tensor? mu_p, Tensor? logvar_p) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      differentiated_once("gaussian_kl"));
}

}  // namespace fastvae

// log q(z) of the mixture of posteriors, and of its marginals: check, allocate, launch.
#include "../kernels/aggregate_posterior.h"

#include <cmath>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/operator.h"

namespace fastvae {
namespace {

// The tensors as kernels read them.
struct Mixture {
  Mixture(const char* op, const at::Tensor& z_, const at::Tensor& mu_, const at::Tensor& logvar_) {
    check_floating(op, "z", z_);
    FASTVAE_CHECK_VALUE(z_.dim() == 2, op, "z", "shape [M, d]", describe(z_));
    check_like(op, "mu", mu_, z_, "z");
    FASTVAE_CHECK_VALUE(mu_.dim() == 2 && mu_.size(1) == z_.size(1), op, "mu", c10::str("shape [N, ", z_.size(1), "]"),
                        describe(mu_));
    FASTVAE_CHECK_VALUE(mu_.size(0) > 0, op, "mu", "at least one posterior", describe(mu_));
    check_like(op, "logvar", logvar_, z_, "z");
    check_sizes(op, "logvar", logvar_, mu_.sizes());
    z = z_.contiguous();
    mu = mu_.contiguous();
    logvar = logvar_.contiguous();
    precision = logvar.neg().exp_();
  }
  int64_t codes() const { return z.size(0); }
  int64_t components() const { return mu.size(0); }
  int64_t dim() const { return z.size(1); }

  // What the arguments of all kernels share.
  template <typename T, typename Args>
  void give(Args& args) const {
    args.z = z.const_data_ptr<T>();
    args.mu = mu.const_data_ptr<T>();
    args.logvar = logvar.const_data_ptr<T>();
    args.precision = precision.const_data_ptr<T>();
    args.codes = codes();
    args.components = components();
    args.dim = dim();
    args.log_components = static_cast<T>(std::log(static_cast<double>(components())));
  }

  at::Tensor z, mu, logvar, precision;
};

// log q(z) [M] and log q(z_j) [M, d].
std::tuple<at::Tensor, at::Tensor> aggregate_posterior(const at::Tensor& z, const at::Tensor& mu,
                                                       const at::Tensor& logvar) {
  constexpr const char* op = "aggregate_posterior";
  const EntryGuard guard(op, z);
  const Mixture mixture(op, z, mu, logvar);
  at::Tensor log_q = aten::empty({mixture.codes()}, z.options());
  at::Tensor log_marginals = aten::empty(z.sizes(), z.options());
  FASTVAE_DISPATCH(z, {
    AggregatePosterior<scalar_t> args{};
    mixture.give<scalar_t>(args);
    args.log_q = log_q.mutable_data_ptr<scalar_t>();
    args.log_marginals = log_marginals.mutable_data_ptr<scalar_t>();
    FASTVAE_LAUNCH(aggregate_posterior, z.device(), args, args.codes, args.components * args.dim);
  });
  return {log_q, log_marginals};
}

// Gradients to z, mu and logvar; empty where none is needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> aggregate_posterior_backward(
    const at::Tensor& grad_log_q, const at::Tensor& grad_log_marginals, const at::Tensor& z, const at::Tensor& mu,
    const at::Tensor& logvar, const at::Tensor& log_q, const at::Tensor& log_marginals, at::IntArrayRef needs) {
  constexpr const char* op = "aggregate_posterior_backward";
  const EntryGuard guard(op, z);
  const Mixture mixture(op, z, mu, logvar);
  const at::IntArrayRef rows = z.sizes().slice(0, 1);
  const auto read = [&](const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
    check_like(op, name, tensor, z, "z");
    check_sizes(op, name, tensor, sizes);
    return tensor.contiguous();
  };
  const at::Tensor of_log_q = read("grad_log_q", grad_log_q, rows);
  const at::Tensor of_marginals = read("grad_log_marginals", grad_log_marginals, z.sizes());
  const at::Tensor log_q_ = read("log_q", log_q, rows);
  const at::Tensor log_marginals_ = read("log_marginals", log_marginals, z.sizes());
  FASTVAE_CHECK_VALUE(needs.size() == 3, op, "needs", "3 flags", needs.size());
  const bool to_codes = needs[0] != 0, to_components = needs[1] != 0 || needs[2] != 0;
  const std::vector<int64_t> none{0};
  const auto room = [&](bool wanted, const at::Tensor& like) {
    return aten::empty(wanted ? like.sizes() : at::IntArrayRef(none), z.options());
  };
  at::Tensor grad_z = room(to_codes, z), grad_mu = room(to_components, mu), grad_logvar = room(to_components, mu);
  FASTVAE_DISPATCH(z, {
    const auto give = [&](auto& args) {
      mixture.give<scalar_t>(args);
      args.of_log_q = of_log_q.const_data_ptr<scalar_t>();
      args.of_marginals = of_marginals.const_data_ptr<scalar_t>();
      args.log_q = log_q_.const_data_ptr<scalar_t>();
      args.log_marginals = log_marginals_.const_data_ptr<scalar_t>();
    };
    if (to_codes) {
      AggregateToCodes<scalar_t> args{};
      give(args);
      args.grad_z = grad_z.mutable_data_ptr<scalar_t>();
      FASTVAE_LAUNCH(aggregate_to_codes, z.device(), args, args.codes, args.components * args.dim);
    }
    if (to_components) {
      AggregateToComponents<scalar_t> args{};
      give(args);
      args.grad_mu = grad_mu.mutable_data_ptr<scalar_t>();
      args.grad_logvar = grad_logvar.mutable_data_ptr<scalar_t>();
      FASTVAE_LAUNCH(aggregate_to_components, z.device(), args, args.components, args.codes * args.dim);
    }
  });
  return {grad_z, needs[1] != 0 ? grad_mu : room(false, mu), needs[2] != 0 ? grad_logvar : room(false, mu)};
}

struct AggregateGradient : Calls<&aggregate_posterior_backward> {
  static constexpr std::array<size_t, 2> kKept{0, 1};

  static variable_list gradient(const Recorded<2>& recorded, const at::Tensor& z, const at::Tensor& mu,
                                const at::Tensor& logvar) {
    return flattened(Op<&aggregate_posterior_backward>::call(recorded.grads[0], recorded.grads[1], z, mu, logvar,
                                                             recorded.kept[0], recorded.kept[1], recorded.needs));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_operator<&aggregate_posterior>(
      m, "aggregate_posterior(Tensor z, Tensor mu, Tensor logvar) -> (Tensor log_q, Tensor log_marginals)",
      differentiable<&aggregate_posterior, AggregateGradient>());
  define_operator<&aggregate_posterior_backward>(
      m,
      "aggregate_posterior_backward(Tensor grad_log_q, Tensor grad_log_marginals, Tensor z, Tensor mu, Tensor logvar, "
      "Tensor log_q, Tensor log_marginals, int[] needs) -> (Tensor, Tensor, Tensor)",
      differentiated_once("aggregate_posterior"));
}

}  // namespace fastvae

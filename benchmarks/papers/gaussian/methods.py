"""The methods: each gives samples of its ELBO, which are logarithms of importance weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae.models.tempering import fixed_alpha
from fastvae.ops import leapfrog_kick_drift, leapfrog_kick_temper

from .model import DTYPE, LOG_2PI, Data, Theta


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=generator)


class Method(nn.Module):
    """Samples of log w with E w = p(x): the ELBO is their mean.

    Args:
        data: the problems.
    """

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.data = data

    noise_draws = 1
    """Independent standard normal tensors that a sample is made of."""

    def draw(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Noise of n samples: [noise_draws, n, C]."""
        return normal((self.noise_draws, num_samples, self.data.layout.num_columns), generator)

    def log_weight(self, theta: Theta, noise: Tensor) -> Tensor:
        """[n, P] for theta [C] or [n, C]; differentiable in theta and in the method's own parameters."""
        raise NotImplementedError

    def elbo(self, theta: Theta, num_samples: int, generator: torch.Generator) -> Tensor:
        """Estimate of the ELBO of each problem, whose gradient training follows: [P]."""
        return self.log_weight(theta, self.draw(num_samples, generator)).mean(0)


class Hamiltonian(Method):
    """Hamiltonian importance sampling (the paper's algorithm 1) with the leapfrog ops and an analytic force.

    z_0 ~ N(base_mean, base_scale^2) (the paper's choice here is the prior), gamma_0 ~ N(0, I),
    rho_0 = gamma_0 / sqrt(beta_0); after K tempered leapfrog steps

        log w = log p(x, z_K) - |rho_K|^2 / 2 - log q(z_0) + |gamma_0|^2 / 2,

    because the momenta's normalising constants cancel and prod alpha_k^2 = beta_0 cancels the volume.

    Args:
        data: the problems.
        num_steps: K.
        tempering: "none", "fixed" or "free" for each problem, as in ``fastvae.HVAE``.
        step_size: initial step, learnt per dimension within (0, max_step_size): a number or [C].
        max_step_size: a number or [C].
        beta_0: initial inverse temperature; the paper's code starts from rho_0 = 5 gamma_0.
        base_mean, base_scale: of q(z_0), a number or [C]; not learnt.
    """

    noise_draws = 2

    def __init__(
        self,
        data: Data,
        num_steps: int,
        tempering: Sequence[str],
        *,
        step_size: float | Tensor = 0.005,
        max_step_size: float | Tensor = 0.5,
        beta_0: float = 1 / 25,
        base_mean: float | Tensor = 0.0,
        base_scale: float | Tensor = 1.0,
    ) -> None:
        super().__init__(data)
        columns, problems = data.layout.num_columns, len(data.layout.dims)
        self.num_steps = num_steps
        self.max_step_size = max_step_size
        self.base_mean = torch.zeros(columns, dtype=DTYPE) + base_mean
        self.base_scale = torch.zeros(columns, dtype=DTYPE) + base_scale
        share = torch.as_tensor(step_size / max_step_size, dtype=DTYPE).expand(columns)
        self.step_logit = nn.Parameter(share.logit())
        self.beta_0_logit = nn.Parameter(torch.full((problems,), beta_0, dtype=DTYPE).logit())
        each = torch.full((num_steps, problems), beta_0 ** (0.5 / num_steps), dtype=DTYPE)
        self.alpha_logit = nn.Parameter(each.logit())
        self.is_free = torch.tensor([kind == "free" for kind in tempering])
        self.is_fixed = torch.tensor([kind == "fixed" for kind in tempering])

    @property
    def step_size(self) -> Tensor:
        return self.max_step_size * torch.sigmoid(self.step_logit)

    def alpha(self) -> Tensor:
        """The factor on each problem's momentum at each step: [K, P]."""
        fixed = torch.vmap(fixed_alpha, (0, None), 1)(torch.sigmoid(self.beta_0_logit), self.num_steps)
        untempered = torch.where(self.is_fixed, fixed, torch.ones_like(fixed))
        return torch.where(self.is_free, torch.sigmoid(self.alpha_logit), untempered)

    def log_weight(self, theta: Theta, noise: Tensor) -> Tensor:
        layout = self.data.layout
        start, gamma = noise
        alpha, eps = self.alpha(), self.step_size
        z = self.base_mean + self.base_scale * start
        # 1 / sqrt(beta_0) = prod 1 / alpha_k for every kind of tempering.
        rho = gamma * layout.spread(alpha.log().sum(0).neg().exp())
        force_at = self.data.force(theta)
        force = force_at(z)
        for alpha_k in (alpha if alpha.shape[1] == 1 else layout.spread(alpha)).unbind(0):
            z, rho = leapfrog_kick_drift(z, rho, force, eps)
            force = force_at(z)
            rho = kick_temper(rho, force, eps, alpha_k)
        # start and gamma stand for -log q(z_0) and +|gamma_0|^2 / 2, up to q's normalising constant.
        ends = 0.5 * (start.square() + gamma.square() - rho.square() + LOG_2PI) + self.base_scale.log()
        return self.data.log_joint(z, theta) + layout.total(ends)


def kick_temper(rho: Tensor, force: Tensor, step_size: Tensor, alpha: Tensor) -> Tensor:
    """The op, whose alpha is one number; or, for alpha [C], problems that each temper in their own way."""
    if alpha.numel() == 1:
        return leapfrog_kick_temper(rho, force, step_size, alpha)
    return alpha * leapfrog_kick_temper(rho, force, step_size, 1.0)


class MeanField(Method):
    """Mean-field variational Bayes: q(z) = N(mu, diag(scale^2)), which holds the exact posterior here.

    Args:
        data: the problems.
        closed_form: train on the ELBO in closed form (no noise, as the paper's code does) instead of
            reparametrised samples.
        mean, scale: of q at the start, a number or [C]; the paper's code starts from 0 and e.
        learn: whether q is learnt; otherwise it stays where it started.
    """

    def __init__(
        self,
        data: Data,
        *,
        closed_form: bool,
        mean: float | Tensor = 0.0,
        scale: float | Tensor = math.e,
        learn: bool = True,
    ) -> None:
        super().__init__(data)
        self.closed_form = closed_form
        start = torch.zeros(data.layout.num_columns, dtype=DTYPE)
        self.mu = nn.Parameter(start + mean, requires_grad=learn)
        self.log_scale = nn.Parameter((start + scale).log(), requires_grad=learn)

    def log_weight(self, theta: Theta, noise: Tensor) -> Tensor:
        (start,) = noise
        z = self.mu + self.log_scale.exp() * start
        entropy = self.log_scale + 0.5 * (start.square() + LOG_2PI)
        return self.data.log_joint(z, theta) + self.data.layout.total(entropy)

    def elbo(self, theta: Theta, num_samples: int, generator: torch.Generator) -> Tensor:
        if not self.closed_form:
            return super().elbo(theta, num_samples, generator)
        curvature = 1 + self.data.num_data * theta.precision
        variance = torch.exp(2 * self.log_scale)
        per_column = self.log_scale + 0.5 * (1 + LOG_2PI - curvature * variance)
        return self.data.log_joint(self.mu[None], theta)[0] + self.data.layout.total(per_column)


class Planar(Method):
    """Planar flows from the prior (Rezende, Mohamed, ICML 2015): z <- z + u tanh(w.z + b), a w, u, b a layer.

    u is replaced by u + (softplus(w.u) - 1 - w.u) w / |w|^2, which keeps each layer invertible (their
    appendix). The flow of the HVAE paper's code shares one w, u, b among its layers and leaves out the 1/2 of
    the squared residual in its ELBO, which alone makes its sigma sqrt(2) too large; neither is done here.

    Args:
        data: the problems.
        num_layers: layers of the flow.
        generator: of the initial values, N(0, 0.1^2).
    """

    def __init__(self, data: Data, num_layers: int, generator: torch.Generator) -> None:
        super().__init__(data)
        columns, problems = data.layout.num_columns, len(data.layout.dims)
        self.w = nn.Parameter(0.1 * normal((num_layers, columns), generator))
        self.u = nn.Parameter(0.1 * normal((num_layers, columns), generator))
        self.b = nn.Parameter(torch.full((num_layers, problems), 0.1, dtype=DTYPE))

    def log_weight(self, theta: Theta, noise: Tensor) -> Tensor:
        layout = self.data.layout
        (start,) = noise
        wu = layout.total(self.w * self.u)
        contraction = F.softplus(wu) - 1
        u = self.u + layout.spread((contraction - wu) / layout.total(self.w.square())) * self.w
        z, log_det = start, start.new_zeros(())
        for layer in range(len(self.w)):
            activation = torch.tanh(layout.total(self.w[layer] * z) + self.b[layer])
            z = z + u[layer] * layout.spread(activation)
            log_det = log_det + torch.log1p(contraction[layer] * (1 - activation.square()))
        entropy = layout.total(0.5 * (start.square() + LOG_2PI))
        return self.data.log_joint(z, theta) + entropy + log_det

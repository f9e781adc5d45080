"""The Gaussian model: one latent vector behind a whole data set, and everything about it in closed form.

    z ~ N(0, I_d),    x_i | z ~ N(z + Delta, diag(sigma^2)),    i = 1..N

Only the mean and the sum of squares of the data enter, so no step costs O(N). All dimensions are independent
given Delta and sigma, so many problems (several d, several data sets) lie side by side in the columns of one
tensor, and a training step of all of them costs one walk through the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DTYPE = torch.float64
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Layout:
    """Problems side by side: column j of a [..., C] tensor is one dimension of one problem.

    Args:
        dims: d of each of the P problems.
    """

    dims: tuple[int, ...]

    @property
    def num_columns(self) -> int:
        return sum(self.dims)

    @cached_property
    def owner(self) -> Tensor:
        """The problem of each column: [C], int64."""
        return torch.arange(len(self.dims)).repeat_interleave(torch.tensor(self.dims))

    def total(self, values: Tensor) -> Tensor:
        """Sum over the dimensions of each problem: [..., C] -> [..., P]."""
        empty = values.new_zeros(*values.shape[:-1], len(self.dims))
        return empty.scatter_add(-1, self.owner.expand(values.shape), values)

    def spread(self, values: Tensor) -> Tensor:
        """One number a problem repeated over its dimensions: [..., P] -> [..., C]."""
        # Not values[..., owner], whose backward pass goes column by column.
        return values.gather(-1, self.owner.expand(*values.shape[:-1], -1))

    def columns(self, problem: int) -> slice:
        start = sum(self.dims[:problem])
        return slice(start, start + self.dims[problem])


@dataclass(frozen=True)
class Theta:
    """The parameters that are learnt: Delta and log sigma, [C] or [n, C] (sigma: standard deviations)."""

    delta: Tensor
    log_sigma: Tensor

    @property
    def precision(self) -> Tensor:
        return torch.exp(-2 * self.log_sigma)


@dataclass(frozen=True)
class Data:
    """Sufficient statistics of the data of each column."""

    layout: Layout
    num_data: int
    mean: Tensor
    """[C] mean over the data set"""
    scatter: Tensor
    """[C] sum over the data set of (x - mean)^2"""

    def log_joint(self, z: Tensor, theta: Theta) -> Tensor:
        """log p(x, z), summed over the data set, of each problem: z [n, C] -> [n, P], in nats."""
        residual = self.mean - theta.delta - z
        log_px = -0.5 * theta.precision * (self.scatter + self.num_data * residual.square())
        constant = self.num_data * (theta.log_sigma + 0.5 * LOG_2PI)
        return self.layout.total(log_px - constant - 0.5 * (z.square() + LOG_2PI))

    def force(self, theta: Theta) -> Callable[[Tensor], Tensor]:
        """The function z -> grad_z log p(x, z) = N Sigma^-1 (mean - Delta - z) - z: [n, C] -> [n, C]."""
        ratio = self.num_data * theta.precision
        pull, stiffness = ratio * (self.mean - theta.delta), 1 + ratio
        return lambda z: torch.addcmul(pull, stiffness, z, value=-1)

    def log_evidence(self, theta: Theta) -> Tensor:
        """log p(x) of each problem, exact: [P].

        Over z the likelihood is a normal density in z with variance sigma^2 / N around mean - Delta, so that

            log p(x) = sum_j  - N/2 log(2 pi sigma_j^2) - scatter_j / (2 sigma_j^2)
                              - 1/2 log(1 + N / sigma_j^2) - (mean_j - Delta_j)^2 / (2 (1 + sigma_j^2 / N)).
        """
        ratio = self.num_data * theta.precision
        shift = (self.mean - theta.delta).square()
        constant = self.num_data * (theta.log_sigma + 0.5 * LOG_2PI)
        spread = 0.5 * (theta.precision * self.scatter + torch.log1p(ratio) + shift * ratio / (1 + ratio))
        return self.layout.total(-constant - spread)

    def posterior(self, theta: Theta) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of p(z | x): [C], [C]."""
        ratio = self.num_data * theta.precision
        return (self.mean - theta.delta) * ratio / (1 + ratio), (1 + ratio).rsqrt()

    def evidence_maximiser(self) -> Theta:
        """The Delta and sigma at which the evidence is largest: Delta = mean, and sigma^2 = s solves

        N s^2 + (N (N - 1) - scatter) s - N scatter = 0.
        """
        n = float(self.num_data)
        b = n * (n - 1) - self.scatter
        # The root without cancellation: b > 0 unless sigma is near sqrt(N).
        s = 2 * n * self.scatter / (b + (b.square() + 4 * n * n * self.scatter).sqrt())
        return Theta(self.mean, 0.5 * s.log())


def true_theta(layout: Layout) -> Theta:
    """The paper's: Delta = (-(d-1)/2 .. (d-1)/2) / 5, sigma a parabola from 1 to 0.1 to 1 (1 if d = 1)."""
    deltas, sigmas = [], []
    for d in layout.dims:
        centred = torch.arange(d, dtype=DTYPE) - (d - 1) / 2
        deltas.append(centred / 5)
        sigmas.append(torch.ones(1, dtype=DTYPE) if d == 1 else 0.1 + 3.6 * (centred / (d - 1)).square())
    return Theta(torch.cat(deltas), torch.cat(sigmas).log())


def sample_data(dims: Sequence[int], seeds: Sequence[int], num_data: int) -> Data:
    """A data set for each problem, of its own z: the problem's d and seed alone decide it.

    Args:
        dims, seeds: [P] each; see ``Layout``.
        num_data: N.
    """
    layout = Layout(tuple(dims))
    means, scatters = [], []
    for d, seed in zip(dims, seeds, strict=True):
        theta = true_theta(Layout((d,)))
        generator = torch.Generator().manual_seed(1_000_003 * d + seed)
        z = torch.randn(d, dtype=DTYPE, generator=generator)
        noise = torch.randn(num_data, d, dtype=DTYPE, generator=generator)
        x = z + theta.delta + theta.log_sigma.exp() * noise
        means.append(x.mean(0))
        scatters.append((x - x.mean(0)).square().sum(0))
    return Data(layout, num_data, torch.cat(means), torch.cat(scatters))

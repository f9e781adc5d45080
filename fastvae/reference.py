"""Every operator in plain PyTorch: the oracle of the tests and the baseline of the benchmarks.

Nothing here is fused or lowered, so any decoder that PyTorch can differentiate twice is accepted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvae._elbo_reference import ElboTerms, elbo, elbo_terms, gaussian_kl, iwae_bound
from fastvae._jacobian_reference import jacobian_l1, resolve_latents
from fastvae._second_order import (
    check_output,
    check_twice,
    needs_a_graph,
    no_gradient,
    own_leaf,
    twice_differentiable,
)
from fastvae.decoding import conditioned, natural_parameters, transformed
from fastvae.likelihoods import Likelihood, resolve
from fastvae.likelihoods.fused import base_measure
from fastvae.likelihoods.weighted import weighted
from fastvae.likelihoods.weights import expanded

__all__ = [
    "AggregatePosterior",
    "ElboTerms",
    "Trajectory",
    "aggregate_posterior",
    "elbo",
    "elbo_terms",
    "expand_step_size",
    "gaussian_kl",
    "grad_dot",
    "hamiltonian_flow",
    "hamiltonian_flow_2k",
    "iwae_bound",
    "jacobian_l1",
    "leapfrog_kick_drift",
    "leapfrog_kick_temper",
    "log_px",
    "log_px_and_force",
    "resolve_latents",
    "trajectory",
]

Decoder = Callable[[Tensor], Tensor]
StepSize = Tensor | float | Sequence[float]

_OUTPUTS_AT_ONCE = {"cpu": 2**20}
"""Decoder outputs held at once where nothing asks for all of them. Larger tensors leave the caches of a CPU, and their
memory goes back to the system each time."""
_OUTPUTS_ELSEWHERE = 2**22


class AggregatePosterior(NamedTuple):
    """Log densities, in nats, of M codes under a mixture of posteriors."""

    log_q: Tensor
    """log q(z): [M]."""
    log_marginals: Tensor
    """log q(z_j) of each coordinate: [M, d]."""


class Trajectory(NamedTuple):
    """Every point of a leapfrog trajectory of K steps, detached.

    Entry 0 is the start; rho of a step is the momentum after tempering.
    """

    z: Tensor
    """[K + 1, B, d]"""
    rho: Tensor
    """[K + 1, B, d]"""
    log_px: Tensor
    """[K + 1, B]"""

    def energy(self) -> Tensor:
        """H = -log p(x | z) + |z|^2 / 2 + |rho|^2 / 2 of every point, in nats: [K + 1, B]."""
        return (self.z.square() + self.rho.square()).flatten(2).sum(2) / 2 - self.log_px


def expand_step_size(step_size: StepSize, num_steps: int, dim: int, like: Tensor) -> Tensor:
    """The step of every leapfrog step and dimension.

    Args:
        step_size: a number or a tensor [] or [1] for all; [d] per dimension; [K, 1] per step; or [K, d].
        num_steps: K.
        dim: d.
        like: tensor whose dtype and device the result takes.

    Returns:
        [K, d], a view of ``step_size`` (no copy) where dtype and device agree; gradients reach ``step_size``.

    Raises:
        ValueError: another shape.
    """
    eps = torch.as_tensor(step_size, dtype=like.dtype, device=like.device)
    allowed = {(), (1,), (dim,), (num_steps, 1), (num_steps, dim), (1, 1), (1, dim)}
    if tuple(eps.shape) not in allowed:
        hint = (
            "; for one step size a step pass step_size[:, None]" if tuple(eps.shape) == (num_steps,) else ""
        )
        raise ValueError(
            f"step_size: expected a number, [d], [K, 1] or [K, d] with K = {num_steps} and d = {dim}, "
            f"got {list(eps.shape)}{hint}"
        )
    return eps.expand(num_steps, dim)


def steps_of_codes(step_size: StepSize, num_steps: int, z: Tensor) -> Tensor:
    """:func:`expand_step_size` for z [B, ...]: [K, ...]. A step may also have the shape of a code, or [K] such.

    Of [K] such, sizes of 1 are broadcast.
    """
    rank = z.dim() - 1
    eps = torch.as_tensor(step_size, dtype=z.dtype, device=z.device)
    several = eps.dim() == rank + 1 and all(
        a in (1, b) for a, b in zip(eps.shape[1:], z.shape[1:], strict=True)
    )
    if rank > 1 and (several or eps.shape[-rank:] == z.shape[1:]):
        eps = eps.expand(*eps.shape[:-rank], *z.shape[1:]).flatten(-rank)
    return expand_step_size(eps, num_steps, math.prod(z.shape[1:]), z).reshape(num_steps, *z.shape[1:])


def leapfrog_kick_drift(
    z: Tensor, rho: Tensor, force: Tensor, step_size: Tensor | float
) -> tuple[Tensor, Tensor]:
    """First half of a leapfrog step: rho_half = rho + eps/2 force; z_next = z + eps rho_half.

    Args:
        z, rho, force: [B, d]; force = grad_z log p(x, z), minus the gradient of the potential.
        step_size: number, [] or [d].

    Returns:
        (z_next [B, d], rho_half [B, d])
    """
    rho_half = rho + 0.5 * step_size * force
    return z + step_size * rho_half, rho_half


def leapfrog_kick_temper(
    rho_half: Tensor, force: Tensor, step_size: Tensor | float, alpha: Tensor | float
) -> Tensor:
    """Second half of a leapfrog step: rho_next = alpha (rho_half + eps/2 force), force taken at z_next.

    Args:
        rho_half, force: [B, d].
        step_size: number, [] or [d].
        alpha: number or []; 1 is the untempered leapfrog.

    Returns:
        rho_next [B, d]
    """
    return alpha * (rho_half + 0.5 * step_size * force)


class _Force:
    """log p(x | z) and force grad_z log p(x | z) - z, by autograd; ``name`` of the operator, for errors."""

    def __init__(
        self, name: str, decoder: Decoder, x: Tensor, likelihood: Likelihood, create_graph: bool
    ) -> None:
        self.name, self.decoder, self.x, self.likelihood = name, decoder, x, likelihood
        self.create_graph, self.checked = create_graph, False

    def log_px(self, z: Tensor) -> Tensor:
        with twice_differentiable():
            params = natural_parameters(self.decoder, z, self.likelihood)
        check_output(self.name, params, len(z))
        return self.likelihood.log_prob(params, self.x)

    def without_prior(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(x | z), its gradient, and the point that gradients of both lead to: z, or a leaf in its place."""
        with torch.enable_grad():
            # A leaf that needs no gradient outside still needs one for its own force.
            point = z if self.create_graph and z.requires_grad else own_leaf(z)
            log_px = self.log_px(point)
            if not log_px.requires_grad:
                raise no_gradient(self.name)
            (gradient,) = torch.autograd.grad(
                log_px.sum(), point, create_graph=self.create_graph, allow_unused=True
            )
        if gradient is None:
            raise no_gradient(self.name)
        if self.create_graph and not self.checked:
            check_twice(self.name, gradient, point)
            self.checked = True
        return log_px if self.create_graph else log_px.detach(), gradient, point

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_px, gradient, point = self.without_prior(z)
        return log_px, gradient - (point if self.create_graph else z)


def log_px_and_force(
    decoder: Decoder,
    z: Tensor,
    x: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    weight: Tensor | None = None,
    create_graph: bool = True,
) -> tuple[Tensor, Tensor]:
    """As :func:`fastvae.ops.log_px_and_force`, by autograd: differentiable as often as PyTorch can, also inside
    torch.func transforms and in forward mode.

    Args:
        decoder: any callable [B, ...] -> decoder output that PyTorch can differentiate (twice, with ``create_graph``).
        z: [B, d] or [B, ...], float32 or float64.
        x: [B, ...] data, with as many elements a sample as the likelihood needs.
        likelihood: a name or a Likelihood; ``Bernoulli(probs=True)`` if the decoder returns probabilities.
        weight: [B, ...] of x's elements; see :func:`fastvae.ops.log_px_and_force`.
        create_graph: keep the graph, so that the results can be differentiated; without it, and under ``no_grad`` or
            ``inference_mode``, both are detached.

    Returns:
        log p(x | z) [B] and grad_z log p(x | z), of the shape of z.

    Raises:
        ValueError: shapes that do not fit, or an output without a gradient to z.
        NotImplementedError: the decoder cannot be differentiated twice.
    """
    like = weighted("log_px_and_force", resolve(likelihood), weight, x)
    if z.dim() < 2 or not z.is_floating_point():
        raise ValueError(
            f"log_px_and_force: z: expected a floating tensor [B, d], got {z.dtype} {list(z.shape)}"
        )
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return log_px_and_force(decoder, z.clone(), x.clone(), like, create_graph=False)
    create_graph = create_graph and torch.is_grad_enabled()
    force = _Force("log_px_and_force", decoder, x, like, create_graph)
    if transformed():
        log_px, pull, *_ = torch.func.vjp(force.log_px, z)
        return log_px, pull(torch.ones_like(log_px))[0]
    if not len(z):
        # Of no rows a convolution has no graph; the gradient of none is none.
        with torch.set_grad_enabled(create_graph):
            return force.log_px(z), z.clone()
    with torch.set_grad_enabled(create_graph):
        log_px, gradient, point = force.without_prior(z)
    # Nothing but our own leaf would get a gradient; a tangent of forward mode stays.
    if create_graph and point is not z and forward_ad._current_level < 0 and not needs_a_graph(log_px, point):
        return log_px.detach(), gradient.detach()
    return log_px, gradient


def check_state(z: Tensor, rho: Tensor, alpha: Tensor) -> None:
    """Raise ValueError unless z and rho are codes [B, d], or [B, ...], and alpha is [K]."""
    if z.dim() < 2 or not z.is_floating_point():
        raise ValueError(
            f"hamiltonian_flow: z: expected a floating tensor [B, d], got {z.dtype} {list(z.shape)}"
        )
    if rho.shape != z.shape or rho.dtype != z.dtype:
        raise ValueError(
            f"hamiltonian_flow: rho: expected {z.dtype} {list(z.shape)} as z, "
            f"got {rho.dtype} {list(rho.shape)}"
        )
    if alpha.dim() != 1:
        raise ValueError(f"hamiltonian_flow: alpha: expected [K], got {list(alpha.shape)}")


def hamiltonian_flow(
    decoder: Decoder,
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: StepSize,
    alpha: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    weight: Tensor | None = None,
    return_trajectory: bool = False,
    create_graph: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """K tempered leapfrog steps of the Hamiltonian VAE, with K + 1 force evaluations.

    Caterini, Doucet, Sejdinovic, Hamiltonian Variational Auto-Encoder, NeurIPS 2018, Algorithm 1: with
    G(z) = grad_z log p(x, z),

        rho~ = rho_k + eps/2 G(z_k);  z_{k+1} = z_k + eps rho~
        rho_{k+1} = alpha_k (rho~ + eps/2 G(z_{k+1}))

    Args:
        decoder: any callable [B, d] -> decoder output that PyTorch can differentiate twice.
        z, rho: [B, d] start and momentum, float32 or float64.
        x: [B, ...] data, with as many elements a sample as the likelihood needs.
        step_size: number, [d], [K, 1] or [K, d].
        alpha: [K], the factor on the momentum at the end of each step.
        likelihood: a name or a Likelihood; ``Bernoulli(probs=True)`` if the decoder returns probabilities.
        weight: [B, ...] of x's elements; see :func:`fastvae.ops.hamiltonian_flow`.
        return_trajectory: deprecated, see :func:`trajectory`: also return the detached ``Trajectory``.
        create_graph: keep the graph of every force, so that the result can be differentiated; without it, and
            under ``no_grad`` or ``inference_mode``, all results are detached.

    Returns:
        (z_K [B, d], rho_K [B, d], log p(x | z_K) [B]).

    Raises:
        ValueError: shapes that do not fit.
    """
    like = weighted("hamiltonian_flow", resolve(likelihood), weight, x)
    arguments = decoder, z, rho, x, step_size, alpha, like
    if not return_trajectory:
        return flow_and_points(*arguments, create_graph=create_graph)[0]
    warnings.warn(
        "fastvae.reference.hamiltonian_flow: return_trajectory goes with the next release; "
        "fastvae.reference.trajectory returns the trajectory",
        DeprecationWarning,
        stacklevel=2,
    )
    end, points = flow_and_points(*arguments, create_graph=create_graph, keep_points=True)
    return (*end, points)  # type: ignore[return-value]


def trajectory(
    decoder: Decoder,
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: StepSize,
    alpha: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    weight: Tensor | None = None,
) -> Trajectory:
    """Every point of :func:`hamiltonian_flow`'s trajectory, detached; the same arguments."""
    like = weighted("trajectory", resolve(likelihood), weight, x)
    arguments = decoder, z, rho, x, step_size, alpha, like
    points = flow_and_points(*arguments, create_graph=False, keep_points=True)[1]
    assert points is not None
    return points


def flow_and_points(
    decoder: Decoder,
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: StepSize,
    alpha: Tensor,
    likelihood: Likelihood,
    *,
    create_graph: bool = True,
    keep_points: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], Trajectory | None]:
    """What ``hamiltonian_flow`` returns, and with ``keep_points`` every point, detached; the same arguments."""
    # Inference tensors cannot be saved for a backward pass, and the force is one: leave the mode with copies.
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            z, rho, x, alpha = (t.clone() for t in (z, rho, x, alpha))
            step_size = step_size.clone() if isinstance(step_size, Tensor) else step_size
            arguments = decoder, z, rho, x, step_size, alpha, likelihood
            return flow_and_points(*arguments, create_graph=False, keep_points=keep_points)
    create_graph = create_graph and torch.is_grad_enabled()
    check_state(z, rho, alpha)
    eps = steps_of_codes(step_size, len(alpha), z)
    force_at = _Force("hamiltonian_flow", decoder, x, likelihood, create_graph)
    with torch.set_grad_enabled(create_graph):
        log_px, force = force_at(z)
        points = [(z, rho, log_px)]
        for k in range(len(alpha)):
            z, rho = leapfrog_kick_drift(z, rho, force, eps[k])
            log_px, force = force_at(z)
            rho = leapfrog_kick_temper(rho, force, eps[k], alpha[k])
            if keep_points:
                points.append((z, rho, log_px))
    if not keep_points:
        return (z, rho, log_px), None
    columns = zip(*points, strict=True)
    return (z, rho, log_px), Trajectory(*(torch.stack([t.detach() for t in column]) for column in columns))


def hamiltonian_flow_2k(
    decoder: Decoder,
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: StepSize,
    alpha: Tensor,
    likelihood: str | Likelihood = "bernoulli",
) -> tuple[Tensor, Tensor, Tensor]:
    """``hamiltonian_flow`` as it is usually written: two forces a step and a last decode, 2K + 1 decoder
    passes.

    Same arguments, same result, differentiable; the baseline of the benchmarks.
    """
    like = resolve(likelihood)
    check_state(z, rho, alpha)
    eps = steps_of_codes(step_size, len(alpha), z)
    force_at = _Force("hamiltonian_flow", decoder, x, like, create_graph=torch.is_grad_enabled())
    for k in range(len(alpha)):
        z, rho = leapfrog_kick_drift(z, rho, force_at(z)[1], eps[k])
        rho = leapfrog_kick_temper(rho, force_at(z)[1], eps[k], alpha[k])
    return z, rho, force_at.log_px(z)


def log_px(
    decoder: Callable[..., Tensor],
    z: Tensor,
    x: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """As ``fastvae.ops.log_px``: log p(x_b | z_sb), [S, B], for z [S, B, ...]; differentiable here.

    The decoder runs in parts of about 2**20 outputs (on a GPU 2**22), of one draw or of several.
    """
    return log_px_in_parts(decoder, z, x, resolve(likelihood), condition, weight)


def log_px_in_parts(
    decoder: Callable[..., Tensor],
    z: Tensor,
    x: Tensor,
    like: Likelihood,
    condition: Tensor | None,
    weight: Tensor | None,
    fused: Callable[[Likelihood, Tensor, Tensor, Tensor | None], Tensor | None] | None = None,
) -> Tensor:
    """``log_px``; by ``fused``, which is ``relative_log_prob``, where it knows the likelihood."""
    weight = None if weight is None else expanded("log_px", weight, x)
    draws, samples = z.shape[:2]
    outputs = max(1, math.prod(x.shape[1:]) * like.values_per_element)
    rows = max(1, _OUTPUTS_AT_ONCE.get(z.device.type, _OUTPUTS_ELSEWHERE) // outputs)
    together = max(1, rows // max(1, samples))

    def part(first: int, start: int) -> Tensor:
        codes, data = z[first : first + together, start : start + rows], x[start : start + rows]
        repeated = data.expand(len(codes), *data.shape).flatten(0, 1)
        given = None if condition is None else condition[start : start + rows]
        params = natural_parameters(conditioned(decoder, given), codes.flatten(0, 1), like)
        check_output("log_px", params, len(repeated))
        own = None if weight is None else weight[start : start + rows]
        own = None if own is None else own.expand(len(codes), *own.shape).flatten(0, 1)
        found = None if fused is None else fused(like, params, repeated, own)
        if found is not None:
            base = base_measure(
                like, data, found.dtype, None if weight is None else weight[start : start + rows]
            )
            found = found.reshape(codes.shape[:2])
            return found if base is None else found + base
        return weighted("log_px", like, own, repeated).log_prob(params, repeated).reshape(codes.shape[:2])

    found = [
        torch.cat([part(first, start) for start in range(0, samples, rows)], 1)
        for first in range(0, draws if samples else 0, together)
    ]
    return torch.cat(found) if found else z.new_empty(draws, samples)


def grad_dot(
    inputs_a: Tensor | Sequence[Tensor],
    output_grads_a: Tensor | Sequence[Tensor],
    inputs_b: Tensor | Sequence[Tensor],
    output_grads_b: Tensor | Sequence[Tensor],
    bias: bool | Sequence[bool] = True,
) -> Tensor:
    """Dot products [N, M] of per-sample gradients of affine layers; see :func:`fastvae.ops.grad_dot`."""
    lists = [
        [f] if isinstance(f, Tensor) else f for f in (inputs_a, output_grads_a, inputs_b, output_grads_b)
    ]
    flags = [bias] * len(lists[0]) if isinstance(bias, bool) else bias
    total: Tensor | float = 0.0
    for *factors, flag in zip(*lists, flags, strict=True):
        h_a, delta_a, h_b, delta_b = (f.unsqueeze(1) if f.dim() == 2 else f for f in factors)
        of_inputs = torch.einsum("nti,mui->ntmu", h_a, h_b)
        of_grads = torch.einsum("nto,muo->ntmu", delta_a, delta_b)
        total = total + ((of_inputs + flag) * of_grads).sum((1, 3))
    assert isinstance(total, Tensor)
    return total


def aggregate_posterior(z: Tensor, mu: Tensor, logvar: Tensor) -> AggregatePosterior:
    """As :func:`fastvae.ops.aggregate_posterior`: of z [M, d] under N posteriors, with M N d densities in memory."""
    gap = z[:, None] - mu
    densities = -0.5 * (gap.square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))
    log_q = torch.logsumexp(densities.sum(2), 1) - math.log(len(mu))
    return AggregatePosterior(log_q, torch.logsumexp(densities, 1) - math.log(len(mu)))

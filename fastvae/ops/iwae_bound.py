"""The importance-weighted bound of many samples, in the memory of a few."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import reference
from fastvae._compiling import is_compiling
from fastvae._elbo_reference import IWAE_ESTIMATORS, bound_at, log_px_of_codes, posterior_of
from fastvae._extension import raw
from fastvae.arguments import expect_choice, expect_integers
from fastvae.decoding import transformed
from fastvae.likelihoods import Likelihood, resolve
from fastvae.likelihoods.fused import fused_log_prob
from fastvae.lowering import CoupledSamples, LoweredNetwork, UnsupportedLayer, lower
from fastvae.lowering.checks import check_uncoupled, has_hooks
from fastvae.lowering.effects import has_no_effects
from fastvae.noise import Stream, draws_of
from fastvae.ops._registration import check_bound, check_condition, check_tensors

__all__ = ["is_tileable", "iwae_bound", "noise_of", "tiled_bound"]

Noise = Callable[[int, int], Tensor]
"""(first, count) -> standard normal [count, B, d], the same whenever it is asked."""

# Codes whose activations are held at once: products gain nothing beyond.
_CODES_AT_ONCE = 4096
_OUTPUTS_AT_ONCE = 2**22


def iwae_bound(
    encoder: nn.Module,
    decoder: nn.Module,
    x: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    num_samples: int,
    estimator: str = "standard",
    beta: float = 1.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """log 1/K sum_k w_k in nats, log w_k = log p(x | z_k) + beta (log p(z_k) - log q(z_k | x)), z_k ~ q(z | x).

    Burda, Grosse and Salakhutdinov, Importance weighted autoencoders, ICLR 2016, equation 8. Memory does not grow with
    K but for one number a sample and draw: weights come in tiles, their noise keyed so that it is drawn again, and the
    gradient is that of each tile, decoded once more, scaled by its normalised weights: two passes forward and one back.
    Kernels run it where :func:`fastvae.lowering.lower` can take the decoder and the likelihood has some.

    Args:
        encoder: from x to [B, 2 d], mean before log variance, or the pair (mu [B, d], logvar [B, d]); it runs as it is.
        decoder: from codes [N, d] to natural parameters, each sample by itself.
        x: data [B, ...]; float, uint8 or bool.
        likelihood: "bernoulli", "gaussian", "categorical" or a :class:`fastvae.likelihoods.Likelihood`.
        num_samples: K.
        estimator: of the encoder's gradient: "standard", "stl" (Roeder, Wu, Duvenaud, NeurIPS 2017) or "dreg" (Tucker,
            Lawson, Gu, Maddison, ICLR 2019, equation 8); the value and the decoder's gradient are the same.
        beta: see above.
        noise: standard normal [K, B, d] in place of a draw.
        generator: source of the noise.
        condition: [B, ...], handed to both networks after x and z.
        weight: [B, ...] of x's elements in log p(x | z), as for the models.

    Returns:
        [B], differentiable once, to every parameter. Under autocast, ``torch.func`` and ``torch.compile``, of an x
        whose gradient is wanted, and of a decoder that couples its samples, that hooks watch or whose own forward may
        do more than compute its result in training mode, it is :func:`fastvae.reference.iwae_bound`, whose memory grows
        with K.

    Raises:
        ValueError: shapes that do not fit, num_samples below 1, a beta that is not finite, an unknown estimator.
        TypeError: an x that is no tensor, num_samples that is not a number.
        NotImplementedError: a second derivative; use :func:`fastvae.reference.iwae_bound`.
    """
    check_bound("iwae_bound", encoder, decoder, beta)
    check_tensors("iwae_bound", x=x, **({} if noise is None else {"noise": noise}))
    expect_integers("fastvae::iwae_bound", 1, num_samples=num_samples)
    expect_choice("fastvae::iwae_bound", IWAE_ESTIMATORS, estimator=estimator)
    if x.dim() == 0:
        raise ValueError("fastvae::iwae_bound: x: expected shape [B, ...], got []")
    check_condition("iwae_bound", condition, len(x))
    like, draws = resolve(likelihood), int(num_samples)
    dtype = noise.dtype if noise is not None else _dtype_of(decoder)
    owner, besides = "fastvae::iwae_bound", (condition, weight)
    mu, logvar = posterior_of(owner, encoder, x, like, dtype, *besides)
    if noise is not None and noise.shape != (draws, *mu.shape):
        raise ValueError(
            f"fastvae::iwae_bound: noise: expected {[draws, *mu.shape]}, got {list(noise.shape)}"
        )
    source = noise_of(mu, noise, generator)
    options: dict[str, Any] = {"estimator": estimator, "beta": beta}
    if not is_tileable(decoder, x):
        log_px = log_px_of_codes(owner, decoder, x, like, *besides, fused_log_prob)
        return bound_at(mu, logvar, source(0, draws).to(mu), log_px, **options)
    return tiled_bound(
        decoder, x, mu, logvar, source, draws, like, condition=condition, weight=weight, **options
    )


def tiled_bound(
    decoder: nn.Module,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    noise: Noise,
    num_samples: int,
    likelihood: Likelihood,
    *,
    estimator: str,
    beta: float,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The bound [B] of a posterior; see :func:`iwae_bound`."""
    density: _Density | None = None
    if condition is None and weight is None:
        density = _Kernels.of(decoder, x, mu, likelihood)
    if density is None:
        density = _Autograd(decoder, x, likelihood, condition, weight)
    bound: Tensor = _Bound.apply(mu, logvar, noise, num_samples, density, estimator, beta, *density.tensors)
    return bound


def _dtype_of(module: nn.Module) -> torch.dtype:
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    return torch.get_default_dtype() if like is None else like.dtype


def noise_of(mu: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Noise:
    """Noise for means [B, d] in parts: of what was given [K, B, d], or drawn."""
    return _drawn(mu, generator) if noise is None else lambda first, count: noise[first : first + count]


def _drawn(mu: Tensor, generator: torch.Generator | None) -> Noise:
    """Noise keyed by numbers of each sample's own, which the generator gives."""
    device = mu.device if generator is None else generator.device
    keys = torch.randint(-(2**62), 2**62, mu.shape[:1], generator=generator, device=device).to(mu.device)
    samples, dim = mu.shape

    def draw(first: int, count: int) -> Tensor:
        numbers = Stream(draws_of(keys, 0, count, first)).normal((dim,))
        return numbers.to(mu.dtype).unflatten(0, (samples, count)).transpose(0, 1)

    return draw


def is_tileable(decoder: nn.Module, x: Tensor) -> bool:
    """Whether the codes may be decoded apart, and twice, by what nobody else looks into."""
    if is_compiling() or transformed() or torch.is_autocast_enabled(x.device.type) or not len(x):
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    # A forward of one's own may draw random numbers in training, or be watched by hooks.
    if has_hooks(decoder) or any(part.training and not has_no_effects(part) for part in decoder.modules()):
        return False
    try:
        check_uncoupled(decoder)
    except CoupledSamples:
        return False
    return True


class _Kernels:
    """log p(x | z) by kernels."""

    def __init__(self, network: LoweredNetwork, x: Tensor, observed: Tensor, likelihood: Likelihood) -> None:
        self._network, self._observed, self._likelihood = network, observed, likelihood
        self._base = likelihood.base_measure(x, observed.dtype)
        self.tensors = network.tensors
        self.outputs = observed.shape[1] * likelihood.values_per_element

    @staticmethod
    def of(decoder: nn.Module, x: Tensor, mu: Tensor, likelihood: Likelihood) -> _Kernels | None:
        """None where there are none."""
        if not likelihood.has_kernel or mu.dtype not in (torch.float32, torch.float64):
            return None
        try:
            network = lower(decoder, strip_sigmoid=likelihood.probs, compare_at=mu.detach())
            observed = likelihood.as_float(x, mu.dtype).flatten(1)
        except (UnsupportedLayer, ValueError):
            return None
        if any(tensor.dtype != mu.dtype for tensor in network.tensors):
            return None
        return _Kernels(network, x, observed, likelihood)

    def value(self, z: Tensor) -> Tensor:
        """[T, B] of codes [T, B, d]."""
        spec = self._network.spec
        found = torch.ops.fastvae.log_px(
            z, self._observed, self._network.tensors, spec, self._likelihood.spec
        )
        return found if self._base is None else found + self._base

    def pullback(
        self, z: Tensor, cotangent: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of <cotangent [T, B], log p> to the codes and to the tensors."""
        rows = self._observed.repeat(len(z), 1)
        flags = [int(need) for need in needs]
        of_z, found = raw.log_px_pullback(
            z.flatten(0, 1), rows, cotangent.flatten(), list(tensors), self._network.spec, self._likelihood.spec, flags
        )  # fmt: skip
        return of_z.view_as(z), [grad if need else None for grad, need in zip(found, needs, strict=True)]


class _Autograd:
    """log p(x | z) of any decoder and likelihood, by PyTorch."""

    def __init__(
        self,
        decoder: nn.Module,
        x: Tensor,
        likelihood: Likelihood,
        condition: Tensor | None,
        weight: Tensor | None,
    ) -> None:
        self._decoder, self._x, self._likelihood = decoder, x, likelihood
        self._more = {"condition": condition, "weight": weight}
        self.outputs = math.prod(x.shape[1:]) * likelihood.values_per_element
        own = likelihood.parameters() if isinstance(likelihood, nn.Module) else ()
        found = [*decoder.parameters(), *own, *([] if condition is None else [condition])]
        self.tensors = [tensor for tensor in found if tensor.is_floating_point()]

    def value(self, z: Tensor) -> Tensor:
        """[T, B] of codes [T, B, d]."""
        return reference.log_px(self._decoder, z, self._x, self._likelihood, **self._more)

    def pullback(
        self, z: Tensor, cotangent: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """See ``_Kernels``; of the very tensors that the decoder has."""
        wanted = [tensor for tensor, need in zip(self.tensors, needs, strict=True) if need]
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            of_z, *found = torch.autograd.grad(
                self.value(leaf), [leaf, *wanted], cotangent, allow_unused=True
            )
        rest = iter(found)
        return torch.zeros_like(z) if of_z is None else of_z, [next(rest) if need else None for need in needs]


_Density = _Kernels | _Autograd


class _Bound(torch.autograd.Function):
    """See :func:`iwae_bound`."""

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor,
        noise: Noise,
        draws: int,
        density: _Density,
        estimator: str,
        beta: float,
        *tensors: Tensor,
    ) -> Tensor:
        """All weights, tile by tile."""
        log_weights = mu.new_empty(draws, len(mu))
        sigma = torch.exp(logvar / 2)
        for first, count in _tiles(draws, mu, density):
            eps = noise(first, count).to(mu)
            z = mu + sigma * eps
            log_ratio = 0.5 * (eps.square() + logvar - z.square()).sum(2)
            log_weights[first : first + count] = density.value(z) + beta * log_ratio
        ctx.save_for_backward(mu, logvar, log_weights, *tensors)
        ctx.noise, ctx.density, ctx.estimator, ctx.beta = noise, density, estimator, beta
        return torch.logsumexp(log_weights, 0) - math.log(draws)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The same tiles again, each scaled by its normalised weights."""
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "fastvae::iwae_bound: differentiable once; its second derivative is not implemented. For "
                "create_graph=True use fastvae.reference.iwae_bound, which PyTorch can differentiate twice"
            )
        mu, logvar, log_weights, *tensors = ctx.saved_tensors
        density, beta, needs = ctx.density, ctx.beta, ctx.needs_input_grad[7:]
        share = torch.softmax(log_weights, 0)
        sigma = torch.exp(logvar / 2)
        of_mu, of_logvar = torch.zeros_like(mu), torch.zeros_like(mu)
        totals: list[Tensor | None] = [None] * len(tensors)
        for first, count in _tiles(len(log_weights), mu, density):
            eps = ctx.noise(first, count).to(mu)
            z, own = mu + sigma * eps, share[first : first + count]
            cotangent = own * grad
            of_z, found = density.pullback(z, cotangent, tensors, needs)
            scale = beta * cotangent[..., None]
            if ctx.estimator == "standard":
                of_z = of_z - scale * z
                of_logvar += (0.5 * scale).expand_as(z).sum(0)
            else:
                of_z = of_z + scale * (eps / sigma - z)
                if ctx.estimator == "dreg":
                    of_z = of_z * own[..., None]
            of_mu += of_z.sum(0)
            of_logvar += 0.5 * (of_z * eps).sum(0) * sigma
            for at, gradient in enumerate(found):
                total = totals[at]
                totals[at] = (
                    total if gradient is None else gradient if total is None else total.add_(gradient)
                )
        return of_mu, of_logvar, None, None, None, None, None, *totals


def _tiles(draws: int, mu: Tensor, density: _Density) -> list[tuple[int, int]]:
    """First and number of the draws that are decoded at once."""
    codes = min(_CODES_AT_ONCE, max(1, _OUTPUTS_AT_ONCE // max(1, density.outputs)))
    together = max(1, codes // len(mu))
    return [(first, min(together, draws - first)) for first in range(0, draws, together)]

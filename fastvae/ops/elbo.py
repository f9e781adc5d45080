"""A VAE's objective as one operator: encoder, reparameterisation, decoder, likelihood and divergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvae._compiling import is_in_compiled_graph
from fastvae._elbo_reference import ElboTerms, elbo_terms, terms_at
from fastvae._extension import raw
from fastvae.arguments import given
from fastvae.decoding import is_unobserved
from fastvae.likelihoods import Likelihood, resolve
from fastvae.likelihoods.fused import fused_log_prob
from fastvae.lowering import LoweredNetwork, lower
from fastvae.lowering.running import output_of
from fastvae.ops._registration import (
    cast_under_autocast,
    check_bound,
    check_condition,
    check_one_device,
    check_rank,
    check_tensors,
    empty_gradients,
)

__all__ = ["elbo", "fused"]


def elbo(
    encoder: nn.Module,
    decoder: nn.Module,
    x: Tensor,
    noise: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    beta: float = 1.0,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """log p(x | z) - beta KL(q(z | x) || N(0, I)) in nats at z = mu + sigma noise, for each sample.

    Kingma and Welling, Auto-encoding variational Bayes, ICLR 2014, equation 10 with one sample of z; beta: Higgins et
    al., beta-VAE, ICLR 2017. Its mean over standard normal noise is the evidence lower bound.

    Where :func:`fastvae.lowering.lower` can take both networks, two sweeps in kernels give the value and two more the
    gradient, each weight's as one product over all rows; an encoder may have two heads on a trunk. What cannot be taken
    runs as it is, with the same result: another kind of layer, BatchNorm in training mode, a likelihood without a
    kernel, a condition or weights, an x or noise whose gradient is wanted, autocast, ``torch.func`` and
    ``torch.compile``.

    Args:
        encoder: a module from x (as the likelihood's floats) to [B, 2 d], mean before log variance, or to the pair
            (mu [B, d], logvar [B, d]).
        decoder: a module from codes [B, d] to natural parameters of the likelihood.
        x: data [B, ...]; float, uint8 or bool.
        noise: standard normal [B, d], float32 or float64 as the networks.
        likelihood: "bernoulli", "gaussian", "categorical" or a :class:`fastvae.likelihoods.Likelihood`.
        beta: weight of the divergence.
        condition: [B, ...], handed to both networks after x and z.
        weight: [B, ...] of x's elements in log p(x | z), as for the models.

    Returns:
        [B]; the gradient reaches every parameter of both networks, and can be differentiated again.

    Raises:
        ValueError: shapes that do not fit; a beta that is not finite.
        TypeError: a network that is no module, an x or noise that is no tensor, a beta that is no number.
    """
    check_bound("elbo", encoder, decoder, beta)
    check_tensors("elbo", x=x, noise=noise)
    like = resolve(likelihood)
    if noise.dim() != 2 or x.dim() == 0 or len(noise) != len(x):
        expected = f"[{len(x)}, d]" if x.dim() else "[B, d]"
        raise ValueError(f"fastvae::elbo: noise: expected shape {expected}, got {list(noise.shape)}")
    check_condition("elbo", condition, len(x))
    found = None
    if condition is None and weight is None:
        by_kernels = fused(encoder, decoder, x, like, noise.shape[1])
        found = None if by_kernels is None else by_kernels.terms(noise[None])
    if found is None:
        more = {"condition": condition, "weight": weight}
        found = elbo_terms(encoder, decoder, x, noise[None], like, **more, fused=fused_log_prob)
    return found.log_px[0] - beta * found.kl


class FusedObjective(NamedTuple):
    """The objective of two networks that kernels take; see :func:`fused`."""

    encoder: LoweredNetwork
    decoder: LoweredNetwork
    rows: Tensor
    """[B, n] x as the encoder takes it."""
    likelihood: Likelihood
    means: Tensor
    """Like the means [B, d] of the posteriors, without numbers."""

    def terms(self, noise: Tensor) -> ElboTerms | None:
        """The terms at noise [S, B, d], differentiable as often as one likes; None where shapes do not fit."""
        encoder, decoder, rows, like, _ = self
        if noise.dtype != rows.dtype or (torch.is_grad_enabled() and noise.requires_grad):
            return None

        def again(cotangents: Sequence[Tensor | None], rows: Tensor, noise: Tensor) -> list[Tensor | None]:
            return _differentiable_gradient(encoder, decoder, rows, noise, like, cotangents)

        networks = (encoder.tensors, decoder.tensors, encoder.spec, decoder.spec)
        if is_in_compiled_graph():
            found = torch.ops.fastvae.elbo_terms(rows, noise, *networks, like.spec, torch.is_grad_enabled())
            log_px, kl, mu, logvar, z = found[:5]
            return ElboTerms(_plus(log_px, like.base_measure(rows, noise.dtype)), kl, mu, logvar, z)
        try:
            log_px, *rest = raw.differentiable_elbo_terms(rows, noise, *networks, like.spec, again)
        except (ValueError, TypeError):
            # Modules say best themselves what does not fit.
            return None
        return ElboTerms(_plus(log_px, like.base_measure(rows, noise.dtype)), *rest)


def _plus(log_px: Tensor, base: Tensor | None) -> Tensor:
    return log_px if base is None else log_px + base


def fused(
    encoder: nn.Module, decoder: nn.Module, x: Tensor, likelihood: Likelihood, latent_dim: int
) -> FusedObjective | None:
    """The objective by kernels for data like x; None where they do not take it. See :func:`elbo`."""
    if not _is_plain(x) or not likelihood.has_kernel or not 1 <= x.dim() - 1 <= 3 or not len(x):
        return None

    def codes() -> Tensor:
        drawn = torch.randn(2, latent_dim, generator=torch.Generator().manual_seed(0), device="cpu")
        return drawn.to(next(decoder.parameters()))

    try:
        of_decoder = lower(decoder, strip_sigmoid=likelihood.probs, compare_at=codes, without_effects=True)
        dtype = of_decoder.tensors[0].dtype
        if dtype not in (torch.float32, torch.float64):
            return None
        rows = likelihood.as_float(x, dtype).flatten(1)
        of_encoder = lower(encoder, shape=x.shape[1:], two_heads=True, compare_at=rows, without_effects=True)
    except (ValueError, IndexError):
        return None
    if likelihood.of_logits and of_decoder.ends_in_sigmoid and not likelihood.probs:
        return None
    return FusedObjective(of_encoder, of_decoder, rows, likelihood, rows.new_empty(len(rows), latent_dim))


def _is_plain(x: Tensor) -> bool:
    """Whether nothing is asked that only PyTorch's own operations can do."""
    if not (is_in_compiled_graph() or is_unobserved(x)) or torch.is_autocast_enabled(x.device.type):
        return False
    return not (torch.is_grad_enabled() and x.requires_grad)


@torch.enable_grad()
def _differentiable_gradient(
    encoder: LoweredNetwork,
    decoder: LoweredNetwork,
    rows: Tensor,
    noise: Tensor,
    likelihood: Likelihood,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradient to the tensors of both networks, with a graph; of one that occurs twice, in its first place."""
    mu, logvar = output_of(encoder, rows).chunk(2, 1)
    each = rows.repeat(len(noise), 1)

    def log_px(z: Tensor) -> Tensor:
        return likelihood.log_prob(output_of(decoder, z.flatten(0, 1)), each).reshape(z.shape[:2])

    found = terms_at(mu, logvar, noise, log_px)
    tensors = [*encoder.tensors, *decoder.tensors]
    wanted = {id(tensor): tensor for tensor in tensors if tensor.requires_grad}
    pairs = [
        (out, grad)
        for out, grad in zip(found, cotangents, strict=True)
        if grad is not None and out.requires_grad
    ]
    if not pairs:
        return [None] * len(tensors)
    outputs, grads = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(
        outputs, list(wanted.values()), grads, create_graph=True, allow_unused=True
    )
    by_tensor = dict(zip(wanted, gradients, strict=True))
    return [by_tensor.pop(id(tensor), None) for tensor in tensors]


@torch.library.register_fake("fastvae::elbo_terms")
def _(
    x: Tensor,
    noise: Tensor,
    encoder_parameters: Sequence[Tensor],
    decoder_parameters: Sequence[Tensor],
    encoder: str,
    decoder: str,
    likelihood: str,
    store: bool,
) -> tuple[Tensor, ...]:
    parameters = [*encoder_parameters, *decoder_parameters]
    check_one_device("elbo_terms", x, "x", noise=noise, parameters=parameters)
    check_rank("elbo_terms", "x", x, "[B, n]")
    check_rank("elbo_terms", "noise", noise, "[S, B, d]")
    batch = x.shape[0]
    sizes = raw.elbo_terms_stash(
        encoder,
        decoder,
        likelihood,
        *([list(t.shape) for t in ts] for ts in (encoder_parameters, decoder_parameters)),
        x.shape[1],
        noise.shape[2],
    )
    stashes = [
        x.new_empty(batch * rows * size if store else 0)
        for rows, size in zip((1, noise.shape[0]), sizes, strict=True)
    ]
    codes = [x.new_empty(noise.shape[1:]) for _ in range(2)]
    return x.new_empty(noise.shape[:2]), x.new_empty(batch), *codes, x.new_empty(noise.shape), *stashes


@torch.library.register_fake("fastvae::elbo_terms_backward")
def _(
    grad_log_px: Tensor | None,
    grad_kl: Tensor | None,
    grad_mu: Tensor | None,
    grad_logvar: Tensor | None,
    grad_z: Tensor | None,
    x: Tensor,
    noise: Tensor,
    mu: Tensor,
    logvar: Tensor,
    z: Tensor,
    encoder_stash: Tensor,
    decoder_stash: Tensor,
    encoder_parameters: Sequence[Tensor],
    decoder_parameters: Sequence[Tensor],
    encoder: str,
    decoder: str,
    likelihood: str,
    needs: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    name, parameters = "elbo_terms_backward", [*encoder_parameters, *decoder_parameters]
    check_one_device(
        name,
        x,
        "x",
        **given(
            grad_log_px=grad_log_px, grad_kl=grad_kl, grad_mu=grad_mu, grad_logvar=grad_logvar, grad_z=grad_z
        ),
        noise=noise,
        mu=mu,
        logvar=logvar,
        z=z,
        encoder_stash=encoder_stash,
        decoder_stash=decoder_stash,
        parameters=parameters,
    )
    found = empty_gradients(name, x, parameters, needs)
    return found[: len(encoder_parameters)], found[len(encoder_parameters) :]


cast_under_autocast("elbo_terms")

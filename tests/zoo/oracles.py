"""What the operators must give, by plain autograd: reverse over reverse alone, nothing of fastvae.

``decode`` is a function of the code alone. Every oracle is judged by central differences (:func:`differences_agree`).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvae.likelihoods import Bernoulli, Likelihood

Decode = Callable[[Tensor], Tensor]

STEPS = 3


@contextlib.contextmanager
def careful(decoder: nn.Module) -> Iterator[None]:
    """Attention by products and recurrent layers without cuDNN, which autograd can differentiate twice."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in decoder.modules())
    without = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    with sdpa_kernel(SDPBackend.MATH), without:
        yield


def log_prob(likelihood: Likelihood, output: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) [B] from what the decoder returned."""
    if isinstance(likelihood, Bernoulli) and likelihood.probs:
        p, x = output.flatten(1), x.flatten(1)
        return (x * torch.log(p) + (1 - x) * torch.log1p(-p)).sum(1)
    if isinstance(likelihood, Bernoulli):
        terms = F.binary_cross_entropy_with_logits(output.flatten(1), x.flatten(1), reduction="none")
        return -terms.sum(1)
    return likelihood.log_prob(output, x)


def flow(
    decode: Decode,
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: Tensor,
    alpha: Tensor,
    likelihood: Likelihood,
) -> list[Tensor]:
    """z_K, rho_K, log p(x | z_K) after len(alpha) leapfrog steps; step_size broadcasts over a code."""

    def force(point: Tensor) -> tuple[Tensor, Tensor]:
        value = log_prob(likelihood, decode(point), x)
        return value, torch.autograd.grad(value.sum(), point, create_graph=True)[0] - point

    value, pull = force(z)
    for k in range(len(alpha)):
        rho = rho + 0.5 * step_size[k] * pull
        z = z + step_size[k] * rho
        value, pull = force(z)
        rho = alpha[k] * (rho + 0.5 * step_size[k] * pull)
    return [z, rho, value]


def jacobian_l1(decode: Decode, z: Tensor) -> Tensor:
    """sum over latents and outputs of |dy/dz| [B]: signs without a graph, then one product with a graph."""
    latents = z[0].numel()
    rows = z.repeat_interleave(latents, 0)
    directions = torch.eye(latents, dtype=z.dtype, device=z.device).repeat(len(z), 1).reshape(rows.shape)
    y = decode(rows)
    probe = torch.zeros_like(y, requires_grad=True)
    (pulled,) = torch.autograd.grad(y, rows, probe, create_graph=True)
    (pushed,) = torch.autograd.grad(pulled, probe, directions, retain_graph=True)
    (entries,) = torch.autograd.grad(y, rows, pushed.sign(), create_graph=True)
    return (entries * directions).flatten(1).sum(1).reshape(len(z), latents).sum(1)


def regret(
    encoder: nn.Module,
    decoder: nn.Module,
    likelihood: Likelihood,
    x: Tensor,
    noise: Tensor,
    samples: Tensor,
    *,
    lr: float,
) -> list[Tensor]:
    """Mean, log variance, losses and regret of one image, as published: an encoder of its own, ``torch.optim.Adam``.

    ``noise`` [steps, 1, d] of the steps, ``samples`` [count, 1, d] of the importance sampled likelihood.
    """
    private = copy.deepcopy(encoder).requires_grad_()
    optimizer = torch.optim.Adam(private.parameters(), lr=lr, weight_decay=5e-5)
    seen = likelihood.as_float(x, noise.dtype)
    x = x.to(noise.dtype)

    def evidence() -> Tensor:
        mu, logvar = private(seen).chunk(2, 1)
        z = mu + torch.exp(logvar / 2) * samples
        repeated = x.expand(len(samples), *x.shape[1:])
        log_px = log_prob(likelihood, decoder(z.flatten(0, 1)), repeated)
        log_ratio = 0.5 * (samples.square() + logvar - z.square()).sum((1, 2))
        return torch.logsumexp(log_px + log_ratio, 0) - math.log(len(samples))

    with torch.no_grad():
        before = evidence()
    losses = []
    for eps in noise:
        mu, logvar = private(seen).chunk(2, 1)
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        loss = (kl - log_prob(likelihood, decoder(mu + torch.exp(logvar / 2) * eps), x)).sum()
        optimizer.zero_grad()
        for parameter, gradient in zip(
            private.parameters(), torch.autograd.grad(loss, list(private.parameters())), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        mu, logvar = private(seen).chunk(2, 1)
        return [mu, logvar, torch.stack(losses)[None], (evidence() - before)[None]]


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], seed: int = 7) -> list[Tensor]:
    """Of a fixed random combination of the outputs; zeros where nothing depends on a leaf."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    found = torch.autograd.grad(list(outputs), list(leaves), weights, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def differences_agree(
    run: Callable[[], Sequence[Tensor]],
    leaves: Sequence[Tensor],
    found: Sequence[Tensor],
    tolerance: float = 1e-5,
) -> str:
    """Empty if <gradient, v> is a central difference along a random v; otherwise what was found instead.

    One step size must agree: large ones cross kinks (of ReLU, of |dy/dz|), small ones drown in rounding.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        v = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]
        scale = torch.stack([d.square().sum() for d in v]).sum().sqrt()
        v = [d / scale for d in v]
    wanted = float(sum((g * d).sum() for g, d in zip(found, v, strict=True)))
    weights_of = torch.Generator()

    def value(step: float) -> float:
        with torch.no_grad():
            for leaf, d in zip(leaves, v, strict=True):
                leaf.add_(d, alpha=step)
        outputs = run()
        with torch.no_grad():
            for leaf, d in zip(leaves, v, strict=True):
                leaf.sub_(d, alpha=step)
        weights_of.manual_seed(7)
        weights = [torch.randn(o.shape, generator=weights_of, dtype=o.dtype) for o in outputs]
        return float(sum((o.detach() * w).sum() for o, w in zip(outputs, weights, strict=True)))

    tried = []
    for step in (1e-5, 1e-4, 1e-6, 1e-3, 1e-7):
        difference = (value(step) - value(-step)) / (2 * step)
        if abs(difference - wanted) <= tolerance * max(abs(wanted), abs(difference), 1e-2):
            return ""
        tried.append(f"{difference:.9g} with step {step:g}")
    return f"gradient {wanted:.9g}, differences " + ", ".join(tried)

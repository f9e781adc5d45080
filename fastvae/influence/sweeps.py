"""The factors of gradients from the lowered networks' own sweeps, where hooks do not fire or cost more.

A VAE whose encoder can be swept, too, runs forward and back without autograd; else its decoder does, in one sweep
with its likelihood. The Hamiltonian flow hands out, for each of
its K + 1 forces, the pairs (delta_dot, h) and (delta, hdot) of every layer, and the gradients to each sample's own
step sizes and tempering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastvae._extension import raw
from fastvae.influence.rules import rule_of
from fastvae.lowering import LoweredNetwork, UnsupportedLayer, lower
from fastvae.models import HVAE, VAE
from fastvae.models.base import BaseVAE
from fastvae.network.cache import read_network
from fastvae.network.chain import lowered_chain
from fastvae.ops.hamiltonian_flow import observed_rows
from fastvae.private import twin_of
from fastvae.reference import expand_step_size

__all__ = ["Call", "Sweep", "calls_of_vae", "flow_parameters", "is_stock", "is_swept"]


@dataclass
class Call:
    """What one call of a layer adds to its gradient: grad (x) input."""

    input: Tensor
    grad: Tensor
    tangent: bool = False
    """The pair (delta, hdot) of a flow: of the part that is linear in the input, and nothing of the bias."""


def is_swept(model: Any) -> bool:
    """Whether the decoder of this model goes by kernels."""
    if not is_stock(model) or not model.likelihood.has_kernel:
        return False
    try:
        _lowered(model)
    except (UnsupportedLayer, ValueError):
        return False
    return True


def is_stock(model: Any) -> bool:
    """Whether nothing of a subclass's or of a penalty stands between a model's decoder and its loss."""
    if isinstance(model, HVAE):
        stock = type(model).flow is HVAE.flow and type(model)._follow is HVAE._follow
    else:
        stock = isinstance(model, VAE) and type(model).objective is VAE.objective
    if not stock or model.penalties or type(model).log_px is not BaseVAE.log_px:
        return False
    return not _share_a_layer(model.encoder, model.decoder)


def _share_a_layer(one: nn.Module, other: nn.Module) -> bool:
    """Whether a layer with parameters is part of both: watched in one, it has hooks in the other, too."""
    layers = {id(layer) for layer in one.modules() if layer._parameters}
    return any(id(layer) in layers for layer in other.modules())


def calls_of_vae(model: Any, x: Tensor, noise_of: Callable[[int], Tensor]) -> dict[str, list[Call]] | None:
    """The calls of every layer of encoder and decoder, for the loss of x averaged over the draws of its noise.

    Args:
        x: [B, ...].
        noise_of: latent_dim -> [B * S, latent_dim], the draws of a sample side by side.

    Returns:
        None where the encoder cannot be swept, or something between it and the decoder is a subclass's own.
    """
    kind = type(model)
    if not is_swept(model) or isinstance(model, HVAE):
        return None
    if any(getattr(kind, name) is not getattr(BaseVAE, name) for name in ("forward", "encode", "_split")):
        return None
    if model.max_logvar is not None:
        return None
    like, of_decoder = model.likelihood, _lowered(model)
    rows = like.as_float(x, of_decoder.tensors[0].dtype).flatten(1)
    try:
        of_encoder = lower(model.encoder, shape=x.shape[1:], compare_at=rows)
    except (UnsupportedLayer, ValueError):
        return None
    if model.check_finite:
        like.check(x)
    if model.latent_dim is None:
        model.encode(x[:1])
    encoder_stages, decoder_stages = raw.vae_factors(
        rows,
        noise_of(model.latent_dim).to(rows),
        model.beta,
        of_encoder.tensors,
        of_encoder.spec,
        of_decoder.tensors,
        of_decoder.spec,
        like.spec,
    )
    found: dict[str, list[Call]] = {}
    for root, network, stages in (
        ("encoder", of_encoder, encoder_stages),
        ("decoder", of_decoder, decoder_stages),
    ):
        for weight, bias, h, delta, _, _ in stages:
            name = _layer_name(model, root, network, weight, bias)
            found.setdefault(name, []).append(Call(h, delta))
    return found


def _layer_name(model: Any, root: str, network: LoweredNetwork, weight: int, bias: int) -> str:
    """The module of a stage, by its name in the model, which a lowered network has without torch.compile's part."""
    name = network.names[weight if weight >= 0 else bias].rpartition(".")[0]
    compiled = type(getattr(model, root)).__name__ == "OptimizedModule"
    return ".".join(part for part in (root, "_orig_mod" if compiled else "", name) if part)


def flow_parameters(model: Any) -> list[str]:
    """The names of the parameters that a flow takes besides the decoder's."""
    if not isinstance(model, HVAE):
        return []
    of_flow = {id(p) for module in (model.leapfrog_step, model.tempering) for p in module.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in of_flow]


def _lowered(model: BaseVAE) -> LoweredNetwork:
    """Compared with the decoder at codes of the prior: whether it is swept is asked before there are others."""
    like, codes = next(model.decoder.parameters(), None), None
    if like is not None and model.latent_dim is not None:
        codes = torch.randn(2, model.latent_dim, generator=torch.Generator().manual_seed(0), device="cpu").to(
            like
        )
    try:
        return lower(model.decoder, strip_sigmoid=model.likelihood.probs, compare_at=codes)
    except UnsupportedLayer:
        found = _chain(model, codes) if isinstance(model, HVAE) and codes is not None else None
        if found is None:
            raise
        return found


def _chain(model: HVAE, codes: Tensor) -> LoweredNetwork | None:
    """A decoder that is a chain by what its forward does, if its tensors are those of modules with a rule."""
    network = lowered_chain(read_network(model.decoder, codes, strip_sigmoid=model.likelihood.probs), codes)
    if network is None:
        return None
    modules = dict(model.decoder.named_modules(remove_duplicate=False))
    for name, tensor in zip(network.names, network.tensors, strict=True):
        path, _, kind = name.rpartition(".")
        module = modules.get(path)
        if module is None or isinstance(rule_of(module), str) or getattr(module, kind, None) is not tensor:
            return None
    return network


@dataclass
class Sweep:
    """One pass through the decoder of a VAE or HVAE.

    Raises:
        RuntimeError: a trajectory that diverged, where the model would replace it.
    """

    model: Any
    edges: list[GradientEdge] = field(default_factory=list)
    """Asked for the gradient at these, autograd runs the sweep's own backward pass."""
    _calls: dict[str, list[Call]] = field(default_factory=dict)
    _terms: tuple[Tensor, ...] = ()

    def installed(self) -> Any:
        """A twin of the model that takes this way from z to log p(x | z)."""
        of_flow = {"flow": self._flow} if isinstance(self.model, HVAE) else {}
        return twin_of(self.model, log_px=self._log_px, **of_flow)

    def calls(self, layer: str) -> list[Call]:
        """Of a layer of the decoder, by its name in the model."""
        return self._calls.get(layer, [])

    def gradients(self, names: list[str], samples: int) -> dict[str, Tensor]:
        """[B, numel] of each of the flow's own parameters."""
        model: HVAE = self.model
        parameters = dict(model.named_parameters())
        step_terms, alpha_terms, grad_rho, rho = self._terms
        with torch.enable_grad():
            alpha, beta_0 = model.tempering()
            eps = expand_step_size(model.step_size.to(rho.dtype), model.num_steps, rho.shape[1], rho)
            flat = torch.cat([eps.reshape(-1), alpha.reshape(-1), beta_0.reshape(1)])
        # rho_0 = gamma_0 / sqrt(beta_0)
        beta_terms = -0.5 * (grad_rho * rho).sum(1) / beta_0.detach()
        each = torch.cat(
            [step_terms.transpose(0, 1).flatten(1), alpha_terms.sum(2).T, beta_terms[:, None]], 1
        )
        each = each.reshape(samples, -1, each.shape[1]).sum(1)
        wanted = [parameters[name] for name in names]
        if not flat.requires_grad:
            return {}
        found = torch.autograd.grad(flat, wanted, each, is_grads_batched=True, allow_unused=True)
        return {
            name: grad.reshape(samples, -1)
            for name, grad in zip(names, found, strict=True)
            if grad is not None
        }

    def _entered(self, z: Tensor) -> Tensor:
        if self.edges:
            raise RuntimeError(
                "TracIn: the model decoded more than once in a pass, as an HVAE does with on_divergence='drop' "
                "when a trajectory diverges; such a sample has no gradient of the model's own loss"
            )
        z = z if z.requires_grad else z.detach().requires_grad_()
        self.edges.append(get_gradient_edge(z))
        return z

    def _log_px(self, z: Tensor, x: Tensor, **_: Any) -> Tensor:
        return _DecoderSweep.apply(self._entered(z), x, self)

    def _flow(
        self, z: Tensor, rho: Tensor, x: Tensor, step_size: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        eps = expand_step_size(step_size, alpha.shape[0], z.shape[1], z)
        return _FlowSweep.apply(self._entered(z), rho, x, eps.detach(), alpha.detach(), self)

    def _add(self, network: LoweredNetwork, weight: int, bias: int, calls: list[Call]) -> None:
        self._calls.setdefault(_layer_name(self.model, "decoder", network, weight, bias), []).extend(calls)


class _DecoderSweep(torch.autograd.Function):
    """log p(x | z) [B], with the factors handed to a ``Sweep`` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, sweep: Sweep) -> Tensor:
        """One forward and reverse sweep."""
        network, like = _lowered(sweep.model), sweep.model.likelihood
        log_px, grad_z, ctx.stages = raw.decoder_factors(
            z, observed_rows(x, z, like), network.tensors, network.spec, like.spec
        )
        ctx.network, ctx.sweep = network, sweep
        ctx.save_for_backward(grad_z)
        return log_px

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale each row by its cotangent."""
        (grad_z,) = ctx.saved_tensors
        for weight, bias, h, delta, _, _ in ctx.stages:
            scaled = delta * grad.view(-1, *(1 for _ in delta.shape[1:]))
            ctx.sweep._add(ctx.network, weight, bias, [Call(h, scaled)])
        return grad_z * grad[:, None], None, None


class _FlowSweep(torch.autograd.Function):
    """The Hamiltonian flow, with the factors handed to a ``Sweep`` in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, rho: Tensor, x: Tensor, eps: Tensor, alpha: Tensor, sweep: Sweep
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The operator, keeping z and rho of every step."""
        network, like = _lowered(sweep.model), sweep.model.likelihood
        observed = observed_rows(x, z, like)
        z_K, rho_K, log_px, z_steps, rho_steps, _, _ = raw.hamiltonian_flow(
            z, rho, observed, eps, alpha, network.tensors, network.spec, like.spec, False, False
        )
        ctx.network, ctx.sweep = network, sweep
        ctx.save_for_backward(z.detach(), rho.detach(), observed, eps, alpha, z_steps, rho_steps)
        return z_K, rho_K, log_px

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The closed-form gradient to z and rho; all others as factors."""
        z, rho, observed, eps, alpha, z_steps, rho_steps = ctx.saved_tensors
        network, sweep = ctx.network, ctx.sweep
        grad_z, grad_rho, step_terms, alpha_terms, stages = raw.hamiltonian_flow_factors(
            *grads,
            z,
            rho,
            observed,
            eps,
            alpha,
            network.tensors,
            z_steps,
            rho_steps,
            network.spec,
            sweep.model.likelihood.spec,
        )
        for weight, bias, h, delta, hdot, delta_dot in stages:
            calls = [Call(*pair) for pair in zip(h, delta_dot, strict=True)]
            calls += [Call(*pair, tangent=True) for pair in zip(hdot, delta, strict=True)]
            sweep._add(network, weight, bias, calls)
        sweep._terms = (step_terms, alpha_terms, grad_rho, rho)
        return grad_z, grad_rho, None, None, None, None

"""The operators as others would compute them: functions of a network and tensors, and JAX twins of some."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import flow_rivals, log_likelihood

Function = Callable[..., Tensor | tuple[Tensor, ...]]
"""Of a network (one without parameters for operators that take none) and an operator's tensors."""

ROWS = 64
"""samples whose gradients are materialised at once"""


def flow_loss(flow: Callable[..., tuple[Tensor, ...]]) -> Function:
    """The loss that benchmarks/flow.py differentiates: log p(x | z_K) - |rho_K|^2 / 2, summed."""

    def loss(
        network: nn.Module, z: Tensor, rho: Tensor, x: Tensor, step_size: Tensor, alpha: Tensor
    ) -> Tensor:
        _, rho, log_px = flow(network, z, rho, x, step_size, alpha)
        return log_px.sum() - rho.square().sum() / 2

    return loss


def kick_drift(_: nn.Module, z: Tensor, rho: Tensor, force: Tensor, step_size: Tensor) -> tuple[Tensor, ...]:
    """Two passes, each one fused multiplication and addition."""
    rho_half = torch.addcmul(rho, step_size, force, value=0.5)
    return torch.addcmul(z, step_size, rho_half), rho_half


def kick_temper(_: nn.Module, rho_half: Tensor, force: Tensor, step_size: Tensor, alpha: Tensor) -> Tensor:
    return alpha * torch.addcmul(rho_half, step_size, force, value=0.5)


def distributions_kl(_: nn.Module, mu: Tensor, logvar: Tensor) -> Tensor:
    posterior = torch.distributions.Normal(mu, torch.exp(0.5 * logvar))
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return torch.distributions.kl_divergence(posterior, prior).sum(1)


def materialised(_: nn.Module, h_a: Tensor, delta_a: Tensor, h_b: Tensor, delta_b: Tensor) -> Tensor:
    """Per-sample gradients of weight and bias, ROWS samples of the first set at a time, and their products."""

    def gradients(h: Tensor, delta: Tensor) -> Tensor:
        return torch.cat([torch.einsum("nto,nti->noi", delta, h).flatten(1), delta.sum(1)], 1)

    others = gradients(h_b, delta_b).T
    parts = zip(h_a.split(ROWS), delta_a.split(ROWS), strict=True)
    return torch.cat([gradients(h, delta) @ others for h, delta in parts])


def log_px_of_copies(network: nn.Module, z: Tensor, classes: Tensor) -> Tensor:
    """All codes at once, the images repeated for each draw."""
    logits = network(z.flatten(0, 1))
    repeated = classes.expand(len(z), *classes.shape).flatten(0, 1)
    return log_likelihood.log_px(logits, repeated).reshape(z.shape[:2])


def log_px_in_tiles(network: nn.Module, z: Tensor, classes: Tensor) -> Tensor:
    return log_likelihood.tiled_log_px(network, z.flatten(0, 1), classes).reshape(z.shape[:2])


def cotangents(outputs: Sequence[Any], linspace: Callable[..., Any], **like: Any) -> list[Any]:
    """What every contestant's outputs are multiplied with: 1 for a scalar, else numbers from 1/2 to 3/2."""
    found = []
    for output in outputs:
        shape = tuple(output.shape)
        size = math.prod(shape)
        found.append(linspace(0.5, 1.5, size, **like).reshape(shape) if shape else output * 0 + 1)
    return found


class JaxFunction:
    """Outputs of a function under jax.jit; with ``backward`` also its gradients to what requires one.

    Args:
        function: of arrays, the inputs and then the network's parameters; gives an array or a tuple.
        tensors: what it is called with.

    Raises:
        ImportError, RuntimeError: as :func:`flow_rivals.jax_on`.
    """

    def __init__(
        self, function: Callable[..., Any], tensors: Sequence[Tensor], backward: bool, threads: int
    ) -> None:
        jax = flow_rivals.jax_on(tensors[0].device, threads)
        self._jax = jax
        self._inputs = [jax.numpy.asarray(tensor.detach().cpu().numpy()) for tensor in tensors]
        wanted = [tensor.requires_grad for tensor in tensors]

        def outputs_of(*arrays: Any) -> tuple[Any, ...]:
            outputs = function(*arrays)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        def with_gradients(*arrays: Any) -> tuple[Any, ...]:
            def of_wanted(*chosen: Any) -> tuple[Any, ...]:
                remaining = iter(chosen)
                mixed = [
                    next(remaining) if want else array for want, array in zip(wanted, arrays, strict=True)
                ]
                return outputs_of(*mixed)

            outputs, pull = jax.vjp(of_wanted, *itertools.compress(arrays, wanted))
            return (*outputs, *pull(tuple(cotangents(outputs, jax.numpy.linspace))))

        self._function = jax.jit(with_gradients if backward else outputs_of)

    def __call__(self) -> object:
        return self._jax.block_until_ready(self._function(*self._inputs))

    def tensors(self) -> list[Tensor]:
        """The results as the other contestants give them."""
        return [torch.tensor(array) for array in self._jax.device_get(self._function(*self._inputs))]


def jax_kl(mu: Any, logvar: Any) -> Any:
    import jax.numpy as jnp

    return 0.5 * (mu**2 + jnp.exp(logvar) - 1 - logvar).sum(1)


def jax_grad_dot(h_a: Any, delta_a: Any, h_b: Any, delta_b: Any) -> Any:
    """Gram matrices of the factors."""
    import jax.numpy as jnp

    of_inputs = jnp.einsum("nti,mui->ntmu", h_a, h_b) + 1
    return (of_inputs * jnp.einsum("nto,muo->ntmu", delta_a, delta_b)).sum((1, 3))


def jax_jacobian(network: nn.Sequential) -> Callable[..., Any]:
    """Tangents of all latents at once, vmap(jvp)."""

    def penalty(z: Any, *parameters: Any) -> Any:
        import jax

        apply = flow_rivals.jax_decoder(network)

        def column(direction: Any) -> Any:
            tangent = jax.numpy.broadcast_to(direction, z.shape)
            return jax.numpy.abs(jax.jvp(lambda code: apply(code, parameters), (z,), (tangent,))[1]).sum()

        return jax.vmap(column)(jax.numpy.eye(z.shape[1])).sum() / len(z)

    return penalty

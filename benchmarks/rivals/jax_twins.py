"""Operators in JAX, by hand: functions of arrays, the inputs and then the network's parameters."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def jax_on(device: torch.device, threads: int) -> Any:
    """The module jax, computing in float32 on this device; threads count at the first call only.

    Raises:
        ImportError: jax is not installed.
        RuntimeError: a GPU, and a jax without one.
    """
    # XLA's thread pool takes its size from NPROC when the backend starts; a GPU is shared with PyTorch.
    os.environ.setdefault("NPROC", str(threads))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if device.type == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        raise RuntimeError("this jax has no GPU backend")
    jax.config.update("jax_default_matmul_precision", "highest")
    return jax


def cotangents(outputs: Sequence[Any], linspace: Callable[..., Any], **like: Any) -> list[Any]:
    """What every contestant's outputs are multiplied with: 1 for a scalar, else numbers from 1/2 to 3/2."""
    found = []
    for output in outputs:
        shape = tuple(output.shape)
        numbers = linspace(0.5, 1.5, math.prod(shape), **like)
        found.append(numbers.reshape(shape) if shape else output * 0 + 1)
    return found


class JaxFunction:
    """Outputs of a function under jax.jit; with ``backward`` also its gradients to what requires one.

    Args:
        functions: give an array or a tuple; all the same, and the quickest one runs. The next one is tried only where
            the ones before take under 300 ms: unrolled loops take minutes to compile.
        tensors: what they are called with.

    Raises:
        ImportError, RuntimeError: as :func:`jax_on`.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        tensors: Sequence[Tensor],
        threads: int,
        *,
        backward: bool = True,
    ) -> None:
        self._jax = jax = jax_on(tensors[0].device, threads)
        self._inputs = [jax.numpy.asarray(tensor.detach().cpu().numpy()) for tensor in tensors]
        wanted = [index for index, tensor in enumerate(tensors) if tensor.requires_grad]
        self._function, least = None, 0.3
        for function in functions:
            if self._function is not None and least >= 0.3:
                break
            jitted = jax.jit(self._with_gradients(function, wanted) if backward else function)
            seconds = self._seconds(jitted)
            if self._function is None or seconds < least:
                self._function, least = jitted, seconds

    def _with_gradients(self, function: Callable[..., Any], wanted: Sequence[int]) -> Callable[..., Any]:
        jax = self._jax

        def loss(*arrays: Any) -> tuple[Any, tuple[Any, ...]]:
            outputs = function(*arrays)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = zip(outputs, cotangents(outputs, jax.numpy.linspace), strict=True)
            return sum((output * weights).sum() for output, weights in pairs), outputs

        def run(*arrays: Any) -> tuple[Any, ...]:
            (_, outputs), gradients = jax.value_and_grad(loss, tuple(wanted), has_aux=True)(*arrays)
            return (*outputs, *gradients)

        return run

    def _seconds(self, function: Callable[..., Any]) -> float:
        best = math.inf
        for _ in range(4):  # the first compiles
            start = time.perf_counter()
            self._jax.block_until_ready(function(*self._inputs))
            best = min(best, time.perf_counter() - start)
        return best

    def __call__(self) -> object:
        assert self._function is not None
        return self._jax.block_until_ready(self._function(*self._inputs))

    def tensors(self) -> list[Tensor]:
        """The results as the other contestants give them."""
        return [torch.tensor(array) for array in self._jax.tree.leaves(self._jax.device_get(self()))]


def flow_losses(decoder: nn.Sequential) -> list[Callable[..., Any]]:
    """log p(x | z_K) - |rho_K|^2 / 2, summed, of z, rho, x, step_size, alpha: rolled in lax.scan, and unrolled."""

    def loss(z: Any, rho: Any, x: Any, step_size: Any, alpha: Any, *parameters: Any, unroll: bool) -> Any:
        import jax

        def total(point: Any) -> Any:
            logits = jax_decoder(decoder)(point, parameters)
            return (x * logits - jax.nn.softplus(logits)).sum()

        def force(point: Any) -> tuple[Any, Any]:
            value, gradient = jax.value_and_grad(total)(point)
            return value, gradient - point

        def step(carry: tuple[Any, ...], schedule: tuple[Any, Any]) -> tuple[tuple[Any, ...], None]:
            z, rho, pull, _ = carry
            eps, factor = schedule
            rho = rho + 0.5 * eps * pull
            z = z + eps * rho
            value, pull = force(z)
            return (z, factor * (rho + 0.5 * eps * pull), pull, value), None

        value, pull = force(z)
        steps = len(alpha) if unroll else 1
        (_, rho, _, value), _ = jax.lax.scan(step, (z, rho, pull, value), (step_size, alpha), unroll=steps)
        return value - (rho**2).sum() / 2

    return [functools.partial(loss, unroll=unroll) for unroll in (False, True)]


def kl(mu: Any, logvar: Any) -> Any:
    import jax.numpy as jnp

    return 0.5 * (mu**2 + jnp.exp(logvar) - 1 - logvar).sum(1)


def grad_dot(h_a: Any, delta_a: Any, h_b: Any, delta_b: Any) -> Any:
    """Gram matrices of the factors."""
    import jax.numpy as jnp

    of_inputs = jnp.einsum("nti,mui->ntmu", h_a, h_b) + 1
    return (of_inputs * jnp.einsum("nto,muo->ntmu", delta_a, delta_b)).sum((1, 3))


def jacobian_l1(decoder: nn.Sequential) -> Callable[..., Any]:
    """Tangents of all latents at once, vmap(jvp)."""

    def penalty(z: Any, *parameters: Any) -> Any:
        import jax

        apply = jax_decoder(decoder)

        def column(direction: Any) -> Any:
            tangent = jax.numpy.broadcast_to(direction, z.shape)
            return jax.numpy.abs(jax.jvp(lambda code: apply(code, parameters), (z,), (tangent,))[1]).sum()

        return jax.vmap(column)(jax.numpy.eye(z.shape[1])).sum() / len(z)

    return penalty


def jax_decoder(decoder: nn.Sequential) -> Callable[[Any, Sequence[Any]], Any]:
    """A Sequential of Linear, Softplus, ReLU, Unflatten and ConvTranspose2d, as a function of input and parameters."""
    import jax

    def apply(h: Any, parameters: Sequence[Any]) -> Any:
        remaining = iter(parameters)
        for layer in decoder:
            if isinstance(layer, nn.Linear):
                weight, bias = next(remaining), next(remaining)
                h = h @ weight.T + bias
            elif isinstance(layer, nn.Softplus):
                h = jax.nn.softplus(h)
            elif isinstance(layer, nn.ReLU):
                h = jax.nn.relu(h)
            elif isinstance(layer, nn.Unflatten):
                h = h.reshape(len(h), *layer.unflattened_size)
            elif isinstance(layer, nn.ConvTranspose2d):
                weight, bias = next(remaining), next(remaining)
                h = _jax_conv_transpose(h, weight, layer) + bias[:, None, None]
            else:
                raise TypeError(f"jax_decoder: no JAX counterpart of {type(layer).__name__}")
        return h.reshape(len(h), -1)

    return apply


def _jax_conv_transpose(h: Any, weight: Any, layer: nn.ConvTranspose2d) -> Any:
    """PyTorch's transposed convolution: the input spread by the stride, then the flipped kernel."""
    import jax

    before = [layer.kernel_size[axis] - 1 - int(layer.padding[axis]) for axis in (0, 1)]
    after = [pad + extra for pad, extra in zip(before, layer.output_padding, strict=True)]
    return jax.lax.conv_general_dilated(
        h,
        jax.numpy.flip(weight, (2, 3)),
        window_strides=(1, 1),
        padding=list(zip(before, after, strict=True)),
        lhs_dilation=layer.stride,
        dimension_numbers=("NCHW", "IOHW", "NCHW"),
    )

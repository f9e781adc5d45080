"""The compiled rivals of the Hamiltonian flow: torch.compile and JAX, both with K + 1 forces and written by hand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def functional_flow(
    decoder: nn.Module, z: Tensor, rho: Tensor, x: Tensor, step_size: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """fastvae.reference.hamiltonian_flow for a Bernoulli likelihood, as torch.compile can read it.

    The eager code does not compile (torch 2.13): under ``fullgraph=True`` Dynamo stops at the reference's
    ``torch.is_inference_mode_enabled()``, and would at ``torch.autograd.grad``; with graph breaks the forward pass
    runs, and the backward pass raises "torch.compile with aot_autograd does not currently support double backward".
    A force by ``torch.func`` compiles whole.
    """

    def log_px(point: Tensor) -> tuple[Tensor, Tensor]:
        logits = decoder(point).flatten(1)
        per_sample = -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
        return per_sample.sum(), per_sample

    def force(point: Tensor) -> tuple[Tensor, Tensor]:
        gradient, per_sample = torch.func.grad(log_px, has_aux=True)(point)
        return gradient - point, per_sample

    pull, value = force(z)
    for k in range(alpha.shape[0]):
        rho = rho + 0.5 * step_size[k] * pull
        z = z + step_size[k] * rho
        pull, value = force(z)
        rho = alpha[k] * (rho + 0.5 * step_size[k] * pull)
    return z, rho, value


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


class JaxFlow:
    """value_and_grad of the benchmark's loss under jax.jit, for a Sequential of Linear, Softplus, Unflatten and
    ConvTranspose2d.

    The steps run in a lax.scan, rolled or unrolled, whichever is quicker here. Unrolling saves overhead a step and
    takes minutes to compile for convolutions, so it is tried only where a rolled call takes under 300 ms.

    Raises:
        ImportError, RuntimeError: as :func:`jax_on`.
    """

    def __init__(
        self,
        decoder: nn.Sequential,
        z: Tensor,
        rho: Tensor,
        x: Tensor,
        step_size: Tensor,
        alpha: Tensor,
        threads: int,
    ) -> None:
        jax = jax_on(z.device, threads)
        self._jax = jax

        def array(tensor: Tensor) -> Any:
            return jax.numpy.asarray(tensor.detach().cpu().numpy())

        parameters = [array(parameter) for parameter in decoder.parameters()]
        apply = jax_decoder(decoder)
        self._inputs = (array(z), array(step_size), array(alpha), parameters)
        rho_0, data = array(rho), array(x)

        def loss(z: Any, step_size: Any, alpha: Any, parameters: list[Any], unroll: int) -> Any:
            def total(point: Any) -> Any:
                logits = apply(point, parameters)
                return (data * logits - jax.nn.softplus(logits)).sum()

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
            (_, rho, _, value), _ = jax.lax.scan(
                step, (z, rho_0, pull, value), (step_size, alpha), unroll=unroll
            )
            return value - (rho**2).sum() / 2

        def compiled(unroll: int) -> Callable[..., Any]:
            gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
            return jax.jit(lambda *inputs: gradient(*inputs, unroll))

        self.unroll, self._function = 1, compiled(1)
        rolled = self._time(self._function)
        if rolled < 0.3:
            unrolled = compiled(len(alpha))
            if self._time(unrolled) < rolled:
                self.unroll, self._function = len(alpha), unrolled

    def _time(self, function: Callable[..., Any]) -> float:
        best = float("inf")
        for _ in range(4):  # the first compiles
            start = time.perf_counter()
            self._jax.block_until_ready(function(*self._inputs))
            best = min(best, time.perf_counter() - start)
        return best

    def __call__(self) -> object:
        return self._jax.block_until_ready(self._function(*self._inputs))

    def tensors(self) -> list[Tensor]:
        """The loss and its gradients to z, step_size, alpha and the parameters, as the other contestants give."""
        value, (z, step_size, alpha, parameters) = self._function(*self._inputs)
        numpy = self._jax.device_get([value, z, step_size, alpha, *parameters])
        return [torch.tensor(array) for array in numpy]


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

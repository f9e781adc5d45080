"""Whatever comes in: the right numbers, NaN where NaN belongs, or an error that is documented; never a crash."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastvae
from fastvae import ops, reference
from fastvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

HERE, PACKAGE = Path(__file__).parent, Path(fastvae.__file__).parents[1]

# Deterministic, so that a run in CI repeats; the time of a first call (reading the decoder) is nobody's fault.
fuzz = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
each_dtype = st.sampled_from([torch.float32, torch.float64])
LAYOUTS = ["dense", "transposed", "strided", "offset", "expanded"]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers of this shape, in one of the ways that memory can hold them."""
    seed, layout = draw(st.integers(0, 2**31)), draw(st.sampled_from(LAYOUTS))
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=dtype) * scale

    if layout == "transposed" and shape:
        return normal(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "strided" and shape:
        return normal(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    if layout == "offset":
        return normal(math.prod(shape) + 3)[3:].view(shape)
    if layout == "expanded" and shape:
        return normal(1, *shape[1:]).expand(shape)
    return normal(*shape)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Within roundings of a sum of some hundred terms as large as the largest expected number."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    if expected.numel():
        largest = max(float(expected.detach().abs().max()), 1e-30)
        tolerance = (2e-5 if dtype == torch.float32 else 1e-12) * factor
        error = float((actual.detach().double() - expected.detach()).abs().max())
        assert error <= tolerance * largest, f"{error} of {largest}"


def doubled(*values: Tensor) -> list[Tensor]:
    return [value.detach().double().requires_grad_() for value in values]


def agree(ours: Callable[..., Any], theirs: Callable[..., Any], inputs: list[Tensor], factor: float = 1.0) -> None:
    """Values and gradients to every input of an op against its reference in float64."""
    dtype = inputs[0].dtype
    leaves = [value.detach().requires_grad_() for value in inputs]
    wide = doubled(*inputs)
    got, wanted = ours(*leaves), theirs(*wide)
    got, wanted = ([r] if isinstance(r, Tensor) else list(r) for r in (got, wanted))
    for actual, expected in zip(got, wanted, strict=True):
        close(actual, expected, dtype, factor)
    ours_total = sum((r * (i + 1)).sum() for i, r in enumerate(got))
    theirs_total = sum((r * (i + 1)).sum() for i, r in enumerate(wanted))
    gradients = torch.autograd.grad(ours_total, leaves, allow_unused=True)
    constant = not theirs_total.requires_grad  # no latents: plain PyTorch sees no dependence at all
    expected_gradients = (
        [None] * len(wide) if constant else torch.autograd.grad(theirs_total, wide, allow_unused=True)
    )
    for leaf, actual, expected in zip(leaves, gradients, expected_gradients, strict=True):
        close(
            torch.zeros_like(leaf) if actual is None else actual,
            torch.zeros_like(leaf, dtype=torch.float64) if expected is None else expected,
            dtype,
            10 * factor,
        )


# --- shapes, strides, dtypes, magnitudes, empty inputs -----------------------------------------


sizes = st.integers(0, 6)


@fuzz
@given(st.data(), sizes, sizes, each_dtype, st.sampled_from([1e-12, 1.0, 1e12]), st.booleans())
def test_leapfrog(data: Any, batch: int, dim: int, dtype: torch.dtype, scale: float, shared: bool) -> None:
    z, rho, force = (data.draw(tensors((batch, dim), dtype, scale)) for _ in range(3))
    step = data.draw(tensors(() if shared else (dim,), dtype))
    alpha = data.draw(tensors((), dtype))
    agree(ops.leapfrog_kick_drift, reference.leapfrog_kick_drift, [z, rho, force, step])
    agree(ops.leapfrog_kick_temper, reference.leapfrog_kick_temper, [rho, force, step, alpha])


@fuzz
@given(st.data(), *[st.integers(0, 4)] * 6, each_dtype, st.booleans(), st.booleans())
def test_grad_dot(
    data: Any, n: int, m: int, t: int, u: int, inputs: int, outputs: int, dtype: torch.dtype, flat: bool, bias: bool
) -> None:
    shapes = [(n, t, inputs), (n, t, outputs), (m, u, inputs), (m, u, outputs)]
    factors = [data.draw(tensors(s[:1] + s[2:] if flat else s, dtype)) for s in shapes]
    agree(
        lambda *f: ops.grad_dot(*f, bias=bias), lambda *f: reference.grad_dot(*f, bias=bias), factors
    )


ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU]


@st.composite
def decoders(draw: st.DrawFn, latent_dim: int, outputs: int, dtype: torch.dtype) -> nn.Sequential:
    """Dense layers of odd widths, some without bias, with any activation, or none."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers: list[nn.Module] = []
    width = latent_dim
    for _ in range(draw(st.integers(0, 3))):
        wider = draw(st.integers(1, 9))
        layers.append(nn.Linear(width, wider, bias=draw(st.booleans())))
        if draw(st.integers(0, 4)):
            layers.append(draw(st.sampled_from(ACTIVATIONS))())
        width = wider
    layers.append(nn.Linear(width, outputs, bias=draw(st.booleans())))
    return nn.Sequential(*layers).to(dtype)


def with_parameters(decoder: nn.Module, count: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call(decoder, *first count)`` where the decoder's parameters are the remaining arguments."""
    names = [name for name, _ in decoder.named_parameters()]

    def run(*values: Tensor) -> Any:
        for name, value in zip(names, values[count:], strict=True):
            owner, _, attribute = name.rpartition(".")
            decoder.get_submodule(owner)._parameters[attribute] = value  # type: ignore[assignment]
        return call(decoder, *values[:count])

    return run


@fuzz
@given(
    st.data(),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 7),
    st.sampled_from([Bernoulli(), Gaussian(0.7), Categorical(3)]),
    each_dtype,
    st.sampled_from(["store", "recompute"]),
)
def test_hamiltonian_flow(
    data: Any, batch: int, dim: int, steps: int, pixels: int, like: Likelihood, dtype: torch.dtype, memory: str
) -> None:
    decoder = data.draw(decoders(dim, pixels * like.values_per_element, dtype))
    z, rho = (data.draw(tensors((batch, dim), dtype)) for _ in range(2))
    x = data.draw(tensors((batch, pixels), dtype)).sigmoid()
    step = data.draw(st.sampled_from([(), (dim,), (steps, 1), (steps, dim)]))
    step_size = data.draw(tensors(step, dtype)).sigmoid() * 0.2
    alpha = data.draw(tensors((steps,), dtype)).sigmoid()
    parameters = list(decoder.parameters())

    def ours(network: nn.Module, *state: Tensor) -> Any:
        return ops.hamiltonian_flow(network, *state[:2], x, *state[2:], like, memory=memory)

    def theirs(network: nn.Module, *state: Tensor) -> Any:
        return reference.hamiltonian_flow(network, *state[:2], x.double(), *state[2:], like)

    agree(
        with_parameters(decoder, 4, ours),
        with_parameters(decoder, 4, theirs),
        [z, rho, step_size, alpha, *parameters],
        factor=5,
    )


@fuzz
@given(
    st.data(),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(1, 7),
    each_dtype,
    st.sampled_from(["none", "sum", "mean"]),
    st.sampled_from(["identity", "sigmoid"]),
    st.sampled_from([1, 2]),
)
def test_jacobian_l1(
    data: Any, batch: int, dim: int, pixels: int, dtype: torch.dtype, reduction: str, output: str, p: int
) -> None:
    decoder = data.draw(decoders(dim, pixels, dtype))
    latents = data.draw(st.none() | st.lists(st.integers(0, dim - 1), unique=True, max_size=dim))
    z = data.draw(tensors((batch, dim), dtype))
    if reduction == "mean" and batch == 0:
        assert ops.jacobian_l1(decoder, z, reduction, output=output, latents=latents, p=p).isnan()
        return
    options: dict[str, Any] = {"output": output, "latents": latents, "p": p}
    agree(
        with_parameters(decoder, 1, lambda network, z: ops.jacobian_l1(network, z, reduction, **options)),
        with_parameters(decoder, 1, lambda network, z: reference.jacobian_l1(network, z, reduction, **options)),
        [z, *decoder.parameters()],
        factor=5,
    )

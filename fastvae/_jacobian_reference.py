"""The Jacobian's L1 norm in plain PyTorch: the oracle of :func:`fastvae.ops.jacobian_l1`, and its way out."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae._compiling import is_compiling
from fastvae._second_order import (
    check_output,
    check_twice,
    in_our_words,
    needs_a_graph,
    no_gradient,
    own_leaf,
    twice_differentiable,
)
from fastvae.arguments import expect_numbers
from fastvae.decoding import called_on_copies

# Outputs of the rows (latent x sample) that go through the decoder together: 4 MiB of float32.
_OUTPUTS_AT_ONCE = 2**20


def resolve_latents(latents: Sequence[int] | Tensor | None, dim: int) -> list[int]:
    """The latents of a Jacobian penalty as a list of indices.

    Args:
        latents: distinct integers in [0, d) as a sequence or a one-dimensional integer tensor (whose values are
            read on the host); None for all.
        dim: d.

    Raises:
        TypeError: entries that are not integers (a boolean mask is none).
        ValueError: out of range, repeated, or a tensor that is not one-dimensional.
    """
    if latents is None:
        return list(range(dim))
    if isinstance(latents, Tensor):
        if latents.dtype == torch.bool or latents.is_floating_point() or latents.is_complex():
            raise TypeError(f"jacobian_l1: latents: expected integers, got {latents.dtype}")
        if latents.dim() != 1:
            raise ValueError(f"jacobian_l1: latents: expected one dimension, got {list(latents.shape)}")
        latents = latents.tolist()
    indices: list[int] = []
    for latent in latents:
        if isinstance(latent, bool) or not hasattr(latent, "__index__"):
            raise TypeError(f"jacobian_l1: latents: expected integers, got {type(latent).__name__}")
        indices.append(operator.index(latent))
    if any(not 0 <= index < dim for index in indices) or len(set(indices)) < len(indices):
        raise ValueError(f"jacobian_l1: latents: expected distinct integers in [0, {dim}), got {indices}")
    return indices


def check_estimator(name: str, estimator: str, step: float) -> None:
    """Raise for an estimator that :func:`jacobian_l1` does not know, or a step that is none."""
    if estimator not in ("exact", "difference"):
        raise ValueError(f"{name}: estimator: expected 'exact' or 'difference', got {estimator!r}")
    expect_numbers(name, step=step)
    if not 0 < step < math.inf:
        raise ValueError(f"{name}: step: expected a positive finite number, got {step}")


def check_jacobian_options(reduction: str, output: str, p: int, estimator: str, step: float) -> None:
    """Raise for a word or a power that :func:`jacobian_l1` does not know, or a step that is none."""
    check_estimator("jacobian_l1", estimator, step)
    for name, value, known in (
        ("reduction", reduction, ("mean", "sum", "none")),
        ("output", output, ("identity", "sigmoid")),
        ("p", p, (1, 2)),
    ):
        if isinstance(value, bool) or value not in known:
            raise ValueError(f"jacobian_l1: {name}: expected one of {known}, got {value!r}")


class _Linearised(NamedTuple):
    """A decoder's output at some rows, and its Jacobian from both sides."""

    y: Tensor
    pull: Callable[[Tensor], Tensor]
    """s -> J^T s, with its graph."""
    push: Callable[[Tensor, bool], Tensor]
    """e, whether with its graph -> J e, as the gradient of v -> <J^T v, e>: no forward mode is needed."""


def _linearise(decode: Callable[[Tensor], Tensor], rows: Tensor) -> _Linearised:
    y = decode(rows)
    if not y.requires_grad:
        raise no_gradient("jacobian_l1")
    v = torch.zeros_like(y, requires_grad=True)
    with in_our_words("jacobian_l1"):
        (pulled,) = torch.autograd.grad(y, rows, v, create_graph=True, allow_unused=True)
    if pulled is None:
        raise no_gradient("jacobian_l1")
    check_twice("jacobian_l1", pulled, rows)

    def pull(s: Tensor) -> Tensor:
        return torch.autograd.grad(y, rows, s, create_graph=True)[0]

    def push(e: Tensor, create_graph: bool) -> Tensor:
        with in_our_words("jacobian_l1"):
            return torch.autograd.grad(pulled, v, e, retain_graph=True, create_graph=create_graph)[0]

    return _Linearised(y, pull, push)


def _linearise_transformed(decode: Callable[[Tensor], Tensor], rows: Tensor) -> _Linearised:
    """The same inside torch.func transforms, where a tensor cannot be made to require a gradient."""
    y, vjp, *_ = torch.func.vjp(decode, rows)
    _, transposed, *_ = torch.func.vjp(lambda v: vjp(v)[0], torch.zeros_like(y))
    return _Linearised(y, lambda s: vjp(s)[0], lambda e, _: transposed(e)[0])


class _ForLater(torch.autograd.Function):
    """The identity, for a factor whose part of the gradient is zero but not that of the gradient's own gradient."""

    @staticmethod
    def forward(ctx: object, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def jvp(ctx: object, tangent: Tensor) -> Tensor:
        return tangent.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor | None:
        return grad if torch.is_grad_enabled() else None


class _Terms:
    """Sums of |dy/dz_i|^p of every sample, a few latents at a time.

    With u_i = J e_i and without a graph for it, sum_i |u_i| is sum_i <J^T sign(u_i), e_i>, whose gradient is one more
    reverse pass. For p = 2 the same holds of sum_i (2 <J^T u_i, e_i> - <u_i, u_i>), whose gradient by u_i is zero.
    Reverse over reverse is right where PyTorch's reverse over forward is not (LayerNorm, InstanceNorm), and exists
    where there is no forward mode (GLU, autograd.Functions).
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], z: Tensor, p: int, graph: bool) -> None:
        self.decode, self.z, self.p = decode, z, p
        self.transformed = transformed = torch._C._functorch.peek_interpreter_stack() is not None
        self.linearise = _linearise_transformed if transformed else _linearise
        self.one = self.linearise(decode, z)
        # A frozen decoder at a code that is taken as given needs none.
        self.graph = graph and (transformed or not z.is_leaf or needs_a_graph(self.one.y, z))
        self.outputs = math.prod(self.one.y.shape[1:])

    def sum_over(self, latents: list[int]) -> Tensor:
        """[B]."""
        total = self.one.y.reshape(len(self.z), self.outputs)[:, :0].sum(1)
        if latents:
            total = total + self.part(self.one, latents[:1], 1)
        several, times = self.repeated(len(latents) - 1)
        for start in range(1, len(latents), times):
            total = total + self.part(several, latents[start : start + times], times)
        return total if self.graph else total.detach()

    def repeated(self, count: int) -> tuple[_Linearised, int]:
        """The decoder at z taken several times, for ``count`` latents in equal parts, and how many times."""
        parts = math.ceil(count * len(self.z) * self.outputs / _OUTPUTS_AT_ONCE)
        times = math.ceil(count / min(max(parts, 1), max(count, 1)))
        if times > 1:
            # Whatever a decoder raises that was made for one batch size: then z is taken once.
            with contextlib.suppress(Exception):
                return self.linearise(self.decode, self.z.repeat(times, 1)), times
        return self.one, 1

    def part(self, at: _Linearised, latents: list[int], times: int) -> Tensor:
        """The share of some latents; ``times`` is how often z is repeated, row by row for one latent each."""
        batch, dim = self.z.shape
        directions = torch.zeros(times, 1, dim, dtype=self.z.dtype, device=self.z.device)
        for row, latent in enumerate(latents):
            directions[row, 0, latent] = 1
        later = self.graph and self.p == 2
        u = at.push(directions.expand(times, batch, dim).reshape(times * batch, dim), later)
        size = u.detach().abs() if self.p == 1 else u.detach().square()
        value = size.reshape(times, batch, self.outputs).sum((0, 2))
        if not self.graph:
            return value
        weight = u.detach().sign()
        if later:
            # Inside transforms the part is computed, to be zero.
            weight = u if self.transformed else _ForLater.apply(u)
        rows = range(len(latents))
        pulled = at.pull(weight).reshape(times, batch, dim)[list(rows), :, latents].sum(0)
        if later:
            squares = weight.square().reshape(times, batch, self.outputs)
            pulled = 2 * pulled - squares.sum((0, 2))
        return value + (pulled - pulled.detach())


def _differences(
    decode: Callable[[Tensor], Tensor], z: Tensor, latents: list[int], p: int, step: float
) -> Tensor:
    """Sums over latents of |(y(z + step e_i) - y(z)) / step|^p of every sample, a few latents at a time: [B]."""
    base = decode(z)
    outputs = math.prod(base.shape[1:])
    total = base.reshape(len(z), outputs)[:, :0].sum(1)
    moves = step * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)[latents]
    parts = 1 if is_compiling() else math.ceil(len(latents) * base.numel() / _OUTPUTS_AT_ONCE)

    def sizes(moves: Tensor) -> Tensor:
        y = decode((z + moves[:, None]).flatten(0, 1))
        quotient = (y.unflatten(0, (len(moves), len(z))) - base) / step
        size = quotient.abs() if p == 1 else quotient.square()
        return size.reshape(len(moves), len(z), outputs).sum((0, 2))

    for part in moves.tensor_split(max(1, min(parts, len(latents)))) if latents else ():
        try:
            total = total + sizes(part)
        # Whatever a decoder raises that was made for one batch size.
        except Exception:
            if len(part) == 1:
                raise
            for move in part.split(1):
                total = total + sizes(move)
    return total


def jacobian_l1(
    decoder: Callable[[Tensor], Tensor],
    z: Tensor,
    reduction: str = "mean",
    *,
    output: str = "identity",
    latents: Sequence[int] | Tensor | None = None,
    p: int = 1,
    estimator: str = "exact",
    step: float = 1e-2,
) -> Tensor:
    """Sum over latents i and outputs o of |d y_o / d z_i|^p, y = psi(decoder(z)), for each sample.

    Rhodes and Lee, Local Disentanglement in Variational Auto-Encoders Using Jacobian L1 Regularization,
    NeurIPS 2021, equation (5). The latents go through the decoder together, in parts of 2**20 outputs, each beside
    every sample.

    Args:
        decoder: any callable [B, d] -> [B, ...] that treats samples independently and that PyTorch can differentiate
            twice.
        z: [B, d], or [B, ...] where the decoder takes such codes.
        reduction: "mean" or "sum" over the samples, or "none".
        output: psi, "identity" or "sigmoid" (for a decoder that returns logits).
        latents: the i to sum over, distinct integers; None for all.
        p: 1 for absolute values, 2 for squares (no root and no factor).
        estimator, step: as for :func:`fastvae.ops.jacobian_l1`.

    Returns:
        [] or, with "none", [B]; differentiable in z and in what the decoder holds, as often as PyTorch can: of some
        layers (LayerNorm, InstanceNorm) its third and fourth derivatives, which those of the result take, are wrong.

    Raises:
        ValueError, TypeError: an option that is not known, latents out of range, z not [B, d], or an output without a
            gradient to z, as a quantised decoder's.
        NotImplementedError: the decoder cannot be differentiated twice.
    """
    check_jacobian_options(reduction, output, p, estimator, step)
    if z.dim() > 2:
        shape = z.shape[1:]
        flat = z.flatten(1)
        return jacobian_l1(
            lambda codes: decoder(codes.reshape(-1, *shape)),
            flat,
            reduction,
            output=output,
            latents=latents,
            p=p,
            estimator=estimator,
            step=step,
        )
    if z.dim() != 2 or not z.is_floating_point():
        raise ValueError(f"jacobian_l1: z: expected a floating tensor [B, d], got {z.dtype} {list(z.shape)}")
    indices = resolve_latents(latents, z.shape[1])
    # Inference tensors cannot be saved for a backward pass: leave the mode with a copy.
    if not is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return jacobian_l1(
                decoder,
                z.clone(),
                reduction,
                output=output,
                latents=indices,
                p=p,
                estimator=estimator,
                step=step,
            )

    def decode(point: Tensor) -> Tensor:
        with twice_differentiable():
            y = called_on_copies(decoder, point)
        check_output("jacobian_l1", y, len(point))
        return torch.sigmoid(y) if output == "sigmoid" else y

    if estimator == "difference":
        terms = _differences(decode, z, indices, p, step)
        return terms if reduction == "none" else terms.mean() if reduction == "mean" else terms.sum()
    graph = torch.is_grad_enabled()
    # A leaf of its own where z gets no gradient; a leaf of the caller's would pass for one, so never z itself.
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    rows = z.view_as(z) if transformed or (graph and z.requires_grad) else own_leaf(z)
    with torch.enable_grad():
        if z.shape[0] == 0:
            # Of no rows a convolution has no graph; the zero gradients of none are those of the output's.
            terms = decode(rows).flatten().reshape(0, 1).sum(1)
            terms = terms if graph else terms.detach()
        else:
            terms = _Terms(decode, rows, p, graph).sum_over(indices)
    return terms if reduction == "none" else terms.mean() if reduction == "mean" else terms.sum()

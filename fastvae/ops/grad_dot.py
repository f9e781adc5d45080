"""Dot products of per-sample gradients of affine layers, from their factors: no gradient is formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.ops._registration import (
    cast_under_autocast,
    check_one_device,
    empty_gradients,
    refuse_forward_mode,
    refuse_function_transforms,
)

Factors = Tensor | Sequence[Tensor]


def grad_dot(
    inputs_a: Factors,
    output_grads_a: Factors,
    inputs_b: Factors,
    output_grads_b: Factors,
    bias: bool | Sequence[bool] = True,
) -> Tensor:
    """Dot products of the gradients of N samples with those of M others, over a layer's weight and bias.

    The weight gradient of sample i at a layer y = W h + b is sum_t delta_it (x) h_it, with t over whatever
    shares the weight within a sample (positions, draws of z), so that

        out[i, j] = sum_{t, t'} (h_it . h_jt' + 1) (delta_it . delta_jt')

    where the 1 stands for the bias. This is the inner product of TracIn (Pruthi et al., "Estimating training
    data influence by tracing gradient descent", NeurIPS 2020, section 3.2), in T^2 (in + out) multiply-adds a
    pair instead of in * out.

    Args:
        inputs_a: h of the first samples, [N, T, in] or [N, in], float32 or float64, CPU or CUDA. A sequence
            of such tensors, one a layer, in all four arguments: the sum over the layers.
        output_grads_a: delta of them, [N, T, out] or [N, out].
        inputs_b: h of the second samples, [M, U, in] or [M, in].
        output_grads_b: delta of them, [M, U, out] or [M, out].
        bias: whether the layer has a bias; one for all layers, or one each.

    Returns:
        [N, M]; differentiable once in every tensor argument. ``fastvae.reference.grad_dot`` is the same in
        plain PyTorch.

    Raises:
        ValueError: shapes, devices or numbers of layers that do not fit together.
        TypeError: dtypes other than float32 and float64, or mixed.
        NotImplementedError: forward-mode differentiation, torch.func transforms, a second derivative.
    """
    lists = [
        [f] if isinstance(f, Tensor) else list(f)
        for f in (inputs_a, output_grads_a, inputs_b, output_grads_b)
    ]
    tensors = [tensor for factors in lists for tensor in factors]
    if not lists[0]:
        raise ValueError("fastvae::grad_dot: inputs_a: expected at least one layer, got none")
    refuse_function_transforms("grad_dot", *tensors)
    refuse_forward_mode("grad_dot", *tensors)
    flags = [int(bias)] * len(lists[0]) if isinstance(bias, bool) else [int(flag) for flag in bias]
    return torch.ops.fastvae.grad_dot(*lists, flags)


def _check_factors(name: str, inputs_a: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    """Of a fake kernel: as many layers in every list, at least one, of samples on one device."""
    for argument, factors in zip(("output_grads_a", "inputs_b", "output_grads_b"), others, strict=True):
        if not inputs_a or len(factors) != len(inputs_a):
            raise ValueError(
                f"fastvae::{name}: {argument}: expected as many layers as inputs_a, at least one, got {len(factors)} "
                f"and {len(inputs_a)}"
            )
    for argument, factors in zip(
        ("inputs_a", "output_grads_a", "inputs_b", "output_grads_b"), (inputs_a, *others), strict=True
    ):
        check_one_device(name, inputs_a[0], "inputs_a", **{argument: factors})
        for tensor in factors:
            if tensor.dim() not in (2, 3):
                raise ValueError(
                    f"fastvae::{name}: {argument}: expected shape [N, features] or [N, T, features], got "
                    f"{list(tensor.shape)}"
                )


@torch.library.register_fake("fastvae::grad_dot")
def _(
    inputs_a: Sequence[Tensor],
    output_grads_a: Sequence[Tensor],
    inputs_b: Sequence[Tensor],
    output_grads_b: Sequence[Tensor],
    bias: Sequence[int],
) -> Tensor:
    _check_factors("grad_dot", inputs_a, output_grads_a, inputs_b, output_grads_b)
    return inputs_a[0].new_empty(inputs_a[0].shape[0], inputs_b[0].shape[0])


@torch.library.register_fake("fastvae::grad_dot_backward")
def _(
    grad: Tensor,
    inputs_a: Sequence[Tensor],
    output_grads_a: Sequence[Tensor],
    inputs_b: Sequence[Tensor],
    output_grads_b: Sequence[Tensor],
    bias: Sequence[int],
    needs: Sequence[int],
) -> list[Tensor]:
    name = "grad_dot_backward"
    _check_factors(name, inputs_a, output_grads_a, inputs_b, output_grads_b)
    check_one_device(name, inputs_a[0], "inputs_a", grad=grad)
    return empty_gradients(name, inputs_a[0], [*inputs_a, *output_grads_a, *inputs_b, *output_grads_b], needs)


cast_under_autocast("grad_dot")

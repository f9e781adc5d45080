"""What every operator registers in the same way: refusals and autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastvae._extension  # noqa: F401  (defines torch.ops.fastvae)


def refuse_second_derivative(name: str) -> None:
    """Make the gradient of ``fastvae::<name>``, itself a backward operator, an error instead of nothing."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> None:
        forward = name.removesuffix("_backward")
        raise NotImplementedError(
            f"fastvae::{forward}: differentiable once; its second derivative is not implemented. For "
            f"create_graph=True use fastvae.reference.{forward}, which PyTorch can differentiate twice."
        )

    torch.library.register_autograd(f"fastvae::{name}", backward, setup_context=setup_context)


def cast_under_autocast(name: str) -> None:
    """Under autocast, run ``fastvae::<name>`` in float32 whatever the dtypes of its inputs."""
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"fastvae::{name}", device, torch.float32)


def refuse_function_transforms(name: str, *tensors: Tensor) -> None:
    """Raise under torch.func transforms (vmap, grad, jvp, ...), which would give zeros or a slow loop."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.maybe_get_level(tensors[0]) != -1 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"fastvae::{name}: torch.func transforms (vmap, grad, vjp, jvp, ...) are not supported; use "
            f"fastvae.reference.{name} inside them"
        )

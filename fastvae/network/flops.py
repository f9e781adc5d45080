"""How many floating-point operations an operation of a program takes: products by formula, all else by its elements.

A product and the sum it goes into are two. torch.utils.flop_counter counts nothing that is elementwise, and of fused
operators (recurrent layers) nothing at all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fastvae.network.program import Operation

_PRODUCTS = frozenset({"mm", "bmm", "matmul", "mv", "dot"})
_ADDED_PRODUCTS = frozenset({"addmm", "baddbmm", "addmv"})
_RECURRENT = tuple(
    f"{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")
)


def flops_of(operation: Operation, values: Sequence[Any]) -> int:
    """Of one operation.

    Args:
        operation: of a program.
        values: by number, of a forward sweep that has kept them all.
    """
    kind, y, arguments = operation.kind, values[operation.index], operation.arguments(values)
    if kind == "linear":
        return 2 * y.numel() * arguments[1].shape[-1]
    if kind.startswith("conv_transpose") or (kind == "convolution" and arguments[6]):
        return 2 * arguments[0].numel() * arguments[1][0].numel()
    if kind in ("conv1d", "conv2d", "conv3d", "convolution"):
        return 2 * y.numel() * arguments[1][0].numel()
    if kind in _PRODUCTS or kind in _ADDED_PRODUCTS:
        left: Tensor = arguments[0] if kind in _PRODUCTS else arguments[1]
        return 2 * y.numel() * left.shape[-1]
    if kind in ("scaled_dot_product_attention", "_scaled_dot_product_attention_math"):
        query, key, value = arguments[:3]
        return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    if kind in _RECURRENT:
        # Every weight meets every row of the input once: samples times steps.
        weights = sum(tensor.numel() for tensor in _tensors(arguments[2:]) if tensor.dim() == 2)
        x: Tensor = arguments[0]
        return 2 * (x.numel() // x.shape[-1]) * weights
    return 0 if _moves_nothing(operation) else sum(tensor.numel() for tensor in _tensors(y))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for entry in tree:
            yield from _tensors(entry)


def _moves_nothing(operation: Operation) -> bool:
    """Whether it makes a view, or takes one of several results."""
    if operation.target is operator.getitem:
        return True
    schema = getattr(operation.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)

"""What torch.export wrote down, in operators for which there are layers: others as what they are made of.

torch's own ``run_decompositions`` runs the graph twice more, which takes longer than the export. Most networks need
none of it: their operators have layers, and what they do in place is told from the graph.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

from fastvae._second_order import CELLS, RECURRENT
from fastvae.network.layers.base import MAKERS
from fastvae.network.program import is_size


def simplified(exported: Any) -> Any:
    """An exported program in operators that have layers, without operations in place as far as that can be had."""
    graph = exported.graph_module.graph
    _keep_no_grad(graph)
    _drop_identities(graph)
    if not all(map(_has_a_layer, graph.nodes)) or not _without_writes(graph):
        exported.graph_module.recompile()
        return exported.run_decompositions(_simpler())
    return exported


def _drop_identities(graph: Graph) -> None:
    """Dropout in eval mode, and casts to the dtype that is there, which was another tensor's and may change with it."""
    for node in list(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if packet is torch.ops.aten.to:
            before, after = (each.meta["val"] for each in (node.args[0], node))
            is_identity = (before.dtype, before.device) == (after.dtype, after.device)
        else:
            is_identity = packet in _DROPOUTS and node.args[2:] == (False,)
        if is_identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


_DROPOUTS = [torch.ops.aten.dropout, torch.ops.aten.feature_dropout, torch.ops.aten.alpha_dropout]


def _has_a_layer(node: Node) -> bool:
    """Or is no operator that is made of others."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, (OpOverload, HigherOrderOperator)):
        return True
    if isinstance(target, HigherOrderOperator) or target in _simpler():
        return False
    known = target.overloadpacket in MAKERS or is_size(target)
    return known or _writes(target) or not _is_composite(target)


def _is_composite(target: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


def _writes(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def _without_writes(graph: Graph) -> bool:
    """Put new values in the place of changed ones; False if it cannot be told who else sees a change."""
    for node in list(graph.nodes):
        if not _writes(node.target):
            continue
        written, target = node.args[0] if node.args else None, _out_of_place(node.target)
        if target is None or not isinstance(written, Node) or not _is_fresh(written):
            return False
        if not all(user is node or _is_fresh(user) for user in written.users):
            return False
        with graph.inserting_before(node):
            value = graph.call_function(target, node.args, node.kwargs)
        value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        graph.erase_node(node)
        later = {user for user in written.users if value < user}
        written.replace_all_uses_with(value, later.__contains__)
    return True


def _out_of_place(target: Any) -> OpOverload | None:
    """relu for relu_; None where the first argument is not all that is written to."""
    arguments = target._schema.arguments
    name = target.overloadpacket.__name__
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if not name.endswith("_") or name.endswith("__") or written != [arguments[0].name]:
        return None
    found = getattr(getattr(torch.ops.aten, name[:-1], None), target._overloadname, None)
    if found is None or [a.name for a in found._schema.arguments] != [a.name for a in arguments]:
        return None
    return found if _is_fresh_operator(found) and found not in _simpler() else None


def _is_fresh(node: Node) -> bool:
    """Whether its result has memory of its own."""
    if node.op == "output":
        return True
    return node.op == "call_function" and _is_fresh_operator(node.target)


def _is_fresh_operator(target: Any) -> bool:
    if not isinstance(target, OpOverload) or any(r.alias_info is not None for r in target._schema.returns):
        return False
    # What is made of others may return its input as it is, as dropout does.
    return target.overloadpacket.__name__ in _FRESH or not _is_composite(target)


_FRESH = frozenset(
    {
        "linear", "matmul", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "batch_norm", "group_norm", "layer_norm", "instance_norm",
    }
)  # fmt: skip


@functools.cache
def _simpler() -> dict[Any, Any]:
    """Operators that are written down as what they are made of, for which there are rules."""
    aten = torch.ops.aten
    composite = torch.export.default_decompositions()
    return {
        **{
            operator: composite[operator]
            for operator in (aten.einsum.default, aten._scaled_dot_product_attention_math.default)
        },
        aten.copy.default: lambda written, x, non_blocking=False: x.to(written.dtype).expand(written.shape),
        aten.fill.Scalar: _filled,
        aten.fill.Tensor: lambda written, x: x.to(written.dtype).expand(written.shape),
        aten.slice_scatter.default: _with_slice,
        aten.select_scatter.default: _with_selected,
        aten.index_put.default: _where_masked,
        **{getattr(aten.var, form): _spread(form, False) for form in ("dim", "correction")},
        **{getattr(aten.std, form): _spread(form, True) for form in ("dim", "correction")},
        aten.addmm.default: _sum_and_product,
        aten.baddbmm.default: _sum_and_product,
        aten.addcmul.default: lambda a, b, c, *, value=1: a + b * c * value,
        aten.addcdiv.default: lambda a, b, c, *, value=1: a + b / c * value,
        aten.lerp.Scalar: lambda a, b, weight: a + (b - a) * weight,
        aten.lerp.Tensor: lambda a, b, weight: a + (b - a) * weight,
        aten.glu.default: _gated,
        **{getattr(aten, name).default: cell for name, cell in CELLS.items()},
        **{getattr(aten, kind).input: _unrolled(run) for kind, run in RECURRENT.items()},
        aten.threshold.default: lambda x, threshold, value: torch.where(x > threshold, x, value),
        aten.broadcast_tensors.default: _broadcast,
        aten.type_as.default: lambda x, like: x if x.dtype == like.dtype else x.to(like.dtype),
        aten.xlogy.Tensor: _x_log_y,
        aten.logaddexp.default: lambda a, b: torch.stack(_broadcast([a, b])).logsumexp(0),
        aten.mse_loss.default: lambda a, b, reduction=1: _mean_or_sum((a - b).square(), reduction),
        aten.binary_cross_entropy_with_logits.default: _cross_entropy_of_logits,
        aten.cross_entropy_loss.default: _cross_entropy,
    }


def _spread(form: str, of_root: bool) -> Callable[..., Any]:
    """aten.var of a form, or aten.std, whose derivative at 0 is 0, as that of a length is."""

    def run(x: Tensor, dim: list[int] | None = None, *unbiased: bool, **how: Any) -> Any:
        correction = how.get("correction", 1) if form == "correction" else int(unbiased[0]) if unbiased else 1
        keepdim = how.get("keepdim", unbiased[1] if len(unbiased) > 1 else False)
        sizes = [x.shape[each] for each in dim or ()]
        # Of all samples, or of too few numbers.
        if not sizes or not all(isinstance(size, int) for size in sizes):
            return NotImplemented
        count = math.prod(sizes) - (1 if correction is None else correction)
        if count <= 0:
            return NotImplemented
        centred = x - x.mean(dim, keepdim=True)
        if of_root:
            return torch.linalg.vector_norm(centred, dim=dim, keepdim=keepdim) / math.sqrt(count)
        return centred.square().sum(dim, keepdim=keepdim) / count

    return run


def _filled(written: Tensor, value: Any) -> Tensor:
    return torch.full(written.shape, value, dtype=written.dtype, device=written.device)


def _with_slice(
    x: Tensor, part: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """x with a part in the place of a slice, as the three side by side."""
    size = x.shape[dim]
    if step != 1:
        return NotImplemented
    if start in (None, 0) and end in (None, sys.maxsize):
        return part
    if not isinstance(size, int):  # of samples
        return NotImplemented
    first, last, _ = slice(start, end).indices(size)
    rest = x.narrow(dim, 0, first), part, x.narrow(dim, max(first, last), size - max(first, last))
    return torch.cat([each for each in rest if each.shape[dim] != 0], dim)


def _with_selected(x: Tensor, part: Tensor, dim: int, index: int) -> Tensor:
    at = index % x.shape[dim] if isinstance(x.shape[dim], int) else None
    return NotImplemented if at is None else _with_slice(x, part.unsqueeze(dim), dim, at, at + 1)


def _where_masked(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor:
    """x[mask] = value."""
    mask = indices[0]
    if accumulate or len(indices) != 1 or mask is None or mask.dtype != torch.bool or values.dim():
        return NotImplemented
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), values.to(x.dtype), x)


def _broadcast(tensors: Sequence[Tensor]) -> list[Tensor]:
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return [tensor.expand(shape) for tensor in tensors]


def _x_log_y(x: Tensor, y: Tensor) -> Tensor:
    y = y.to(torch.promote_types(x.dtype, y.dtype))
    return torch.where(x == 0, torch.zeros_like(y), x * torch.log(y))


def _mean_or_sum(losses: Tensor, reduction: int) -> Tensor:
    return losses if reduction == 0 else losses.mean() if reduction == 1 else losses.sum()


def _cross_entropy_of_logits(
    a: Tensor, x: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Any:
    if weight is not None or pos_weight is not None:
        return NotImplemented
    return _mean_or_sum((1 - x) * a - torch.nn.functional.logsigmoid(a), reduction)


def _cross_entropy(
    a: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignored: int = -100,
    smoothing: float = 0.0,
) -> Any:
    if weight is not None or smoothing or x.is_floating_point() or reduction == 1:
        return NotImplemented
    dim = 1 if a.dim() > 1 else 0
    counts = x != ignored
    losses = -a.log_softmax(dim).gather(dim, (x * counts).unsqueeze(dim)).squeeze(dim)
    return _mean_or_sum(losses * counts, reduction)


def _sum_and_product(a: Tensor, b: Tensor, c: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return (a if beta == 1 else a * beta) + (b @ c if alpha == 1 else b @ c * alpha)


_MOST_STEPS = 64
"""Of recurrent layers, all steps, layers and directions together; longer ones stay whole, and go through autograd."""


def _unrolled(run: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer as its cells, one after the other."""

    def write(x: Tensor, hx: Any, params: Any, has_biases: bool, *options: Any) -> Any:
        layers, dropout, train, bidirectional, batch_first = options
        if dropout and train:
            return NotImplemented
        steps = x.shape[1 if batch_first else 0]
        # A number of steps that is the number of samples says that the two were confused.
        if not isinstance(steps, int) or steps * layers * (1 + bidirectional) > _MOST_STEPS:
            return NotImplemented
        return run(x, hx, params, has_biases, *options)

    return write


def _gated(x: Tensor, dim: int = -1) -> Tensor:
    first, second = x.chunk(2, dim)
    return first * second.sigmoid()


def _keep_no_grad(graph: Graph) -> None:
    """What is computed under no_grad is written down as detached; the decompositions would forget it."""
    for node in list(graph.nodes):
        if (
            node.op == "call_function"
            and getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled"
        ):
            if node.args[0]:
                continue
            for result in list(node.users):
                with graph.inserting_after(result):
                    stopped = graph.call_function(torch.ops.aten.detach.default, (result,))
                    stopped.meta = dict(result.meta)
                result.replace_all_uses_with(stopped, lambda user, new=stopped: user is not new)


__all__ = ["simplified"]

"""torch.export as a reader of modules wants it: for any batch, without its log, with few and simple operators."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fastvae._compiling import exporting
from fastvae._second_order import twice_differentiable
from fastvae.lowering.errors import UnsupportedLayer

BATCHES = (2, 5)
"""Samples of the batches that are run: torch.export takes one sample for a size that never changes."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def example(z: Tensor, batch: int) -> Tensor:
    """Codes like z."""
    return torch.zeros((batch, *z.shape[1:]), dtype=z.dtype, device=z.device)


class _OfOthers:
    """Standard error without what one thread prints."""

    def __init__(self, stream: Any, thread: int) -> None:
        self.stream, self.thread = stream, thread

    def write(self, text: str) -> int:
        """Of other threads."""
        return len(text) if threading.get_ident() == self.thread else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch.export says of a forward that it cannot run: the error says so."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread

    known = logging.root.manager.loggerDict
    loggers = [logging.getLogger(name) for name in list(known) if name.partition(".")[0] == "torch"]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in handlers:
        handler.addFilter(passes)
    try:
        # It also prints the part of a graph that it came to.
        with contextlib.redirect_stderr(_OfOthers(sys.stderr, thread)):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


class Called(nn.Module):
    """A module whose forward takes ``*args``, as one of a single argument."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Any:
        """What it returns."""
        return self.module(z)


def takes_any(module: nn.Module) -> bool:
    """Whether the forward takes ``*args`` and no argument by name."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    return bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL


def export(module: nn.Module, z: Tensor, apart: bool) -> list[Any]:
    """The exported program; or two, one for each of ``BATCHES``, where a number is made of the batch."""
    dim = torch.export.Dim
    failure: Exception | None = None
    try:
        if not apart:
            return [_exported(module, example(z, BATCHES[0]), dim("batch"))]
    except Exception as error:
        failure = error
    try:
        if not apart:
            found = _exported(module, example(z, BATCHES[0]), dim.AUTO)
            if _any_batch(found):
                return [found]
        return [_exported(module, example(z, batch), None) for batch in BATCHES]
    except UnsupportedLayer:
        raise
    except Exception as error:
        failure = failure or error
        raise UnsupportedLayer(
            f"torch.export cannot run its forward: {type(failure).__name__}: {first_line(failure)}"
        ) from failure


def _exported(module: nn.Module, codes: Tensor, batch: Any) -> Any:
    shapes = None if batch is None else ({0: batch},)
    with torch.enable_grad(), twice_differentiable(), exporting():
        exported = torch.export.export(module, (codes,), dynamic_shapes=shapes, strict=False)
        _keep_no_grad(exported.graph_module)
        return exported.run_decompositions(_simpler())


def _any_batch(exported: Any) -> bool:
    """Whether the program holds for batches of any size; UnsupportedLayer if for some of them."""
    (name,) = exported.graph_signature.user_inputs
    (code,) = [node for node in exported.graph_module.graph.nodes if node.name == name]
    size = code.meta["val"].shape[0]
    if isinstance(size, int):
        return False
    known = exported.range_constraints.get(size.node.expr)
    if known is not None and (known.lower > BATCHES[0] or known.upper < 2**31):
        raise UnsupportedLayer("its forward does something else for batches of another size")
    return True


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
        aten.addmm.default: _sum_and_product,
        aten.baddbmm.default: _sum_and_product,
        aten.addcmul.default: lambda a, b, c, *, value=1: a + b * c * value,
        aten.addcdiv.default: lambda a, b, c, *, value=1: a + b / c * value,
        aten.lerp.Scalar: lambda a, b, weight: a + (b - a) * weight,
        aten.lerp.Tensor: lambda a, b, weight: a + (b - a) * weight,
        aten.glu.default: _gated,
        aten.prelu.default: _rectified,
        aten.threshold.default: lambda x, threshold, value: torch.where(x > threshold, x, value),
    }


def _sum_and_product(a: Tensor, b: Tensor, c: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return (a if beta == 1 else a * beta) + (b @ c if alpha == 1 else b @ c * alpha)


def _gated(x: Tensor, dim: int = -1) -> Tensor:
    first, second = x.chunk(2, dim)
    return first * second.sigmoid()


def _rectified(x: Tensor, slope: Tensor) -> Tensor:
    # One slope, or one a channel.
    slope = slope if slope.numel() == 1 else slope.reshape(-1, *[1] * (x.dim() - 2))
    return x.relu() + slope * x.clamp_max(0)


def _keep_no_grad(exported: GraphModule) -> None:
    """What is computed under no_grad is written down as detached; the decompositions would forget it."""
    graph = exported.graph
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
    exported.recompile()

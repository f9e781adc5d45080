"""A network that was read, operation by operation: what takes it, its shape, its share of the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.network.cache import ReadNetwork
from fastvae.network.flops import flops_of
from fastvae.network.layers.fused import FusedLayer
from fastvae.network.program import is_size
from fastvae.network.sweeps import Inputs, Sweeps


class Line(NamedTuple):
    """One operation.

    name: as torch.export calls it.
    kind: of the operator.
    rule: what takes it in a sweep: a layer, "autograd", or PyTorch once a call where z is not in it.
    sample: the shape of one sample's result ("?" where it has several), or of the whole where z is not in it.
    flops: of one sample's forward.
    opaque: whether autograd takes it.
    line: of the forward, where that is known.
    """

    name: str
    kind: str
    rule: str
    sample: str
    flops: float
    opaque: bool
    line: str = ""


def lines_of(network: ReadNetwork, z: Tensor) -> list[Line]:
    """The operations in order, but for those on sizes alone.

    Args:
        network: read for codes like z, with a condition of as many rows if it takes one.
        z: codes [2 or more, ...].
    """
    program = network.sweeps.program
    # Each operation by itself, whatever the sweeps have put together.
    plain = Sweeps(program, "")
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        values = plain.forward(
            Inputs(plain, z, network.tensors).detached(), z, program.is_active, keep=False
        ).values
    alone = {layer.index for layer in network.sweeps.layers if not isinstance(layer, FusedLayer)}
    rules = {layer.index: layer for layer in plain.layers}
    active = {operation.index for operation in program.active}
    found = []
    for operation in sorted([*program.passive, *program.active], key=lambda each: each.index):
        if is_size(operation.target):
            continue
        y, layer = values[operation.index], rules.get(operation.index)
        if operation.index not in active:
            found.append(
                Line(operation.name, operation.kind, "PyTorch, once a call", _shape(y, False), 0.0, False)
            )
            continue
        assert layer is not None
        rule = "autograd" if layer.by_autograd else type(layer).__name__
        rule += "" if operation.index in alone else ", fused"
        flops = flops_of(operation, values) / len(z)
        shape = _shape(y, True)
        found.append(
            Line(operation.name, operation.kind, rule, shape, flops, layer.by_autograd, operation.line)
        )
    return found


def _shape(y: Any, of_sample: bool) -> str:
    return str(list(y.shape[1:] if of_sample else y.shape)) if isinstance(y, Tensor) else "?"


def share_of(lines: Sequence[Line]) -> float:
    """The share of the forward's operations that rules take, 0 to 1; 1 where there are none."""
    total = sum(line.flops for line in lines)
    return 1.0 if total == 0 else sum(line.flops for line in lines if not line.opaque) / total


def rendered(lines: Sequence[Line]) -> str:
    """As a table."""
    rows = [
        ("operation", "kind", "rule", "sample"),
        *((each.name, each.kind, each.rule, each.sample) for each in lines),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


__all__ = ["Line", "lines_of", "rendered", "share_of"]

"""What the flow's benchmark was asked to show, and its table of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import report
from .common import markdown_table

OURS, RECOMPUTE = "ours, store", "ours, recompute"
EAGER_2K, EAGER = "eager, 2K forces", "eager, K+1 forces"
CHANNELS_LAST = "eager, K+1 forces, channels_last"
COMPILED, JAX = "torch.compile, K+1 forces", "JAX jit, K+1 forces"
GRAPH = ", CUDA graph"

TARGETS = [
    report.Target("cpu", "mlp", EAGER_2K, 2.6, OURS),
    report.Target("cpu", "mlp", EAGER, 1.35, OURS),
    report.Target("cpu", "mlp", JAX, 1.3, OURS),
    report.Target("cpu", "mlp", report.FLOOR, 1.15, OURS),
    report.Target("cpu", "small", EAGER, 18, OURS),
    report.Target("cpu", "small", JAX, 3, OURS),
    report.Target("cpu", "conv", EAGER, 2, OURS),
    report.Target("cuda", "mlp", EAGER, 8, OURS),
    report.Target("cuda", "mlp", EAGER + GRAPH, 2, OURS + GRAPH),
    report.Target("cuda", "mlp", JAX, 1.5, OURS),
]
MEMORY_BOUND = 1.1
"""peak extra memory of "recompute" at the larger K over that at the smaller, at most"""


def memory_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        growth = "" if row["growth"] is None else f"{row['growth']:.2f}x"
        sizes = [f"{size / 2**20:.1f}" for size in row["bytes"].values()]
        cells.append([row["case"], row["memory"], *sizes, growth])
    sizes = [f"K = {steps}, MiB" for steps in rows[0]["bytes"]]
    return markdown_table(["case", "memory", *sizes, "growth"], cells)


def memory_targets(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of "recompute": its peak at the larger K against that at the smaller."""
    return [
        report.verdict(
            row["case"],
            f"recompute, memory at K = {max(row['bytes'])}",
            f"K = {min(row['bytes'])}",
            MEMORY_BOUND,
            row["growth"],
            at_most=True,
        )
        for row in rows
        if row["memory"] == "recompute"
    ]

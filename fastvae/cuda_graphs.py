"""Work captured in CUDA graphs, so that one launch starts all of it.

Operators make graphs of their own (csrc/common/replay.h); ``release`` gives their memory back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastvae._extension import raw

__all__ = ["capture", "release", "run_steps"]

_Made = TypeVar("_Made")

WARM_UP = 2
"""Runs before work is captured: kernels are loaded and networks read by then."""

_WORTHWHILE = 16
"""Steps from which on a capture, about ten of them, pays."""

_streams = threading.local()


def release() -> None:
    """Forget the CUDA graphs that operators have made: their memory is PyTorch's again, and later calls make new ones.

    Graphs whose results somebody holds go with those. ``torch.cuda.empty_cache()`` then returns the memory to the GPU.
    """
    raw.release_graphs()


def capture(function: Callable[[], _Made], device: torch.device) -> tuple[torch.cuda.CUDAGraph, _Made]:
    """The graph of what a function does on a GPU, and what it returned, which every replay overwrites.

    Other threads may use the GPU meanwhile. Only for work that never waits for the GPU: PyTorch's generator and
    allocator do not recover from a capture that fails.
    """
    # A stream of this thread's own, and always the same: each has a workspace of cuBLAS.
    streams: dict[Any, torch.cuda.Stream] = vars(_streams)
    stream = streams.get(device) or streams.setdefault(device, torch.cuda.Stream(device))
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        made = function()
    return graph, made


def run_steps(
    step: Callable[[Tensor], Tensor], inputs: Tensor, can_be_captured: Callable[[], bool]
) -> Tensor:
    """The results [...] of a step for each of the inputs [K, ...]: [K, ...].

    Args:
        step: from an input to its result; it may change tensors in place.
        inputs: those of all steps.
        can_be_captured: asked after each of the first steps: whether the others may be replayed from a CUDA graph.
    """
    results: list[Tensor] = []
    for one in inputs:
        left = len(inputs) - len(results)
        if inputs.is_cuda and len(results) >= WARM_UP and left >= _WORTHWHILE and can_be_captured():
            break
        results.append(step(one))
    rest = inputs[len(results) :]
    if not len(rest):
        return torch.stack(results)
    later = results[0].new_empty(len(rest), *results[0].shape)
    at = torch.zeros(1, dtype=torch.int64, device=inputs.device)

    def next_step() -> None:
        later.index_copy_(0, at, step(rest.index_select(0, at)[0])[None])
        at.add_(1)

    graph, _ = capture(next_step, inputs.device)
    for _ in rest:
        graph.replay()
    return torch.cat((torch.stack(results), later))

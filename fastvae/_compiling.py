"""Who looks on: torch.compile or torch.export that trace a call, a mode that sees it, a CUDA graph that captures it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

_exporting: list[int] = []
"""The thread in which this package exports a copy of a decoder: PyTorch's flag holds for all threads meanwhile."""


def is_compiling() -> bool:
    """``torch.compiler.is_compiling``, which is not taken in by a reading of ours in another thread."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and _exporting in ([], [threading.get_ident()])


def is_in_compiled_graph() -> bool:
    """Whether ``torch.compile`` traces, and not ``torch.export``, whose programs are for where this package is not."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def is_watched() -> bool:
    """Whether a torch function mode sees what this thread calls, other than the one of a default device.

    ``torch.set_default_device`` and ``with torch.device(...)`` are such a mode, which gives a device to new tensors
    that were given none, and has no part in anything else.
    """
    modes = range(torch._C._len_torch_function_stack())
    return not all(isinstance(torch._C._get_function_stack_at(place), DeviceContext) for place in modes)


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done with a tensor goes into a CUDA graph, so that no number of it can be looked at."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


_PATCHED = "__fx_already_patched"
"""The mark by which torch.fx knows a function that it has replaced, and leaves it [torch 2.1 to 2.13]."""


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """For as long as this thread exports; by one thread at a time.

    torch.export replaces methods of ``nn.Module`` while it runs, to note which module makes an operation, and stumbles
    over the modules that other threads call meanwhile, or they over it. Nobody asks for these notes here: what is
    marked as replaced it leaves alone.
    """
    methods = nn.Module.__call__, nn.Module.__getattr__
    _exporting.append(threading.get_ident())
    try:
        for method in methods:
            vars(method)[_PATCHED] = True
        yield
    finally:
        for method in methods:
            vars(method).pop(_PATCHED, None)
        _exporting.pop()

"""Whether this call is traced by torch.compile or torch.export."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_exporting: list[int] = []
"""The thread in which this package exports a copy of a decoder: PyTorch's flag holds for all threads meanwhile."""


def is_compiling() -> bool:
    """``torch.compiler.is_compiling``, which is not taken in by a reading of ours in another thread."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and _exporting in ([], [threading.get_ident()])


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """For as long as this thread exports; by one thread at a time."""
    _exporting.append(threading.get_ident())
    try:
        yield
    finally:
        _exporting.pop()

"""Locks that a forked process, such as a loader's worker, never finds held by threads that it does not have."""

from __future__ import annotations

import os
import threading
from weakref import WeakSet

__all__ = ["READING", "Turns"]

READING = threading.RLock()
"""Of whoever reads modules. Tracing patches torch.nn.Module for the time it runs, and a reading meanwhile would take
that for the user's doing; a process forked then would keep the patches for ever: a fork waits."""

_turns: WeakSet[Turns] = WeakSet()


class Turns:
    """A lock that may be pickled and copied, as a new one that nobody holds; nor does anybody in a forked process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _turns.add(self)

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        """See above."""
        return Turns, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _free() -> None:
    READING.release()
    for turns in _turns:
        turns._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=READING.acquire, after_in_parent=READING.release, after_in_child=_free)

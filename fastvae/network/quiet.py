"""torch.export prints and logs what it could not trace. That is our business here, and no news for a user."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

_LOGGERS = ("torch.export", "torch.fx.experimental.symbolic_shapes", "torch._export.non_strict_utils")


class _OfOthers:
    """A stream that passes on what other threads write."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        """Only of another thread."""
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Drop what this thread's tracing writes to stderr and to torch's loggers; other threads' words stay."""
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(of_others)
    try:
        with contextlib.redirect_stderr(_OfOthers(sys.stderr)):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(of_others)

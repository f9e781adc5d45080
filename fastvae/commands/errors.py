"""What the caller of a command has to mend, and what is no fault of theirs."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["CommandError", "at_least", "mendable", "positive", "seed", "sides", "wants_memory"]


class CommandError(Exception):
    """Ends a command with exit status 2: arguments or data that the caller has to mend, as the message says."""


@contextmanager
def mendable() -> Iterator[None]:
    """Errors of what was given, which say what is wrong, as CommandError. For code whose arguments are the caller's."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise CommandError(f"{error.filename}: {error.strerror}") from error
        raise CommandError(_in_options(str(error))) from error


# Advice to whoever calls from Python.
_ADVICE = (
    (r"fastvae\.data\.load\(\.\.\., size=(\d+)\)", r"--size \1"),
    (r"\b(size|channels)=(\d+)", r"--\1 \2"),
    (r"; a column of text can be .*", "; --label, --condition and --ignore take columns of text"),
    (r"; what is missing takes weights, .*", ""),
    (r"; use split=.*| or pass labels=None .*|, or a larger max_unpacked", ""),
)


def _in_options(message: str) -> str:
    """The message of a function, with options of the command line in place of its arguments."""
    for pattern, words in _ADVICE:
        message = re.sub(pattern, words, message)
    return message.rstrip(",")


def wants_memory(error: BaseException) -> bool:
    """Whether there was not as much memory as was asked for, of the processor or of a GPU."""
    # torch's allocator for CPUs has no error of its own.
    is_torchs = isinstance(error, RuntimeError) and re.search(
        "(can't allocate|not enough) memory|out of memory", str(error)
    )
    return isinstance(error, MemoryError) or bool(is_torchs)


def positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    """Of an option: a finite number above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's own message, for text that is no number, names it
    return parse


def at_least(lowest: float) -> Callable[[str], float]:
    """Of an option: a finite number of at least ``lowest``."""

    def parse(text: str) -> float:
        value = float(text)
        if not lowest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a finite number of at least {lowest:g}, got {text}")
        return value

    parse.__name__ = "float"
    return parse


def seed(text: str) -> int:
    """Of an option: an int that torch's generators take."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a number of 64 bits, got {text}")
    return value


seed.__name__ = "int"


def sides(text: str) -> tuple[int, int]:
    """Of an option: a side, or height x width, as (height, width)."""
    words = text.lower().split("x")
    if len(words) > 2 or not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(
            f"expected a side such as 64, or height x width such as 48x64, got {text}"
        )
    return int(words[0]), int(words[-1])

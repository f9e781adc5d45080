"""Other people's decoders, as the measure of the package: from PyPI as they are, and what people write.

``ZOO`` maps a name to an :class:`Entry`; :func:`is_installed` says whether its package is there.
"""

from __future__ import annotations

import importlib.util

from . import images, own_gradients, packages, sequences, vectors
from .entry import OPERATORS, Entry, Problem, build, problem

__all__ = ["OPERATORS", "ZOO", "Entry", "Problem", "build", "is_installed", "problem"]

_ENTRIES = (
    *vectors.ENTRIES,
    *images.ENTRIES,
    *sequences.ENTRIES,
    *own_gradients.ENTRIES,
    *packages.ENTRIES,
)

ZOO: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
assert len(ZOO) == len(_ENTRIES), "two entries of one name"


def is_installed(entry: Entry) -> bool:
    """Whether what an entry is made of can be imported."""
    return not entry.package or importlib.util.find_spec(entry.package) is not None

"""The libraries that fastvae works with, imported as a test needs them."""

from __future__ import annotations

import importlib
from types import ModuleType


def peer(name: str) -> ModuleType:
    """Module ``name`` of a library that the test extra installs: a missing one fails the test.

    torchvision is not among them. The one on PyPI is built for CUDA: beside a CPU build of torch its import stops, and
    with it that of every library that looks for it (Lightning); so the environment of ``make`` has none.
    """
    return importlib.import_module(name)

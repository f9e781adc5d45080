"""The libraries that fastvae works with, imported as a test needs them."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def peer(name: str) -> ModuleType:
    """Module ``name`` of a library that the test extra installs: a missing one fails the test."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # torchvision's wheel on PyPI is built for CUDA: beside a CPU build of torch its C++ operators do not
        # load, and its import stops at the two that it registers fakes for. The peers use neither; they import
        # it for its data sets and transforms.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}() -> ()")
        _kept.append(library)
    return importlib.import_module(name)


_kept: list[torch.library.Library] = []

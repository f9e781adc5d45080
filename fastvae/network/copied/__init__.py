"""Networks of which every sample has its own copy, for likelihood regret."""

from __future__ import annotations

# Importing a file registers its layers.
from . import affine, convolutions, norms, slopes, tables  # noqa: F401
from .layers import CopiedGradient, CopiedPoint, in_full
from .network import CopiedNetwork, Start

__all__ = ["CopiedGradient", "CopiedNetwork", "CopiedPoint", "Start", "in_full"]

"""What the logarithm of the gamma function is beside Stirling's formula, with all digits where that is large."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LARGE", "stirling_rest", "stirling_series"]

LARGE = 16.0
"""From which on Stirling's series has all digits of a double after five terms. Below it sums of float32 lose few."""


def stirling_rest(y: Tensor) -> Tensor:
    """lgamma(y) - ((y - 1/2) log y - y + log(2 pi) / 2) for all y > 0."""
    small = y.clamp(max=LARGE)
    main = (small - 0.5) * small.log() - small + 0.5 * math.log(2 * math.pi)
    return torch.where(y < LARGE, torch.lgamma(small) - main, stirling_series(y.clamp(min=LARGE)))


def stirling_series(y: Tensor) -> Tensor:
    """The same of a large y."""
    i = 1 / y.square()
    return (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / 1188 * i) * i) * i) * i) / y

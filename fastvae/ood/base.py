"""What all outlier scores share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Detector"]

_Self = TypeVar("_Self", bound="Detector")


class Detector(ABC):
    """An outlier score of samples under a model; the interface is that of pytorch-ood's detectors.

    Args:
        model: what is scored under; kept as ``self.model``. Scores work on copies of it (``fastvae.private``), never
            on the model itself: any number of threads may score it, while others train it or serve from it.
    """

    requires_fit: bool = False
    """Whether ``predict`` needs ``fit`` first."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def fit(self: _Self, loader: Any) -> _Self:
        """Nothing to fit unless a score says otherwise; returns self."""
        return self

    @abstractmethod
    def predict(self, x: Tensor, *, condition: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Scores [B] of samples x [B, ...], higher = more foreign; detached.

        Args:
            x: [B, ...].
            condition: [B, ...] of a conditional model.
            weight: [B, ...] of x's elements, 0 for what is missing; see ``BaseVAE.forward``.
        """

    def __call__(self, x: Tensor, **given: Any) -> Tensor:
        """``predict``."""
        return self.predict(x, **given)

    def to(self: _Self, device: torch.device | str) -> _Self:
        """Move the model; returns self."""
        self.model.to(device)
        return self

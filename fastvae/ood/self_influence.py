"""Self-influence as an outlier score."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from fastvae.influence import TracIn
from fastvae.models.inputs import check_is_tensor
from fastvae.ood.base import Detector
from fastvae.training import load_checkpoint

__all__ = ["SelfInfluence"]


class SelfInfluence(Detector):
    """How strongly a sample pulls at the model: sum_c w_c |grad_theta loss(x)|^2 (Kong, Chaudhuri, NeurIPS 2021).

    A sample like many others finds its gradient near zero after training; a foreign one does not. It asks for
    no training data, so ``fit`` does nothing.

    Args:
        model: as for :class:`fastvae.influence.TracIn`.
        checkpoints: to sum over; None: the weights that the model has when ``predict`` is called.
        checkpoints_load_func, layers, loss_fn, num_samples, seed, uncovered: as for TracIn.
        unbiased: the U-statistic over the draws, where the model draws noise and ``num_samples`` is at least 2.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: str | os.PathLike[str] | Iterable[Any] | None = None,
        checkpoints_load_func: Callable[..., Any] = load_checkpoint,
        *,
        layers: Sequence[str] | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        num_samples: int = 16,
        seed: int = 0,
        unbiased: bool = True,
        uncovered: str = "error",
    ) -> None:
        super().__init__(model)
        self.unbiased = unbiased
        self._tracin = TracIn(
            model,
            None,
            checkpoints,
            checkpoints_load_func,
            layers,
            loss_fn,
            num_samples=num_samples,
            seed=seed,
            uncovered=uncovered,
        )

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B] of samples x [B, ...], higher = more foreign; on x's device, detached."""
        check_is_tensor(self, x)
        return self._tracin.self_influence(x, unbiased=self.unbiased).to(x.device)

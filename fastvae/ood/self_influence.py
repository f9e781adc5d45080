"""Self-influence as an outlier score."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastvae.arguments import given
from fastvae.influence import TracIn
from fastvae.likelihoods.weights import expanded
from fastvae.models.inputs import check_condition, check_is_tensor
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
        self._of: Callable[..., TracIn] = partial(
            TracIn,
            *(model, None, checkpoints, checkpoints_load_func, layers, loss_fn),
            num_samples=num_samples,
            seed=seed,
            uncovered=uncovered,
        )
        self._tracins: dict[tuple[str, ...], TracIn] = {(): self._of()}

    def predict(self, x: Tensor, *, condition: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Scores [B] of samples x [B, ...], higher = more foreign; on x's device, detached.

        Args:
            x: [B, ...].
            condition: [B, ...] of a conditional model.
            weight: [B, ...] of x's elements in the loss.
        """
        check_is_tensor(self, x)
        if condition is not None:
            check_condition(self, condition, len(x))
        if weight is not None:
            weight = expanded("SelfInfluence", weight, x)
        besides = given(condition=condition, weight=weight)
        names = tuple(besides)
        if names not in self._tracins:
            self._tracins[names] = self._of(**{name: place for place, name in enumerate(names, 1)})
        inputs = (x, *besides.values()) if besides else x
        return self._tracins[names].self_influence(inputs, unbiased=self.unbiased).to(x.device)

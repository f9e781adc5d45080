"""What others may do in the course of a run: ``Callback``, and early stopping as one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastvae.arguments import expect, expect_integers, expect_not_negative
from fastvae.training.history import History

if TYPE_CHECKING:
    from fastvae.training.run import Run

__all__ = ["Callback", "EarlyStopping", "Training"]


@dataclass(frozen=True)
class Training:
    """A run as callbacks see it."""

    _run: Run

    @property
    def model(self) -> nn.Module:
        """The model that ``fit`` was given."""
        return self._run.model

    @property
    def optimizer(self) -> Optimizer:
        """Its optimiser."""
        return self._run.optimizer

    @property
    def scheduler(self) -> LRScheduler | None:
        """The scheduler, if there is one."""
        return self._run.scheduler

    @property
    def history(self) -> History:
        """Losses and all else of the epochs so far; to look at."""
        return self._run.history

    @property
    def epoch(self) -> int:
        """Whole epochs so far."""
        return self._run.epoch

    @property
    def steps(self) -> int:
        """Optimisation steps so far."""
        return self._run.steps

    @property
    def loss(self) -> float:
        """The mean loss of the last step's samples; NaN before the first."""
        return self._run.last_loss

    @property
    def run_dir(self) -> Path | None:
        """Where checkpoints go."""
        return self._run.run_dir

    @property
    def is_first_process(self) -> bool:
        """Whether this process is the one that writes, of several; of one it is."""
        return self._run.team.rank == 0

    def stop(self, reason: str = "callback") -> None:
        """End the run: after this step, or, of several processes, after this epoch.

        ``history.stopped`` is then the reason, "callback" or "patience".
        """
        expect(
            reason in ("callback", "patience"),
            'Training.stop: reason: expected "callback" or "patience"',
            repr(reason),
        )
        self._run.stop_reason = reason

    def keep_weights(self) -> None:
        """Remember the weights as they are now, in place of any that were kept before; checkpoints hold them, too."""
        self._run.keep_weights()

    def restore_weights(self) -> None:
        """Put the weights back that were kept, if any were."""
        self._run.restore_weights()


class Callback:
    """Called by ``fit`` in the course of a run; every method does nothing until a subclass has its own.

    It may read everything, change the learning rate or a module's settings, and stop the run. What it does with global
    random generators changes the noise of the run. In several processes all of them call it.
    """

    def on_start(self, training: Training) -> None:
        """Before the first step of this call of ``fit``, after a checkpoint was restored."""

    def on_step(self, training: Training) -> None:
        """After each optimisation step that was taken."""

    def on_epoch(self, training: Training) -> None:
        """After each epoch with its validation, before its checkpoint."""

    def on_end(self, training: Training) -> None:
        """After the last epoch and its checkpoint; not after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for a run that goes on: tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave; called before ``on_start``."""


class EarlyStopping(Callback):
    """Ends a run whose validation loss falls no more, and puts the best weights back at its end.

    It knows what it needs from the history, so that a resumed run stops where one that went through does.
    ``fit(..., patience=n)`` is ``EarlyStopping(n)``.

    Args:
        patience: epochs without improvement after which the run ends, at least 1.
        min_delta: by how much a validation loss must be lower than the lowest before to count, in nats, at least 0.
        restore_best: put the weights of the best epoch back when the run ends, for whatever reason.

    Raises:
        ValueError: an argument out of range; later, a run without ``val_loader``.
    """

    def __init__(self, patience: int, *, min_delta: float = 0.0, restore_best: bool = True) -> None:
        expect_integers("EarlyStopping", 1, patience=patience)
        expect_not_negative("EarlyStopping", min_delta=min_delta)
        self.patience, self.min_delta, self.restore_best = int(patience), float(min_delta), bool(restore_best)

    def best_epoch(self, history: History) -> int:
        """The last epoch (from 1) that counted as an improvement, 0 without one."""
        best, lowest = 0, math.inf
        for epoch, loss in enumerate(history.val_loss, 1):
            if loss is not None and loss < lowest - self.min_delta:
                best, lowest = epoch, loss
        return best

    def on_start(self, training: Training) -> None:
        """Stops a run that had come to its end before."""
        self._stop_if_due(training)

    def on_epoch(self, training: Training) -> None:
        """Keeps the weights of an improvement; stops without one for too long."""
        expect(
            training.history.val_loss[-1] is not None,
            "EarlyStopping: expected fit(..., val_loader=...), whose loss it watches",
            "none",
        )
        if self.restore_best and self.best_epoch(training.history) == len(training.history.val_loss):
            training.keep_weights()
        self._stop_if_due(training)

    def on_end(self, training: Training) -> None:
        """Puts the best weights back."""
        if self.restore_best:
            training.restore_weights()

    def _stop_if_due(self, training: Training) -> None:
        best = self.best_epoch(training.history)
        if best and training.epoch - best >= self.patience:
            training.stop("patience")

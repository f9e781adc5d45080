"""A run in progress: epochs, validation, and what ends it."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fastvae.models import DivergenceError
from fastvae.modes import modes_kept
from fastvae.progress import bar_of
from fastvae.training.batches import Batch
from fastvae.training.callbacks import Training
from fastvae.training.checkpointed import CheckpointedRun
from fastvae.training.checkpoints import step_penalties
from fastvae.training.loaders import length_of, samplers_of
from fastvae.training.randomness import seed_globals
from fastvae.training.step import NotFiniteError
from fastvae.wrappers import unwrap

__all__ = ["Run"]


@dataclass
class Run(CheckpointedRun):
    """A run in progress."""

    def train(self, epochs: int, max_steps: int | None, progress: bool) -> None:
        """Epoch after epoch until one of the limits; then the best weights, where patience kept them."""
        length = length_of(self.loader)
        total = None if length is None else min(epochs * length, max_steps or epochs * length)
        bar = bar_of(total, "fit", "step", progress and self.team.rank == 0, initial=self.steps)
        training = Training(self)
        try:
            for callback in self.callbacks:
                callback.on_start(training)
            self.history.stopped = self._stopped(epochs, max_steps)
            self.history.trained_epochs = 0
            if self.history.stopped and progress and self.team.rank == 0:
                print(
                    f"fit: complete before, after {self.epoch} epochs and {self.steps} steps "
                    f"({self.last_checkpoint}): nothing was trained",
                    file=sys.stderr,
                )
            while not self.history.stopped:
                self.history.trained_epochs += 1
                complete = self._train_epoch(max_steps, length, bar, training)
                for callback in self.callbacks:
                    callback.on_epoch(training)
                self.history.stopped = self._stopped(epochs, max_steps)
                if self.run_dir is None:
                    continue
                due = bool(self.history.stopped) or self.epoch % (self.interval or 1) == 0
                if self.interval is not None and (due or self.keep_latest):
                    self._save(complete, temporary=not due)
                path = self.run_dir / "history.json"
                self.team.by_first(lambda path=path: self.history.save(path))  # type: ignore[misc]
            # No process reads a checkpoint before the first has written it.
            self.team.wait()
        finally:
            bar.close()
        for callback in self.callbacks:
            callback.on_end(training)

    def _stopped(self, epochs: int, max_steps: int | None) -> str:
        if self.epoch >= epochs:
            return "epochs"
        if max_steps is not None and self.steps >= max_steps:
            return "max_steps"
        return next(filter(None, self.team.gathered(self.stop_reason)), "")

    def _train_epoch(self, max_steps: int | None, length: int | None, bar: Any, training: Training) -> bool:
        """One epoch with its validation and its row of the history; False if it was cut short."""
        started = time.perf_counter()
        number = self.epoch + 1
        seed_globals(self.seed, "train", number, self.team.rank)
        for sampler in samplers_of(self.loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)
        total, samples, batches, complete = 0.0, 0.0, 0, True
        rates: list[float] = []
        for batch in self.loader:
            # Several processes agree on a callback's wish at the end of an epoch.
            is_stopped = bool(self.stop_reason) and self.team.size == 1
            if is_stopped or (max_steps is not None and self.steps >= max_steps):
                complete = False
                break
            batches += 1
            done = self._step(
                self.stepper.batch(batch),
                f"epoch {number}, step {batches} (step {self.steps + 1} of the run)",
            )
            if done is not None:
                value, count = done
                total += value * count
                samples += count
                rates.append(float(self.optimizer.param_groups[0]["lr"]))
                self.steps += 1
                step_penalties(self.model)
                self.last_loss = value
                if self.schedule_by == "step":
                    self._advance_scheduler(value)
                for callback in self.callbacks:
                    callback.on_step(training)
            bar.set_postfix_str(
                f"epoch {number}, loss {math.nan if done is None else done[0]:.4f}", refresh=False
            )
            bar.update(1)
        if not batches:
            raise ValueError(
                f"fit: loader: expected at least one batch, got none in epoch {number} "
                "(drop_last with too few images, or an iterator that can be read only once?)"
            )
        if not samples:
            raise self._not_finite(f"all {batches} steps of epoch {number} were skipped")
        bad = [name for name, value in unwrap(self.model).state_dict().items() if not _is_finite(value)]
        if self.team.sums(len(bad))[0]:
            where = bad[0] if bad else "the model of another process"
            raise self._not_finite(f"epoch {number}: after its last step {where} is not finite")
        val_loss = self._validate(number)
        mean_rate = math.fsum(rates) / len(rates)
        self.pending_weight += mean_rate * (1.0 if complete or not length else batches / length)
        if complete:
            self.epoch = number
            if self.schedule_by == "epoch":
                self._advance_scheduler(total / samples if val_loss is None else val_loss)
        self._record(number, total / samples, val_loss, mean_rate, batches - len(rates))
        self.history.seconds.append(time.perf_counter() - started)
        return complete

    def _record(self, number: int, loss: float, val_loss: float | None, rate: float, skipped: int) -> None:
        history = self.history
        history.train_loss.append(loss)
        history.val_loss.append(val_loss)
        history.learning_rate.append(rate)
        history.steps.append(self.steps)
        history.skipped.append(skipped)
        if val_loss is None or math.isnan(val_loss):
            return
        lowest = None if history.best_epoch is None else history.val_loss[history.best_epoch - 1]
        if lowest is None or val_loss < lowest:
            history.best_epoch = number

    def _step(self, batch: Batch, where: str) -> tuple[float, float] | None:
        """One optimisation step; its loss and the amount of its samples, or None if it was skipped."""
        try:
            return self.stepper.take(batch)
        except NotFiniteError as problem:
            if self.on_nonfinite == "raise":
                raise self._not_finite(f"{where}: {problem}") from problem.__cause__
            return None

    def _not_finite(self, what: str) -> FloatingPointError:
        skipping = self.on_nonfinite == "skip"
        remedies = "or clip_grad_norm" if skipping else 'clip_grad_norm or on_nonfinite="skip"'
        return FloatingPointError(
            f"fit: {what}; last good checkpoint: {self.last_checkpoint or 'none was written'}. "
            f"A lower learning rate{' ' if skipping else ', '}{remedies} may help"
        )

    @torch.no_grad()
    def _validate(self, number: int) -> float | None:
        if self.val_loader is None:
            return None
        # The same noise after every epoch: differences between epochs are then the model's.
        seed_globals(self.seed, "validation", 0, self.team.rank)
        total, samples = 0.0, 0.0
        cause: DivergenceError | None = None
        problem = ""
        with modes_kept(self.model):
            self.model.eval()
            for batch in self.val_loader:
                given = self.stepper.batch(batch)
                samples += given.amount
                try:
                    part, why = self.stepper.validation_loss(given)
                    total, problem = total + part, problem or why
                except DivergenceError as error:
                    total, cause = math.inf, error
        total, samples = self.team.sums(total, samples)
        if not samples:
            raise ValueError(f"fit: val_loader: expected at least one batch, got none in epoch {number}")
        if not math.isfinite(total) and self.on_nonfinite == "raise":
            found = cause or f"loss {total / samples}{problem}"
            raise self._not_finite(f"epoch {number}, validation: {found}") from cause
        return total / samples

    def _advance_scheduler(self, loss: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())

"""A run in progress: epochs, validation, and what ends it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fastvae.arguments import expect
from fastvae.models import DivergenceError
from fastvae.modes import modes_kept
from fastvae.progress import bar_of
from fastvae.randomness import seed_globals
from fastvae.training.batches import Batch
from fastvae.training.callbacks import Training
from fastvae.training.checkpointed import CheckpointedRun
from fastvae.training.checkpoints import step_penalties
from fastvae.training.loaders import length_of, samplers_of
from fastvae.training.midway import (
    Interrupt,
    PartOfEpoch,
    interrupts_noted,
    plain_states,
    set_plain_states,
)
from fastvae.training.step import NotFiniteError, Taken
from fastvae.wrappers import unwrap

__all__ = ["Run"]


@dataclass
class Run(CheckpointedRun):
    """A run in progress."""

    interrupt: Interrupt = field(default_factory=Interrupt)
    midway: dict[str, Any] | None = None
    """The state where the last epoch was cut short, to go on from."""

    def train(self, epochs: int, max_steps: int | None, progress: bool) -> None:
        """Epoch after epoch until one of the limits; then the best weights, where patience kept them."""
        length = length_of(self.loader)
        total = None if length is None else min(epochs * length, max_steps or epochs * length)
        bar = bar_of(total, "fit", "step", progress and self.team.rank == 0, initial=self.steps)
        training = Training(self)
        with interrupts_noted(self.writes and self.team.size == 1) as self.interrupt:
            self._train(epochs, max_steps, length, bar, training, progress)
        if self.interrupt.is_set:
            raise KeyboardInterrupt("fit: the run had come to its end")

    def _train(
        self,
        epochs: int,
        max_steps: int | None,
        length: int | None,
        bar: Any,
        training: Training,
        progress: bool,
    ) -> None:
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
                self._train_epoch(max_steps, length, bar, training)
                for callback in self.callbacks:
                    callback.on_epoch(training)
                self.history.stopped = self._stopped(epochs, max_steps)
                due = bool(self.history.stopped) or self.epoch % (self.interval or 1) == 0
                if self.writes and (due or self.keep_latest):
                    self._save(self.midway, temporary=not due)
                self._save_history()
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

    def _save_history(self) -> None:
        if self.run_dir is not None:
            path = self.run_dir / "history.json"
            self.team.by_first(lambda: self.history.save(path))

    def _train_epoch(self, max_steps: int | None, length: int | None, bar: Any, training: Training) -> None:
        """One epoch, or what is left of it, with its validation and its row of the history.

        Raises:
            KeyboardInterrupt: after Ctrl-C, when a checkpoint has been written.
        """
        started = time.perf_counter()
        number = self.epoch + 1
        seed_globals(self.seed, "train", number, self.team.rank)
        for sampler in samplers_of(self.loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)
        self.loader_states = self._loader_states()
        part, self.part = self.part or PartOfEpoch(pending_weight=self.pending_weight), None
        before, self.midway, is_due, complete = part.seconds, None, False, True
        for batch in self._batches(part):
            if is_due:
                complete = False
                self.midway = self._state_midway(part) if self.writes else None
                break
            part.batches += 1
            done = self._step(
                self.stepper.batch(batch),
                f"epoch {number}, step {part.batches} (step {self.steps + 1} of the run)",
            )
            if done is not None:
                part.loss += done.loss * done.amount
                part.samples += done.amount
                self.last_loss = done.loss
            if done is not None and not done.overflowed:
                part.rates.append(float(self.optimizer.param_groups[0]["lr"]))
                self.steps += 1
                step_penalties(self.model)
                if self.schedule_by == "step":
                    self._advance_scheduler(done.loss)
                for callback in self.callbacks:
                    callback.on_step(training)
            said = "not finite, skipped" if done is None else f"{done.loss:.4f}"
            said += ", gradients overflowed, skipped" if done is not None and done.overflowed else ""
            bar.set_postfix_str(f"epoch {number}, loss {said}", refresh=False)
            bar.update(1)
            part.seconds = before + time.perf_counter() - started
            # Several processes agree on a callback's wish at the end of an epoch.
            is_stopped = bool(self.stop_reason) and self.team.size == 1
            is_due = is_stopped or (max_steps is not None and self.steps >= max_steps)
            if is_due:
                part.random = self.team.gathered(plain_states())
            self._heed_interrupt(part, length)
        self._heed_interrupt(part, length)
        if not part.batches:
            raise ValueError(
                f"fit: loader: expected at least one batch, got none in epoch {number} "
                "(drop_last with too few images, or an iterator that can be read only once?)"
            )
        if not part.samples:
            raise self._not_finite(f"all {part.batches} steps of epoch {number} were skipped")
        bad = [name for name, value in unwrap(self.model).state_dict().items() if not _is_finite(value)]
        if self.team.sums(len(bad))[0]:
            where = bad[0] if bad else "the model of another process"
            raise self._not_finite(f"epoch {number}: after its last step {where} is not finite")
        val_loss = self._validate(number, part, length)
        self.pending_weight = part.pending_weight + part.weight(None if complete else length)
        if complete:
            self.epoch = number
            if self.schedule_by == "epoch":
                self._advance_scheduler(part.loss / part.samples if val_loss is None else val_loss)
        skipped = part.batches - len(part.rates)
        self._record(number, part.loss / part.samples, val_loss, part.mean_rate, skipped)
        self.history.seconds.append(before + time.perf_counter() - started)

    def _batches(self, part: PartOfEpoch) -> Iterator[Any]:
        """Those of an epoch that were not taken before; the generators are then where they were."""
        waiting, batches = part.batches, iter(self.loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except RuntimeError:
                # Workers end on Ctrl-C, too.
                if self.interrupt.is_set:
                    return
                raise
            if not waiting:
                yield batch
                continue
            waiting -= 1
            if not waiting:
                set_plain_states(part.random[self.team.rank])
        expect(
            not waiting,
            f"fit: loader: expected the {part.batches} batches that epoch {self.epoch + 1} had when it was interrupted",
            part.batches - waiting,
        )

    def _heed_interrupt(self, part: PartOfEpoch, length: int | None) -> None:
        """After Ctrl-C, a checkpoint and KeyboardInterrupt. For moments at which nothing is half done."""
        if not self.interrupt.is_set:
            return
        part.random = [plain_states()]
        self.pending_weight = part.pending_weight + part.weight(length)
        self._save(self._state_midway(part), temporary=True)
        self._save_history()
        raise KeyboardInterrupt(f"fit: {self.last_checkpoint} holds the run as it is now")

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

    def _step(self, batch: Batch, where: str) -> Taken | None:
        """One optimisation step; None if it was skipped for a loss or gradients that are not finite."""
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
    def _validate(self, number: int, part: PartOfEpoch, length: int | None) -> float | None:
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
                    loss, why = self.stepper.validation_loss(given)
                    total, problem = total + loss, problem or why
                except DivergenceError as error:
                    total, cause = math.inf, error
                self._heed_interrupt(part, length)
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

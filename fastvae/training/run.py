"""A run in progress: epochs, validation, early stopping, and the checkpoints to go on from."""

from __future__ import annotations

import copy
import importlib
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastvae.models import DivergenceError
from fastvae.modes import modes_kept
from fastvae.training.archive import DamagedFileError
from fastvae.training.batches import Batch
from fastvae.training.checkpoints import save_checkpoint, step_penalties
from fastvae.training.definition import (
    Definition,
    define,
    described,
    fingerprint_of_data,
)
from fastvae.training.history import History
from fastvae.training.loaders import generators_of, length_of, samplers_of
from fastvae.training.parallel import Team, unwrap
from fastvae.training.randomness import seed_globals
from fastvae.training.resuming import Saved, copy_into, load_into, read_saved
from fastvae.training.step import NotFiniteError, Stepper

__all__ = ["Run"]

_EPOCH_FILE = re.compile(r"epoch-(\d+)\.pt")


@dataclass
class Run:
    """A run in progress; what a checkpoint must hold to go on is in ``_save`` and ``_restore``."""

    model: nn.Module
    loader: Iterable[Any]
    val_loader: Iterable[Any] | None
    optimizer: Optimizer
    scheduler: LRScheduler | None
    run_dir: Path | None
    interval: int | None
    seed: int
    schedule_by: str
    patience: int | None
    on_nonfinite: str
    on_difference: str
    options: Mapping[str, object]
    """Arguments of ``fit`` that belong to what defines the run."""
    stepper: Stepper
    team: Team
    history: History = field(default_factory=History)
    epoch: int = 0
    steps: int = 0
    best: dict[str, Any] | None = None
    pending_weight: float = 0.0
    last_checkpoint: Path | None = None
    definition: Definition | None = None
    """None where nothing is written or read."""

    def start(self, resume: bool | str | os.PathLike[str], epochs: int, max_steps: int | None) -> None:
        """Restore what ``resume`` asks for, or write the checkpoint of the start."""
        there = _epoch_files(self.run_dir)
        # Every process has looked into the folder before the first writes to it.
        self.team.wait()
        anew = isinstance(resume, bool) or resume == "auto"
        if self.run_dir is not None or not anew:
            self.definition = self._define()
            for name, loader in self._loaders().items():
                if (found := fingerprint_of_data(loader)) is not None:
                    self.definition.settings[f"{name}.data"] = found
        if anew and resume and there:
            self._restore_newest(there, epochs, max_steps)
            return
        if resume is True:
            raise FileNotFoundError(
                f"fit: resume=True: expected checkpoints in run_dir {self.run_dir}, found none"
            )
        saved = None if isinstance(resume, bool) or anew else read_saved(Path(resume))
        if later := [path for number, path in sorted(there.items()) if saved is None or number > saved.epoch]:
            after = "" if saved is None else f"after epoch {saved.epoch} "
            raise FileExistsError(
                f"fit: run_dir: expected no checkpoints {after}in {self.run_dir}, found "
                f'{", ".join(path.name for path in later[:3])}; delete them, choose another folder or resume="auto"'
            )
        if saved is not None:
            self._restore(saved)
        if self.run_dir is None:
            return
        folder, checkpoints = self.run_dir, self.history.checkpoints
        self.team.by_first(lambda: copy_into(folder, checkpoints))
        self.history.checkpoints = [folder / path.name for path in checkpoints]
        if self.interval is not None and anew:
            self._save(complete=True)

    def train(self, epochs: int, max_steps: int | None, progress: bool) -> None:
        """Epoch after epoch until one of the limits; then the best weights, where patience kept them."""
        length = length_of(self.loader)
        total = None if length is None else min(epochs * length, max_steps or epochs * length)
        bar = _progress_bar(total, self.steps) if progress and self.team.rank == 0 else None
        try:
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
                complete = self._train_epoch(max_steps, length, bar)
                self.history.stopped = self._stopped(epochs, max_steps)
                if self.run_dir is None:
                    continue
                due = bool(self.history.stopped) or self.epoch % (self.interval or 1) == 0
                if self.interval is not None and due:
                    self._save(complete)
                path = self.run_dir / "history.json"
                self.team.by_first(lambda path=path: self.history.save(path))  # type: ignore[misc]
            # No process reads a checkpoint before the first has written it.
            self.team.wait()
        finally:
            if bar is not None:
                bar.close()
        if self.patience is not None and self.best is not None:
            unwrap(self.model).load_state_dict(self.best)

    def _stopped(self, epochs: int, max_steps: int | None) -> str:
        if self.epoch >= epochs:
            return "epochs"
        if max_steps is not None and self.steps >= max_steps:
            return "max_steps"
        best = self.history.best_epoch
        return "patience" if self.patience and best and self.epoch - best >= self.patience else ""

    def _train_epoch(self, max_steps: int | None, length: int | None, bar: Any) -> bool:
        """One epoch with its validation and its row of the history; False if ``max_steps`` cut it short."""
        started = time.perf_counter()
        number = self.epoch + 1
        seed_globals(self.seed, "train", number, self.team.rank)
        for sampler in samplers_of(self.loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)
        total, samples, batches, complete = 0.0, 0.0, 0, True
        rates: list[float] = []
        for batch in self.loader:
            if max_steps is not None and self.steps >= max_steps:
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
                if self.schedule_by == "step":
                    self._advance_scheduler(value)
            if bar is not None:
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
            if self.patience is not None:
                self.best = copy.deepcopy(unwrap(self.model).state_dict())

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

    def _save(self, complete: bool) -> None:
        assert self.run_dir is not None and self.definition is not None
        path = self.run_dir / (f"epoch-{self.epoch:04d}.pt" if complete else f"step-{self.steps:08d}.pt")
        if self.steps:
            self.history.checkpoints.append(path)
        state = {
            "epoch": self.epoch,
            "steps": self.steps,
            "complete": complete,
            "seed": self.seed,
            "optimizer": type(self.optimizer).__qualname__,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "generators": self.team.gathered(
                [generator.get_state() for generator in generators_of(self.loader, self.val_loader)]
            ),
            "history": self.history.to_dict(self.run_dir),
            "best": self.best,
            "definition": self.definition.at(self._define()).to_dict(),
        }
        self.team.by_first(
            lambda: save_checkpoint(
                self.model, path, weight=self.pending_weight, optimizer=self.optimizer, state=state
            )
        )
        self.pending_weight = 0.0
        self.last_checkpoint = path

    def _restore_newest(self, there: dict[int, Path], epochs: int, max_steps: int | None) -> None:
        for number, path in sorted(there.items(), reverse=True):
            if number > epochs:
                continue
            try:
                saved = read_saved(path, number)
                if max_steps is None or saved.steps <= max_steps:
                    self._restore(saved)
                    return
            except (DamagedFileError, FileNotFoundError) as error:
                warnings.warn(f"fit: {error}; going back to the checkpoint before it", stacklevel=4)
        raise ValueError(
            f"fit: resume: expected a usable checkpoint in run_dir, found none in {self.run_dir}"
        )

    def _restore(self, saved: Saved) -> None:
        path = saved.path
        generators = generators_of(self.loader, self.val_loader)
        needed = {
            "optimizer": (saved.optimizer, type(self.optimizer).__qualname__),
            "use of a scheduler": (saved.scheduler is not None, self.scheduler is not None),
            "number of processes": (len(saved.generators), self.team.size),
            "number of loader generators": (len(saved.generators[-1]), len(generators)),
        }
        if unlike := {name: (str(a), str(b)) for name, (a, b) in needed.items() if a != b}:
            raise ValueError(f"{path}: expected a run with {described(unlike)}")
        if self.patience is not None and saved.history.best_epoch is not None and saved.best is None:
            raise ValueError(f"{path}: expected a run with patience, found one that kept no best weights")
        differences = self._differences(saved)
        if differences and self.on_difference == "raise":
            raise ValueError(
                f"{path}: expected a run with {described(differences)}. Choose another run_dir for another run, "
                'or on_difference="warn" to go on with this one as it is now'
            )
        rank = self.team.rank
        try:
            load_into(saved, self.model, self.optimizer, self.scheduler, generators, rank, differences)
        except DamagedFileError:
            raise
        except ValueError as error:
            if saved.definition is None or differences:
                raise
            # The same model and optimiser wrote it: what does not fit was damaged.
            raise DamagedFileError(path, error) from error
        if differences:
            warnings.warn(f"fit: {path}: going on, but not with {described(differences)}", stacklevel=5)
        elif saved.definition is not None and self.definition is not None:
            settings = {**self.definition.settings, **saved.definition.settings}
            self.definition = Definition(saved.definition.parts, settings)
        self.history, self.best, self.last_checkpoint = saved.history, saved.best, path
        self.epoch, self.steps = saved.epoch, saved.steps

    def _differences(self, saved: Saved) -> dict[str, tuple[str, str]]:
        """Between the run that wrote a checkpoint and this one, as the first process sees them."""
        found: dict[str, tuple[str, str]] = {}
        if saved.seed != self.seed:
            found["seed"] = repr(saved.seed), repr(self.seed)
        if saved.definition is not None and self.definition is not None:
            found |= saved.definition.differences(self.definition)
        first: dict[str, tuple[str, str]] = self.team.gathered(found)[0]
        return first

    def _loaders(self) -> dict[str, Any]:
        return {"loader": self.loader, "val_loader": self.val_loader}

    def _define(self) -> Definition:
        return define(self.model, self.optimizer, self.scheduler, self._loaders(), self.options)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())


def _epoch_files(run_dir: Path | None) -> dict[int, Path]:
    if run_dir is None or not run_dir.is_dir():
        return {}
    matches = ((_EPOCH_FILE.fullmatch(path.name), path) for path in run_dir.iterdir())
    return {int(match[1]): path for match, path in matches if match is not None}


def _progress_bar(total: int | None, initial: int) -> Any:
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ModuleNotFoundError:
        return None
    return tqdm(total=total, initial=initial, unit="step", desc="fit", disable=None, dynamic_ncols=True)

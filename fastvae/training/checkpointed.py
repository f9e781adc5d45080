"""A run as far as checkpoints are concerned: what they hold, and how a run goes on from them."""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastvae.training.archive import DamagedFileError
from fastvae.training.callbacks import Callback, EarlyStopping
from fastvae.training.checkpoints import save_checkpoint
from fastvae.training.definition import (
    Definition,
    define,
    described,
    fingerprint_of_data,
)
from fastvae.training.history import History
from fastvae.training.loaders import generators_of
from fastvae.training.midway import PartOfEpoch
from fastvae.training.parallel import Team
from fastvae.training.resuming import Saved, copy_into, load_into, read_saved
from fastvae.training.step import Stepper
from fastvae.wrappers import unwrap

__all__ = ["CheckpointedRun"]

_EPOCH_FILE = re.compile(r"epoch-(\d+)\.pt")
_STEP_FILE = re.compile(r"step-(\d+)\.pt")


@dataclass
class CheckpointedRun:
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
    callbacks: Sequence[Callback]
    keep_latest: bool
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
    """Weights that a callback wants kept."""
    last_loss: float = math.nan
    stop_reason: str = ""
    """Why a callback wants the run to end."""
    pending_weight: float = 0.0
    """Of TracIn, since the last checkpoint that stays."""
    temporary: Path | None = None
    """The checkpoint that the next one replaces."""
    last_checkpoint: Path | None = None
    definition: Definition | None = None
    """None where nothing is written or read."""
    part: PartOfEpoch | None = None
    """Of the next epoch, which was restored and is to go on."""
    loader_states: list[list[Tensor]] = field(default_factory=list)
    """Of the loaders' generators, for each process, at the start of the epoch."""

    def start(self, resume: bool | str | os.PathLike[str], epochs: int, max_steps: int | None) -> None:
        """Restore what ``resume`` asks for, or write the checkpoint of the start."""
        there = _numbered_files(self.run_dir, _EPOCH_FILE)
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
            self._save()

    def keep_weights(self) -> None:
        """Remember the weights as they are now."""
        self.best = copy.deepcopy(unwrap(self.model).state_dict())

    def restore_weights(self) -> None:
        """Put the weights back that were kept, if any were."""
        if self.best is not None:
            unwrap(self.model).load_state_dict(self.best)

    @property
    def writes(self) -> bool:
        """Whether there are to be checkpoints."""
        return self.run_dir is not None and self.interval is not None

    def _loader_states(self) -> list[list[Tensor]]:
        return self.team.gathered(
            [generator.get_state() for generator in generators_of(self.loader, self.val_loader)]
        )

    def _state(self, history: History, temporary: bool, part: PartOfEpoch | None = None) -> dict[str, Any]:
        """What a checkpoint holds besides the model and the optimiser; in the middle of an epoch with its part."""
        assert self.run_dir is not None and self.definition is not None
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "complete": part is None,
            "part": None if part is None else part.to_dict(),
            "seed": self.seed,
            "optimizer": type(self.optimizer).__qualname__,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            # An epoch that goes on has its batches loaded again, from the first.
            "generators": self._loader_states() if part is None else self.loader_states,
            "history": history.to_dict(self.run_dir),
            "best": self.best,
            "temporary": temporary,
            "grad_scaler": None if self.stepper.scaler is None else self.stepper.scaler.state_dict(),
            "callbacks": [[_name(callback), _state_of(callback)] for callback in self.callbacks],
            "definition": self.definition.at(self._define()).to_dict(),
        }

    def _state_midway(self, part: PartOfEpoch) -> dict[str, Any]:
        """The state at this moment, whatever comes before it is written."""
        kept = [path for path in self.history.checkpoints if path != self.temporary]
        return copy.deepcopy(self._state(replace(self.history, checkpoints=kept), True, part))

    def _save(self, midway: dict[str, Any] | None = None, temporary: bool = False) -> None:
        """Write a checkpoint in place of the last temporary one, whose weight in TracIn it takes on.

        Args:
            midway: the state to go on from, where the epoch was cut short.
            temporary: the next one replaces it.
        """
        assert self.run_dir is not None
        name = f"epoch-{self.epoch:04d}.pt" if midway is None else f"step-{self.steps:08d}.pt"
        path, replaced = self.run_dir / name, self.temporary
        if replaced is not None:
            self.history.checkpoints = [other for other in self.history.checkpoints if other != replaced]
        if self.steps:
            self.history.checkpoints.append(path)
        state = self._state(self.history, temporary) if midway is None else midway
        self.team.by_first(
            lambda: save_checkpoint(
                self.model, path, weight=self.pending_weight, optimizer=self.optimizer, state=state
            )
        )
        if replaced is not None and replaced != path:
            self.team.by_first(lambda: replaced.unlink(missing_ok=True))
        if temporary:
            self.temporary = path
        else:
            self.temporary, self.pending_weight = None, 0.0
        self.last_checkpoint = path

    def _restore_newest(self, there: dict[int, Path], epochs: int, max_steps: int | None) -> None:
        for number, path in sorted(there.items(), reverse=True):
            if number > epochs:
                continue
            try:
                saved = read_saved(path, number)
                if max_steps is None or saved.steps <= max_steps:
                    self._restore(self._midway_after(saved, epochs, max_steps) or saved)
                    return
            except (DamagedFileError, FileNotFoundError) as error:
                warnings.warn(f"fit: {error}; going back to the checkpoint before it", stacklevel=4)
        raise ValueError(
            f"fit: resume: expected a usable checkpoint in run_dir, found none in {self.run_dir}"
        )

    def _midway_after(self, saved: Saved, epochs: int, max_steps: int | None) -> Saved | None:
        """The newest checkpoint in the middle of an epoch that followed, if there is any."""
        for steps, path in sorted(_numbered_files(self.run_dir, _STEP_FILE).items(), reverse=True):
            if not saved.steps < steps < (max_steps or math.inf):
                continue
            try:
                midway = read_saved(path)
                if saved.epoch <= midway.epoch < epochs and midway.steps == steps:
                    return midway
            except DamagedFileError as error:
                warnings.warn(f"fit: {error}; going back to the checkpoint before it", stacklevel=5)
            except (FileNotFoundError, ValueError):
                continue  # of versions that kept the weights alone
        return None

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
        if _keeps_weights(self.callbacks) and saved.history.best_epoch is not None and saved.best is None:
            raise ValueError(f"{path}: expected a run with patience, found one that kept no best weights")
        differences = self._differences(saved)
        if differences and self.on_difference == "raise":
            raise ValueError(
                f"{path}: expected a run with {described(differences)}. Choose another run_dir for another run, "
                'or on_difference="warn" to go on with this one as it is now'
            )
        matched, rank = self._matched(saved), self.team.rank
        try:
            load_into(
                saved,
                self.model,
                self.optimizer,
                self.scheduler,
                self.stepper.scaler,
                matched,
                generators,
                rank,
                differences,
            )
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
        self.part = saved.part
        if saved.temporary and path.parent == self.run_dir:
            self.temporary = path
        if saved.part is not None:
            self.pending_weight = saved.part.pending_weight
        elif saved.temporary:
            self.pending_weight = float(saved.content["weight"])

    def _matched(self, saved: Saved) -> list[tuple[Callback, dict[str, Any]]]:
        """Callbacks with what the checkpoint holds for them: the first of a class with the first, and so on."""
        waiting = list(self.callbacks)
        found: list[tuple[Callback, dict[str, Any]]] = []
        for name, state in saved.callbacks:
            callback = next((callback for callback in waiting if _name(callback) == name), None)
            if callback is not None:
                waiting.remove(callback)
                found.append((callback, state))
            elif state:
                raise ValueError(
                    f"{saved.path}: expected a run with a callback {name}, whose state it holds, got none"
                )
        return found

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


def _numbered_files(run_dir: Path | None, pattern: re.Pattern[str]) -> dict[int, Path]:
    if run_dir is None or not run_dir.is_dir():
        return {}
    matches = ((pattern.fullmatch(path.name), path) for path in run_dir.iterdir())
    return {int(match[1]): path for match, path in matches if match is not None}


def _name(callback: Callback) -> str:
    return type(callback).__qualname__


def _state_of(callback: Callback) -> dict[str, Any]:
    state = callback.state_dict()
    if not isinstance(state, dict):
        raise TypeError(
            f"fit: callbacks: {_name(callback)}.state_dict: expected a dict, got {type(state).__name__}"
        )
    return state


def _keeps_weights(callbacks: Iterable[Callback]) -> bool:
    return any(isinstance(callback, EarlyStopping) and callback.restore_best for callback in callbacks)

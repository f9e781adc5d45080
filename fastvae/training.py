"""Training with exact resume: ``fit``, its ``History``, and checkpoints that TracIn can read."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import math
import os
import pickle
import random
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastvae.data import binarize as draw_binary
from fastvae.data import images_of
from fastvae.models import DivergenceError

__all__ = ["History", "fit", "load_checkpoint", "save_checkpoint"]

_FORMAT = "fastvae checkpoint 1"
_EPOCH_FILE = re.compile(r"epoch-(\d+)\.pt")


@dataclass
class History:
    """What a run did; every list but ``checkpoints`` has one entry an epoch. ``print`` shows a table.

    Attributes:
        train_loss: mean training loss of a sample, over the samples of the steps that were taken.
        val_loss: mean validation loss of a sample, None without a ``val_loader``.
        seconds: wall-clock time of the epoch with its validation.
        learning_rate: mean over the epoch's steps, of the optimiser's first parameter group.
        steps: optimisation steps from the start of the run to the end of the epoch.
        skipped: steps left out because of a loss or gradient that was not finite.
        checkpoints: the files to hand to TracIn, oldest first.
        best_epoch: epoch (from 1) with the lowest validation loss, None without one.
        stopped: what ended the run: "epochs", "patience" or "max_steps"; "" while it goes on.
    """

    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: str = ""

    def __str__(self) -> str:
        lines = [f"{'epoch':>5} {'steps':>8} {'train loss':>11} {'val loss':>11} {'lr':>9} {'seconds':>8}"]
        rows = zip(self.steps, self.train_loss, self.val_loss, self.learning_rate, self.seconds, strict=True)
        for epoch, (steps, train, val, rate, seconds) in enumerate(rows, 1):
            val_text = "-" if val is None else f"{val:.4f}"
            mark = " best" if epoch == self.best_epoch else ""
            lines.append(
                f"{epoch:5d} {steps:8d} {train:11.4f} {val_text:>11} {rate:9.2e} {seconds:8.2f}{mark}"
            )
        if sum(self.skipped):
            lines.append(f"{sum(self.skipped)} steps skipped: loss or gradient not finite")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically; checkpoint paths are stored relative to the file's folder."""
        text = json.dumps(self._to_dict(Path(path).parent), indent=1) + "\n"
        _write_atomically(Path(path), lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what :meth:`save` wrote. ValueError, naming the file, if it is something else."""
        try:
            return cls._from_dict(json.loads(Path(path).read_text()), Path(path).parent)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a History in JSON, found something else ({error})") from error

    def _to_dict(self, folder: Path) -> dict[str, Any]:
        return {**asdict(self), "checkpoints": [os.path.relpath(path, folder) for path in self.checkpoints]}

    @classmethod
    def _from_dict(cls, values: dict[str, Any], folder: Path) -> History:
        if set(values) != {entry.name for entry in fields(cls)}:
            raise ValueError(f"keys {sorted(values)}")
        paths = [Path(os.path.normpath(folder / name)) for name in values["checkpoints"]]
        return cls(**{**values, "checkpoints": paths})


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    weight: float = 1.0,
    optimizer: Optimizer | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Write the model to ``path`` so that a crash leaves either the old file or the whole new one.

    Args:
        weight: of this checkpoint in TracIn: learning rate times the epochs since the checkpoint before.
        optimizer: its state is stored too.
        state: anything else, of tensors, numbers, strings, lists and dicts.

    Raises:
        TypeError: a state that ``torch.load(weights_only=True)`` would refuse; the message names the types.
    """
    content = {
        "format": _FORMAT,
        "model": _unwrap(model).state_dict(),
        "penalties": [p.state_dict() if hasattr(p, "state_dict") else None for p in _penalties(model)],
        "weight": float(weight),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "state": state,
    }

    def write(file: IO[bytes]) -> None:
        torch.save(content, file)
        file.flush()
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
        if unsafe:
            raise TypeError(
                f"save_checkpoint: {path}: expected states of tensors, numbers, strings, lists and dicts, "
                f"got {', '.join(unsafe)}; allow them with torch.serialization.add_safe_globals"
            )

    _write_atomically(Path(path), write)
    return Path(path)


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> float:
    """Load the weights (and the progress of penalties) of a checkpoint; return its TracIn weight.

    The weight is the learning rate times the number of epochs that the checkpoint stands for (those since
    the checkpoint before), summed epoch by epoch where a scheduler changed the rate: the step size of TracIn
    (Pruthi et al., "Estimating training data influence by tracing gradient descent", NeurIPS 2020, section
    3.2) times the number of visits. The signature is that of captum's ``checkpoints_load_func``.

    Raises:
        ValueError: a damaged file or weights of another model; the message names the file.
    """
    content = _read_checkpoint(Path(path))
    _restore_model(model, content, Path(path))
    return float(content["weight"])


def _write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself must reach the disk; Windows has no descriptors of folders.
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        # torch.load does not compare checksums: a flipped bit would load as a wrong weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (ValueError, RuntimeError, OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: expected a checkpoint, found a damaged or foreign file ({error})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected a file of format {_FORMAT!r}, found another kind of torch file")
    return content


def _restore_model(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    penalties, states = _penalties(model), content["penalties"]
    if len(penalties) != len(states):
        raise ValueError(
            f"{path}: expected a model with {len(penalties)} annealed penalties, found {len(states)}"
        )
    try:
        _unwrap(model).load_state_dict(content["model"])
        for penalty, state in zip(penalties, states, strict=True):
            if state is not None:
                penalty.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: expected the weights of this model, found others ({error})") from error


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and DDP's wrappers, whose parameters have the plain names."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _penalties(model: nn.Module) -> list[Any]:
    return [p for p in getattr(_unwrap(model), "penalties", ()) if hasattr(p, "step")]


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int,
    optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None = None,
    val_loader: Iterable[Any] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | Literal["epoch", "never"] | None = "epoch",
    resume: bool | str | os.PathLike[str] = "auto",
    device: torch.device | str | None = None,
    seed: int = 0,
    scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
    schedule_by: Literal["epoch", "step"] = "epoch",
    patience: int | None = None,
    max_steps: int | None = None,
    clip_grad_norm: float | None = None,
    binarize: bool = False,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> History:
    """Minimise ``model(x).mean()`` over the batches of ``loader``.

    A run that was killed and is started again with the same arguments ends with the same losses and weights,
    bit for bit, as one that was not (on one machine, with deterministic kernels). For that, torch's, numpy's
    and Python's global generators are seeded from (seed, epoch) at the start of every epoch, and the states
    of the loaders' own generators are stored; ``fit`` gives the global generators back as it found them.
    Out of reach are generators hidden in data sets or models, and workers kept by ``persistent_workers``.

    Args:
        model: ``model(x)`` is the loss of each sample, [B]. Objects in ``model.penalties`` with a ``step()``
            are stepped after each optimisation step, and stored if they have ``state_dict``.
        loader: any iterable that can be iterated once an epoch. A batch is a tensor, a tuple or list whose
            first entry is a tensor, or a mapping with "data". A sampler's ``set_epoch`` is called.
        epochs: in all, those of a resumed run included.
        optimizer: an instance, or a callable from the list of trainable parameters (an optimiser class, a
            ``functools.partial``). None: Adam, 1e-3. Any ``torch.optim.Optimizer`` for dense gradients
            works; those whose ``step`` demands a closure (LBFGS) evaluate it with the same noise each time.
        val_loader: its mean loss is computed after every epoch in eval mode, always with the same noise.
        run_dir: folder for ``epoch-0000.pt`` (the start), ``epoch-0001.pt``, ... and ``history.json``.
        checkpoint_every: "epoch"; an int, every so many epochs; "never" or None. The last is always kept.
        resume: "auto": from the newest whole checkpoint in ``run_dir`` (a damaged one is passed over with a
            warning), if there is any; True: there must be one; a path: from that file; False: start anew in
            a folder without checkpoints. Restores learning rates too, whatever the new optimiser was given.
        device: where to move the model; None leaves it. Batches are moved to the model's device.
        seed: of shuffling and noise. Initial weights are the caller's: seed before building the model.
        scheduler: an instance for this optimiser, or a callable from it; ``ReduceLROnPlateau`` reads the
            validation loss, or the training loss without one.
        schedule_by: call the scheduler after each "epoch" or each "step".
        patience: stop after so many epochs without a lower validation loss; the best weights are put back
            at the end of the run.
        max_steps: stop after so many optimisation steps, if need be within an epoch: its checkpoint
            ``step-00000123.pt`` counts in TracIn by its share of the epoch, and a longer run resumes from
            the epoch's start.
        clip_grad_norm: largest gradient norm.
        binarize: draw binary images anew in each step (:func:`fastvae.data.binarize`).
        on_nonfinite: a loss or gradient that is not finite, or a model's ``DivergenceError``, raises before
            it reaches the weights; or that step is skipped, counted, and BatchNorm's running statistics are
            put back (a diverged validation counts as infinite loss).
        progress: show a bar on a terminal if tqdm is installed.

    Returns:
        :class:`History`. The model keeps the mode (train or eval) it came with; training is in train mode.

    Raises:
        FloatingPointError: with epoch and step; the checkpoints so far stay.
        ValueError: empty loader, losses not [B], arguments or a checkpoint that do not fit together.
        FileNotFoundError, FileExistsError: by ``resume``.
    """
    for name, count in (("epochs", epochs), ("patience", patience), ("max_steps", max_steps)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"fit: {name}: expected an int of at least 1, got {count!r}")
    for name, choice, choices in (
        ("schedule_by", schedule_by, ("epoch", "step")),
        ("on_nonfinite", on_nonfinite, ("raise", "skip")),
    ):
        if choice not in choices:
            raise ValueError(f"fit: {name}: expected one of {choices}, got {choice!r}")
    if patience is not None and val_loader is None:
        raise ValueError("fit: patience: expected a val_loader to watch, got val_loader=None")
    if device is not None:
        model.to(device)
    chosen_optimizer = _build_optimizer(model, optimizer)
    run = _Run(
        model=model,
        loader=loader,
        val_loader=val_loader,
        optimizer=chosen_optimizer,
        scheduler=_build_scheduler(chosen_optimizer, scheduler),
        run_dir=None if run_dir is None else Path(run_dir),
        interval=_interval(checkpoint_every),
        seed=seed,
        schedule_by=schedule_by,
        patience=patience,
        clip_grad_norm=clip_grad_norm,
        binarize=binarize,
        on_nonfinite=on_nonfinite,
    )
    run.start(resume, epochs, max_steps)
    with _modes_kept(model), _global_generators_kept():
        model.train()
        run.train(epochs, max_steps, progress)
    return run.history


@dataclass
class _Run:
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
    clip_grad_norm: float | None
    binarize: bool
    on_nonfinite: str
    history: History = field(default_factory=History)
    epoch: int = 0
    steps: int = 0
    best: dict[str, Any] | None = None
    pending_weight: float = 0.0
    last_checkpoint: Path | None = None

    def __post_init__(self) -> None:
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        self.demands_closure = closure is not None and closure.default is inspect.Parameter.empty

    def start(self, resume: bool | str | os.PathLike[str], epochs: int, max_steps: int | None) -> None:
        """Restore what ``resume`` asks for, or write the checkpoint of the start."""
        there = _epoch_files(self.run_dir)
        anew = isinstance(resume, bool) or resume == "auto"
        if anew and resume and there:
            self._restore_newest(there, epochs, max_steps)
            return
        if resume is True:
            raise FileNotFoundError(
                f"fit: resume=True: expected checkpoints in run_dir {self.run_dir}, found none"
            )
        if not isinstance(resume, bool) and not anew:
            self._restore(Path(resume), _read_checkpoint(Path(resume)))
        if later := [path.name for number, path in sorted(there.items()) if anew or number > self.epoch]:
            after = "" if anew else f"after epoch {self.epoch} "
            raise FileExistsError(
                f"fit: run_dir: expected no checkpoints {after}in {self.run_dir}, found "
                f'{", ".join(later[:3])}; delete them, choose another folder or resume="auto"'
            )
        if self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if self.interval is not None and anew:
                self._save(complete=True)

    def train(self, epochs: int, max_steps: int | None, progress: bool) -> None:
        length = _length(self.loader)
        total = None if length is None else min(epochs * length, max_steps or epochs * length)
        bar = _progress_bar(total, self.steps) if progress else None
        try:
            self.history.stopped = self._stopped(epochs, max_steps)
            while not self.history.stopped:
                complete = self._train_epoch(max_steps, length, bar)
                self.history.stopped = self._stopped(epochs, max_steps)
                if self.run_dir is None:
                    continue
                due = bool(self.history.stopped) or self.epoch % (self.interval or 1) == 0
                if self.interval is not None and due:
                    self._save(complete)
                self.history.save(self.run_dir / "history.json")
        finally:
            if bar is not None:
                bar.close()
        if self.patience is not None and self.best is not None:
            _unwrap(self.model).load_state_dict(self.best)

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
        _seed_globals(self.seed, "train", number)
        for sampler in _samplers(self.loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)
        total, samples, batches, complete = 0.0, 0, 0, True
        rates: list[float] = []
        for batch in self.loader:
            if max_steps is not None and self.steps >= max_steps:
                complete = False
                break
            batches += 1
            x = self._images(batch)
            value = self._step(x, f"epoch {number}, step {batches} (step {self.steps + 1} of the run)")
            if value is not None:
                total += value * x.shape[0]
                samples += x.shape[0]
                rates.append(float(self.optimizer.param_groups[0]["lr"]))
                self.steps += 1
                for penalty in _penalties(self.model):
                    penalty.step()
                if self.schedule_by == "step":
                    self._advance_scheduler(value)
            if bar is not None:
                bar.set_postfix_str(
                    f"epoch {number}, loss {math.nan if value is None else value:.4f}", refresh=False
                )
                bar.update(1)
        if not batches:
            raise ValueError(
                f"fit: loader: expected at least one batch, got none in epoch {number} "
                "(drop_last with too few images, or an iterator that can be read only once?)"
            )
        if not samples:
            raise self._not_finite(f"all {batches} steps of epoch {number} were skipped")
        if bad := [name for name, value in _unwrap(self.model).state_dict().items() if not _is_finite(value)]:
            raise self._not_finite(f"epoch {number}: after its last step {bad[0]} is not finite")
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
                self.best = copy.deepcopy(_unwrap(self.model).state_dict())

    def _images(self, batch: Any) -> Tensor:
        x = images_of(batch)
        x = draw_binary(x) if self.binarize else x
        return x.to(next(self.model.parameters()).device, non_blocking=True)

    def _losses(self, x: Tensor) -> Tensor:
        losses: Tensor = self.model(x)
        if not isinstance(losses, Tensor) or losses.shape != x.shape[:1]:
            found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"fit: model(x): expected the loss of each sample, [{x.shape[0]}], got {found}")
        return losses

    def _backward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and gradient norm, with the gradients in place and not yet clipped."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._losses(x).mean()
        loss.backward()
        return loss.detach(), torch.nn.utils.get_total_norm(
            [p.grad for p in _parameters(self.optimizer) if p.grad is not None]
        )

    def _step(self, x: Tensor, where: str) -> float | None:
        """One optimisation step; its loss, or None if it was skipped."""
        noise = _global_states() if self.demands_closure else None
        buffers = [buffer.clone() for buffer in self.model.buffers()] if self.on_nonfinite == "skip" else []
        problem, cause, loss_value = "", None, math.nan
        try:
            loss, norm = self._backward(x)
            dtype = torch.promote_types(loss.dtype, torch.float32)
            # One transfer: on a GPU each would wait for the queue.
            loss_value, norm_value = torch.stack([loss.to(dtype), norm.to(loss.device, dtype)]).tolist()
            if not math.isfinite(loss_value) or not math.isfinite(norm_value):
                problem = f"loss {loss_value}, gradient norm {norm_value}"
        except DivergenceError as error:
            problem, cause = str(error), error
        if problem:
            if self.on_nonfinite == "raise":
                raise self._not_finite(f"{where}: {problem}") from cause
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            return None

        def clip(total_norm: Tensor) -> None:
            if self.clip_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(_parameters(self.optimizer), self.clip_grad_norm, total_norm)

        def evaluate_again() -> float:
            if noise is not None:
                _set_global_states(noise)
            again, again_norm = self._backward(x)
            clip(again_norm)
            return float(again)

        if self.demands_closure:
            self.optimizer.step(evaluate_again)
        else:
            clip(norm)
            self.optimizer.step()
        return float(loss_value)

    def _not_finite(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"fit: {what}; last good checkpoint: {self.last_checkpoint or 'none was written'}. "
            'A lower learning rate, clip_grad_norm or on_nonfinite="skip" may help'
        )

    @torch.no_grad()
    def _validate(self, number: int) -> float | None:
        if self.val_loader is None:
            return None
        # The same noise after every epoch: differences between epochs are then the model's.
        _seed_globals(self.seed, "validation", 0)
        total, samples = 0.0, 0
        cause: DivergenceError | None = None
        with _modes_kept(self.model):
            self.model.eval()
            for batch in self.val_loader:
                x = self._images(batch)
                samples += x.shape[0]
                try:
                    total += float(self._losses(x).sum(dtype=torch.float64))
                except DivergenceError as error:
                    total, cause = math.inf, error
        if not samples:
            raise ValueError(f"fit: val_loader: expected at least one batch, got none in epoch {number}")
        if not math.isfinite(total) and self.on_nonfinite == "raise":
            found = cause or f"loss {total / samples}"
            raise self._not_finite(f"epoch {number}, validation: {found}") from cause
        return total / samples

    def _advance_scheduler(self, loss: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _save(self, complete: bool) -> None:
        assert self.run_dir is not None
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
            "generators": [generator.get_state() for generator in _generators(self.loader, self.val_loader)],
            "history": self.history._to_dict(self.run_dir),
            "best": self.best,
        }
        save_checkpoint(self.model, path, weight=self.pending_weight, optimizer=self.optimizer, state=state)
        self.pending_weight = 0.0
        self.last_checkpoint = path

    def _restore_newest(self, there: dict[int, Path], epochs: int, max_steps: int | None) -> None:
        for number, path in sorted(there.items(), reverse=True):
            if number > epochs:
                continue
            try:
                content = _read_checkpoint(path)
            except ValueError as error:
                warnings.warn(f"fit: {error}; going back to the checkpoint before it", stacklevel=4)
                continue
            if max_steps is None or (content["state"] or {}).get("steps", 0) <= max_steps:
                self._restore(path, content)
                return
        raise ValueError(
            f"fit: resume: expected a usable checkpoint in run_dir, found none in {self.run_dir}"
        )

    def _restore(self, path: Path, content: dict[str, Any]) -> None:
        state = content["state"]
        if not isinstance(state, dict) or not state.get("complete"):
            raise ValueError(f"{path}: expected the checkpoint of an epoch's end by fit, found another kind")
        generators = _generators(self.loader, self.val_loader)
        for name, now, then in (
            ("seed", self.seed, state["seed"]),
            ("optimizer", type(self.optimizer).__qualname__, state["optimizer"]),
            ("use of a scheduler", self.scheduler is not None, state["scheduler"] is not None),
            ("number of loader generators", len(generators), len(state["generators"])),
        ):
            if now != then:
                raise ValueError(f"{path}: expected a run with the same {name} ({now}), found {then}")
        history = History._from_dict(state["history"], path.parent)
        if self.patience is not None and history.best_epoch is not None and state["best"] is None:
            raise ValueError(f"{path}: expected a run with patience, found one that kept no best weights")
        _restore_model(self.model, content, path)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except ValueError as error:
            raise ValueError(f"{path}: expected this optimizer's state, found another ({error})") from error
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for generator, generator_state in zip(generators, state["generators"], strict=True):
            generator.set_state(generator_state)
        self.history, self.best, self.last_checkpoint = history, state["best"], path
        self.epoch, self.steps = state["epoch"], state["steps"]


def _interval(checkpoint_every: int | str | None) -> int | None:
    if checkpoint_every is None or checkpoint_every == "never":
        return None
    if checkpoint_every == "epoch":
        return 1
    if isinstance(checkpoint_every, int) and checkpoint_every >= 1:
        return checkpoint_every
    raise ValueError(
        f'fit: checkpoint_every: expected "epoch", "never" or an int of at least 1, got {checkpoint_every!r}'
    )


def _build_optimizer(
    model: nn.Module, optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None
) -> Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("fit: model: expected trainable parameters, got none")
    if optimizer is None:
        return torch.optim.Adam(parameters, lr=1e-3)
    chosen = optimizer if isinstance(optimizer, Optimizer) else optimizer(parameters)
    if not isinstance(chosen, Optimizer):
        raise ValueError(f"fit: optimizer: expected a torch.optim.Optimizer, got {type(chosen).__name__}")
    if not {id(p) for p in _parameters(chosen)} & {id(p) for p in parameters}:
        raise ValueError(
            "fit: optimizer: expected one of this model's parameters, got one that holds none of them"
        )
    return chosen


def _build_scheduler(
    optimizer: Optimizer, scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None
) -> LRScheduler | None:
    if scheduler is None:
        return None
    chosen = scheduler if isinstance(scheduler, LRScheduler) else scheduler(optimizer)
    if not isinstance(chosen, LRScheduler) or chosen.optimizer is not optimizer:
        raise ValueError(
            "fit: scheduler: expected an LRScheduler of the optimizer that fit uses, or a callable from it, "
            f"got {type(chosen).__name__}"
        )
    return chosen


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())


def _epoch_files(run_dir: Path | None) -> dict[int, Path]:
    if run_dir is None or not run_dir.is_dir():
        return {}
    matches = ((_EPOCH_FILE.fullmatch(path.name), path) for path in run_dir.iterdir())
    return {int(match[1]): path for match, path in matches if match is not None}


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _generators(*loaders: Any) -> list[torch.Generator]:
    """The generators that belong to the loaders, each once."""
    holders = [holder for loader in loaders for holder in (loader, *_samplers(loader))]
    found = (getattr(holder, "generator", None) for holder in holders)
    return list(
        {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values()
    )


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _progress_bar(total: int | None, initial: int) -> Any:
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ModuleNotFoundError:
        return None
    return tqdm(total=total, initial=initial, unit="step", desc="fit", disable=None, dynamic_ncols=True)


def _seed_globals(seed: int, purpose: str, epoch: int) -> None:
    # Hashed, so that runs with neighbouring seeds share no epoch's noise.
    digest = hashlib.sha256(f"{seed} {purpose} {epoch}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    torch.manual_seed(key)
    random.seed(key)
    np.random.seed(key % 2**32)


def _global_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def _set_global_states(states: tuple[Any, ...]) -> None:
    torch_state, cuda, python_state, numpy_state = states
    torch.set_rng_state(torch_state)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python_state)
    np.random.set_state(numpy_state)


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    states = _global_states()
    try:
        yield
    finally:
        _set_global_states(states)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

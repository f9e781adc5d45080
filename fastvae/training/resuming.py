"""From a checkpoint back into a run: everything is looked at before anything is changed."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastvae.atomic import write_atomically
from fastvae.training.archive import DamagedFileError
from fastvae.training.callbacks import Callback
from fastvae.training.checkpoints import all_or_nothing, read_checkpoint, restore_model
from fastvae.training.definition import (
    STATE_OF_SCHEDULERS,
    Definition,
    optimizer_prefix,
    optimizer_settings,
    scheduler_settings,
)
from fastvae.training.history import History
from fastvae.training.midway import PartOfEpoch
from fastvae.training.optimizers import check_loaded_state, from_torch
from fastvae.wrappers import unwrap

__all__ = ["Saved", "copy_into", "load_into", "read_saved"]

_STATE: dict[str, tuple[type, ...]] = {
    "epoch": (int,),
    "steps": (int,),
    "seed": (int,),
    "optimizer": (str,),
    "scheduler": (dict, type(None)),
    "generators": (list,),
    "history": (dict,),
    "best": (dict, type(None)),
}
# Of torch's optimisers: kept for each parameter, and of its shape.
_LIKE_PARAMETERS = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"),
    *("acc_delta", "sum", "ax", "prev"),
}


@dataclass
class Saved:
    """A checkpoint of ``fit`` from which a run can go on, looked through.

    Attributes:
        generators: the states of the loaders' generators, for each process.
        definition: of its run; None in files of versions that did not keep one.
    """

    path: Path
    content: dict[str, Any]
    epoch: int
    steps: int
    seed: int
    optimizer: str
    scheduler: dict[str, Any] | None
    generators: list[list[Tensor]]
    history: History
    best: dict[str, Any] | None
    definition: Definition | None
    callbacks: list[tuple[str, dict[str, Any]]]
    """Names of their classes, and their states."""
    temporary: bool
    """Whether the next checkpoint was to replace it."""
    grad_scaler: dict[str, Any] | None
    """None where gradients were not scaled, or by a version that kept none."""
    part: PartOfEpoch | None
    """Of the epoch in whose middle it was written; None at an epoch's end."""


def read_saved(path: Path, number: int | None = None) -> Saved:
    """Read the checkpoint of an epoch's end, of epoch ``number`` if it is given, or of an epoch's middle.

    Raises:
        DamagedFileError: anything that ``fit`` cannot have written.
        ValueError: a whole checkpoint of another kind.
        FileNotFoundError: no such file.
    """
    content = read_checkpoint(path)
    state = content["state"]
    complete = False if state is None else state.get("complete", False)
    if not isinstance(complete, bool):
        raise DamagedFileError(path, f"'complete' of the run's state: {type(complete).__name__}")
    part = None if state is None else state.get("part")
    if complete == (part is not None):
        raise ValueError(f"{path}: expected a checkpoint that fit goes on from, found another kind")
    for key, kinds in _STATE.items():
        if key not in state or not isinstance(state[key], kinds) or isinstance(state[key], bool):
            found = type(state[key]).__name__ if key in state else "missing"
            raise DamagedFileError(path, f"{key!r} of the run's state: {found}")
    try:
        history = History.from_dict(state["history"], path.parent)
        stored = state.get("definition")
        definition = None if stored is None else Definition.from_dict(stored)
        part = None if part is None else PartOfEpoch.from_dict(part)
    except ValueError as error:
        raise DamagedFileError(path, error) from error
    generators = state["generators"]
    if not generators or not all(
        isinstance(states, list) and all(isinstance(entry, Tensor) for entry in states)
        for states in generators
    ):
        raise DamagedFileError(path, "states of generators that are no tensors")
    epoch, steps = state["epoch"], state["steps"]
    rows = history.steps
    began = steps if part is None else steps - len(part.rates)
    if len(rows) != epoch or began != (rows[-1] if rows else 0):
        raise DamagedFileError(path, f"epoch {epoch} and step {steps}, with a history of {len(rows)} epochs")
    if part is not None and len(part.random) != len(generators):
        raise DamagedFileError(path, "states of generators of some processes alone")
    if number is not None and (epoch != number or part is not None):
        raise DamagedFileError(path, f"the state of epoch {epoch}")
    grad_scaler = state.get("grad_scaler")
    if not isinstance(grad_scaler, (dict, type(None))):
        raise DamagedFileError(path, f"'grad_scaler' of the run's state: {type(grad_scaler).__name__}")
    _check_settings(path, definition, content["optimizer"], state["scheduler"])
    saved = {key: state[key] for key in ("seed", "optimizer", "scheduler", "best")}
    return Saved(
        path,
        content,
        epoch,
        steps,
        **saved,
        generators=generators,
        history=history,
        definition=definition,
        callbacks=_callbacks_in(path, state),
        temporary=state.get("temporary") is True,
        grad_scaler=grad_scaler,
        part=part,
    )


def _callbacks_in(path: Path, state: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    stored = state.get("callbacks", [])
    if not isinstance(stored, list):
        raise DamagedFileError(path, "callbacks that are no list")
    for entry in stored:
        if not (isinstance(entry, list) and [*map(type, entry)] == [str, dict]):
            raise DamagedFileError(path, "a callback that is no name and state")
    return [(name, values) for name, values in stored]


def load_into(
    saved: Saved,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    scaler: torch.amp.GradScaler | None,
    callbacks: Sequence[tuple[Callback, dict[str, Any]]],
    generators: Sequence[torch.Generator],
    rank: int,
    differences: Container[str] = (),
) -> None:
    """Load all of it, or change nothing. ValueError, naming the file, for what does not fit.

    Of ``differences`` between the definitions of the two runs, the optimiser's keep the values that it has now.
    """
    _check_optimizer(saved, optimizer)
    groups, kept = [dict(group) for group in optimizer.param_groups], dict(optimizer.state)
    objects = [unwrap(model), optimizer, *([] if scheduler is None else [scheduler])]
    scaled = scaler if saved.grad_scaler is not None else None
    objects += [] if scaled is None else [scaled]
    objects += [callback for callback, state in callbacks if state]
    before = [generator.get_state() for generator in generators]
    try:
        with all_or_nothing(*objects):
            if saved.best is not None:
                unwrap(model).load_state_dict(saved.best)
            _load_optimizer(saved, optimizer)
            loose = not from_torch(optimizer)
            for group, given in zip(optimizer.param_groups, groups, strict=True):
                own = {name: value for name, value in given.items() if name != "params"}
                _check_like(saved.path, "optimizer", group, own, nothing=loose, flags=loose)
            _keep_given(optimizer, groups, differences, scheduler is not None)
            state = saved.content["optimizer"]["state"]
            check_loaded_state(saved.path, optimizer, state, groups, kept, saved.steps > 0)
            if scheduler is not None:
                _check_scheduler(saved, scheduler)
                scheduler.load_state_dict(saved.scheduler or {})
            if scaled is not None:
                _check_like(saved.path, "grad_scaler", saved.grad_scaler, scaled.state_dict())
                scaled.load_state_dict(saved.grad_scaler or {})
            for generator, state in zip(generators, saved.generators[rank], strict=True):
                generator.set_state(state)
            for callback, state in callbacks:
                if state:
                    callback.load_state_dict(state)
            # Last: it has a way back of its own, for penalties too.
            restore_model(model, saved.content, saved.path)
    except Exception as error:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"{saved.path}: expected the state of this run, found another ({type(error).__name__}: {error})"
        ) from error


def _keep_given(
    optimizer: Optimizer, given: Sequence[dict[str, Any]], differences: Container[str], scheduled: bool
) -> None:
    """Hyperparameters that this run was given and the checkpoint's was not; rates under a scheduler stay its own."""
    for index, (group, values) in enumerate(zip(optimizer.param_groups, given, strict=True)):
        prefix = optimizer_prefix(optimizer.param_groups, index)
        for key, value in values.items():
            if prefix + key in differences and not (key == "lr" and scheduled):
                group[key] = value


def copy_into(folder: Path, checkpoints: Sequence[Path]) -> None:
    """Put the checkpoints of a run that goes on in another folder there too, but for those that are gone.

    FileExistsError if another file has the name of one.
    """
    for path in checkpoints:
        copied = folder / path.name
        if not path.is_file():
            continue
        if os.path.lexists(copied):
            if copied.is_file() and filecmp.cmp(path, copied, shallow=False):
                continue
            raise FileExistsError(
                f"fit: run_dir: expected no other file at {copied}, which is to hold {path}"
            )
        try:
            os.link(path.resolve(), copied)
        except OSError:  # another file system, or one without hard links
            write_atomically(copied, lambda file, path=path: file.write(path.read_bytes()))  # type: ignore[misc]


def _check_settings(path: Path, definition: Definition | None, optimizer: Any, scheduler: Any) -> None:
    """DamagedFileError where the states of optimiser and scheduler are not what the file's own definition says."""
    if definition is None or not isinstance(optimizer, dict):
        return
    groups = optimizer.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return  # which _check_optimizer says
    found = optimizer_settings(groups) | ({} if scheduler is None else scheduler_settings(scheduler))
    for name, value in {**definition.settings, **definition.moved}.items():
        if name.startswith(("optimizer.", "scheduler.")) and found.get(name) != value:
            raise DamagedFileError(path, f"{name} of {found.get(name)}, where its definition says {value}")


def _check_optimizer(saved: Saved, optimizer: Optimizer) -> None:
    """The parts of the optimiser's state that its ``load_state_dict`` takes as they come."""
    content = saved.content["optimizer"]
    groups = content.get("param_groups") if isinstance(content, dict) else None
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise DamagedFileError(saved.path, "an optimizer without param_groups")
    numbers = [number for group in groups for number in group["params"]]
    if {type(number) for number in numbers} != {int} or numbers != list(range(len(numbers))):
        raise DamagedFileError(saved.path, "an optimizer whose parameters are not numbered")
    found, expected = [len(g["params"]) for g in groups], [len(g["params"]) for g in optimizer.param_groups]
    if found != expected:
        raise ValueError(
            f"{saved.path}: expected this optimizer's state, groups of {expected} parameters, found {found}"
        )
    state = content.get("state")
    if not isinstance(state, dict) or not all(isinstance(values, dict) for values in state.values()):
        raise DamagedFileError(saved.path, "an optimizer without a state for each parameter")
    if from_torch(optimizer) and not {(type(key), key) for key in state} <= {(int, n) for n in numbers}:
        raise DamagedFileError(saved.path, "an optimizer with state for what is no parameter")
    for group, now in zip(groups, optimizer.param_groups, strict=True):
        if not all(isinstance(name, str) for name in group):
            raise DamagedFileError(saved.path, "an optimizer whose hyperparameters are not named")
        kept: set[frozenset[str]] = set()
        for key, parameter in zip(group["params"], now["params"], strict=True):
            values = state.get(key, {})
            for name, value in values.items():
                shape = value.shape if isinstance(value, Tensor) else None
                if name in _LIKE_PARAMETERS and value is not None and shape != parameter.shape:
                    raise DamagedFileError(saved.path, f"optimizer state {name!r} of another shape")
                if name == "step" and _kind(value) is not float:
                    raise DamagedFileError(saved.path, "optimizer state 'step' that is no number")
            kept.add(frozenset(values.keys() & {*_LIKE_PARAMETERS, "step"}) if values else frozenset())
        # A parameter that has had no gradient has none.
        if len(kept - {frozenset()}) > 1:
            raise DamagedFileError(
                saved.path, "an optimizer with other state for some parameters than for others"
            )


def _load_optimizer(saved: Saved, optimizer: Optimizer) -> None:
    try:
        optimizer.load_state_dict(saved.content["optimizer"])
    except Exception as error:
        raise ValueError(f"{saved.path}: expected this optimizer's state, found another ({error})") from error


def _check_scheduler(saved: Saved, scheduler: LRScheduler) -> None:
    own, found = scheduler.state_dict(), saved.scheduler or {}
    if missing := sorted(own.keys() & STATE_OF_SCHEDULERS - found.keys()):
        raise DamagedFileError(saved.path, f"a scheduler without {missing[0]}")
    # One of somebody else's may set to None what was a number.
    strict = type(scheduler).__module__ == LRScheduler.__module__
    _check_like(saved.path, "scheduler", found, own, nothing=not strict, flags=True)


def _check_like(
    path: Path, name: str, found: Any, expected: Any, *, nothing: bool = False, flags: bool = False
) -> None:
    """DamagedFileError where a number, text or list is not what this run has in its place.

    Args:
        nothing: None may be in any place.
        flags: a flag may be in the place of a number, a tuple may be of another length, and entries may be missing.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in expected:
            if key in found:
                _check_like(path, f"{name}.{key}", found[key], expected[key], nothing=nothing, flags=flags)
            elif not flags:
                raise DamagedFileError(path, f"{name} without {key}")
    elif isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
        if isinstance(expected, tuple) and not flags and len(found) != len(expected):
            raise DamagedFileError(path, f"{name}: {len(found)} values for {len(expected)}")
        for one, other in zip(found, expected, strict=False):
            _check_like(path, name, one, other, nothing=nothing, flags=flags)
    elif expected is not None and not (nothing and found is None):
        kinds = _kind(found, flags), _kind(expected, flags)
        # A switch that is left to torch is None, and a flag where somebody has chosen.
        if kinds[0] is not kinds[1] and not (found is None and kinds[1] is bool):
            raise DamagedFileError(path, f"{name}: {type(found).__name__} for {type(expected).__name__}")


def _kind(value: Any, flags: bool = False) -> type:
    if isinstance(value, bool) and not flags:
        return bool
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return float
    return tuple if isinstance(value, list) else type(value)

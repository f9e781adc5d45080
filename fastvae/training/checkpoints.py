"""Checkpoints: written whole or not at all, read strictly, and understood by TracIn."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastvae.arguments import expect
from fastvae.atomic import write_atomically
from fastvae.training.archive import DamagedFileError, read_archive
from fastvae.wrappers import unwrap

__all__ = [
    "all_or_nothing",
    "load_checkpoint",
    "penalties_of",
    "read_checkpoint",
    "restore_model",
    "save_checkpoint",
    "step_penalties",
]

_FORMAT = "fastvae checkpoint 1"
_CONTENT: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "penalties": list,
    "weight": float,
    "optimizer": (dict, NoneType),
    "state": (dict, NoneType),
}


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
        OSError: the disk is full, for example; names the path. The file from before is unchanged.
        ValueError: a weight that is not finite.
        TypeError: a state that ``torch.load(weights_only=True)`` would refuse; the message names the types.
    """
    expect(math.isfinite(weight), "save_checkpoint: weight: expected a finite number", weight)
    content = {
        "format": _FORMAT,
        "model": unwrap(model).state_dict(),
        "penalties": [p.state_dict() if hasattr(p, "state_dict") else None for p in penalties_of(model)],
        "weight": float(weight),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "state": state,
    }

    # In memory first: torch's writer lives on after Ctrl-C or on a full disk, and when it is collected writes its end,
    # to a file that is closed by then, which aborts the process.
    memory = io.BytesIO()
    try:
        torch.save(content, memory)
    except (AttributeError, TypeError, pickle.PicklingError) as error:  # what pickle says, by its version
        raise TypeError(
            f"save_checkpoint: {path}: expected states of tensors, numbers, strings, lists and dicts, got others "
            f"({error})"
        ) from error
    memory.seek(0)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(memory)
    if unsafe:
        raise TypeError(
            f"save_checkpoint: {path}: expected states of tensors, numbers, strings, lists and dicts, "
            f"got {', '.join(unsafe)}; allow them with torch.serialization.add_safe_globals"
        )
    write_atomically(Path(path), lambda file: file.write(memory.getbuffer()))
    return Path(path)


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> float:
    """Load the weights (and the progress of penalties) of a checkpoint; return its TracIn weight.

    The weight is the learning rate times the number of epochs that the checkpoint stands for (those since
    the checkpoint before), summed epoch by epoch where a scheduler changed the rate: the step size of TracIn
    (Pruthi et al., "Estimating training data influence by tracing gradient descent", NeurIPS 2020, section
    3.2) times the number of visits. The signature is that of captum's ``checkpoints_load_func``.

    Raises:
        ValueError: a damaged file or weights of another model; the message names the file, and the model is unchanged.
    """
    try:
        content = read_checkpoint(Path(path))
    except ValueError as error:
        raise ValueError(
            f"{error}; for files that fastvae.fit did not write, TracIn and SelfInfluence take the function that reads "
            "them, checkpoints_load_func (model, path) -> weight"
        ) from error
    restore_model(model, content, Path(path))
    return float(content["weight"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, its checksums compared. ValueError, naming the file, for anything else."""
    content = read_archive(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected a file of format {_FORMAT!r}, found another kind of torch file")
    for key, kind in _CONTENT.items():
        if key not in content or not isinstance(content[key], kind):
            found = type(content[key]).__name__ if key in content else "missing"
            raise DamagedFileError(path, f"{key!r}: {found}")
    if not math.isfinite(content["weight"]):
        raise DamagedFileError(path, f"'weight': {content['weight']}")
    return content


def restore_model(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Load weights and penalties from ``content``, read from ``path``: all or none of them.

    ValueError: those of another model.
    """
    penalties, states = penalties_of(model), content["penalties"]
    if len(penalties) != len(states):
        raise ValueError(
            f"{path}: expected a model with {len(penalties)} annealed penalties, found {len(states)}"
        )
    loaded = [(p, state) for p, state in zip(penalties, states, strict=True) if state is not None]
    try:
        with all_or_nothing(unwrap(model), *(penalty for penalty, _ in loaded)):
            unwrap(model).load_state_dict(content["model"])
            for penalty, state in loaded:
                penalty.load_state_dict(state)
    except Exception as error:  # of the penalties' own code too
        raise ValueError(f"{path}: expected the weights of this model, found others ({error})") from error


@contextmanager
def all_or_nothing(*objects: Any) -> Iterator[None]:
    """Load into objects that have ``state_dict`` and ``load_state_dict``; if it fails, they are as they were before."""
    before = [copy.deepcopy(entry.state_dict()) for entry in objects if hasattr(entry, "state_dict")]
    try:
        yield
    except BaseException:
        for entry, state in zip((e for e in objects if hasattr(e, "state_dict")), before, strict=True):
            entry.load_state_dict(state)
        raise


def penalties_of(model: nn.Module) -> list[Any]:
    """The penalties of a model that are stepped as training goes on."""
    return [p for p in getattr(unwrap(model), "penalties", ()) if hasattr(p, "step")]


def step_penalties(model: nn.Module) -> None:
    """Tell the model's penalties that an optimisation step was taken, which moves their annealing on.

    ``fit`` does it; a training loop of your own calls it after ``optimizer.step()``.
    """
    for penalty in penalties_of(model):
        penalty.step()

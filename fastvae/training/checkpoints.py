"""Checkpoints: written whole or not at all, read strictly, and understood by TracIn."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import IO, Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastvae.training.parallel import unwrap

__all__ = [
    "load_checkpoint",
    "penalties_of",
    "read_checkpoint",
    "restore_model",
    "save_checkpoint",
    "step_penalties",
    "write_atomically",
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
        TypeError: a state that ``torch.load(weights_only=True)`` would refuse; the message names the types.
    """
    content = {
        "format": _FORMAT,
        "model": unwrap(model).state_dict(),
        "penalties": [p.state_dict() if hasattr(p, "state_dict") else None for p in penalties_of(model)],
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

    write_atomically(Path(path), write)
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
    try:
        content = read_checkpoint(Path(path))
    except ValueError as error:
        raise ValueError(
            f"{error}; for files that fastvae.fit did not write, TracIn and SelfInfluence take the function that reads "
            "them, checkpoints_load_func (model, path) -> weight"
        ) from error
    restore_model(model, content, Path(path))
    return float(content["weight"])


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace the file at ``path`` by what ``write`` writes, or leave it as it was."""
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, its checksums compared. ValueError, naming the file, for anything else."""
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
    for key, kind in _CONTENT.items():
        if key not in content or not isinstance(content[key], kind):
            found = type(content[key]).__name__ if key in content else "missing"
            raise ValueError(
                f"{path}: expected a checkpoint, found a damaged or foreign file ({key!r}: {found})"
            )
    return content


def restore_model(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Load weights and penalties from ``content``, read from ``path``. ValueError: those of another model."""
    penalties, states = penalties_of(model), content["penalties"]
    if len(penalties) != len(states):
        raise ValueError(
            f"{path}: expected a model with {len(penalties)} annealed penalties, found {len(states)}"
        )
    try:
        unwrap(model).load_state_dict(content["model"])
        for penalty, state in zip(penalties, states, strict=True):
            if state is not None:
                penalty.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected the weights of this model, found others ({error})") from error


def penalties_of(model: nn.Module) -> list[Any]:
    """The penalties of a model that are stepped as training goes on."""
    return [p for p in getattr(unwrap(model), "penalties", ()) if hasattr(p, "step")]


def step_penalties(model: nn.Module) -> None:
    """Tell the model's penalties that an optimisation step was taken, which moves their annealing on.

    ``fit`` does it; a training loop of your own calls it after ``optimizer.step()``.
    """
    for penalty in penalties_of(model):
        penalty.step()

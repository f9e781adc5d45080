"""What defines a run, in plain text: two runs of one definition may go on from each other's checkpoints."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from fastvae.likelihoods import Likelihood
from fastvae.training.loaders import length_of
from fastvae.wrappers import unwrap

__all__ = [
    "STATE_OF_SCHEDULERS",
    "Definition",
    "define",
    "described",
    "fingerprint_of_data",
    "optimizer_prefix",
    "optimizer_settings",
    "scheduler_settings",
]

# Of a module: its mode, and what a VAE finds out from its networks, whose shapes are compared anyway.
_STATE_OF_MODULES = {"training", "latent_dim"}
STATE_OF_SCHEDULERS = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter", "mode_worse"}
_HASHED_BYTES = 2**24
"""Of a tensor of data; of a larger one so many bytes of rows that are spread evenly over it."""
_HASHED_ENTRIES = 64
"""Of a list of data."""


@dataclass
class Definition:
    """Names of what defines a run with their values in text.

    Attributes:
        parts: what is or is not there: modules with their classes, weights with their shapes.
        settings: numbers, names and switches; one that only one of two definitions has is not compared.
        moved: settings that the run itself has changed, with the value they had when the checkpoint was written.
    """

    parts: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, dict[str, str]]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Definition:
        """What :meth:`to_dict` gave. ValueError for anything else."""
        if not isinstance(values, dict) or set(values) != {"parts", "settings", "moved"}:
            raise ValueError("no definition of a run")
        for part in values.values():
            if not isinstance(part, dict) or not all(
                isinstance(name, str) and isinstance(value, str) for name, value in part.items()
            ):
                raise ValueError("a definition that is not text")
        return cls(**values)

    def at(self, now: Definition) -> Definition:
        """The same, of a checkpoint that is written when the run has come to ``now``."""
        pairs = ((name, now.settings.get(name, then)) for name, then in self.settings.items())
        return Definition(self.parts, self.settings, {n: v for n, v in pairs if v != self.settings[n]})

    def differences(self, now: Definition) -> dict[str, tuple[str, str]]:
        """Names with the values (then, now) of a run that is to go on from this one."""
        found: dict[str, tuple[str, str]] = {}
        for name in [*self.parts, *(name for name in now.parts if name not in self.parts)]:
            then, current = self.parts.get(name, "nothing"), now.parts.get(name, "nothing")
            # Of a layer that was replaced, its weights and settings go without saying.
            if then != current and not any(name.startswith(f"{parent}.") for parent in found):
                found[name] = then, current
        replaced = tuple(f"{name}." for name in found)
        for name, then in self.settings.items():
            current = now.settings.get(name, then)
            if current in (then, self.moved.get(name)) or name.startswith(replaced):
                continue
            # A counter, say: what a run changes in its model or data is its state and not its definition.
            if not (name in self.moved and name.startswith(("model.", "loader.", "val_loader."))):
                found[name] = then, current
        return found


def define(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    loaders: Mapping[str, Any],
    options: Mapping[str, object],
) -> Definition:
    """The definition of a run as it stands, without the contents of its data (``fingerprint_of_data``)."""
    found = Definition(settings={name: repr(value) for name, value in options.items()})
    _define_model(found, unwrap(model))
    for index, group in enumerate(optimizer.param_groups):
        found.parts[f"{optimizer_prefix(optimizer.param_groups, index)}params"] = str(len(group["params"]))
    found.settings |= optimizer_settings(optimizer.param_groups)
    if scheduler is not None:
        found.parts["scheduler"] = type(scheduler).__qualname__
        found.settings |= scheduler_settings(scheduler.state_dict())
    for name, loader in loaders.items():
        if loader is None:
            continue
        batches = getattr(loader, "batch_sampler", None)
        size = getattr(loader, "batch_size", None) or getattr(batches, "batch_size", None)
        sampler = getattr(loader, "sampler", None)
        values = {
            "batch_size": size,
            "drop_last": getattr(loader, "drop_last", None),
            "length": length_of(loader),
        }
        values["sampler"] = None if sampler is None else type(sampler).__qualname__
        found.settings |= _texts(f"{name}.", {k: v for k, v in values.items() if v is not None})
    return found


def optimizer_prefix(groups: Sequence[Mapping[str, Any]], index: int) -> str:
    """Begins the names of a group's settings."""
    return "optimizer." if len(groups) == 1 else f"optimizer.groups[{index}]."


def optimizer_settings(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of an optimiser's ``param_groups``, or of those in its state: the hyperparameters that define a run."""
    found: dict[str, str] = {}
    for index, group in enumerate(groups):
        # Schedulers leave the rate that they began with.
        values = {**group, "lr": group.get("initial_lr", group.get("lr"))}
        for name in ("params", "initial_lr", "param_names"):
            values.pop(name, None)
        found |= _texts(optimizer_prefix(groups, index), values)
    return found


def scheduler_settings(state: Mapping[str, Any]) -> dict[str, str]:
    """Of a scheduler's state: what defines a run, without how far it has come."""
    return _texts("scheduler.", {k: v for k, v in state.items() if k not in STATE_OF_SCHEDULERS})


def _define_model(found: Definition, model: nn.Module) -> None:
    for path, module in model.named_modules():
        name = f"model.{path}" if path else "model"
        found.parts[name] = type(module).__qualname__
        known = {*_constructor_parameters(type(module)), *getattr(module, "__constants__", ())}
        for key, value in vars(module).items():
            # A whole number may be a counter, unless it was given.
            counter = type(value) is int and key not in known and not hasattr(type(module), key)
            if not counter and key not in _STATE_OF_MODULES:
                found.settings |= _texts(f"{name}.", {key: value})
    for path, value in model.state_dict().items():
        if isinstance(value, Tensor) and not nn.parameter.is_lazy(value):
            found.parts[f"model.{path}"] = f"{list(value.shape)} {value.dtype}"
    for path, parameter in model.named_parameters():
        found.settings[f"model.{path}.requires_grad"] = repr(parameter.requires_grad)


def _constructor_parameters(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        constructor = vars(base).get("__init__")
        if inspect.isfunction(constructor) and base is not nn.Module:
            yield from inspect.signature(constructor).parameters


def _texts(prefix: str, values: Mapping[Any, Any]) -> dict[str, str]:
    texts = {n: _text(v) for n, v in values.items() if isinstance(n, str) and not n.startswith("_")}
    return {prefix + name: text for name, text in texts.items() if text is not None}


def _text(value: Any, depth: int = 3) -> str | None:
    """The value in text that is the same in each process; None for what has no such text."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return repr(value) if not isinstance(value, (str, bytes)) or len(value) < 1000 else None
    if isinstance(value, Tensor):
        return repr(value.item()) if value.numel() == 1 and value.device.type != "meta" else None
    if depth == 0:
        return None
    if isinstance(value, (tuple, list)):
        texts = [_text(entry, depth - 1) for entry in value] if len(value) <= _HASHED_ENTRIES else [None]
        return None if None in texts else f"({', '.join(text for text in texts if text is not None)})"
    if isinstance(value, dict):
        pairs = sorted((repr(key), _text(entry, depth - 1)) for key, entry in value.items())
        return f"{{{', '.join(f'{key}: {text}' for key, text in pairs)}}}" if len(pairs) <= 64 else None
    if not isinstance(value, nn.Module) and (isinstance(value, Likelihood) or callable(value)):
        name = getattr(value, "__qualname__", None)
        if isinstance(name, str):
            return name
        fields = {key: _text(entry, depth - 1) for key, entry in getattr(value, "__dict__", {}).items()}
        listed = ", ".join(f"{key}={text}" for key, text in fields.items() if text is not None)
        return f"{type(value).__qualname__}({listed})"
    return None


def fingerprint_of_data(loader: Any) -> str | None:
    """A hash of the data that a loader holds in memory, or None if it holds none that can be seen.

    Nothing is drawn from it: that would move generators on and run transforms. So what a transform does, what is read
    from files, and of large tensors what lies between the rows looked at, is not seen.
    """
    digest = hashlib.sha256()
    fed = [_feed(digest, entry) for entry in _pieces(loader, 5)]
    return digest.hexdigest()[:16] if any(fed) else None


def _pieces(data: Any, depth: int) -> Iterator[Any]:
    """The tensors, arrays and plain values that data consist of, in a fixed order."""
    if isinstance(data, (Tensor, np.ndarray)) or data is None or isinstance(data, (bool, int, float, range)):
        yield data
    elif depth == 0:
        return
    elif isinstance(data, (list, tuple)):
        yield len(data)
        step = max(1, len(data) // _HASHED_ENTRIES)
        for entry in data[::step]:
            yield from _pieces(entry, depth - 1)
    elif isinstance(data, Mapping):
        for key in sorted(data, key=repr):
            yield from _pieces(data[key], depth - 1)
    elif not isinstance(data, Iterator):
        for key, value in sorted(getattr(data, "__dict__", {}).items()):
            holds = key in ("loader", "dataset", "datasets", "indices", "tensors") or isinstance(
                value, Dataset
            )
            if holds or isinstance(value, (Tensor, np.ndarray)):
                yield from _pieces(value, depth - 1)


def _feed(digest: Any, piece: Any) -> bool:
    """Whether this was data whose values were hashed."""
    if isinstance(piece, np.ndarray):
        if piece.dtype.hasobject:
            return False
        digest.update(f"{piece.dtype} {piece.shape}".encode())
        digest.update(
            np.ascontiguousarray(piece[_rows(piece.shape, piece.itemsize)]).reshape(-1).view(np.uint8)
        )
        return True
    if not isinstance(piece, Tensor):
        digest.update(repr(piece).encode())
        return False
    digest.update(f"{piece.dtype} {list(piece.shape)}".encode())
    if piece.layout != torch.strided or piece.device.type == "meta" or piece.is_quantized:
        return False
    chosen = piece.detach()[_rows(tuple(piece.shape), piece.element_size())].cpu().contiguous()
    digest.update(chosen.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy())
    return True


def _rows(shape: tuple[int, ...], size: int) -> Any:
    """An index of rows, evenly spread, that hold about ``_HASHED_BYTES``."""
    if not shape or not shape[0]:
        return ...
    each = max(1, size * int(np.prod(shape[1:], dtype=object)))
    return slice(None, None, max(1, shape[0] // max(2, _HASHED_BYTES // each)))


def described(differences: Mapping[str, tuple[str, str]], most: int = 6) -> str:
    """As "the same NAME (now), found then; ...", for messages."""
    pairs = [f"the same {name} ({now}), found {then}" for name, (then, now) in differences.items()]
    more = "" if len(pairs) <= most else f"; and {len(pairs) - most} more differences"
    return "; ".join(pairs[:most]) + more

"""The checkpoints of a run in memory, each loaded once, and the model put into their state."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastvae._extension import raw
from fastvae.influence.cache import fingerprint
from fastvae.training.randomness import modes_kept

__all__ = ["Snapshots"]


class Snapshots:
    """Weights of several checkpoints.

    Args:
        model: what they are weights of.
        sources: checkpoints, or the path of a folder whose entries they are in sorted order.
        load: (model, checkpoint) -> weight in TracIn; anything but a number counts as 1.

    Raises:
        ValueError: no checkpoint.
    """

    def __init__(
        self, model: nn.Module, sources: str | os.PathLike[str] | Iterable[Any], load: Callable[..., Any]
    ) -> None:
        if isinstance(sources, (str, os.PathLike)):
            folder = os.fspath(sources)
            sources = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
        self._model, self._sources, self._load = model, list(sources), load
        if not self._sources:
            raise ValueError("TracIn: checkpoints: expected at least one")
        self._known: list[tuple[float, dict[str, Tensor]]] = []
        self._current: int | None = None
        self._found: dict[str, Tensor] | None = None
        self._fingerprints: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._sources)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Eval mode and any weights inside; afterwards everything is as it was found."""
        with torch.inference_mode(False), modes_kept(self._model):
            self._model.eval()
            try:
                if len(self._known) < len(self._sources):
                    self._keep()
                    self._load_rest()
                    self._current = len(self._known) - 1
                elif self._holds(self._known[-1][1]):
                    self._current = len(self._known) - 1
                yield
            finally:
                self._current = None
                if self._found is not None:
                    self._put(self._found)
                    self._found = None

    def _load_rest(self) -> None:
        for source in self._sources[len(self._known) :]:
            weight = self._load(self._model, source)
            self._known.append((float(weight) if isinstance(weight, (int, float)) else 1.0, self._state()))
        self._model.eval()

    def enter(self, index: int) -> float:
        """Give the model the weights of a checkpoint; its weight in TracIn."""
        weight, state = self._known[index]
        if self._current != index:
            self._keep()
            self._put(state)
            self._current = index
        return weight

    def forget(self) -> None:
        """Load the checkpoints anew when they are next borrowed."""
        self._known.clear()
        self._fingerprints.clear()

    def fingerprint(self) -> str:
        """A hash of the current weights."""
        assert self._current is not None
        if self._current not in self._fingerprints:
            self._fingerprints[self._current] = fingerprint(self._known[self._current][1])
        return self._fingerprints[self._current]

    def _keep(self) -> None:
        """Before the weights are first touched."""
        if self._found is None:
            self._found = self._state()

    def _holds(self, state: dict[str, Tensor]) -> bool:
        values = self._model.state_dict()
        return raw.same_bits([values[name] for name in state], list(state.values()))

    def _state(self) -> dict[str, Tensor]:
        state = self._model.state_dict()
        return {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def _put(self, state: dict[str, Tensor]) -> None:
        for name, value in self._model.state_dict().items():
            if name in state:
                value.copy_(state[name])

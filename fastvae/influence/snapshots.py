"""The checkpoints of a run in memory: a private copy of the model for each, loaded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.influence.cache import fingerprint
from fastvae.noise import key_of_weights
from fastvae.private import PrivateCopies, for_scoring, private_copy

__all__ = ["Snapshot", "Snapshots"]


@dataclass
class Snapshot:
    """A checkpoint, loaded."""

    weight: float
    """Of the checkpoint in TracIn."""
    model: nn.Module
    """A private copy in eval mode."""
    _noise_key: int | None = None

    def noise_key(self) -> int:
        """Of the weights: what keys the noise under this checkpoint, whatever stands beside it."""
        if self._noise_key is None:
            self._noise_key = key_of_weights(self.model)
        return self._noise_key

    def to(self, like: Tensor) -> None:
        """Move to the device and dtype of ``like``; rounded weights are other weights."""
        if next(self.model.parameters()).dtype != like.dtype:
            self._noise_key = None
        self.model.to(like.device, like.dtype)


class Snapshots:
    """A model under several checkpoints; itself it is never touched.

    Args:
        model: what they are weights of.
        sources: checkpoints, or the path of a folder whose entries they are in sorted order. None: a single one of
            weight 1, the model as it is at each call.
        load: (a private copy of the model, checkpoint) -> weight in TracIn; anything but a number counts as 1.
        use: called with a snapshot when it is entered.

    Raises:
        ValueError: no checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: str | os.PathLike[str] | Iterable[Any] | None,
        load: Callable[..., Any],
        use: Callable[[Snapshot], None],
    ) -> None:
        if isinstance(sources, (str, os.PathLike)):
            folder = os.fspath(sources)
            sources = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
        self._model, self._load, self._use = model, load, use
        self._sources = None if sources is None else list(sources)
        if self._sources is not None and not self._sources:
            raise ValueError("TracIn: checkpoints: expected at least one")
        self._known: list[Snapshot] = []
        self._current: int | None = None
        self._fingerprints: dict[int, str] = {}
        self._copies = PrivateCopies()

    def __len__(self) -> int:
        return 1 if self._sources is None else len(self._sources)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """All of them loaded, and the last one entered."""
        try:
            with torch.inference_mode(False):
                if self._sources is None:
                    with self._copies.borrowed(self._model) as private:
                        self._hold(private)
                        self.enter(0)
                        yield
                else:
                    self._load_rest(self._sources)
                    self.enter(len(self._known) - 1)
                    yield
        finally:
            self._current = None

    def _hold(self, private: nn.Module) -> None:
        self._known = [Snapshot(1.0, private)]
        self._fingerprints.clear()

    def _load_rest(self, sources: list[Any]) -> None:
        like = next(self._model.parameters())
        for snapshot in self._known:
            # The model may have been moved since.
            snapshot.to(like)
        for source in sources[len(self._known) :]:
            private = private_copy(self._model)
            weight = self._load(private, source)
            self._known.append(
                Snapshot(float(weight) if isinstance(weight, (int, float)) else 1.0, for_scoring(private))
            )

    def enter(self, index: int) -> float:
        """Use the model of a checkpoint; its weight in TracIn."""
        if self._current != index:
            self._current = index
            self._use(self._known[index])
        return self._known[index].weight

    def by_noise(self) -> list[list[int]]:
        """The checkpoints in groups of equal weights, whose noise is the same."""
        groups: dict[int, list[int]] = {}
        for index, snapshot in enumerate(self._known):
            groups.setdefault(snapshot.noise_key(), []).append(index)
        return list(groups.values())

    def forget(self) -> None:
        """Load the checkpoints anew when they are next borrowed."""
        self._known.clear()
        self._fingerprints.clear()

    def fingerprint(self) -> str:
        """A hash of the current weights."""
        assert self._current is not None
        if self._current not in self._fingerprints:
            state = self._known[self._current].model.state_dict()
            self._fingerprints[self._current] = fingerprint(
                {name: value for name, value in state.items() if isinstance(value, Tensor)}
            )
        return self._fingerprints[self._current]

"""What a run did."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastvae.training.checkpoints import write_atomically

__all__ = ["History"]


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
        text = json.dumps(self.to_dict(Path(path).parent), indent=1) + "\n"
        write_atomically(Path(path), lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what :meth:`save` wrote. ValueError, naming the file, if it is something else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()), Path(path).parent)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a History in JSON, found something else ({error})") from error

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Plain data, checkpoint paths relative to ``folder``."""
        return {**asdict(self), "checkpoints": [os.path.relpath(path, folder) for path in self.checkpoints]}

    @classmethod
    def from_dict(cls, values: dict[str, Any], folder: Path) -> History:
        """What :meth:`to_dict` gave. ValueError for other keys."""
        if set(values) != {entry.name for entry in fields(cls)}:
            raise ValueError(f"keys {sorted(values)}")
        paths = [Path(os.path.normpath(folder / name)) for name in values["checkpoints"]]
        return cls(**{**values, "checkpoints": paths})

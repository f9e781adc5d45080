"""What a run did."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any

from fastvae.atomic import write_atomically

__all__ = ["History"]


@dataclass
class History:
    """What a run did; every list but ``checkpoints`` has one entry an epoch. ``print`` shows a table.

    Attributes:
        train_loss: mean training loss of a sample, over the samples of the steps whose loss was finite.
        val_loss: mean validation loss of a sample, None without a ``val_loader``.
        seconds: wall-clock time of the epoch with its validation.
        learning_rate: mean over the epoch's steps, of the optimiser's first parameter group.
        steps: optimisation steps from the start of the run to the end of the epoch.
        skipped: steps left out because of a loss or gradient that was not finite, gradients that overflowed in
            float16 included.
        checkpoints: the files to hand to TracIn, oldest first.
        best_epoch: epoch (from 1) with the lowest validation loss, None without one.
        stopped: what ended the run: "epochs", "patience", "max_steps" or "callback"; "" while it goes on.
        trained_epochs: epochs (a part counts as one) that this call of ``fit`` trained; 0: the run was complete before.
            Of the call and not of the run: not saved, not compared, None in what was loaded.
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
    trained_epochs: int | None = field(default=None, compare=False)

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
        if self.trained_epochs == 0:
            lines.append("complete before this call, which trained nothing")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically; checkpoint paths are stored relative to the file's folder.

        ValueError if one of them lies outside that folder.
        """
        text = json.dumps(self.to_dict(Path(path).parent), indent=1) + "\n"
        write_atomically(Path(path), lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what :meth:`save` wrote. ValueError, naming the file, if it is something else.

        The checkpoints it names are in its folder: a path or a link that leads out of it is a ValueError.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()), Path(path).parent)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected a History in JSON, found something else ({error})") from error

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Plain data, checkpoint paths relative to ``folder``, in which they must be."""
        values = asdict(self)
        del values["trained_epochs"]
        values["checkpoints"] = [os.path.relpath(path, folder) for path in self.checkpoints]
        for name in values["checkpoints"]:
            if os.path.isabs(name) or Path(name).parts[:1] == ("..",):
                raise ValueError(f"History: checkpoints: expected files in {folder}, got {name!r}")
        return values

    @classmethod
    def from_dict(cls, values: Any, folder: Path) -> History:
        """What :meth:`to_dict` gave. ValueError for other keys or values."""
        names = {entry.name for entry in fields(cls)} - {"trained_epochs"}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"keys {sorted(map(str, values))}" if isinstance(values, dict) else "no mapping")
        for name, kinds in _COLUMNS.items():
            column = values[name]
            if not isinstance(column, list) or not all(_is(entry, *kinds) for entry in column):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{name}: expected a list of {expected}")
        for name in _COLUMNS:
            if name != "checkpoints" and len(values[name]) != len(values["steps"]):
                raise ValueError(f"{name} has {len(values[name])} entries and steps {len(values['steps'])}")
        best, stopped = values["best_epoch"], values["stopped"]
        if best is not None and not (_is(best, int) and 1 <= best <= len(values["steps"])):
            raise ValueError(f"best_epoch {best!r}")
        if stopped not in ("", "epochs", "patience", "max_steps", "callback"):
            raise ValueError(f"stopped {stopped!r}")
        for name in values["checkpoints"]:
            _check_inside(name, folder)
        columns: dict[str, Any] = {name: values[name] for name in _COLUMNS if name != "checkpoints"}
        paths = [Path(os.path.normpath(folder / name)) for name in values["checkpoints"]]
        return cls(**columns, checkpoints=paths, best_epoch=best, stopped=stopped)


_COLUMNS: dict[str, tuple[type, ...]] = {
    "train_loss": (float, int),
    "val_loss": (float, int, NoneType),
    "seconds": (float, int),
    "learning_rate": (float, int),
    "steps": (int,),
    "skipped": (int,),
    "checkpoints": (str,),
}


def _is(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _check_inside(name: str, folder: Path) -> None:
    """ValueError if the name leads out of the folder, by itself or through a link."""
    inside = folder.resolve()
    if os.path.isabs(name) or not (inside / name).resolve().is_relative_to(inside):
        raise ValueError(f"checkpoint {name!r}, which is outside of {folder}")

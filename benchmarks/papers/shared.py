"""What the experiments of several papers share: folders to resume from, checkpoints, tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import fastvae

from .. import writing
from ..writing import write

Row = dict[str, Any]


def claim_folder(folder: Path, settings: Row, resume: bool) -> None:
    """Begin a folder of states, or see that those in it may go on under the same settings."""
    file = folder / "settings.json"
    if file.exists():
        found = json.loads(file.read_text())
        if not resume:
            raise SystemExit(f"{folder} holds an earlier run: pass --resume, or another --checkpoint")
        if changed := [f"{key} {found.get(key)}" for key in settings if found.get(key) != settings[key]]:
            raise SystemExit(f"{folder}: --resume: expected the same settings, found {', '.join(changed)}")
    elif resume:
        raise SystemExit(f"{folder}: --resume: expected an earlier run, found none")
    folder.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps(settings, indent=1) + "\n")


def stored(file: Path, key: Row, compute: Callable[[], Row]) -> Row:
    """What ``compute`` gave for the same ``key`` when it is in ``file``; else compute it and store it there."""
    if file.exists() and (found := json.loads(file.read_text()))["key"] == key:
        return dict(found["scores"])
    scores = compute()
    write(file, json.dumps({"key": key, "scores": scores}))
    return scores


def last_epoch(folder: Path) -> int:
    """The newest epoch of which ``fastvae.fit`` left a checkpoint there, 0 for none."""
    return max((int(path.stem.removeprefix("epoch-")) for path in folder.glob("epoch-*.pt")), default=0)


def keep_epochs(folder: Path, epochs: Collection[int]) -> None:
    """Delete the checkpoints of all other epochs."""
    for path in folder.glob("epoch-*.pt"):
        if int(path.stem.removeprefix("epoch-")) not in epochs:
            path.unlink()


def training_seconds(history: fastvae.History) -> float:
    """Seconds of all steps at the median pace of the epochs: other work on the machine hardly counts."""
    if not history.steps:
        return 0.0
    counts = [last - first for first, last in zip([0, *history.steps], history.steps, strict=False)]
    paces = [seconds / count for seconds, count in zip(history.seconds, counts, strict=True)]
    return history.steps[-1] * statistics.median(paces)


def table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> str:
    """Markdown; a column is (key, heading, format), None is printed as "-"."""
    cells = [
        ["-" if row[key] is None else format(row[key], spec) for key, _, spec in columns] for row in rows
    ]
    return writing.table([heading for _, heading, _ in columns], cells)


def write_results(folder: Path, name: str, results: Row, text: str) -> None:
    """``name``.json and .md, in a folder that is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    writing.write_json(folder / f"{name}.json", results, digits=17, allow_nan=True)
    write(folder / f"{name}.md", text)

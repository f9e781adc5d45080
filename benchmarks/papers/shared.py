"""What the experiments of several papers share: folders to resume from, checkpoints, tables."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastvae

from .. import provenance, writing
from ..writing import write

Row = dict[str, Any]


def build_model(
    kind: str, networks: Callable[[], tuple[nn.Module, nn.Module]], seed: int, arguments: argparse.Namespace
) -> fastvae.HVAE | fastvae.VAE:
    """An untrained "HVAE" or "VAE" of an encoder and a decoder; for one seed both have the same networks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, decoder = networks()
    if kind == "VAE":
        return fastvae.VAE(encoder, decoder)
    steps = arguments.leapfrog_steps
    # "drop": one trajectory that diverges should not end a run of hours; they are counted and reported.
    return fastvae.HVAE(
        encoder,
        decoder,
        num_steps=steps,
        tempering="free",
        step_size=torch.full((steps, 1), arguments.step_size),
        on_divergence="drop",
    )


def circumstances() -> Row:
    """What is recorded of every run beside its settings."""
    return {
        "threads": torch.get_num_threads(),
        "machine": provenance.processor(),
        "torch": torch.__version__,
        "fastvae": fastvae.__version__,
        "commit": provenance.commit(),
    }


def measured_on(settings: Row) -> str:
    """The same, below a table; runs of before it was recorded have no commit and no machine."""
    known = {"commit": "unknown", "threads": "unknown", "machine": "not recorded", **settings}
    return "Commit {commit}, torch {torch}, threads: {threads} ({machine}).\n".format_map(known)


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


def add_folder(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of an experiment whose units of work are kept: --checkpoint and --resume."""
    parser.add_argument("--checkpoint", type=Path, default=Path("runs") / name, help="folder of what is done")
    parser.add_argument("--resume", action="store_true", help="go on from what is done in --checkpoint")


def claim_for(arguments: argparse.Namespace, *, free: Collection[str] = ()) -> None:
    """``claim_folder`` of ``add_folder`` for all arguments but those that are ``free`` to change."""
    apart = {"checkpoint", "resume", "out", "name", *free}
    settings = {key: value for key, value in vars(arguments).items() if key not in apart}
    claim_folder(arguments.checkpoint, settings, arguments.resume)


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

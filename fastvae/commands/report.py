"""``fastvae report``: a page about a model and its images or rows."""

from __future__ import annotations

import argparse
import importlib
import shlex
from pathlib import Path

from fastvae.commands.errors import mendable, positive
from fastvae.commands.runs import load_data, load_run
from fastvae.training import History

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", type=Path, help="a folder that fastvae train wrote")
    parser.add_argument("data", help="the images or the table that it was trained on")
    parser.add_argument(
        "--foreign",
        nargs="+",
        default=[],
        metavar="DATA",
        help="images or tables of other kinds, to be told from them",
    )
    parser.add_argument("--out", type=Path, help="the report's folder (RUN/report)")
    parser.add_argument(
        "--effort", type=positive(float), default=1.0, help="less looks at fewer images (%(default)s)"
    )
    parser.add_argument("--device", help='"cpu", "cuda", ...; a GPU if there is one')


def run(options: argparse.Namespace) -> int:
    """Write the page and say where; 0."""
    model, settings = load_run(options.run, options.device)
    with mendable():  # it needs packages that fastvae does without
        write_report = importlib.import_module("fastvae.report").write_report
        history = options.run / "checkpoints" / "history.json"
        known = History.load(history) if history.exists() else None
    train, test = (load_data(options.data, settings, split) for split in ("train", "test"))
    foreign = [load_data(source, settings, "all", labelled=False) for source in options.foreign]
    folder = options.out or options.run / "report"
    words = ["fastvae", "report", str(options.run), options.data]
    with mendable():
        path = write_report(
            model,
            train,
            test,
            folder,
            foreign=foreign or None,
            history=known,
            binarised=settings.binarize,
            effort=options.effort,
            command=shlex.join(words + (["--foreign", *options.foreign] if foreign else [])),
        )
    print(f"report: {path}")
    return 0

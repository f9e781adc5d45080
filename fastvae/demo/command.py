"""The command line of the demonstration."""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
from collections.abc import Callable
from pathlib import Path

from fastvae._distribution import to_mend

__all__ = ["DemoError", "add_arguments", "run"]


class DemoError(Exception):
    """Something the caller of the demonstration has to mend; the message says what."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demonstration."""
    parser.add_argument(
        "--data", default="digits", help='"digits", a folder (IDX files or one .npz) or an .npz file'
    )
    parser.add_argument(
        "--ood", nargs="+", default=[], help="foreign images, in the same forms", metavar="DATA"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder for index.html")
    parser.add_argument("--minutes", type=_positive(float), default=3.0, help="all training stops by then")
    parser.add_argument("--epochs", type=_positive(int), default=200, help="and after so many epochs")
    parser.add_argument("--seed", type=int, default=0, help="of weights, shuffling and noise")


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's own message, for text that is no number, names it
    return parse


def run(options: argparse.Namespace, command: list[str]) -> int:
    """Train, print the figures, write ``options.out/index.html``.

    Args:
        options: what ``add_arguments`` declared.
        command: the words of the command, for the report.

    Returns:
        The exit status, 0.

    Raises:
        DemoError: a package that is not installed, data that cannot be read, or no folder to write to.
    """
    needed = {"matplotlib": "matplotlib", "tqdm": "tqdm", "PIL": "pillow"}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DemoError(f"needs {' and '.join(missing)}; {to_mend(' '.join(missing), 'demo')}")
    # Not before: these import matplotlib and tqdm.
    from fastvae.demo.experiment import run_demo
    from fastvae.demo.problem import load_problem
    from fastvae.demo.report import as_html, as_text
    from fastvae.demo.sections import SECTIONS

    try:
        problem = load_problem(options.data, options.seed, options.ood)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, ImportError) as error:
        raise DemoError(str(error)) from error
    demo = run_demo(
        problem,
        epochs=options.epochs,
        seconds=60 * options.minutes,
        seed=options.seed,
        command=shlex.join(command),
    )
    sections = [section(demo) for section in SECTIONS]
    path = options.out / "index.html"
    path.write_text(as_html(f"fastvae demo: {problem.name}", sections), encoding="utf-8")
    for section in sections:
        if section.printed:
            print("\n" + as_text(section))
    print(f"\nreport: {path}")
    return 0

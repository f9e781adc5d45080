"""The command line of the demonstration."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from pathlib import Path

from fastvae._distribution import to_mend
from fastvae.commands.errors import CommandError, mendable, positive, seed

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demonstration."""
    parser.add_argument(
        "--data", default="digits", help='what fastvae.data.load takes: "digits", a folder, a file'
    )
    parser.add_argument(
        "--foreign", nargs="+", default=[], help="images of other kinds, in the same forms", metavar="DATA"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder for index.html")
    parser.add_argument("--minutes", type=positive(float), default=2.5, help="all training stops by then")
    parser.add_argument(
        "--steps", type=positive(int), default=6000, help="and each model's after so many steps"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of weights, shuffling and noise")
    parser.add_argument(
        "--effort", type=positive(float), default=1.0, help="of the report: fewer images below 1"
    )


def run(options: argparse.Namespace, command: list[str]) -> int:
    """Train, print what came of it, write ``options.out/index.html``.

    Args:
        options: what ``add_arguments`` declared.
        command: the words of the command, for the page.

    Returns:
        The exit status, 0.

    Raises:
        CommandError: a package that is not installed, data that cannot be read, or no folder to write to.
    """
    needed = {"matplotlib": "matplotlib", "tqdm": "tqdm", "PIL": "pillow", "jinja2": "Jinja2"}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"needs {' and '.join(missing)}; {to_mend(' '.join(missing), 'demo')}")
    # Not before: these import matplotlib and tqdm.
    from fastvae.data import load
    from fastvae.demo.running import run_demo
    from fastvae.report import as_text

    with mendable():
        train, test = (load(options.data, split=split) for split in ("train", "test"))
        foreign = [load(source, split="all") for source in options.foreign]
        if len(test) < 2:
            raise CommandError(
                f"--data {options.data}: expected at least 2 images to test on, found {len(test)}"
            )
        options.out.mkdir(parents=True, exist_ok=True)
    path, sections = run_demo(
        train,
        test,
        options.out,
        foreign=foreign,
        steps=options.steps,
        seconds=60 * options.minutes,
        seed=options.seed,
        effort=options.effort,
        command=shlex.join(command),
    )
    for section in sections:
        print(f"\n{as_text(section)}")
    print(f"\nreport: {path}")
    return 0

"""The command line that the benchmarks share: options, device, and where the results go."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import common


def parser(description: str | None, quick: str = "tiny sizes: does it run?") -> argparse.ArgumentParser:
    """--threads, --quick, --share, --cuda or --cpu, --output; ``description`` is a module's docstring."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    found.add_argument("--quick", action="store_true", help=quick)
    found.add_argument(
        "--share", type=float, default=1.0, help="of the time that contestants are timed for (default 1)"
    )
    device = found.add_mutually_exclusive_group()
    device.add_argument(
        "--cuda", action="store_const", const="cuda", dest="device", help="on the GPU (default if any)"
    )
    device.add_argument("--cpu", action="store_const", const="cpu", dest="device", help="on the CPU")
    found.add_argument("--output", type=Path, default=common.RESULTS, help="folder for the results")
    return found


def parse(options_of: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with a device that is there."""
    options = options_of.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        options_of.error("--cuda: PyTorch sees no GPU")
    return options


def parse_with_compilers(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The same of a benchmark with ``--no-compile``; ``compile`` is False under ``--quick``, too."""
    options_of = parser(description, "tiny sizes, no torch.compile: does it run?")
    options_of.add_argument(
        "--no-compile", action="store_false", dest="compile", help="leave torch.compile out"
    )
    options = parse(options_of, arguments)
    options.compile = options.compile and not options.quick
    return options


def names_of(options_of: argparse.ArgumentParser, given: str, known: Collection[str]) -> list[str]:
    """What --only names, by commas."""
    names = [name for name in given.split(",") if name]
    if unknown := sorted(name for name in set(names) if name not in known):
        options_of.error(f"--only: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    return names


def begin(options: argparse.Namespace, name: str) -> tuple[torch.device, Path]:
    """Set threads and float32 that is float32; the device, and the path of the results but for its suffix."""
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    quick = "-quick" if options.quick else ""
    return device, options.output / f"{name}-{common.device_slug(device)}{quick}"


def those_that_run(
    contestants: Mapping[str, common.Contestant], ours: str, title: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """What each contestant returns, and a note for each rival that fails: it is left out, and the others go on."""
    results: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for name, run in contestants.items():
        progress(f"{title}: {name}")
        try:
            results[name] = run()
        except Exception as error:
            if name == ours:
                raise
            notes[name] = f"not timed: {common.why(error)}"
    return results, notes


def draw(path: Path, panels: Mapping[str, Mapping[str, float]], label: str) -> None:
    """The figure of the results at ``path``, or a line that says why there is none."""
    if not common.plot_ratios(path.with_suffix(".png"), panels, label):
        progress("no figure: matplotlib is not installed")


def progress(message: str) -> None:
    """A line for whoever waits; results go to stdout."""
    print(message, file=sys.stderr, flush=True)

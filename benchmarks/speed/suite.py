"""Every operator at every size, forward and backward, against its rivals, by pytest-benchmark.

    python -m benchmarks.speed suite               long: torch.compile of a convolutional flow takes many minutes
    python -m benchmarks.speed suite --quick       under 5 minutes on 2 cores: no peak memory; compilers and large
                                                   sizes only of operators where they are cheap
    python -m benchmarks.speed suite --ops log_px  one operator; more by commas; written as suite-log_px-<device>

Each contestant is checked against float64 before it is timed (test_suite.py); suite_problems.py says what is computed,
suite_report.py who the rivals are. The benchmarks of single operators beside this file go deeper. Written are
suite-<device>.json with percentiles, .md and .png, and suite-scaling-<device>.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import command, common
from . import suite_problems as problems
from . import suite_report as report
from .suite_problem import FAIR, OURS

HERE = Path(__file__).resolve().parent
MEMORY_SIZES = ("paper", "large")
"""The small size takes less than the pages of a process that come and go."""


def run_timings(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """pytest-benchmark's JSON; its tables go to stderr.

    Raises:
        RuntimeError: an operator of ours failed or is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        words = [
            *(sys.executable, "-m", "pytest", str(HERE / "test_suite.py"), "-q", "-p", "no:cacheprovider"),
            *(f"--device={device.type}", f"--threads={options.threads}"),
            *(f"--ops={options.ops}", f"--sizes={options.sizes}"),
            *(["--quick"] if options.quick else []),
            *([] if options.jax else ["--no-jax"]),
            *([] if options.compile else ["--no-compile"]),
            *(f"--benchmark-json={path}", "--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds"),
            *(f"--benchmark-max-time={options.seconds}", "--benchmark-min-rounds=3"),
        ]
        # In a folder without a fastvae: -m puts it first on the path, before a build that lies elsewhere.
        done = subprocess.run(words, cwd=HERE, stdout=sys.stderr, check=False)
        if done.returncode:
            raise RuntimeError(f"suite: pytest ended with {done.returncode}; its messages are above")
        return json.loads(path.read_text(encoding="utf-8"))


def run_memory(device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak extra memory of ours and of the fair rival."""
    rows = []
    for operator in options.ops.split(","):
        for size in [size for size in MEMORY_SIZES if size in options.sizes.split(",")]:
            command.progress(f"peak memory: {operator}, {size}")
            sizes = {}
            for name in (OURS, FAIR):
                arguments = (operator, size, name, device.type)
                if device.type == "cuda":
                    sizes[name] = common.peak_extra_cuda_memory(problems.memory_probe(*arguments))
                else:
                    sizes[name] = common.peak_extra_memory(
                        problems.__name__, "memory_probe", *arguments, threads=options.threads
                    )
            rows.append({"operator": operator, "size": size, "bytes": sizes})
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__, "under 5 minutes on 2 cores: no memory, no slow compilers")
    parser.add_argument("--ops", default=",".join(problems.OPERATORS), help="operators, by commas")
    parser.add_argument("--sizes", default=",".join(problems.SIZES), help="sizes, by commas")
    parser.add_argument("--seconds", type=float, help="of each contestant (default 1; quick 0.2)")
    parser.add_argument("--no-jax", action="store_false", dest="jax", help="leave JAX out")
    parser.add_argument("--no-compile", action="store_false", dest="compile", help="leave torch.compile out")
    options = command.parse(parser, arguments)
    for name, known in (("ops", problems.OPERATORS), ("sizes", problems.SIZES)):
        unknown = set(getattr(options, name).split(",")).difference(known)
        if unknown:
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    options.seconds = options.seconds or (0.2 if options.quick else 1.0)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    # A part does not overwrite the whole.
    chosen = options.ops.split(",")
    part = [] if set(chosen) == set(problems.OPERATORS) else chosen
    device, path = command.begin(options, "-".join(["suite", *part]))
    settings = {
        "threads": options.threads,
        "precision": "float32, TF32 off",
        "clock": f"pytest-benchmark {common.version_of('pytest-benchmark')}, "
        f"at least 3 rounds and {options.seconds} s a contestant, one after another",
        "peak memory": "VmHWM of a fresh process" if device.type == "cpu" else "PyTorch's allocator",
    }
    record = report.condense(run_timings(device, options), settings)
    record["memory"] = [] if options.quick else run_memory(device, options)
    figures = []
    scaling = path.with_name(path.name.replace("suite", "suite-scaling", 1)).with_suffix(".png")
    for figure, draw, rows in (
        (path.with_suffix(".png"), report.plot_ratios, record["timings"]),
        (scaling, report.plot_scaling, record["scaling"]),
    ):
        if draw(figure, rows):
            figures.append(figure.name)
    if not figures:
        command.progress("no figure: matplotlib is not installed")
    common.publish(path, record, [report.markdown(record, figures)])

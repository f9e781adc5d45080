"""How every benchmark runs: its options, its cases checked and timed one after the other, its results.

A benchmark is a sequence of :class:`Case`; a case builds a :class:`Trial`, whose first contestant is ours. What fails
or does not agree with float64 is left out with a note, and ends the run if it is ours.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import provenance, writing
from . import report
from .timing import (
    Contestant,
    Timing,
    at_most,
    interleave,
    large_copy,
    peak_extra_cuda_memory,
    peak_extra_memory,
    relative_error,
    square_product,
)

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"
COMPILED = ", torch.compile"
LIMIT_SECONDS = 240
"""A contestant is built, compiled and called once in this time, or not at all."""

Options = argparse.Namespace
Result = Tensor | Sequence[Tensor]


@dataclass
class Trial:
    """What a case times, what it must agree with, and the least work that it is."""

    contestants: Mapping[str, Callable[[], Contestant]]
    """how each is built, ours first; building or running one may fail, where the machine lacks it"""
    expected: Sequence[Tensor] = ()
    """in float64: the first of the tensors that a contestant returns, or that its method ``tensors`` does"""
    tolerance: float | Mapping[str, float] = math.inf
    """of the largest |difference| / |expected|, of all contestants or of those named"""
    unchecked: Collection[str] = ()
    """contestants that compute something else"""
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], float] = relative_error
    operations: int = 0
    """fewest floating-point operations of matrix products"""
    bytes: int = 0
    """fewest bytes of memory read and written"""
    floors: Mapping[str, Contestant] = field(default_factory=dict)
    """work that cannot be avoided, timed with the contestants"""
    adjust: Callable[[dict[str, Timing]], dict[str, Timing]] = dict
    """from times of calls to the times that are compared"""
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    key: str
    title: str
    build: Callable[..., Trial]
    """of the options and what follows"""
    arguments: tuple[Any, ...] = ()
    seconds: float = 1.0
    """how long its contestants are timed"""
    labels: Mapping[str, str] = field(default_factory=dict)
    """by which tables of many cases have their rows and columns"""
    group: str = ""
    """what ``--only`` calls it, by default its key"""
    threads: int = 0
    """of its own"""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    """in which all of it runs"""


@dataclass(frozen=True)
class MemoryCase:
    """Peak memory of functions of a module that build a callable; see ``timing.peak_extra_memory``."""

    key: str
    title: str
    probes: Mapping[str, tuple[Any, ...]]
    """by contestant, the function and its arguments; the device's name follows them"""
    given: Mapping[str, int] = field(default_factory=dict)
    """bytes to compare with"""
    group: str = ""


@dataclass(frozen=True)
class Benchmark:
    name: str
    title: str
    cases: Iterable[Case]
    """a generator may look into ``records`` to see how the ones before went"""
    memory: Sequence[MemoryCase] = ()
    """what ``--memory`` measures instead"""
    targets: Sequence[report.Target] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    packages: Sequence[str] = ()
    """whose versions are told"""
    summary: Callable[[Sequence[report.Record]], list[str]] | None = None
    """the tables of many cases, instead of a section each"""
    panel: str = ""
    """the label by which the figure has its panels"""
    ours_may_fail: bool = False
    """of a zoo: a note, as of a rival"""
    records: list[report.Record] = field(default_factory=list)

    def run(self, options: Options) -> None:
        """Measure every case and write the results after each: a run that is cut off leaves what it had done."""
        if options.memory and not self.memory:
            raise SystemExit(f"{self.name}: --memory: only flow, jacobian and tracin measure it")
        name = f"{self.name}-memory" if options.memory else self.name
        part = f"-{options.only.replace(',', '-')}" if options.only else ""  # does not overwrite the whole
        quick = "-quick" if options.quick else ""
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"{name}{part}-{device_slug(options.device)}{quick}"
        head = {"benchmark": self.name, "environment": environment_of(options.device, self.packages)}
        head["settings"] = {"threads": options.threads, "precision": "float32, TF32 off", **self.settings}
        wanted = [name for name in options.only.split(",") if name]
        text, unknown = "", set(wanted)
        for case in self.memory if options.memory else self.cases:
            group = case.group or case.key
            if wanted and group not in wanted:
                continue
            unknown.discard(group)
            if isinstance(case, MemoryCase):
                self.records.append(measure_memory(case, options))
            else:
                self.records.append(measure(case, options, ours_may_fail=self.ours_may_fail))
            targets = [] if options.quick else report.judge(self.records, options.device.type, self.targets)
            record = {**head, "cases": self.records, "targets": targets}
            text = report.page(self.title, record, None if options.memory else self.summary)
            writing.write_json(path.with_suffix(".json"), record)
            writing.write(path.with_suffix(".md"), text + "\n")
        if unknown:
            raise SystemExit(f"{self.name}: --only: nothing here is called {', '.join(sorted(unknown))}")
        report.draw(path.with_suffix(".png"), self.records, self.panel)
        print(text)


def parser(description: str | None, quick: str = "tiny sizes, no torch.compile: does it run?") -> Any:
    """The options that all benchmarks share; ``description`` is a module's docstring."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    found.add_argument("--quick", action="store_true", help=quick)
    found.add_argument("--only", default="", help="cases, by commas; written under a name of their own")
    found.add_argument(
        "--share", type=float, default=1.0, help="of the usual time of contestants (default 1)"
    )
    found.add_argument(
        "--memory", action="store_true", help="peak memory instead of time, where it is measured"
    )
    found.add_argument("--no-jax", action="store_false", dest="jax", help="leave JAX out")
    found.add_argument("--no-compile", action="store_false", dest="compile", help="leave torch.compile out")
    device = found.add_mutually_exclusive_group()
    for name, where in (("cuda", "the GPU (default if any)"), ("cpu", "the CPU")):
        device.add_argument(f"--{name}", action="store_const", const=name, dest="device", help=f"on {where}")
    found.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    return found


def parse(options_of: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Options:
    """The options, with a device that is there; threads are set, and float32 is float32."""
    options = options_of.parse_args(arguments)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        options_of.error("--cuda: PyTorch sees no GPU")
    options.device = torch.device(name)
    options.compile = options.compile and not options.quick
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return options


def ready(contestants: Mapping[str, Contestant]) -> dict[str, Callable[[], Contestant]]:
    """For a trial, of contestants that need no building."""
    return {name: lambda run=run: run for name, run in contestants.items()}  # type: ignore[misc]


def measure(case: Case, options: Options, *, ours_may_fail: bool = False) -> report.Record:
    """Check every contestant, then time those that agree, the floors, and in the same rounds the machine's rates."""
    torch.set_num_threads(case.threads or options.threads)
    with case.context():
        try:
            trial = case.build(options, *case.arguments)
            contestants, errors = checked(case, trial, ours_may_fail)
        except Exception as failure:
            if not ours_may_fail:
                raise
            trial, contestants, errors = Trial({}, notes={"": f"not timed: {why(failure)}"}), {}, {}
        record = {"case": case.key, "title": case.title, **case.labels, "notes": trial.notes}
        if not contestants or next(iter(trial.contestants)) not in contestants:
            return record
        progress(f"{case.title}: timing")
        probes = {"square GEMM, GFLOP/s": square_product(options.device, quick=options.quick)}
        if trial.bytes:
            probes["copy, GB/s"] = large_copy(options.device, quick=options.quick)
        everyone = {**contestants, **trial.floors, **{name: probe.run for name, probe in probes.items()}}
        timings = interleave(
            everyone, seconds=case.seconds * options.share, min_rounds=2 if options.quick else 5
        )
    rates = {name: probe.giga_per_second(timings.pop(name)) for name, probe in probes.items()}
    floors = {name: timings.pop(name).median for name in trial.floors}
    for name, work, rate in (
        (report.FLOPS, trial.operations, rates["square GEMM, GFLOP/s"]),
        (report.BYTES, trial.bytes, rates.get("copy, GB/s", 1.0)),
    ):
        if work:
            floors[name] = work / rate / 1e6
    timings = trial.adjust(timings)
    ours = next(iter(timings.values())).median
    return record | {
        "operations": trial.operations,
        "bytes_moved": trial.bytes,
        "rates": rates,
        "timings_ms": timings,
        "floor_ms": floors,
        "ratio_to_ours": {name: timing.median / ours for name, timing in timings.items()},
        "ours_over_floor": {name: ours / floor for name, floor in floors.items()},
        "relative_error": errors,
    }


def checked(
    case: Case, trial: Trial, ours_may_fail: bool = False
) -> tuple[dict[str, Contestant], dict[str, float]]:
    """The contestants that run and agree with what is expected, and their errors; notes on the others."""
    found: dict[str, Contestant] = {}
    errors: dict[str, float] = {}
    for name, make in trial.contestants.items():
        progress(f"{case.title}: {name}")
        try:
            with at_most(LIMIT_SECONDS):
                contestant = make()
                torch.manual_seed(1)  # what draws its noise itself draws that of the expected result
                result: Any = contestant()
            if trial.expected and name not in trial.unchecked:
                result = contestant.tensors() if hasattr(contestant, "tensors") else result
                tensors = [result] if isinstance(result, Tensor) else list(result)
                errors[name] = trial.error(tensors[: len(trial.expected)], trial.expected)
                bounds = trial.tolerance
                bound = bounds.get(name, math.inf) if isinstance(bounds, Mapping) else bounds
                if not errors[name] <= bound:
                    raise ArithmeticError(f"differs from float64 by {errors[name]:.1e}, over {bound:.0e}")
        except Exception as failure:
            if name.startswith("ours") and not name.endswith(COMPILED) and not ours_may_fail:
                raise
            errors.pop(name, None)
            trial.notes[name] = f"not timed: {why(failure)}"
        else:
            found[name] = contestant
    return found, errors


def measure_memory(case: MemoryCase, options: Options) -> report.Record:
    """Peak extra memory of every contestant."""
    sizes = {}
    for name, (probe, *arguments) in case.probes.items():
        progress(f"{case.title}: peak memory, {name}")
        if options.device.type == "cuda":
            sizes[name] = peak_extra_cuda_memory(probe(*arguments, "cuda"))
        else:
            sizes[name] = peak_extra_memory(probe, *arguments, "cpu", threads=options.threads)
    return {"case": case.key, "title": case.title, "bytes": sizes | dict(case.given), "notes": {}}


def environment_of(device: torch.device, packages: Sequence[str] = ()) -> dict[str, str]:
    """What a reader needs to judge the numbers: machine, versions, commit, date."""
    from fastvae import info

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "CPU": provenance.processor(),
        **{name: value for name, value in info.describe() if not name.startswith("installed")},
        **{name: provenance.version_of(name) for name in ("jax", *packages)},
        "commit": provenance.commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def device_slug(device: torch.device) -> str:
    """The device's name as part of a file name: "cpu", "nvidia-h100-80gb-hbm3"."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).lower()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def why(error: Exception) -> str:
    """Why a contestant could not run, in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def progress(message: str) -> None:
    """A line for whoever waits; results go to stdout."""
    print(message, file=sys.stderr, flush=True)

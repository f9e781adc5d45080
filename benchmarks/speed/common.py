"""What the benchmarks share: clocks, interleaved timing, memory, the machine's rates, and reports.

A contestant is a callable without arguments that does the whole job once. Contestants are timed in rounds, each once a
round and in rotating order, so that a drift of the machine (clock, neighbours) hits all of them alike.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"

T = TypeVar("T")
Contestant = Callable[[], object]
Clock = Callable[[Contestant, int], float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call, over ``rounds`` rounds of ``repeats`` calls each."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float], repeats: int) -> Timing:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples), repeats)


def wall_clock(contestant: Contestant, repeats: int) -> float:
    """Milliseconds a call by the host's clock; on a GPU the contestant must wait for its own end."""
    start = time.perf_counter()
    for _ in range(repeats):
        contestant()
    return (time.perf_counter() - start) * 1e3 / repeats


def cuda_clock(contestant: Contestant, repeats: int) -> float:
    """Milliseconds a call between two CUDA events on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        contestant()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def interleave(
    contestants: Mapping[str, Contestant],
    clocks: Mapping[str, Clock],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Time all contestants in interleaved rounds.

    Before each measurement the thread pools of the contestant before come to rest (they spin for a while) and one call
    goes untimed, but for contestants of over 200 ms, which do not notice. Short ones are repeated
    to 20 ms a measurement.

    Args:
        contestants: what to time; every one has already been called, so that nothing is compiled here.
        clocks: the clock of each contestant.
        seconds: how long to go on; at least ``min_rounds`` rounds are made.
    """
    repeats, slow = {}, set()
    for name, contestant in contestants.items():
        contestant()
        once = clocks[name](contestant, 1)
        if once > 200:
            slow.add(name)
        repeats[name] = max(1, min(200, round(20 / max(once, 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    start = time.perf_counter()
    for index in range(max_rounds):
        if index >= min_rounds and time.perf_counter() - start > seconds:
            break
        for name in order:
            time.sleep(0.005)
            if name not in slow:
                contestants[name]()
            samples[name].append(clocks[name](contestants[name], repeats[name]))
        order = [*order[1:], order[0]]
    return {name: Timing.of(samples[name], repeats[name]) for name in contestants}


def gemm(m: int, k: int, n: int, device: torch.device) -> Contestant:
    """[m, k] x [k, n] in float32 into a preallocated result: 2 m k n floating-point operations."""
    a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
    out = torch.empty(m, n, device=device)
    return lambda: torch.mm(a, b, out=out)


def square_side(device: torch.device, *, quick: bool = False) -> int:
    """Of a product that runs at the device's full rate."""
    return 64 if quick else 1024 if device.type == "cpu" else 4096


def interleave_with_gemm(
    contestants: Mapping[str, Contestant],
    device: torch.device,
    *,
    seconds: float,
    quick: bool,
    clocks: Mapping[str, Clock] | None = None,
) -> tuple[dict[str, Timing], float]:
    """Times of all contestants, and in the same rounds the rate of a large square product in GFLOP/s.

    Args:
        clocks: of contestants that the device's clock does not see.
    """
    side, square = square_side(device, quick=quick), "square GEMM"
    everyone = {**contestants, square: gemm(side, side, side, device)}
    found = {**dict.fromkeys(everyone, clock_of(device)), **(clocks or {})}
    timings = interleave(everyone, found, seconds=seconds, min_rounds=2 if quick else 5)
    return timings, 2 * side**3 / timings.pop(square).median / 1e6


def gemm_rate(shapes: Sequence[tuple[int, int, int]], device: torch.device) -> dict[str, float]:
    """GFLOP/s of float32 matrix products (m, k, n), medians."""
    clock = clock_of(device)
    products = {f"{m}x{k}x{n}": gemm(m, k, n, device) for m, k, n in shapes}
    timings = interleave(products, dict.fromkeys(products, clock), seconds=0.5)
    operations = {f"{m}x{k}x{n}": 2 * m * k * n for m, k, n in shapes}
    return {name: operations[name] / timing.median / 1e6 for name, timing in timings.items()}


def copy_rate(device: torch.device, megabytes: int = 256) -> float:
    """GB/s of a copy between two tensors that exist, read and written bytes counted; median."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.zeros_like(source)
    contestants: dict[str, Contestant] = {"copy": lambda: target.copy_(source)}
    timing = interleave(contestants, {"copy": clock_of(device)}, seconds=0.5)["copy"]
    return 2 * source.nbytes / timing.median / 1e6


class Steadiness:
    """Waits while a small matrix product is much slower than it has been: others are at work, or a host throttles us.

    Args:
        patience: seconds that are waited at most, all calls together; a machine that stays slow is taken as it is.
    """

    def __init__(self, device: torch.device, patience: float = 60) -> None:
        self._product, self._clock = gemm(512, 512, 512, device), clock_of(device)
        self._best, self._patience = min(self._sample() for _ in range(20)), patience

    def _sample(self) -> float:
        return statistics.median(self._clock(self._product, 3) for _ in range(3))

    def wait(self) -> None:
        while (now := self._sample()) > 1.5 * self._best and self._patience > 0:
            time.sleep(0.5)
            self._patience -= 0.5
        self._best = min(self._best, now)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError inside when the time is over."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def clock_of(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else wall_clock


def captured(contestant: Callable[[], T]) -> Callable[[], T]:
    """The contestant in a CUDA graph; what it returns is overwritten by every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            contestant()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = contestant()

    def replay() -> T:
        graph.replay()
        return results

    return replay


def peak_extra_memory(module: str, function: str, *arguments: Any, threads: int) -> int:
    """Bytes by which the peak of the resident set grows while a callable runs, in a fresh process.

    The new process calls ``module.function(*arguments)``, which builds the inputs, warms up at a small size (so that
    libraries and thread pools are counted in neither reading) and returns the callable; the peak is read before and
    after it runs once. The peak is Linux's VmHWM, elsewhere ``getrusage``'s ru_maxrss: on Linux the latter survives
    exec, so a child of a large process starts with its parent's peak. On a GPU, use :func:`peak_extra_cuda_memory`.
    """
    code = (
        f"import sys, json; sys.path[:] = {sys.path!r}; from benchmarks.speed import common; "
        f"common._report_peak({module!r}, {function!r}, json.loads(sys.argv[1]), {threads})"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak_extra_memory: {module}.{function}{arguments} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _report_peak(module: str, function: str, arguments: Sequence[Any], threads: int) -> None:
    torch.set_num_threads(threads)
    work = getattr(importlib.import_module(module), function)(*arguments)
    before = _peak_resident_bytes()
    work()
    print(_peak_resident_bytes() - before)


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows, which has no other way here

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_extra_cuda_memory(work: Contestant) -> int:
    """Bytes that PyTorch's allocator holds at its peak while ``work`` runs, over what it held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment(device: torch.device) -> dict[str, str]:
    """What a reader needs to judge the numbers: machine, versions, commit, date."""
    from fastvae import info

    known = {name: value for name, value in info.describe() if not name.startswith("installed")}

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "CPU": _cpu_model(),
        **known,
        "jax": version_of("jax"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else ())
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} logical"


def _commit() -> str:
    if known := os.environ.get("FASTVAE_COMMIT"):  # of a copy without its history
        return known

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=BENCHMARKS, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_slug(device: torch.device) -> str:
    """The device's name as part of a file name: "cpu", "nvidia-h100-80gb-hbm3"."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1, allow_nan=False, default=_plain)
    path.write_text(text + "\n", encoding="utf-8")


def why(error: Exception) -> str:
    """Why a contestant could not run, in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def publish(path: Path, record: Mapping[str, Any], sections: Sequence[str], *, last: bool = True) -> None:
    """Write a benchmark's .json and .md beside each other, after each case, and print the latter after the last.

    A run that is cut off then leaves the cases that it had done.
    """
    write_json(path.with_suffix(".json"), record)
    text = "\n\n".join(sections)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    if last:
        print(text)


def _plain(value: object) -> Any:
    if isinstance(value, Timing):
        return asdict(value)
    raise TypeError(f"write_json: expected plain data or a Timing, got {type(value).__name__}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in plain text too."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def plotter() -> Any:
    """matplotlib.pyplot, drawing to files; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_ratios(path: Path, panels: Mapping[str, Mapping[str, float]], label: str) -> bool:
    """One panel of bars a case, on a logarithmic axis with 1 marked; False, and no file, without matplotlib."""
    pyplot = plotter()
    if pyplot is None:
        return False
    tallest = max(len(bars) for bars in panels.values())
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.2 * len(panels), 1.4 + 0.4 * tallest), squeeze=False, layout="constrained"
    )
    for axis, (title, bars) in zip(axes[0], panels.items(), strict=True):
        drawn = axis.barh(list(bars), list(bars.values()), color="#4878a8")
        axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.set(xscale="log", title=title, xlabel=label)
        axis.axvline(1, color="black", linewidth=1)
        axis.margins(x=0.2)
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def relative_error(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of |result - expected| / |expected| over the tensors, in float64; NaN if one is NaN."""
    errors = []
    for ours, theirs in zip(result, expected, strict=True):
        a, b = (tensor.detach().to("cpu", torch.float64) for tensor in (ours, theirs))
        errors.append((a - b).norm() / b.norm().clamp_min(1e-30))
    return float(torch.stack(errors).max())

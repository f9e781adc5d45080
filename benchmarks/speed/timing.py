"""Clocks, interleaved timing, memory, and the machine's rates.

A contestant is a callable without arguments that does the whole job once. Contestants are timed in rounds, each once a
round and in rotating order, so that a drift of the machine (clock, neighbours) hits all of them alike.
"""

from __future__ import annotations

import functools
import importlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from fastvae._extension import raw

T = TypeVar("T")
Contestant = Callable[[], object]

WARM_UP, WARM_UP_SECONDS = 8, 2.0


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

    def scaled(self, factor: float, offset: float = 0.0) -> Timing:
        """Of a contestant that does so many times the work, and ``offset`` milliseconds of other work."""
        quantiles = (self.median, self.lower_quartile, self.upper_quartile)
        median, low, high = (offset + factor * milliseconds for milliseconds in quantiles)
        return Timing(median, low, high, self.rounds, self.repeats)


def milliseconds(contestant: Contestant, repeats: int) -> float:
    """A call, by PyTorch's timer, which waits for the device before it reads the host's clock."""
    start = timer()
    for _ in range(repeats):
        contestant()
    return (timer() - start) * 1e3 / repeats


def interleave(
    contestants: Mapping[str, Contestant],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    clock: Callable[[Contestant, int], float] = milliseconds,
) -> dict[str, Timing]:
    """Time all contestants in interleaved rounds.

    Before each measurement the thread pools of the contestant before come to rest (they spin for a while) and one call
    goes untimed, but for contestants of over 200 ms, which do not notice. Short ones are repeated
    to 20 ms a measurement.

    Whatever a contestant learns from its first calls (sweeps that are written down, CUDA graphs) it has learnt before.

    Args:
        contestants: what to time; every one has already been called, so that nothing is compiled here.
        seconds: how long to go on; at least ``min_rounds`` rounds are made.
        clock: milliseconds a call of a contestant that is called so many times.
    """
    repeats, slow = {}, set()
    for name, contestant in contestants.items():
        start = time.perf_counter()
        for _ in range(WARM_UP):
            contestant()
            if time.perf_counter() - start > WARM_UP_SECONDS:
                break
        once = clock(contestant, 1)
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
            samples[name].append(clock(contestants[name], repeats[name]))
        order = [*order[1:], order[0]]
    return {name: Timing.of(samples[name], repeats[name]) for name in contestants}


@dataclass(frozen=True)
class Probe:
    """Work of a known size, whose time gives a rate of the machine."""

    size: int
    """floating-point operations, or bytes read and written"""
    run: Contestant

    def giga_per_second(self, timing: Timing) -> float:
        return self.size / timing.median / 1e6


def matrix_product(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], object]:
    """a b by fastvae's kernel where fastvae takes that, else by torch.mm into ``out``."""
    if a.device.type == "cpu" and raw.build_info()["cpu_products"] == "kernel":
        return functools.partial(raw.matrix_product, a, b)
    return functools.partial(torch.mm, a, b, out=out)


def square_product(device: torch.device, *, quick: bool = False) -> Probe:
    """A float32 product, at a size that runs at the device's full rate."""
    side = 64 if quick else 512 if device.type == "cpu" else 4096
    a, b, out = (torch.randn(side, side, device=device) for _ in range(3))
    return Probe(2 * side**3, matrix_product(a, b, out))


def large_copy(device: torch.device, *, quick: bool = False) -> Probe:
    """Between two tensors that exist."""
    source = torch.ones((1 if quick else 256) * 2**18, device=device)
    target = torch.zeros_like(source)
    return Probe(2 * source.nbytes, lambda: target.copy_(source))


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


def compiled(function: Callable[..., T], **options: Any) -> Callable[..., T]:
    """By torch.compile, whose caches are emptied: shapes of the case before would make this one's dynamic."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, **options)


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


def peak_extra_memory(probe: Callable[..., Contestant], *arguments: Any, threads: int) -> int:
    """Bytes by which the peak of the resident set grows while a callable runs, in a fresh process.

    The new process calls ``probe(*arguments)``, a function of a module, which builds the inputs, warms up at a small
    size (so that libraries and thread pools are counted in neither reading) and returns the callable; the peak is read
    before and after it runs once. The peak is Linux's VmHWM, elsewhere ``getrusage``'s ru_maxrss: on Linux the latter
    survives exec, so a child of a large process starts with its parent's peak. On a GPU, use
    :func:`peak_extra_cuda_memory`.
    """
    code = (
        f"import sys, json; sys.path[:] = {sys.path!r}; from benchmarks.speed import timing; "
        f"timing._report_peak({probe.__module__!r}, {probe.__name__!r}, json.loads(sys.argv[1]), {threads})"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        called = f"{probe.__module__}.{probe.__name__}{arguments}"
        raise RuntimeError(f"peak_extra_memory: {called} failed:\n{done.stderr}")
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


def relative_error(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of |result - expected| / |expected| over the tensors, in float64; NaN if one is NaN."""
    errors = []
    for ours, theirs in zip(result, expected, strict=True):
        a, b = (tensor.detach().to("cpu", torch.float64) for tensor in (ours, theirs))
        errors.append((a - b).norm() / b.norm().clamp_min(1e-30))
    return float(torch.stack(errors).max())

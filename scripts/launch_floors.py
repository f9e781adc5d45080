"""What a GPU would take for the launches of each operator and method, by arithmetic, beside the floor of its products.

    PYTHONPATH=build/emulated/lib python scripts/launch_floors.py

Launches are those of scripts/launches.py at the benchmarks' batches, on the build that emulates CUDA; the table stands
in docs/kernels.md. Of an H100 in float32 without TF32: a launch takes what its bytes take at the copy rate or its FLOPs
at the GEMM rate, whichever is longer, and no less than ``LEAST_US``; a kernel with fewer blocks than multiprocessors
takes what ``launches.EXCEPTIONS`` grants it. The floor is the products alone, everything else riding along: their
FLOPs, their operands read and their results written once. Without products it is the bytes of all launches.

A call is bound by the host where starting its launches one by one takes longer than running them: captured in a CUDA
graph it takes what the device takes. It is bound by latency where a kernel of few blocks, which walks a whole
trajectory with its weights on the chip, takes most of the time. No GPU is asked.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parent))

import launches

COPY_BYTES_PER_US = 2.8e6
GEMM_FLOPS_PER_US = 5e7
LEAST_US = 1.5
"""Of a kernel in a CUDA graph, beginning to beginning."""
HOST_US = 5.0
"""Of an operator of PyTorch's from C++, or of a launch of ours with what leads to it."""
MOST = 3.0
"""Times the floor, of what is not bound by the host."""

_TENSOR = re.compile(r"(Float|Double|Long|Int|Bool|Byte|BFloat16|Half)\[([\d, ]*)\]\[[\d, ]*\]")
_BYTES = {"Float": 4, "Double": 8, "Long": 8, "Int": 4, "Bool": 1, "Byte": 1, "BFloat16": 2, "Half": 2}
_REDUCTIONS = ("sum", "mean", "logsumexp", "max", "min", "amax", "norm", "linalg_vector_norm")


class Work(NamedTuple):
    """Of a launch."""

    flops: float
    bytes: float
    microseconds: float
    is_product: bool
    is_latency: bool = False


def shapes_in(form: str) -> list[tuple[int, list[int]]]:
    """Of all tensors that a call is given: bytes of an element, and sizes."""
    return [
        (_BYTES[kind], [int(size) for size in sizes.replace(" ", "").split(",") if size])
        for kind, sizes in _TENSOR.findall(form)
    ]


def product_flops(op: str, sizes: list[list[int]], form: str) -> float:
    """Two for each multiplication of a matrix product or convolution; 0 for other operators."""
    if op in ("mm", "bmm", "addmm", "baddbmm", "addmm_"):
        left, right = (sizes[1], sizes[2]) if "add" in op else (sizes[0], sizes[1])
        return 2.0 * math.prod(left) * right[-1]
    if op in ("mv", "addmv"):
        return 2.0 * math.prod(sizes[-2 if op == "mv" else 1])
    if op == "convolution":
        image, weight = sizes[0], sizes[1]
        positions = image[2:] if _flags(form)[0] else _output(image, weight, form)
        return 2.0 * image[0] * math.prod(positions) * math.prod(weight)
    if op == "convolution_backward":
        gradient, image, weight = sizes[:3]
        transposed, of_image, of_weight, _ = _flags(form)
        positions = image[2:] if transposed else gradient[2:]
        return 2.0 * image[0] * math.prod(positions) * math.prod(weight) * (of_image + of_weight)
    return 0.0


def _flags(form: str) -> list[bool]:
    """Whether a convolution is transposed and, of its gradients, which are wanted: to image, weight and bias."""
    return [flag == "True" for flag in re.findall("True|False", form)]


def _output(image: list[int], weight: list[int], form: str) -> list[int]:
    """Positions of a convolution's output, from its stride, padding and dilation, the first lists of numbers."""
    lists = re.findall(r"(?:\d+;,)+", _TENSOR.sub("", form))
    stride, padding, dilation = ([int(each) for each in re.findall(r"\d+", one)] for one in lists[:3])
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(image[2:], weight[2:], stride, padding, dilation, strict=True)
    ]


def work_of(one: launches.Launch | launches.Call) -> Work:
    """By arithmetic."""
    if isinstance(one, launches.Launch):
        microseconds = max(one.moved_bytes / COPY_BYTES_PER_US, LEAST_US)
        exception = launches.allowed(one) if one.blocks < launches.MULTIPROCESSORS else None
        granted = exception.microseconds if exception else 0
        return Work(
            0.0,
            one.moved_bytes,
            max(microseconds, granted),
            False,
            granted > launches.EXCEPTIONS[-1].microseconds,
        )
    op = one.op.removeprefix("aten::").split(".")[0]
    tensors = shapes_in(one.form)
    sizes = [size for _, size in tensors]
    moved = sum(width * math.prod(size) for width, size in tensors)
    flops = product_flops(op, sizes, one.form)
    if not one.op.endswith(".out") and not op.endswith("_") and tensors and op not in _REDUCTIONS:
        if op in ("mm", "bmm"):
            moved += tensors[0][0] * math.prod(sizes[0][:-1]) * sizes[1][-1]
        else:
            moved += max(width * math.prod(size) for width, size in tensors)
    microseconds = max(moved / COPY_BYTES_PER_US, flops / GEMM_FLOPS_PER_US, LEAST_US)
    return Work(flops, moved, microseconds, flops > 0)


class Row(NamedTuple):
    """Of a call and its gradient."""

    launches: int
    gigaflops: float
    megabytes: float
    microseconds: float
    floor: float
    latency: float
    """Of the microseconds, those of kernels with few blocks."""

    @property
    def host_us(self) -> float:
        """To start the launches one by one."""
        return self.launches * HOST_US

    @property
    def bound(self) -> str:
        """By what."""
        if self.latency > self.microseconds / 2:
            return "latency"
        return "host" if self.host_us > self.microseconds else "device"

    @property
    def ratio(self) -> float:
        """To the floor."""
        return self.microseconds / self.floor

    def cells(self) -> list[str]:
        """Of the table."""
        sizes = [
            f"{size:,.0f}" if size >= 100 else f"{size:.3g}" for size in (self.gigaflops, self.megabytes)
        ]
        times = [f"{time:,.0f}" if time >= 10 else f"{time:.1f}" for time in (self.microseconds, self.floor)]
        ratio = f"{self.ratio:.1f}" if self.bound != "latency" else ""
        return [str(self.launches), *sizes, *times, ratio, f"{self.host_us:,.0f}", self.bound]


def row(case: launches.Case) -> Row:
    """At the benchmark's batch."""
    works = [work_of(one) for found in launches.counts(case, None) for one in found]
    products = [work for work in works if work.is_product]
    floor = sum(
        max(work.bytes / COPY_BYTES_PER_US, work.flops / GEMM_FLOPS_PER_US) for work in products or works
    )
    return Row(
        len(works),
        sum(work.flops for work in works) / 1e9,
        sum(work.bytes for work in works) / 1e6,
        sum(work.microseconds for work in works),
        floor,
        sum(work.microseconds for work in works if work.is_latency),
    )


HEADING = (
    "call and its gradient",
    "launches",
    "GFLOP",
    "MB",
    "us",
    "floor, us",
    "ratio",
    "started, us",
    "bound by",
)


def main() -> int:
    """Print the table; 1 if something is too far from its floor."""
    print(f"| {' | '.join(HEADING)} |\n|{'---|' * len(HEADING)}")
    faults = []
    for name, case in launches.TABLE.items():
        found = row(case)
        print(f"| {' | '.join([name, *found.cells()])} |", flush=True)
        if found.ratio > MOST and found.bound == "device":
            faults.append(f"{name}: {found.ratio:.1f} times its floor")
    for fault in faults:
        print(f"launch_floors.py: {fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())

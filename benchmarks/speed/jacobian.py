"""The Jacobian L1 penalty against finite differences and PyTorch's forward mode.

    python -m benchmarks.speed jacobian             times, errors and peak memory, about 5 minutes on 2 cores
    python -m benchmarks.speed jacobian --quick     tiny sizes: does everything run?

Every contestant computes the mean over the batch of sum |dy/dz| and its gradient to all parameters, in float32. The
rivals: forward differences with a step of 1e-3 as the paper's code takes them (Rhodes and Lee, NeurIPS 2021), one
decode a latent or one of (d + 1) B images; vmap(jacfwd); and torch.func.jvp of several latents stacked in the batch;
each also through torch.compile where that compiles within a minute. Their errors are against vmap(jacfwd) in float64:
the largest of |difference| / |exact| over the value and the gradients. Written are jacobian-<device>.json, .md and
.png.

Floors: "GEMM floor", forward, reverse and weight gradient of every layer but the first as torch.mm with all B d rows
into results that exist; "FLOP floor", their operations at the rate of a large square product.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import ops
from fastvae.architectures import jacobian_l1_decoder

from . import command, common, floors, report
from .networks import mlp

OURS, LOOPED, BATCHED = "ours", "differences, looped", "differences, batched"
JACFWD, JVP = "vmap(jacfwd)", "jvp, 5 latents at a time"
COMPILED = ", torch.compile"
STEP = 1e-3
JVP_LATENTS = 5
TOLERANCE = 1e-5
"""our error against float64 beyond twice that of vmap(jacfwd): an entry so near zero that float32 loses its sign moves
the gradients of both by its share"""
COMPILE_SECONDS = 60
MEMORY_BOUND = 1 / 8
"""our peak extra memory over that of batched differences, at most"""

TARGETS = [
    report.Target("cpu", "mlp", JACFWD, 1.35, OURS),
    report.Target("cpu", "mlp", BATCHED, 1.45, OURS),
    report.Target("cpu", "mlp", LOOPED, 1.7, OURS),
    report.Target("cpu", "mlp", report.FLOOR, 1.1, OURS),
    report.Target("cpu", "conv", BATCHED, 2.5, OURS),
    report.Target("cpu", "conv", JACFWD, 3, OURS),
]

Penalty = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    key: str
    title: str
    decoder: Callable[[], nn.Sequential]
    latent_dim: int
    batch: int
    seconds: float
    """how long its contestants are timed"""


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("mlp", "3-8-8-12, batch 5", lambda: mlp(3, 8, 8, 12), 3, 5, 0.1),
            Case("conv", "convolutional, width 4, batch 2", lambda: jacobian_l1_decoder(1, 4, 3), 3, 2, 0.1),
        ]
    return [
        Case("mlp", "10-512-512-4096, batch 64", lambda: mlp(10, 512, 512, 4096), 10, 64, 12),
        Case("conv", "the paper's convolutional, 1x64x64, batch 64", jacobian_l1_decoder, 10, 64, 20),
    ]


def memory_case(quick: bool) -> Case:
    if quick:
        return cases(quick)[1]
    return Case(
        "color", "the paper's convolutional, 3x64x64, batch 64", lambda: jacobian_l1_decoder(3), 10, 64, 0
    )


def ours(decoder: nn.Module, z: Tensor) -> Tensor:
    return ops.jacobian_l1(decoder, z)


def looped_differences(decoder: nn.Module, z: Tensor) -> Tensor:
    base = decoder(z)
    total = base.new_zeros(())
    for i in range(z.shape[1]):
        shifted = z.clone()
        shifted[:, i] += STEP
        total = total + ((decoder(shifted) - base) / STEP).abs().sum()
    return total / len(z)


def batched_differences(decoder: nn.Module, z: Tensor) -> Tensor:
    shifted = z + STEP * torch.eye(z.shape[1], device=z.device, dtype=z.dtype)[:, None]
    images = decoder(torch.cat([z, shifted.flatten(0, 1)]))
    base, moved = images[: len(z)], images[len(z) :].unflatten(0, shifted.shape[:2])
    return ((moved - base) / STEP).abs().sum() / len(z)


def forward_mode(decoder: nn.Module, z: Tensor) -> Tensor:
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda point: decoder(point[None])[0]))(z)
    return jacobian.abs().sum() / len(z)


def chunked_jvp(decoder: nn.Module, z: Tensor) -> Tensor:
    total = z.new_zeros(())
    directions = torch.eye(z.shape[1], device=z.device, dtype=z.dtype)
    for chunk in directions.split(JVP_LATENTS):
        tangents = chunk[:, None].expand(-1, len(z), -1).flatten(0, 1)
        total = total + torch.func.jvp(decoder, (z.repeat(len(chunk), 1),), (tangents,))[1].abs().sum()
    return total / len(z)


RIVALS: dict[str, Penalty] = {
    LOOPED: looped_differences,
    BATCHED: batched_differences,
    JACFWD: forward_mode,
    JVP: chunked_jvp,
}


def contestant(penalty: Penalty, decoder: nn.Module, z: Tensor) -> Callable[[], list[Tensor]]:
    """Value and gradients to the parameters; a bias of the last layer, on which nothing depends, gets zeros."""
    parameters = list(decoder.parameters())

    def run() -> list[Tensor]:
        value = penalty(decoder, z)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return [value.detach(), *gradients]

    return run


def problem(case: Case, device: torch.device, batch: int | None = None) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return case.decoder().to(device), torch.randn(batch or case.batch, case.latent_dim).to(device)


def error_of(result: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error over the value and the gradients that are not zero."""
    pairs = [(ours, theirs) for ours, theirs in zip(result, exact, strict=True) if theirs.any()]
    return common.relative_error([a for a, _ in pairs], [b for _, b in pairs])


def run_case(case: Case, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Errors against float64 of every contestant, then their times and the floors'."""
    decoder, z = problem(case, device)
    exact = contestant(forward_mode, copy.deepcopy(decoder).double(), z.double())()
    contestants: dict[str, common.Contestant] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    named = {OURS: ours, **RIVALS}
    if options.compile:
        named |= {name + COMPILED: penalty for name, penalty in RIVALS.items()}
    for name, penalty in named.items():
        command.progress(f"{case.title}: {name}")
        try:
            if name.endswith(COMPILED):
                torch._dynamo.reset()
                with common.at_most(COMPILE_SECONDS):
                    run = contestant(torch.compile(penalty, dynamic=False), decoder, z)
                    result = run()
            else:
                run = contestant(penalty, decoder, z)
                result = run()
        except Exception as error:
            if name == OURS:
                raise
            notes[name] = f"not timed: {common.why(error)}"
            continue
        errors[name] = error_of(result, exact)
        contestants[name] = run
    bound = 2 * errors[JACFWD] + TOLERANCE
    if not errors[OURS] <= bound:
        raise ArithmeticError(f"ours is off by {errors[OURS]:.1e}, over {bound:.1e}")

    layers = floors.products(decoder, z.repeat_interleave(case.latent_dim, 0))
    contestants[report.FLOOR] = floors.tangent_floor(layers, device)
    command.progress(f"{case.title}: timing")
    timings, gflops = common.interleave_with_gemm(
        contestants, device, seconds=case.seconds * options.share, quick=options.quick
    )
    operations = floors.tangent_operations(layers)
    floor = timings.pop(report.FLOOR)
    floor_ms = {report.FLOOR: floor.median, report.FLOPS: operations / gflops / 1e6}
    record = report.case_record(
        case, OURS, timings, floor_ms, operations=operations, gflops=gflops, errors=errors, notes=notes
    )
    return {**record, "floor_timings_ms": {report.FLOOR: floor}}


def memory_probe(name: str, quick: bool, device: str) -> Callable[[], object]:
    """Value and gradient of a contestant at the size where memory is measured, warmed up with one sample."""
    case, penalty = memory_case(quick), {OURS: ours, **RIVALS}[name]
    contestant(penalty, *problem(case, torch.device(device), batch=1))()
    return contestant(penalty, *problem(case, torch.device(device)))


def run_memory(device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak extra memory of every contestant."""
    rows: list[dict[str, Any]] = []
    for name in (OURS, *RIVALS):
        command.progress(f"peak memory: {name}")
        arguments = (name, options.quick, device.type)
        if device.type == "cuda":
            size = common.peak_extra_cuda_memory(memory_probe(*arguments))
        else:
            size = common.peak_extra_memory(__name__, "memory_probe", *arguments, threads=options.threads)
        rows.append({"contestant": name, "bytes": size})
    return rows


def memory_section(case: Case, rows: Sequence[dict[str, Any]]) -> str:
    table = common.markdown_table(
        ["contestant", "peak extra memory, MiB"],
        [[row["contestant"], f"{row['bytes'] / 2**20:.1f}"] for row in rows],
    )
    return f"## Peak extra memory, {case.title}\n\n{table}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return command.parse_with_compilers(__doc__, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device, path = command.begin(options, "jacobian")
    environment = common.environment(device)
    settings = {
        "threads": options.threads,
        "precision": "float32, TF32 off",
        "peak memory": "VmHWM of a fresh process" if device.type == "cpu" else "PyTorch's allocator",
    }

    def write(records: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
        targets = report.judge(records, device.type, TARGETS)
        sections = ["# The Jacobian L1 penalty"]
        for case in records:
            sections += [report.case_section(case, OURS), report.error_table(case)]
        if memory:
            sizes = {row["contestant"]: row["bytes"] for row in memory}
            share = sizes[OURS] / sizes[BATCHED] if sizes[BATCHED] else None
            title = memory_case(options.quick).title
            bound = report.verdict(title, "ours, peak memory", BATCHED, MEMORY_BOUND, share, at_most=True)
            targets.append(bound)
            sections.append(memory_section(memory_case(options.quick), memory))
        targets = [] if options.quick else targets
        if targets:
            sections.insert(1, report.target_table(targets))
        sections.append(report.environment_table(environment, settings))
        record = {
            "benchmark": "jacobian",
            "environment": environment,
            "settings": settings,
            "cases": records,
            "memory": memory,
            "targets": targets,
        }
        command.draw(path, report.panels(records, OURS), "time / ours, medians")
        common.publish(path, record, sections, last=bool(memory))

    records: list[dict[str, Any]] = []
    for case in cases(options.quick):
        records.append(run_case(case, device, options))
        write(records, [])
    write(records, run_memory(device, options))

"""Other people's decoders: fastvae's flow and Jacobian penalty against careful eager PyTorch, on each of the zoo.

    python -m benchmarks.speed zoo                    all entries, batches of 4, 16 and 64, one and two threads: an hour
    python -m benchmarks.speed zoo --quick            batches of 4, two threads, few rounds: under 10 minutes
    python -m benchmarks.speed zoo --only mlp,disent-fc  these entries alone
    python -m benchmarks.speed zoo --cuda --batches 64    on a GPU; with --captured both from CUDA graphs

Tasks, in float32: "flow", sum log p(x | z_K) - |rho_K|^2 / 2 of K = 3 leapfrog steps and its gradients to z, step size,
alpha and all parameters; "jacobian", the mean over the batch of sum |dy/dz| and its gradients to all parameters.
Careful eager evaluates K + 1 forces by autograd, and the Jacobian by one jvp of all latents beside each other; where
PyTorch cannot do that or gets it wrong (reverse over forward of LayerNorm, InstanceNorm), by reverse over reverse.
Both must agree with float64 before they are timed. Written are zoo-<device>.json, .md and .png, after each entry.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from zoo import ZOO, Entry, Problem, is_installed, oracles, problem
from zoo.table import reading

from fastvae import ops

from . import command, common, report, zoo_report
from .zoo_report import EAGER, JVP, OURS, REVERSE, TASKS

BATCHES = (4, 16, 64)
TOLERANCE = 1e-4
"""|difference| / |exact| of the value and of all gradients together, if eager's own float32 is not half as far off"""
LIMIT_MS = 10_000
"""larger batches are left out where a call would take longer"""

Run = Callable[[], list[Tensor]]


class Way(NamedTuple):
    """A contestant: a task done in one way, for a problem."""

    make: Callable[[Problem], Run]
    note: str = ""


def decode(p: Problem, z: Tensor) -> Tensor:
    """The decoder's outputs for codes of all samples, a sample's one after the other."""
    times = len(z) // len(p.z)
    return p.decoder(z, *(c.repeat_interleave(times, 0) for c in p.condition))


def gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach(), *found]


def trained(p: Problem) -> list[Tensor]:
    return [parameter for parameter in p.decoder.parameters() if parameter.requires_grad]


def flow(p: Problem, run_flow: Callable[..., Sequence[Tensor]]) -> Run:
    """Loss and gradients; ``run_flow`` is called with z, rho, step size and alpha."""
    generator = torch.Generator().manual_seed(2)
    rho = torch.randn(p.z.shape, generator=generator).to(p.z)
    z = p.z.clone().requires_grad_()
    step_size = torch.linspace(0.02, 0.06, oracles.STEPS).to(p.z).view(-1, *(1 for _ in p.z.shape[1:]))
    alpha = torch.linspace(0.9, 1, oracles.STEPS).to(p.z)
    leaves = [z, step_size.requires_grad_(), alpha.requires_grad_(), *trained(p)]

    def run() -> list[Tensor]:
        _, end, log_px = run_flow(z, rho, step_size, alpha)
        return gradients(log_px.sum() - end.square().sum() / 2, leaves)

    return run


def condition_of(p: Problem) -> Tensor | None:
    return p.condition[0] if p.condition else None


def our_flow(p: Problem) -> Run:
    def run_flow(z: Tensor, rho: Tensor, step_size: Tensor, alpha: Tensor) -> Sequence[Tensor]:
        condition = condition_of(p)
        return ops.hamiltonian_flow(
            p.decoder, z, rho, p.x, step_size, alpha, p.likelihood, condition=condition
        )

    return flow(p, run_flow)


def eager_flow(p: Problem) -> Run:
    def run_flow(z: Tensor, rho: Tensor, step_size: Tensor, alpha: Tensor) -> Sequence[Tensor]:
        return oracles.flow(functools.partial(decode, p), z, rho, p.x, step_size, alpha, p.likelihood)

    return flow(p, run_flow)


def our_jacobian(p: Problem) -> Run:
    leaves = trained(p)
    return lambda: gradients(ops.jacobian_l1(p.decoder, p.z, condition=condition_of(p)), leaves)


def eager_jacobian(p: Problem) -> Run:
    """All latents in one pass of forward mode."""
    latents, leaves = p.z[0].numel(), trained(p)
    directions = torch.eye(latents).to(p.z).repeat(len(p.z), 1).view(-1, *p.z.shape[1:])

    def run() -> list[Tensor]:
        rows = p.z.repeat_interleave(latents, 0)
        tangents = torch.func.jvp(functools.partial(decode, p), (rows,), (directions,))[1]
        return gradients(tangents.abs().sum() / len(p.z), leaves)

    return run


def reversed_jacobian(p: Problem) -> Run:
    """By two reverse passes, where forward mode is missing or wrong."""
    leaves = trained(p)

    def run() -> list[Tensor]:
        z = p.z.clone().requires_grad_()
        return gradients(oracles.jacobian_l1(functools.partial(decode, p), z).mean(), leaves)

    return run


WAYS: dict[str, tuple[Way, tuple[Way, ...]]] = {
    "flow": (Way(our_flow), (Way(eager_flow),)),
    "jacobian": (Way(our_jacobian), (Way(eager_jacobian, JVP), Way(reversed_jacobian, REVERSE))),
}
"""Ours, and careful eager's ways, the first that is right being the one to beat."""


def error_of(result: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error of the value, and of the gradients as one vector."""
    value = common.relative_error(result[:1], exact[:1])
    return max(value, common.relative_error([flat(result[1:])], [flat(exact[1:])]))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def checked(
    ways: Sequence[Way], p: Problem, exact: Sequence[Tensor], tolerance: float
) -> tuple[Way, Run, float]:
    """The first way that gives float64's result to the tolerance, and its error."""
    failures = []
    for way in ways:
        try:
            run = way.make(p)
            error = error_of(run(), exact)
            if not error <= tolerance:
                raise ArithmeticError(f"differs from float64 by {error:.1e}, over {tolerance:.0e}")
            return way, run, error
        except Exception as problem:
            failures.append(f"{way.note}: {common.why(problem)}".removeprefix(": "))
    raise ArithmeticError("; ".join(failures))


def moved(p: Problem, device: str) -> Problem:
    """The problem there."""
    condition = tuple(c.to(device) for c in p.condition)
    return p._replace(decoder=p.decoder.to(device), z=p.z.to(device), x=p.x.to(device), condition=condition)


def run_task(
    entry: Entry, task: str, batch: int, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], str]:
    """One record for each number of threads, and a note on why there is none."""
    mine, eager = WAYS[task]
    p = moved(problem(entry, batch, torch.float32, options.width), options.device)
    exact_problem = p._replace(
        decoder=copy.deepcopy(p.decoder).double(),
        z=p.z.double(),
        x=p.x.double(),
        condition=tuple(c.double() if c.is_floating_point() else c for c in p.condition),
    )
    try:
        exact = eager[-1].make(exact_problem)()
        way, run_eager, eager_error = checked(eager, p, exact, 100 * TOLERANCE)
        _, run_ours, our_error = checked([mine], p, exact, max(TOLERANCE, 2 * eager_error))
    except ArithmeticError as error:
        return [], str(error)
    except Exception as error:
        return [], f"eager PyTorch in float64: {common.why(error)}"
    if options.captured:
        try:
            run_ours, run_eager = (common.captured(run) for run in (run_ours, run_eager))
            our_error = error_of(run_ours(), exact)
        except Exception as error:
            return [], f"captured: {common.why(error)}"
        if not our_error <= max(TOLERANCE, 2 * eager_error):
            return [], f"replayed, ours differs from float64 by {our_error:.1e}"
    records = []
    for threads in options.all_threads:
        torch.set_num_threads(threads)
        contestants: dict[str, common.Contestant] = {OURS: run_ours, EAGER: run_eager}
        timings = common.interleave(
            contestants,
            dict.fromkeys(contestants, common.clock_of(p.z.device)),
            seconds=options.seconds,
            min_rounds=2 if options.quick else 5,
        )
        records.append(
            {
                "task": task,
                "batch": batch,
                "threads": threads,
                "timings_ms": timings,
                "speed_up": timings[EAGER].median / timings[OURS].median,
                "relative_error": {OURS: our_error, EAGER: eager_error},
                "eager": way.note,
            }
        )
    return records, ""


def run_entry(entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    """All of an entry: what was measured, and why something was not."""
    lowered, reason = reading(problem(entry, 2, torch.float32, options.width))
    results: list[dict[str, Any]] = []
    notes: list[str] = []
    for task in TASKS:
        slowest = 0.0
        for index, batch in enumerate(options.batches):
            growth = batch / options.batches[index - 1] if index else 1.0
            if slowest * growth > LIMIT_MS:
                notes.append(f"{task}, batch {batch}: left out, over {LIMIT_MS / 1000:.0f} s a call")
                break
            command.progress(f"{entry.name}: {task}, batch {batch}")
            torch.set_num_threads(max(options.all_threads))
            found, note = run_task(entry, task, batch, options)
            if note:
                notes.append(f"{task}: {note}")
                break
            results += found
            slowest = max(timing.median for record in found for timing in record["timings_ms"].values())
    return {
        "name": entry.name,
        "origin": entry.origin,
        "lowered": lowered,
        "reason": reason,
        "results": results,
        "notes": notes,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options_of = command.parser(__doc__, "batches of 4, two threads, few rounds")
    options_of.add_argument("--only", default="", help="names of entries, by commas (default: all)")
    options_of.add_argument(
        "--width", type=int, default=4, help="of networks that have one (default 4; tests: 1)"
    )
    options_of.add_argument("--batches", help="batch sizes, by commas (default: 4,16,64; --quick: 4)")
    options_of.add_argument("--captured", action="store_true", help="both from CUDA graphs, on a GPU")
    options = command.parse(options_of, arguments)
    if options.captured and options.device != "cuda":
        options_of.error("--captured: expected a GPU, got the CPU")
    options.only = command.names_of(options_of, options.only, ZOO)
    given = tuple(int(batch) for batch in options.batches.split(",")) if options.batches else None
    options.batches = given or (BATCHES[:1] if options.quick else BATCHES)
    one = options.quick or options.device == "cuda"
    options.all_threads = (options.threads,) if one else tuple(dict.fromkeys((options.threads, 1)))
    options.seconds = 0.1 if options.quick else options.share
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device, path = command.begin(options, "zoo-captured" if options.captured else "zoo")
    environment = common.environment(device)
    packages = sorted({entry.package for entry in ZOO.values() if entry.package})
    settings = {
        "threads": ", ".join(map(str, options.all_threads)),
        "batches": ", ".join(map(str, options.batches)),
        "width": options.width,
        "precision": "float32",
        "captured in CUDA graphs": "yes" if options.captured else "no",
        **{package: common.version_of(package) for package in packages},
    }
    chosen = [entry for entry in ZOO.values() if not options.only or entry.name in options.only]
    installed = [entry for entry in chosen if is_installed(entry)]
    missing = [entry.name for entry in chosen if entry not in installed]
    if not installed:
        raise SystemExit(f"zoo: {', '.join(missing)} need packages that are not installed: make bench-zoo")
    records: list[dict[str, Any]] = []
    for entry in installed:
        # Attention by products in both: fused attention has no second derivative.
        with oracles.careful(problem(entry, 2, torch.float32, options.width).decoder):
            records.append(run_entry(entry, options))
        record = {
            "benchmark": "zoo",
            "environment": environment,
            "settings": settings,
            "entries": records,
            "not installed": missing,
            "targets": [],
        }
        if bars := zoo_report.panels(records, options.batches, options.all_threads):
            command.draw(path, bars, "careful eager / ours, medians")
        sections = zoo_report.sections(records, missing, options.batches, options.all_threads)
        sections.append(report.environment_table(environment, settings))
        common.publish(path, record, sections, last=entry is installed[-1])

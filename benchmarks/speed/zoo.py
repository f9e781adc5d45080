"""Other people's decoders: fastvae's flow and Jacobian penalty against careful eager PyTorch, on each of the zoo.

    python -m benchmarks.speed zoo                        batches of 4, 16 and 64, one and two threads: an hour
    python -m benchmarks.speed zoo --quick                batches of 4, two threads, few rounds: under 10 minutes
    python -m benchmarks.speed zoo --only mlp,disent-fc   these entries alone
    python -m benchmarks.speed zoo --cuda --batches 64    on a GPU; with --captured both from CUDA graphs

Tasks, in float32: "flow", sum log p(x | z_K) - |rho_K|^2 / 2 of K = 3 leapfrog steps and its gradients to z, step size,
alpha and all parameters; "jacobian", the mean over the batch of sum |dy/dz| and its gradients to all parameters.
Careful eager evaluates K + 1 forces by autograd, and the Jacobian by one jvp of all latents beside each other; where
PyTorch cannot do that or gets it wrong (reverse over forward of LayerNorm, InstanceNorm), by reverse over reverse.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from zoo import ZOO, Entry, Problem, is_installed, oracles, problem
from zoo.encoders import EncoderEntry
from zoo.table import reading

from fastvae import ops

from . import harness, report, timing

OURS, EAGER = "ours", "careful eager"
BATCHES = (4, 16, 64)
TOLERANCE = 1e-4
"""of the value and of all gradients together, if eager's own float32 is not half as far off"""
SEEDS = (1, 2, 3)
"""of codes, the next where ours is too far off: a unit within rounding of its kink may take the other side, and second
derivatives jump there; a fault would be one at every seed"""
LIMIT_MS = 10_000
"""larger batches are left out where a call would take longer"""

Run = Callable[[], list[Tensor]]


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


TASKS: dict[str, tuple[Callable[[Problem], Run], dict[str, Callable[[Problem], Run]]]] = {
    "flow": (our_flow, {"": eager_flow}),
    "jacobian": (our_jacobian, {"jvp": eager_jacobian, "reverse over reverse": reversed_jacobian}),
}
"""Ours, and careful eager's ways, the first that is right being the one to beat."""


def error_of(result: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error of the value, and of the gradients as one vector."""
    flat = (torch.cat([tensor.detach().double().flatten() for tensor in of[1:]]) for of in (result, exact))
    return max(timing.relative_error(*([one] for one in flat)), timing.relative_error(result[:1], exact[:1]))


def first_that_is_right(ways: dict[str, Run], exact: Sequence[Tensor]) -> tuple[str, Run, float]:
    """Its name, itself and its error."""
    failures = []
    for name, run in ways.items():
        try:
            error = error_of(run(), exact)
            if not error <= 100 * TOLERANCE:
                raise ArithmeticError(f"differs from float64 by {error:.1e}")
            return name, run, error
        except Exception as failure:
            failures.append(f"{name}: {harness.why(failure)}".removeprefix(": "))
    raise ArithmeticError("; ".join(failures))


def moved(p: Problem, to: Any) -> Problem:
    """The problem on a device, or in a dtype but for what are no numbers."""
    decoder, z, x = (copy.deepcopy(p.decoder).to(to), p.z.to(to), p.x.to(to))
    floating = [c.is_floating_point() or not isinstance(to, torch.dtype) for c in p.condition]
    condition = tuple(c.to(to) if f else c for c, f in zip(p.condition, floating, strict=True))
    return p._replace(decoder=decoder, z=z, x=x, condition=condition)


def build(options: harness.Options, entry: Entry, task: str, batch: int) -> harness.Trial:
    mine, eager = TASKS[task]
    for seed in SEEDS:
        p = moved(problem(entry, batch, torch.float32, options.width, seed), options.device)
        exact = list(eager.values())[-1](moved(p, torch.float64))()
        way, run_eager, error = first_that_is_right({name: of(p) for name, of in eager.items()}, exact)
        tolerance = max(TOLERANCE, 2 * error)
        if seed == SEEDS[-1] or error_of(mine(p)(), exact) <= tolerance:
            break
    captured = timing.captured if options.captured else lambda run: run
    notes = [way] * (way == "reverse over reverse") + [f"codes of seed {seed}"] * (seed != SEEDS[0])
    return harness.Trial(
        {OURS: lambda: captured(mine(p)), EAGER: lambda: captured(run_eager)},
        exact,
        tolerance,
        error=error_of,
        notes={EAGER: ", ".join(notes)} if notes else {},
    )


def cases(
    entries: Sequence[Entry], options: harness.Options, records: Sequence[report.Record]
) -> Iterator[harness.Case]:
    """Larger batches where the ones before were quick enough."""
    for entry in entries:
        lowered = "yes" if reading(problem(entry, 2, torch.float32, options.width))[0] else "no"
        labels = {"decoder": entry.name, "origin": origin_of(entry), "lowered": lowered}
        for task in TASKS:
            for index, batch in enumerate(options.batches):
                growth = batch / options.batches[index - 1] if index else 1.0
                before = records[-1].get("timings_ms", {}).values() if index else ()
                if index and (not before or growth * max(t.median for t in before) > LIMIT_MS):
                    break
                for threads in options.all_threads:
                    column = f"{task}, batch {batch}, threads {threads}"
                    yield harness.Case(
                        f"{entry.name}, {column}",
                        entry.name,
                        build,
                        (entry, task, batch),
                        0.1 if options.quick else 1.0,
                        {**labels, "task": column},
                        entry.name,
                        threads,
                        # Attention by products in both: fused attention has no second derivative.
                        functools.partial(careful, entry, options.width),
                    )


def origin_of(entry: Entry | EncoderEntry) -> str:
    return "own" if entry.origin == "own" else "PyPI's"


def careful(entry: Entry, width: int) -> Any:
    return oracles.careful(problem(entry, 2, torch.float32, width).decoder)


def summary(records: Sequence[report.Record]) -> list[str]:
    return report.grid(records, "decoder", "task", ["origin", "lowered"])


def parse(arguments: Sequence[str] | None) -> harness.Options:
    options_of = harness.parser(__doc__, "batches of 4, two threads, few rounds")
    options_of.add_argument(
        "--width", type=int, default=4, help="of networks that have one (default 4; tests: 1)"
    )
    options_of.add_argument("--batches", help="batch sizes, by commas (default: 4,16,64; --quick: 4)")
    options_of.add_argument("--captured", action="store_true", help="both from CUDA graphs, on a GPU")
    options = harness.parse(options_of, arguments)
    if options.captured and options.device.type != "cuda":
        options_of.error("--captured: expected a GPU, got the CPU")
    given = tuple(int(batch) for batch in options.batches.split(",")) if options.batches else None
    options.batches = given or (BATCHES[:1] if options.quick else BATCHES)
    one = options.quick or options.device.type == "cuda"
    options.all_threads = (options.threads,) if one else tuple(dict.fromkeys((options.threads, 1)))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    only = options.only.split(",")
    wanted = [entry for entry in ZOO.values() if not options.only or entry.name in only]
    installed = [entry for entry in wanted if is_installed(entry)]
    missing = ", ".join(entry.name for entry in wanted if entry not in installed)
    if not installed and missing:
        raise SystemExit(f"zoo: {missing} need packages that are not installed: make bench-zoo")
    records: list[report.Record] = []
    harness.Benchmark(
        "zoo-captured" if options.captured else "zoo",
        "The zoo",
        cases(installed, options, records),
        settings={"width": options.width, "not installed": missing or "none"},
        packages=sorted({entry.package for entry in ZOO.values() if entry.package}),
        summary=summary,
        panel="task",
        ours_may_fail=True,
        records=records,
    ).run(options)

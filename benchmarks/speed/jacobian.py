"""The Jacobian L1 penalty against finite differences and PyTorch's forward mode.

    python -m benchmarks.speed jacobian             times and errors, about 4 minutes on 2 cores
    python -m benchmarks.speed jacobian --memory    peak memory instead
    python -m benchmarks.speed jacobian --quick     tiny sizes: does everything run?

Every contestant computes the mean over the batch of sum |dy/dz| and its gradient to all parameters, in float32. The
rivals: forward differences with a step of 1e-3 as the paper's code takes them (Rhodes and Lee, NeurIPS 2021), one
decode a latent or one of (d + 1) B images; vmap(jacfwd); and torch.func.jvp of several latents stacked in the batch;
each also through torch.compile where that compiles in time. Their errors are against vmap(jacfwd) in float64.

Floors: "GEMM floor", forward, reverse and weight gradient of every layer but the first as products with all B d rows
into results that exist; "FLOP floor", their operations at the rate of a large square product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvae import ops
from fastvae.architectures import jacobian_l1_decoder

from ..networks import mlp
from ..rivals import jax_twins
from ..rivals.jacobian import batched_differences, chunked_jvp, forward_mode, looped_differences
from . import floors, harness, report, timing

OURS, LOOPED, BATCHED = "ours", "differences, looped", "differences, batched"
JACFWD, JVP, JAX = "vmap(jacfwd)", "jvp, 5 latents at a time", "JAX jit, vmap(jvp)"
TOLERANCE = 1e-5
"""our error against float64 beyond twice that of vmap(jacfwd): an entry so near zero that float32 loses its sign moves
the gradients of both by its share"""

TARGETS = [
    report.Target("cpu", "mlp", JACFWD, 1.35, OURS),
    report.Target("cpu", "mlp", BATCHED, 1.45, OURS),
    report.Target("cpu", "mlp", LOOPED, 1.7, OURS),
    report.Target("cpu", "mlp", report.FLOOR, 1.1, OURS),
    report.Target("cpu", "conv", BATCHED, 2.5, OURS),
    report.Target("cpu", "conv", JACFWD, 3, OURS),
    *(report.Target(device, "memory", BATCHED, 1 / 8, OURS, at_most=True) for device in ("cpu", "cuda")),
]

Penalty = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    key: str
    title: str
    decoder: Callable[[], nn.Sequential]
    latent_dim: int
    batch: int
    seconds: float = 0.0


def sizes(quick: bool) -> list[Size]:
    """The last one for memory."""
    if quick:
        conv = Size(
            "conv", "convolutional, width 4, batch 2", lambda: jacobian_l1_decoder(1, 4, 3), 3, 2, 0.1
        )
        return [Size("mlp", "3-8-8-12, batch 5", lambda: mlp(3, 8, 8, 12), 3, 5, 0.1), conv, conv]
    paper = "the paper's convolutional"
    return [
        Size("mlp", "10-512-512-4096, batch 64", lambda: mlp(10, 512, 512, 4096), 10, 64, 12),
        Size("conv", f"{paper}, 1x64x64, batch 64", jacobian_l1_decoder, 10, 64, 20),
        Size("memory", f"{paper}, 3x64x64, batch 64", lambda: jacobian_l1_decoder(3), 10, 64),
    ]


PENALTIES: dict[str, Penalty] = {
    OURS: ops.jacobian_l1,
    LOOPED: looped_differences,
    BATCHED: batched_differences,
    JACFWD: forward_mode,
    JVP: chunked_jvp,
}


def contestant(penalty: Penalty, decoder: nn.Module, z: Tensor) -> Callable[[], list[Tensor]]:
    """Value and gradients to the parameters."""
    parameters = list(decoder.parameters())

    def run() -> list[Tensor]:
        value = penalty(decoder, z)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return [value.detach(), *gradients]

    return run


def problem(size: Size, device: torch.device, batch: int | None = None) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return size.decoder().to(device), torch.randn(batch or size.batch, size.latent_dim).to(device)


def error_of(result: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error but of zeros: no slope depends on the last bias, and with ReLU on none."""
    pairs = [(ours, theirs) for ours, theirs in zip(result, exact, strict=True) if theirs.any()]
    return timing.relative_error(*zip(*pairs, strict=True))


def build(options: harness.Options, size: Size) -> harness.Trial:
    decoder, z = problem(size, options.device)
    expected = contestant(forward_mode, copy.deepcopy(decoder).double(), z.double())()
    rival = error_of(contestant(forward_mode, decoder, z)(), expected)

    def made(penalty: Penalty, name: str) -> Callable[[], timing.Contestant]:
        by_compiler = name.endswith(harness.COMPILED)
        return lambda: contestant(timing.compiled(penalty) if by_compiler else penalty, decoder, z)

    named = dict(PENALTIES)
    if options.compile:
        named |= {name + harness.COMPILED: of for name, of in PENALTIES.items() if name != OURS}
    contestants = {name: made(penalty, name) for name, penalty in named.items()}
    if options.jax:
        tensors = [z, *decoder.parameters()]
        contestants[JAX] = lambda: jax_twins.JaxFunction(
            [jax_twins.jacobian_l1(decoder)], tensors, options.threads
        )
    layers = floors.products(decoder, z.repeat_interleave(size.latent_dim, 0))
    return harness.Trial(
        contestants,
        expected,
        {OURS: 2 * rival + TOLERANCE},
        error=error_of,
        operations=floors.gemm_operations(layers[1:], 1),  # tangents of the first layer are its columns
        floors={report.FLOOR: floors.gemm_floor(layers[1:], 1, options.device)},
    )


def memory_probe(name: str, quick: bool, device: str) -> timing.Contestant:
    """Value and gradient of a contestant at the size where memory is measured, warmed up with one sample."""
    size, penalty = sizes(quick)[-1], PENALTIES[name]
    contestant(penalty, *problem(size, torch.device(device), batch=1))()
    return contestant(penalty, *problem(size, torch.device(device)))


def cases(quick: bool) -> list[harness.Case]:
    return [harness.Case(s.key, s.title, build, (s,), s.seconds) for s in sizes(quick)[:-1]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(harness.parser(__doc__), arguments)
    probes = {name: (memory_probe, name, options.quick) for name in PENALTIES}
    memory = [harness.MemoryCase("memory", sizes(options.quick)[-1].title, probes)]
    harness.Benchmark("jacobian", "The Jacobian L1 penalty", cases(options.quick), memory, TARGETS).run(
        options
    )

"""The Hamiltonian flow against eager PyTorch, torch.compile, JAX and the machine's own matrix products.

    python -m benchmarks.speed flow                         times, under 4 minutes on 2 cores
    python -m benchmarks.speed flow --compile-convolutions  their decoders by torch.compile too, many minutes
    python -m benchmarks.speed flow --memory                peak memory at K = 5 and K = 50 instead
    python -m benchmarks.speed flow --quick                 tiny sizes: does everything run?

Every contestant computes the loss sum log p(x | z_K) - |rho_K|^2 / 2 and its gradients to z, step_size, alpha and all
parameters of the decoder, in float32. Floors, for K + 1 forces (each 1 forward and 1 reverse pass, and 4 passes to
differentiate through it):

- "GEMM floor": the matrix products alone, by fastvae's kernel where it takes that, else torch.mm, in the shapes of one
  force; of a small network this is mostly the calls;
- "FLOP floor": the operations at the rate of a large square product.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvae import ops, reference
from fastvae.architectures import hvae_decoder

from ..networks import softplus_mlp, wide_decoder
from ..rivals import jax_twins
from ..rivals.flow import channels_last, functional_flow
from . import floors, harness, report, timing

TOLERANCE = 1e-4
"""where eager's own float32 is not twice as far from float64's: round-off of K + 1 forces in another order"""
KINKED = 1e-2
"""The same with ReLU, of which now and then a unit is on the other side of its kink: of the wide decoder, eager is off
by 4e-7 or by 3e-3, as the seed has it. Ours is then compared in float64, too."""
EXACT = 1e-9

OURS, RECOMPUTE = "ours, store", "ours, recompute"
EAGER_2K, EAGER = "eager, 2K forces", "eager, K+1 forces"
CHANNELS_LAST = "eager, K+1 forces, channels_last"
COMPILED, JAX = "torch.compile, K+1 forces", "JAX jit, K+1 forces"
GRAPH = ", CUDA graph"
MEMORY_STEPS = (5, 50)
FEW, MANY = (f"ours, recompute, K = {steps}" for steps in MEMORY_STEPS)

TARGETS = [
    report.Target("cpu", "mlp", EAGER_2K, 2.6, OURS),
    report.Target("cpu", "mlp", EAGER, 1.35, OURS),
    report.Target("cpu", "mlp", JAX, 1.3, OURS),
    report.Target("cpu", "mlp", report.FLOOR, 1.15, OURS),
    report.Target("cpu", "small", EAGER, 18, OURS),
    report.Target("cpu", "small", JAX, 3, OURS),
    report.Target("cpu", "conv", EAGER, 2, OURS),
    report.Target("cuda", "mlp", EAGER, 8, OURS),
    report.Target("cuda", "mlp", EAGER + GRAPH, 2, OURS + GRAPH),
    report.Target("cuda", "mlp", JAX, 1.5, OURS),
    *(
        report.Target("cpu", f"{key}-memory", FEW, 1.1, MANY, at_most=True)
        for key in ("mlp", "small", "conv")
    ),
]

Flow = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Size:
    key: str
    title: str
    decoder: Callable[[], nn.Sequential]
    latent_dim: int
    batch: int
    num_steps: int
    seconds: float = 0.0


def sizes(quick: bool) -> list[Size]:
    if quick:
        return [
            Size("mlp", "4-8-8-12, batch 5, K = 2", lambda: softplus_mlp(4, 8, 8, 12), 4, 5, 2, 0.1),
            Size("conv", "convolutional, width 2, batch 3, K = 2", lambda: hvae_decoder(2), 64, 3, 2, 0.1),
        ]
    mlp, small = lambda: softplus_mlp(32, 512, 512, 784), lambda: softplus_mlp(2, 64, 64, 64)
    return [
        Size("mlp", "32-512-512-784, batch 128, K = 10", mlp, 32, 128, 10, 25),
        Size("small", "2-64-64-64, batch 16, K = 10", small, 2, 16, 10, 8),
        Size("conv", "the paper's convolutional, batch 100, K = 10", hvae_decoder, 64, 100, 10, 35),
        Size("wide", "1024-512-256 channels, batch 32, K = 3", wide_decoder, 16, 32, 3, 35),
    ]


class Problem:
    """A decoder and inputs on a device, and the loss that every contestant differentiates."""

    def __init__(
        self,
        size: Size,
        device: torch.device,
        *,
        batch: int | None = None,
        num_steps: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        batch, num_steps = batch or size.batch, num_steps or size.num_steps
        torch.manual_seed(0)
        self.decoder = size.decoder().to(device)
        elements = self.decoder(torch.zeros(1, size.latent_dim, device=device)).numel()
        self.z, self.rho = torch.randn(2, batch, size.latent_dim).to(device)
        self.x = torch.bernoulli(torch.full((batch, elements), 0.3)).to(device)
        self.step_size = torch.linspace(0.05, 0.1, num_steps)[:, None].to(device)
        self.alpha = torch.linspace(0.9, 1, num_steps).to(device)
        self.decoder.to(dtype)
        for name in ("z", "rho", "x", "step_size", "alpha"):
            setattr(self, name, getattr(self, name).to(dtype))
        for tensor in (self.z, self.step_size, self.alpha):
            tensor.requires_grad_()

    def contestant(self, flow: Flow, decoder: nn.Module | None = None) -> Callable[[], list[Tensor]]:
        """Loss and gradients through a flow; ``decoder`` replaces the problem's own."""
        network = self.decoder if decoder is None else decoder
        inputs = [self.z, self.step_size, self.alpha, *network.parameters()]

        def run() -> list[Tensor]:
            _, rho, log_px = flow(network, self.z, self.rho, self.x, self.step_size, self.alpha)
            loss = log_px.sum() - rho.square().sum() / 2
            return [loss.detach(), *torch.autograd.grad(loss, inputs)]

        return run


def build(options: harness.Options, size: Size) -> harness.Trial:
    p = Problem(size, options.device)
    double = Problem(size, options.device, dtype=torch.float64)
    expected = double.contestant(reference.hamiltonian_flow)()
    eager = p.contestant(reference.hamiltonian_flow)
    kinked = any(isinstance(module, nn.ReLU) for module in p.decoder.modules())
    if kinked:
        error = timing.relative_error(double.contestant(ops.hamiltonian_flow)(), expected)
        if not error <= EXACT:
            raise ArithmeticError(f"ours differs in float64 by {error:.1e}, over {EXACT:.0e}")
    ours = p.contestant(functools.partial(ops.hamiltonian_flow, memory="store"))
    recompute = p.contestant(functools.partial(ops.hamiltonian_flow, memory="recompute"))
    found: dict[str, Callable[[], timing.Contestant]] = {
        OURS: lambda: ours,
        RECOMPUTE: lambda: recompute,
        EAGER_2K: lambda: p.contestant(reference.hamiltonian_flow_2k),
        EAGER: lambda: eager,
    }
    convolutional = any(isinstance(layer, nn.ConvTranspose2d) for layer in p.decoder)
    if convolutional:
        found[CHANNELS_LAST] = lambda: p.contestant(reference.hamiltonian_flow, channels_last(p.decoder))
    if p.z.is_cuda:
        found[OURS + GRAPH] = lambda: timing.captured(ours)
        found[EAGER + GRAPH] = lambda: timing.captured(eager)
    if options.compile and (options.compile_convolutions or not convolutional):
        found[COMPILED] = lambda: p.contestant(timing.compiled(functional_flow, fullgraph=True))
    if options.jax:
        tensors = [p.z, p.rho, p.x, p.step_size, p.alpha, *p.decoder.parameters()]
        found[JAX] = lambda: jax_twins.JaxFunction(jax_twins.flow_losses(p.decoder), tensors, options.threads)
    layers, sweeps = floors.products(p.decoder, p.z), 2 * (size.num_steps + 1)
    return harness.Trial(
        found,
        expected,
        max(KINKED if kinked else TOLERANCE, 2 * timing.relative_error(eager(), expected)),
        operations=floors.gemm_operations(layers, sweeps),
        floors={report.FLOOR: floors.gemm_floor(layers, sweeps, options.device)},
    )


def memory_probe(key: str, memory: str, num_steps: int, quick: bool, device: str) -> timing.Contestant:
    """One forward and backward pass, warmed up with one sample and one step."""
    size = next(size for size in sizes(quick) if size.key == key)
    flow = functools.partial(ops.hamiltonian_flow, memory=memory)
    Problem(size, torch.device(device), batch=1, num_steps=1).contestant(flow)()
    return Problem(size, torch.device(device), num_steps=num_steps).contestant(flow)


def memory_case(size: Size, quick: bool) -> harness.MemoryCase:
    probes = {
        f"ours, {memory}, K = {steps}": (memory_probe, size.key, memory, steps, quick)
        for memory in ("recompute", "store")
        for steps in MEMORY_STEPS
    }
    return harness.MemoryCase(f"{size.key}-memory", size.title, probes)


def cases(quick: bool) -> list[harness.Case]:
    return [harness.Case(s.key, s.title, build, (s,), s.seconds) for s in sizes(quick)]


def parser(description: str | None) -> argparse.ArgumentParser:
    found = harness.parser(description)
    found.add_argument(
        "--compile-convolutions", action="store_true", help="their decoders by torch.compile too"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(parser(__doc__), arguments)
    of_memory = sizes(options.quick)[: 1 if options.quick else None]
    memory = [memory_case(size, options.quick) for size in of_memory]
    harness.Benchmark("flow", "The Hamiltonian flow", cases(options.quick), memory, TARGETS).run(options)

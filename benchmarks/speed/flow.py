"""The Hamiltonian flow against eager PyTorch, torch.compile, JAX and the machine's own matrix products.

    python -m benchmarks.speed flow                 times, under 4 minutes on 2 cores
    python -m benchmarks.speed flow --compile all   also the convolutional decoder by torch.compile, many minutes
    python -m benchmarks.speed flow --memory        peak memory at K = 5 and K = 50 instead
    python -m benchmarks.speed flow --quick         tiny sizes: does everything run?

Every contestant computes the loss sum log p(x | z_K) - |rho_K|^2 / 2 and its gradients to z, step_size, alpha and all
parameters of the decoder, in float32, and must agree with eager PyTorch to 1e-4 before it is timed. Written are
flow-<device>.json, .md and .png (flow-memory-<device>.json and .md with --memory).

Floors, for K + 1 forces (each 1 forward and 1 reverse pass, and 4 passes to differentiate through it):

- "GEMM floor": the matrix products alone, by torch.mm into results that exist, in the shapes of one force;
- "GEMM floor, stacked": the same, the weight gradients of a Linear layer in one product over all forces;
- "FLOP floor": the operations at the rate of a large square product.

Of a small network the first two are mostly the calls of torch.mm.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import ops, reference
from fastvae.architectures import hvae_decoder

from . import command, common, floors, report
from .flow_report import (
    CHANNELS_LAST,
    COMPILED,
    EAGER,
    EAGER_2K,
    GRAPH,
    JAX,
    OURS,
    RECOMPUTE,
    TARGETS,
    memory_table,
    memory_targets,
)
from .flow_rivals import JaxFlow, functional_flow
from .networks import softplus_mlp, wide_decoder

TOLERANCE = 1e-4
"""|difference| / |exact| of the loss and each gradient, where eager's own float32 is not twice as far from float64's:
round-off of K + 1 forces in another order."""
KINKED = 1e-2
"""The same with ReLU, of which now and then a unit is on the other side of its kink: of the wide decoder, eager is off
by 4e-7 or by 3e-3, as the seed has it. Ours is then compared in float64, too."""
EXACT = 1e-9

MEMORY_STEPS = (5, 50)

Flow = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    key: str
    title: str
    decoder: Callable[[], nn.Sequential]
    latent_dim: int
    batch: int
    num_steps: int
    seconds: float
    """how long its contestants are timed"""


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("mlp", "4-8-8-12, batch 5, K = 2", lambda: softplus_mlp(4, 8, 8, 12), 4, 5, 2, 0.1),
            Case("conv", "convolutional, width 2, batch 3, K = 2", lambda: hvae_decoder(2), 64, 3, 2, 0.1),
        ]
    return [
        Case(
            "mlp",
            "32-512-512-784, batch 128, K = 10",
            lambda: softplus_mlp(32, 512, 512, 784),
            32,
            128,
            10,
            25,
        ),
        Case("small", "2-64-64-64, batch 16, K = 10", lambda: softplus_mlp(2, 64, 64, 64), 2, 16, 10, 8),
        Case("conv", "the paper's convolutional, batch 100, K = 10", hvae_decoder, 64, 100, 10, 35),
        Case("wide", "1024-512-256 channels, batch 32, K = 3", wide_decoder, 16, 32, 3, 35),
    ]


class Problem:
    """A case's decoder and inputs on a device, and the loss that every contestant differentiates."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        *,
        batch: int | None = None,
        num_steps: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        batch, num_steps = batch or case.batch, num_steps or case.num_steps
        torch.manual_seed(0)
        self.decoder = case.decoder().to(device)
        elements = self.decoder(torch.zeros(1, case.latent_dim, device=device)).numel()
        self.z, self.rho = torch.randn(2, batch, case.latent_dim).to(device)
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


def channels_last(decoder: nn.Module) -> nn.Module:
    """A copy with the weights of its convolutions in channels_last, which their results follow."""
    network = copy.deepcopy(decoder)
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def makers(problem: Problem, options: argparse.Namespace) -> dict[str, Callable[[], Callable[[], Any]]]:
    """How each contestant is built, by name: building or running one may fail, where the machine lacks it."""
    p = problem
    ours = p.contestant(functools.partial(ops.hamiltonian_flow, memory="store"))
    recompute = p.contestant(functools.partial(ops.hamiltonian_flow, memory="recompute"))
    eager = p.contestant(reference.hamiltonian_flow)
    found: dict[str, Callable[[], Callable[[], Any]]] = {
        OURS: lambda: ours,
        RECOMPUTE: lambda: recompute,
        EAGER_2K: lambda: p.contestant(reference.hamiltonian_flow_2k),
        EAGER: lambda: eager,
    }
    convolutional = any(isinstance(layer, nn.ConvTranspose2d) for layer in p.decoder)
    if convolutional:
        found[CHANNELS_LAST] = lambda: p.contestant(reference.hamiltonian_flow, channels_last(p.decoder))
    if p.z.is_cuda:
        found[OURS + GRAPH] = lambda: common.captured(ours)
        found[EAGER + GRAPH] = lambda: common.captured(eager)
    if options.compile == "all" or (options.compile == "dense" and not convolutional):
        torch._dynamo.reset()  # else the shapes of the case before make this one's dynamic
        found[COMPILED] = lambda: p.contestant(torch.compile(functional_flow, fullgraph=True, dynamic=False))
    if options.jax:
        found[JAX] = lambda: JaxFlow(p.decoder, p.z, p.rho, p.x, p.step_size, p.alpha, options.threads)
    return found


def run_case(case: Case, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Check every contestant against eager PyTorch in float64, then time those that agree, and the floors."""
    problem = Problem(case, device)
    expected = Problem(case, device, dtype=torch.float64).contestant(reference.hamiltonian_flow)()
    eager_error = common.relative_error(problem.contestant(reference.hamiltonian_flow)(), expected)
    kinked = any(isinstance(module, nn.ReLU) for module in problem.decoder.modules())
    tolerance = max(KINKED if kinked else TOLERANCE, 2 * eager_error)
    if kinked:
        error = common.relative_error(
            Problem(case, device, dtype=torch.float64).contestant(ops.hamiltonian_flow)(), expected
        )
        if not error <= EXACT:
            raise ArithmeticError(f"ours differs in float64 by {error:.1e}, over {EXACT:.0e}")
    contestants: dict[str, common.Contestant] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, make in makers(problem, options).items():
        command.progress(f"{case.title}: {name}")
        try:
            contestant = make()
            result = contestant()
            if isinstance(contestant, JaxFlow):
                result = contestant.tensors()
                notes[name] = f"lax.scan with unroll={contestant.unroll}"
            errors[name] = common.relative_error(result, expected)
            if not errors[name] <= tolerance:
                raise ArithmeticError(f"differs from float64 by {errors[name]:.1e}, over {tolerance:.0e}")
        except Exception as error:
            # A rival that this machine lacks leaves a note; one of ours that fails is a fault.
            if name.startswith("ours"):
                raise
            notes[name] = f"not timed: {common.why(error)}"
            continue
        contestants[name] = contestant

    layers, forces = floors.products(problem.decoder, problem.z), case.num_steps + 1
    for name, stacked in ((report.FLOOR, False), (report.STACKED, True)):
        contestants[name] = floors.second_order_floor(layers, forces, device, stacked=stacked)
    command.progress(f"{case.title}: timing")
    # JAX runs on a stream of its own, which events on PyTorch's do not see.
    timings, gflops = common.interleave_with_gemm(
        contestants,
        device,
        seconds=case.seconds * options.share,
        quick=options.quick,
        clocks={JAX: common.wall_clock},
    )
    operations = floors.second_order_operations(layers, forces)
    floor_timings = {name: timings.pop(name) for name in (report.FLOOR, report.STACKED)}
    floor_ms = {name: timing.median for name, timing in floor_timings.items()}
    floor_ms[report.FLOPS] = operations / gflops / 1e6
    record = report.case_record(
        case, OURS, timings, floor_ms, operations=operations, gflops=gflops, errors=errors, notes=notes
    )
    return {**record, "floor_timings_ms": floor_timings}


def memory_probe(key: str, memory: str, num_steps: int, quick: bool, device: str) -> Callable[[], object]:
    """One forward and backward pass of a case, warmed up with one sample and one step."""
    case = next(case for case in cases(quick) if case.key == key)
    flow = functools.partial(ops.hamiltonian_flow, memory=memory)
    Problem(case, torch.device(device), batch=1, num_steps=1).contestant(flow)()
    return Problem(case, torch.device(device), num_steps=num_steps).contestant(flow)


def run_memory(device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak extra memory of every case and memory mode at both numbers of steps."""
    rows = []
    for case in cases(quick=True)[:1] if options.quick else cases(quick=False):
        for memory in ("recompute", "store"):
            sizes = {}
            for steps in MEMORY_STEPS:
                command.progress(f"{case.title}: memory={memory!r}, K = {steps}")
                arguments = (case.key, memory, steps, options.quick, device.type)
                if device.type == "cuda":
                    sizes[steps] = common.peak_extra_cuda_memory(memory_probe(*arguments))
                else:
                    sizes[steps] = common.peak_extra_memory(
                        __name__, "memory_probe", *arguments, threads=options.threads
                    )
            first, last = sizes.values()
            growth = last / first if first else None
            rows.append({"case": case.title, "memory": memory, "bytes": sizes, "growth": growth})
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__, "tiny sizes, no torch.compile: does it run?")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--no-jax", action="store_false", dest="jax", help="leave JAX out")
    parser.add_argument(
        "--compile",
        choices=["none", "dense", "all"],
        default="dense",
        help="decoders given to torch.compile (default: those without convolutions, which take a "
        "minute each to compile the first time; convolutions take many)",
    )
    options = command.parse(parser, arguments)
    options.compile = "none" if options.quick else options.compile
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device, path = command.begin(options, "flow-memory" if options.memory else "flow")
    environment = common.environment(device)
    record: dict[str, Any] = {"benchmark": "flow", "environment": environment}

    def write(tables: list[str], last: bool = True) -> None:
        if record["targets"]:
            tables.insert(0, report.target_table(record["targets"]))
        end = report.environment_table(environment, record["settings"])
        common.publish(path, record, ["# The Hamiltonian flow", *tables, end], last=last)

    if options.memory:
        record["settings"] = {
            "peak": "VmHWM of a fresh process" if device.type == "cpu" else "PyTorch's allocator"
        }
        record["memory"] = run_memory(device, options)
        record["targets"] = [] if options.quick else memory_targets(record["memory"])
        write([memory_table(record["memory"])])
        return
    record["settings"] = {
        "threads": options.threads,
        "precision": "float32, TF32 off",
        "copy rate, GB/s": round(common.copy_rate(device, 1 if options.quick else 256), 1),
    }
    record["cases"] = []
    chosen = cases(options.quick)
    for case in chosen:
        record["cases"].append(run_case(case, device, options))
        record["targets"] = [] if options.quick else report.judge(record["cases"], device.type, TARGETS)
        command.draw(path, report.panels(record["cases"], OURS), "time / ours (store), medians")
        write([report.case_section(found, OURS) for found in record["cases"]], last=case is chosen[-1])

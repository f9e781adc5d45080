"""What operators and methods launch on a GPU, counted without one: on the build that emulates CUDA.

    PYTHONPATH=build/emulated/lib python scripts/launches.py table
    PYTHONPATH=build/emulated/lib python scripts/launches.py geometry build/cuda-report.txt

``table`` prints the launches of a call as they stand in docs/kernels.md. ``geometry`` (`make cuda-check`) prints each
kernel's grid in float32 at the benchmarks' shapes, with what ptxas says of it for an H100, and fails where a kernel has
fewer blocks than the device has multiprocessors, or local memory, unless ``EXCEPTIONS`` gives the reason.

Counted are 4 samples; more launch the same, but for what is done in tiles (grad_dot, convolutions of large batches).
A launch is one of ours, as the host's stand-in for CUDA gets it, or a call of an operator of PyTorch's that computes:
no view, no memory, and not what that operator calls in its turn. cuBLAS, cuDNN and reductions may make two or three of
one such call, so this is what a GPU does at least.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastvae
from fastvae import architectures, ops
from fastvae._extension import raw

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.networks import mlp, softplus_mlp
from benchmarks.speed.flow import Problem, sizes
from fastvae.data import RandomFlip

Function = Callable[[], Any]
Made = tuple[Function, Sequence[Tensor]]
CPU = torch.device("cpu")


class Launch(NamedTuple):
    """A launch of ours."""

    kernel: str
    blocks: int
    threads: int
    dynamic_bytes: int
    moved_bytes: int
    strangers: int
    """Addresses among the arguments that are no memory of a tensor which lives: a device would read what is gone."""
    arguments: bytes


class Call(NamedTuple):
    """A call of PyTorch's that computes, and all that it is called with but numbers of tensors."""

    op: str
    form: str


def launched(function: Callable[[], Any]) -> tuple[Any, list[Launch | Call]]:
    """What a function returns, and what it launches, in order, as if it had not been called before.

    Raises:
        RuntimeError: part of it was captured, which copies inputs.
    """
    fastvae.cuda_graphs.release()
    before = raw.replay_counts()[:2]
    raw.taken_emulated_launches()
    raw.write_emulated_launches(True)
    try:
        result = function()
    finally:
        raw.write_emulated_launches(False)
    if raw.replay_counts()[:2] != before:
        raise RuntimeError("launched: a form came so often that it was captured")
    return result, [Call(*one) if len(one) == 2 else Launch(*one) for one in raw.taken_emulated_launches()]


# --- cases -----------------------------------------------------------------------------------------------------------


Case = Callable[[int | None], Made]
"""From a batch, None for the benchmark's own, to a call and what its results are differentiated by."""


def flow(key: str, full: int | None, batch: int | None) -> Made:
    """benchmarks/speed/flow.py."""
    size = next(size for size in sizes(quick=False) if size.key == key)
    p = Problem(size, CPU, batch=batch or full)
    inputs = [p.z, p.step_size, p.alpha, *p.decoder.parameters()]
    return lambda: ops.hamiltonian_flow(p.decoder, p.z, p.rho, p.x, p.step_size, p.alpha)[1:], inputs


def trajectory(batch: int | None) -> Made:
    """All points of a flow, without a gradient."""
    p = Problem(sizes(quick=False)[0], CPU, batch=batch)
    return lambda: ops.trajectory(p.decoder, p.z, p.rho, p.x, p.step_size, p.alpha), []


def force(batch: int | None) -> Made:
    """log p(x | z) and its force."""
    p = Problem(sizes(quick=False)[0], CPU, batch=batch)
    return lambda: ops.log_px_and_force(p.decoder, p.z, p.x), [p.z, *p.decoder.parameters()]


def jacobian(decoder: Callable[[], nn.Module], latents: int, full: int, batch: int | None) -> Made:
    """scripts/gpu_profile.py."""
    torch.manual_seed(0)
    network, z = decoder(), torch.randn(batch or full, latents, requires_grad=True)
    return lambda: ops.jacobian_l1(network, z), [z, *list(network.parameters())[:-1]]


def dense() -> tuple[nn.Module, nn.Module]:
    """784-512-64 and 32-512-784."""
    torch.manual_seed(0)
    return mlp(784, 512, 64), softplus_mlp(32, 512, 784)


def objective(draws: int, batch: int | None) -> Made:
    """A VAE's or, with several draws, an IWAE's."""
    encoder, decoder = dense()
    x, noise = torch.rand(batch or 128, 784), torch.randn(draws, batch or 128, 32)
    inputs = [*encoder.parameters(), *decoder.parameters()]
    if draws == 1:
        return lambda: ops.elbo(encoder, decoder, x, noise[0]), inputs
    return lambda: ops.iwae_bound(encoder, decoder, x, num_samples=draws, noise=noise), inputs


def codes(function: Callable[..., Any], count: int, batch: int | None) -> Made:
    """Of some tensors [B, 32]."""
    inputs = [torch.randn(batch or 128, 32, requires_grad=True) for _ in range(count)]
    return lambda: function(*inputs), inputs


def grad_dot(batch: int | None) -> Made:
    """A tile of TracIn."""
    n, m, draws, width = batch or 1024, batch or 100, 16, 512
    a, g = torch.randn(2, n, draws, width)
    b, h = torch.randn(2, m, draws, width)
    return lambda: ops.grad_dot(a, g, b, h), []


def dcgan() -> fastvae.VAE:
    """The likelihood regret paper's model."""
    torch.manual_seed(0)
    encoder, decoder = architectures.dcgan_encoder(1, 32, 100), architectures.dcgan_decoder(1, 32, 100)
    return fastvae.VAE(encoder, decoder, "categorical").eval().requires_grad_(False)


def log_px(batch: int | None) -> Made:
    """A tile of importance sampling."""
    model, images = dcgan(), batch or 8
    x = torch.randint(256, (images, 1, 32, 32)) / 255
    z = torch.randn(8, images, 100)
    return lambda: ops.log_px(model.decoder, z, x, "categorical"), []


def regret(num_steps: int, batch: int | None) -> Made:
    """An image's encoder trained, each image's own."""
    x = torch.randint(256, (batch or 8, 1, 32, 32)) / 255
    detector = fastvae.ood.LikelihoodRegret(dcgan(), num_steps=num_steps, num_samples=10)
    return lambda: detector.refit(x), []


def tracin(batch: int | None) -> Made:
    """The paper's MNIST model, one checkpoint."""
    torch.manual_seed(0)
    model = fastvae.VAE(architectures.tracin_encoder(), architectures.tracin_decoder(), beta=4.0)
    x, q = (torch.rand(count, 784).round() for count in (batch or 64, batch or 100))
    found = fastvae.influence.TracIn(model, x, [None], lambda *_: 1.0, num_samples=16)
    return lambda: found.influence(q, k=1), []


def loss(make: Callable[..., nn.Module], batch: int | None, shape: Sequence[int] = (784,)) -> Made:
    """A model's loss in training."""
    model, x = make().train(), torch.rand(batch or 128, *shape)
    return lambda: model(x).mean(), list(model.parameters())


def images() -> tuple[nn.Module, nn.Module]:
    """The same networks of images [1, 28, 28]."""
    encoder, decoder = dense()
    return nn.Sequential(nn.Flatten(), encoder), nn.Sequential(decoder, nn.Unflatten(1, (1, 28, 28)))


def log_likelihood(batch: int | None) -> Made:
    """Importance sampling of the same VAE."""
    model, x = fastvae.VAE(*dense()), torch.rand(batch or 128, 784)
    return lambda: model.log_likelihood(x, 8), []


def ais(batch: int | None) -> Made:
    """Annealed importance sampling of the same VAE, its step size given."""
    model, x = fastvae.VAE(*dense()), torch.rand(batch or 128, 784)
    return lambda: fastvae.metrics.ais(model, x, 2, 8, num_leapfrog_steps=2, step_size=0.1), []


STEP, ALPHA = torch.full((32,), 0.1), torch.tensor(0.9)


part = functools.partial
SWEPT: dict[str, Case] = {
    "elbo: MLPs 784-512-64 and 32-512-784, B 128": part(objective, 1),
    "iwae_bound: the same, 5 samples": part(objective, 5),
    "grad_dot: 1,024 x 100, 16 draws, 512 wide": grad_dot,
    "hamiltonian_flow: MLP 2-64-64-64, B 16, K = 10": part(flow, "small", None),
    "hamiltonian_flow: the same, B 128": part(flow, "small", 128),
    "hamiltonian_flow: MLP 32-512-512-784, B 128, K = 10": part(flow, "mlp", None),
    "hamiltonian_flow: HVAE's convolutional, B 100, K = 10": part(flow, "conv", None),
    "jacobian_l1: MLP 2-64-64-64, B 128": part(jacobian, lambda: mlp(2, 64, 64, 64), 2, 128),
    "jacobian_l1: MLP 10-512-512-784, B 128": part(
        jacobian, lambda: softplus_mlp(10, 512, 512, 784), 10, 128
    ),
    "jacobian_l1: its paper's convolutional, 10 latents, B 64": part(
        jacobian, architectures.jacobian_l1_decoder, 10, 64
    ),
    "leapfrog_kick_drift: 32 latents, B 128": part(
        codes, lambda z, rho, force: ops.leapfrog_kick_drift(z, rho, force, STEP), 3
    ),
    "leapfrog_kick_temper: 32 latents, B 128": part(
        codes, lambda rho, force: ops.leapfrog_kick_temper(rho, force, STEP, ALPHA), 2
    ),
    "log_px: DCGAN of 256 classes, 8 images, 8 samples": log_px,
    "log_px_and_force: MLP 32-512-512-784, B 128": force,
    "trajectory: the same, K = 10": trajectory,
}
METHODS: dict[str, Case] = {
    "VAE: MLPs 784-512-64 and 32-512-784, B 128, loss": part(loss, lambda: fastvae.VAE(*dense())),
    "IWAE: the same, 5 samples": part(loss, lambda: fastvae.IWAE(*dense(), num_samples=5)),
    "HVAE: the same, K = 10": part(loss, lambda: fastvae.HVAE(*dense(), num_steps=10)),
    "JacobianL1VAE: the same": part(loss, lambda: fastvae.JacobianL1VAE(*dense())),
    "ConsistencyVAE: the same, images turned over": part(
        loss, lambda: fastvae.ConsistencyVAE(*images(), augment=RandomFlip()), shape=(1, 28, 28)
    ),
    "VAE.log_likelihood: the same, 8 samples": log_likelihood,
    "ais: the same, 2 temperatures of 2 leapfrog steps, 8 chains": ais,
    "LikelihoodRegret: DCGAN, 8 images, 2 steps of 10 samples": part(regret, 2),
    "TracIn: its paper's MLPs, 64 training images x 100": tracin,
}
TABLE = SWEPT | METHODS
"""What docs/kernels.md lists."""


def of_tensors_alone() -> dict[str, Case]:
    """The other operators, which launch one kernel of theirs or two: of tensors [B, 32] where they need tensors."""
    found: dict[str, Case] = {}
    for name in sorted(set(ops.__all__) - {case.split(":")[0] for case in SWEPT}):
        function = getattr(ops, name)
        parameters = inspect.signature(function).parameters.values()
        needed = [each for each in parameters if each.default is each.empty]
        if any(each.annotation != "Tensor" for each in needed):
            raise TypeError(f"launches.py: {name} takes more than tensors: give it a line in SWEPT")
        found[f"{name}: 32 latents, B 128"] = part(codes, function, len(needed))
    return found


OPERATORS = SWEPT | of_tensors_alone()
CASES = OPERATORS | METHODS


Both = tuple[list[Launch | Call], list[Launch | Call]]


def counts(case: Case, batch: int | None = 4) -> Both:
    """What a case's call launches, and what its gradient does."""
    function, inputs = case(batch)
    function()  # what is learned from a first call
    result, forward = launched(function)
    if not inputs:
        return forward, []
    results = [one for one in (result if isinstance(result, tuple) else (result,)) if one.requires_grad]
    ones = [torch.ones_like(one) for one in results]
    _, backward = launched(lambda: torch.autograd.grad(results, inputs, ones, allow_unused=True))
    return forward, backward


# --- tables ----------------------------------------------------------------------------------------------------------

HEADING = ("call", "kernels of ours", "PyTorch's", "its gradient: ours", "PyTorch's")


def row_of(name: str, both: Both) -> str:
    """A line of the table in docs/kernels.md."""
    numbers = [
        str(sum(isinstance(one, kind) for one in found)) if found else ""
        for found in both
        for kind in (Launch, Call)
    ]
    return f"| {' | '.join((name, *numbers))} |"


def print_table() -> None:
    """The table in docs/kernels.md."""
    print(f"| {' | '.join(HEADING)} |\n|{'---|' * len(HEADING)}")
    for name, case in TABLE.items():
        print(row_of(name, counts(case)), flush=True)


MULTIPROCESSORS, REGISTERS, SHARED, THREADS, BLOCKS = 132, 65536, 227 * 1024, 2048, 32
"""Of an H100 (sm_90): the first as a whole, the others a multiprocessor's."""


class Resources(NamedTuple):
    """What ptxas gives a kernel."""

    registers: int
    shared_bytes: int
    local_bytes: int


def resources(report: str) -> dict[str, Resources]:
    """By kernel, from the log of ``ptxas -v``."""
    found: dict[str, Resources] = {}
    name = None
    local = 0
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(?:void )?fastvae::cuda::(.*)' for '(\w+)'", line):
            name = match[1][: _end_of_name(match[1])] if match[2] == "sm_90a" else None
        elif name and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill", line)):
            local = int(match[1]) + int(match[2])
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = Resources(int(match[1]), int(shared[1]) if shared else 0, local)
    return found


def _end_of_name(text: str) -> int:
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and not depth:
            return at
    return len(text)


def occupancy(threads: int, registers: int, shared_bytes: int) -> float:
    """The share of a multiprocessor's threads that its blocks can be, where there are enough of them.

    Registers go to warps by 256; a block takes a kilobyte of shared memory besides its own.
    """
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    resident = min(
        BLOCKS,
        THREADS // (warps * 32),
        REGISTERS // of_warp // warps,
        (SHARED + 1024) // (shared_bytes + 1024),
    )
    return resident * warps * 32 / THREADS


class Allowed(NamedTuple):
    """Kernels that may have fewer blocks than an H100 has multiprocessors: how many at least, why, and how long."""

    kernels: str
    blocks: int
    reason: str
    microseconds: float


EXCEPTIONS = (
    Allowed(
        r"((independent|jacobian|categorical)_head|element_residual)_kernel",
        100,
        "a block a sum of a sample: batches of 100 and 128, and 8 images of 16 blocks, are near 132",
        5,
    ),
    Allowed(
        r"small_flow_kernel",
        2,
        "8 samples a block for a whole trajectory, whose weights stay on the chip",
        90,
    ),
    Allowed(r"small_flow_backward_kernel", 2, "the same, and its tape", 190),
    Allowed(
        r"copies_norm_reverse_kernel", 32, "8 channels of one of 8 images a block, 8 positions a thread", 6
    ),
    Allowed(r".*", 1, "blocks of a warp, or a kilobyte a multiprocessor: there is nothing more to divide", 2),
)
"""The first whose pattern a kernel matches is its own. Times by arithmetic; of the small flow, of what an H200 took for
both together (benchmarks/results/flow-nvidia-h200.md)."""


def allowed(launch: Launch) -> Allowed | None:
    """The exception of a launch with few blocks."""
    one = next(one for one in EXCEPTIONS if re.match(one.kernels, launch.kernel))
    is_small = launch.threads == 32 or launch.moved_bytes <= MULTIPROCESSORS * 1024
    return one if launch.blocks >= one.blocks and (is_small or one is not EXCEPTIONS[-1]) else None


def print_geometry(report: str) -> int:
    """What `make cuda-check` prints; 1 if a kernel has too few blocks or local memory."""
    known = resources(report)
    faults: list[str] = []
    used: Counter[Allowed] = Counter()
    print(
        f"{'calls':>6} {'blocks':>6} {'threads':>7} {'regs':>4} {'shared':>7} {'occupancy':>9} {'bytes':>11}  kernel"
    )
    for name, case in CASES.items():
        print(name)
        full = [one for found in counts(case, None) for one in found if isinstance(one, Launch)]
        for launch, times in Counter(one._replace(arguments=b"") for one in full).items():
            has = known[launch.kernel]
            shared = has.shared_bytes + launch.dynamic_bytes
            line = (
                f"{times:6} {launch.blocks:6} {launch.threads:7} {has.registers:4} {shared:7} "
                f"{occupancy(launch.threads, has.registers, shared):9.0%} {launch.moved_bytes:11}  {launch.kernel}"
            )
            if launch.blocks < MULTIPROCESSORS:
                exception = allowed(launch)
                used.update([exception] if exception else [])
                line += f"  [{EXCEPTIONS.index(exception) + 1}]" if exception else "  FEW BLOCKS"
                faults += [] if exception else [f"{name}: {launch.kernel} has {launch.blocks} blocks"]
            if has.local_bytes:
                faults.append(f"{name}: {launch.kernel} has {has.local_bytes} bytes of local memory")
            print(line, flush=True)
    print(f"fewer blocks than {MULTIPROCESSORS}, and why:")
    for at, one in enumerate(EXCEPTIONS, 1):
        print(f"[{at}] {used[one]} grids, about {one.microseconds} us each: {one.reason}")
    for fault in faults:
        print(f"cuda-check: {fault}", file=sys.stderr)
    return int(bool(faults))


def main() -> int:
    """Print a table; 1 if something in it is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table", help="launches of a call, for docs/kernels.md")
    commands.add_parser("geometry", help="grids at the benchmarks' shapes").add_argument("report", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        print_table()
        return 0
    return print_geometry(options.report.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())

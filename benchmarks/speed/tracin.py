"""TracIn against the ways it is computed elsewhere: scores of all pairs of training images and queries.

    python -m benchmarks.speed tracin              times and errors, about 5 minutes on 2 cores
    python -m benchmarks.speed tracin --memory     peak memory and time of the 3.0M-parameter model of Kong and
                                                   Chaudhuri (NeurIPS 2021), S = 16, 9,000 x 100 images, top 20
    python -m benchmarks.speed tracin --quick      tiny sizes: does everything run?

Every contestant computes the same losses with the same noise, one draw a sample, in float32, and is timed only if its
scores agree with those of materialised gradients in float64. Rivals: the loop of the paper's authors, timed on a part
of the training images and with none, from which the time with all follows; vmap(grad); per-sample gradients
from hooks and one product; Gram matrices of the factors from hooks; captum's TracInCP; kronfluence with its identity
strategy. captum's fast mode, which knows only the last layer, computes less than the others. Written are
tracin-<device>.json, .md and .png.

FLOP floor: forward, reverse and the cheaper exact contraction of every layer, at the rate of a large square product.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae import architectures

from . import command, common, floors, networks, report
from . import tracin_rivals as rivals

TOLERANCE = 1e-4
"""|difference| / |scores|: float32 round-off against float64."""

OURS, LOOP, VMAP = "ours", "loop, one backward a sample", "vmap(grad), one product"
GRAM, DENSE = "Gram matrices from hooks", "gradients from hooks, one product"
CAPTUM, KRONFLUENCE = "captum TracInCP", "kronfluence, identity"
FAST = "captum TracInCPFast, last layer only"
LOOPED = 16
"""Training images that the loop is timed on; it does the same for each of them."""
BEFORE_LOOP = "loop, its queries alone"

TARGETS = [
    report.Target("cpu", "mlp", VMAP, 150, OURS),
    report.Target("cpu", "mlp", LOOP, 400, OURS),
    report.Target("cpu", "mlp", GRAM, 1.2, OURS),
    report.Target("cpu", "conv", VMAP, 5, OURS),
    report.Target("cpu", "conv", DENSE, 1.5, OURS),
]
MEMORY_BOUND = 2 * 2**30
"""bytes beyond model and images, at most"""


@dataclass(frozen=True)
class Case:
    key: str
    title: str
    networks: Callable[[], tuple[nn.Module, nn.Module]]
    shape: tuple[int, ...]
    latent_dim: int
    train: int
    queries: int
    seconds: float
    """how long its contestants are timed"""


def mlp(size: int, hidden: int, latent: int) -> tuple[nn.Module, nn.Module]:
    return networks.mlp(size, hidden, 2 * latent), networks.mlp(latent, hidden, size)


def convolutional(width: int) -> tuple[nn.Module, nn.Module]:
    return architectures.jacobian_l1_encoder(), architectures.jacobian_l1_decoder(width=width)


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("mlp", "12-8-4 / 2-8-12, 6 x 3", lambda: mlp(12, 8, 2), (12,), 2, 6, 3, 0.1),
            Case("conv", "convolutional, 3 x 2", lambda: convolutional(4), (1, 64, 64), 10, 3, 2, 0.1),
        ]
    return [
        Case(
            "mlp", "784-400-40 / 20-400-784, 512 x 128", lambda: mlp(784, 400, 20), (784,), 20, 512, 128, 15
        ),
        Case(
            "conv",
            "convolutional beta-VAE 1x64x64, 256 x 64",
            lambda: convolutional(32),
            (1, 64, 64),
            10,
            256,
            64,
            12,
        ),
    ]


class Problem:
    """A case's model and images on a device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        encoder, decoder = case.networks()
        self.model = fastvae.VAE(encoder, decoder, beta=4.0).to(device)
        self.losses = rivals.Losses(encoder, decoder, 4.0).to(device)
        self.train, self.queries = (
            torch.rand(count, *case.shape).round().to(device) for count in (case.train, case.queries)
        )
        self.noise = [rivals.noise_of(self.model, x, case.latent_dim) for x in (self.train, self.queries)]
        self.tracin = fastvae.influence.TracIn(
            self.model, self.train, [None], lambda model, checkpoint: 1.0, num_samples=1
        )

    def rival(self, function: Callable[..., Tensor], part: int | None = None) -> Callable[[], Tensor]:
        noise = [self.noise[0][:part], self.noise[1]]
        return lambda: function(self.losses, self.train[:part], self.queries, noise)

    def expected(self) -> Tensor:
        """From materialised gradients in float64."""
        self.losses.double()
        noise = [eps.double() for eps in self.noise]
        scores = rivals.dense(self.losses, self.train.double(), self.queries.double(), noise)
        self.losses.float()
        return scores


def run_case(case: Case, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Errors against float64 of every contestant, then their times and the floor."""
    problem = Problem(case, device)
    expected = problem.expected()
    part = min(LOOPED, case.train)
    makers: dict[str, Callable[[], common.Contestant]] = {
        OURS: lambda: lambda: problem.tracin.influence(problem.queries),
        DENSE: lambda: problem.rival(rivals.dense),
        VMAP: lambda: problem.rival(rivals.vmap_grad),
        LOOP: lambda: problem.rival(rivals.loop, part),
        BEFORE_LOOP: lambda: problem.rival(rivals.loop, 0),
    }
    if case.key == "mlp":
        # These leave out transposed convolutions.
        arguments = (problem.losses, problem.train, problem.queries, problem.noise)
        makers |= {
            GRAM: lambda: problem.rival(rivals.gram),
            CAPTUM: lambda: rivals.captum(*arguments),
            KRONFLUENCE: lambda: rivals.kronfluence(*arguments),
            FAST: lambda: rivals.captum_last_layer(*arguments),
        }
    contestants: dict[str, common.Contestant] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, make in makers.items():
        command.progress(f"{case.title}: {name}")
        try:
            contestant = make()
            scores = contestant()
            if name not in (FAST, BEFORE_LOOP):
                wanted = expected[:, :part] if name == LOOP else expected
                errors[name] = common.relative_error([scores], [wanted])  # type: ignore[list-item]
                if not errors[name] <= TOLERANCE:
                    raise ArithmeticError(f"off by {errors[name]:.1e}, over {TOLERANCE:.0e}")
        except Exception as error:
            if name == OURS:
                raise
            notes[name] = f"not timed: {common.why(error)}"
            continue
        contestants[name] = contestant
    command.progress(f"{case.title}: timing")
    timings, gflops = common.interleave_with_gemm(
        contestants, device, seconds=case.seconds * options.share, quick=options.quick
    )
    if LOOP in timings:
        timings[LOOP] = extrapolated(timings[LOOP], timings.pop(BEFORE_LOOP).median, case.train / part)
        notes[LOOP] = (
            f"from the time for {part} training images, each of which costs the same, and that without any"
        )
    layers = floors.influence_layers(
        (problem.losses.encoder, problem.losses.decoder),
        (problem.queries[:1], problem.queries.new_zeros(1, case.latent_dim)),
    )
    operations = floors.influence_operations(layers, case.train, case.queries)
    floor_ms = {report.FLOPS: operations / gflops / 1e6}
    return report.case_record(
        case, OURS, timings, floor_ms, operations=operations, gflops=gflops, errors=errors, notes=notes
    )


def extrapolated(timing: common.Timing, fixed: float, factor: float) -> common.Timing:
    """Of a contestant all of whose time but ``fixed`` grows with the part it was timed on, as if on the whole."""
    quantiles = ("median", "lower_quartile", "upper_quartile")
    whole = {name: fixed + factor * (getattr(timing, name) - fixed) for name in quantiles}
    return dataclasses.replace(timing, **whole)


def memory_probe(train: int, queries: int, draws: int, device: str) -> Callable[[], object]:
    """Top 20 of every query by the paper's MNIST model, warmed up with a few images."""
    torch.manual_seed(0)
    model = fastvae.VAE(architectures.tracin_encoder(), architectures.tracin_decoder(), beta=4.0).to(device)
    x, q = (torch.rand(count, 784, device=device).round() for count in (train, queries))

    def tracin(images: Tensor) -> fastvae.influence.TracIn:
        return fastvae.influence.TracIn(model, images, [None], lambda *_: 1.0, num_samples=draws)

    tracin(x[:8]).influence(q[:2])
    return lambda: tracin(x).influence(q, k=min(20, train))


def run_memory(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Peak extra memory in a fresh process, and the time of one call in this one."""
    train, queries, draws = (40, 4, 2) if options.quick else (9000, 100, 16)
    arguments = (train, queries, draws, device.type)
    if device.type == "cuda":
        size = common.peak_extra_cuda_memory(memory_probe(*arguments))
    else:
        size = common.peak_extra_memory(__name__, "memory_probe", *arguments, threads=options.threads)
    work = memory_probe(*arguments)
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return {
        "title": f"784-1024-512-256-256 / 128-256-512-1024-784, S = {draws}, {train} x {queries}, top 20",
        "bytes": size,
        "seconds": seconds,
        "microseconds_a_pair": 1e6 * seconds / (train * queries),
    }


def memory_section(row: dict[str, Any]) -> str:
    return (
        f"{row['title']}: peak extra memory {row['bytes'] / 2**20:.0f} MiB; {row['seconds']:.1f} s, "
        f"{row['microseconds_a_pair']:.1f} us a pair."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument(
        "--memory", action="store_true", help="the paper's model instead: peak memory and time"
    )
    return command.parse(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    kind = "tracin-memory" if options.memory else "tracin"
    device, path = command.begin(options, kind)
    environment = common.environment(device)
    environment |= {name: common.version_of(name) for name in ("captum", "kronfluence")}
    settings: dict[str, Any] = {"threads": options.threads, "precision": "float32, TF32 off"}
    record: dict[str, Any] = {"benchmark": kind, "environment": environment, "settings": settings}

    def write(sections: list[str], last: bool = True) -> None:
        if record["targets"]:
            sections.insert(0, report.target_table(record["targets"]))
        title = "# TracIn: memory" if options.memory else "# TracIn"
        sections = [title, *sections, report.environment_table(environment, settings)]
        common.publish(path, record, sections, last=last)

    if options.memory:
        record["memory"] = run_memory(device, options)
        title, share = record["memory"]["title"], record["memory"]["bytes"] / MEMORY_BOUND
        verdict = report.verdict(title, "ours, peak memory", "2 GiB", 1, share, at_most=True)
        record["targets"] = [] if options.quick else [verdict]
        write([memory_section(record["memory"])])
        return
    record["cases"] = []
    chosen = cases(options.quick)
    for case in chosen:
        record["cases"].append(run_case(case, device, options))
        record["targets"] = [] if options.quick else report.judge(record["cases"], device.type, TARGETS)
        command.draw(path, report.panels(record["cases"], OURS), "time / ours, medians")
        write([report.case_section(found, OURS) for found in record["cases"]], last=case is chosen[-1])

"""TracIn against the ways it is computed elsewhere: scores of all pairs of training images and queries.

    python -m benchmarks.speed tracin              times and errors, about 5 minutes on 2 cores
    python -m benchmarks.speed tracin --memory     peak memory and time of the 3.0M-parameter model of Kong and
                                                   Chaudhuri (NeurIPS 2021), S = 16, 9,000 x 100 images, top 20
    python -m benchmarks.speed tracin --quick      tiny sizes: does everything run?

Every contestant computes the same losses with the same noise, one draw a sample, in float32, and is timed only if its
scores agree with those of materialised gradients in float64. Rivals: the loop of the paper's authors, timed on a part
of the training images and with none, from which the time with all follows; vmap(grad); per-sample gradients
from hooks and one product; Gram matrices of the factors from hooks; captum's TracInCP; kronfluence with its identity
strategy.

FLOP floor: forward, reverse and the cheaper exact contraction of every layer, at the rate of a large square product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fastvae
from fastvae import architectures

from .. import networks
from ..rivals import tracin as rivals
from . import floors, harness, report, timing

TOLERANCE = 1e-4
"""|difference| / |scores|: float32 round-off against float64."""

OURS, LOOP, VMAP = "ours", "loop, one backward a sample", "vmap(grad), one product"
GRAM, DENSE = "Gram matrices from hooks", "gradients from hooks, one product"
CAPTUM, KRONFLUENCE = "captum TracInCP", "kronfluence, identity"
LOOPED = 16
"""Training images that the loop is timed on; it does the same for each of them."""
BEFORE_LOOP = "loop, its queries alone"

TARGETS = [
    report.Target("cpu", "mlp", VMAP, 150, OURS),
    report.Target("cpu", "mlp", LOOP, 400, OURS),
    report.Target("cpu", "mlp", GRAM, 1.2, OURS),
    report.Target("cpu", "conv", VMAP, 5, OURS),
    report.Target("cpu", "conv", DENSE, 1.5, OURS),
    report.Target("cpu", "memory", "2 GiB", 1, OURS, at_most=True),
]

Pair = tuple[nn.Module, nn.Module]


def mlp(size: int, hidden: int, latent: int) -> Pair:
    return networks.mlp(size, hidden, 2 * latent), networks.mlp(latent, hidden, size)


def convolutional(width: int) -> Pair:
    return architectures.jacobian_l1_encoder(), architectures.jacobian_l1_decoder(width=width)


def cases(quick: bool) -> list[harness.Case]:
    image = (1, 64, 64)
    if quick:
        tiny = functools.partial(mlp, 12, 8, 2), (12,), 2, 6, 3
        conv = functools.partial(convolutional, 4), image, 10, 3, 2
        return [
            harness.Case("mlp", "12-8-4 / 2-8-12, 6 x 3", build, tiny, 0.1),
            harness.Case("conv", "convolutional, 3 x 2", build, conv, 0.1),
        ]
    dense = functools.partial(mlp, 784, 400, 20), (784,), 20, 512, 128
    conv = functools.partial(convolutional, 32), image, 10, 256, 64
    return [
        harness.Case("mlp", "784-400-40 / 20-400-784, 512 x 128", build, dense, 15),
        harness.Case("conv", "convolutional beta-VAE 1x64x64, 256 x 64", build, conv, 12),
    ]


def build(
    options: harness.Options,
    pair: Callable[[], Pair],
    shape: tuple[int, ...],
    latent_dim: int,
    count: int,
    num_queries: int,
) -> harness.Trial:
    torch.manual_seed(0)
    encoder, decoder = pair()
    model = fastvae.VAE(encoder, decoder, beta=4.0).to(options.device)
    losses = rivals.Losses(encoder, decoder, 4.0).to(options.device)
    train, queries = (torch.rand(n, *shape).round().to(options.device) for n in (count, num_queries))
    noise = [rivals.noise_of(model, x, latent_dim) for x in (train, queries)]
    tracin = fastvae.influence.TracIn(model, train, [None], lambda *_: 1.0, num_samples=1)

    def rival(function: Callable[..., Tensor], part: int | None = None) -> Callable[[], timing.Contestant]:
        return lambda: lambda: function(losses, train[:part], queries, [noise[0][:part], noise[1]])

    losses.double()
    expected = rivals.dense(losses, train.double(), queries.double(), [eps.double() for eps in noise])
    losses.float()
    part = min(LOOPED, count)
    loop = rival(rivals.loop, part)()
    loop_error = timing.relative_error([loop()], [expected[:, :part]])  # type: ignore[list-item]
    if not loop_error <= TOLERANCE:
        raise ArithmeticError(f"{LOOP}: off by {loop_error:.1e}")
    contestants: dict[str, Callable[[], timing.Contestant]] = {
        OURS: lambda: lambda: tracin.influence(queries),
        DENSE: rival(rivals.dense),
        VMAP: rival(rivals.vmap_grad),
        LOOP: lambda: loop,
        BEFORE_LOOP: rival(rivals.loop, 0),
    }
    if len(shape) == 1:
        # These leave out transposed convolutions.
        contestants |= {
            GRAM: rival(rivals.gram),
            CAPTUM: lambda: rivals.captum(losses, train, queries, noise),
            KRONFLUENCE: lambda: rivals.kronfluence(losses, train, queries, noise),
        }

    def whole_loop(timings: dict[str, timing.Timing]) -> dict[str, timing.Timing]:
        """All of the loop's time but that of its queries grows with the part it was timed on."""
        before = timings.pop(BEFORE_LOOP, None)
        if before is not None and LOOP in timings:
            factor = count / part
            timings[LOOP] = timings[LOOP].scaled(factor, (1 - factor) * before.median)
        return timings

    layers = floors.influence_layers((encoder, decoder), (queries[:1], queries.new_zeros(1, latent_dim)))
    return harness.Trial(
        contestants,
        [expected],
        TOLERANCE,
        [LOOP, BEFORE_LOOP],
        operations=floors.influence_operations(layers, count, num_queries),
        adjust=whole_loop,
        notes={LOOP: f"from the time for {part} training images, each of which costs the same, and for none"},
    )


def memory_probe(train: int, queries: int, draws: int, device: str) -> timing.Contestant:
    """Top 20 of every query by the paper's MNIST model, warmed up with a few images."""
    torch.manual_seed(0)
    model = fastvae.VAE(architectures.tracin_encoder(), architectures.tracin_decoder(), beta=4.0).to(device)
    x, q = (torch.rand(count, 784, device=device).round() for count in (train, queries))

    def tracin(images: Tensor) -> fastvae.influence.TracIn:
        return fastvae.influence.TracIn(model, images, [None], lambda *_: 1.0, num_samples=draws)

    tracin(x[:8]).influence(q[:2])
    return lambda: tracin(x).influence(q, k=min(20, train))


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(harness.parser(__doc__), arguments)
    train, queries, draws = sizes = (40, 4, 2) if options.quick else (9000, 100, 16)
    title = f"784-1024-512-256-256 / 128-256-512-1024-784, S = {draws}, {train} x {queries}, top 20"
    memory = harness.MemoryCase("memory", title, {OURS: (memory_probe, *sizes)}, {"2 GiB": 2**31})
    packages = ("captum", "kronfluence")
    all_cases = cases(options.quick)
    harness.Benchmark("tracin", "TracIn", all_cases, [memory], TARGETS, packages=packages).run(options)

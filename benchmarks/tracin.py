"""TracIn against the ways it is computed elsewhere: scores of all pairs of training images and queries.

    python benchmarks/tracin.py [--cpu | --cuda] [--quick] [--threads 2]
    python benchmarks/tracin.py --memory       peak memory of the 3.0M-parameter model of Kong and Chaudhuri (NeurIPS
                                               2021), S = 16, 9,000 x 100 images

Every contestant computes the same losses with the same noise, one draw a sample, and is timed only if its scores agree
with those of materialised gradients in float64. The loop of the authors' code and captum's fast mode, which knows only
the last layer, are marked as what they are; a loop is timed on a part of the training images and scaled up.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent))

import common  # noqa: E402
import tracin_rivals as rivals  # noqa: E402

import fastvae  # noqa: E402

TOLERANCE = 1e-4
"""|difference| / |scores|: float32 round-off against float64."""

OURS, LOOP, VMAP = "ours", "loop, one backward a sample", "vmap(grad), one product"
GRAM, DENSE, CAPTUM = (
    "Gram route, plain PyTorch",
    "dense gradients, one product",
    "captum TracInCPFast, last layer only",
)
LOOPED = 16
"""Training images that the loop is timed on."""


@dataclass(frozen=True)
class Case:
    key: str
    title: str
    networks: Callable[[], tuple[nn.Module, nn.Module]]
    shape: tuple[int, ...]
    train: int
    queries: int
    seconds: float


@dataclass(frozen=True)
class Target:
    """against / ours is at least the bound."""

    case: str
    against: str
    bound: float


TARGETS = [
    Target("mlp", VMAP, 150),
    Target("mlp", LOOP, 400),
    Target("mlp", GRAM, 1.2),
    Target("conv", VMAP, 5),
    Target("conv", DENSE, 1.5),
]


def mlp(*widths: int) -> tuple[nn.Module, nn.Module]:
    size, hidden, latent = widths
    encoder = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
    return encoder, nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, size))


def convolutional(width: int) -> tuple[nn.Module, nn.Module]:
    """The networks for 64x64 images of Rhodes and Lee (NeurIPS 2021), at width 32."""
    w, hidden, latent = width, 8 * width, 10

    def down(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]

    def up(before: int, after: int) -> nn.Module:
        return nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)

    encoder = nn.Sequential(
        *down(1, w),
        *down(w, w),
        *down(w, 2 * w),
        *down(2 * w, 2 * w),
        nn.Flatten(),
        nn.Linear(32 * w, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 2 * latent),
    )
    decoder = nn.Sequential(
        nn.Linear(latent, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 32 * w),
        nn.ReLU(),
        nn.Unflatten(1, (2 * w, 4, 4)),
        *(layer for size in ((2 * w, 2 * w), (2 * w, w), (w, w)) for layer in (up(*size), nn.ReLU())),
        up(w, 1),
    )
    return encoder, decoder


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("mlp", "20-12-4, 24 x 7", lambda: mlp(20, 12, 2), (20,), 24, 7, 0.1),
            Case(
                "conv",
                "convolutional 64x64, width 2, 18 x 3",
                lambda: convolutional(2),
                (1, 64, 64),
                18,
                3,
                0.1,
            ),
        ]
    return [
        Case("mlp", "784-400-40 / 20-400-784, 512 x 128", lambda: mlp(784, 400, 20), (784,), 512, 128, 15),
        Case("conv", "beta-VAE 1x64x64, 256 x 64", lambda: convolutional(32), (1, 64, 64), 256, 64, 20),
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
        latent = self.model.latent_dim or self.model.encode(self.queries)[0].shape[1]
        self.noise = [rivals.noise_of(x, latent) for x in (self.train, self.queries)]
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
    problem = Problem(case, device)
    expected = problem.expected()
    part = min(LOOPED, case.train)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        OURS: lambda: lambda: problem.tracin.influence(problem.queries),
        DENSE: lambda: problem.rival(rivals.dense),
        VMAP: lambda: problem.rival(rivals.vmap_grad),
        LOOP: lambda: problem.rival(rivals.loop, part),
    }
    if case.key == "mlp":
        makers[GRAM] = lambda: problem.rival(rivals.gram)
        makers[CAPTUM] = lambda: rivals.captum_last_layer(
            problem.losses, problem.train, problem.queries, problem.noise
        )
    contestants: dict[str, common.Contestant] = {}
    errors, notes = {}, {}
    for name, make in makers.items():
        print(f"{case.title}: {name}", file=sys.stderr, flush=True)
        try:
            contestant = make()
            scores = contestant()
            if name != CAPTUM:
                wanted = expected[:, :part] if name == LOOP else expected
                errors[name] = common.relative_error([scores], [wanted])
                if not errors[name] <= TOLERANCE:
                    raise ArithmeticError(f"off by {errors[name]:.1e}, over {TOLERANCE:.0e}")
        except Exception as error:
            if name == OURS:
                raise
            notes[name] = f"not timed: {type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        contestants[name] = contestant
    clocks = dict.fromkeys(contestants, common.clock_of(device))
    timings = common.interleave(
        contestants, clocks, seconds=case.seconds, min_rounds=2 if options.quick else 5
    )
    milliseconds = {name: timing.median for name, timing in timings.items()}
    if LOOP in milliseconds:
        # The queries' passes are made once, those of training images and the pairs for each of them.
        milliseconds[LOOP] *= (case.train + case.queries) / (part + case.queries)
        notes[LOOP] = (
            f"timed on {part} training images, scaled by the number of backward passes (a lower bound)"
        )
    return {
        "case": case.key,
        "title": case.title,
        "timings_ms": timings,
        "ms": milliseconds,
        "ratio_to_ours": {name: ms / milliseconds[OURS] for name, ms in milliseconds.items()},
        "relative_error": errors,
        "notes": notes,
    }


def judge(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_case = {record["case"]: record for record in records}
    rows = []
    for target in TARGETS:
        measured = by_case[target.case]["ratio_to_ours"].get(target.against)
        reached = None if measured is None else measured >= target.bound
        rows.append(
            {
                "case": by_case[target.case]["title"],
                "against": target.against,
                "target": target.bound,
                "measured": measured,
                "reached": reached,
            }
        )
    return rows


def memory_probe(train: int, queries: int, draws: int) -> Callable[[], object]:
    """The MNIST model of Kong and Chaudhuri: top 20 of every query, warmed up with a few images."""

    def networks() -> tuple[nn.Module, nn.Module]:
        def chain(*widths: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for before, after in itertools.pairwise(widths):
                layers += [nn.Linear(before, after), nn.ReLU()]
            return nn.Sequential(*layers[:-1])

        return chain(784, 1024, 512, 256, 256), chain(128, 256, 512, 1024, 784)

    torch.manual_seed(0)
    model = fastvae.VAE(*networks(), beta=4.0)
    x, q = torch.rand(train, 784).round(), torch.rand(queries, 784).round()

    def tracin(images: Tensor) -> fastvae.influence.TracIn:
        return fastvae.influence.TracIn(model, images, [None], lambda *_: 1.0, num_samples=draws)

    tracin(x[:8]).influence(q[:2])

    def work() -> None:
        start = time.perf_counter()
        tracin(x).influence(q, k=min(20, train))
        seconds = time.perf_counter() - start
        print(f"{seconds:.1f} s, {1e6 * seconds / (train * queries):.2f} us a pair", file=sys.stderr)

    return work


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--memory", action="store_true", help="peak memory of the paper's model instead of times"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cuda", action="store_const", const="cuda", dest="device", help="(default if any)")
    device.add_argument("--cpu", action="store_const", const="cpu", dest="device")
    parser.add_argument("--output", type=Path, default=common.RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.memory:
        sizes = (40, 4, 2) if options.quick else (9000, 100, 16)
        peak = common.peak_extra_memory("tracin", "memory_probe", *sizes, threads=options.threads)
        print(f"{sizes[0]} x {sizes[1]}, S = {sizes[2]}: peak {peak / 2**20:.0f} MiB beyond model and images")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    records = [run_case(case, device, options) for case in cases(options.quick)]
    record = {
        "benchmark": "tracin",
        "environment": common.environment(device),
        "settings": {"threads": options.threads, "precision": "float32"},
        "cases": records,
        "targets": [] if options.quick else judge(records),
    }
    path = options.output / f"tracin-{common.device_slug(device)}{'-quick' if options.quick else ''}"
    common.write_json(path.with_suffix(".json"), record)
    text = ["# TracIn"]
    for target in record["targets"]:
        measured = "not measured" if target["measured"] is None else f"{target['measured']:.2f}x"
        verdict = {True: "reached", False: "missed", None: ""}[target["reached"]]
        text.append(
            f"- {target['case']}, {target['against']}: at least {target['target']:g}x, {measured} {verdict}"
        )
    for case in records:
        rows = [
            [name, f"{ms:.1f}", f"{case['ratio_to_ours'][name]:.2f}", case["notes"].get(name, "")]
            for name, ms in case["ms"].items()
        ]
        rows += [[name, "", "", note] for name, note in case["notes"].items() if name not in case["ms"]]
        text += [
            f"## {case['title']}",
            common.markdown_table(["contestant", "median, ms", "/ ours", ""], rows),
        ]
    environment = [
        [name, str(value)] for name, value in {**record["environment"], **record["settings"]}.items()
    ]
    text.append(common.markdown_table(["", "value"], environment))
    path.with_suffix(".md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()

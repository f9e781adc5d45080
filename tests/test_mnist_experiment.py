"""HVAE against VAE on MNIST (benchmarks/papers): the whole experiment in small, and its statistics."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae.lowering import lower

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.papers.mnist_hvae import __main__ as script
from benchmarks.papers.mnist_hvae import comparison, training
from benchmarks.papers.mnist_hvae.networks import build, networks

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ["HVAE", "VAE, equal steps", "VAE, equal time"]
STEPS = 8
"""Three batches an epoch: two whole epochs and a part of the third."""

Experiment = Callable[..., dict[str, Any]]


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """Runs the script on 60 images of 4x4 (54 to train, 6 to test); its results."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)

    def run(*arguments: str, folder: str = "states", seeds: int = 1) -> dict[str, Any]:
        fixed = f"--data {tmp_path}/images.npz --checkpoint {tmp_path}/{folder} --out {tmp_path}/out"
        sizes = f"--steps {STEPS} --num-samples 7 --batch-size 20 --leapfrog-steps 3 --seeds {seeds}"
        script.main([*fixed.split(), *sizes.split(), *arguments])
        return dict(json.loads((tmp_path / "out" / "mnist_hvae.json").read_text()))

    return run


def scores(folder: Path, name: str) -> Tensor:
    found = json.loads((folder / name).read_text())["scores"]["nll"]
    return torch.tensor(found, dtype=torch.float64)


def test_experiment_in_small(
    experiment: Experiment, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = experiment(seeds=2)
    assert [(row["seed"], row["model"]) for row in results["models"]] == [
        (seed, name) for seed in (0, 1) for name in MODELS
    ]
    assert results["settings"]["test_images"] == 6
    for seed in (0, 1):
        hvae, equal_steps, equal_time = (row for row in results["models"] if row["seed"] == seed)
        assert hvae["steps"] == equal_steps["steps"] == STEPS
        # An estimate from the pace so far; only a stall of the machine makes it wrong by as much.
        assert equal_time["seconds"] < 10 * hvae["seconds"] + 1
        assert len(hvae["alpha"]) == len(hvae["step_size"]) == 3
        states = tmp_path / "states" / f"seed-{seed}"
        for name, file in (
            ("VAE, equal steps", "vae/scores-steps.json"),
            ("VAE, equal time", "vae/scores-time.json"),
        ):
            paired = scores(states, "hvae/scores-steps.json") - scores(states, file)
            row = next(r for r in results["differences"] if (r["against"], r["seed"]) == (name, seed))
            assert row["difference"] == pytest.approx(float(paired.mean()), rel=1e-12)
            assert row["se_images"] == pytest.approx(float(paired.std()) / math.sqrt(6), rel=1e-12)
    printed, errors = capfd.readouterr()
    assert (tmp_path / "out" / "mnist_hvae.md").read_text() in printed
    assert all(name in printed for name in MODELS)
    assert not errors, "progress bars belong on a terminal only"
    assert (tmp_path / "out" / "mnist_hvae.png").stat().st_size > 5000


def test_an_interrupted_run_goes_on_to_the_same_models(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = experiment(folder="whole")
    advance = training.Run.advance

    def interrupted(self: training.Run, epochs: int, keep: int) -> None:
        if self.epochs == 1 and isinstance(self.model, fastvae.HVAE):
            raise KeyboardInterrupt
        advance(self, epochs, keep)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment()
    resumed = experiment("--resume")
    # How many steps an equal time allows is measured anew; all else is the same, bit for bit.
    for name in ("hvae/scores-steps.json", "vae/scores-steps.json"):
        first, second = (scores(tmp_path / folder / "seed-0", name) for folder in ("whole", "states"))
        assert torch.equal(first, second)
    curves = [results["curves"][0]["points"] for results in (whole, resumed)]
    assert [point["steps"] for point in curves[0]] == [3, 6]
    for first, second in zip(*curves, strict=True):
        assert (first["steps"], first["test_loss"]) == (second["steps"], second["test_loss"])


def test_scores_are_kept_until_their_settings_change(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment()
    counts: list[int] = []
    score = comparison.score

    def counted(model: Any, x: Tensor, num_samples: int, label: str) -> tuple[Tensor, Tensor]:
        counts.append(num_samples)
        return score(model, x, num_samples, label)

    monkeypatch.setattr(comparison, "score", counted)
    # The seconds of a part of an epoch are measured again, so that "equal time" may come out otherwise.
    experiment("--resume")
    assert len(counts) <= 1
    counts.clear()
    experiment("--resume", "--num-samples", "9")
    assert counts == [9, 9, 9]


def test_folders_are_not_mixed_up(experiment: Experiment) -> None:
    with pytest.raises(SystemExit, match="found none"):
        experiment("--resume")
    experiment("--steps", "1")
    with pytest.raises(SystemExit, match="--resume, or another"):
        experiment()
    with pytest.raises(SystemExit, match=r"same settings, found lr 0\.001"):
        experiment("--resume", "--lr", "0.01")


def test_both_models_start_alike_and_see_the_same_order(tmp_path: Path) -> None:
    arguments = argparse.Namespace(leapfrog_steps=3, step_size=0.1, device="cpu")
    images = torch.arange(30.0).reshape(30, 1, 1, 1).expand(30, 1, 2, 2) / 30
    seen: dict[str, list[Tensor]] = {"HVAE": [], "VAE": []}
    starts = {}
    for kind, batches in seen.items():
        model = build(kind, (1, 2, 2), 5, arguments)
        starts[kind] = [p.clone() for p in (*model.encoder.parameters(), *model.decoder.parameters())]
        run = training.Run(model, tmp_path / kind, images, images[:4].round(), 5, 10, 1e-3)
        run.loader.collate_fn = lambda batch, batches=batches: batches.append(batch[0]) or batch
        run.stop_at(7)
    assert all(map(torch.equal, starts["HVAE"], starts["VAE"]))
    assert len(seen["VAE"]) >= 7
    assert all(map(torch.equal, seen["HVAE"], seen["VAE"]))


def test_networks_are_the_papers() -> None:
    encoder, decoder = networks((1, 28, 28))
    assert encoder(torch.zeros(2, 1, 28, 28)).shape == (2, 128)
    assert decoder(torch.zeros(2, 64)).shape == (2, 1, 28, 28)
    shapes = [tuple(layer.weight.shape) for layer in encoder if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert shapes == [(16, 1, 5, 5), (32, 16, 5, 5), (32, 32, 5, 5), (450, 512), (128, 450)]
    assert lower(decoder).spec.count("conv_transpose2d") == 3


def test_score_of_a_model_with_constant_weights_is_exact() -> None:
    encoder, decoder = nn.Linear(5, 4), nn.Linear(2, 5)
    for parameter in (*encoder.parameters(), decoder.weight):
        nn.init.zeros_(parameter)
    x = torch.randint(0, 2, (120, 5), generator=torch.Generator().manual_seed(0)).float()
    nll, half = comparison.score(fastvae.VAE(encoder, decoder), x, 5, "")
    logits = decoder.bias.detach().expand_as(x)
    exact = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1).double()
    # float32 sums of five terms of order 1.
    torch.testing.assert_close(nll, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half, exact, rtol=1e-5, atol=1e-5)


def test_halves_make_up_the_whole_estimate() -> None:
    torch.manual_seed(0)
    model = fastvae.VAE(nn.Linear(5, 4), nn.Linear(2, 5))
    x = torch.randint(0, 2, (3, 5)).float()
    nll, half = comparison.score(model, x, 11, "")
    whole = model.log_likelihood(x, 11, generator=torch.Generator().manual_seed(0))
    # The same noise, drawn in two parts; float32.
    torch.testing.assert_close(nll, -whole.double(), rtol=1e-5, atol=1e-5)
    # By Jensen, up to the halves' unequal sizes.
    assert bool((half >= nll - 0.05).all())


def test_differences_of_given_scores() -> None:
    def rows(hvae: list[float], steps: list[float], time: list[float]) -> dict[str, dict[str, Any]]:
        return {
            name: {"nll": values, "nll_half": [value + 1 for value in values]}
            for name, values in zip(MODELS, (hvae, steps, time), strict=True)
        }

    found = comparison.differences([rows([1, 2], [2, 5], [1, 1]), rows([3, 3], [2, 2], [4, 5])])
    equal_steps = {row["seed"]: row for row in found if row["against"] == "VAE, equal steps"}
    # Differences -1, -3 and 1, 1; averaged over seeds 0, -1.
    assert [equal_steps[seed]["difference"] for seed in (0, 1, None)] == [-2, 1, -0.5]
    assert [equal_steps[seed]["se_images"] for seed in (0, 1, None)] == pytest.approx([1, 0, 0.5])
    assert equal_steps[None]["sd_seeds"] == pytest.approx(3 / math.sqrt(2))
    assert equal_steps[0]["sd_seeds"] is None
    assert equal_steps[None]["lower_share"] == 0.5
    assert all(row["difference_half"] == row["difference"] for row in found)

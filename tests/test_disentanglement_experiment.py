"""JL1-VAE against beta-VAE on three dots (benchmarks/papers): the whole experiment in small."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastvae
from fastvae.lowering import lower

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.papers.disentanglement import __main__ as script
from benchmarks.papers.disentanglement import comparison
from benchmarks.papers.disentanglement.networks import build, networks

pytestmark = pytest.mark.usefixtures("one_thread")

Experiment = Callable[..., dict[str, Any]]


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """Runs the script on images of 10x10; its results."""

    def run(*arguments: str, folder: str = "states") -> dict[str, Any]:
        fixed = (
            f"--checkpoint {tmp_path}/{folder} --out {tmp_path}/out --size 10 --batch-size 4 --epoch-steps 3"
        )
        sizes = "--steps 9 --seeds 2 --points 60 --clusters 2 --test-images 20 --rho 0.3 1"
        script.main([*fixed.split(), *sizes.split(), *arguments])
        return dict(json.loads((tmp_path / "out" / "disentanglement.json").read_text()))

    return run


def test_experiment_in_small(
    experiment: Experiment, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = experiment()
    assert [(row["seed"], row["model"], row["steps"]) for row in results["runs"]] == [
        (seed, kind, 9) for seed in (0, 1) for kind in comparison.MODELS
    ]
    for row in results["runs"]:
        assert all(0 <= row[f"{name} {rho}"] <= 1 for name in comparison.SCORES for rho in ("0.3", "1"))
        assert row["elbo"] < 0 < row["jacobian_l1"] and 0 <= row["active"] <= 10
    assert [(row["score"], row["rho"]) for row in results["summary"]] == [
        (label, rho) for label in comparison.SCORES.values() for rho in (0.3, 1)
    ]
    assert results["settings"]["anneal_steps"] == 3
    printed, errors = capfd.readouterr()
    assert (tmp_path / "out" / "disentanglement.md").read_text() in printed
    assert not errors, "progress bars belong on a terminal only"
    assert (tmp_path / "out" / "disentanglement.png").stat().st_size > 5000


@pytest.mark.slow
def test_penalty_lowers_what_it_penalises_at_little_cost(tmp_path: Path) -> None:
    """Whether local scores follow, small images and few steps do not say (local MIG: +0.000 +- 0.002)."""
    sizes = "--size 12 --seeds 2 --steps 600 --epoch-steps 200 --lr 3e-3 --beta 0.5 --gamma 0.02"
    scores = "--points 100 --clusters 1 --test-images 200 --rho 1"
    script.main([*f"{sizes} {scores} --checkpoint {tmp_path}/states --out {tmp_path}".split()])
    runs = json.loads((tmp_path / "disentanglement.json").read_text())["runs"]
    for without, with_it in zip(runs[::2], runs[1::2], strict=True):
        assert (without["model"], with_it["model"]) == comparison.MODELS
        assert with_it["jacobian_l1"] < 0.9 * without["jacobian_l1"]
        # Of -30 nats. Seeds differ by 0.3.
        assert with_it["elbo"] > without["elbo"] - 1


def without_times(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "ms_per_step")} for row in results["runs"]]


def test_an_interrupted_run_goes_on_to_the_same_models(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = experiment(folder="whole")
    train_to = comparison.Run.train_to

    def interrupted(self: comparison.Run, epoch: int) -> None:
        if (self.seed, self.kind, epoch) == (0, "JL1-VAE", 2):
            raise KeyboardInterrupt
        train_to(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(comparison.Run, "train_to", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment()
    # Out of time at once: the round that was begun is finished, and all models are at the same step.
    limited = experiment("--resume", "--minutes", "0")
    assert {row["steps"] for row in limited["runs"]} == {6}
    resumed = experiment("--resume")
    assert without_times(resumed) == without_times(whole)
    scored: list[str] = []
    monkeypatch.setattr(comparison, "_score", lambda run, arguments: scored.append(run.kind))
    assert without_times(experiment("--resume")) == without_times(whole) and not scored


def test_folders_are_not_mixed_up(experiment: Experiment) -> None:
    with pytest.raises(SystemExit, match="found none"):
        experiment("--resume")
    experiment("--seeds", "1", "--steps", "3")
    with pytest.raises(SystemExit, match="--resume, or another"):
        experiment()
    with pytest.raises(SystemExit, match=r"same settings, found seeds 1, gamma 0\.1"):
        experiment("--resume", "--gamma", "0.2", "--steps", "3")


def test_both_models_start_alike_and_differ_by_the_penalty(tmp_path: Path) -> None:
    arguments = script.parse(["--size", "10", "--steps", "30", "--checkpoint", str(tmp_path)])
    beta, ours = (build(kind, 5, arguments) for kind in comparison.MODELS)
    assert all(map(torch.equal, beta.parameters(), ours.parameters()))
    assert isinstance(ours, fastvae.JacobianL1VAE) and not isinstance(beta, fastvae.JacobianL1VAE)
    assert beta.beta == ours.beta == 4 and ours.penalties[0].gamma == 0.1
    assert {p.anneal_steps for model in (beta, ours) for p in model.penalties} == {10}
    x = next(iter(comparison.start(arguments)[0].loader))
    assert x.dtype == torch.uint8 and x.shape == (64, 1, 10, 10)


def test_networks_are_the_papers() -> None:
    encoder, decoder = networks(64)
    assert encoder(torch.zeros(2, 1, 64, 64)).shape == (2, 20)
    assert decoder(torch.zeros(2, 10)).shape == (2, 1, 64, 64)
    channels = [layer.out_channels for layer in (*encoder, *decoder) if hasattr(layer, "out_channels")]
    assert channels == [32, 32, 64, 64, 64, 32, 32, 1]
    features = [layer.out_features for layer in (*encoder, *decoder) if isinstance(layer, nn.Linear)]
    assert features == [256, 20, 256, 1024] and lower(decoder).spec.count("conv_transpose2d") == 4


def test_summary_of_given_scores() -> None:
    values = {"beta-VAE": [0.1, 0.2, 0.6], "JL1-VAE": [0.2, 0.5, 0.4]}
    rows = [
        {"seed": seed, "model": kind, "mig 0.1": scores[seed], "modularity 0.1": 0.5}
        for kind, scores in values.items()
        for seed in range(3)
    ]
    found = comparison.summaries(rows, [0.1])
    assert (found[0]["beta-VAE"], found[0]["JL1-VAE"]) == (0.2, 0.4)
    assert found[0]["JL1-VAE range"] == "0.200 to 0.500" and found[0]["JL1-VAE published"] == 0.123
    # Differences 0.1, 0.3, -0.2.
    assert found[0]["difference"] == pytest.approx(0.2 / 3)
    assert found[0]["difference_se"] == pytest.approx(
        math.sqrt((0.1**2 + 0.3**2 + 0.2**2 - 0.04 / 3) / 2 / 3)
    )
    assert found[1]["difference"] == found[1]["difference_se"] == 0

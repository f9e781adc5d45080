"""HVAE against VAE to convergence (benchmarks/papers/converged) in small: stopped, resumed, and its statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.papers.converged import __main__ as script
from benchmarks.papers.converged import report, training

pytestmark = pytest.mark.usefixtures("one_thread")

Experiment = Callable[..., dict[str, Any]]


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """Runs the script on 60 images of 4x4 (54 not to test); its results, if there are any."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)

    def run(*arguments: str, folder: str = "states") -> dict[str, Any]:
        fixed = f"--data {tmp_path}/images.npz --checkpoint {tmp_path}/{folder} --out {tmp_path}/{folder}-out"
        sizes = (
            "--seeds 2 --validation 14 --num-samples 7 --batch-size 20 --window 2 --gain 1e-3 --max-epochs 4"
        )
        ais = "--ais-images 3 --ais-temperatures 4 --leapfrog-steps 2"
        script.main([*f"{fixed} {sizes} {ais}".split(), *arguments])
        file = tmp_path / f"{folder}-out" / "converged.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    return run


def test_the_experiment_in_small(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = experiment()
    rows = results["runs"]
    assert [(row["seed"], row["model"]) for row in rows] == [(0, "VAE"), (0, "HVAE"), (1, "VAE"), (1, "HVAE")]
    for row in rows:
        assert len(row["nll"]) == 6 and len(row["ais"]) == 3
        losses = row["curve"]["validation"]
        assert row["validation"] == min(losses) == losses[row["best_epoch"] - 1]
        assert row["epochs"] == 4 or row["converged"]
        kept = {
            path.stem
            for path in (tmp_path / "states" / f"seed-{row['seed']}" / row["model"].lower()).glob("*.pt")
        }
        assert kept == {f"epoch-{row['best_epoch']:04d}", f"epoch-{row['epochs']:04d}"}
    measures = [(line["measure"], line["seed"]) for line in results["differences"]]
    assert measures[:6] == [(name, seed) for name in ("NLL", "AIS") for seed in ("0", "1", "all")]
    text = capsys.readouterr().out
    assert (tmp_path / "states-out" / "converged.md").read_text() in text and "83.20" in text
    assert (tmp_path / "states-out" / "converged.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="pass --resume"):
        experiment()
    # What a run that was stopped at any epoch comes to, but for its seconds.
    assert experiment("--minutes", "0", folder="stopped") == {}
    for minutes in ("0.0005", "0.001"):
        experiment("--minutes", minutes, "--resume", folder="stopped")
    resumed = experiment("--resume", folder="stopped")["runs"]
    for row, other in zip(rows, resumed, strict=True):
        assert {key: row[key] for key in row if key != "seconds"} == {
            key: other[key] for key in other if key != "seconds"
        }


def row(model: str, losses: list[float], seconds: float, nll: list[float], seed: int = 0) -> dict[str, Any]:
    steps = [10 * (epoch + 1) for epoch in range(len(losses))]
    curve = {"steps": steps, "validation": losses}
    return {"seed": seed, "model": model, "steps": steps[-1], "seconds": seconds, "nll": nll, "curve": curve}


def test_differences_are_paired_and_at_equal_cost() -> None:
    vae = row("VAE", [9, 7, 6, 5], 8.0, [1.0, 2.0, 4.0])
    hvae = row("HVAE", [8, 4], 40.0, [0.0, 2.0, 2.0])
    nll, steps, seconds = report.paired([vae, hvae])
    assert nll["difference"] == pytest.approx(-1) and nll["error"] == pytest.approx(1 / math.sqrt(3))
    # 20 steps of each: 4 against 7. 8 seconds: less than an epoch of the HVAE's 20.
    assert steps["difference"] == -3 and steps["measure"] == "validation -ELBO within 20 steps"
    assert seconds["difference"] == math.inf
    assert report.best_within(hvae, "seconds", 20.0) == 8
    assert report.paired([vae]) == []


def test_when_a_model_has_converged() -> None:
    class Fake(training.Unit):
        def __init__(self, losses: list[float], window: int, gain: float) -> None:
            self.history = training.fastvae.History(val_loss=list(losses), steps=list(range(len(losses))))
            self.arguments = script.parse(["--window", str(window), "--gain", str(gain)])

    assert not Fake([5, 4, 3], 2, 0.5).converged
    assert not Fake([5, 5], 2, 0.5).converged
    assert Fake([5, 3, 2.9, 3.2], 2, 0.5).converged
    # A loss that rises has gained nothing.
    assert Fake([5, 3, 4, 4], 2, 0.5).converged
    assert not Fake([5, 3, 4, 2.4], 2, 0.5).converged

"""The experiments on influence (benchmarks/papers) in small: closed forms, sampling error, retrieval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastvae

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.papers.influence import __main__ as influence
from benchmarks.papers.influence import measures
from benchmarks.papers.retrieval import __main__ as retrieval
from benchmarks.papers.retrieval import experiment

pytestmark = pytest.mark.usefixtures("one_thread")


def test_closed_forms_are_what_refits_give() -> None:
    rows = [row for count in (60, 240) for row in measures.closed_forms(count, queries=10, seed=0)]
    for row in rows:
        # Exact but for round-off; the mixture's to first order, of terms that are at most 1 / N_c each.
        bound = 1e-12 if row["density"] != "Gaussian mixture, first order" else 100 * row["train"] ** -2.0
        assert row["error"] <= bound * max(1.0, row["largest"] * row["train"]), row
    kernels = [row for row in rows if row["density"] == "kernel density"]
    assert all(row["own_strongest"] == 1 for row in kernels)
    mixture = [row for row in rows if row["density"].startswith("Gaussian")]
    assert -2.5 < measures.slope(mixture, "train", "error") < -1.5


def test_influence_experiment_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--points 30 60 --queries 5 --draws 16 128 --reference 2048 --trials 4 --pairs 6 --epochs 2"
    sizes += " --checkpoints 1 8"
    words = [*sizes.split(), "--out", str(tmp_path), "--checkpoint", str(tmp_path / "run")]
    influence.main(words)
    results = json.loads((tmp_path / "influence.json").read_text())
    assert {row["train"] for row in results["classical"]} == {30, 60}
    assert -0.8 < results["settings"]["sampling_slope"] < -0.2
    one, eight = results["noise"]
    assert eight["fresh"] > max(eight["common"], one["fresh"]), "errors average out over checkpoints"
    assert (tmp_path / "influence.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "influence.png").stat().st_size > 5000
    for name in ("classical-60.json", "noise-8-2.json", "run/epoch-0008.pt", "run/history.json"):
        (tmp_path / "run" / name).unlink()
    kept = (tmp_path / "run" / "sampling.json").stat().st_mtime_ns
    influence.main([*words, "--resume"])
    again = json.loads((tmp_path / "influence.json").read_text())
    assert again == results and (tmp_path / "run" / "sampling.json").stat().st_mtime_ns == kept


def test_ranks_and_what_is_made_of_them() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0])
    assert experiment.ranks(scores).tolist() == [4, 1, 2.5, 2.5, 5]
    assert experiment.rank_correlation(scores, scores.exp()) == pytest.approx(1)
    assert experiment.rank_correlation(scores, -scores) == pytest.approx(-1)


def test_retrieval_experiment_in_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    bright = np.zeros((60, 3, 3, 3), dtype=np.uint8)
    bright[np.arange(60), labels] = 200
    pixels = bright.reshape(60, 9, 3) + generator.integers(0, 50, (60, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "foreign.npz", images=generator.integers(0, 2, (9, 9, 3), dtype=np.uint8) * 255)

    def run(*more: str) -> dict[str, Any]:
        files = f"--data {tmp_path}/images.npz --foreign {tmp_path}/foreign.npz --out {tmp_path}/out"
        sizes = "--hidden 1 --queries 6 --epochs 20 --checkpoints 2 --num-samples 4 --width 16 --latent-dim 2"
        states = f"--lr 0.01 --beta 0.1 --batch-size 10 --checkpoint {tmp_path}/states"
        retrieval.main([*f"{files} {sizes} {states}".split(), *more])
        return dict(json.loads((tmp_path / "out" / "retrieval.json").read_text()))

    results = run()
    assert len(fastvae.History.load(tmp_path / "states" / "plain" / "history.json").checkpoints) == 2
    # The share of labels right is 1/3 by chance.
    assert results["retrieval"]["same_label_of_ten"] > 0.5
    assert results["foreign"]["found"][-1] == 1 and results["foreign"]["auroc"] > 0.8
    assert (tmp_path / "out" / "retrieval.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "out" / "retrieval.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="--resume, or another"):
        run()
    shares = results["retrieval"]["own_strongest_by_checkpoints"]
    assert len(shares) == 2 and shares[-1] == results["retrieval"]["own_strongest"]
    assert results["foreign"]["area"] <= results["foreign"]["largest_area"] == 1
    monkeypatch.setattr(experiment, "tracin_of", None)
    assert run("--resume") == results, "scores are kept"
    assert run("--resume", "--skip-common-noise", "--name", "other") == results, "written elsewhere"
    other = json.loads((tmp_path / "out" / "other.json").read_text())
    shared = results["retrieval"].copy()
    assert shared.pop("own_strongest_common_noise") <= 1 and other["retrieval"] == shared
    with pytest.raises(SystemExit):
        run("--resume", "--epochs", "5")


def test_checkpoints_add_up(tmp_path: Path) -> None:
    x = torch.rand(12, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    words = "--epochs 3 --checkpoints 3 --num-samples 2 --width 8 --latent-dim 2 --lr 0.01 --batch-size 5"
    arguments = retrieval.parse(words.split())
    model, history = experiment.trained(x, tmp_path, arguments)
    together = experiment.tracin_of(model, x, history.checkpoints, arguments).influence(x[:4])
    one_by_one = [
        experiment.scores_of(
            lambda of: experiment.tracin_of(model, x, [of], arguments), x[:4], path, tmp_path / path.stem
        )
        for path in history.checkpoints
    ]
    # float32, sums of some hundred products, in another order.
    torch.testing.assert_close(sum(one_by_one), together, rtol=1e-4, atol=1e-5 * float(together.abs().max()))


def test_losses_are_means_over_draws(tmp_path: Path) -> None:
    x = torch.rand(7, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    arguments = retrieval.parse(
        ["--epochs", "1", "--checkpoints", "1", "--width", "8", "--latent-dim", "2", "--num-samples", "4000"]
    )
    model, _ = experiment.trained(x, tmp_path, arguments)
    found = experiment.mean_loss(model, x, arguments)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        each = torch.stack([model(one.expand(4000, -1, -1, -1), noise=noise[None]) for one in x]).double()
    error = each.std(1) * (2 / 4000) ** 0.5
    assert ((found - each.mean(1)).abs() < 5 * error).all()


def test_networks_are_the_papers() -> None:
    encoder, decoder = fastvae.architectures.tracin_encoder(), fastvae.architectures.tracin_decoder()
    count = sum(p.numel() for network in (encoder, decoder) for p in network.parameters())
    assert round(count / 1e6, 1) == 3.0
    assert encoder(torch.zeros(2, 1, 28, 28)).shape == (2, 256)
    assert decoder(torch.zeros(2, 128)).shape == (2, 784)

"""The experiment of consistency regularisation: it runs at a tiny size, resumes, and reports what it measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import fastvae
from benchmarks.papers.consistency import __main__ as consistency
from fastvae import metrics

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")


def test_networks_are_the_same_for_a_seed_and_fit_images_and_flow() -> None:
    for network in consistency.NETWORKS:
        models = [
            consistency.build(network, kind, consistent, (1, 28, 28), 3, "nearest")
            for kind in consistency.MODELS
            for consistent in (False, True)
        ]
        for model in models:
            assert torch.equal(next(model.decoder.parameters()), next(models[0].decoder.parameters()))
            assert model.latent_dim == consistency.LATENTS
            fastvae.lowering.lower(model.decoder)
            if network == "convolutional":
                assert torch.isfinite(model(torch.rand(2, 1, 28, 28).round())).all()


@pytest.mark.slow
def test_runs_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--epochs",
        "1",
        "--seeds",
        "2",
        "--num-samples",
        "2",
        "--test-images",
        "4",
        "--networks",
        "dense",
    ]
    words += ["--checkpoint", str(tmp_path / "states"), "--out", str(tmp_path), "--data", "digits"]
    consistency.main(words)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "consistency.json").read_text())
    assert len(results["runs"]) == 2 * 2 * len(consistency.MODELS)
    for line in results["summary"]:
        runs = [
            run
            for run in results["runs"]
            if run["model"] == line["model"] and run["consistent"] == line["consistent"]
        ]
        # Written with six digits.
        assert line["seeds"] == 2 and line["mi"] == pytest.approx(
            sum(run["mi"] for run in runs) / 2, rel=1e-5
        )
        assert re.search(rf"\| dense +\| {re.escape(line['name'])} +\| 2 ", printed)
    with pytest.raises(SystemExit, match="pass --resume"):
        consistency.main(words)
    consistency.main([*words, "--resume"])
    assert capsys.readouterr().out == printed


def test_differences_are_paired_by_seed() -> None:
    # Seeds differ by 10, each pair by 1, 1 and 4: the spread over seeds would hide it.
    nll = {False: (100.0, 110.0, 120.0), True: (99.0, 109.0, 116.0)}
    rows = [
        {**dict.fromkeys((*consistency.MEASURES, "nll_error"), 0.0), "network": "dense", "model": "VAE"}
        | {"consistent": consistent, "seed": seed, "nll": nll[consistent][seed]}
        for seed in (2, 0, 1)
        for consistent in (True, False)
    ]
    without, line = consistency.summary(rows)
    assert "nll_gain" not in without and line["nll_gain"] == -2
    assert line["nll_gain_error"] == pytest.approx(1)  # sqrt(3) / sqrt(3)
    settings = dict.fromkeys(
        (
            "data",
            "train_images",
            "epochs",
            "batch_size",
            "test_images",
            "num_samples",
            "interpolation",
            "torch",
        ),
        0,
    )
    assert "-2.00 ± 1.00" in consistency.as_text([without, line], settings)


def test_measures_are_those_of_the_model() -> None:
    model = consistency.build("dense", "VAE", True, (1, 4, 4), 0, "nearest")
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(40, 1, 4, 4, generator=generator).round(), torch.arange(40) % 3
    arguments = consistency.parse(["--num-samples", "3", "--test-images", "10"])
    row = consistency.measure(model, (x[:30], labels[:30]), (x[30:], labels[30:]), arguments)
    nll = metrics.negative_log_likelihood(model, x[30:], 3)
    assert (row["nll"], row["nll_error"]) == nll and row["active"] == metrics.active_units(model, x[:30])
    codes = metrics.posteriors(model, x)[0]
    split = (codes[:30], labels[:30], codes[30:], labels[30:])
    assert row["knn"] == metrics.knn_accuracy(*split) and row["linear"] == metrics.linear_probe(*split)

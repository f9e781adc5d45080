"""Fashion-MNIST against MNIST (benchmarks/papers): the whole experiment in small, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvae
from benchmarks.papers.likelihood_regret import __main__ as script
from benchmarks.papers.likelihood_regret.report import gained, published_for
from benchmarks.papers.likelihood_regret.training import resized, trained
from fastvae.metrics import ood_metrics

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def test_the_experiment_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for name in ("known", "other"):
        np.savez(tmp_path / f"{name}.npz", images=generator.integers(0, 256, (40, 8, 8), dtype=np.uint8))
    arguments = ["--data", str(tmp_path / "known.npz"), "--ood", str(tmp_path / "other.npz")]
    arguments += ["--checkpoint", str(tmp_path / "states"), "--out", str(tmp_path / "out")]
    arguments += ["--steps", "2", "--background-steps", "1", "--checkpoint-steps", "1", "--batch-size", "4"]
    arguments += [
        "--width",
        "2",
        "--latent-dim",
        "3",
        "--images",
        "4",
        "--num-samples",
        "2",
        "--regret-steps",
        "1",
    ]
    script.main(arguments)
    first = json.loads((tmp_path / "out" / "likelihood_regret.json").read_text())
    assert (tmp_path / "out" / "likelihood_regret.png").read_bytes().startswith(b"\x89PNG")
    assert "published" in capsys.readouterr().out
    scores = first["scores"]
    assert {"NLL", "regret", "regret, posterior", "likelihood ratio", "complexity, png"} <= set(scores)
    assert all(len(values) == 4 for by_set in scores.values() for values in by_set.values())
    assert [row["score"] for row in first["measures"]] == list(scores)
    with pytest.raises(SystemExit, match="pass --resume"):
        script.main(arguments)

    def computed(*_: object) -> None:
        raise AssertionError("scores are kept")

    monkeypatch.setattr(fastvae.VAE, "log_likelihood", computed)
    script.main([*arguments, "--resume"])
    assert json.loads((tmp_path / "out" / "likelihood_regret.json").read_text()) == first
    script.main([*arguments, "--resume", "--regrets", "regret"])
    fewer = json.loads((tmp_path / "out" / "likelihood_regret.json").read_text())["scores"]
    assert fewer == {name: scores[name] for name in scores if name != "regret, posterior"}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_regret_finds_what_the_likelihood_takes_for_likely(tmp_path: Path) -> None:
    """The paper's claim in small: foreign images that are simpler have the higher likelihood, and the higher regret."""
    generator = np.random.default_rng(0)
    known, other = np.zeros((2, 400, 32, 32), dtype=np.uint8)
    for image, foreign in zip(known, other, strict=True):
        height, width = generator.integers(16, 28, 2)
        top, left = (32 - height) // 2, (32 - width) // 2
        texture = generator.normal(generator.uniform(80, 220), 20, (height, width))
        image[top : top + height, left : left + width] = texture.clip(0, 255)
        row, column = generator.integers(2, 22, 2)
        foreign[row : row + 8, column : column + 2] = foreign[row : row + 2, column : column + 8] = 200
    np.savez(tmp_path / "known.npz", images=known)
    np.savez(tmp_path / "other.npz", images=other)
    words = (
        f"--data {tmp_path}/known.npz --ood {tmp_path}/other.npz --checkpoint {tmp_path}/s --out {tmp_path}"
    )
    words += " --steps 400 --background-steps 20 --batch-size 16 --width 4 --latent-dim 8 --images 12"
    script.main(f"{words} --num-samples 20 --regret-steps 50 --name small".split())
    results = json.loads((tmp_path / "small.json").read_text())
    found = {row["score"]: row["auroc"] for row in results["measures"]}
    # 1.0 and 0.06 with this seed; the paper 0.99 and "far below 0.5".
    assert found["NLL"] < 0.3 < 0.9 < found["regret"]


def test_steps_are_those_asked_for(tmp_path: Path) -> None:
    images = fastvae.data.ImageDataset(torch.zeros(8, 1, 32, 32, dtype=torch.uint8))
    words = f"--ood - --checkpoint {tmp_path} --checkpoint-steps 2 --batch-size 4 --width 2 --latent-dim 3".split()

    def weights(folder: str, *steps: int) -> torch.Tensor:
        for count in steps:
            arguments = script.parse([*words, "--checkpoint", str(tmp_path / folder), "--steps", str(count)])
            model = trained(images, arguments, background=False)
        history = fastvae.History.load(tmp_path / folder / "model" / "history.json")
        assert history.steps[-1] == count
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    at_once = weights("one", 5)
    assert torch.equal(weights("two", 3, 5), at_once), "stopped within an epoch"
    assert torch.equal(weights("three", 6, 5), at_once), "more than asked for were taken before"


def test_published_figures_are_of_one_pair_of_data_sets() -> None:
    assert published_for("fashion-mnist", "mnist10k.npz")["regret"] == "0.99"
    assert not published_for("mnist10k.npz", "fashion-mnist")


def test_scores_of_the_same_images_are_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    known, foreign = torch.randn(2, 60, generator=generator)
    noise = torch.randn(2, 60, generator=generator)
    other = {"in": known, "out": foreign + 1}
    assert gained(other, other, "in", "out") == (0, 0, 0)
    # Nearly the same scores, a little worse: a difference far below the spread over images, 0.04 of an AUROC.
    score = {"in": known + 0.1 * noise[0], "out": foreign + 0.9 + 0.1 * noise[1]}
    gain, low, high = gained(score, other, "in", "out", 200)
    found = [ood_metrics(of["in"], of["out"]) for of in (score, other)]
    assert gain == pytest.approx(found[0].auroc - found[1].auroc, abs=1e-12)
    widths = [high - low, found[0].auroc_interval[1] - found[0].auroc_interval[0]]
    assert low < gain < high and widths[0] < widths[1] / 3


def test_images_are_resized_to_bytes() -> None:
    images = fastvae.data.ImageDataset(torch.full((2, 1, 28, 28), 200, dtype=torch.uint8))
    assert torch.equal(resized(images, 3).images, torch.full((2, 3, 32, 32), 200, dtype=torch.uint8))
    with pytest.raises(SystemExit, match="expected 1 channels"):
        resized(fastvae.data.ImageDataset(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), 1)

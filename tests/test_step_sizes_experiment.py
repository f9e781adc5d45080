"""HVAE's step sizes on colour images (benchmarks/papers/step_sizes) in small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.papers.step_sizes import __main__ as script

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_of_every_model_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    sizes = "--steps 4 --seeds 2 --batch-size 9 --leapfrog-steps 1"
    words = f"--data {tmp_path}/images.npz --out {tmp_path} --checkpoint {tmp_path}/run".split()
    script.main([*words, *sizes.replace("--seeds 2", "--seeds 1").split()])
    first = (tmp_path / "run" / "0-0.json").stat().st_mtime_ns
    # Killed in the second model of the second seed, say: what was done before is kept.
    (tmp_path / "run" / "3-0.json").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="expected the same settings, found steps 4"):
        script.main([*words, *sizes.replace("--steps 4", "--steps 5").split(), "--resume"])
    script.main([*words, *sizes.split(), "--resume"])
    assert (tmp_path / "run" / "0-0.json").stat().st_mtime_ns == first
    found = json.loads((tmp_path / "step_sizes.json").read_text())
    assert [(row["model"], row["seed"]) for row in found["runs"]] == [
        (kind, seed) for seed in (0, 1) for kind in script.MODELS
    ]
    lines = {line["model"]: line for line in found["summary"]}
    by_hand = [
        ours["loss"] - vae["loss"]
        for ours, vae in zip(found["runs"][1 :: len(lines)], found["runs"][:: len(lines)], strict=True)
    ]
    adapted = lines["HVAE, adapted, target 0.65"]
    assert adapted["gain"] == pytest.approx(sum(by_hand) / 2) and adapted["diverged"] == 0
    assert adapted["step_size"] < 0.1 < lines["HVAE, 0.2, trained"]["step_size"]
    text = (tmp_path / "step_sizes.md").read_text()
    assert "25 colour images" in text and text.strip() in capsys.readouterr().out


def test_runs_that_diverged_are_counted_and_left_out() -> None:
    row = {"acceptance": None, "step_size": None, "seconds": 1.0, "worst": 3.0, "seed": 0, "diverged": False}
    rows = [row | {"model": "VAE", "loss": 5.0}, row | {"model": "HVAE, 0.2, trained", "loss": 4.0}]
    rows += [rows[0] | {"seed": 1}, rows[1] | {"seed": 1, "loss": math.inf, "diverged": True}]
    line = script.summary(rows)[3]
    assert (line["seeds"], line["diverged"], line["gain"], line["below"]) == (2, 1, -1.0, 1)

"""The Jacobian penalty of decoders with kinks (benchmarks/papers): the experiment in small, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from benchmarks.papers.kinks import __main__ as script
from benchmarks.papers.kinks import report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_experiment_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = (
        "--codes 32768 --directions 8 --gamma 0.1 --small-gamma 0.01 --seeds 2 --steps 20 --small-steps 40"
    )
    words = f"{sizes} --width 8 --latent-dim 2 --out {tmp_path} --checkpoint {tmp_path}/run".split()
    script.main(words)
    results = json.loads((tmp_path / "kinks.json").read_text())
    rows = {(row["activation"], row["estimator"]): row for row in results["gradients"]}
    exact, longest = rows["ReLU", "exact"], rows["ReLU", "difference, step 0.1"]
    # 0.41 and 0.06, of which 0.05 are sampling's, over these seeds' directions.
    assert exact["bias"] > 0.2 > 2 * longest["bias"]
    noises = [row["noise"] for (name, _), row in rows.items() if name == "ReLU"]
    assert noises == sorted(noises), "a shorter step sees kinks more rarely, and each for more"
    assert all(row["bias"] < 0.05 for (name, _), row in rows.items() if name == "Softplus")
    assert len(results["runs"]) == 2 * 2 * 2 * 2 and len(results["summary"]) == 2 * 2 * 2
    assert (tmp_path / "kinks.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "kinks.png").stat().st_size > 5000
    # As if it had been killed before its last training: that one is done again, to the same end.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    newest = max(before, key=lambda path: before[path])
    newest.unlink()
    with pytest.raises(SystemExit, match="holds an earlier run: pass --resume"):
        script.main(words)
    script.main([*words, "--resume"])
    after = {path: path.stat().st_mtime_ns for path in before}
    changed = {path.name for path in before if after[path] != before[path]}
    assert changed == {newest.name, "settings.json"}
    assert json.loads((tmp_path / "kinks.json").read_text())["runs"] == results["runs"]


def test_gains_are_paired_by_seed() -> None:
    rows = [
        {
            **dict.fromkeys(("reconstruction", "kl", "penalty"), 1.0),
            **{"network": "small", "activation": "ReLU", "gamma": 1.0, "seed": seed},
            **{"estimator": estimator, "objective": 10.0 * seed - (seed + 1) * (estimator != "exact")},
        }
        for seed in (0, 1)
        for estimator in ("exact", "difference")
    ]
    exact, difference = report.summaries(rows)
    assert exact["gain"] is None and difference["gain"] == pytest.approx(1.5)
    assert difference["gain_error"] == pytest.approx(0.5)

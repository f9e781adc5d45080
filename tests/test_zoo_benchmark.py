"""The zoo's benchmark runs, and its table says what is lowered."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import zoo
from test_benchmarks import read, run_quick
from zoo import table


@pytest.mark.slow
def test_quick_run_times_what_runs_and_says_why_not(tmp_path: Path) -> None:
    names = ["mlp", "layernorm-mlp", "pythae-mlp"]
    printed = run_quick(tmp_path, "--only", ",".join(names), script="zoo")
    record = read(tmp_path / "zoo-cpu-quick.json")
    installed = [name for name in names if zoo.is_installed(zoo.ZOO[name])]
    assert [entry["name"] for entry in record["entries"]] == installed
    for entry in record["entries"]:
        assert not entry["notes"]
        for result, task in zip(entry["results"], ("flow", "jacobian"), strict=True):
            assert (result["task"], result["batch"], result["threads"]) == (task, 4, 1)
            ours, eager = (result["timings_ms"][name]["median"] for name in ("ours", "careful eager"))
            assert result["speed_up"] == eager / ours
            assert max(result["relative_error"].values()) < 1e-4
    # Reverse over forward of LayerNorm is wrong in PyTorch.
    ways = {entry["name"]: entry["results"][1]["eager"] for entry in record["entries"]}
    assert ways["mlp"] == "jvp" and ways["layernorm-mlp"] == "reverse over reverse"
    median = statistics.median(entry["results"][0]["speed_up"] for entry in record["entries"])
    assert f"| {median:.2f} " in printed
    assert (tmp_path / "zoo-cpu-quick.png").stat().st_size > 0
    assert (tmp_path / "zoo-cpu-quick.md").read_text().strip() == printed.strip()


@pytest.mark.slow
def test_quick_run_of_the_encoders_times_regret_and_tracin(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, "--only", "mlp", "--width", "1", script="encoders")
    (entry,) = read(tmp_path / "encoders-cpu-quick.json")["entries"]
    assert [result["task"] for result in entry["results"]] == ["regret", "tracin"] and entry["kernels"]
    assert all(result["speed_up"] > 0 for result in entry["results"])
    assert (tmp_path / "encoders-cpu-quick.md").read_text().strip() == printed.strip()


def test_the_table_says_what_is_lowered_and_why_not() -> None:
    found = {row.name: row for row in table.rows(zoo.ZOO[name] for name in ("mlp", "lstm"))}
    assert found["mlp"].lowered and not found["mlp"].reason
    assert bool(found["lstm"].reason) != found["lstm"].lowered
    text = table.markdown(found.values())
    assert "| mlp | own | yes |" in text and f"{1 + found['lstm'].lowered} of 2 lowered." in text

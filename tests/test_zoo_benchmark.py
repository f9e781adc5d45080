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
    stem = f"zoo-{'-'.join(names)}-cpu-quick"
    cases = read(tmp_path / f"{stem}.json")["cases"]
    installed = [name for name in names if zoo.is_installed(zoo.ZOO[name])]
    tasks = [f"{task}, batch 4, threads 1" for task in ("flow", "jacobian")]
    assert [(case["decoder"], case["task"]) for case in cases] == [(n, t) for n in installed for t in tasks]
    for case in cases:
        ours, eager = (timing["median"] for timing in case["timings_ms"].values())
        assert case["ratio_to_ours"]["careful eager"] == pytest.approx(eager / ours, rel=1e-4)
        assert max(case["relative_error"].values()) < 1e-4
    # Reverse over forward of LayerNorm is wrong in PyTorch.
    reversed_by = {case["decoder"]: case["notes"] for case in cases if case["task"] == tasks[1]}
    assert reversed_by["mlp"] == {}
    assert reversed_by["layernorm-mlp"] == {"careful eager": "reverse over reverse"}
    median = statistics.median(
        case["ratio_to_ours"]["careful eager"] for case in cases if case["task"] == tasks[0]
    )
    assert f"| {median:.2f} (" in printed
    assert (tmp_path / f"{stem}.png").stat().st_size > 0
    assert (tmp_path / f"{stem}.md").read_text().strip() == printed.strip()


@pytest.mark.slow
def test_quick_run_of_the_encoders_times_regret_and_tracin(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, "--only", "mlp", "--width", "1", script="encoders")
    cases = read(tmp_path / "encoders-mlp-cpu-quick.json")["cases"]
    assert [(case["task"], case["kernels"]) for case in cases] == [("regret", "yes"), ("tracin", "yes")]
    assert all(len(case["timings_ms"]) == 2 for case in cases)
    assert (tmp_path / "encoders-mlp-cpu-quick.md").read_text().strip() == printed.strip()


def test_the_table_says_what_is_lowered_and_why_not() -> None:
    found = {row.name: row for row in table.rows(zoo.ZOO[name] for name in ("mlp", "lstm"))}
    assert found["mlp"].lowered and not found["mlp"].reason
    assert bool(found["lstm"].reason) != found["lstm"].lowered
    text = table.markdown(found.values())
    assert "| mlp | own | yes |" in text and f"{1 + found['lstm'].lowered} of 2 lowered." in text

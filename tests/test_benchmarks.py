"""The benchmarks run at tiny sizes and write what they say; their floors count what they should. No time is judged."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import peer
from torch import nn

import fastvae
from benchmarks.speed import (
    ais,
    command,
    common,
    consistency,
    floors,
    flow,
    flow_report,
    flow_rivals,
    jacobian,
    likelihoods,
    log_likelihood,
    models,
    networks,
    regret,
    report,
    suite_problem,
    suite_problems,
    suite_report,
    targets,
    tracin,
)
from fastvae import reference

ROOT = Path(__file__).parents[1]

CPU = torch.device("cpu")


def run_quick(folder: Path, *options: str, script: str = "flow") -> str:
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed",
        script,
        "--quick",
        "--cpu",
        "--threads",
        "1",
        "--output",
        str(folder),
    ]
    places = [str(Path(fastvae.__file__).parents[1]), str(ROOT)]
    # pytest-benchmark measures nothing where it sees tests side by side; a benchmark is none of them.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, *options],
        cwd=folder,  # which has no fastvae: -m would find it first, before a build that lies elsewhere
        env={**outer, "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for path in folder.glob("*-quick.json"):
        assert failures(read(path)) == [], path.name
    return done.stdout


def failures(record: dict[str, Any]) -> list[str]:
    """Why contestants were left out, but for those that are not installed: a benchmark goes on without a rival."""
    notes = [note["note"] for note in record.get("notes", ())]
    for case in record.get("cases", ()):
        notes += [note for note in case.get("notes", {}).values() if note.startswith("not timed")]
    for entry in record.get("entries", ()):
        notes += [note for note in entry["notes"] if "left out" not in note]
    return [note for note in notes if "ModuleNotFoundError" not in note]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_quick_run_times_every_contestant_and_writes_its_results(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, "--no-jax")
    record = read(tmp_path / "flow-cpu-quick.json")
    assert (tmp_path / "flow-cpu-quick.md").read_text(encoding="utf-8").strip() == printed.strip()
    assert (tmp_path / "flow-cpu-quick.png").stat().st_size > 0
    assert record["environment"]["device"] == "CPU" and record["settings"]["threads"] == 1
    assert [case["case"] for case in record["cases"]] == ["mlp", "conv"]
    for case in record["cases"]:
        names = {flow_report.OURS, flow_report.RECOMPUTE, flow_report.EAGER_2K, flow_report.EAGER}
        assert names <= set(case["timings_ms"]) and case["notes"] == {}
        for timing in case["timings_ms"].values():
            assert 0 < timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"]
        assert set(case["floor_ms"]) == {report.FLOOR, report.STACKED, report.FLOPS}
        assert max(case["relative_error"].values()) <= flow.TOLERANCE


@pytest.mark.slow
def test_quick_memory_run_writes_the_peaks_at_both_numbers_of_steps(tmp_path: Path) -> None:
    run_quick(tmp_path, "--memory")
    record = read(tmp_path / "flow-memory-cpu-quick.json")
    assert [(row["memory"], set(row["bytes"])) for row in record["memory"]] == [
        (memory, {"5", "50"}) for memory in ("recompute", "store")
    ]


@pytest.mark.parametrize("case", flow.cases(quick=True), ids=lambda case: case.key)
def test_functional_flow_agrees_with_the_reference(case: flow.Case) -> None:
    problem = flow.Problem(case, CPU)
    expected = problem.contestant(reference.hamiltonian_flow)()
    result = problem.contestant(flow_rivals.functional_flow)()
    assert common.relative_error(result, expected) <= flow.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", flow.cases(quick=True), ids=lambda case: case.key)
def test_jax_agrees_with_ours(case: flow.Case) -> None:
    pytest.importorskip("jax")
    p = flow.Problem(case, CPU)
    jax = flow_rivals.JaxFlow(p.decoder, p.z, p.rho, p.x, p.step_size, p.alpha, threads=1)
    expected = p.contestant(fastvae.ops.hamiltonian_flow)()
    assert common.relative_error(jax.tensors(), expected) <= flow.TOLERANCE


def test_relative_error_of_nan_is_nan_and_passes_no_bound() -> None:
    error = common.relative_error(
        [torch.ones(2), torch.tensor([float("nan")])], [torch.ones(2), torch.ones(1)]
    )
    assert not error <= flow.TOLERANCE


@pytest.mark.slow
def test_quick_run_of_the_likelihoods_times_every_one(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, script="likelihoods")
    record = read(tmp_path / "likelihoods-cpu-quick.json")
    assert [case["likelihood"] for case in record["cases"]] == list(likelihoods.LIKELIHOODS)
    for case in record["cases"]:
        assert all(case[task]["speed_up"] > 0 for task in likelihoods.TASKS)
    assert "| ZeroInflatedNegativeBinomial |" in printed and "## log_px: median" in printed


def test_quick_run_of_annealed_importance_sampling_times_every_contestant(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, script="ais")
    (case,) = read(tmp_path / "ais-cpu-quick.json")["cases"]
    assert list(case["timings_ms"]) == list(case["relative_error"]) == [ais.OURS, ais.TEXTBOOK, ais.CAREFUL]
    assert all(error < 1e-5 for error in case["relative_error"].values())
    assert (tmp_path / "ais-cpu-quick.md").read_text().strip() == printed.strip()


def test_quick_run_of_the_log_likelihood_times_every_contestant(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, script="log_likelihood")
    record = read(tmp_path / "log_likelihood-cpu-quick.json")
    names = [log_likelihood.OURS, log_likelihood.COPIES, log_likelihood.CAREFUL]
    (case,) = record["cases"]
    assert list(case["timings_ms"]) == list(case["relative_error"]) == names
    assert all(error < 1e-5 for error in case["relative_error"].values())
    assert (tmp_path / "log_likelihood-cpu-quick.md").read_text().strip() == printed.strip()


def test_each_case_is_written_as_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that ends the run, or a limit, takes nothing of what was measured before."""
    case = log_likelihood.cases(quick=True)[0]
    monkeypatch.setattr(
        log_likelihood, "cases", lambda quick: [case, dataclasses.replace(case, title="broken")]
    )
    real = log_likelihood.run_case

    def run_case(case: Any, options: Any) -> dict[str, Any]:
        if case.title == "broken":
            raise RuntimeError("the machine went away")
        return real(case, options)

    monkeypatch.setattr(log_likelihood, "run_case", run_case)
    with pytest.raises(RuntimeError, match="went away"):
        log_likelihood.main(["--quick", "--cpu", "--threads", "1", "--output", str(tmp_path)])
    (written,) = read(tmp_path / "log_likelihood-cpu-quick.json")["cases"]
    assert written["title"] == case.title
    assert case.title in (tmp_path / "log_likelihood-cpu-quick.md").read_text()


def test_a_rival_that_fails_fails_the_quick_test_and_one_that_is_not_installed_does_not() -> None:
    record = {
        "cases": [
            {"notes": {"a": "not timed: TypeError: expected an Observation", "b": "lax.scan with unroll=1"}},
            {"notes": {"a": "not timed: ModuleNotFoundError: No module named 'jax'"}},
        ],
        "entries": [{"notes": ["flow: RuntimeError: no rule", "flow, batch 64: left out, over 10 s a call"]}],
        "notes": [{"note": "ArithmeticError: differs from float64"}],
    }
    assert [note.split()[-1] for note in failures(record)] == ["float64", "Observation", "rule"]


def test_a_rival_that_fails_is_noted_and_ours_is_not_forgiven() -> None:
    def fail() -> Any:
        raise RuntimeError("no rule for this\nand a traceback")

    results, notes = command.those_that_run({"ours": lambda: 1, "theirs": fail}, "ours", "a case")
    assert results == {"ours": 1} and notes == {"theirs": "not timed: RuntimeError: no rule for this"}
    with pytest.raises(RuntimeError, match="no rule"):
        command.those_that_run({"ours": fail, "theirs": lambda: 1}, "ours", "a case")


def test_products_count_the_operations_of_a_linear_and_a_transposed_convolution() -> None:
    network = nn.Sequential(
        nn.Linear(3, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 5, 3, stride=2, padding=1)
    )
    linear, convolution = floors.products(network, torch.zeros(4, 3))
    assert linear == floors.Product(4, 3, 8, 2 * 4 * 3 * 8, True)
    # Along an axis 2 inputs meet 3 outputs: (0: taps 1, 2), (1: taps 0, 1), of 6 pairs.
    assert convolution == floors.Product(16, 2, 45, 2 * 4 * 2 * 5 * 4 * 4, False)
    assert floors.second_order_operations([linear], forces=11) == 6 * 11 * linear.operations


def test_targets_are_judged_on_the_right_side() -> None:
    def timing(median: float) -> common.Timing:
        return common.Timing(median, median, median, 5, 1)

    record = {
        "case": "mlp",
        "title": "a case",
        "timings_ms": {
            flow_report.OURS: timing(10),
            flow_report.EAGER: timing(20),
            flow_report.EAGER_2K: timing(20),
        },
        "floor_ms": {report.FLOOR: 9.0},
    }
    judged = {
        row["against"]: (row["measured"], row["reached"])
        for row in report.judge([record], "cpu", flow_report.TARGETS)
    }
    assert judged == {
        flow_report.EAGER_2K: (2.0, False),
        flow_report.EAGER: (2.0, True),
        flow_report.JAX: (None, None),
        report.FLOOR: (pytest.approx(10 / 9), True),
    }


def test_interleaved_rounds_give_each_contestant_its_turn() -> None:
    calls: list[str] = []
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    clocks = {"a": lambda run, repeats: (run(), 30.0)[1], "b": lambda run, repeats: (run(), 250.0)[1]}
    timings = common.interleave(contestants, clocks, seconds=0, min_rounds=4)
    assert {name: (timing.median, timing.rounds) for name, timing in timings.items()} == {
        "a": (30.0, 4),
        "b": (250.0, 4),
    }
    # After two calls each to set the repeats, a turn is a timed call, before it an untimed one for a short contestant,
    # and the order rotates.
    assert "".join(calls[4:]) == "aab" + "baa" + "aab" + "baa"


def test_a_failing_memory_probe_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"flow\.memory_probe.*failed"):
        common.peak_extra_memory(flow.__name__, "memory_probe", "no such case", threads=1)


def test_peak_extra_memory_sees_what_a_callable_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "touch.py").write_text(
        "import torch\n\ndef work(mib):\n    return lambda: torch.ones(mib * 2**18)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    touched = common.peak_extra_memory("touch", "work", 64, threads=1)
    assert 60 * 2**20 < touched < 80 * 2**20  # 64 MiB, give or take pages of the interpreter and the reading


@pytest.mark.slow
def test_quick_run_of_the_jacobian_times_every_contestant(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, script="jacobian")
    record = read(tmp_path / "jacobian-cpu-quick.json")
    names = [jacobian.OURS, *jacobian.RIVALS]
    for case in record["cases"]:
        assert list(case["timings_ms"]) == list(case["relative_error"]) == names, case["notes"]
        assert case["title"] in printed
    assert [row["contestant"] for row in record["memory"]] == names
    assert (tmp_path / "jacobian-cpu-quick.md").read_text().strip() == printed.strip()


@pytest.mark.slow
def test_quick_run_of_the_regret_times_every_contestant(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, script="regret")
    record = read(tmp_path / "regret-cpu-quick.json")
    assert [case["case"] for case in record["cases"]] == [
        "dcgan-steps",
        "dcgan-score",
        "mlp-steps",
        "mlp-score",
    ]
    for case in record["cases"]:
        vmapped = [regret.VMAP] if case["case"].endswith("steps") else []
        assert list(case["timings_ms"]) == [regret.OURS, regret.PUBLISHED, regret.CAREFUL, *vmapped]
        assert case["title"] in printed
    assert (tmp_path / "regret-cpu-quick.md").read_text().strip() == printed.strip()


def test_operations_of_a_step_count_three_products_of_the_encoder_and_two_of_the_decoder() -> None:
    model = regret.VAE(networks.mlp(5, 4, 6), networks.mlp(3, 7, 5))
    assert regret.operations_of(model, torch.zeros(1, 5)) == 6 * (5 * 4 + 4 * 6) + 4 * (3 * 7 + 7 * 5)


def test_tangent_floor_counts_three_products_of_every_layer_but_the_first() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    layers = floors.products(network, torch.zeros(7, 3))
    assert floors.tangent_operations(layers) == 3 * 2 * 7 * 4 * 5
    floors.tangent_floor(layers, CPU)()


@pytest.mark.slow
def test_quick_run_of_consistency_times_every_contestant(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, script="consistency")
    record = read(tmp_path / "consistency-cpu-quick.json")
    names = [consistency.OURS, consistency.PLAIN, consistency.TWICE, consistency.AUGMENT]
    assert [list(case["timings_ms"]) for case in record["cases"]] == [names] * 2
    assert all(case["ratio_to_plain"][consistency.PLAIN] == 1 for case in record["cases"])
    assert (tmp_path / "consistency-cpu-quick.md").read_text().strip() == printed.strip()


@pytest.mark.slow
def test_quick_run_of_the_models_times_every_contestant(tmp_path: Path) -> None:
    peer("pythae")
    printed = run_quick(tmp_path, script="models")
    record = read(tmp_path / "models-cpu-quick.json")
    assert [case["case"] for case in record["cases"]] == [
        "vae-mlp",
        "vae-conv",
        "vae-colour",
        "iwae-mlp",
        "hvae-mlp",
        "hvae-conv",
    ]
    for case in record["cases"]:
        assert list(case["timings_ms"]) == [models.OURS, models.EAGER, models.PYTHAE], case["notes"]
        assert max(case["relative_error"].values()) <= models.TOLERANCE
        assert (models.PYTHAE in case["relative_error"]) != case["case"].startswith("hvae")
    assert (tmp_path / "models-cpu-quick.md").read_text().strip() == printed.strip()


@pytest.mark.slow
def test_quick_run_of_scale_extrapolates_every_task(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, script="scale")
    record = read(tmp_path / "scale-cpu-quick.json")
    assert len(record["tasks"]) == 6
    for row in record["tasks"]:
        (few, first), (many, second) = row["timings_ms"].items()
        each = (second["median"] - first["median"]) / (int(many) - int(few))
        assert row["milliseconds_an_image"] == pytest.approx(each)
        assert row["hours_a_million"] == pytest.approx(each * 1e6 / 3.6e6)
    assert (tmp_path / "scale-cpu-quick.md").read_text().strip() == printed.strip()


def test_targets_of_all_results_are_on_one_page(tmp_path: Path) -> None:
    environment = {"device": "CPU", "commit": "abc", "torch, running": "2.13", "date": "today"}
    verdicts = [
        report.verdict("one", "ours", "theirs", 2, 3.0, at_most=False),
        report.verdict("two", "ours", "floor", 1.1, 1.2, at_most=True),
        report.verdict("three", "ours", "theirs", 2, None, at_most=False),
    ]
    assert [row["reached"] for row in verdicts] == [True, False, None]
    common.write_json(tmp_path / "it-cpu.json", {"environment": environment, "targets": verdicts})
    common.write_json(tmp_path / "it-cpu-quick.json", {"environment": environment, "targets": verdicts})
    common.write_json(tmp_path / "none-cpu.json", {"environment": environment, "targets": []})
    targets.main(["--output", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "1 of 3 targets reached" in text and "[it-cpu](it-cpu.md)" in text and text.count("##") == 1
    with pytest.raises(SystemExit):
        targets.main(["--output", str(tmp_path / "nowhere")])


def test_two_batches_are_the_same_objective() -> None:
    torch.manual_seed(0)
    model = fastvae.VAE(*networks.dense(4, 8, 4))
    x, view = torch.rand(2, 5, 1, 4, 4)
    penalised = fastvae.VAE(
        model.encoder, model.decoder, penalties=[fastvae.penalties.Consistency(lambda _: view, 0.3)]
    )
    noise = torch.zeros(1, 5, 4)
    model.draw_noise = lambda *_: noise  # type: ignore[method-assign]
    expected = penalised(x, noise=noise).mean()
    torch.testing.assert_close(consistency.two_batches(model, x, view, 0.3), expected)


@pytest.mark.slow
def test_quick_run_of_tracin_times_every_contestant(tmp_path: Path) -> None:
    peer("captum")
    printed = run_quick(tmp_path, script="tracin")
    record = read(tmp_path / "tracin-cpu-quick.json")
    of_both = {tracin.OURS, tracin.DENSE, tracin.VMAP, tracin.LOOP}
    of_mlp = of_both | {tracin.GRAM, tracin.CAPTUM, tracin.FAST}
    if importlib.util.find_spec("kronfluence"):  # of the extra bench
        of_mlp.add(tracin.KRONFLUENCE)
    for case, names in zip(record["cases"], (of_mlp, of_both), strict=True):
        assert set(case["timings_ms"]) == names, case["notes"]
        assert set(case["relative_error"]) == names - {tracin.FAST}
        assert max(case["relative_error"].values()) <= tracin.TOLERANCE
        assert case["ours_over_floor"][report.FLOPS] > 1
    assert (tmp_path / "tracin-cpu-quick.md").read_text().strip() == printed.strip()
    assert (tmp_path / "tracin-cpu-quick.png").stat().st_size > 0


@pytest.mark.slow
def test_quick_memory_run_of_tracin(tmp_path: Path) -> None:
    run_quick(tmp_path, "--memory", script="tracin")
    row = read(tmp_path / "tracin-memory-cpu-quick.json")["memory"]
    assert 0 <= row["bytes"] < tracin.MEMORY_BOUND and row["microseconds_a_pair"] > 0


def test_influence_floor_takes_the_cheaper_exact_route_of_each_layer() -> None:
    encoder = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4))
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 5, 3))
    layers = floors.influence_layers((encoder, decoder), (torch.zeros(1, 2, 3, 3), torch.zeros(1, 2)))
    assert layers == [
        floors.InfluenceLayer(4, 8, 3, True),
        floors.InfluenceLayer(1, 12, 4, False),
        floors.InfluenceLayer(1, 2, 8, False),
        floors.InfluenceLayer(4, 45, 2, False),
    ]
    # A dense layer goes by Gram matrices, a convolution by gradients.
    assert floors.influence_operations(layers[1:2], 5, 3) == 2 * (2 * 48 * 8 + 16 * 15)
    assert floors.influence_operations(layers[:1], 5, 3) == 2 * (4 * 24 * 8 + 4 * 24 * 8 + 24 * 15)


@pytest.mark.slow
def test_quick_run_of_the_suite_writes_its_report(tmp_path: Path) -> None:
    printed = run_quick(
        tmp_path,
        "--ops=grad_dot",
        "--sizes=small",
        "--seconds=0.01",
        "--no-jax",
        "--no-compile",
        script="suite",
    )
    record = read(tmp_path / "suite-grad_dot-cpu-quick.json")
    names = [suite_problem.OURS, suite_problem.EAGER, suite_problem.FAIR]
    assert [(row["direction"], row["contestant"]) for row in record["timings"]] == [
        (direction, name) for direction in (suite_problem.FORWARD, suite_problem.BACKWARD) for name in names
    ]
    for row in (*record["timings"], *record["scaling"]):
        times = list(row["percentiles_ms"].values())
        assert times[0] > 0 and times == sorted(times) and row["rounds"] >= 3
    assert all(row["floor_ms"] > 0 and row["relative_error"] < 1e-4 for row in record["timings"])
    assert {point["sweep"] for point in record["scaling"]} == {"grad_dot, N"}
    assert record["notes"] == [] and record["environment"]["device"] == "CPU"
    assert (tmp_path / "suite-grad_dot-cpu-quick.md").read_text().strip() == printed.strip()
    for figure in ("suite-grad_dot-cpu-quick.png", "suite-scaling-grad_dot-cpu-quick.png"):
        assert figure in printed and (tmp_path / figure).stat().st_size > 0


@pytest.mark.parametrize("operator", suite_problems.OPERATORS)
def test_rivals_of_every_operator_agree_with_float64(operator: str) -> None:
    problem = suite_problems.problem(operator, "small", CPU)
    for direction, cost in problem.costs.items():
        expected = problem.expected(direction)
        assert cost.operations + cost.bytes > 0
        for name in (suite_problem.OURS, suite_problem.EAGER, suite_problem.FAIR):
            suite_problem.checked(problem, name, direction, expected)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["gaussian_kl", "leapfrog_kick_drift", "jacobian_l1", "grad_dot"])
def test_jax_twins_of_the_operators_agree_with_float64(operator: str) -> None:
    pytest.importorskip("jax")
    problem = suite_problems.problem(operator, "small", CPU)
    for direction in problem.costs:
        suite_problem.checked(problem, suite_problem.JAX, direction, problem.expected(direction), threads=1)


def test_a_wrong_rival_is_not_timed() -> None:
    problem = suite_problems.problem("gaussian_kl", "small", CPU)
    doubled = {
        **problem.functions,
        suite_problem.FAIR: lambda _, mu, logvar: 2 * reference.gaussian_kl(mu, logvar),
    }
    wrong = dataclasses.replace(problem, functions=doubled)
    with pytest.raises(ArithmeticError, match="differs from float64"):
        suite_problem.checked(wrong, suite_problem.FAIR, "forward", problem.expected("forward"))


def test_floor_is_the_longer_of_operations_and_bytes() -> None:
    rates = suite_problem.Rates(gflops=100, gigabytes=10)
    assert suite_problem.Cost(operations=10**9).floor_ms(rates) == 10
    assert suite_problem.Cost(operations=10**8, bytes=10**8).floor_ms(rates) == 10


def test_percentiles_of_the_suite_are_milliseconds() -> None:
    found = suite_report.percentiles([0.001 * (1 + i) for i in range(21)])
    assert found == pytest.approx({"5": 2, "25": 6, "50": 11, "75": 16, "95": 20})
    assert set(suite_report.percentiles([0.5]).values()) == {500}


def test_the_suite_says_when_the_machine_was_disturbed() -> None:
    assert suite_report.disturbance([{"gflops": 200.0}, {"gflops": 140.0}]) == []
    (warning,) = suite_report.disturbance([{"gflops": 200.0}, {"gflops": 80.0}])
    assert "from 80 to 200 GFLOP/s" in warning


def test_steadiness_waits_for_the_speed_it_knows_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    times, naps = iter([*[1.0] * 20, 1.4, 2.0, 1.2, *[3.0] * 9]), []
    monkeypatch.setattr(common.Steadiness, "_sample", lambda _: next(times))
    monkeypatch.setattr(common.time, "sleep", naps.append)
    steadiness = common.Steadiness(CPU, patience=2)
    steadiness.wait()
    assert naps == []
    steadiness.wait()
    assert naps == [0.5]
    steadiness.wait()
    assert naps == [0.5] * 4  # its patience is at an end

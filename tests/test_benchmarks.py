"""The benchmarks run at tiny sizes and write what they say; their floors count what they should. No time is judged."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import peer
from torch import nn

import fastvae
from benchmarks import networks, writing
from benchmarks.rivals import jax_twins
from benchmarks.rivals.flow import functional_flow
from benchmarks.speed import (
    ais,
    consistency,
    floors,
    flow,
    harness,
    jacobian,
    likelihoods,
    log_likelihood,
    models,
    operators,
    regret,
    report,
    scale,
    targets,
    timing,
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
    done = subprocess.run(
        [*command, *options],
        cwd=folder,  # which has no fastvae: -m would find it first, before a build that lies elsewhere
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for path in folder.glob("*-quick.json"):
        assert failures(read(path)) == [], path.name
    return done.stdout


def failures(record: dict[str, Any]) -> list[str]:
    """Why contestants were left out, but for those that are not installed: a benchmark goes on without a rival."""
    notes = [note for case in record["cases"] for note in case["notes"].values()]
    return [n for n in notes if n.startswith("not timed") and "ModuleNotFoundError" not in n]


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
        names = {flow.OURS, flow.RECOMPUTE, flow.EAGER_2K, flow.EAGER}
        assert names <= set(case["timings_ms"]) and case["notes"] == {}
        for found in case["timings_ms"].values():
            assert 0 < found["lower_quartile"] <= found["median"] <= found["upper_quartile"]
        assert set(case["floor_ms"]) == {report.FLOOR, report.FLOPS}
        assert max(case["relative_error"].values()) <= flow.TOLERANCE


@pytest.mark.slow
def test_quick_memory_run_writes_the_peaks_at_both_numbers_of_steps(tmp_path: Path) -> None:
    run_quick(tmp_path, "--memory")
    (case,) = read(tmp_path / "flow-memory-cpu-quick.json")["cases"]
    memory = ("recompute", "store")
    assert list(case["bytes"]) == [f"ours, {kind}, K = {steps}" for kind in memory for steps in (5, 50)]


@pytest.mark.parametrize("size", flow.sizes(quick=True), ids=lambda size: size.key)
def test_functional_flow_agrees_with_the_reference(size: flow.Size) -> None:
    problem = flow.Problem(size, CPU)
    expected = problem.contestant(reference.hamiltonian_flow)()
    result = problem.contestant(functional_flow)()
    assert timing.relative_error(result, expected) <= flow.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("size", flow.sizes(quick=True), ids=lambda size: size.key)
def test_jax_agrees_with_ours_rolled_and_unrolled(size: flow.Size) -> None:
    pytest.importorskip("jax")
    p = flow.Problem(size, CPU)
    expected = p.contestant(fastvae.ops.hamiltonian_flow)()
    tensors = [p.z, p.rho, p.x, p.step_size, p.alpha, *p.decoder.parameters()]
    for loss in jax_twins.flow_losses(p.decoder):
        jax = jax_twins.JaxFunction([loss], tensors, threads=1)
        assert timing.relative_error(jax.tensors(), expected) <= flow.TOLERANCE


def test_relative_error_of_nan_is_nan_and_passes_no_bound() -> None:
    error = timing.relative_error(
        [torch.ones(2), torch.tensor([float("nan")])], [torch.ones(2), torch.ones(1)]
    )
    assert not error <= flow.TOLERANCE


@pytest.mark.slow
def test_quick_run_of_the_likelihoods_times_every_one(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, script="likelihoods")
    cases = read(tmp_path / "likelihoods-cpu-quick.json")["cases"]
    pairs = [(name, task) for name in likelihoods.LIKELIHOODS for task in likelihoods.TASKS]
    assert [(case["likelihood"], case["task"]) for case in cases] == pairs
    assert all(report.speed_up(case) > 0 for case in cases)
    assert "| ZeroInflatedNegativeBinomial " in printed and "## log_px" in printed


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


def options(folder: Path) -> harness.Options:
    words = ["--quick", "--cpu", "--threads", str(torch.get_num_threads()), "--output", str(folder)]
    return harness.parse(harness.parser("A benchmark."), words)


def test_each_case_is_written_as_it_ends(tmp_path: Path) -> None:
    """A case that ends the run, or a limit, takes nothing of what was measured before."""

    def build(options: harness.Options, broken: bool) -> harness.Trial:
        if broken:
            raise RuntimeError("the machine went away")
        return harness.Trial(harness.ready({"ours": lambda: 1, "theirs": lambda: 2}))

    cases = [harness.Case(key, key, build, (key == "broken",), 0.0) for key in ("whole", "broken")]
    with pytest.raises(RuntimeError, match="went away"):
        harness.Benchmark("it", "It", cases).run(options(tmp_path))
    (written,) = read(tmp_path / "it-cpu-quick.json")["cases"]
    assert written["title"] == "whole" and list(written["timings_ms"]) == ["ours", "theirs"]
    assert "## whole" in (tmp_path / "it-cpu-quick.md").read_text()


def test_a_part_is_written_under_its_own_name_and_an_unknown_one_is_named(tmp_path: Path) -> None:
    cases = [
        harness.Case(key, key, lambda _: harness.Trial(harness.ready({"ours": list})), (), 0.0)
        for key in "ab"
    ]
    chosen = options(tmp_path)
    chosen.only = "b"
    harness.Benchmark("it", "It", cases).run(chosen)
    assert [case["case"] for case in read(tmp_path / "it-b-cpu-quick.json")["cases"]] == ["b"]
    chosen.only = "b,c"
    with pytest.raises(SystemExit, match="nothing here is called c"):
        harness.Benchmark("it", "It", cases).run(chosen)


def test_a_rival_that_fails_or_is_wrong_is_noted_and_ours_is_not_forgiven() -> None:
    def fail() -> Any:
        raise RuntimeError("no rule for this\nand a traceback")

    ones = torch.ones(2)
    makers = {**harness.ready({"ours": lambda: ones, "wrong": lambda: 2 * ones}), "theirs": fail}
    trial = harness.Trial(makers, [ones.double()], 1e-5)
    found, errors = harness.checked(harness.Case("a case", "a case", lambda _: trial), trial)
    assert list(found) == ["ours"] and errors == {"ours": 0}
    assert trial.notes == {
        "wrong": "not timed: ArithmeticError: differs from float64 by 1.0e+00, over 1e-05",
        "theirs": "not timed: RuntimeError: no rule for this",
    }
    assert failures({"cases": [{"notes": trial.notes}]}) == list(trial.notes.values())
    for broken in (harness.ready({"ours": lambda: 2 * ones}), {"ours": fail}):
        trial = harness.Trial(broken, [ones.double()], 1e-5)
        with pytest.raises((ArithmeticError, RuntimeError)):
            harness.checked(harness.Case("a case", "a case", harness.Trial), trial)


def test_what_is_not_installed_is_no_failure() -> None:
    notes = {"JAX": "not timed: ModuleNotFoundError: No module named 'jax'", "HVAE": "another objective"}
    assert failures({"cases": [{"notes": notes}]}) == []


def test_products_count_the_operations_of_a_linear_and_a_transposed_convolution() -> None:
    network = nn.Sequential(
        nn.Linear(3, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 5, 3, stride=2, padding=1)
    )
    linear, convolution = floors.products(network, torch.zeros(4, 3))
    assert linear == floors.Product(4, 3, 8, 2 * 4 * 3 * 8)
    # Along an axis 2 inputs meet 3 outputs: (0: taps 1, 2), (1: taps 0, 1), of 6 pairs.
    assert convolution == floors.Product(16, 2, 45, 2 * 4 * 2 * 5 * 4 * 4)
    assert floors.gemm_operations([linear, convolution], 22) == 66 * (
        linear.operations + convolution.operations
    )
    floors.gemm_floor([linear, convolution], 2, CPU)()


def test_targets_are_judged_on_the_right_side() -> None:
    def timed(median: float) -> timing.Timing:
        return timing.Timing(median, median, median, 5, 1)

    record = {
        "case": "mlp",
        "title": "a case",
        "timings_ms": {
            flow.OURS: timed(10),
            flow.EAGER: timed(20),
            flow.EAGER_2K: timed(20),
        },
        "floor_ms": {report.FLOOR: 9.0},
    }
    judged = {
        row["against"]: (row["measured"], row["reached"])
        for row in report.judge([record], "cpu", flow.TARGETS)
    }
    assert judged == {
        flow.EAGER_2K: (2.0, False),
        flow.EAGER: (2.0, True),
        flow.JAX: (None, None),
        report.FLOOR: (pytest.approx(10 / 9), True),
    }
    memory = {"case": "memory", "title": "memory", "bytes": {jacobian.OURS: 10, jacobian.BATCHED: 100}}
    (row,) = report.judge([memory], "cpu", jacobian.TARGETS)
    assert (row["target"], row["measured"], row["reached"]) == ("at most 0.125x", 0.1, True)


def test_interleaved_rounds_give_each_contestant_its_turn() -> None:
    calls: list[str] = []
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}

    def clock(run: timing.Contestant, repeats: int) -> float:
        run()
        return {"a": 30.0, "b": 250.0}[calls[-1]]

    timings = timing.interleave(contestants, seconds=0, min_rounds=4, clock=clock)
    assert {name: (found.median, found.rounds) for name, found in timings.items()} == {
        "a": (30.0, 4),
        "b": (250.0, 4),
    }
    # After what warms up and a call that sets the repeats, a turn is a timed call, before it an untimed one for a short
    # contestant, and the order rotates.
    learned = len(contestants) * (timing.WARM_UP + 1)
    assert "".join(calls[learned:]) == "aab" + "baa" + "aab" + "baa"


def test_a_failing_memory_probe_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"flow\.memory_probe.*failed"):
        timing.peak_extra_memory(flow.memory_probe, "no such case", threads=1)


def test_peak_extra_memory_sees_what_a_callable_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "touch.py").write_text(
        "import torch\n\ndef work(mib):\n    return lambda: torch.ones(mib * 2**18)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    touched = timing.peak_extra_memory(importlib.import_module("touch").work, 64, threads=1)
    assert 60 * 2**20 < touched < 80 * 2**20  # 64 MiB, give or take pages of the interpreter and the reading


@pytest.mark.slow
def test_quick_run_of_the_jacobian_times_every_contestant(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, "--no-jax", script="jacobian")
    names = list(jacobian.PENALTIES)
    for case in read(tmp_path / "jacobian-cpu-quick.json")["cases"]:
        assert list(case["timings_ms"]) == list(case["relative_error"]) == names, case["notes"]
        exact = (jacobian.OURS, jacobian.JACFWD, jacobian.JVP)  # of some gradients, differences are far off
        assert max(case["relative_error"][name] for name in exact) < 1e-4
        assert case["title"] in printed
    assert (tmp_path / "jacobian-cpu-quick.md").read_text().strip() == printed.strip()
    run_quick(tmp_path, "--memory", script="jacobian")
    (case,) = read(tmp_path / "jacobian-memory-cpu-quick.json")["cases"]
    assert list(case["bytes"]) == names


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
    """But of the encoder's first layer, whose input needs no gradient, only two."""
    model = regret.VAE(networks.mlp(5, 4, 6), networks.mlp(3, 7, 5))
    expected = 4 * 5 * 4 + 6 * 4 * 6 + 4 * (3 * 7 + 7 * 5)
    assert regret.operations_of_step(model, torch.zeros(1, 5)) == expected


@pytest.mark.slow
def test_quick_run_of_consistency_times_every_contestant(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, script="consistency")
    cases = read(tmp_path / "consistency-cpu-quick.json")["cases"]
    assert {case["case"] for case in cases} == set(consistency.KEYS)
    names = [consistency.OURS, consistency.PLAIN, consistency.TWICE, consistency.AUGMENT]
    assert [list(case["timings_ms"]) for case in cases] == [names] * 4
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
    cases = read(tmp_path / "scale-cpu-quick.json")["cases"]
    assert len(cases) == 6 and all(f"| {case['title']} " in printed for case in cases)
    assert (tmp_path / "scale-cpu-quick.md").read_text().strip() == printed.strip()


def test_the_time_of_one_more_image_leaves_out_what_is_done_once() -> None:
    few, many = (timing.Timing(5.0 + 2 * count, 0, 0, 5, 1) for count in (10, 30))
    record = {"title": "a task", "timings_ms": {"10": few, "30": many}}
    assert scale.each_image(record) == pytest.approx(2)
    (table,) = scale.summary([record])
    assert "| 2 ms     | 0.556 h                 | 0.035 h" in table


def test_targets_of_all_results_are_on_one_page(tmp_path: Path) -> None:
    environment = {"device": "CPU", "commit": "abc", "torch, running": "2.13", "date": "today"}
    verdicts = [
        report.verdict("one", "ours", "theirs", 2, 3.0, at_most=False),
        report.verdict("two", "ours", "floor", 1.1, 1.2, at_most=True),
        report.verdict("three", "ours", "theirs", 2, None, at_most=False),
    ]
    assert [row["reached"] for row in verdicts] == [True, False, None]
    writing.write_json(tmp_path / "it-cpu.json", {"environment": environment, "targets": verdicts})
    writing.write_json(tmp_path / "it-cpu-quick.json", {"environment": environment, "targets": verdicts})
    writing.write_json(tmp_path / "none-cpu.json", {"environment": environment, "targets": []})
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
    of_mlp = of_both | {tracin.GRAM, tracin.CAPTUM}
    if importlib.util.find_spec("kronfluence"):  # of the extra bench
        of_mlp.add(tracin.KRONFLUENCE)
    for case, names in zip(record["cases"], (of_mlp, of_both), strict=True):
        assert set(case["timings_ms"]) == names, case["notes"]
        assert set(case["relative_error"]) == names - {tracin.LOOP}  # of which a part is timed, and checked
        assert max(case["relative_error"].values()) <= tracin.TOLERANCE
        assert case["ours_over_floor"][report.FLOPS] > 1
    assert (tmp_path / "tracin-cpu-quick.md").read_text().strip() == printed.strip()
    assert (tmp_path / "tracin-cpu-quick.png").stat().st_size > 0


@pytest.mark.slow
def test_quick_memory_run_of_tracin(tmp_path: Path) -> None:
    run_quick(tmp_path, "--memory", script="tracin")
    (case,) = read(tmp_path / "tracin-memory-cpu-quick.json")["cases"]
    assert 0 <= case["bytes"][tracin.OURS] < case["bytes"]["2 GiB"]


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
def test_quick_run_of_the_operators_times_every_contestant(tmp_path: Path) -> None:
    run_quick(tmp_path, "--no-jax", script="operators")
    cases = read(tmp_path / "operators-cpu-quick.json")["cases"]
    keys = [f"{operator}, small" for operator in operators.problems("small")]
    assert [case["case"].rpartition(", ")[0] for case in cases[::2]] == keys
    for case in cases:
        assert list(case["timings_ms"]) == [operators.OURS, operators.EAGER, operators.FAIR]
        assert max(case["relative_error"].values()) <= 1e-4 and case["floor_ms"][report.BYTES] > 0


@pytest.mark.slow
def test_quick_run_of_the_suite_has_every_operator_in_one_table(tmp_path: Path) -> None:
    printed = run_quick(tmp_path, "--only=gaussian_kl,log_likelihood", script="suite")
    name = "suite-gaussian_kl-log_likelihood-cpu-quick"
    assert {case["operator"] for case in read(tmp_path / f"{name}.json")["cases"]} == {
        "gaussian_kl",
        "log_likelihood",
    }
    assert (
        "| quickest rival / ours" in printed
        and printed.strip() == (tmp_path / f"{name}.md").read_text().strip()
    )
    assert (tmp_path / f"{name}.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("operator", [*operators.problems("small"), "jacobian_l1"])
def test_jax_twins_of_the_operators_agree_with_float64(operator: str, tmp_path: Path) -> None:
    pytest.importorskip("jax")
    cases = [*operators.cases(quick=True), replace(jacobian.cases(quick=True)[0], group="jacobian_l1")]
    for case in cases:
        if case.group == operator:
            trial = case.build(options(tmp_path), *case.arguments)
            name = next(name for name in trial.contestants if name.startswith("JAX"))
            trial.contestants = {name: trial.contestants[name]}
            assert harness.checked(case, trial)[1][name] < 1e-4, trial.notes


def test_what_fits_on_a_line_stands_on_one(tmp_path: Path) -> None:
    rows = [{"text": "x" * 60, "n": n, "": None} for n in range(3)]
    record = {"short": {"a": [1, 2.5, None]}, "": rows, "none": {}, "many": list(range(99))}
    writing.write_json(tmp_path / "it.json", record)
    text = (tmp_path / "it.json").read_text()
    assert json.loads(text) == record and max(map(len, text.splitlines())) <= writing.WIDTH + 1
    assert ' "short": {"a": [1, 2.5, null]},' in text.splitlines() and len(text.splitlines()) < 16
    writing.write_json(tmp_path / "it.json", {"third": 1 / 3}, digits=3)
    assert json.loads((tmp_path / "it.json").read_text()) == {"third": 0.333}
    with pytest.raises(TypeError, match="expected plain data or dataclasses, got object"):
        writing.write_json(tmp_path / "it.json", {"a": object()})
    with pytest.raises(ValueError, match="not JSON compliant"):
        writing.write_json(tmp_path / "it.json", {"a": float("nan")})

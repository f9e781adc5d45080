"""The Gaussian testbed (benchmarks/papers): closed forms, and methods whose mean weight is the evidence."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from benchmarks.papers.gaussian import __main__ as script
from benchmarks.papers.gaussian import measures, report, training
from benchmarks.papers.gaussian.methods import Hamiltonian, MeanField, Method, Planar
from benchmarks.papers.gaussian.model import Data, Layout, Theta, sample_data, true_theta
from fastvae import reference

ROOT = Path(__file__).parents[1]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
"""float64, sums of a few hundred terms of order 1 to 100."""


def random_theta(columns: int) -> Theta:
    generator = torch.Generator().manual_seed(3)
    delta, log_sigma = torch.randn(2, columns, dtype=torch.float64, generator=generator)
    return Theta(delta, 0.3 * log_sigma)


def raw_data(num_data: int, d: int) -> Tensor:
    return torch.randn(num_data, d, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 1


def summarise(x: Tensor) -> Data:
    return Data(Layout((x.shape[1],)), len(x), x.mean(0), (x - x.mean(0)).square().sum(0))


@pytest.mark.parametrize(("num_data", "d"), [(1, 1), (3, 2), (5, 3)])
def test_evidence_is_that_of_the_joint_normal_of_all_data(num_data: int, d: int) -> None:
    x, theta = raw_data(num_data, d), random_theta(d)
    shared = torch.kron(torch.ones(num_data, num_data, dtype=x.dtype), torch.eye(d, dtype=x.dtype))
    own = torch.diag(torch.exp(2 * theta.log_sigma).repeat(num_data))
    joint = MultivariateNormal(theta.delta.repeat(num_data), shared + own)
    torch.testing.assert_close(summarise(x).log_evidence(theta), joint.log_prob(x.flatten())[None], **EXACT)


def test_log_joint_is_the_sum_over_the_data() -> None:
    x, theta = raw_data(6, 3), random_theta(3)
    z = torch.linspace(-1, 1, 12, dtype=x.dtype).view(4, 3)
    log_px = Normal(z[:, None] + theta.delta, theta.log_sigma.exp()).log_prob(x).sum((1, 2))
    expected = log_px + Normal(torch.zeros_like(z), 1).log_prob(z).sum(1)
    torch.testing.assert_close(summarise(x).log_joint(z, theta)[:, 0], expected, **EXACT)


def test_force_is_the_gradient_of_the_log_joint() -> None:
    data = sample_data([1, 4, 4], [0, 0, 1], 50)
    theta = random_theta(9)
    z = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_joint(z, theta).sum(), z)
    torch.testing.assert_close(data.force(theta)(z.detach()), gradient, **EXACT)


def test_posterior_and_evidence_agree_by_bayes() -> None:
    data, theta = sample_data([1, 3], [0, 0], 20), random_theta(4)
    mean, scale = data.posterior(theta)
    z = mean + torch.linspace(-2, 2, 5, dtype=mean.dtype)[:, None] * scale
    posterior = data.layout.total(Normal(mean, scale).log_prob(z))
    evidence = data.log_evidence(theta).expand(5, -1)
    torch.testing.assert_close(data.log_joint(z, theta) - posterior, evidence, **EXACT)


@pytest.mark.parametrize("num_data", [2, 10_000])
def test_evidence_maximiser_is_a_maximum(num_data: int) -> None:
    data = sample_data([5], [0], num_data)
    best = data.evidence_maximiser()
    leaves = [t.clone().requires_grad_() for t in (best.delta, best.log_sigma)]
    value = data.log_evidence(Theta(*leaves))
    for gradient in torch.autograd.grad(value.sum(), leaves):
        # Of terms of order N, which cancel.
        assert gradient.abs().max() < 1e-10 * num_data
    for step in (-0.01, 0.01):
        assert data.log_evidence(Theta(best.delta + step, best.log_sigma)) < value
        assert data.log_evidence(Theta(best.delta, best.log_sigma + step)) < value


def test_layout_sums_and_spreads_each_problem_alone() -> None:
    layout = Layout((1, 3, 3, 2))
    values = torch.arange(18.0).view(2, 9)
    by_hand = [values[:, layout.columns(i)] for i in range(4)]
    assert torch.equal(layout.total(values), torch.stack([v.sum(1) for v in by_hand], 1))
    assert layout.spread(torch.tensor([5.0, 6, 7, 8])).tolist() == [5, 6, 6, 6, 7, 7, 7, 8, 8]


def test_true_parameters_are_the_papers() -> None:
    theta = true_theta(Layout((1, 5)))
    torch.testing.assert_close(theta.delta, torch.tensor([0, -0.4, -0.2, 0, 0.2, 0.4], dtype=torch.float64))
    sigma = torch.tensor([1, 1, 0.325, 0.1, 0.325, 1], dtype=torch.float64)
    torch.testing.assert_close(theta.log_sigma.exp(), sigma)


@pytest.mark.parametrize("kind", ["none", "fixed", "free"])
@pytest.mark.parametrize("num_steps", [1, 10])
def test_hvae_weight_is_the_reference_leapfrog(kind: str, num_steps: int) -> None:
    data = sample_data([3], [0], 20)
    theta = true_theta(data.layout)
    method = Hamiltonian(data, num_steps, [kind], step_size=0.02)
    noise = method.draw(4, torch.Generator().manual_seed(0))
    z, gamma = noise
    alpha = method.alpha()[:, 0]
    rho = gamma / alpha.prod()
    for k in range(num_steps):
        z, rho = reference.leapfrog_kick_drift(z, rho, data.force(theta)(z), 0.02)
        rho = reference.leapfrog_kick_temper(rho, data.force(theta)(z), 0.02, alpha[k])
    start = Normal(0, 1).log_prob(noise).sum((0, 2))
    momentum = Normal(torch.zeros_like(rho), 1).log_prob(rho).sum(1)
    expected = data.log_joint(z, theta)[:, 0] + momentum - start
    torch.testing.assert_close(method.log_weight(theta, noise)[:, 0], expected, **EXACT)
    assert (alpha.prod() == 1) == (kind == "none")


def test_problems_side_by_side_do_not_touch() -> None:
    kinds, dims, seeds = ["none", "free", "fixed"], [2, 2, 4], [0, 1, 0]
    together = sample_data(dims, seeds, 30)
    methods: list[Method] = [
        Hamiltonian(together, 3, kinds, step_size=0.02),
        Planar(together, 3, torch.Generator().manual_seed(0)),
    ]
    theta = true_theta(together.layout)
    for method in methods:
        noise = method.draw(4, torch.Generator().manual_seed(0))
        weights = method.log_weight(theta, noise)
        for i in range(3):
            columns = together.layout.columns(i)
            data = sample_data(dims[i : i + 1], seeds[i : i + 1], 30)
            if isinstance(method, Planar):
                alone: Method = Planar(data, 3, torch.Generator())
                for name, parameter in alone.named_parameters():
                    whole = method.get_parameter(name)
                    parameter.data = whole[:, i : i + 1] if name == "b" else whole[:, columns]
            else:
                alone = Hamiltonian(data, 3, kinds[i : i + 1], step_size=0.02)
            own = alone.log_weight(true_theta(data.layout), noise[..., columns])[:, 0]
            torch.testing.assert_close(own, weights[:, i], **EXACT)


@pytest.mark.parametrize("family", ["planar", "mean field"])
def test_mean_weight_of_the_baselines_is_the_evidence(family: str) -> None:
    data = sample_data([1, 2], [0, 0], 4)
    theta = Theta(torch.zeros_like(data.mean), torch.zeros_like(data.mean))
    generator = torch.Generator().manual_seed(0)
    method = Planar(data, 3, generator) if family == "planar" else MeanField(data, closed_form=False)
    with torch.no_grad():
        log_ratio = method.log_weight(theta, method.draw(50_000, generator)) - data.log_evidence(theta)
    ratio = log_ratio.exp()
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert (error < 0.1).all()
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all()


def test_closed_form_elbo_is_the_mean_of_the_samples() -> None:
    data, theta = sample_data([2], [0], 4), random_theta(2)
    method = MeanField(data, closed_form=True, mean=0.3, scale=0.6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        samples = method.log_weight(theta, method.draw(20_000, generator))[:, 0]
        difference = samples.mean() - method.elbo(theta, 1, generator)[0]
    assert difference.abs() < 4 * samples.std() / math.sqrt(len(samples))


def test_elbo_of_the_exact_posterior_is_the_evidence_without_noise() -> None:
    data, theta = sample_data([3], [0], 100), random_theta(3)
    mean, scale = data.posterior(theta)
    method = MeanField(data, closed_form=True, mean=mean, scale=scale)
    evidence = data.log_evidence(theta)
    samples = method.log_weight(theta, method.draw(5, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(samples, evidence.expand(5, -1), rtol=1e-12, atol=0)
    closed = method.elbo(theta, 1, torch.Generator())
    torch.testing.assert_close(closed, evidence, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_steps", [1, 10])
@pytest.mark.parametrize("case", measures.WEIGHT_CASES, ids=lambda case: f"N{case.num_data}-d{case.d}")
def test_weights_of_the_table_have_a_finite_variance(case: measures.WeightCase, num_steps: int) -> None:
    """log w is quadratic in the noise v, c + b.v + v.H v / 2; E w^2 is finite if and only if I - 2 H > 0."""
    method, theta = case.method(num_steps, ("none", "fixed", "free"))
    columns = method.data.layout.num_columns
    # Dimensions do not mix: the origin, then a step along z_0's noise and one along the momentum's, in all.
    noise = torch.zeros(2, 3, columns, dtype=torch.float64)
    noise[0, 1] = noise[1, 2] = 1
    noise.requires_grad_()
    (gradient,) = torch.autograd.grad(method.log_weight(theta, noise).sum(), noise)
    hessian = (gradient[:, 1:] - gradient[:, :1]).permute(2, 0, 1)
    torch.testing.assert_close(hessian, hessian.mT, rtol=1e-6, atol=1e-6)
    assert torch.linalg.eigvalsh(hessian).max() < 0.5


def test_mean_weight_of_hvae_is_the_evidence() -> None:
    rows = measures.weight_rows(20_000)
    assert len(rows) == 5 * len(measures.WEIGHT_CASES)
    for row in rows:
        assert abs(row["z_score"]) < 4, row
        assert row["standard_error"] < 0.05, row


def test_training_lowers_the_error_at_the_rate_of_rmsprop() -> None:
    job = training.Job("VB", 0, (training.CLOSED_FORM,), (1, 2), (0,), 10_000)
    result = training.train(job, 320)
    assert result.iterations == 320 and len(result.errors) == training.CHECKPOINTS
    sigma_errors = torch.stack(result.errors)[:, 1]
    assert (sigma_errors.diff(dim=0) < 0).all()
    # About 1e-3 a step from sigma = e^3 down; the first steps are longer.
    assert ((3 - result.theta.log_sigma) > 0.25).all() and ((3 - result.theta.log_sigma) < 0.45).all()


def test_training_stops_at_its_limit() -> None:
    job = training.Job("VB", 0, (training.CLOSED_FORM,), (1,), (0,), 100)
    result = training.train(job, 10_000, seconds=0)
    assert result.iterations == 1 and len(result.errors) == 1


def test_noise_of_an_exact_posterior_vanishes_and_iwae_is_tighter_than_vb() -> None:
    jobs = measures.variance_jobs(training.jobs([2], [0], 10_000, (1,)))
    trained = [training.train(job, 1500, flow_only=True) for job in jobs if job.family == "VB"]
    rows = measures.variance_rows(trained, 100)
    by_name = {(row["method"], row["base"], row["gradient_evaluations"]): row for row in rows}
    assert by_name["VB", "learnt", 11]["elbo_sd"] < 0.1
    near = measures.describe(measures.ENCODER_LIKE)
    for base in (near, "prior"):
        for count in (2, 11):
            assert by_name["IWAE", base, count]["gap"] < by_name["VB", base, count]["gap"]


def test_report_says_where_the_paper_is_not_met() -> None:
    names = [job.name(v) for job in training.jobs([3], [0], 10, (1, 10)) for v in job.variants]
    row = {"d": 3, "delta_error": 1.0, "delta_error_se": None, "sigma_error_se": 0.01}
    rows = [
        {"method": name, "sigma_error": 3.0 if name.startswith("HVAE K=10 f") else 2.0, **row}
        for name in names
    ]
    lines = report.verdicts(rows)
    assert len(lines) == 5
    assert "sum: NO (4 against 3); Delta: tie (1 against 1); sigma: NO (3 against 2)" in lines[0]
    assert "sigma: tie (2 against 2)" in lines[1]
    for row in rows:
        row["sigma_error"] = 1.0 if row["method"] in report.TEMPERED else 2.0
    assert "sigma: yes (1 against 2)" in report.verdicts(rows)[0]


@pytest.mark.slow
def test_script_writes_tables_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [
        sys.executable,
        "-m",
        "benchmarks.papers.gaussian",
        "--dims",
        "1",
        "3",
        "--seeds",
        "2",
        "--iterations",
        "20",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gaussian.json").read_text())
    assert {row["d"] for row in written["errors"]} == {1, 3}
    assert max(abs(row["z_score"]) for row in written["weights"]) < 4
    assert (tmp_path / "gaussian.png").read_bytes().startswith(b"\x89PNG")
    for verdict in written["verdicts"]:
        assert verdict in done.stdout


def test_script_refuses_bad_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--dims", "0"], "--dims: expected different numbers of at least 1"),
        (["--dims", "3", "3"], "--dims: expected different numbers of at least 1"),
        (["--seeds", "0"], "--seeds: expected more than 0, got 0"),
    ):
        with pytest.raises(SystemExit):
            script.parse(flags)
        assert message in capsys.readouterr().err

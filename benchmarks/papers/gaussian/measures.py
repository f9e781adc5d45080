"""What is measured of the methods: parameter errors, importance weights, variance of the estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .methods import Hamiltonian, MeanField, Method
from .model import Data, Theta, sample_data, true_theta
from .training import REPARAMETRISED, Job, Trained, base_of, squared_errors

Row = dict[str, Any]
EXACT = "maximum of the evidence"
CHUNK = 50


def error_rows(trained: Sequence[Trained]) -> list[Row]:
    """One row a method and d: mean squared errors over the data sets, with their standard errors."""
    rows = []
    for result in trained:
        problems = result.job.problems
        errors = torch.stack(result.errors)
        for d in result.job.dims:
            for variant in result.job.variants:
                chosen = [i for i, problem in enumerate(problems) if problem[:2] == (d, variant)]
                row = _error_row(result.job.name(variant), d, errors[-1][:, chosen])
                row["iterations"] = result.iterations
                row["sigma_error_in_training"] = errors[:, 1, chosen].mean(1).tolist()
                rows.append(row)
    job = trained[0].job
    for d in job.dims:
        data = sample_data([d] * len(job.seeds), job.seeds, job.num_data)
        rows.append(_error_row(EXACT, d, squared_errors(data, data.evidence_maximiser())))
    return rows


def _error_row(name: str, d: int, errors: Tensor) -> Row:
    row: Row = {"method": name, "d": d}
    for key, values in zip(("delta", "sigma"), errors, strict=True):
        row[f"{key}_error"] = values.mean().item()
        row[f"{key}_error_se"] = _standard_error(values)
    return row


def _standard_error(values: Tensor) -> float | None:
    return None if len(values) < 2 else (values.std() / math.sqrt(len(values))).item()


@dataclass(frozen=True)
class WeightCase:
    """A setting in which the weights have a finite variance, so that a standard error means something.

    From the prior an HVAE's map, whose volume is 1, cannot shrink N(0, I) to the posterior: at N = 10,000
    log w spreads over hundreds of nats and no number of samples would do. Hence few data from the prior
    (base None), or all 10,000 from a base as an encoder gives it, (offset, width) in posterior standard
    deviations.
    """

    num_data: int
    d: int
    base: tuple[float, float] | None = None

    def method(self, num_steps: int, tempering: Sequence[str]) -> tuple[Hamiltonian, Theta]:
        """At the true theta; step sizes are half a posterior standard deviation."""
        data = sample_data([self.d] * len(tempering), [0] * len(tempering), self.num_data)
        theta = true_theta(data.layout)
        mean, scale = base_of(data, theta, self.base)
        posterior_scale = data.posterior(theta)[1]
        method = Hamiltonian(
            data,
            num_steps,
            tempering,
            step_size=0.5 * posterior_scale,
            max_step_size=posterior_scale,
            beta_0=0.7,
            base_mean=mean,
            base_scale=scale,
        )
        return method, theta


ENCODER_LIKE = (0.5, 1.3)
"""A base half a posterior standard deviation off and 1.3 wide: a fair encoder's mistake."""
WEIGHT_CASES = (
    WeightCase(4, 1),
    WeightCase(4, 2),
    WeightCase(10_000, 1, ENCODER_LIKE),
    WeightCase(10_000, 5, ENCODER_LIKE),
    WeightCase(10_000, 25, (0.2, 1.1)),
)


def describe(base: tuple[float, float] | None) -> str:
    return "prior" if base is None else f"{base[0]} sd off, {base[1]} sd wide"


@torch.no_grad()
def weight_rows(num_samples: int) -> list[Row]:
    """Whether the mean importance weight is the evidence.

    r_i = w_i / p(x) of n independent samples; z = (mean r - 1) / (sd r / sqrt(n)).
    """
    rows = []
    for case in WEIGHT_CASES:
        for num_steps, kinds in ((1, ("none", "free")), (10, ("none", "fixed", "free"))):
            method, theta = case.method(num_steps, kinds)
            generator = torch.Generator().manual_seed(1)
            chunks = [
                method.log_weight(theta, method.draw(10_000, generator)) for _ in range(num_samples // 10_000)
            ]
            evidence = method.data.log_evidence(theta)
            ratios = (torch.cat(chunks) - evidence).exp()
            for column, kind in enumerate(kinds):
                rows.append(_weight_row(case, num_steps, kind, ratios[:, column], evidence[column].item()))
    return rows


def _weight_row(case: WeightCase, num_steps: int, kind: str, ratio: Tensor, evidence: float) -> Row:
    error = (ratio.std() / math.sqrt(len(ratio))).item()
    mean = ratio.mean().item()
    return {
        "method": Job("HVAE", num_steps, (kind,), (case.d,), (0,), case.num_data).name(kind),
        "num_data": case.num_data,
        "d": case.d,
        "base": describe(case.base),
        "samples": len(ratio),
        "effective_samples": (ratio.sum().square() / ratio.square().sum()).item(),
        "log_evidence": evidence,
        "log_mean_weight": evidence + math.log(mean),
        "mean_ratio": mean,
        "standard_error": error,
        "z_score": (mean - 1) / error,
    }


def variance_jobs(all_jobs: Sequence[Job]) -> list[Job]:
    """The jobs of ``variance_rows``: the first data set of each d, VB in closed form, HVAE from two bases."""
    once = [replace(job, seeds=job.seeds[:1]) for job in all_jobs if job.variants != (REPARAMETRISED,)]
    return once + [replace(job, base=ENCODER_LIKE) for job in once if job.family == "HVAE"]


def variance_rows(trained: Sequence[Trained], num_estimates: int) -> list[Row]:
    """ELBO estimates and their gradients at equal evaluations of the potential's gradient.

    All at the same theta, the maximum of the evidence, where the exact gradient is 0; each method's own
    parameters trained there. An estimate may evaluate K + 1 gradients: one HVAE sample, or K + 1 samples of a
    method that evaluates one a sample, averaged (VB, planar) or in log mean exp (IWAE). The passes back
    through the forces of an HVAE are not counted. VB and IWAE come with q learnt, and with q fixed at what
    the HVAEs start from.
    """
    rows = []
    for result in trained:
        job, method, theta = result.job, result.method, result.theta
        if job.family == "HVAE":
            names = [job.name(variant) for _, variant, _ in job.problems]
            rows += _estimates(names, describe(job.base), method, theta, 1, job.size + 1, num_estimates)
            continue
        names = [job.name("")] * len(job.problems)
        for count in (2, 11):
            if job.family == "planar":
                rows += _estimates(names, "prior", method, theta, count, count, num_estimates)
                continue
            sources = [("learnt", method)]
            for base in (None, ENCODER_LIKE):
                mean, scale = base_of(method.data, theta, base)
                fixed = MeanField(method.data, closed_form=False, mean=mean, scale=scale, learn=False)
                sources.append((describe(base), fixed))
            for base_name, source in sources:
                for name in ("VB", "IWAE"):
                    both = [name] * len(names)
                    rows += _estimates(both, base_name, source, theta, count, count, num_estimates)
    return rows


def _estimates(
    names: Sequence[str],
    base: str,
    method: Method,
    theta: Theta,
    num_samples: int,
    evaluations: int,
    num_estimates: int,
) -> list[Row]:
    data: Data = method.data
    layout = data.layout
    generator = torch.Generator().manual_seed(2)
    values, gradients = [], []
    for _ in range(num_estimates // CHUNK):
        # A copy of theta an estimate, so that one backward pass gives the gradient of each.
        leaves = [
            t.detach().expand(CHUNK, -1).clone().requires_grad_() for t in (theta.delta, theta.log_sigma)
        ]
        copies = Theta(*(leaf.repeat_interleave(num_samples, 0) for leaf in leaves))
        weights = method.log_weight(copies, method.draw(CHUNK * num_samples, generator))
        weights = weights.unflatten(0, (CHUNK, num_samples))
        iwae = names[0] == "IWAE"
        estimate = weights.logsumexp(1) - math.log(num_samples) if iwae else weights.mean(1)
        gradients.append(torch.stack(torch.autograd.grad(estimate.sum(), leaves)))
        values.append(estimate.detach())
    value, gradient = torch.cat(values), torch.cat(gradients, 1)
    gap = data.log_evidence(theta) - value.mean(0)
    noise = layout.total(gradient.var(1)).sqrt()
    bias = layout.total(gradient.mean(1).square()).sqrt()
    return [
        {
            "method": name,
            "base": base,
            "d": layout.dims[i],
            "gradient_evaluations": evaluations,
            "gap": gap[i].item(),
            "elbo_sd": value[:, i].std().item(),
            "delta_gradient_sd": noise[0, i].item(),
            "log_sigma_gradient_sd": noise[1, i].item(),
            "log_sigma_gradient_bias": bias[1, i].item(),
        }
        for i, name in enumerate(names)
    ]

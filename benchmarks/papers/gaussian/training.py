"""What is trained: RMSProp on the ELBO of every problem of a job at once, jobs side by side in processes."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .methods import Hamiltonian, MeanField, Method, Planar
from .model import Data, Theta, sample_data, true_theta

BATCH = 10
"""Samples an ELBO estimate in training is the mean of, as in the paper's code."""
CHECKPOINTS = 8
CLOSED_FORM, REPARAMETRISED = "closed form", "reparametrised"


@dataclass(frozen=True)
class Job:
    """Methods that differ only in a flag, trained on the same data sets side by side.

    Args:
        family: "HVAE", "VB" or "planar".
        size: K, or the number of layers; unused by VB.
        variants: HVAE: kinds of tempering; VB: one of CLOSED_FORM and REPARAMETRISED; planar: ("",).
        dims, seeds: every d with every seed is a problem, under each variant.
        num_data: N.
        base: q(z_0) of an HVAE at a given theta: None, the prior; otherwise normal, with (offset, width) in
            standard deviations of the posterior.
    """

    family: str
    size: int
    variants: tuple[str, ...]
    dims: tuple[int, ...]
    seeds: tuple[int, ...]
    num_data: int
    base: tuple[float, float] | None = None

    @property
    def problems(self) -> list[tuple[int, str, int]]:
        """(d, variant, seed)"""
        return [(d, variant, seed) for d in self.dims for variant in self.variants for seed in self.seeds]

    @property
    def cost(self) -> int:
        """Share of the time a step of this job takes, about."""
        return 4 + self.size * len(self.variants)

    def name(self, variant: str) -> str:
        if self.family == "HVAE":
            if variant == "none":
                return f"HVAE K={self.size} untempered"
            return f"HVAE K={self.size} {'tempered' if self.size == 1 else variant}"
        return f"planar {self.size}" if self.family == "planar" else f"VB {variant}"

    def data(self) -> Data:
        return sample_data([d for d, _, _ in self.problems], [s for _, _, s in self.problems], self.num_data)

    def method(self, data: Data, theta: Theta | None = None) -> Method:
        """Untrained; given the theta it is to serve, steps start from half a posterior standard deviation."""
        variants = [variant for _, variant, _ in self.problems]
        if self.family == "HVAE":
            if theta is None:
                return Hamiltonian(data, self.size, variants)
            mean, scale = base_of(data, theta, self.base)
            step_size = 0.5 * data.posterior(theta)[1]
            return Hamiltonian(
                data, self.size, variants, step_size=step_size, base_mean=mean, base_scale=scale
            )
        if self.family == "planar":
            return Planar(data, self.size, torch.Generator().manual_seed(self.size))
        return MeanField(data, closed_form=self.variants == (CLOSED_FORM,))


def base_of(data: Data, theta: Theta, base: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """Mean and scale [C] of q(z_0): the prior's, or (offset, width) in posterior standard deviations."""
    mean, scale = data.posterior(theta)
    if base is None:
        return torch.zeros_like(mean), torch.ones_like(scale)
    return mean + base[0] * scale, base[1] * scale


def jobs(dims: Sequence[int], seeds: Sequence[int], num_data: int, planar_layers: Sequence[int]) -> list[Job]:
    """Every method of the comparison, the dearest first. At K = 1 fixed and free tempering are the same."""
    where = (tuple(dims), tuple(seeds), num_data)
    return sorted(
        [
            Job("HVAE", 10, ("none", "fixed", "free"), *where),
            Job("HVAE", 1, ("none", "free"), *where),
            Job("VB", 0, (CLOSED_FORM,), *where),
            Job("VB", 0, (REPARAMETRISED,), *where),
            *(Job("planar", layers, ("",), *where) for layers in planar_layers),
        ],
        key=lambda job: -job.cost,
    )


@dataclass
class Trained:
    """A job's end.

    ``errors`` holds squared errors of Delta and of sigma, summed over dimensions, of each problem at
    CHECKPOINTS moments: [CHECKPOINTS, 2, P].
    """

    job: Job
    method: Method
    theta: Theta
    iterations: int
    errors: list[Tensor] = field(default_factory=list)


def squared_errors(data: Data, theta: Theta) -> Tensor:
    """|Delta - true|^2 and |sigma - true|^2 (standard deviations) of each problem: [2, P]."""
    truth = true_theta(data.layout)
    delta = (theta.delta - truth.delta).square()
    sigma = (theta.log_sigma.exp() - truth.log_sigma.exp()).square()
    return torch.stack((data.layout.total(delta), data.layout.total(sigma)))


def train(
    job: Job,
    iterations: int,
    *,
    seconds: float | None = None,
    flow_only: bool = False,
    progress: bool = False,
) -> Trained:
    """Minimise minus the ELBO by RMSProp (decay 0.9).

    Args:
        iterations: steps of the optimiser.
        seconds: stop earlier, after so long.
        flow_only: theta stays at the maximum of the evidence and only the method's own parameters are
            trained, at 1e-2 falling linearly to 0; otherwise both are, at 1e-3, theta from Delta = 0 and
            sigma = e^3 (the paper's code).
        progress: draw a bar, where tqdm is installed.
    """
    data = job.data()
    generator = torch.Generator().manual_seed(len(job.dims) + 10 * job.size)
    if flow_only:
        theta = data.evidence_maximiser()
        method = job.method(data, theta)
    else:
        method = job.method(data)
        start = torch.zeros(data.layout.num_columns, dtype=data.mean.dtype)
        theta = Theta(nn.Parameter(start), nn.Parameter(start + 3))
    learnt = [*method.parameters(), *([] if flow_only else [theta.delta, theta.log_sigma])]
    rate = 1e-2 if flow_only else 1e-3
    optimizer = torch.optim.RMSprop(learnt, lr=rate, alpha=0.9, eps=1e-10)
    trained = Trained(job, method, theta, 0)
    started = time.monotonic()
    for step in bar(range(iterations), job, progress):
        if flow_only:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / iterations)
        optimizer.zero_grad()
        (-method.elbo(theta, BATCH, generator).sum()).backward()
        optimizer.step()
        trained.iterations += 1
        over = seconds is not None and time.monotonic() - started > seconds
        if over or (step + 1) * CHECKPOINTS % iterations < CHECKPOINTS:
            trained.errors.append(squared_errors(data, theta).detach())
        if over:
            break
    trained.theta = Theta(theta.delta.detach(), theta.log_sigma.detach())
    return trained


def bar(steps: Iterable[int], job: Job, wanted: bool) -> Iterable[int]:
    if not wanted or importlib.util.find_spec("tqdm") is None:
        return steps
    from tqdm import tqdm

    label = " / ".join(job.name(variant) for variant in job.variants)
    return tqdm(steps, desc=label, mininterval=1, disable=None, leave=False)


def train_all(tasks: Sequence[tuple[Job, dict[str, Any]]], minutes: float | None) -> list[Trained]:
    """``train`` of each (job, its arguments), on two processes where there are two cores.

    Args:
        tasks: jobs with keyword arguments of ``train``.
        minutes: of wall clock for all of them; each gets a share by its cost.
    """
    cores = os.cpu_count() or 1
    workers = min(2, cores)
    costs = [job.cost * arguments["iterations"] for job, arguments in tasks]
    shares = [None if minutes is None else 60 * minutes * workers * cost / sum(costs) for cost in costs]
    # A fork of a process whose torch has started its threads can hang; a fresh process cannot.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (max(1, cores // workers),)) as pool:
        futures = [
            pool.submit(train, job, seconds=share, progress=True, **arguments)
            for (job, arguments), share in zip(tasks, shares, strict=True)
        ]
        return [future.result() for future in futures]

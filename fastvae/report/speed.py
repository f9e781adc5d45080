"""What of the model runs in kernels or sweeps, and how fast beside plain PyTorch."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvae import ops, reference
from fastvae.decoding import conditioned
from fastvae.influence import TracIn
from fastvae.likelihoods import Bernoulli
from fastvae.models import HVAE, IWAE, VAE
from fastvae.network import Network
from fastvae.plot.trajectories import start
from fastvae.report.page import Section, Table
from fastvae.report.subject import Subject
from fastvae.report.wording import listed, time_of

__all__ = ["Timing", "speed", "timed"]

_BATCH, _CODES = 32, 20
_ROUNDS, _SECONDS = 5, 2.0
"""Rounds go on until both are reached."""
_MOST = 10.0
"""Seconds for one comparison at most, but for its first two rounds."""

Job = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Timing:
    """Seconds of one computation by fastvae and by plain PyTorch, medians, and how far their results are apart."""

    name: str
    ours: float
    plain: float
    difference: float
    """Largest difference, relative to the largest entry of each result; NaN where their noise differs."""

    @property
    def ratio(self) -> float:
        """How many times as fast."""
        return self.plain / self.ours


def speed(subject: Subject) -> Section:
    """Coverage of the decoder, and times."""
    model = subject.model
    with torch.no_grad():
        x, given = subject.here(subject.test[:_BATCH]), subject.given(subject.test_condition, _BATCH)
        z = model.encode(x, **given)[0]
    network = Network(model.decoder, model.likelihood, z=z, **given)
    explained = network.explain()
    kernels = "Run by kernels" in explained
    found, failed = timed(subject)
    apart = max((each.difference for each in found if not math.isnan(each.difference)), default=0.0)
    gained = [each for each in found if each.ratio >= 1.1]
    same = [each for each in found if each.ratio < 1.1]
    said = []
    if gained:
        of_each = listed([f"{each.name} {each.ratio:.1f}" for each in gained])
        said.append(f"times as fast as plain PyTorch: {of_each}")
    if same:
        said.append(f"no gain: {listed([f'{each.name} {each.ratio:.2f}' for each in same])}")
    where = "kernels" if kernels else "sweeps in PyTorch" if network.lowered else "autograd"
    share = (
        f"{network.lowered:.0%} of the decoder runs in {where}"
        if network.lowered
        else "The decoder runs through autograd"
    )
    text = [
        f"""Forward and backward of a batch of {len(z)} on {z.device.type} ({torch.get_num_threads()} threads), but for
        log p(x | z), which has no backward; medians of rounds in which both ways take turns. Plain: the same
        formulas in PyTorch and autograd, batched (fastvae.reference), with as few passes as ours."""
    ]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 1.5 * (os.cpu_count() or 1):
        text.append(
            f"""The machine was busy with other things ({load:.1f} processes wanted its {os.cpu_count()} CPUs): these
            times are unreliable."""
        )
    text += [f"{name} could not be compared: {reason}" for name, reason in failed.items()]
    rows = [[each.name, time_of(each.ours), time_of(each.plain), f"{each.ratio:.2f}"] for each in found]
    text.append(f"The results of the two ways differ by at most {apart:.0e} of the largest entry.")
    return Section(
        "Speed",
        f"{share}; {'; '.join(said) or 'nothing could be timed'}.",
        bool(gained),
        [
            *text,
        ],
        Table(["", "fastvae", "plain", "ratio"], rows),
        details=[("The decoder, operation by operation", explained)],
    )


def timed(subject: Subject) -> tuple[list[Timing], dict[str, str]]:
    """All comparisons that this model allows, and why others failed."""
    found, failed = [], {}
    for name, ours, plain, is_comparable in _pairs(subject):
        try:
            found.append(_measured(name, ours, plain, is_comparable, _SECONDS * min(1.0, subject.effort)))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            failed[name] = f"{type(error).__name__}: {error}"
    return found, failed


def _pairs(subject: Subject) -> Iterator[tuple[str, Job, Job, bool]]:
    """Name, our way, the plain way, and whether both have the same noise."""
    model, x = subject.model, subject.here(subject.test[:_BATCH])
    given = subject.given(subject.test_condition, _BATCH)
    condition = given.get("condition")
    plain_decoder = conditioned(model.decoder, condition)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_decoder = [parameter for parameter in model.decoder.parameters() if parameter.requires_grad]
    mu, _ = (part.detach() for part in model.encode(x, **given))

    def gradients(value: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)

    if type(model) in (VAE, IWAE) and model.max_logvar is None and not model.penalties:
        noise = model.draw_noise(mu, subject.generator())
        networks = model.encoder, model.decoder, x

        def plain_loss() -> Tensor:
            if isinstance(model, IWAE):
                return -reference.iwae_bound(
                    *networks, noise, model.likelihood, estimator=model.estimator, beta=model.beta, **given
                )
            return -reference.elbo(*networks, noise[0], model.likelihood, beta=model.beta, **given)

        yield (
            "training step",
            lambda: gradients(model(x, noise=noise, **given).mean(), parameters),
            lambda: gradients(plain_loss().mean(), parameters),
            True,
        )
    if isinstance(model, HVAE):
        z, rho = start(model, x, subject.seed, condition)
        step, alpha = model.step_size.detach(), model.alpha.detach()
    else:
        noise = torch.randn(2, *mu.shape, generator=subject.generator(), device="cpu").to(mu)
        z, rho, step, alpha = mu, noise[0], mu.new_tensor(0.05), mu.new_full((5,), 0.95)
    z = z.requires_grad_()

    def flow(by: Callable[..., tuple[Tensor, ...]], decoder: Any, besides: dict[str, Any]) -> Job:
        def run() -> tuple[Tensor, ...]:
            end, momentum, log_px = by(decoder, z, rho, x, step, alpha, model.likelihood, **besides)
            return gradients(
                log_px.sum() - 0.5 * (end.square().sum() + momentum.square().sum()), [z, *of_decoder]
            )

        return run

    yield (
        f"flow of {len(alpha)} steps",
        flow(ops.hamiltonian_flow, model.decoder, given),
        flow(reference.hamiltonian_flow, plain_decoder, {}),
        True,
    )
    output = (
        "sigmoid" if isinstance(model.likelihood, Bernoulli) and not model.likelihood.probs else "identity"
    )

    def jacobian(by: Callable[..., Tensor], decoder: Any, besides: dict[str, Any]) -> Job:
        return lambda: gradients(by(decoder, z, output=output, **besides), of_decoder)

    yield (
        "Jacobian L1",
        jacobian(ops.jacobian_l1, model.decoder, given),
        jacobian(reference.jacobian_l1, plain_decoder, {}),
        True,
    )
    codes = (mu + torch.randn(_CODES, *mu.shape, generator=subject.generator(), device="cpu").to(mu)).detach()

    def importance(by: Callable[..., Tensor]) -> Job:
        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (by(model.decoder, codes, x, model.likelihood, **given),)

        return run

    yield f"log p(x | z) of {_CODES} codes", importance(ops.log_px), importance(reference.log_px), True
    few = x[:16]
    of_few = subject.given(subject.test_condition, 16)

    @functools.cache  # made at the first call, where what it refuses costs this comparison alone
    def tracin() -> TracIn:
        return TracIn(
            model,
            None,
            [None],
            lambda model, checkpoint: 1.0,
            num_samples=1,
            uncovered="materialise",
            condition=1 if of_few else None,
        )

    def norms() -> tuple[Tensor, ...]:
        noise = model.draw_noise(model.encode(few, **of_few)[0].detach(), subject.generator())
        losses = (
            model(
                few[i : i + 1], noise=noise[:, i : i + 1], **{k: v[i : i + 1] for k, v in of_few.items()}
            ).sum()
            for i in range(len(few))
        )
        flat = (torch.cat([part.flatten() for part in gradients(loss, parameters)]) for loss in losses)
        return tuple(gradient.square().sum() for gradient in flat)

    queries = (few, *of_few.values()) if of_few else few
    name = f"self-influence of 16 {subject.noun}s"
    yield name, lambda: tracin().self_influence(queries).unbind(), norms, False


def _measured(name: str, ours: Job, plain: Job, is_comparable: bool, seconds: float) -> Timing:
    results = ours(), plain()  # and everything is read and compiled
    difference = math.nan
    if is_comparable:
        difference = max(
            float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
            for a, b in zip(*results, strict=True)
        )
    times: list[list[float]] = [[], []]
    began = time.perf_counter()
    while True:
        spent = time.perf_counter() - began
        done = len(times[0])
        if done >= 2 and (spent > _MOST or (done >= _ROUNDS and spent >= seconds)):
            break
        for job, own in zip((ours, plain), times, strict=True):
            before = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own.append(time.perf_counter() - before)
    fused, eager = (sorted(own)[len(own) // 2] for own in times)
    return Timing(name, fused, eager, difference)

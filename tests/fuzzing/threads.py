"""Up to eight threads that score one model in random ways, and serve from it: what one thread gets, bitwise or nearly.

Afterwards the model is as it was: weights, flags, modes, methods, hooks and attributes.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import metrics, ops
from fastvae.influence import TracIn
from fastvae.models.base import BaseVAE
from fastvae.ood import LikelihoodRatio, LikelihoodRegret, NegativeLogLikelihood, SelfInfluence
from fuzzing.encoder_graphs import drawn_model
from fuzzing.encoders import random_model
from fuzzing.facts import facts_of

CASES = 12

_SECONDS = 50
"""A thread that takes longer waits for another: the case fails before its worker is taken away."""

Call = Callable[[Tensor], Any]


def _scaled(model: nn.Module, factor: float) -> float:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return factor


def _scores(model: BaseVAE, x: Tensor, draw: random.Random) -> dict[str, Callable[[], Call]]:
    """By name, what makes a score: once for all threads, or once for each."""
    background = copy.deepcopy(model)
    influence: dict[str, Any] = {"num_samples": 2, "uncovered": "materialise"}

    def served(part: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        loss = model(part, generator=generator).sum()
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
        return torch.cat([grad.flatten() for grad in grads if grad is not None])

    scores: dict[str, Callable[[], Call]] = {
        "regret": lambda: LikelihoodRegret(model, num_steps=2, num_samples=2).predict,
        "posterior": lambda: LikelihoodRegret(model, num_steps=2, num_samples=2, target="posterior").predict,
        "refit": lambda: lambda part: LikelihoodRegret(model, num_steps=2).refit(part).losses,
        "nll": lambda: NegativeLogLikelihood(model, num_samples=3).predict,
        "ratio": lambda: LikelihoodRatio(model, background, num_samples=3).predict,
        "self": lambda: SelfInfluence(model, **influence).predict,
        "tracin": lambda: TracIn(model, x, [0.5, 1.5], _scaled, **influence).influence,
        "top": lambda: lambda part: TracIn(model, x, None, **influence).influence(part, k=2).influence_scores,
        "posteriors": lambda: lambda part: torch.cat(metrics.posteriors(model, part)),
        "active": lambda: lambda part: torch.tensor(metrics.active_units(model, part)),
        "information": lambda: lambda part: torch.tensor(metrics.mutual_information(model, part)),
        "evidence": lambda: lambda part: torch.tensor(metrics.negative_log_likelihood(model, part, 3)),
    }
    if not model.training:
        z = torch.randn(2, len(x), 3, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()))
        scores["serve"] = lambda: served
        scores["log_px"] = lambda: (
            lambda part: ops.log_px(model.decoder, z[:, : len(part)], part, model.likelihood)
        )
        scores["jacobian"] = lambda: lambda part: ops.jacobian_l1(model.decoder, z[0, : len(part)]).detach()
    return dict(draw.sample(sorted(scores.items()), draw.randint(2, 6)))


def _same(found: Any, expected: Any, near: float) -> bool:
    if isinstance(found, Exception) or isinstance(expected, Exception):
        return type(found) is type(expected) and str(found) == str(expected)
    return torch.allclose(found, expected, near, near * (1 + float(expected.nan_to_num().abs().max())), True)


def _tried(call: Call, part: Tensor) -> Any:
    try:
        return call(part)
    except Exception as error:
        return error


def run_case(seed: int) -> str:
    """One model, some kinds of scores, several threads that each go through some of them."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        is_graph = draw.random() < 0.5
        model, shape = drawn_model(draw, conditions=0.0)[:2] if is_graph else random_model(draw)
    # While torch.export reads a graph in one thread, PyTorch's convolutions in float32 are others in all.
    model = model.double() if is_graph or draw.random() < 0.3 else model
    for module in model.modules():
        module.training = draw.random() < 0.5
    model.training = True
    if draw.random() < 0.5:
        model.eval()
    if draw.random() < 0.3:
        # Tracing a forward of the user's own replaces methods of nn.Module for its time: others must not notice.
        next(model.decoder.parameters()).requires_grad_(False)
    x = torch.rand(6, *shape).mul(2).round().div(2)
    scores = _scores(model, x, draw)
    plans = [draw.choices(sorted(scores), k=draw.randint(1, 4)) for _ in range(draw.randint(2, 8))]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    facts, generator = facts_of(model), torch.get_rng_state()
    first = draw.random() < 0.5
    parts = [x[i % 4 : i % 4 + 2] for i in range(len(plans))]
    expected: dict[tuple[str, int], Any] = {}

    def alone() -> None:
        for number, plan in enumerate(plans):
            for name in plan:
                if (name, number) not in expected:
                    expected[name, number] = _tried(scores[name](), parts[number])

    if first:
        alone()
    shared = {name: make() for name, make in scores.items() if draw.random() < 0.5}
    found: list[tuple[str, int, Any]] = []
    barrier = threading.Barrier(len(plans))

    def work(number: int) -> None:
        barrier.wait(_SECONDS)
        for name in plans[number]:
            call = shared[name] if name in shared else scores[name]()
            found.append((name, number, _tried(call, parts[number])))

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_SECONDS)
        assert not thread.is_alive(), "a thread is stuck"
    if not first:
        alone()
    assert len(found) == sum(map(len, plans))
    for name, number, result in found:
        # What was read as a graph adds up in another order once it runs as straight code, at some call of some thread.
        assert _same(result, expected[name, number], 1e-12 if is_graph else 0.0), (
            name,
            number,
            result,
            expected[name, number],
        )
    assert facts_of(model) == facts
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return "refused" if any(isinstance(result, Exception) for result in expected.values()) else "agreed"

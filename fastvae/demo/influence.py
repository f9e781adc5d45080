"""Which training images shaped held-out ones: TracIn of the demonstration's VAE."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.demo.problem import Problem
from fastvae.influence import TracIn
from fastvae.models import BaseVAE

__all__ = ["Influences", "influences_of"]

QUERIES, STRONGEST, DRAWS = 5, 5, 4


@dataclass
class Influences:
    """What TracIn found, at the final weights."""

    queries: Tensor
    """[Q, C, H, W] held-out images."""
    proponents: Tensor
    """[Q, K, C, H, W] the training images of largest influence on each."""
    opponents: Tensor
    """[Q, K, C, H, W] those of the most negative influence."""
    own: Tensor
    """[n, C, H, W] the training images of highest self-influence."""
    median: Tensor
    """[n, C, H, W] those whose self-influence is in the middle."""
    count: int
    """Training images that were looked at."""
    seconds: float


def influences_of(model: BaseVAE, problem: Problem, seed: int) -> Influences:
    """Scores of a random part of the training images, all of a small data set."""
    generator = torch.Generator().manual_seed(seed)
    limit = 600 if problem.convolutional else 2000
    train = problem.train[torch.randperm(len(problem.train), generator=generator)[:limit]]
    queries = problem.held_out[:QUERIES]
    started = time.perf_counter()
    tracin = TracIn(model, train.round(), [None], _as_it_is, num_samples=DRAWS, seed=seed)
    k = min(STRONGEST, len(train))
    scores = tracin.influence(queries)
    assert isinstance(scores, Tensor)
    order = tracin.self_influence(unbiased=True).argsort(descending=True)
    seconds = time.perf_counter() - started
    count = min(1 + 2 * k, len(order))
    middle = (len(order) - count) // 2
    best, worst = (train[scores.topk(k, largest=largest).indices] for largest in (True, False))
    return Influences(
        queries, best, worst, train[order[:count]], train[order[middle : middle + count]], len(train), seconds
    )


def _as_it_is(model: BaseVAE, checkpoint: None) -> float:
    return 1.0

"""What TracIn returns besides plain scores: their standard errors, and samples' scores with themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.influence.engine import Engine
from fastvae.influence.evaluation import Batch, Evaluation
from fastvae.influence.factors import self_dot
from fastvae.influence.snapshots import Snapshots

__all__ = ["InfluenceWithError", "self_scores"]


class InfluenceWithError(NamedTuple):
    """Influence scores, and how far off the finite number of draws may have put them."""

    influence_scores: Tensor
    """[n_test, n_train]"""
    standard_errors: Tensor
    """[n_test, n_train], of the scores as means over draws"""


def self_scores(
    snapshots: Snapshots, engine: Engine, evaluation: Evaluation, batch: Batch, unbiased: bool
) -> Tensor:
    """Weighted squared norms of a tile's gradients, summed over the checkpoints: [n]; see ``TracIn.self_influence``."""
    total = torch.zeros(len(batch[0]), device="cpu")
    for index in range(len(snapshots)):
        weight = snapshots.enter(index)
        routes = engine.routes(len(batch[0]), None)
        score = self_dot(engine.factors(evaluation, batch, routes))
        if unbiased:
            draws = evaluation.draws_of(batch)
            if draws < 2:
                raise ValueError(
                    "TracIn: self_influence: unbiased=True expects a model that draws noise and num_samples "
                    "of at least 2"
                )
            each = self_dot(engine.factors(evaluation, batch, routes, fold=False))
            score = (draws**2 * score - each.view(-1, draws).sum(1)) / (draws * (draws - 1))
        total = total + weight * score.cpu()
    return total

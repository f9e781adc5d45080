"""The k strongest of a stream of scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["KMostInfluentialResults", "TopK"]


class KMostInfluentialResults(NamedTuple):
    """The training samples of most influence on each query."""

    indices: Tensor
    """int64 [n_test, k]"""
    influence_scores: Tensor
    """[n_test, k], strongest first"""


class TopK:
    """Keeps the k largest (or smallest) scores of each row; of equal ones, those with the lower index.

    Args:
        k: how many.
        largest: False: the smallest.
    """

    def __init__(self, k: int, largest: bool) -> None:
        self.k, self.largest = k, largest
        self.scores: Tensor | None = None
        self.indices: Tensor | None = None

    def add(self, indices: Tensor, scores: Tensor) -> None:
        """Take in scores [M, n] of the training samples with these indices, [n] or [M, n]."""
        indices = indices.expand(len(scores), -1)
        if self.scores is not None and self.indices is not None:
            scores = torch.cat((self.scores, scores), 1)
            indices = torch.cat((self.indices, indices), 1)
        # By index first: the stable sort by score then leaves equal scores in that order.
        by_index = indices.argsort(1)
        scores, indices = scores.gather(1, by_index), indices.gather(1, by_index)
        order = scores.argsort(dim=1, descending=self.largest, stable=True)[:, : self.k]
        self.scores, self.indices = scores.gather(1, order), indices.gather(1, order)

    def result(self) -> KMostInfluentialResults:
        """What was kept."""
        if self.scores is None or self.indices is None:
            raise ValueError("TracIn: the training set is empty")
        return KMostInfluentialResults(self.indices, self.scores)

"""Unsupervised learners whose influence has a closed form, each with its refit without one point.

The influence of a training point x_i on a point x is loss(x) without x_i in the training set minus loss(x) with it,
loss = -log density: positive for proponents. All functions take training points [N, d] and queries [M, d] in float64
and give log densities [M] or influences [M, N].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEIGHBOURS = 5
BANDWIDTH = 0.3


def knn_log_density(train: Tensor, x: Tensor) -> Tensor:
    """k over N times the volume of the ball that holds the k nearest points."""
    count, d = train.shape
    radius = torch.cdist(x, train).sort(1).values[:, NEIGHBOURS - 1]
    log_unit_ball = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)
    return math.log(NEIGHBOURS / count) - log_unit_ball - d * radius.log()


def knn_influence(train: Tensor, x: Tensor) -> Tensor:
    """Without one of the k nearest points the ball grows to the next one: log (N-1)/N + d log R_{k+1}/R_k."""
    count, d = train.shape
    distances = torch.cdist(x, train)
    nearest, order = distances.sort(1)
    growth = d * (nearest[:, NEIGHBOURS] / nearest[:, NEIGHBOURS - 1]).log()
    influence = torch.full_like(distances, math.log((count - 1) / count))
    return influence.scatter_add(
        1, order[:, :NEIGHBOURS], growth[:, None].expand(-1, NEIGHBOURS).contiguous()
    )


def _log_kernels(train: Tensor, x: Tensor) -> Tensor:
    d = train.shape[1]
    scaled = torch.cdist(x, train).square() / (2 * BANDWIDTH**2)
    return -scaled - 0.5 * d * math.log(2 * math.pi * BANDWIDTH**2)


def kernel_log_density(train: Tensor, x: Tensor) -> Tensor:
    """The mean of a Gaussian kernel at every training point."""
    return _log_kernels(train, x).logsumexp(1) - math.log(len(train))


def kernel_influence(train: Tensor, x: Tensor) -> Tensor:
    """log (N-1)/N - log(1 - K_i / sum_j K_j)"""
    share = _log_kernels(train, x).softmax(1)
    return math.log((len(train) - 1) / len(train)) - torch.log1p(-share)


def mixture_log_density(train: Tensor, component: Tensor, x: Tensor) -> Tensor:
    """An isotropic Gaussian for the points of every component, by maximum likelihood, weighted by their number."""
    parts = []
    for c in component.unique():
        mine = train[component == c]
        mean = mine.mean(0)
        variance = (mine - mean).square().sum() / mine.numel()
        parts.append(math.log(len(mine) / len(train)) + _gaussian(x, mean, variance))
    return torch.stack(parts).logsumexp(0)


def _gaussian(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    d = x.shape[1]
    return -0.5 * ((x - mean).square().sum(1) / variance + d * torch.log(2 * math.pi * variance))


def mixture_influence(train: Tensor, component: Tensor, x: Tensor) -> Tensor:
    """To first order in 1/N_c, with r_c the share of component c at x, u = x - mean and v = x_i - mean:

    1 / N_c [r_c (1 + u.v / s^2 + (|v|^2 / (d s^2) - 1) (|u|^2 / s^2 - d) / 2)] - 1 / N

    The mean moves by -v / N_c, the variance s^2 by (s^2 - |v|^2 / d) / N_c, the weights by 1 / N_c and 1 / N.
    """
    count, d = train.shape
    components = component.unique()
    statistics = []
    for c in components:
        mine = train[component == c]
        mean = mine.mean(0)
        variance = (mine - mean).square().sum() / mine.numel()
        statistics.append(
            (len(mine), mean, variance, math.log(len(mine) / count) + _gaussian(x, mean, variance))
        )
    shares = torch.stack([log_part for _, _, _, log_part in statistics]).softmax(0)
    influence = x.new_empty(len(x), count)
    for c, share, (members, mean, variance, _) in zip(components, shares, statistics, strict=True):
        v, u = train[component == c] - mean, x - mean
        along = u @ v.T / variance
        spread = (
            (v.square().sum(1) / (d * variance) - 1) * (u.square().sum(1, keepdim=True) / variance - d) / 2
        )
        influence[:, component == c] = share[:, None] * (1 + along + spread) / members - 1 / count
    return influence

"""The importance-sampled log-likelihood of images with 256 classes a pixel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import fastvae

TILE = 64
"""codes that the careful rival decodes at once"""


def log_px(logits: Tensor, classes: Tensor) -> Tensor:
    """log p(x | z), [N], of logits [N, C 256, H, W] and classes [N, C, H, W], as F.cross_entropy takes them."""
    rows = logits.unflatten(1, (-1, 256)).movedim(2, -1)
    losses = F.cross_entropy(rows.reshape(-1, 256), classes.flatten(), reduction="none")
    return -losses.reshape(len(logits), -1).sum(1)


def tiled_log_px(decode: Callable[[Tensor], Tensor], codes: Tensor, classes: Tensor) -> Tensor:
    """The same for a few codes at a time; the image of code i is i modulo the number of images."""
    rows = torch.arange(len(codes)) % len(classes)
    parts = torch.arange(len(codes)).split(TILE)
    return torch.cat([log_px(decode(codes[part]), classes[rows[part]]) for part in parts])


def log_prior_ratio(z: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """log p(z) - log q(z | x) of codes [..., d]."""
    return 0.5 * (noise.square() + logvar - z.square()).sum(-1)


def copies(model: fastvae.VAE, x: Tensor, noise: Tensor) -> Tensor:
    """One image at a time, as published code does it."""
    found = []
    for image, drawn in zip(x, noise.unbind(1), strict=True):
        repeated = image.expand(len(drawn), *image.shape)
        mu, logvar = model.encoder(repeated).chunk(2, 1)
        z = mu + torch.exp(logvar / 2) * drawn
        classes = (repeated * 255).round().long()
        weights = log_px(model.decoder(z), classes) + log_prior_ratio(z, logvar, drawn)
        found.append(weights.logsumexp(0) - math.log(len(drawn)))
    return torch.stack(found)


def careful(model: fastvae.VAE, decode: Callable[[Tensor], Tensor], x: Tensor, noise: Tensor) -> Tensor:
    mu, logvar = model.encoder(x).chunk(2, 1)
    z = mu + torch.exp(logvar / 2) * noise
    weights = tiled_log_px(decode, z.flatten(0, 1), (x * 255).round().long()).reshape(z.shape[:2])
    return (weights + log_prior_ratio(z, logvar, noise)).logsumexp(0) - math.log(len(noise))

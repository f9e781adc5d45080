"""Layers by file: each the four rules of its operations, in torch; see :mod:`.base`.

A layer of yours is a subclass of :class:`Layer`, registered by :func:`layer_of`; docs/adding-a-layer.md adds some.
"""

from __future__ import annotations

# Importing a file registers its layers.
from . import affine, choices, joins, lengths, maps, norms, pointwise, positions, shapes, softmax, tables  # noqa: F401
from .autograd import AutogradLayer
from .base import (
    Gradients,
    Layer,
    Point,
    Products,
    Values,
    folded,
    latents_of,
    layer_of,
    make_layer,
    over_latents,
    registrations,
    unfolded,
)
from .choices import without_cotangents
from .fused import fuse
from .layout import choose_layout
from .pointwise import Pointwise, pointwise_of

__all__ = [
    "AutogradLayer",
    "Gradients",
    "Layer",
    "Point",
    "Pointwise",
    "Products",
    "Values",
    "choose_layout",
    "folded",
    "fuse",
    "latents_of",
    "layer_of",
    "make_layer",
    "over_latents",
    "pointwise_of",
    "registrations",
    "unfolded",
    "without_cotangents",
]

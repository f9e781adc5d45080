"""Layers by file: each the four rules of its operations, in torch; see :mod:`.base`."""

from __future__ import annotations

# Importing a file registers its layers.
from . import affine, joins, maps, norms, pointwise, selection, shapes  # noqa: F401
from .autograd import AutogradLayer
from .base import Gradients, Layer, Point, Products, make_layer
from .fused import fuse
from .selection import without_cotangents

__all__ = [
    "AutogradLayer",
    "Gradients",
    "Layer",
    "Point",
    "Products",
    "fuse",
    "make_layer",
    "without_cotangents",
]

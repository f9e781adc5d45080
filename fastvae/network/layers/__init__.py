"""Layers by file: each the four rules of its operations, in torch; see :mod:`.base`."""

from __future__ import annotations

# Importing a file registers its layers.
from . import affine, choices, joins, maps, norms, pointwise, shapes, tables  # noqa: F401
from .autograd import AutogradLayer
from .base import Gradients, Layer, Point, Products, make_layer
from .choices import without_cotangents
from .fused import fuse
from .layout import put_channels_last

__all__ = [
    "AutogradLayer",
    "Gradients",
    "Layer",
    "Point",
    "Products",
    "fuse",
    "make_layer",
    "put_channels_last",
    "without_cotangents",
]

"""Layers by file: each the four rules of its operations, in torch; see :mod:`.base`."""

from __future__ import annotations

# Importing a file registers its layers.
from . import affine, choices, joins, maps, norms, pointwise, shapes  # noqa: F401
from .autograd import AutogradLayer
from .base import Gradients, Layer, Point, Products, make_layer

__all__ = ["AutogradLayer", "Gradients", "Layer", "Point", "Products", "make_layer"]

"""Where images begin: a code that is reshaped to [B, C, H, W] on its way to a convolution gets its channels last.

Convolutions on a CPU are up to twice as fast so, and what follows keeps the layout. Converted once here, nothing is
converted back and forth at sums of both layouts.
"""

from __future__ import annotations

from collections.abc import Sequence

from .affine import ConvolutionLayer
from .base import Layer
from .fused import FusedLayer
from .joins import Concatenation, ProductLayer, ScaleLayer, SumLayer
from .maps import MapLayer
from .norms import BatchNorm, NormLayer
from .pointwise import PointwiseLayer
from .shapes import Reshape

_KEEPERS = (
    *(FusedLayer, PointwiseLayer, NormLayer, BatchNorm, MapLayer),
    *(SumLayer, ScaleLayer, ProductLayer, Concatenation),
)


def put_channels_last(layers: Sequence[Layer]) -> None:
    """Tell the reshapes from which convolutions take their images, through layers that keep a layout."""
    made = {layer.index: layer for layer in layers}
    waiting = [layer.x for layer in layers if isinstance(layer, ConvolutionLayer)]
    seen: set[int] = set()
    while waiting:
        index = waiting.pop()
        layer = made.get(index)
        if layer is None or index in seen:
            continue
        seen.add(index)
        if isinstance(layer, Reshape):
            layer.makes_images = True
        elif isinstance(layer, _KEEPERS):
            waiting += layer.slots

"""Where images begin: a code that is reshaped to [B, C, H, W] on its way to a convolution gets its channels last.

Convolutions on a CPU are up to twice as fast so, and what follows keeps the layout. Converted once here, nothing is
converted back and forth at sums of both layouts. A norm over the places of each channel apart wants them side by side:
where there is one, everything stays as PyTorch has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .affine import ConvolutionLayer
from .base import Layer
from .fused import FusedLayer
from .joins import Concatenation, ProductLayer, ScaleLayer, SumLayer
from .maps import MapLayer
from .norms import BatchNorm, LayerNorm, NormLayer
from .pointwise import PointwiseLayer
from .shapes import Reshape

_KEEPERS = (
    *(FusedLayer, PointwiseLayer, NormLayer, BatchNorm, MapLayer),
    *(SumLayer, ScaleLayer, ProductLayer, Concatenation),
)


def choose_layout(layers: Sequence[Layer]) -> None:
    """Tell convolutions, and the reshapes from which they take their images through layers that keep a layout."""
    dims = {len(layer.geometry.stride) for layer in layers if isinstance(layer, ConvolutionLayer)}
    if any(len(norm.shape) in dims - {1} for norm in _layer_norms(layers)):
        for each in layers:
            if isinstance(each, ConvolutionLayer):
                each.channels_last = False
        return
    made = {layer.index: layer for layer in layers}
    waiting = [layer.x for layer in layers if isinstance(layer, ConvolutionLayer)]
    visited: set[int] = set()
    while waiting:
        index = waiting.pop()
        layer = made.get(index)
        if layer is None or index in visited:
            continue
        visited.add(index)
        if isinstance(layer, Reshape):
            layer.makes_images = True
        elif isinstance(layer, _KEEPERS):
            waiting += layer.slots


def _layer_norms(layers: Sequence[Layer]) -> list[LayerNorm]:
    norms = [layer.norm if isinstance(layer, FusedLayer) else layer for layer in layers]
    return [norm for norm in norms if isinstance(norm, LayerNorm)]

"""What a sequential network's matrix products cost on this machine, with nothing around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .timing import Contestant, matrix_product


@dataclass(frozen=True)
class Product:
    """One layer's forward as a product of [rows, inner] and [inner, columns]; its transposes cost as much."""

    rows: int
    inner: int
    columns: int
    operations: int
    """fewest floating-point operations: those that a convolution's padding cuts off are not counted"""


def products(network: nn.Sequential, inputs: Tensor) -> list[Product]:
    """The products of the Linear and ConvTranspose2d layers (groups and dilation 1) of a network.

    A transposed convolution counts as its product [B H W, C_in] x [C_in, C_out kh kw], without the fold.
    """
    found = []
    h = inputs.detach()
    for layer in network:
        with torch.no_grad():
            out = layer(h)
        if isinstance(layer, nn.Linear):
            rows, inner, columns = len(h), layer.in_features, layer.out_features
            found.append(Product(rows, inner, columns, 2 * rows * inner * columns))
        elif isinstance(layer, nn.ConvTranspose2d):
            height, width = layer.kernel_size
            taps = _taps(layer, 0, h.shape[2], out.shape[2]) * _taps(layer, 1, h.shape[3], out.shape[3])
            rows, inner = len(h) * h.shape[2] * h.shape[3], layer.in_channels
            operations = 2 * len(h) * inner * layer.out_channels * taps
            found.append(Product(rows, inner, layer.out_channels * height * width, operations))
        h = out
    return found


def _taps(layer: nn.ConvTranspose2d, axis: int, size_in: int, size_out: int) -> int:
    """Pairs of input position and kernel tap along an axis whose output exists."""
    stride, padding = layer.stride[axis], int(layer.padding[axis])
    positions = (i * stride - padding + k for i in range(size_in) for k in range(layer.kernel_size[axis]))
    return sum(0 <= position < size_out for position in positions)


def gemm_floor(layers: Sequence[Product], sweeps: int, device: torch.device) -> Contestant:
    """Forward, reverse and weight gradient of every layer, as often, in float32; see ``timing.matrix_product``.

    A gradient to the input that is differentiated through takes two such sweeps: forward, reverse, tangent, adjoint,
    and two weight gradients.
    """
    each: list[Callable[[], object]] = []
    for layer in layers:
        h = torch.randn(layer.rows, layer.inner, device=device)
        delta = torch.randn(layer.rows, layer.columns, device=device)
        weight = torch.randn(layer.columns, layer.inner, device=device)
        h_out, delta_out, weight_out = torch.empty_like(h), torch.empty_like(delta), torch.empty_like(weight)
        each += [
            matrix_product(h, weight.t(), delta_out),
            matrix_product(delta, weight, h_out),
            matrix_product(delta.t(), h, weight_out),
        ]

    def run() -> None:
        for _ in range(sweeps):
            for product in each:
                product()

    return run


def gemm_operations(layers: Sequence[Product], sweeps: int) -> int:
    """Floating-point operations of :func:`gemm_floor`, less those that padding cuts off."""
    return 3 * sweeps * sum(layer.operations for layer in layers)


@dataclass(frozen=True)
class InfluenceLayer:
    """A layer whose gradient of one sample is a sum of ``terms`` outer products."""

    terms: int
    inner: int
    columns: int
    first: bool
    """of a network whose input needs no gradient"""


def influence_layers(networks: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[InfluenceLayer]:
    """The Linear and (transposed) convolutional layers of networks, the first of which reads the data.

    Args:
        inputs: one sample for each network.
    """
    found: list[InfluenceLayer] = []

    def hook(layer: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # A transposed convolution's terms are the positions of its input, each with a patch of the output.
        rows = args[0] if isinstance(layer, nn.ConvTranspose2d) else out
        terms = 1 if isinstance(layer, nn.Linear) else rows[0, 0].numel()
        found.append(InfluenceLayer(terms, weight[0].numel(), len(weight), not found))

    for network, sample in zip(networks, inputs, strict=True):
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        layers = [module for module in network.modules() if isinstance(module, kinds)]
        handles = [layer.register_forward_hook(hook) for layer in layers]
        with torch.no_grad():
            network(sample)
        for handle in handles:
            handle.remove()
    return found


def influence_operations(layers: Sequence[InfluenceLayer], train: int, queries: int) -> int:
    """Fewest operations of all dot products between the gradients of ``train`` and of ``queries`` samples.

    Forward and reverse through every layer; then Gram matrices of its terms, or gradients and their product.
    """
    total = 0
    for layer in layers:
        passes = (1 if layer.first else 2) * layer.terms * layer.inner * layer.columns
        total += 2 * passes * (train + queries) + contraction_operations(layer, train, queries)
    return total


def contraction_operations(layer: InfluenceLayer, train: int, queries: int) -> int:
    """Fewest operations of a layer's part of the dot products, given the factors: the cheaper exact route."""
    product = layer.terms * layer.inner * layer.columns
    gram = layer.terms**2 * (layer.inner + layer.columns) * train * queries
    return 2 * min(gram, product * (train + queries) + layer.inner * layer.columns * train * queries)

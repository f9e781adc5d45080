"""What a sequential network's matrix products cost on this machine, with nothing around them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .common import Contestant


@dataclass(frozen=True)
class Product:
    """One layer's forward as a product of [rows, inner] and [inner, columns]; its transposes cost as much."""

    rows: int
    inner: int
    columns: int
    operations: int
    """fewest floating-point operations: those that a convolution's padding cuts off are not counted"""
    stackable: bool
    """weight gradients of several passes are one product, because inputs need not be unfolded"""


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
            found.append(Product(rows, inner, columns, 2 * rows * inner * columns, True))
        elif isinstance(layer, nn.ConvTranspose2d):
            height, width = layer.kernel_size
            taps = _taps(layer, 0, h.shape[2], out.shape[2]) * _taps(layer, 1, h.shape[3], out.shape[3])
            rows, inner = len(h) * h.shape[2] * h.shape[3], layer.in_channels
            operations = 2 * len(h) * inner * layer.out_channels * taps
            found.append(Product(rows, inner, layer.out_channels * height * width, operations, False))
        h = out
    return found


def _taps(layer: nn.ConvTranspose2d, axis: int, size_in: int, size_out: int) -> int:
    """Pairs of input position and kernel tap along an axis whose output exists."""
    stride, padding = layer.stride[axis], int(layer.padding[axis])
    positions = (i * stride - padding + k for i in range(size_in) for k in range(layer.kernel_size[axis]))
    return sum(0 <= position < size_out for position in positions)


def second_order_floor(
    layers: Sequence[Product], forces: int, device: torch.device, *, stacked: bool
) -> Contestant:
    """The products of ``forces`` gradients to the input and of differentiating through each, in float32.

    A layer and force: forward, reverse, tangent, adjoint, and two weight gradients, by torch.mm into results that
    exist. With ``stacked`` the weight gradients of all forces are one product where the layer allows it.
    """
    each: list[Callable[[], object]] = []
    once: list[Callable[[], object]] = []
    for layer in layers:
        h = torch.randn(layer.rows, layer.inner, device=device)
        delta = torch.randn(layer.rows, layer.columns, device=device)
        weight = torch.randn(layer.columns, layer.inner, device=device)
        h_out, delta_out, weight_out = torch.empty_like(h), torch.empty_like(delta), torch.empty_like(weight)
        forward = functools.partial(torch.mm, h, weight.t(), out=delta_out)
        reverse = functools.partial(torch.mm, delta, weight, out=h_out)
        each += [forward, forward, reverse, reverse]
        if stacked and layer.stackable:
            all_h, all_delta = h.repeat(2 * forces, 1), delta.repeat(2 * forces, 1)
            once.append(functools.partial(torch.mm, all_delta.t(), all_h, out=weight_out))
        else:
            each += [functools.partial(torch.mm, delta.t(), h, out=weight_out)] * 2

    def run() -> None:
        for _ in range(forces):
            for product in each:
                product()
        for product in once:
            product()

    return run


def second_order_operations(layers: Sequence[Product], forces: int) -> int:
    """Floating-point operations of :func:`second_order_floor`, less those that padding cuts off."""
    return 6 * forces * sum(layer.operations for layer in layers)


def tangent_floor(layers: Sequence[Product], device: torch.device) -> Contestant:
    """A tangent and an adjoint sweep in float32: forward, reverse and weight gradient of each layer but the first.

    The first layer's tangents are its columns, whatever the sample.
    """
    each: list[Callable[[], object]] = []
    for layer in layers[1:]:
        h = torch.randn(layer.rows, layer.inner, device=device)
        delta = torch.randn(layer.rows, layer.columns, device=device)
        weight = torch.randn(layer.columns, layer.inner, device=device)
        h_out, delta_out, weight_out = torch.empty_like(h), torch.empty_like(delta), torch.empty_like(weight)
        each += [
            functools.partial(torch.mm, h, weight.t(), out=delta_out),
            functools.partial(torch.mm, delta, weight, out=h_out),
            functools.partial(torch.mm, delta.t(), h, out=weight_out),
        ]

    def run() -> None:
        for product in each:
            product()

    return run


def tangent_operations(layers: Sequence[Product]) -> int:
    """Floating-point operations of :func:`tangent_floor`, less those that padding cuts off."""
    return 3 * sum(layer.operations for layer in layers[1:])


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

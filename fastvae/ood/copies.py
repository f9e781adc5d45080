"""A copy of an encoder for every image of a batch, each with its own Adam state, trained side by side.

Here by fused kernels; differentiated.py has what autograd trains.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvae._compiling import is_captured
from fastvae._extension import raw
from fastvae.lowering import LoweredNetwork, UnsupportedLayer
from fastvae.lowering.rows import RowsModule
from fastvae.models.base import BaseVAE

__all__ = ["Adam", "Copies", "LoweredCopies", "PosteriorCopies", "lower_encoder", "numel_of"]


@dataclass(frozen=True)
class Adam:
    """The settings of ``torch.optim.Adam``, whose arithmetic the copies follow."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    eps: float = 1e-8


class Copies(ABC):
    """B encoders, one for each x; a step is ``forward`` and then ``update``."""

    can_be_captured: bool
    """Whether steps may be replayed from a CUDA graph from now on."""

    @abstractmethod
    def forward(self) -> Tensor:
        """What each encoder makes of its image, mean before log variance: [B, 2 d], detached."""

    @abstractmethod
    def update(self, grad: Tensor) -> None:
        """One step of Adam for every copy, given the gradient [B, 2 d] of its loss to its output."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The parameters of all copies by their names in the encoder, [B, *shape] each."""


class LoweredCopies(Copies):
    """An encoder that can be lowered, in C++: no gradient of a dense layer is stored, no graph recorded.

    Args:
        model: in eval mode.
        x: [B, ...], on the model's device.
        adam: its settings.
        num_steps: at most so many updates.

    Raises:
        UnsupportedLayer: what the encoder has that the kernels do not train, named.
        CoupledSamples: an encoder whose samples depend on each other.
    """

    can_be_captured = True

    def __init__(self, model: BaseVAE, x: Tensor, adam: Adam, num_steps: int) -> None:
        if type(model).encode is not BaseVAE.encode or type(model)._split is not BaseVAE._split:
            raise UnsupportedLayer(f"lower: {type(model).__name__} encodes in a way of its own")
        dtype = next(model.encoder.parameters(), x).dtype
        rows = model.likelihood.as_float(x, dtype).flatten(1)
        network = lower_encoder(model.encoder, tuple(x.shape[1:]), rows)
        self._names = network.names
        settings = adam.lr, *adam.betas, adam.eps, adam.weight_decay
        self._copies = raw.NetworkCopies(network.spec, network.tensors, rows, *settings, num_steps)

    def forward(self) -> Tensor:
        """See ``Copies``."""
        return self._copies.forward()

    def update(self, grad: Tensor) -> None:
        """See ``Copies``."""
        self._copies.update(grad)

    def parameters(self) -> dict[str, Tensor]:
        """See ``Copies``."""
        found = zip(self._names, self._copies.parameters(), strict=True)
        return {name: tensor for name, tensor in found if tensor is not None}


class FusedAdam:
    """PyTorch's fused step, of which a CUDA graph may be made.

    Args:
        trained: leaves.
        settings: without weight decay unless ``decays``.
    """

    def __init__(self, trained: list[Tensor], settings: Adam, *, decays: bool = True) -> None:
        decay = settings.weight_decay if decays else 0.0
        self._trained = trained
        self._optimizer = torch.optim.Adam(
            trained, settings.lr, settings.betas, settings.eps, decay, fused=True
        )

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """What has no gradient is left alone, decay and all."""
        for leaf, gradient in zip(self._trained, gradients, strict=True):
            # The fused step takes numbers in the order of memory, whatever a gradient's strides say [torch 2.13].
            leaf.grad = None if gradient is None else gradient.contiguous()
        # The step is the same with this flag and without: PyTorch asks for it in a graph and warns of it outside.
        self._optimizer.param_groups[0]["capturable"] = is_captured(self._trained[0])
        self._optimizer.step()
        self._optimizer.zero_grad()


class PosteriorCopies(Copies):
    """No encoders at all: Adam on the mean and the log variance of each image, from the encoder's on.

    Weight decay is for weights: there is none here.
    """

    can_be_captured = True

    def __init__(self, mu: Tensor, logvar: Tensor, adam: Adam) -> None:
        self._output = torch.cat((mu, logvar), 1)
        self._optimizer = FusedAdam([self._output], adam, decays=False)

    def forward(self) -> Tensor:
        """See ``Copies``."""
        return self._output.clone()

    def update(self, grad: Tensor) -> None:
        """See ``Copies``."""
        self._optimizer.step([grad])

    def parameters(self) -> dict[str, Tensor]:
        """None: the encoder was not touched."""
        return {}


def lower_encoder(
    encoder: nn.Module, shape: tuple[int, ...], compare_at: Tensor | None = None
) -> LoweredNetwork:
    """The encoder's layers for inputs of this shape, if every sample can own all their parameters.

    Args:
        compare_at: flat rows, of which the first two are compared at.
    """
    if len(shape) > 3:
        raise UnsupportedLayer(f"lower: a sample of more than three dimensions, {list(shape)}")
    network = RowsModule(encoder, shape).lower(compare_at)
    own = {id(parameter) for parameter in encoder.parameters()}
    used: set[str] = set()
    for layer in network.spec.split(";"):
        kind, *words = layer.split()
        if kind == "conv_transpose2d" or (kind == "conv2d" and words[-1] != "1"):
            raise UnsupportedLayer(f"lower: a {kind} of this kind is not trained for each sample by kernels")
        tensors = {"linear": 2, "conv2d": 2, "batch_norm": 2}.get(kind, 0)
        for word in words[:tensors]:
            if word == "-1":
                continue
            name = network.names[int(word)]
            if id(network.tensors[int(word)]) not in own:
                raise UnsupportedLayer(
                    f"lower: tensor '{name}' is computed by a parametrisation, whose own parameters are trained"
                )
            if word in used:
                raise UnsupportedLayer(f"lower: parameter '{name}' is shared by two layers")
            used.add(word)
    if len(used) != len(own):
        raise UnsupportedLayer("lower: a parameter is shared by two layers, or used by none")
    return network


def numel_of(encoder: nn.Module) -> int:
    """Numbers in one copy of an encoder."""
    return sum(math.prod(parameter.shape) for parameter in encoder.parameters())

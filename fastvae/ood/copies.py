"""A copy of an encoder for every image of a batch, each with its own Adam state, trained side by side.

Here by fused kernels; differentiated.py has what autograd trains.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvae._compiling import is_captured
from fastvae._extension import raw
from fastvae.lowering import CoupledSamples, LoweredNetwork, UnsupportedLayer, lower
from fastvae.lowering.errors import join
from fastvae.models.base import BaseVAE
from fastvae.network.chain import chain_of
from fastvae.ood.encoding import check_stock_encoding, given_to_encoder, read_encoder
from fastvae.private import origin_of

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
    """An encoder that is a chain of layers, in C++: no gradient of a dense layer is stored, no graph recorded.

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
        check_stock_encoding(model)
        given = given_to_encoder(model, x)
        rows = given.flatten(1)
        is_read = False
        try:
            network = lower_encoder(model.encoder, tuple(x.shape[1:]), rows)
            spec = network.spec
            self._parts = [[named] for named in zip(network.names, network.tensors, strict=True)]
        except CoupledSamples:
            raise
        except UnsupportedLayer:
            spec, self._parts = _read_encoder(model, given)
            is_read = True
        self._encoder = model.encoder
        tensors = [
            torch.cat([tensor for _, tensor in parts]) if len(parts) > 1 else parts[0][1]
            for parts in self._parts
        ]
        settings = adam.lr, *adam.betas, adam.eps, adam.weight_decay
        try:
            self._copies = raw.NetworkCopies(spec, tensors, rows, *settings, num_steps)
        except ValueError as error:
            if not is_read:
                raise
            # A chain of shapes that the kernels do not know, such as those of volumes.
            raise UnsupportedLayer(f"lower: {error}") from error
        if is_read:
            self._compare(model.encode(x))

    def forward(self) -> Tensor:
        """See ``Copies``."""
        return self._copies.forward()

    def update(self, grad: Tensor) -> None:
        """See ``Copies``."""
        self._copies.update(grad)

    def parameters(self) -> dict[str, Tensor]:
        """See ``Copies``."""
        copies = self._copies.parameters()
        found = {
            name: part
            for parts, tensor in zip(self._parts, copies, strict=True)
            if tensor is not None
            for (name, _), part in zip(parts, tensor.split([len(own) for _, own in parts], 1), strict=True)
        }
        # What the encoder has and does not use.
        samples = len(next(iter(found.values())))
        return {
            name: found[name] if name in found else own.detach().expand(samples, *own.shape)
            for name, own in self._encoder.named_parameters()
        }

    def _compare(self, posterior: tuple[Tensor, Tensor]) -> None:
        """The chain that was read gives the encoder's own output."""
        expected = torch.cat(posterior, 1)
        error = float((self.forward().to(expected) - expected).norm())
        near = 1e-3 if expected.dtype == torch.float32 else 1e-6
        if not error <= near * float(expected.norm()) and bool(expected.isfinite().all()):
            raise UnsupportedLayer("lower: the chain of layers that was read of it gives another output")


_no_chains: weakref.WeakKeyDictionary[nn.Module, dict[torch.Size, str]] = weakref.WeakKeyDictionary()
"""Of encoders that were found to be no chain, by the shape of a sample, why."""


def _read_encoder(model: BaseVAE, x: Tensor) -> tuple[str, list[list[tuple[str, Tensor]]]]:
    """Layers and, by tensor of theirs, names and values of what lies in it one below the other."""
    why_not = _no_chains.setdefault(origin_of(model.encoder) or model.encoder, {})
    if x.shape[1:] in why_not:
        raise UnsupportedLayer(why_not[x.shape[1:]])
    try:
        network = read_encoder(model, x)
        chain = chain_of(network, x[:2], for_copies=True)
    except UnsupportedLayer as error:
        why_not[x.shape[1:]] = str(error)
        raise
    sources = network.sweeps.program.sources
    parts: list[list[tuple[str, Tensor]]] = []
    for numbers in chain.sources:
        parts.append([])
        for number in numbers:
            source, tensor = sources[number - 1], network.tensors[number - 1]
            if tensor is None or source.constant is not None or source.steps:
                raise UnsupportedLayer("lower: a layer's tensor is no parameter of the encoder")
            parts[-1].append((join(source.path, source.name).removeprefix("encoder."), tensor))
    _check_trained(model.encoder, chain.spec, parts)
    return chain.spec, parts


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

    Weight decay is for an encoder's parameters: there is none here.
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
    network = lower(encoder, shape=shape, compare_at=compare_at)
    parts = [[named] for named in zip(network.names, network.tensors, strict=True)]
    if _check_trained(encoder, network.spec, parts) != len(list(encoder.parameters())):
        raise UnsupportedLayer("lower: a parameter is shared by two layers, or used by none")
    return network


def _check_trained(encoder: nn.Module, spec: str, parts: Sequence[Sequence[tuple[str, Tensor]]]) -> int:
    """How many parameters are trained: those of the encoder itself, each in one place, and all that layers train.

    Args:
        parts: by tensor of the spec, names and values of what lies in it one below the other.
    """
    own = {id(parameter) for parameter in encoder.parameters()}
    used: set[int] = set()
    for layer in spec.split(";"):
        kind, *words = layer.split()
        if kind == "conv_transpose2d" or (kind == "conv2d" and words[-1] != "1"):
            raise UnsupportedLayer(f"lower: a {kind} of this kind is not trained for each sample by kernels")
        tensors = {"linear": 2, "conv2d": 2, "batch_norm": 2}.get(kind, 0)
        for name, tensor in (part for word in words[:tensors] if word != "-1" for part in parts[int(word)]):
            if id(tensor) not in own:
                raise UnsupportedLayer(
                    f"lower: tensor '{name}' is no parameter of the encoder: a buffer, or computed by a "
                    "parametrisation, whose own parameters are trained"
                )
            if id(tensor) in used:
                raise UnsupportedLayer(f"lower: parameter '{name}' is shared by two layers")
            used.add(id(tensor))
    return len(used)


def numel_of(encoder: nn.Module) -> int:
    """Numbers in one copy of an encoder."""
    return sum(math.prod(parameter.shape) for parameter in encoder.parameters())

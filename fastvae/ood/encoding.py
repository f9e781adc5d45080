"""A model's encoder as one network from data to mean and log variance, read as a graph of operations."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

from fastvae.lowering import UnsupportedLayer
from fastvae.models.base import BaseVAE
from fastvae.models.inputs import JoinedEncoder
from fastvae.network.cache import ReadNetwork, read_network
from fastvae.private import copy_has_origin, origin_of

__all__ = ["check_stock_encoding", "given_to_encoder", "read_encoder"]

_joined: weakref.WeakKeyDictionary[BaseVAE, JoinedEncoder] = weakref.WeakKeyDictionary()
"""Of models that are used again, so that what was read of their encoders is known."""

_in_place_of: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
"""By encoder, what stands for it where what was read of its private copies is remembered for the next ones."""


def check_stock_encoding(model: BaseVAE) -> None:
    """UnsupportedLayer for a model that makes something of its own of the encoder's output."""
    if type(model).encode is not BaseVAE.encode or type(model)._split is not BaseVAE._split:
        raise UnsupportedLayer(f"lower: {type(model).__name__} encodes in a way of its own")


def given_to_encoder(model: BaseVAE, x: Tensor) -> Tensor:
    """x as the encoder sees it, floating."""
    return model.likelihood.as_float(x, next(model.encoder.parameters(), x).dtype)


def read_encoder(model: BaseVAE, x: Tensor, condition: Tensor | None = None) -> ReadNetwork:
    """The encoder for data like x [B, ...], its log variances bounded as the model's are; see ``read_network``."""
    joined = _joined.get(model)
    if joined is None or joined.encoder is not model.encoder or joined.max_logvar != model.max_logvar:
        joined = _joined[model] = JoinedEncoder(model.encoder, model.max_logvar)
        origin = origin_of(model.encoder)
        if origin is not None:
            copy_has_origin(joined, _in_place_of.setdefault(origin, nn.Module()))
    return read_network(joined, x, condition=condition, of_data=True)

"""Why a module is not lowered."""

from __future__ import annotations

__all__ = ["CoupledSamples", "ImpossibleLayer", "NotADecoder", "UnsupportedLayer"]


class UnsupportedLayer(ValueError):  # noqa: N818
    """A module that :func:`fastvae.lowering.lower` cannot turn into a layer list.

    The message names the module's path inside the decoder, its type, the reason and, where there is one, the
    remedy, and the line of a custom forward that stopped the reading.
    """


class CoupledSamples(UnsupportedLayer):
    """BatchNorm or Dropout in training mode: a sample's output depends on the other samples or on noise.

    No closed form of one sample's gradient exists then, so callers raise this error and do not fall back to
    autograd.
    """


class ImpossibleLayer(ValueError):  # noqa: N818
    """A layer with numbers that PyTorch refuses as soon as it runs, such as a stride of 0.

    Plain autograd has no result to fall back to, so callers raise this error.
    """


class NotADecoder(UnsupportedLayer):
    """A forward that needs more than z, or returns something else than one tensor: autograd cannot take it either."""


def join(path: str, name: str) -> str:
    """The path of something inside the module at ``path``."""
    return f"{path}.{name}" if path and name else path or name


def describe(path: str, kind: str, reason: str) -> str:
    """The one form of every message: ``lower: layer '3.1' (Upsample): reason``."""
    where = f"layer '{path}'" if path else "the module itself"
    return f"lower: {where} ({kind}): {reason}"

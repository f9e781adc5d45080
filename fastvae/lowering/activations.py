"""Activations: each function takes what its torch.nn.functional namesake takes and gives kind and numbers."""

from __future__ import annotations

Activation = tuple[str, tuple[float, ...]]


def relu(inplace: bool = False) -> Activation:
    """torch's ``relu``."""
    return "relu", ()


def leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    """torch's ``leaky_relu``."""
    return "leaky_relu", (negative_slope,)


def elu(alpha: float = 1.0, inplace: bool = False) -> Activation:
    """torch's ``elu``."""
    return "elu", (alpha,)


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    """torch's ``softplus``."""
    return "softplus", (beta, threshold)


def tanh() -> Activation:
    """torch's ``tanh``."""
    return "tanh", ()


def sigmoid() -> Activation:
    """torch's ``sigmoid``."""
    return "sigmoid", ()


def silu(inplace: bool = False) -> Activation:
    """torch's ``silu``."""
    return "silu", ()


def gelu(*, approximate: str = "none") -> Activation:
    """torch's ``gelu``."""
    return {"none": "gelu", "tanh": "gelu_tanh"}[approximate], ()

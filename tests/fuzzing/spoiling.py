"""Something else in the place of an argument, near it or far."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WORDS = [
    *("linear", "conv2d", "conv_transpose2d", "batch_norm", "reshape", "relu", "elu", "softplus", "nonsense"),
    *("sigmoid", "gaussian", "bernoulli", "categorical", "", ";", "\0", "\N{GREEK SMALL LETTER PHI}"),
    # None between a dozen and a million: layer upon layer of such strides is an image that takes minutes.
    *("-1", "0", "1", "2", "3", "4", "7", "12", "-5", "1048577", "2147483648", "9223372036854775807"),
    *("99999999999999999999", "1e300", "1e999", "nan", "inf", "-0.5", "0.5", "0,5", "+1", "0x2", "1_0"),
]


def spoil_text(text: str) -> str:
    """One or two words of a network's or a likelihood's text changed, added or taken out."""
    words = text.replace(";", " ; ").split(" ")
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(words))
        change = random.randrange(5)
        if change < 2:
            words[at] = random.choice(WORDS)
        elif change == 2:
            words.insert(at, random.choice(WORDS))
        elif change == 3:
            del words[at : at + random.choice((1, 2, 5))]
            words = words or [""]
        elif len(words) < 60:
            words = [*words, ";", *words]
    return " ".join(words).replace(" ; ", ";")


def negated(t: Tensor) -> Tensor:
    return torch.imag(torch.complex(torch.zeros_like(t), -t).conj())


LAYOUTS: list[Callable[[Tensor], Any]] = [
    lambda t: t.mT.contiguous().mT,
    lambda t: torch.stack((t, t + 1), -1)[..., 0],
    lambda t: t[:1].expand(t.shape),
    lambda t: t[..., :1].expand(t.shape),
    lambda t: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape),
    lambda t: t.flip(0).flip(0),
    negated,
]
"""Of the same shape: they are taken, and read as what they are."""

CHANGES: list[Callable[[Tensor], Any]] = [
    lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    lambda t: t.half(),
    lambda t: t.to(torch.bfloat16),
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse() if t.numel() < 2**20 else None,
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten(),
    lambda t: t[:0],
    lambda t: t[..., :0],
    lambda t: t[:1],
    lambda t: t.repeat([2] * t.dim()),
    lambda t: t.mT,
    lambda t: t.expand(3, *t.shape),
    lambda t: t[:1].expand(2**40, *t.shape[1:]),
    lambda t: t[..., :1].expand(*t.shape[:-1], 2**61),
    lambda t: torch.full_like(t, float("nan")),
    lambda t: torch.full_like(t, float("inf")),
    lambda t: t * 1e38,
    lambda t: torch.randn(1024).as_strided((256, 2), (0, 0)),
    lambda t: torch.empty(0),
    lambda t: torch.tensor(1.0),
    lambda t: None,
    lambda t: "text",
    lambda t: 1.5,
    lambda t: [],
    lambda t: object(),
]


MODULES: list[Callable[[], Any]] = [
    nn.Identity,
    nn.Sequential,
    lambda: nn.Linear(3, 3),
    lambda: nn.Linear(2, 3).double(),
    lambda: nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()),
    lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    lambda: nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 1, stride=0)),
    lambda: nn.LSTM(2, 3),
    lambda: nn.Embedding(3, 3),
    lambda: lambda z: z,
    lambda: None,
]


def empty_one(value: Any) -> Any:
    """A tensor, or one of a list, as sharded training leaves it: with its sizes and without its memory.

    Nothing else may be wrong with the call, or PyTorch reads such a tensor itself to print it, and crashes.
    """
    if isinstance(value, list) and value:
        at = random.randrange(len(value))
        return [*value[:at], empty_one(value[at]), *value[at + 1 :]]
    if isinstance(value, Tensor):
        value = value.clone()
        value.untyped_storage().resize_(0)
    return value


def spoil_tensor(t: Tensor) -> Any:
    try:
        return random.choice(LAYOUTS if random.random() < 0.5 else CHANGES)(t)
    except (RuntimeError, IndexError, AssertionError):  # there is no such form of it
        return None


def spoil(value: Any) -> Any:
    """Something else in the place of an argument."""
    if isinstance(value, Tensor):
        return spoil_tensor(value)
    if isinstance(value, str):
        return random.choice([*[spoil_text(value)] * 6, "", "nonsense", 3, None])
    if isinstance(value, bool):
        return random.choice([not value, None, "yes", 2, torch.tensor(True)])
    if isinstance(value, int):
        return random.choice([0, -1, 1, 3, 2**31, 2**63 - 1, -(2**63), 2**64, None, 0.5, "1"])
    if isinstance(value, float):
        return random.choice([float("nan"), float("inf"), -1.0, 1e300, None, "0.1", torch.ones(7), 2**70])
    if isinstance(value, (list, tuple)):
        changed = list(value)
        if not changed or random.random() < 0.2:
            return random.choice(
                [[], changed * 2, changed[:-1], None, tuple(changed), "list", [None], [[2**62]]]
            )
        at = random.randrange(len(changed))
        changed[at] = spoil(changed[at])
        return changed
    if isinstance(value, nn.Module):
        return random.choice(MODULES)()
    return random.choice([torch.randn(4, 2), 3, "text"])

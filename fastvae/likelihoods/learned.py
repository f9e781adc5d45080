"""Likelihoods with parameters of their own: modules, trained and saved with the model that they are part of."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvae._compiling import is_compiling
from fastvae.arguments import expect, expect_positive, is_integer
from fastvae.likelihoods.base import Likelihood

__all__ = ["LearnedLikelihood", "without_parameters"]


class LearnedLikelihood(nn.Module, Likelihood):
    """A likelihood of which some natural parameters are no decoder's outputs but parameters of its own.

    It is a ``head``, for which a decoder would give all of them, with these put in for what the decoder lacks. So a
    flow, a force or a gradient to them is that of a network: the decoder with them appended (``without_parameters``).

    Args:
        head: for [B, C, ...] of the decoder and as many values behind them.
        name: of the parameter: "log_scale" or "log_dispersion".
        shape: of the parameter, which is broadcast to a sample of the decoder's output: () for one that all elements
            share, [C, 1, 1] for one a channel, the sample's own for one an element.
        initial: value whose logarithm the parameter starts as; a tensor in place of it is broadcast to ``shape``.
        is_trained: False: a buffer instead.
        owner: whom errors name; None: the head.
    """

    def __init__(
        self,
        head: Likelihood,
        name: str,
        shape: Sequence[int],
        initial: float | Tensor,
        is_trained: bool = True,
        owner: str | None = None,
    ) -> None:
        super().__init__()
        kind = type(head).__name__ if owner is None else owner
        if not isinstance(shape, Sequence):
            raise TypeError(f"{kind}: shape: expected a sequence of integers, got {type(shape).__name__}")
        sizes = tuple(shape)
        expect(
            all(is_integer(size) and size > 0 for size in sizes),
            f"{kind}: shape: expected positive integers",
            sizes,
        )
        if isinstance(initial, Tensor):
            start = initial.detach().clone().to(torch.get_default_dtype())
        else:
            expect_positive(kind, initial=initial)
            start = torch.full(sizes, float(initial))
        if not (start.is_meta or bool((start > 0).all() and start.isfinite().all())):
            raise ValueError(f"{kind}: {name.removeprefix('log_')}: expected finite numbers above 0")
        self.head, self.name = head, name
        if is_trained:
            self.register_parameter(name, nn.Parameter(start.log()))
        else:
            self.register_buffer(name, start.log())

    @property
    def logarithm(self) -> Tensor:
        """The parameter (or buffer) itself."""
        found: Tensor = getattr(self, self.name)
        return found

    @property
    def values_per_element(self) -> int:
        """Decoder outputs for one element of x: one fewer than the head has."""
        return self.head.values_per_element - 1

    def forward(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """``log_prob``."""
        return self.log_prob(params, x, weight)

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log density of a sample: [B]; see ``Likelihood.log_prob``."""
        return self.head.log_prob(self._appended(params), x, weight)

    def mean(self, params: Tensor) -> Tensor:
        """E[x | params]; see ``Likelihood.mean``."""
        return self.head.mean(self._appended(params))

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """One draw of x; see ``Likelihood.sample``."""
        return self.head.sample(self._appended(params), generator=generator)

    def as_float(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``Likelihood.as_float``."""
        return self.head.as_float(x, dtype)

    def check(self, x: Tensor) -> None:
        """See ``Likelihood.check``."""
        self.head.check(x)

    def extra_repr(self) -> str:
        """What ``repr`` says of it."""
        return f"{self.head}, {self.name}{list(self.logarithm.shape)}"

    def _appended(self, params: Tensor) -> Tensor:
        return appended(params, self.logarithm, self.values_per_element)


def appended(params: Tensor, logarithm: Tensor, values_per_element: int) -> Tensor:
    """params [B, values_per_element C, ...] with the logarithm of C, ... values behind them along dimension 1."""
    if params.dim() < 2 or params.shape[1] % values_per_element:
        raise ValueError(
            f"likelihood: decoder output: expected [B, C * {values_per_element}, ...], got {list(params.shape)}"
        )
    sizes = params.shape[1] // values_per_element, *params.shape[2:]
    if logarithm.dim() > len(sizes) or any(
        own not in (1, size) for own, size in zip(logarithm.shape[::-1], sizes[::-1], strict=False)
    ):
        raise ValueError(
            f"likelihood: a learned parameter of shape {list(logarithm.shape)} does not fit a sample of shape "
            f"{list(sizes)}"
        )
    return torch.cat((params, logarithm.to(params.dtype).expand(len(params), *sizes)), 1)


class _AppendedDecoder(nn.Module):
    """A decoder with a likelihood's parameters behind its outputs."""

    def __init__(self, decoder: nn.Module, logarithm: Tensor, values_per_element: int) -> None:
        super().__init__()
        self.decoder, self.values_per_element = decoder, values_per_element
        if isinstance(logarithm, nn.Parameter):
            self.register_parameter("logarithm", logarithm)
        else:
            self.register_buffer("logarithm", logarithm)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        output = self.decoder(z) if condition is None else self.decoder(z, condition)
        found: Tensor = appended(output, self.logarithm, self.values_per_element)  # type: ignore[arg-type]
        return found


_appended_of: weakref.WeakKeyDictionary[LearnedLikelihood, _AppendedDecoder] = weakref.WeakKeyDictionary()
"""The last one, so that what was read of it is known at the next call. It does not hold the likelihood."""


def without_parameters(decoder: nn.Module, likelihood: Likelihood) -> tuple[nn.Module, Likelihood]:
    """A decoder and a likelihood without parameters that stand for the same density; themselves if it has none."""
    if not isinstance(likelihood, LearnedLikelihood) or is_compiling():
        return decoder, likelihood
    known = _appended_of.get(likelihood)
    logarithm = likelihood.logarithm
    if known is None or known.decoder is not decoder or known.logarithm is not logarithm:
        known = _AppendedDecoder(decoder, logarithm, likelihood.values_per_element)
        _appended_of[likelihood] = known
    # Not train(), which would set what is inside the user's decoder.
    known.training = decoder.training
    return known, likelihood.head

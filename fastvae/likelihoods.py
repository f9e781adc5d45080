"""Likelihoods p(x | z): densities of data given the natural parameters that a decoder returns.

``params`` are [B, ...]; ``x`` has as many elements a sample (``Categorical``: ``num_classes`` times fewer) in
any shape, as floats, bool (0 or 1) or uint8 (0..255, read as x / 255). Half precision is summed in float32.

A density of your own is a subclass of :class:`Likelihood` with ``log_prob`` in plain PyTorch: models, scores and
influence work with it by autograd, where the stock ones have fused kernels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvae.arguments import expect_numbers, is_integer
from fastvae.decoding import check_decoder

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "check_decoder", "resolve", "unit_interval"]


def unit_interval(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Data as floats of ``dtype``: uint8 is divided by 255, bool becomes 0 or 1, floats keep their value."""
    _check_dtype(x)
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)


def _check_dtype(x: Tensor) -> None:
    if not (x.dtype in (torch.uint8, torch.bool) or x.is_floating_point()):
        raise ValueError(
            f"x: expected uint8, bool or a floating dtype, got {x.dtype}; convert integers yourself (x.float(), "
            "or x.to(torch.uint8) for bytes); class indices and token ids are data of Categorical(num_classes)"
        )


def _holds_classes(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _at_least_float32(params: Tensor) -> Tensor:
    return params.float() if params.dtype in (torch.float16, torch.bfloat16) else params


# What a spec stands for.
_OF_SPEC = ("log_prob", "as_float", "classes", "params_of_output", "values_per_element")


class Likelihood(ABC):
    """A density of x given the decoder's output; instances are immutable, comparable and picklable.

    ``params`` are natural parameters throughout. ``params_of_output`` turns what the decoder module returns
    into them, which is the identity for every likelihood but ``Bernoulli(probs=True)``.

    A subclass needs ``log_prob`` alone. ``mean`` and ``sample`` are for models that reconstruct and sample,
    ``check`` and ``as_float`` for data that are not floats in any range. Without a ``spec``, or with one that
    stands for another density (a ``Bernoulli`` with its own ``log_prob``), there is no fused kernel: every
    operator then runs PyTorch's autograd, after one warning.
    """

    probs: bool = False
    """Whether the decoder ends in a Sigmoid, which lowering takes off."""
    of_logits: ClassVar[bool] = False
    """Whether params are the logits of probabilities, for which a Sigmoid's output would be a mistake."""
    _in_unit_interval: ClassVar[bool] = False
    _has_own_density: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def depth(name: str) -> int:
            return next(
                i for i, kind in enumerate((*cls.__mro__, None)) if kind is None or name in vars(kind)
            )

        # A spec says what these do where they are; redefined further down they do something else.
        cls._has_own_density = any(depth(name) < depth("spec") for name in _OF_SPEC)

    @property
    def values_per_element(self) -> int:
        """Decoder outputs for one element of x."""
        return 1

    @property
    def spec(self) -> str:
        """The likelihood in the form that the C++ network parser reads; empty where no kernel knows it."""
        return ""

    @property
    def has_kernel(self) -> bool:
        """Whether the fused operators can take this likelihood."""
        return not self._has_own_density and self.spec != ""

    @abstractmethod
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """log p(x | params) with all its constants.

        Args:
            params: [B, ...] natural parameters, floating.
            x: [B, ...] uint8, bool or floating, with a matching number of elements a sample.

        Returns:
            [B], float32 or float64, differentiable twice with respect to ``params`` (and to a floating ``x``,
            but for ``Categorical``).

        Raises:
            ValueError: sizes of ``params`` and ``x`` do not match, or x has another dtype.
        """

    def mean(self, params: Tensor) -> Tensor:
        """E[x | params], one value an element of x, in the decoder's layout. NotImplementedError if not defined."""
        raise NotImplementedError(
            f"{type(self).__name__}: mean: this likelihood defines none; add the method"
        )

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """One draw of x given params, of the shape of ``mean(params)``; ``generator`` lives on params'
        device. NotImplementedError if not defined.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: sample: this likelihood defines none; add the method"
        )

    def as_float(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as an encoder sees it: floats in [0, 1] for uint8 and bool data, floating data as they are."""
        return unit_interval(x, dtype)

    def check(self, x: Tensor) -> None:
        """Raise ValueError if x is NaN or infinite, or not data of this likelihood. Waits for x on a GPU.

        Where values must be in [0, 1], as much as rounding puts them beyond is let pass: 1e-6, or two units of the
        last place of x's dtype.
        """
        _check_dtype(x)
        if not x.is_floating_point() or not x.numel():
            return
        low, high = torch.stack(x.detach().aminmax()).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = f"{int((~torch.isfinite(x)).sum())} NaN or infinite value(s) in {x.numel()}"
            raise ValueError(f"{type(self).__name__}: x holds {bad}; expected finite data")
        slack = max(1e-6, 2 * torch.finfo(x.dtype).eps)
        if self._in_unit_interval and (low < -slack or high > 1 + slack):
            got = f"[{low:.9g}, {high:.9g}]"
            raise ValueError(f"{type(self).__name__}: x: expected values in [0, 1] (or uint8), got {got}")

    def params_of_output(self, output: Tensor) -> Tensor:
        """Natural parameters from what the decoder module returned. TypeError if that is no tensor."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{type(self).__name__}: decoder output: expected a tensor [B, ...], got {type(output).__name__}"
            )
        return output

    def log_prob_of_output(self, output: Tensor, x: Tensor) -> Tensor:
        """``log_prob`` for what the decoder module itself returned: [B]."""
        return self.log_prob(self.params_of_output(output), x)

    def _match(self, params: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """params as [B, D] in at least float32, and x as [B, D / values_per_element] in its own dtype."""
        name = type(self).__name__
        if params.dim() < 2 or not params.is_floating_point():
            raise ValueError(
                f"{name}: decoder output: expected a floating tensor [B, ...], "
                f"got {params.dtype} {list(params.shape)}"
            )
        if x.dim() == 0 or x.shape[0] != params.shape[0]:
            raise ValueError(
                f"{name}: x: expected {params.shape[0]} samples as in the decoder output "
                f"{list(params.shape)}, got {list(x.shape)}"
            )
        size, wanted = math.prod(x.shape[1:]), math.prod(params.shape[1:])
        if size * self.values_per_element != wanted:
            raise ValueError(
                f"{name}: x: {size} elements a sample need {size * self.values_per_element} decoder outputs, "
                f"got x {list(x.shape)} and decoder output {list(params.shape)}"
            )
        return _at_least_float32(params).reshape(params.shape[0], wanted), x.reshape(x.shape[0], size)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent Bernoulli elements with logits a: log p = x a - log(1 + e^a), also for x between 0 and 1.

    Args:
        probs: the decoder ends in a Sigmoid. Fused operators and models work with what goes into that Sigmoid,
            so that nothing is rounded, and every method here but ``params_of_output`` and
            ``log_prob_of_output`` takes *logits*. Where only probabilities can be had (from TorchScript, inside
            ``torch.compile``, of a decoder that does more to them than reshape), logits are as good as these
            numbers: they end at the smallest normal number and at 1 - eps / 2 (float32: logits of -87 and
            16.6), beyond which there is no gradient, and near 1 they are rounded (float32: by 0.01 at a logit
            of 13, by 0.6 at 16.5).
    """

    of_logits: ClassVar[bool] = True
    _in_unit_interval: ClassVar[bool] = True
    probs: bool = False

    @property
    def spec(self) -> str:
        """The likelihood as the C++ parser reads it."""
        return "bernoulli"

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Sum of x a - log(1 + e^a) over a sample: [B]; see ``Likelihood.log_prob``."""
        logits, x = self._match(params, x)
        # logsigmoid rather than softplus: torch's softplus turns linear at 20, which costs 2e-9 in float64.
        return (unit_interval(x, logits.dtype) * logits + F.logsigmoid(-logits)).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        """sigmoid(params)."""
        return torch.sigmoid(_at_least_float32(params))

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Zeros and ones."""
        return torch.bernoulli(self.mean(params), generator=generator)

    def params_of_output(self, output: Tensor) -> Tensor:
        """The logits of the decoder's output."""
        output = super().params_of_output(output)
        if not self.probs:
            return output
        p = _at_least_float32(output)
        info = torch.finfo(p.dtype)
        # In double precision, where the second derivative 1 / p^2 of the smallest p is no infinity.
        wide = p.double().clamp(max(info.tiny, 1e-150), 1 - info.eps / 2)
        return (torch.log(wide) - torch.log1p(-wide)).to(p.dtype)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Independent normal elements N(a, scale^2) around the decoder's output a; ``scale`` > 0 in the unit of
    x, a number: TypeError for a tensor.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        expect_numbers("Gaussian", hint="a learned scale is not supported yet", scale=self.scale)
        if not isinstance(self.scale, (int, float)):
            object.__setattr__(self, "scale", float(self.scale))
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"Gaussian: scale: expected a finite number above 0, got {self.scale}")

    @property
    def spec(self) -> str:
        """The likelihood as the C++ parser reads it."""
        return f"gaussian {float(self.scale)!r}"

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Log density of a sample: [B]; see ``Likelihood.log_prob``."""
        mean, x = self._match(params, x)
        constant = math.log(self.scale) + 0.5 * math.log(2 * math.pi)
        residual = (unit_interval(x, mean.dtype) - mean) / self.scale
        return -0.5 * residual.square().sum(1) - constant * mean.shape[1]

    def mean(self, params: Tensor) -> Tensor:
        """params."""
        return _at_least_float32(params)

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """params + scale * standard normal noise."""
        mean = self.mean(params)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + self.scale * noise


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Independent categorical elements (sub-pixels), each with ``num_classes`` logits.

    The decoder returns [B, C * num_classes, H, W] (or any trailing dimensions), channel-major: the logit of
    channel c, class v is channel ``c * num_classes + v``. A flat output [B, N * num_classes] is the case
    without trailing dimensions: each of the N elements of x, in x's own order, has ``num_classes``
    consecutive logits. (A convolutional decoder must therefore not be flattened at its end.)

    x is uint8 or of another integer dtype (token ids), holding the class itself, or floating in [0, 1] (or bool)
    with class round(x (num_classes - 1)), which has no gradient. Means, samples and what an encoder sees are
    class / (num_classes - 1); an encoder that embeds classes rounds them back. ``check`` refuses other data; where
    it is not called, values beyond the range count as the nearest class, and a sample with a NaN or an
    infinity has log probability NaN.
    """

    _in_unit_interval: ClassVar[bool] = True
    num_classes: int = 256

    def __post_init__(self) -> None:
        expect_numbers("Categorical", num_classes=self.num_classes)
        if not is_integer(self.num_classes) or self.num_classes < 2:
            raise ValueError(f"Categorical: num_classes: expected an integer above 1, got {self.num_classes}")
        object.__setattr__(self, "num_classes", int(self.num_classes))

    @property
    def values_per_element(self) -> int:
        """num_classes."""
        return self.num_classes

    @property
    def spec(self) -> str:
        """The likelihood as the C++ parser reads it."""
        return f"categorical {self.num_classes}"

    def check(self, x: Tensor) -> None:
        """As ``Likelihood.check``; also ValueError for an integer that is no class."""
        if not _holds_classes(x):
            super().check(x)
        elif x.numel():
            smallest, largest = torch.stack(x.aminmax()).tolist()
            if smallest < 0 or largest >= self.num_classes:
                limits = "of at least 0" if smallest < 0 else f"below num_classes = {self.num_classes}"
                got = smallest if smallest < 0 else largest
                raise ValueError(f"Categorical: x: expected classes {limits}, got {got}")

    def as_float(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as an encoder sees it: class / (num_classes - 1) for integers."""
        return x.to(dtype) / (self.num_classes - 1) if _holds_classes(x) else unit_interval(x, dtype)

    def classes(self, x: Tensor) -> Tensor:
        """Class index of each element of x, int64, of x's shape; NaN and what is beyond the range as the nearest."""
        last = self.num_classes - 1
        if _holds_classes(x):
            return x.long().clamp(0, last)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("Categorical: x: expected x.requires_grad = False: a class has no gradient")
        if x.dtype == torch.bool:
            return x.long() * last
        return torch.round(x.detach().clamp(0, 1).nan_to_num() * last).long()

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Log probability of a sample: [B]; see ``Likelihood.log_prob``."""
        _, flat = self._match(params, x)
        logits = self._logits(params)
        index = self.classes(flat).reshape(logits.shape[0], logits.shape[1], 1, logits.shape[3])
        found = logits.gather(2, index).squeeze(2) - torch.logsumexp(logits, 2)
        if flat.is_floating_point():
            # 1, or NaN where x is NaN or infinite: no class, which the sample and its gradient must show.
            found = found * (1 + 0 * flat.detach().to(found.dtype)).reshape(found.shape)
        return found.flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        """E[class] / (num_classes - 1): [B, C, ...]."""
        p = torch.softmax(self._logits(params), 2)
        values = torch.linspace(0, 1, self.num_classes, dtype=p.dtype, device=p.device)
        return torch.einsum("bcvr,v->bcr", p, values).reshape(self._data_shape(params))

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Drawn classes / (num_classes - 1): [B, C, ...]."""
        p = torch.softmax(self._logits(params), 2).movedim(2, 3).reshape(-1, self.num_classes)
        index = torch.multinomial(p, 1, generator=generator)
        return index.to(p.dtype).div(self.num_classes - 1).reshape(self._data_shape(params))

    def _data_shape(self, params: Tensor) -> tuple[int, ...]:
        return (params.shape[0], params.shape[1] // self.num_classes, *params.shape[2:])

    def _logits(self, params: Tensor) -> Tensor:
        """params as [B, channels, num_classes, positions] in at least float32."""
        if params.dim() < 2 or params.shape[1] % self.num_classes:
            raise ValueError(
                f"Categorical: decoder output: expected [B, C * {self.num_classes}, ...], "
                f"got {list(params.shape)}"
            )
        channels = params.shape[1] // self.num_classes
        positions = math.prod(params.shape[2:])
        return _at_least_float32(params).reshape(params.shape[0], channels, self.num_classes, positions)


_BY_NAME: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "categorical": Categorical,
}


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood itself, or the plain one of that name ("bernoulli", "gaussian", "categorical").

    ValueError for another name, TypeError for anything else.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str):
        raise TypeError(
            f"likelihood: expected a name or a fastvae Likelihood, got {type(likelihood).__name__}"
        )
    if likelihood not in _BY_NAME:
        raise ValueError(
            f"likelihood: expected one of {sorted(_BY_NAME)} or a Likelihood, got {likelihood!r}"
        )
    return _BY_NAME[likelihood]()

"""Classes: one of several values an element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastvae.arguments import expect, expect_numbers, is_integer
from fastvae.likelihoods.base import Likelihood, at_least_float32, log_sigmoid, set_positive, unit_interval
from fastvae.likelihoods.weights import of_outputs, total
from fastvae.randomness import standard_uniform

__all__ = ["Categorical", "DiscretizedLogistic"]


def _holds_classes(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


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
        expect(
            is_integer(self.num_classes) and self.num_classes >= 2,
            "Categorical: num_classes: expected an integer above 1",
            self.num_classes,
        )
        object.__setattr__(self, "num_classes", int(self.num_classes))

    @property
    def values_per_element(self) -> int:
        """num_classes."""
        return self.num_classes

    @property
    def spec(self) -> str:
        """The likelihood as the C++ parser reads it."""
        return f"categorical {self.num_classes}"

    @property
    def element_spec(self) -> str:
        """Empty: its outputs depend on each other."""
        return ""

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

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log probability of a sample: [B]; see ``Likelihood.log_prob``."""
        own, flat, weight = self._match_weighted(params, x, weight)
        logits = self._logits(params if weight is None else own.reshape(params.shape))
        index = self.classes(flat).reshape(logits.shape[0], logits.shape[1], 1, logits.shape[3])
        if logits.stride(2) == 1:  # channels last: classes stay side by side, without a copy
            found = torch.log_softmax(logits.mT, 3).gather(3, index.mT).squeeze(3)
        else:
            found = torch.log_softmax(logits, 2).gather(2, index).squeeze(2)
        if flat.is_floating_point():
            # 1, or NaN where x is NaN or infinite: no class, which the sample and its gradient must show.
            found = found * (1 + 0 * flat.detach().to(found.dtype)).reshape(found.shape)
        return total(found.flatten(1), weight)

    def _weight_of_outputs(self, weight: Tensor, params: Tensor) -> Tensor:
        return of_outputs(weight, params, self.num_classes, interleaved=True)

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
        return at_least_float32(params).reshape(params.shape[0], channels, self.num_classes, positions)


@dataclass(frozen=True)
class DiscretizedLogistic(Likelihood):
    """Independent classes 0 .. num_classes - 1 that round a logistic variable, whose mean and scale the decoder gives.

    Kingma et al. ("Improving variational inference with inverse autoregressive flow", NeurIPS 2016, appendix C.3) and
    PixelCNN++: the probability of a class is that of its interval of width 1 / (num_classes - 1) around x in [0, 1];
    the first and the last one reach to infinity. The decoder returns [B, 2 C, ...] for data [B, C, ...]: C means in the
    unit of x, then C log scales.

    Args:
        num_classes: 256 for bytes.
        min_scale: the scale is at least this, > 0; where it is smaller there is no gradient to its logarithm.
    """

    _in_unit_interval: ClassVar[bool] = True
    num_classes: int = 256
    min_scale: float = 1e-4

    def __post_init__(self) -> None:
        set_positive(self, "min_scale")
        Categorical(self.num_classes)

    @property
    def values_per_element(self) -> int:
        """2."""
        return 2

    @property
    def element_spec(self) -> str:
        """See ``Likelihood``."""
        return f"discretized_logistic {self.num_classes} {float(self.min_scale)!r}"

    def _element_data(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return Categorical(self.num_classes).classes(x).to(dtype)

    def check(self, x: Tensor) -> None:
        """As ``Categorical.check``."""
        Categorical(self.num_classes).check(x)

    def as_float(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as an encoder sees it: class / (num_classes - 1)."""
        return Categorical(self.num_classes).as_float(x, dtype)

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log probability of a sample: [B]; see ``Likelihood.log_prob``."""
        params, x, weight = self._match_weighted(params, x, weight)
        mean, log_scale = params.chunk(2, 1)
        last = self.num_classes - 1
        at = Categorical(self.num_classes).classes(x).to(mean.dtype)
        inverse = torch.exp(-log_scale.clamp(min=math.log(self.min_scale)))
        upper = ((at + 0.5) / last - mean) * inverse
        lower = ((at - 0.5) / last - mean) * inverse
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - e^(l - u))
        width = inverse / last
        within = log_sigmoid(upper) + log_sigmoid(-lower) + _log1mexp(width)
        found = torch.where(at == 0, log_sigmoid(upper), torch.where(at == last, log_sigmoid(-lower), within))
        return total(found, weight)

    def mean(self, params: Tensor) -> Tensor:
        """The decoder's means, in [0, 1]."""
        return at_least_float32(params).chunk(2, 1)[0].clamp(0, 1)

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Drawn classes / (num_classes - 1)."""
        mean, log_scale = at_least_float32(params).chunk(2, 1)
        u = standard_uniform(mean.shape, mean, generator)
        drawn = mean + log_scale.clamp(min=math.log(self.min_scale)).exp() * torch.logit(u, 1e-7)
        last = self.num_classes - 1
        return torch.round(drawn.clamp(0, 1) * last) / last


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^-x) for x > 0."""
    near = torch.log(-torch.expm1(-x.clamp(max=math.log(2))))
    return torch.where(x < math.log(2), near, torch.log1p(-torch.exp(-x.clamp(min=math.log(2)))))

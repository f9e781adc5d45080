"""What a likelihood is, and how its arguments fit each other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvae.arguments import expect_positive, given
from fastvae.likelihoods.weights import expanded, of_outputs

__all__ = ["Likelihood", "at_least_float32", "check_dtype", "log_sigmoid", "set_positive", "unit_interval"]


def unit_interval(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Data as floats of ``dtype``: uint8 is divided by 255, bool becomes 0 or 1, floats keep their value."""
    check_dtype(x)
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)


def check_dtype(x: Tensor) -> None:
    """ValueError for data that are neither uint8, bool nor floating."""
    if not (x.dtype in (torch.uint8, torch.bool) or x.is_floating_point()):
        raise ValueError(
            f"x: expected uint8, bool or a floating dtype, got {x.dtype}; convert integers yourself (x.float(), "
            "or x.to(torch.uint8) for bytes); class indices and token ids are data of Categorical(num_classes)"
        )


def at_least_float32(params: Tensor) -> Tensor:
    """Half precision as float32."""
    return params.float() if params.dtype in (torch.float16, torch.bfloat16) else params


def set_positive(likelihood: Likelihood, *names: str, hint: str = "") -> None:
    """Check settings that are numbers above 0, and keep numpy's as Python's."""
    for name in names:
        value = getattr(likelihood, name)
        expect_positive(type(likelihood).__name__, hint=hint, **{name: value})
        if not isinstance(value, (int, float)):
            object.__setattr__(likelihood, name, float(value))


def log_sigmoid(y: Tensor) -> Tensor:
    """log(sigmoid(y)), whose second derivative is right for large y: PyTorch's is 0 once sigmoid(y) rounds to 1."""
    # torch's softplus turns linear at 20, which costs 2e-9 in float64.
    return -F.softplus(-y, threshold=50)


# What a spec stands for.
_OF_SPEC = ("log_prob", "as_float", "base_measure", "classes", "params_of_output", "values_per_element")


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
    _has_own_elements: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def depth(name: str) -> int:
            return next(
                i for i, kind in enumerate((*cls.__mro__, None)) if kind is None or name in vars(kind)
            )

        # A spec says what these do where they are; redefined further down they do something else.
        cls._has_own_density = any(depth(name) < depth("spec") for name in _OF_SPEC)
        of_elements = min(depth("spec"), depth("element_spec"))
        cls._has_own_elements = any(depth(name) < of_elements for name in (*_OF_SPEC, "_element_data"))

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

    @property
    def element_spec(self) -> str:
        """The likelihood as the kernels of independent elements read it, which take all outputs of a network that is
        read as a graph; empty where they do not know it.
        """
        return self.spec

    @property
    def has_element_kernel(self) -> bool:
        """Whether these kernels can take this likelihood."""
        return not self._has_own_elements and self.element_spec != ""

    def _element_data(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as they take it."""
        return self.as_float(x, dtype)

    def base_measure(self, x: Tensor, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor | None:
        """The part of log p(x) that depends on x alone and that kernels leave out: [B], or None if they do not.

        Args:
            x, weight: as of ``log_prob``; the weight of the shape of x.
            dtype: of the result.
        """
        return None

    @abstractmethod
    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """log p(x | params) with all its constants.

        Args:
            params: [B, ...] natural parameters, floating.
            x: [B, ...] uint8, bool or floating, with a matching number of elements a sample.
            weight: of the elements' log probabilities, at least 0 (which models check, not this): of the shape of x, or
                with sizes of 1 in its place; bool or any real dtype. What has weight 0 is left out: x may be NaN there,
                and gradients are 0. A density of your own need not take it, unless somebody passes one.

        Returns:
            [B], float32 or float64, differentiable twice with respect to ``params`` (and to a floating ``x``,
            but for ``Categorical``).

        Raises:
            ValueError: sizes of ``params``, ``x`` and ``weight`` do not match, or x has another dtype.
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
        check_dtype(x)
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
            found = type(output).__name__
            if isinstance(output, torch.distributions.Distribution):
                found += ", a distribution; its parameters are what to return, as by SelectOutputs(decoder, 'logits')"
            raise TypeError(f"{type(self).__name__}: decoder output: expected a tensor [B, ...], got {found}")
        return output

    def log_prob_of_output(self, output: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """``log_prob`` for what the decoder module itself returned: [B]."""
        return self.log_prob(self.params_of_output(output), x, **given(weight=weight))

    def _weight_of_outputs(self, weight: Tensor, params: Tensor) -> Tensor:
        """A weight of x's elements as one of the decoder's outputs, of the shape of params."""
        return of_outputs(weight, params, self.values_per_element, interleaved=False)

    def _match_weighted(
        self, params: Tensor, x: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As ``_match``, with the weight as x and in the dtype of params.

        What is left out is 0 in params and x: data of every likelihood of ours, with finite derivatives.
        """
        flat, data = self._match(params, x)
        if weight is None:
            return flat, data, None
        weight = expanded(type(self).__name__, weight, x)
        left_out = weight == 0
        of_params = self._weight_of_outputs(left_out, params).reshape(flat.shape)
        return (
            flat.masked_fill(of_params, 0),
            data.masked_fill(left_out.reshape(data.shape), 0),
            weight.reshape(data.shape).to(flat.dtype),
        )

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
        return at_least_float32(params).reshape(params.shape[0], wanted), x.reshape(x.shape[0], size)

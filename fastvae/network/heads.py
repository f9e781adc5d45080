"""log p(x | y) at the network's end: residual r = d log p / dy, curvature times a vector, and the gradients to x.

Likelihoods of independent elements have kernels, whose formulas are in csrc/kernels/math/element_heads.h. Any other's
``log_prob`` is read and swept like a network (density.py); where it cannot be read, or the gradient to x is wanted, by
two passes of autograd through it. Where x's elements have weights, log p, r and S of each are times its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae._extension import has_kernels_for
from fastvae.likelihoods import Categorical, Likelihood
from fastvae.likelihoods.weighted import WeightedLikelihood
from fastvae.network.density import density_of, tensors_of
from fastvae.network.facts import key_of
from fastvae.network.layers import Point, Products
from fastvae.network.sweeps import Inputs, Sweeps
from fastvae.network.tape import kernel


class AtOutput(NamedTuple):
    """What a head has found at one output y: log p(x | y) [B] and its gradient r to y, of the shape of y."""

    y: Tensor
    log_px: Tensor
    residual: Tensor
    kept: Any = None
    """For the adjoint."""

    def plus_value(self, found: Tensor | None, of_log_px: Tensor | None) -> Tensor | None:
        """A gradient to y, with that of <c, log p(x | y)> added to it; c [B]. None is zero."""
        if of_log_px is None:
            return found
        of_value = self.residual * of_log_px.reshape(-1, *[1] * (self.y.dim() - 1))
        return of_value if found is None else found + of_value


class Head:
    """A likelihood at the data of one call.

    Args:
        likelihood: of natural parameters; with weights or without.
        x: data [B, ...].
    """

    def __init__(self, likelihood: Likelihood, x: Tensor) -> None:
        self.likelihood, self.x = likelihood, x
        self.density, self.weight = likelihood, None
        if isinstance(likelihood, WeightedLikelihood):
            self.density, self.weight = likelihood.likelihood, likelihood.weight
        self.of_x = x.requires_grad
        self.data = x.detach()

    @property
    def is_by_autograd(self) -> bool:
        """Whether its derivatives were autograd's at the points where it was asked for them."""
        return True

    def log_px(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """log p(x | y): [B]."""
        x = self.data if x is None else x
        # A network of probabilities has had its last sigmoid taken off.
        return (
            self.likelihood.log_prob(y, x)
            if self.likelihood.probs
            else self.likelihood.log_prob_of_output(y, x)
        )

    def form(self) -> tuple[Any, list[Tensor]]:
        """What straight code of its formulas depends on (tape.py), and the tensors that it reads.

        A head that goes through autograd is one call in such code, whatever it holds.
        """
        return (type(self), self.of_x), []

    def at(self, y: Tensor) -> AtOutput:
        """log p(x | y) and its gradient to y."""
        log_px, residual = kernel(self._by_autograd, y)
        return AtOutput(y, log_px, residual)

    def _by_autograd(self, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            log_px = self.log_px(leaf)
            (found,) = torch.autograd.grad(log_px.sum(), leaf)
        return log_px.detach(), found

    def adjoint(
        self, at: AtOutput, dot: Tensor | None, of_log_px: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients to y and x of <r, ydot> + <c, log p(x | y)>; c [B] or None."""
        found: tuple[Tensor | None, Tensor | None] = kernel(self._adjoint_by_autograd, at.y, dot, of_log_px)
        return found

    def _adjoint_by_autograd(
        self, y: Tensor, dot: Tensor | None, of_log_px: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            data = self.data.detach().requires_grad_() if self.of_x else self.data
            log_px = self.log_px(leaf, data)
            outputs, along = [], []
            if dot is not None:
                (found,) = torch.autograd.grad(log_px.sum(), leaf, create_graph=True)
                if found.requires_grad:
                    outputs.append(found)
                    along.append(dot)
            if of_log_px is not None:
                outputs.append(log_px)
                along.append(of_log_px)
            if not outputs:
                return None, None
            inputs = [leaf, data] if self.of_x else [leaf]
            of_y, *of_x = torch.autograd.grad(outputs, inputs, along, allow_unused=True)
        return of_y, of_x[0] if of_x else None


class _Closed(Head):
    """A head in closed form: of elements, of which each has its own outputs.

    Args:
        likelihood, x: as of ``Head``.
        rows: x as the formulas take it.
    """

    def __init__(self, likelihood: Likelihood, x: Tensor, rows: Tensor) -> None:
        super().__init__(likelihood, x)
        self.rows = rows
        self.left_out: Tensor | None = None
        if self.weight is not None:
            # What is left out is 0, as in log_prob: nothing is infinite of it, and 0 times it is 0.
            self.left_out = self.weight == 0
            self.rows = rows.masked_fill(self.left_out, 0)

    @property
    def is_by_autograd(self) -> bool:
        """See ``Head``."""
        return False

    def form(self) -> tuple[Any, list[Tensor]]:
        """See ``Head``."""
        weights = [] if self.weight is None or self.left_out is None else [self.weight, self.left_out]
        facts = type(self), self.of_x, key_of(self.density), len(weights)
        return facts, [self.data, self.rows, *weights]

    def _inside(self, y: Tensor) -> Tensor:
        """y, with 0 for outputs that are left out."""
        if self.left_out is None:
            return y
        return y.masked_fill(self.density._weight_of_outputs(self.left_out, y), 0)

    def _weighed(self, of_outputs: Tensor) -> Tensor:
        if self.weight is None:
            return of_outputs
        return of_outputs * self.density._weight_of_outputs(self.weight, of_outputs)


class _ElementHead(_Closed):
    """A head of independent elements, by the kernels of csrc/kernels/math/element_heads.h."""

    def __init__(self, likelihood: Likelihood, x: Tensor, density: Likelihood, dtype: torch.dtype) -> None:
        super().__init__(likelihood, x, density._element_data(x.detach(), dtype))
        self.text = density.element_spec
        self.own = None if self.weight is None else self.weight.to(dtype)
        self.base = density.base_measure(x, dtype, self.weight)
        self.is_ordered = False

    def form(self) -> tuple[Any, list[Tensor]]:
        """See ``Head``."""
        facts, tensors = super().form()
        own = [each for each in (self.own, self.base) if each is not None]
        return (facts, self.base is None), [*tensors, *own]

    def _elements(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """x and its weights, of the shape and layout of y where an element has one output."""
        if not self.is_ordered:
            if self.density.values_per_element == 1:
                self.rows = torch.empty_like(y).copy_(self.rows.reshape(y.shape))
                if self.own is not None:
                    self.own = torch.empty_like(y).copy_(self.own.reshape(y.shape))
            self.is_ordered = True
        return self.rows, self.own

    def at(self, y: Tensor) -> AtOutput:
        """See ``Head``."""
        if y.shape[0] != len(self.rows) or y.numel() != self.rows.numel() * self.density.values_per_element:
            self.log_px(y)  # says what does not fit
        log_px, residual = _ELEMENT_HEAD(y, *self._elements(y), self.text, True)
        return AtOutput(y, log_px if self.base is None else log_px + self.base, residual)

    def adjoint(
        self, at: AtOutput, dot: Tensor | None, of_log_px: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See ``Head``."""
        if self.of_x:
            return super().adjoint(at, dot, of_log_px)
        if dot is None:
            return at.plus_value(None, of_log_px), None
        residual = None if of_log_px is None else at.residual
        return _ELEMENT_ADJOINT(at.y, *self._elements(at.y), dot, residual, of_log_px, self.text), None


class _CategoricalHead(_Closed):
    """Of logits y and class x: r = (0 .. 1 .. 0) - p, S v = -p (v - <p, v>), p = softmax(y)."""

    density: Categorical

    def __init__(self, likelihood: Likelihood, x: Tensor, density: Categorical) -> None:
        super().__init__(likelihood, x, density.classes(x.detach()))
        # 1, or NaN where x is no class, which the gradient must show.
        self.valid = 1 + 0 * self.data if x.is_floating_point() else None
        if self.valid is not None and self.left_out is not None:
            self.valid = self.valid.masked_fill(self.left_out, 1)

    def form(self) -> tuple[Any, list[Tensor]]:
        """See ``Head``."""
        facts, tensors = super().form()
        return facts, tensors if self.valid is None else [*tensors, self.valid]

    def at(self, y: Tensor) -> AtOutput:
        """See ``Head``."""
        # It also refuses shapes that do not fit.
        log_px = self.log_px(y)
        p = torch.softmax(self.density._logits(self._inside(y)), 2)
        index = self.rows.reshape(p.shape[0], p.shape[1], 1, p.shape[3])
        residual = (-p).scatter_add(2, index, torch.ones_like(p[:, :, :1]))
        if self.valid is not None:
            residual = residual * self.valid.to(p.dtype).reshape(index.shape)
        return AtOutput(y, log_px, self._weighed(residual.reshape(y.shape)), p)

    def adjoint(
        self, at: AtOutput, dot: Tensor | None, of_log_px: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See ``Head``."""
        if dot is None:
            return at.plus_value(None, of_log_px), None
        p, v = at.kept, dot.reshape(at.kept.shape)
        curved = p * ((p * v).sum(2, keepdim=True) - v)
        return at.plus_value(self._weighed(curved.reshape(dot.shape)), of_log_px), None


class _Swept(Head):
    """A head whose density is read and swept; by autograd where it cannot be."""

    def __init__(self, likelihood: Likelihood, x: Tensor) -> None:
        super().__init__(likelihood, x)
        self._sweeps: Sweeps | None = None
        self._start: tuple[list[Any], list[bool]] | None = None
        self._is_known = False

    @property
    def is_by_autograd(self) -> bool:
        """See ``Head``."""
        return self._is_known and self._sweeps is None

    def _density(self, y: Tensor) -> Sweeps | None:
        if not self._is_known:
            self._sweeps, self._is_known = density_of(self.likelihood, y, self.data, self._derivatives), True
            if self._sweeps is not None:
                inputs = Inputs(self._sweeps, y, tensors_of(self._sweeps, self.data))
                self._start = inputs.detached(), inputs.wanted
        return self._sweeps

    def _derivatives(self, y: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        head = Head(self.likelihood, self.data[: len(y)])
        return *head._by_autograd(y), head._adjoint_by_autograd(y, v, c)[0]

    def form(self) -> tuple[Any, list[Tensor]]:
        """See ``Head``."""
        return (type(self), key_of(self.likelihood) or self.likelihood), [self.data]

    def at(self, y: Tensor) -> AtOutput:
        """See ``Head``."""
        sweeps = self._density(y)
        if sweeps is None or self._start is None:
            return super().at(y)
        point = sweeps.forward(self._start[0], y, self._start[1])
        log_px = sweeps.output(point)
        residual, cotangents = sweeps.reverse(point, torch.ones_like(log_px))
        if residual is None:
            residual = torch.zeros_like(y)
        return AtOutput(y, log_px, residual, (point, cotangents))

    def adjoint(
        self, at: AtOutput, dot: Tensor | None, of_log_px: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See ``Head``."""
        if self._sweeps is None or at.kept is None:
            return super().adjoint(at, dot, of_log_px)
        point, cotangents = at.kept
        found = None if dot is None else self._curved(self._sweeps, point, cotangents, dot)
        return at.plus_value(found, of_log_px), None

    @staticmethod
    def _curved(sweeps: Sweeps, point: Point, cotangents: dict[int, Any], dot: Tensor) -> Tensor | None:
        products = Products(point.values, point.wanted, {})
        return sweeps.adjoint(point, sweeps.tangent(point, dot), cotangents, None, products).get(0)


def make_head(likelihood: Likelihood, x: Tensor, like: Tensor) -> Head:
    """The head of a likelihood, for outputs of the dtype of ``like``."""
    density = likelihood.likelihood if isinstance(likelihood, WeightedLikelihood) else likelihood
    if density.has_element_kernel and has_kernels_for(like):
        return _ElementHead(likelihood, x, density, like.dtype)
    if x.requires_grad:
        return Head(likelihood, x)
    if type(density) is Categorical:
        return _CategoricalHead(likelihood, x, density)
    # A density is read as a function of y and x alone.
    return _Swept(likelihood, x) if density is likelihood else Head(likelihood, x)


_ELEMENT_HEAD = torch.ops.fastvae_internal.element_head.default
_ELEMENT_ADJOINT = torch.ops.fastvae_internal.element_head_adjoint.default


def _check_one_device(name: str, y: Tensor, **tensors: Tensor | None) -> None:
    from fastvae.ops._registration import check_one_device  # which imports this file

    given = {argument: tensor for argument, tensor in tensors.items() if tensor is not None}
    check_one_device(name, y, "y", **given)


@torch.library.register_fake("fastvae_internal::element_head")
def _(
    y: Tensor, x: Tensor, weight: Tensor | None, likelihood: str, wants_residual: bool
) -> tuple[Tensor, Tensor]:
    _check_one_device("element_head", y, x=x, weight=weight)
    return y.new_empty(y.shape[:1]), torch.empty_like(y) if wants_residual else y.new_empty(0)


@torch.library.register_fake("fastvae_internal::element_head_adjoint")
def _(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    dot: Tensor,
    residual: Tensor | None,
    cotangent: Tensor | None,
    likelihood: str,
) -> Tensor:
    of = {"x": x, "weight": weight, "dot": dot, "residual": residual, "cotangent": cotangent}
    _check_one_device("element_head_adjoint", y, **of)
    return torch.empty_like(y)

"""log p(x | y) at the network's end: residual r = d log p / dy, curvature times a vector, and the gradients to x.

Bernoulli: r = x - sigmoid(y), S v = -p (1 - p) v. Gaussian: r = (x - y) / scale^2, S v = -v / scale^2. Any other
likelihood by two passes of autograd through its own ``log_prob`` alone, which works on elements.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood


class Head:
    """A likelihood at the data of one call.

    Args:
        likelihood: of natural parameters.
        x: data [B, ...].
    """

    def __init__(self, likelihood: Likelihood, x: Tensor) -> None:
        self.likelihood, self.x = likelihood, x
        self.of_x = x.requires_grad
        self.data = x.detach()

    def log_px(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """log p(x | y): [B]."""
        x = self.data if x is None else x
        # A network of probabilities has had its last sigmoid taken off.
        return (
            self.likelihood.log_prob(y, x)
            if self.likelihood.probs
            else self.likelihood.log_prob_of_output(y, x)
        )

    def residual(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x | y) [B] and its gradient to y."""
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            log_px = self.log_px(leaf)
            (found,) = torch.autograd.grad(log_px.sum(), leaf)
        return log_px.detach(), found

    def adjoint(
        self, y: Tensor, dot: Tensor | None, of_log_px: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients to y and x of <r, ydot> + <c, log p(x | y)>; c [B] or None."""
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


class _Elementwise(Head):
    """A head in closed form, of elements y and x in one flat order."""

    def __init__(self, likelihood: Likelihood, x: Tensor, dtype: torch.dtype) -> None:
        super().__init__(likelihood, x)
        self.rows = likelihood.as_float(x.detach(), dtype)
        self.checked = False

    def _data(self, y: Tensor) -> Tensor:
        """x in the shape and layout of y."""
        if not self.checked:
            self.rows = torch.empty_like(y).copy_(self.rows.reshape(y.shape))
            self.checked = True
        return self.rows

    def residual(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Head``."""
        # It also refuses shapes that do not fit.
        log_px = self.log_px(y)
        return log_px, self._residual(y, self._data(y))

    def adjoint(
        self, y: Tensor, dot: Tensor | None, of_log_px: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See ``Head``."""
        if self.of_x:
            return super().adjoint(y, dot, of_log_px)
        found = None if dot is None else self._curved(y, dot)
        if of_log_px is not None:
            of_value = self._residual(y, self._data(y)) * of_log_px.reshape(-1, *[1] * (y.dim() - 1))
            found = of_value if found is None else found + of_value
        return found, None

    def _residual(self, y: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _curved(self, y: Tensor, dot: Tensor) -> Tensor:
        raise NotImplementedError


class _BernoulliHead(_Elementwise):
    def _residual(self, y: Tensor, x: Tensor) -> Tensor:
        return x - torch.sigmoid(y)

    def _curved(self, y: Tensor, dot: Tensor) -> Tensor:
        p = torch.sigmoid(y)
        return (p * p - p) * dot


class _GaussianHead(_Elementwise):
    def _residual(self, y: Tensor, x: Tensor) -> Tensor:
        return (x - y) / self.likelihood.scale**2  # type: ignore[attr-defined]

    def _curved(self, y: Tensor, dot: Tensor) -> Tensor:
        return dot * (-1 / self.likelihood.scale**2)  # type: ignore[attr-defined]


def is_elementwise(head: Head) -> TypeGuard[_Elementwise]:
    """Whether it is in closed form, and asks for no gradient to the data."""
    return isinstance(head, _Elementwise) and not head.of_x


def make_head(likelihood: Likelihood, x: Tensor, like: Tensor) -> Head:
    """The head of a likelihood, for outputs of the dtype of ``like``."""
    closed: dict[type, Any] = {Bernoulli: _BernoulliHead, Gaussian: _GaussianHead}
    kind = closed.get(type(likelihood))
    if kind is None or not likelihood.has_kernel:
        return Head(likelihood, x)
    return kind(likelihood, x, like.dtype)

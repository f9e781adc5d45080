"""One optimisation step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastvae.arguments import expect, given
from fastvae.models import HVAE, DivergenceError
from fastvae.models.base import BaseVAE
from fastvae.models.terms import describe, recorded_terms
from fastvae.randomness import global_states, set_global_states
from fastvae.training.batches import Batch, Place, batch_of
from fastvae.training.captured import CapturedPasses, Pass
from fastvae.training.parallel import Team

__all__ = ["NotFiniteError", "Stepper", "Taken", "parameters_of"]


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters that the optimiser changes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class NotFiniteError(ArithmeticError):
    """A loss or gradient that is not finite, before it reached the weights.

    ``__cause__`` is the DivergenceError of a model that raised one.
    """


class Taken(NamedTuple):
    """What became of a batch, over all processes."""

    loss: float
    """The (weighted) mean."""
    amount: float
    """Of the samples: their number, or the sum of their weights."""
    overflowed: bool
    """Whether scaled gradients had no room in float16: the weights are as they were, the next step scales by less."""


@dataclass
class Stepper:
    """Takes optimisation steps; see ``fit`` for the arguments."""

    model: nn.Module
    optimizer: Optimizer
    clip_grad_norm: float | None
    binarize: bool
    team: Team
    restore: bool
    """Put the model's buffers back as they were before a step that was not finite."""
    cuda_graph: bool = False
    """Run forward and backward passes from CUDA graphs."""
    places: Mapping[str, Place | None] = field(default_factory=dict)
    """Where in a batch is what: "condition", "weight", "sample_weight"."""
    scaler: torch.amp.GradScaler | None = None
    """Scales losses, so that gradients in float16 do not vanish."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Of the loss computed last."""

    def __post_init__(self) -> None:
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        self.demands_closure = closure is not None and closure.default is inspect.Parameter.empty
        expect(
            self.scaler is None or not self.demands_closure,
            "fit: grad_scaler: expected an optimizer whose step needs no closure",
            type(self.optimizer).__name__,
        )
        self._passes: CapturedPasses | None = None
        if self.cuda_graph:
            self._check_for_graphs()
            self._passes = CapturedPasses(self.model, parameters_of(self.optimizer), self._backward)

    def _check_for_graphs(self) -> None:
        devices = sorted({p.device.type for p in self.model.parameters()})
        unfit = {
            f"a model on a GPU, got one on {', '.join(devices)}": devices != ["cuda"],
            f"a single process, got {self.team.size}": self.team.size > 1,
            f"an optimizer whose step needs no closure, got {type(self.optimizer).__name__}": self.demands_closure,
        }
        for what, here in unfit.items():
            if here:
                raise ValueError(f"fit: cuda_graph: expected {what}")

    def batch(self, loaded: Any) -> Batch:
        """What a loader gave, binarised if wanted, on the model's device."""
        found = batch_of(loaded, self.places, self.binarize)
        device = next(self.model.parameters()).device
        return found.each(lambda tensor: tensor.to(device, non_blocking=True))

    def losses(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """model(x): [B], or ValueError."""
        x = batch.observation.x
        with recorded_terms() as self.terms:
            losses: Tensor = (self.model if model is None else model)(x, **batch.observation.given)
        if not isinstance(losses, Tensor) or losses.shape != x.shape[:1]:
            found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"fit: model(x): expected the loss of each sample, [{x.shape[0]}], got {found}")
        return losses

    def validation_loss(self, batch: Batch) -> tuple[float, str]:
        """The (weighted) sum of model(x) in this process, and what of it is not finite."""
        total = float(batch.total(self.losses(batch, self.team.replica)))
        return total, "" if math.isfinite(total) else self._not_finite(gradients=False)

    def take(self, batch: Batch) -> Taken:
        """One optimisation step.

        NotFiniteError, in all processes or none, leaves the weights as they were.
        """
        noise = global_states() if self.demands_closure else None
        buffers = [buffer.clone() for buffer in self.model.buffers()] if self.restore else []
        try:
            loss, amount, norm = self._finite_backward(batch)
            if norm is None:
                return Taken(loss, amount, overflowed=True)
        except NotFiniteError:
            if self.restore:
                self.optimizer.zero_grad(set_to_none=True)
                with torch.no_grad():
                    for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                        buffer.copy_(before)
            raise

        def evaluate_again() -> float:
            if noise is not None:
                set_global_states(noise)
            again = self._backward(batch)
            self._clip(again.norm)
            return float(again.loss)

        if self.demands_closure:
            self.optimizer.step(evaluate_again)
        else:
            self._clip(norm)
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
        return Taken(loss, amount, overflowed=False)

    def _backward(self, batch: Batch) -> Pass:
        """Forward and backward pass, with the gradients in place and not yet clipped."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, mean, amount = self._forward(batch)
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in parameters_of(self.optimizer) if p.grad is not None]
        return Pass(mean, amount, torch.nn.utils.get_total_norm(gradients), self.terms)

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, float]:
        """The mean loss with its graph; without it, over all processes; the amount of their samples.

        NotFiniteError where a trajectory diverged in any process: a process that went on to its backward pass would
        wait for the gradients of one that did not.
        """
        cause: DivergenceError | None = None
        try:
            loss = batch.mean(self.losses(batch))
        except DivergenceError as error:
            if self.team.size == 1:
                raise NotFiniteError(str(error)) from error
            loss, cause = torch.tensor(0.0, device="cpu"), error
        if self.team.size == 1:
            return loss, loss.detach(), batch.amount
        total, count, diverged = self.team.sums(
            float(loss.detach()) * batch.amount, batch.amount, cause is not None
        )
        if diverged:
            raise NotFiniteError(str(cause or "trajectories of another process diverged")) from cause
        return loss, loss.detach().new_tensor(total / count), count

    def _finite_backward(self, batch: Batch) -> tuple[float, float, Tensor | None]:
        """Mean loss, amount of the samples, and the norm of the gradients or None where they overflowed."""
        found = self._backward(batch) if self._passes is None else self._from_graph(batch)
        loss, norm = found.numbers()
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.terms = found.terms
            why = self._not_finite(gradients=math.isfinite(loss))
            if self.scaler is not None:
                # Without a scale that does anything, gradients are not finite by themselves.
                overflowed = bool(why) and math.isfinite(loss) and self.scaler.get_scale() > 1
                self.scaler.update()
                if overflowed:
                    self.optimizer.zero_grad(set_to_none=True)
                    return loss, found.amount, None
            raise NotFiniteError(f"loss {loss}, gradient norm {norm}{why}")
        return loss, found.amount, found.norm

    def _from_graph(self, batch: Batch) -> Pass:
        """As ``_backward``, which runs again where a graph's numbers are not finite: it has more to say of them."""
        assert self._passes is not None
        if isinstance(self.model, HVAE) and self.model.adapts_next:
            # A graph looks at no acceptance.
            return self._backward(batch)
        if isinstance(self.model, BaseVAE):
            self.model.check_data(batch.observation.x, **given(weight=batch.observation.weight))
        noise = torch.cuda.get_rng_state(batch.observation.x.device)
        found = self._passes(batch)
        if found.replayed and not all(map(math.isfinite, found.numbers())):
            torch.cuda.set_rng_state(noise, batch.observation.x.device)
            return self._backward(batch)
        return found._replace(amount=batch.amount)

    def _not_finite(self, gradients: bool) -> str:
        """What is not finite of the loss computed last, or of its gradients, to be added to a message."""
        if not gradients:
            found = describe(self.terms)
            return f"; {found}" if found else ""
        names = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        return f"; not finite: the gradients of {', '.join(names[:3])}" if names else ""

    def _clip(self, total_norm: Tensor) -> None:
        if self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters_of(self.optimizer), self.clip_grad_norm, total_norm)

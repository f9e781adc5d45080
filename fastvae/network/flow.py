"""The Hamiltonian flow and the force over sweeps: K + 1 forces, and the gradient through them in closed form.

Walking back with cotangents gz and grho (fastvae.ops.hamiltonian_flow has the steps):

    gp = alpha_k grho; the force at z_{k+1} collects u = eps/2 gp + what step k+1 left for it; gz += -u + H(u)
    grh = gp + eps gz; the force at z_k receives eps/2 grh; grho = grh

with H(u) the gradient of u . grad_z log p(x | z) + c log p(x | z): one tangent and one adjoint sweep. All else is
in the kernels of the leapfrog operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from fastvae.network.flow_tape import FlowTape, Recording, form_with_head
from fastvae.network.heads import Head
from fastvae.network.layers import Point, Products
from fastvae.network.once import backward_pass, differentiable_once
from fastvae.network.sweeps import Inputs, Sweeps, Watch
from fastvae.network.tape import kernel

_OPS = torch.ops.fastvae


def rows(codes: Tensor) -> Tensor:
    """Codes, or what has their shape, as [B, d]."""
    return codes if codes.dim() == 2 else codes.flatten(1)


class Evaluation:
    """log p(x | z) and its gradient at one z, with what the gradient through it needs, if one is wanted.

    With ``whole`` every value is kept, also those that no rule looks at again.
    """

    def __init__(
        self,
        sweeps: Sweeps,
        passive: list[Any],
        wanted: list[bool],
        head: Head,
        z: Tensor,
        keep: bool = True,
        whole: bool = False,
    ) -> None:
        self.sweeps, self.head = sweeps, head
        self.point: Point = sweeps.forward(passive, z, wanted, keep=not whole)
        self.point.bends_later = keep
        self.at_output = head.at(sweeps.output(self.point))
        self.log_px = self.at_output.log_px
        gradient, self.cotangents = sweeps.reverse(self.point, self.at_output.residual)
        self.z, self.gradient = z, torch.zeros_like(z) if gradient is None else gradient
        self._force: Tensor | None = None

    @property
    def force(self) -> Tensor:
        """That of a flow, [B, d]: with a standard normal prior."""
        if self._force is None:
            self._force = rows(self.gradient) - rows(self.z)
        return self._force

    def adjoint(
        self, u: Tensor | None, of_log_px: Tensor | None, products: Products, watch: Watch | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients to z and x of u . gradient + c log_px; those to the network's tensors go to ``products``."""
        dots = [None] * self.sweeps.program.size if u is None else self.sweeps.tangent(self.point, u)
        seed, of_x = self.head.adjoint(self.at_output, dots[self.sweeps.program.output], of_log_px)
        gradients = self.sweeps.adjoint(self.point, dots, self.cotangents, seed, products, watch)
        of_z = gradients.pop(0, None)
        for index, gradient in gradients.items():
            products.put(index, gradient)
        return of_z, of_x


class _Flow(torch.autograd.Function):
    """Inputs: sweeps, inputs, head, store, steps [K, d...], z, rho, x, alpha, and the network's trained tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        sweeps: Sweeps,
        inputs: Inputs,
        head: Head,
        store: bool,
        z: Tensor,
        rho: Tensor,
        x: Tensor,
        steps: Tensor,
        alpha: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        passive, given_z, given_rho = inputs.detached(), z, rho
        there = [tensor.detach() for tensor in (z, rho, steps, alpha)]
        keep = store and any(ctx.needs_input_grad)
        tape: FlowTape | None = None
        recording: Recording | None = None
        if keep and sweeps.can_be_written_down(len(alpha) + 1, len(z)):
            facts = tuple(inputs.wanted)
            tape, recording, given = sweeps.flow_tapes.find(passive, head, there, facts)
        ctx.tape, ctx.recording, ctx.kept = tape, recording, None
        if tape is not None:
            outputs, ctx.left = tape.forward(head, given)
        elif not keep:
            outputs = tuple(walked(sweeps, passive, inputs.wanted, head, there))
        else:
            with nullcontext() if recording is None else recording.recorder:
                outputs, ctx.kept = walk(sweeps, passive, inputs.wanted, head, there, keep)
            if recording is not None:
                recording.ended_forward(outputs)
                # What autograd gets a graph for must not be what it holds: nobody could let go of such a ring.
                outputs = tuple(output.detach() for output in outputs)
        ctx.sweeps, ctx.inputs, ctx.head, ctx.passive = sweeps, inputs, head, passive
        ctx.count = len(alpha)
        # The inputs too, so that autograd sees what is changed in place.
        ctx.save_for_backward(*outputs[3:5], steps, alpha, given_z, given_rho, x, *parameters)
        ctx.mark_non_differentiable(*outputs[3:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, gz: Tensor | None, grho: Tensor | None, of_log_px: Tensor | None, *_: Any) -> Any:
        z_steps, rho_steps, steps, alpha, *inputs = ctx.saved_tensors
        sources = [*inputs, steps, alpha, gz, grho, of_log_px]
        given = [
            t if t is None else t.detach() for t in (z_steps, rho_steps, steps, alpha, gz, grho, of_log_px)
        ]
        with backward_pass(steps):
            found = None if ctx.tape is None else ctx.tape.backward(ctx.head, ctx.left, given)
            if found is None:
                recording, ctx.recording = ctx.recording, None
                if recording is not None:
                    recording.begin_backward(given)
                with nullcontext() if recording is None else recording.recorder:
                    found = walk_back(ctx, given)
                if recording is not None:
                    recording.ended_backward(found)
        return None, None, None, None, *differentiable_once("hamiltonian_flow", found, sources)


def walk(
    sweeps: Sweeps,
    passive: list[Any],
    wanted: list[bool],
    head: Head,
    start: Sequence[Tensor],
    keep: bool,
    whole: bool = False,
) -> tuple[tuple[Tensor, ...], list[Evaluation]]:
    """From z, rho, steps and alpha: z_K, rho_K, log_px and the trajectory's; all evaluations, or the last one."""
    z, rho, steps, alpha = start
    at = Evaluation(sweeps, passive, wanted, head, z, keep, whole)
    points, kept = [(z, rho, at.log_px)], [at]
    for step, alpha_k in zip(rows(steps).contiguous().unbind(0), alpha.unbind(0), strict=True):
        flat, half = kernel(_OPS.leapfrog_kick_drift.default, rows(z), rows(rho), at.force, step)
        z = flat.view_as(z)
        at = Evaluation(sweeps, passive, wanted, head, z, keep, whole)
        if not keep:
            kept.clear()
        kept.append(at)
        rho = kernel(_OPS.leapfrog_kick_temper.default, half, at.force, step, alpha_k).view_as(z)
        points.append((z, rho, at.log_px))
    trajectory = [torch.stack(column) for column in zip(*points, strict=True)]
    return (z.clone(), rho.clone(), points[-1][2].clone(), *trajectory), kept


def walked(
    sweeps: Sweeps, passive: list[Any], wanted: list[bool], head: Head, start: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The outputs of a walk of which nothing is kept, by straight code (tape.py) if it can be."""

    def found() -> tuple[Tensor, ...]:
        return walk(sweeps, passive, wanted, head, start, False)[0]

    return _straight(sweeps, len(start[3]) + 1, passive, head, start, (tuple(wanted), "walk"), found)


def _straight(
    sweeps: Sweeps,
    evaluations: int,
    passive: list[Any],
    head: Head,
    others: Sequence[Tensor],
    facts: Any,
    function: Callable[[], Sequence[Tensor]],
) -> Sequence[Tensor]:
    """What a function makes of so many evaluations, by straight code (tape.py) if it can be.

    Args:
        others: codes and further tensors that it reads besides ``passive`` and the head's.
        facts: all that it depends on besides tensors.
    """
    form: Any = None
    given: list[Tensor] = []
    if sweeps.can_be_written_down(evaluations, len(others[0])):
        form, given = form_with_head(passive, head, others, facts)
    return cast("Sequence[Tensor]", sweeps.tapes.run(form, given, function, head))


def walk_back(ctx: Any, given: Sequence[Any]) -> tuple[Any, ...]:
    """Gradients to z, rho, x, steps, alpha and the trained tensors, from what was saved and the cotangents."""
    z_steps, rho_steps, steps, alpha, gz, grho, of_log_px = given
    gz = torch.zeros_like(z_steps[0]) if gz is None else gz
    grho = torch.zeros_like(gz) if grho is None else grho
    return WayBack(ctx, z_steps, rho_steps, steps, alpha).run(gz, grho, of_log_px)


class WayBack:
    """The gradient of a trajectory.

    Args:
        ctx: with ``sweeps``, ``head``, ``inputs``, ``passive``, the ``count`` of steps and, if they were ``kept``, the
            evaluations.
        z_steps, rho_steps: [K + 1, B, ...]
        steps: [K, ...], of which one is broadcast to ``flat`` codes.
        alpha: [K]
    """

    flat = staticmethod(rows)
    """Codes as the kernels of the leapfrog operators take them."""

    def __init__(self, ctx: Any, z_steps: Tensor, rho_steps: Tensor, steps: Tensor, alpha: Tensor) -> None:
        self.ctx, self.z, self.rho, self.steps, self.alpha = ctx, z_steps, rho_steps, steps, alpha
        self.d_alpha = torch.zeros_like(alpha)
        self.found: dict[int, Tensor] = {}
        self.products = Products(ctx.passive, ctx.inputs.wanted, self.found)
        self.of_x: Tensor | None = None

    def evaluation(self, k: int) -> Evaluation:
        """Of point k, kept or computed again."""
        if self.ctx.kept is not None:
            # Each is used once; a second pass over a retained graph computes it again.
            at = self.ctx.kept[k]
            if at is not None:
                return at
        inputs = self.ctx.inputs
        return Evaluation(self.ctx.sweeps, self.ctx.passive, inputs.wanted, self.ctx.head, self.z[k])

    def through_force(self, at: Evaluation, u: Tensor, of_log_px: Tensor | None = None) -> Tensor:
        """H(u) - u, the gradient to z of what came back to the force there."""
        of_z, of_x = at.adjoint(u, of_log_px, self.products)
        if self.ctx.kept is None:
            self.products.finish()
        if of_x is not None:
            self.of_x = of_x if self.of_x is None else self.of_x + of_x
        return -u if of_z is None else of_z - u

    def through_kick(
        self, k: int, grho: Tensor, half: Tensor, force: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to momentum, force and step size of the second half of step k; alpha's is kept."""
        g_half, u, of_step, self.d_alpha[k] = kernel(
            _OPS.leapfrog_kick_temper_backward.default, grho, half, force, step, self.alpha[k]
        )
        return g_half, u, of_step

    def run(self, gz: Tensor, grho: Tensor, of_log_px: Tensor | None) -> tuple[Any, ...]:
        """Gradients to z, rho, x, steps, alpha and the trained tensors."""
        flat, steps, shape = self.flat, rows(self.steps).contiguous(), gz.shape
        d_steps = torch.zeros_like(steps)
        gz, grho = flat(gz), flat(grho)
        left = torch.zeros_like(gz)
        after = self.evaluation(self.ctx.count)
        for k in reversed(range(self.ctx.count)):
            step, here = steps[k], self.evaluation(k)
            z, rho, force = flat(self.z[k]), flat(self.rho[k]), flat(here.force)
            _, half = kernel(_OPS.leapfrog_kick_drift.default, z, rho, force, step)
            g_half, u, of_second = self.through_kick(k, grho, half, flat(after.force), step)
            gz = gz + flat(self.through_force(after, (u + left).view(shape), of_log_px))
            of_log_px = None
            gz, grho, left, of_first = kernel(
                _OPS.leapfrog_kick_drift_backward.default, gz, g_half, z, rho, force, step
            )
            torch.add(of_first, of_second, out=d_steps[k])
            after = here
        gz = (gz + flat(self.through_force(after, left.view(shape), of_log_px))).view(shape)
        grho, d_steps = grho.view(shape), d_steps.view_as(self.steps)
        self.products.finish()
        trained = [self.found.get(index) for index in self.ctx.inputs.trained]
        return gz, grho, self.of_x, d_steps, self.d_alpha, *trained


def hamiltonian_flow(
    sweeps: Sweeps,
    inputs: Inputs,
    head: Head,
    z: Tensor,
    rho: Tensor,
    steps: Tensor,
    alpha: Tensor,
    store: bool,
) -> tuple[Tensor, ...]:
    """z_K, rho_K, log_px, and the trajectory's z, rho and log_px; ``steps`` is [K, ...] to be broadcast to z."""
    store = store and torch.is_grad_enabled()  # which nobody can see inside
    return _Flow.apply(sweeps, inputs, head, store, z, rho, head.x, steps, alpha, *inputs.parameters)


class _Force(torch.autograd.Function):
    """log p(x | z) and its gradient to z, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, sweeps: Sweeps, inputs: Inputs, head: Head, z: Tensor, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.passive, ctx.inputs = inputs.detached(), inputs
        ctx.at = Evaluation(sweeps, ctx.passive, inputs.wanted, head, z.detach())
        # What was evaluated is at hand; autograd watches over changes in place of what it was evaluated from.
        ctx.save_for_backward(z, x, *parameters)
        ctx.set_materialize_grads(False)
        return ctx.at.log_px.clone(), ctx.at.gradient.clone()

    @staticmethod
    def backward(ctx: Any, of_log_px: Tensor | None, u: Tensor | None) -> Any:
        z, x, *parameters = ctx.saved_tensors
        found: dict[int, Tensor] = {}
        with backward_pass(z):
            products = Products(ctx.passive, ctx.inputs.wanted, found)
            of_z, of_x = ctx.at.adjoint(u, of_log_px, products)
            products.finish()
            of_parameters = [
                found.get(index, torch.zeros_like(parameter))
                for index, parameter in zip(ctx.inputs.trained, parameters, strict=True)
            ]
        sources = [z, x, *parameters, of_log_px, u]
        return (
            None,
            None,
            None,
            *differentiable_once("log_px_and_force", [of_z, of_x, *of_parameters], sources),
        )


def log_px_and_force(sweeps: Sweeps, inputs: Inputs, head: Head, z: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x | z) [B] and grad_z log p(x | z)."""
    if not torch.is_grad_enabled() or not (z.requires_grad or head.of_x or inputs.trained):
        with torch.no_grad():
            return _force(sweeps, inputs, head, z.detach())
    return _Force.apply(sweeps, inputs, head, z, head.x, *inputs.parameters)


def _force(sweeps: Sweeps, inputs: Inputs, head: Head, z: Tensor) -> tuple[Tensor, Tensor]:
    """Without a way back, by straight code (tape.py) if it can be."""
    passive = inputs.detached()

    def found() -> tuple[Tensor, Tensor]:
        at = Evaluation(sweeps, passive, inputs.wanted, head, z, keep=False)
        return at.log_px, at.gradient

    log_px, gradient = _straight(sweeps, 1, passive, head, [z], (tuple(inputs.wanted), "force"), found)
    return log_px, gradient

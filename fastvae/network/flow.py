"""The Hamiltonian flow and the force over sweeps: K + 1 forces, and the gradient through them in closed form.

Walking back with cotangents gz and grho (fastvae.ops.hamiltonian_flow has the steps):

    gp = alpha_k grho; the force at z_{k+1} collects u = eps/2 gp + what step k+1 left for it; gz += -u + H(u)
    grh = gp + eps gz; the force at z_k receives eps/2 grh; grho = grh

with H(u) the gradient of u . grad_z log p(x | z) + c log p(x | z): one tangent and one adjoint sweep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae.network.heads import Head
from fastvae.network.layers import Point, Products
from fastvae.network.once import differentiable_once
from fastvae.network.sweeps import Inputs, Sweeps


class Evaluation:
    """log p(x | z) and its gradient at one z, with what the gradient through it needs."""

    def __init__(self, sweeps: Sweeps, passive: list[Any], wanted: list[bool], head: Head, z: Tensor) -> None:
        self.sweeps, self.head = sweeps, head
        self.point: Point = sweeps.forward(passive, z, wanted)
        self.log_px, residual = head.residual(sweeps.output(self.point))
        gradient, self.cotangents = sweeps.reverse(self.point, residual)
        self.gradient = torch.zeros_like(z) if gradient is None else gradient

    def adjoint(
        self, u: Tensor | None, of_log_px: Tensor | None, products: Products
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients to z and x of u . gradient + c log_px; those to the network's tensors go to ``products``."""
        dots = [None] * self.sweeps.program.size if u is None else self.sweeps.tangent(self.point, u)
        output = self.sweeps.program.output
        seed, of_x = self.head.adjoint(self.point.values[output], dots[output], of_log_px)
        gradients = self.sweeps.adjoint(self.point, dots, self.cotangents, seed, products)
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
        given = z, rho, x, *parameters
        passive, z, rho = inputs.detached(), z.detach(), rho.detach()
        differentiated = any(ctx.needs_input_grad)
        at = Evaluation(sweeps, passive, inputs.wanted, head, z)
        points, kept = [(z, rho, at.log_px)], [at]
        for k in range(len(alpha)):
            force = kept[-1].gradient - z
            half = rho + 0.5 * steps[k] * force
            z = z + steps[k] * half
            at = Evaluation(sweeps, passive, inputs.wanted, head, z)
            if not (store and differentiated):
                kept.clear()
            kept.append(at)
            rho = alpha[k] * (half + 0.5 * steps[k] * (at.gradient - z))
            points.append((z, rho, at.log_px))
        ctx.sweeps, ctx.inputs, ctx.head, ctx.passive = sweeps, inputs, head, passive
        ctx.kept = kept if store and differentiated else None
        ctx.count = len(alpha)
        z_steps, rho_steps, log_px = (torch.stack(column) for column in zip(*points, strict=True))
        # What was given is saved so that a change of it before the backward pass is noticed.
        ctx.save_for_backward(z_steps, rho_steps, steps, alpha, *given)
        ctx.mark_non_differentiable(z_steps, rho_steps, log_px)
        ctx.set_materialize_grads(False)
        return z.clone(), rho.clone(), points[-1][2].clone(), z_steps, rho_steps, log_px

    @staticmethod
    @differentiable_once("hamiltonian_flow")
    def backward(ctx: Any, gz: Tensor | None, grho: Tensor | None, of_log_px: Tensor | None, *_: Any) -> Any:
        z_steps, rho_steps, steps, alpha = (t.detach() for t in ctx.saved_tensors[:4])
        walk = _WayBack(ctx, z_steps, rho_steps, steps, alpha)
        gz = torch.zeros_like(z_steps[0]) if gz is None else gz
        grho = torch.zeros_like(gz) if grho is None else grho
        return None, None, None, None, *walk.run(gz, grho, of_log_px)


class _WayBack:
    """The gradient of a trajectory."""

    def __init__(self, ctx: Any, z_steps: Tensor, rho_steps: Tensor, steps: Tensor, alpha: Tensor) -> None:
        self.ctx, self.z, self.rho, self.steps, self.alpha = ctx, z_steps, rho_steps, steps, alpha
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

    def run(self, gz: Tensor, grho: Tensor, of_log_px: Tensor | None) -> tuple[Any, ...]:
        """Gradients to z, rho, x, steps, alpha and the trained tensors."""
        d_steps, d_alpha = torch.zeros_like(self.steps), torch.zeros_like(self.alpha)
        left = torch.zeros_like(gz)
        after = self.evaluation(self.ctx.count)
        for k in reversed(range(self.ctx.count)):
            step, alpha = self.steps[k], self.alpha[k]
            here = self.evaluation(k)
            half = self.rho[k] + 0.5 * step * (here.gradient - self.z[k])
            force = after.gradient - self.z[k + 1]
            d_alpha[k] = (grho * (half + 0.5 * step * force)).sum()
            gp = alpha * grho
            gz = gz + self.through_force(after, 0.5 * step * gp + left, of_log_px)
            of_log_px = None
            grh = gp + step * gz
            left = 0.5 * step * grh
            each = 0.5 * force * gp + half * gz + 0.5 * (here.gradient - self.z[k]) * grh
            d_steps[k] = each.sum(0).sum_to_size(step.shape)
            grho, after = grh, here
        gz = gz + self.through_force(after, left, of_log_px)
        self.products.finish()
        trained = [self.found.get(index) for index in self.ctx.inputs.trained]
        return gz, grho, self.of_x, d_steps, d_alpha, *trained


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
    return _Flow.apply(sweeps, inputs, head, store, z, rho, head.x, steps, alpha, *inputs.parameters)


class _Force(torch.autograd.Function):
    """log p(x | z) and its gradient to z, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, sweeps: Sweeps, inputs: Inputs, head: Head, z: Tensor, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.passive, ctx.inputs = inputs.detached(), inputs
        ctx.at = Evaluation(sweeps, ctx.passive, inputs.wanted, head, z.detach())
        ctx.save_for_backward(z, x, *parameters)
        ctx.set_materialize_grads(False)
        return ctx.at.log_px.clone(), ctx.at.gradient.clone()

    @staticmethod
    @differentiable_once("hamiltonian_flow")
    def backward(ctx: Any, of_log_px: Tensor | None, u: Tensor | None) -> Any:
        _ = ctx.saved_tensors  # Raises if one of them was changed meanwhile.
        found: dict[int, Tensor] = {}
        products = Products(ctx.passive, ctx.inputs.wanted, found)
        of_z, of_x = ctx.at.adjoint(u, of_log_px, products)
        products.finish()
        return None, None, None, of_z, of_x, *(found.get(index) for index in ctx.inputs.trained)


def log_px_and_force(sweeps: Sweeps, inputs: Inputs, head: Head, z: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x | z) [B] and grad_z log p(x | z)."""
    return _Force.apply(sweeps, inputs, head, z, head.x, *inputs.parameters)

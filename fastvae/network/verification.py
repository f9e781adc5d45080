"""Comparing a program with the module that it was read from, at first use.

Compared are the output, a vector-Jacobian product to codes and parameters, and a second-order product by reverse over
reverse: an output alone would not tell a straight-through estimator or a detached part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae._second_order import CANNOT, check_twice, twice_differentiable
from fastvae.decoding import called_on_copies
from fastvae.held import follow
from fastvae.lowering.errors import CoupledSamples, UnsupportedLayer
from fastvae.network.coupling import (
    COUPLED,
    ROWS,
    TOLERANCE,
    alike,
    different_rows,
    differs_in_parts,
    run,
    widened,
)
from fastvae.network.layers import Point, Products
from fastvae.network.pristine import Pristine, rows_of
from fastvae.network.sweeps import Inputs, Sweeps

MANY = 65
"""No batch at which a forward is likely to begin to do something else is larger: for one that asks for its number."""


def verify_program(
    pristine: Pristine,
    sweeps: Sweeps,
    z: Tensor,
    condition: Tensor | None = None,
    *,
    of_data: bool = False,
) -> None:
    """Compare, in float64 where the program allows it.

    Args:
        pristine: of the module that was read.
        sweeps: of its program.
        z: some codes [1 or more, ...].
        condition: of the codes, or None.
        of_data: z are data: compared at these very numbers, of which others may be none, and once differentiated; there
            may be no gradient to them.

    Raises:
        UnsupportedLayer: the two differ, or the module cannot be differentiated twice.
        CoupledSamples: a sample's output depends on the other samples of its batch, or on how many they are.
    """
    rows = rows_of(z, ROWS) if of_data else different_rows(z)
    given = None if condition is None else rows_of(condition, ROWS)
    compare = _error_of_data if of_data else _error
    error = None
    compared = pristine.fresh, rows, given
    as_read = sweeps
    try:
        twins = pristine.in_double()
        error = compare(twins(), sweeps, rows.double(), widened(given))
        if z.dtype == torch.float32 and not error[0] <= 1:
            # It may have made something in the dtype of its codes, which a trace notes as it was.
            wide = sweeps.on(sweeps.program.widened())
            of_wide = compare(twins(), wide, rows.double(), widened(given))
            if of_wide[0] <= 1:
                error, sweeps = of_wide, wide
        compared = twins, rows.double(), widened(given)
    except (UnsupportedLayer, CoupledSamples):
        raise
    except Exception:
        # Something in it is of one dtype only.
        error = None
    if error is None:
        try:
            error = compare(pristine.fresh(), as_read, rows, given)
        except (UnsupportedLayer, CoupledSamples):
            raise
        except Exception as failure:
            text = (str(failure).strip().splitlines() or [""])[0]
            raise UnsupportedLayer(
                f"what was read of it does not run: {type(failure).__name__}: {text}"
            ) from failure
    worst, what = error
    if not worst <= 1:
        raise UnsupportedLayer(
            f"the {what} of the network read from it is not its own: its forward does what a trace does not see, "
            "such as a hook on one of its tensors"
        )
    with torch.autocast(z.device.type, enabled=False):
        fresh, codes, conditions = compared
        program = sweeps.program
        # Of a size that stayed a symbol, torch.export itself tells where the forward takes another way.
        counts = (1, MANY, *program.turns) if program.is_aligned else (1, *program.turns)
        _check_other_batches(fresh, sweeps, codes, conditions, counts)


def verify_output(
    pristine: Pristine, sweeps: Sweeps, z: Tensor, condition: Tensor | None = None, *, batch: int
) -> None:
    """Compare the outputs of a batch of so many samples, and of few; see :func:`verify_program`."""
    with torch.autocast(z.device.type, enabled=False):
        _check_other_batches(pristine.fresh, sweeps, z, condition, (batch,))


def _error(module: nn.Module, sweeps: Sweeps, z: Tensor, condition: Tensor | None) -> tuple[float, str]:
    """The largest difference in units of the tolerance, and of what."""
    program = sweeps.program
    tensors, leaves = _given(module, sweeps, condition)
    generator = torch.Generator().manual_seed(1)

    def draw(like: Tensor) -> Tensor:
        return (
            torch.empty(like.shape, dtype=torch.float64, device="cpu").normal_(generator=generator).to(like)
        )

    with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
        point = z.detach().requires_grad_()
        with twice_differentiable():
            own = called_on_copies(module, *([point] if condition is None else [point, condition]))
        v, w, u = draw(own), draw(own), draw(z)
        if not own.requires_grad:
            raise UnsupportedLayer("its output has no gradient to z")
        try:
            # A Function that is differentiable once says so only where the cotangent itself requires a gradient.
            (pulled,) = torch.autograd.grad(
                own, point, v.clone().requires_grad_(), create_graph=True, allow_unused=True
            )
            if pulled is None:
                raise UnsupportedLayer("its output has no gradient to z")
            check_twice("its forward", pulled, point)
            total = (own * w).sum() + (pulled * u).sum()
            wanted = torch.autograd.grad(total, [point, *leaves], allow_unused=True, materialize_grads=True)
        except (RuntimeError, NotImplementedError) as failure:
            text = (str(failure).strip().splitlines() or [""])[0].rpartition(CANNOT)[2]
            raise UnsupportedLayer(f"it cannot be differentiated twice: {text}") from failure
        inputs = Inputs(sweeps, z, tensors)
    with torch.no_grad():
        passive = inputs.detached()
        sweeps.measure(passive, z)
        at = sweeps.forward(passive, z, inputs.wanted)
        output = sweeps.output(at)
        if output.shape != own.shape:
            return float("inf"), "output"
        dz, cotangents = sweeps.reverse(at, v)
        dots = sweeps.tangent(at, u)
        moved = dots[program.output]
        several = _several(sweeps, at, u) if all(layer.many for layer in sweeps.layers) else None
        found: dict[int, Tensor] = {}
        products = Products(passive, inputs.wanted, found)
        gradients = sweeps.adjoint(at, dots, cotangents, w, products)
        of_z = gradients.pop(0, torch.zeros_like(z))
        for index, gradient in gradients.items():
            products.put(index, gradient)
        products.finish()
    of_leaves = _to_leaves(inputs, found, leaves)
    pairs = [("output", output, own), ("gradient", torch.zeros_like(z) if dz is None else dz, pulled)]
    if moved is not None and several is not None:
        pairs += [("derivative along several latents", several, torch.stack([moved, -moved]))]
    pairs += [("second derivative", of_z, wanted[0])]
    pairs += [("second derivative to parameters", a, b) for a, b in zip(of_leaves, wanted[1:], strict=True)]
    return _worst(pairs)


def _given(
    module: nn.Module, sweeps: Sweeps, condition: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The module's tensors by source, and those to which gradients are compared."""
    program = sweeps.program
    if not program.is_active[program.output]:
        raise UnsupportedLayer("its output is not computed from z")
    tensors = [condition if source.is_condition else _tensor(module, source) for source in program.sources]
    return tensors, [each for each in tensors if each is not None and each.requires_grad and each.is_leaf]


def _error_of_data(
    module: nn.Module, sweeps: Sweeps, x: Tensor, condition: Tensor | None
) -> tuple[float, str]:
    """The same of the output and its gradient to parameters."""
    module.requires_grad_()
    tensors, leaves = _given(module, sweeps, condition)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        with twice_differentiable():
            own = called_on_copies(module, *([x] if condition is None else [x, condition]))
        seed = torch.empty(own.shape, dtype=torch.float64, device="cpu")
        seed = seed.normal_(generator=torch.Generator().manual_seed(1)).to(own)
        wanted: Sequence[Tensor] = ()
        if leaves and own.requires_grad:
            wanted = torch.autograd.grad(own, leaves, seed, allow_unused=True, materialize_grads=True)
        inputs = Inputs(sweeps, x, tensors)
    with torch.no_grad():
        passive = inputs.detached()
        sweeps.measure(passive, x)
        at = sweeps.forward(passive, x, inputs.wanted)
        output = sweeps.output(at)
        if output.shape != own.shape:
            return float("inf"), "output"
        found: dict[int, Tensor] = {}
        products = Products(passive, inputs.wanted, found)
        gradients = sweeps.adjoint(at, [None] * sweeps.program.size, {}, seed, products)
        gradients.pop(0, None)
        for index, gradient in gradients.items():
            products.put(index, gradient)
        products.finish()
    pairs = [("output", output, own)]
    if wanted:
        of_leaves = _to_leaves(inputs, found, leaves)
        pairs += [("gradient to parameters", a, b) for a, b in zip(of_leaves, wanted, strict=True)]
    return _worst(pairs)


def _worst(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> tuple[float, str]:
    """The largest difference of two in units of their tolerance, and its name."""
    scale = max(float(b.detach().abs().max()) for _, _, b in pairs if b.numel()) or 1.0
    worst, what = 0.0, "output"
    for name, mine, theirs in pairs:
        if not mine.numel():
            continue
        size = max(float(theirs.detach().abs().max()), 1e-3 * scale)
        # A tensor of the file around a module stays in its own precision.
        error = float((mine - theirs).detach().abs().max()) / (size * TOLERANCE[theirs.dtype])
        # NaN is no agreement, unless the module itself has one: then nothing can be said.
        if error != error and bool(torch.isfinite(theirs.detach()).all()):
            return float("inf"), name
        if error > worst:
            worst, what = error, name
    return worst, what


def _several(sweeps: Sweeps, at: Point, u: Tensor) -> Tensor | None:
    """The output's tangents along u and -u, both in front of one value."""
    found: Tensor | None = sweeps.tangent(at, torch.stack([u, -u]))[sweeps.program.output]
    return found


@torch.no_grad()
def _check_other_batches(
    fresh: Callable[[], nn.Module],
    sweeps: Sweeps,
    z: Tensor,
    condition: Tensor | None,
    counts: Sequence[int],
) -> None:
    """The network that was read does as the module in batches of these sizes, and that what it does in one of few."""
    outputs = []
    for count in (ROWS, *counts):
        module = fresh()
        rows, given = rows_of(z, count), None if condition is None else rows_of(condition, count)
        tensors = [
            given if source.is_condition else _tensor(module, source) for source in sweeps.program.sources
        ]
        own = run(module, rows, given)
        inputs = Inputs(sweeps, rows, tensors)
        found = sweeps.output(sweeps.forward(inputs.detached(), rows, inputs.wanted))
        if not alike(found, own):
            raise UnsupportedLayer("its forward does something else for batches of another size")
        outputs.append(own[:1])
    few = None if condition is None else rows_of(condition, ROWS)
    if not all(alike(output, outputs[0]) for output in outputs) or differs_in_parts(
        fresh, rows_of(z, ROWS), few
    ):
        raise CoupledSamples(COUPLED)


def _tensor(module: nn.Module, source: Any) -> Tensor | None:
    if source.constant is not None:
        constant: Tensor = source.constant
        is_wide = next((p.dtype == torch.float64 for p in module.parameters()), False)
        return constant.double() if constant.dtype == torch.float32 and is_wide else constant
    if source.steps:
        return follow(module, source.steps)
    owner = module.get_submodule(source.path)
    return owner._parameters[source.name] if source.name in owner._parameters else owner._buffers[source.name]


def _to_leaves(inputs: Inputs, found: dict[int, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """From passive values, some computed of others, to the parameters."""
    # A layer's weight brings its bias along, frozen or not.
    given = [
        (inputs.passive[index], gradient)
        for index, gradient in found.items()
        if inputs.passive[index].requires_grad
    ]
    if not given or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(
        torch.autograd.grad(
            [value for value, _ in given], leaves, [gradient for _, gradient in given], allow_unused=True,
            materialize_grads=True,
        )
    )  # fmt: skip


__all__ = ["MANY", "verify_output", "verify_program"]

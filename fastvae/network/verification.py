"""Comparing a program with the module that it was read from, at first use.

Compared are the output, a vector-Jacobian product to codes and parameters, and a second-order product by reverse over
reverse: an output alone would not tell a straight-through estimator or a detached part.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae._second_order import check_twice, twice_differentiable
from fastvae.decoding import called_on_copies
from fastvae.held import follow
from fastvae.lowering.errors import CoupledSamples, UnsupportedLayer
from fastvae.network.layers import Point, Products
from fastvae.network.pristine import Pristine, rows_of
from fastvae.network.sweeps import Inputs, Sweeps

MANY = 65
"""No batch at which a forward is likely to begin to do something else is larger: for one that asks for its number."""
_ROWS = 3
"""Not the batch at which the module was read."""
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}


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
    rows = rows_of(z, _ROWS) if of_data else _different_rows(z)
    given = None if condition is None else rows_of(condition, _ROWS)
    compare = _error_of_data if of_data else _error
    error = None
    compared = pristine.fresh, rows, given
    try:
        twins = pristine.in_double()
        error = compare(twins(), sweeps, rows.double(), _widened(given))
        compared = twins, rows.double(), _widened(given)
    except (UnsupportedLayer, CoupledSamples):
        raise
    except Exception:
        # Something in it is of one dtype only.
        error = None
    if error is None:
        try:
            error = compare(pristine.fresh(), sweeps, rows, given)
        except (UnsupportedLayer, CoupledSamples):
            raise
        except Exception as failure:
            text = (str(failure).strip().splitlines() or [""])[0]
            raise UnsupportedLayer(
                f"what was read of it does not run: {type(failure).__name__}: {text}"
            ) from failure
    worst, what = error
    if not worst <= 1:
        raise UnsupportedLayer(f"the {what} of the network read from it is not its own")
    with torch.autocast(z.device.type, enabled=False):
        fresh, codes, conditions = compared
        program = sweeps.program
        # Of a size that stayed a symbol, torch.export itself tells where the forward takes another way.
        counts = (1, MANY, *program.turns) if program.is_aligned else (1, *program.turns)
        _check_other_batches(fresh, sweeps, codes, conditions, counts)


def _different_rows(z: Tensor) -> Tensor:
    """Of codes near some."""
    rows = rows_of(z, _ROWS)
    noise = torch.empty(rows.shape, dtype=torch.float64, device="cpu").normal_(
        generator=torch.Generator().manual_seed(0)
    )
    rows = torch.where(rows.isfinite(), rows, 0.0) + 0.1 * noise.to(rows)
    # The user's codes may be where nothing changes any more.
    rows[-1] = noise[-1].to(rows)
    return rows


@torch.no_grad()
def check_apart(pristine: Pristine, z: Tensor, condition: Tensor | None = None) -> None:
    """Raise CoupledSamples for a module of which a sample's output depends on the others, read or not.

    Of one that draws random numbers, or cannot be run with few samples, nothing can be said.
    """
    rows = _different_rows(z)
    given = None if condition is None else rows_of(condition, _ROWS)
    coupled = ""
    with contextlib.suppress(Exception), torch.autocast(z.device.type, enabled=False):
        try:
            coupled = _coupling(pristine.in_double(), rows.double(), _widened(given))
        except Exception:  # Something in it is of one dtype only.
            coupled = _coupling(pristine.fresh, rows, given)
    if coupled:
        raise CoupledSamples(coupled)


_COUPLED = (
    "in its forward a sample's output depends on the other samples of its batch, or on their number; make it "
    "independent of them"
)


_NOISY = "in training mode its forward draws random numbers; switch the module to eval()"


def _coupling(fresh: Callable[[], nn.Module], z: Tensor, condition: Tensor | None) -> str:
    """Why the output of some rows is another one where other rows are there, before or behind them; or nothing."""

    def run(part: slice, module: nn.Module) -> Tensor:
        return _run(module, *(tensor[part] for tensor in _present(z, condition)))

    everything = slice(None)
    whole = run(everything, fresh())
    if not _alike(run(everything, fresh()), whole):
        if not any(part.training for part in fresh().modules()):
            return ""
        module = copy.deepcopy(fresh()).eval()
        return _NOISY if _alike(run(everything, module), run(everything, module)) else ""
    parts = slice(0, _ROWS - 1), slice(1, None)
    return "" if all(_alike(run(part, fresh()), whole[part]) for part in parts) else _COUPLED


def verify_output(
    pristine: Pristine, sweeps: Sweeps, z: Tensor, condition: Tensor | None = None, *, batch: int
) -> None:
    """Compare the outputs of a batch of so many samples, and of few; see :func:`verify_program`."""
    with torch.autocast(z.device.type, enabled=False):
        _check_other_batches(pristine.fresh, sweeps, z, condition, (batch,))


def _present(z: Tensor, condition: Tensor | None) -> list[Tensor]:
    return [z] if condition is None else [z, condition]


def _widened(condition: Tensor | None) -> Tensor | None:
    """In float64 if it is floating."""
    return condition.double() if condition is not None and condition.is_floating_point() else condition


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
            own = called_on_copies(module, *_present(point, condition))
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
            text = (str(failure).strip().splitlines() or [""])[0]
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
    return _worst(pairs, _TOLERANCE[z.dtype])


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
            own = called_on_copies(module, *_present(x, condition))
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
    return _worst(pairs, _TOLERANCE[x.dtype])


def _worst(pairs: Sequence[tuple[str, Tensor, Tensor]], tolerance: float) -> tuple[float, str]:
    """The largest difference of two in units of the tolerance, and its name."""
    scale = max(float(b.detach().abs().max()) for _, _, b in pairs if b.numel()) or 1.0
    worst, what = 0.0, "output"
    for name, mine, theirs in pairs:
        if not mine.numel():
            continue
        size = max(float(theirs.detach().abs().max()), 1e-3 * scale)
        error = float((mine - theirs).detach().abs().max()) / (size * tolerance)
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
    for count in (_ROWS, *counts):
        module = fresh()
        rows, given = rows_of(z, count), None if condition is None else rows_of(condition, count)
        tensors = [
            given if source.is_condition else _tensor(module, source) for source in sweeps.program.sources
        ]
        own = _run(module, *_present(rows, given))
        inputs = Inputs(sweeps, rows, tensors)
        found = sweeps.output(sweeps.forward(inputs.detached(), rows, inputs.wanted))
        if not _alike(found, own):
            raise UnsupportedLayer("its forward does something else for batches of another size")
        outputs.append(own[:1])
    few = None if condition is None else rows_of(condition, _ROWS)
    coupled = _coupling(fresh, rows_of(z, _ROWS), few)
    if coupled or not all(_alike(output, outputs[0]) for output in outputs):
        raise CoupledSamples(coupled or _COUPLED)


def _run(module: nn.Module, *given: Tensor) -> Tensor:
    try:
        with twice_differentiable():
            found: Tensor = called_on_copies(module, *given)
        return found
    except Exception as failure:
        raise UnsupportedLayer(
            f"of a batch of {len(given[0])} it raises {type(failure).__name__}"
        ) from failure


def _alike(a: Tensor, b: Tensor) -> bool:
    near = 100 * _TOLERANCE[a.dtype]
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=near, atol=near * max(float(b.nan_to_num().abs().max()), 1e-3), equal_nan=True
    )


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


__all__ = ["MANY", "check_apart", "verify_output", "verify_program"]

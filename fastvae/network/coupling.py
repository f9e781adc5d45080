"""Whether a sample's output depends on the other samples of its batch: then no sample has a gradient of its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvae._second_order import twice_differentiable
from fastvae.decoding import called_on_copies
from fastvae.lowering.errors import CoupledSamples, UnsupportedLayer
from fastvae.network.pristine import Pristine, rows_of

__all__ = [
    "COUPLED",
    "ROWS",
    "TOLERANCE",
    "alike",
    "check_apart",
    "different_rows",
    "differs_in_parts",
    "run",
    "widened",
]

COUPLED = (
    "in its forward a sample's output depends on the other samples of its batch, or on their number; make it "
    "independent of them"
)
_NOISY = "in training mode its forward draws random numbers; switch the module to eval()"
ROWS = 3
"""Not the batch at which a module is read."""
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}


def check_apart(pristine: Pristine, z: Tensor, condition: Tensor | None = None) -> bool:
    """Raise CoupledSamples for a module, read or not, by whose gradient samples depend on others, or on noise.

    Of one that draws random numbers in eval mode, too, or cannot be run with few samples, nothing can be said.

    Returns:
        Whether outputs depend on the others without a gradient: by their number, or by a branch.
    """
    rows, given = different_rows(z), None if condition is None else rows_of(condition, ROWS)
    reason, differs = "", False
    with contextlib.suppress(Exception), torch.autocast(z.device.type, enabled=False):
        try:
            reason, differs = _look(pristine.in_double(), rows.double(), widened(given))
        except Exception:  # Something in it is of one dtype only.
            reason, differs = _look(pristine.fresh, rows, given)
    if reason:
        raise CoupledSamples(reason)
    return differs


def _look(fresh: Callable[[], nn.Module], z: Tensor, condition: Tensor | None) -> tuple[str, bool]:
    """Why samples are coupled, or nothing; and whether outputs depend on the others."""
    with torch.no_grad():
        module = fresh()
        whole = run(module, z, condition)
        if not alike(run(fresh(), z, condition), whole):
            training = any(part.training for part in module.modules())
            module = copy.deepcopy(module).eval()
            settles = training and alike(run(module, z, condition), run(module, z, condition))
            return _NOISY if settles else "", False
        if not differs_in_parts(fresh, z, condition):
            return "", False
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        output = run(fresh(), point, condition)
        for place in range(ROWS) if output.requires_grad else ():
            (found,) = torch.autograd.grad(
                output[place].sum(), point, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            if bool(found[torch.arange(ROWS, device=found.device) != place].ne(0).any()):
                return COUPLED, True
    return "", True


def differs_in_parts(fresh: Callable[[], nn.Module], z: Tensor, condition: Tensor | None) -> bool:
    """Whether the output of some rows is another one without the rows before or behind them."""
    whole = run(fresh(), z, condition)
    for part in (slice(0, ROWS - 1), slice(1, None)):
        given = None if condition is None else condition[part]
        if not alike(run(fresh(), z[part], given), whole[part]):
            return True
    return False


def run(module: nn.Module, z: Tensor, condition: Tensor | None) -> Tensor:
    """What it makes of copies; UnsupportedLayer where it raises."""
    try:
        with twice_differentiable():
            found: Tensor = called_on_copies(module, *([z] if condition is None else [z, condition]))
        return found
    except Exception as failure:
        raise UnsupportedLayer(f"of a batch of {len(z)} it raises {type(failure).__name__}") from failure


def different_rows(z: Tensor) -> Tensor:
    """Of codes near some, ``ROWS`` of them."""
    rows = rows_of(z, ROWS)
    noise = torch.empty(rows.shape, dtype=torch.float64, device="cpu").normal_(
        generator=torch.Generator().manual_seed(0)
    )
    rows = torch.where(rows.isfinite(), rows, 0.0) + 0.1 * noise.to(rows)
    # The user's codes may be where nothing changes any more.
    rows[-1] = noise[-1].to(rows)
    return rows


def widened(condition: Tensor | None) -> Tensor | None:
    """In float64 if it is floating."""
    return condition.double() if condition is not None and condition.is_floating_point() else condition


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    near = 100 * TOLERANCE[a.dtype]
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=near, atol=near * max(float(b.nan_to_num().abs().max()), 1e-3), equal_nan=True
    )

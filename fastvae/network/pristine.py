"""Copies of a module for runs of its forward: each begins with what the module holds, whatever a run leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastvae._second_order import twice_differentiable
from fastvae.locks import READING
from fastvae.lowering.errors import UnsupportedLayer
from fastvae.lowering.hooked import write_out
from fastvae.lowering.snapshot import attributes_of, changed_between
from fastvae.lowering.tracing import in_line, line_that_raised
from fastvae.private import private_copy

__all__ = ["BATCH", "Pristine", "copy_with_modes", "first_line", "rows_of"]

BATCH = 2
"""Samples of the batch that is run: torch.export takes one sample for a size that never changes."""


def copy_with_modes(module: nn.Module) -> nn.Module:
    """A private copy in the module's own training modes, whose hooks compute no weights: the forward does."""
    made = private_copy(module)
    for copied, own in zip(made.modules(), module.modules(), strict=True):
        copied.training = own.training
    write_out(made)
    return made


def rows_of(tensor: Tensor, count: int) -> Tensor:
    """So many rows of a tensor, again from the first where it has fewer, zeros where it has none; without a graph."""
    if not len(tensor):
        return tensor.new_zeros(count, *tensor.shape[1:])
    return tensor.detach()[torch.arange(count, device=tensor.device) % len(tensor)]


class Pristine:
    """What a module's forward is run on, one run at a time, by one thread.

    Args:
        module: the user's, which is copied, or one that is nobody's (``is_own``) and keeps nothing.
        z: one code [1 or more, ...]; its numbers do not matter.
        condition: what goes with the codes, [1 or more, ...], as the second argument.

    Attributes:
        changing: attributes that a forward changes, by the path of their module: what it counts, or keeps of each call.
        writes: whether it writes into what it is given.

    Raises:
        UnsupportedLayer: the forward raises, or does not make one tensor with a row for each code.
    """

    def __init__(
        self, module: nn.Module, z: Tensor, condition: Tensor | None = None, *, is_own: bool = False
    ) -> None:
        self.examples = [torch.zeros((BATCH, *z.shape[1:]), dtype=z.dtype, device=z.device)]
        if condition is not None:
            self.examples.append(rows_of(condition, BATCH))
        self._kept = module if is_own else copy_with_modes(module)
        self.changing: Mapping[str, frozenset[str]] = {}
        before = {} if is_own else attributes_of(self._kept)
        with READING, warnings.catch_warnings(), torch.autocast(z.device.type, enabled=False):
            warnings.simplefilter("ignore")
            try:
                self.writes = _check_output(self._kept, self.examples)
            finally:
                if not is_own:
                    self.changing = changed_between(before, attributes_of(self._kept))
        if self.changing:
            self._kept = copy_with_modes(module)

    def fresh(self) -> nn.Module:
        """A module for one run."""
        return copy_with_modes(self._kept) if self.changing else self._kept

    def in_double(self) -> Callable[[], nn.Module]:
        """The same for runs in float64."""
        twin = copy_with_modes(self._kept).double()
        return (lambda: copy_with_modes(twin)) if self.changing else (lambda: twin)


def _check_output(module: nn.Module, examples: list[Tensor]) -> bool:
    """Whether the forward writes into its inputs."""
    z, *others = examples
    with torch.enable_grad(), twice_differentiable():
        # No leaf: that must not be written to.
        given = [tensor.clone() for tensor in (z.clone().requires_grad_(), *others)]
        before = [tensor._version for tensor in given]
        try:
            output = module(*given)
        except Exception as error:
            text = f"its forward raised {type(error).__name__} of a batch of {BATCH}: {first_line(error)}"
            raise UnsupportedLayer(in_line(text, line_that_raised(error))) from error
    if not isinstance(output, Tensor):
        raise UnsupportedLayer(f"its forward returns a {type(output).__name__}, expected one tensor")
    if output.dim() == 0 or len(output) != BATCH:
        raise UnsupportedLayer(
            f"of {BATCH} codes its forward makes {list(output.shape)}, expected a row for each"
        )
    return [tensor._version for tensor in given] != before


def first_line(error: BaseException) -> str:
    """Of its message."""
    return (str(error).strip().splitlines() or [""])[0][:200]

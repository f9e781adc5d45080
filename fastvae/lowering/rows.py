"""Modules that take images, as the layers take them: flat rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from . import LoweredNetwork, lower

__all__ = ["RowsModule"]


class RowsModule:
    """A module of samples of one shape, such as an encoder, read as one of flat rows: only those can be lowered.

    Args:
        module: from [B, *shape].
        shape: of a sample.
    """

    def __init__(self, module: nn.Module, shape: Sequence[int]) -> None:
        # Kept, since lowering remembers a module as long as it lives.
        self._module = module if len(shape) == 1 else nn.Sequential(nn.Unflatten(1, tuple(shape)), module)
        self._prefix = "" if len(shape) == 1 else "1."

    def lower(self, compare_at: Tensor | None = None) -> LoweredNetwork:
        """See :func:`fastvae.lowering.lower`; the names are those in the module itself.

        Args:
            compare_at: flat rows, of which the first two are compared at.
        """
        network = lower(self._module, compare_at=compare_at)
        return network._replace(names=tuple(name.removeprefix(self._prefix) for name in network.names))

"""Networks that return more than their outputs' tensors, or return them by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["SelectOutputs", "names_in"]


class SelectOutputs(nn.Module):
    """A network of which some outputs are wanted, by name or place.

    Encoders that return a dict, a dataclass, a named tuple or more than two tensors become encoders that models take:
    ``VAE(SelectOutputs(encoder, "mu", "logvar"), ...)``; decoders likewise, with one place.

    Args:
        network: called with one tensor, or with a condition as a second one. It is registered as ``network``:
            parameters are its own, by names that begin so.
        places: of each wanted output its key (of a mapping), its attribute, or its index (of a tuple or list).

    Raises:
        TypeError: a network that is no module, or a place that is neither a string nor an integer.
        ValueError: no place; later, an output that has nothing there.
    """

    def __init__(self, network: nn.Module, *places: str | int) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"SelectOutputs: network: expected a torch module, got {type(network).__name__}")
        if not places:
            raise ValueError("SelectOutputs: places: expected at least one")
        for place in places:
            if not isinstance(place, (str, int)) or isinstance(place, bool):
                raise TypeError(
                    f"SelectOutputs: places: expected strings or integers, got {type(place).__name__}"
                )
        self.network, self.places = network, places

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """The tensor at the place, or those at all places in order."""
        output = self.network(x) if condition is None else self.network(x, condition)
        found = tuple(self._at(output, place) for place in self.places)
        return found[0] if len(found) == 1 else found

    def extra_repr(self) -> str:
        """The places."""
        return ", ".join(map(repr, self.places))

    def _at(self, output: Any, place: str | int) -> Any:
        found: Any = None
        if isinstance(output, Mapping):
            found = output.get(place)
            if found is None and isinstance(place, int) and -len(output) <= place < len(output):
                found = list(output.values())[place]
        elif isinstance(place, str):
            found = getattr(output, place, None)
        elif isinstance(output, (tuple, list)) and -len(output) <= place < len(output):
            found = output[place]
        # Tensors, or what stands for them while the network is read.
        if found is None:
            raise ValueError(
                f"SelectOutputs: {type(self.network).__name__}: expected an output at {place!r}, got none; there are "
                f"{names_in(output)}"
            )
        return found


def names_in(output: object) -> str:
    """What may be selected of an output, in words."""
    if isinstance(output, Tensor):
        return "no parts: it is one tensor"
    if isinstance(output, Mapping):
        return ", ".join(map(repr, output)) or "none"
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        return f"places 0 to {len(output) - 1}" if output else "none"
    names = getattr(output, "_fields", None) or getattr(output, "__dict__", {})
    return ", ".join(repr(name) for name in names if not name.startswith("_")) or "none"

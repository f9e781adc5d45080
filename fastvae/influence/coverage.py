"""Which parameter goes by which rule and route: nothing is left out in silence."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Coverage", "CoverageRow", "UncoveredParameter"]


class UncoveredParameter(ValueError):  # noqa: N818
    """A trained parameter whose per-sample gradients no rule covers."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"TracIn: {name}: {reason}. Its gradients would be missing from every score. Pass "
            "uncovered='materialise' to compute them sample by sample (exact, slow), or layers= to leave it out"
        )
        self.name = name
        """Its name in ``model.named_parameters()``."""


@dataclass(frozen=True)
class CoverageRow:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    rule: str
    """The layer's kind; "autograd" for gradients computed sample by sample; or why it takes no part."""
    route: str
    """"gram" (T terms a sample), "tiles" (of gradients), "" if it takes no part."""
    cost: float
    """Multiply-adds a pair of samples; infinite for none counted."""


@dataclass(frozen=True)
class Coverage:
    """Every parameter of a model, and how its part of the inner product is computed. ``print`` shows a table."""

    rows: tuple[CoverageRow, ...]

    def __str__(self) -> str:
        cells = [("parameter", "shape", "rule", "route", "multiply-adds a pair")]
        for row in self.rows:
            cost = f"{row.cost:,.0f}" if row.route else ""
            cells.append((row.name, "x".join(map(str, row.shape)), row.rule, row.route, cost))
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )

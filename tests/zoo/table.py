"""What ``fastvae.lowering`` makes of each decoder of the zoo: ``PYTHONPATH=tests python -m zoo.table``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from fastvae.lowering import UnsupportedLayer, lower

from . import ZOO, Entry, build, is_installed


class Row(NamedTuple):
    """Of the table."""

    name: str
    origin: str
    lowered: bool
    reason: str
    """why it is not lowered; empty if it is"""


def reading(decoder: nn.Module) -> tuple[bool, str]:
    """Whether a decoder is lowered, and why not, in a line."""
    try:
        lower(decoder)
    except UnsupportedLayer as error:
        return False, str(error).splitlines()[0]
    return True, ""


def rows(entries: Iterable[Entry] = tuple(ZOO.values())) -> list[Row]:
    """Of the entries whose packages are installed."""
    return [Row(entry.name, entry.origin, *reading(build(entry))) for entry in entries if is_installed(entry)]


def markdown(found: Iterable[Row]) -> str:
    """As a table, the share that is lowered below it."""
    found = list(found)
    lines = ["| decoder | origin | lowered | why not |", "|---|---|---|---|"]
    for row in found:
        reason = row.reason.replace("|", "\\|")
        lines.append(f"| {row.name} | {row.origin} | {'yes' if row.lowered else 'no'} | {reason} |")
    return "\n".join([*lines, "", f"{sum(row.lowered for row in found)} of {len(found)} lowered."])


if __name__ == "__main__":
    print(markdown(rows()))

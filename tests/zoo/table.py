"""Which decoders of the zoo run in kernels: ``PYTHONPATH=tests python -m zoo.table``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fastvae import Network

from . import ZOO, Entry, Problem, is_installed, problem


class Row(NamedTuple):
    """Of the table."""

    name: str
    origin: str
    lowered: bool
    reason: str
    """why it is not lowered; empty if it is"""


def reading(p: Problem) -> tuple[bool, str]:
    """Whether kernels take a decoder, and why not, in a line."""
    network = Network(p.decoder, z=p.z, condition=next(iter(p.condition), None))
    reason = network.without_kernels
    return not reason, "".join(reason.splitlines()[:1])


def rows(entries: Iterable[Entry] = tuple(ZOO.values())) -> list[Row]:
    """Of the entries whose packages are installed."""
    return [
        Row(entry.name, entry.origin, *reading(problem(entry))) for entry in entries if is_installed(entry)
    ]


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

"""The tables and the figure of the zoo's benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .common import markdown_table

OURS, EAGER = "ours", "careful eager"
JVP, REVERSE = "jvp", "reverse over reverse"
TASKS = ("flow", "jacobian")


def speed_ups(records: Iterable[dict[str, Any]], task: str, batch: int, threads: int) -> list[float]:
    return [
        result["speed_up"]
        for record in records
        for result in record["results"]
        if (result["task"], result["batch"], result["threads"]) == (task, batch, threads)
    ]


def columns(all_threads: Sequence[int]) -> list[tuple[str, int]]:
    return [(task, threads) for threads in all_threads for task in TASKS]


def header(first: Sequence[str], all_threads: Sequence[int]) -> list[str]:
    titles = [f"{task}, {threads} thread{'s'[: threads - 1]}" for task, threads in columns(all_threads)]
    return [*first, *titles]


def cells(records: Sequence[dict[str, Any]], batches: Sequence[int], all_threads: Sequence[int]) -> list[str]:
    """Median speed-ups at each batch."""
    found = []
    for task, threads in columns(all_threads):
        each = [speed_ups(records, task, batch, threads) for batch in batches]
        found.append(" / ".join(f"{statistics.median(some):.2f}" if some else "-" for some in each))
    return found


def entry_table(records: Sequence[dict[str, Any]], batches: Sequence[int], all_threads: Sequence[int]) -> str:
    rows = [
        [
            record["name"],
            record["origin"],
            "yes" if record["lowered"] else "no",
            *cells([record], batches, all_threads),
        ]
        for record in records
    ]
    return markdown_table(header(["decoder", "origin", "lowered"], all_threads), rows)


def median_table(
    records: Sequence[dict[str, Any]], batches: Sequence[int], all_threads: Sequence[int]
) -> str:
    groups = {
        "all": list(records),
        "PyPI's": [record for record in records if record["origin"] != "own"],
        "lowered": [record for record in records if record["lowered"]],
        "not lowered": [record for record in records if not record["lowered"]],
    }
    rows = []
    for name, some in groups.items():
        timed = [record for record in some if record["results"]]
        rows.append([name, f"{len(timed)} of {len(some)}", *cells(timed, batches, all_threads)])
    return markdown_table(header(["medians of", "timed"], all_threads), rows)


def lowered_table(records: Sequence[dict[str, Any]]) -> str:
    rows = [
        [record["name"], record["reason"].replace("|", "/").replace("](", "] (")]
        for record in records
        if not record["lowered"]
    ]
    share = f"{len(records) - len(rows)} of {len(records)} lowered."
    return f"{share}\n\n{markdown_table(['not lowered', 'why'], rows)}" if rows else share


def notes_list(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"- {record['name']}, {note}" for record in records for note in record["notes"]]
    reversing = sorted(
        {record["name"] for record in records for result in record["results"] if result["eager"] == REVERSE}
    )
    if reversing:
        lines.append(f"- careful eager's Jacobian by {REVERSE}: {', '.join(reversing)}")
    return ["\n".join(lines)] if lines else []


def panels(
    records: Sequence[dict[str, Any]], batches: Sequence[int], all_threads: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Of the figure: speed-ups at the middle batch with most threads, a panel a task."""
    batch, threads = batches[len(batches) // 2], max(all_threads)
    found: dict[str, dict[str, float]] = {}
    for task in TASKS:
        bars = {
            record["name"]: each[0]
            for record in records
            if (each := speed_ups([record], task, batch, threads))
        }
        if bars:
            found[f"{task}, batch {batch}, {threads} threads"] = bars
    return found


def sections(
    records: Sequence[dict[str, Any]],
    missing: Sequence[str],
    batches: Sequence[int],
    all_threads: Sequence[int],
) -> list[str]:
    """The page, but for the machine."""
    found = [
        "# The zoo",
        f"Careful eager's time over ours, medians; batches {' / '.join(map(str, batches))}.",
        median_table(records, batches, all_threads),
        entry_table(records, batches, all_threads),
        lowered_table(records),
        *notes_list(records),
    ]
    if missing:
        found.append(f"Not installed (`make bench-zoo` installs them): {', '.join(missing)}.")
    return found

"""What a benchmark was asked to show, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .common import Timing, markdown_table

FLOOR, STACKED, FLOPS = "GEMM floor", "GEMM floor, stacked", "FLOP floor"

REACHED = {True: "yes", False: "no", None: "not measured"}


@dataclass(frozen=True)
class Target:
    """against / contestant is at least the bound; for a floor, contestant / against at most."""

    device: str
    case: str
    against: str
    bound: float
    contestant: str


def judge(
    records: Sequence[Mapping[str, Any]], device_type: str, targets: Sequence[Target]
) -> list[dict[str, Any]]:
    """Every target of this device beside what was measured."""
    by_case = {record["case"]: record for record in records}
    rows = []
    for target in targets:
        if target.device != device_type or target.case not in by_case:
            continue
        record = by_case[target.case]
        times = {name: timing.median for name, timing in record["timings_ms"].items()} | record["floor_ms"]
        mine, other = times.get(target.contestant), times.get(target.against)
        is_floor = target.against == FLOOR
        measured = None
        if mine is not None and other is not None:
            measured = mine / other if is_floor else other / mine
        rows.append(
            verdict(
                record["title"], target.contestant, target.against, target.bound, measured, at_most=is_floor
            )
        )
    return rows


def verdict(
    case: str, contestant: str, against: str, bound: float, measured: float | None, *, at_most: bool
) -> dict[str, Any]:
    """A target beside what was measured, if anything was."""
    reached = None
    if measured is not None:
        reached = measured <= bound if at_most else measured >= bound
    return {
        "case": case,
        "contestant": contestant,
        "against": against,
        "target": f"at {'most' if at_most else 'least'} {bound:g}x",
        "measured": measured,
        "reached": reached,
    }


def target_table(targets: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            *(row[column] for column in ("case", "contestant", "against", "target")),
            "" if row["measured"] is None else f"{row['measured']:.2f}x",
            REACHED[row["reached"]],
        ]
        for row in targets
    ]
    return markdown_table(["case", "contestant", "against", "target", "measured", "reached"], rows)


def case_record(
    case: Any,
    contestant: str,
    timings: Mapping[str, Timing],
    floor_ms: Mapping[str, float],
    *,
    operations: int,
    gflops: float,
    errors: Mapping[str, float],
    notes: Mapping[str, str],
) -> dict[str, Any]:
    """What is written down of a case (with ``key`` and ``title``), all beside the time of ``contestant``."""
    mine = timings[contestant].median
    return {
        "case": case.key,
        "title": case.title,
        "operations": operations,
        "square_gemm_gflops": gflops,
        "timings_ms": timings,
        "floor_ms": floor_ms,
        "ratio_to_ours": {name: timing.median / mine for name, timing in timings.items()},
        "ours_over_floor": {name: mine / floor for name, floor in floor_ms.items()},
        "relative_error": errors,
        "notes": notes,
    }


def panels(records: Sequence[Mapping[str, Any]], contestant: str) -> dict[str, dict[str, float]]:
    """For ``common.plot_ratios``: every other contestant's time over that of ``contestant``, by the case's title."""
    return {
        record["title"]: {
            name: ratio for name, ratio in record["ratio_to_ours"].items() if name != contestant
        }
        for record in records
    }


def case_section(record: Mapping[str, Any], contestant: str) -> str:
    """One case: every contestant with its ratio to ours and to the floors, and the floors themselves."""
    timings: Mapping[str, Timing] = record["timings_ms"]
    floors: Mapping[str, float] = record["floor_ms"]
    ours = timings[contestant].median

    def row(name: str, median: float, quartiles: str) -> list[str]:
        return [
            name,
            f"{median:.3f}",
            quartiles,
            *(f"{median / base:.2f}" for base in (ours, *floors.values())),
        ]

    rows = [
        row(name, timing.median, f"{timing.lower_quartile:.3f} to {timing.upper_quartile:.3f}")
        for name, timing in timings.items()
    ]
    rows += [row(name, median, "") for name, median in floors.items()]
    header = ["contestant", "median, ms", "quartiles, ms", "/ ours", *(f"/ {floor}" for floor in floors)]
    giga = record["operations"] / 1e9
    lines = [
        f"## {record['title']}",
        f"{giga:.3g} GFLOP; square GEMM at {record['square_gemm_gflops']:.0f} GFLOP/s; "
        f"{timings[contestant].rounds} interleaved rounds.",
        markdown_table(header, rows),
    ]
    if record["notes"]:
        lines.append("\n".join(f"- {name}: {note}" for name, note in record["notes"].items()))
    return "\n\n".join(lines)


def error_table(record: Mapping[str, Any], heading: str = "error against float64") -> str:
    rows = [[name, f"{error:.1e}"] for name, error in record["relative_error"].items()]
    return markdown_table(["contestant", heading], rows)


def environment_table(environment: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    rows = [[name, str(value)] for name, value in (*environment.items(), *settings.items())]
    return markdown_table(["", "value"], rows)

"""What a benchmark was asked to show; its tables, its figure and its file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..writing import plotter, table
from .timing import Timing

Record = dict[str, Any]
"""Of a case: what is written down of it."""

FLOPS, BYTES, FLOOR = "FLOP floor", "copy floor", "GEMM floor"
REACHED = {True: "yes", False: "no", None: "not measured"}


@dataclass(frozen=True)
class Target:
    """against / contestant is at least the bound, in time or in memory; with ``at_most``, contestant / against at most.

    Of a floor always at most.
    """

    device: str
    case: str
    against: str
    bound: float
    contestant: str
    at_most: bool = False


def judge(records: Sequence[Record], device_type: str, targets: Sequence[Target]) -> list[Record]:
    """Every target of this device beside what was measured."""
    by_case = {record["case"]: record for record in records}
    rows = []
    for target in targets:
        if target.device != device_type or target.case not in by_case:
            continue
        record = by_case[target.case]
        times = {name: timing.median for name, timing in record.get("timings_ms", {}).items()}
        known = times | record.get("floor_ms", {}) | record.get("bytes", {})
        ours, other = known.get(target.contestant), known.get(target.against)
        at_most = target.at_most or target.against in (FLOOR, FLOPS, BYTES)
        measured = None
        if ours and other:
            measured = ours / other if at_most else other / ours
        of = (record["title"], target.contestant, target.against, target.bound)
        rows.append(verdict(*of, measured, at_most=at_most))
    return rows


def verdict(
    case: str, contestant: str, against: str, bound: float, measured: float | None, *, at_most: bool
) -> Record:
    """A target beside what was measured, if anything was."""
    reached = None
    if measured is not None:
        reached = measured <= bound if at_most else measured >= bound
    return {
        **{"case": case, "contestant": contestant, "against": against},
        **{"target": f"at {'most' if at_most else 'least'} {bound:g}x", "measured": measured},
        "reached": reached,
    }


def target_table(targets: Sequence[Record]) -> str:
    columns = ["case", "contestant", "against", "target", "measured", "reached"]
    shown = [
        row
        | {"reached": REACHED[row["reached"]]}
        | {"measured": "" if row["measured"] is None else f"{row['measured']:.2f}x"}
        for row in targets
    ]
    return table(columns, [[row[column] for column in columns] for row in shown])


def case_section(record: Record) -> str:
    """One case: every contestant with its ratio to ours and to the floors, its error, and the floors themselves."""
    lines = [f"## {record['title']}"]
    timings: Mapping[str, Timing] = record.get("timings_ms", {})
    floors, errors = record.get("floor_ms", {}), record.get("relative_error", {})
    if timings:
        ours = next(iter(timings.values())).median
        rates = "; ".join(f"{name} {rate:.0f}" for name, rate in record["rates"].items())
        rounds = next(iter(timings.values())).rounds
        work = f"{record['operations'] / 1e9:.3g} GFLOP; " if record["operations"] else ""
        lines.append(f"{work}{rates}; {rounds} interleaved rounds.")
        rows = [
            [
                *(
                    name,
                    f"{timing.median:.3f}",
                    f"{timing.lower_quartile:.3f} to {timing.upper_quartile:.3f}",
                ),
                *(f"{timing.median / base:.2f}" for base in (ours, *floors.values())),
                *([f"{errors[name]:.1e}" if name in errors else ""] if errors else []),
            ]
            for name, timing in timings.items()
        ]
        rows += [
            [name, f"{floor:.3f}", "", *(f"{floor / base:.2f}" for base in (ours, *floors.values()))]
            + ([""] if errors else [])
            for name, floor in floors.items()
        ]
        header = ["contestant", "median, ms", "quartiles, ms", "/ ours", *(f"/ {floor}" for floor in floors)]
        lines.append(table([*header, *(["error against float64"] if errors else [])], rows))
    if sizes := record.get("bytes"):
        ours = next(iter(sizes.values()))
        rows = [
            [name, f"{size / 2**20:.1f}", f"{size / ours:.2f}" if ours else ""]
            for name, size in sizes.items()
        ]
        lines.append(table(["contestant", "peak extra memory, MiB", "/ first"], rows))
    if record["notes"]:
        lines.append("\n".join(f"- {name}: {note}" for name, note in record["notes"].items()))
    return "\n\n".join(lines)


def page(title: str, record: Record, summary: Callable[[Sequence[Record]], list[str]] | None) -> str:
    """The results of a benchmark: a section a case, or the tables and notes of many."""
    cases, targets = record["cases"], record["targets"]
    sections = [f"# {title}", *([target_table(targets)] if targets else [])]
    if summary is None:
        sections += map(case_section, cases)
    else:
        sections += [*summary(cases), *notes(cases)]
    sections.append(table(["", "value"], (record["environment"] | record["settings"]).items()))
    return "\n\n".join(sections)


def notes(records: Sequence[Record]) -> list[str]:
    """Of all cases, as one section; a note that several share is said once."""
    cases: dict[str, list[str]] = {}
    for record in records:
        for name, note in record["notes"].items():
            cases.setdefault(f"{name}: {note}".removeprefix(": "), []).append(record["title"])
    return ["\n".join(f"- {', '.join(titles)}: {note}" for note, titles in cases.items())] if cases else []


def overview(records: Sequence[Record]) -> list[str]:
    """A row a case: ours beside the slowest and the quickest rival, and beside its floor."""
    rows = []
    for record in records:
        ours, *rivals = record.get("ratio_to_ours", {"": 1})
        if rivals:
            timing, ratios = record["timings_ms"][ours], record["ratio_to_ours"]
            ends = (pick(rivals, key=ratios.__getitem__) for pick in (max, min))
            quartiles = f"{timing.lower_quartile:.3g} to {timing.upper_quartile:.3g}"
            floor = min(record["ours_over_floor"].values(), default=math.nan)
            named = [f"{ratios[name]:.2f}, {name}" for name in ends]
            rows.append([record["title"], f"{timing.median:.3g}", quartiles, *named, f"{floor:.2f}"])
    header = ["", "ours, ms", "quartiles", "slowest rival / ours", "quickest rival / ours", "ours / floor"]
    return [table(header, rows), *(case_section(record) for record in records)]


def speed_up(record: Record) -> float:
    """The first rival's time over ours; NaN where one of them was not timed."""
    ratios = list(record.get("ratio_to_ours", {}).values())
    return ratios[1] if len(ratios) > 1 else math.nan


def grid(records: Sequence[Record], row: str, column: str, groups: Sequence[str] = ()) -> list[str]:
    """Speed-ups of many cases by two labels: their median and least in all and by each of ``groups``, then all."""
    columns = list(dict.fromkeys(record[column] for record in records))

    def of(some: Iterable[Record], heading: str) -> list[float]:
        return [found for r in some if r[column] == heading and not math.isnan(found := speed_up(r))]

    def summed(some: Sequence[Record]) -> list[str]:
        found = [of(some, heading) for heading in columns]
        return [f"{statistics.median(each):.2f} ({min(each):.2f})" if each else "-" for each in found]

    parts: dict[str, list[Record]] = {"all": list(records)}
    for label in groups:
        for record in records:
            parts.setdefault(f"{label}: {record[label]}", []).append(record)
    counted = [[name, len({record[row] for record in some}), *summed(some)] for name, some in parts.items()]
    by_row: dict[str, list[Record]] = {}
    for record in records:
        by_row.setdefault(record[row], []).append(record)
    each = [
        [
            *(name, *(some[0][label] for label in groups)),
            *("".join(f"{value:.2f}" for value in of(some, heading)) or "-" for heading in columns),
        ]
        for name, some in by_row.items()
    ]
    return [
        "A rival's time over ours, medians.",
        table(["median (least)", f"{row}s", *columns], counted),
        table([row, *groups, *columns], each),
    ]


def draw(path: Path, records: Sequence[Record], panel: str = "") -> None:
    """A row a case, a dot a contestant: its time over ours; without matplotlib no figure."""
    pyplot = plotter()
    panels: dict[str, list[Record]] = {}
    for record in records:
        if record.get("ratio_to_ours"):
            panels.setdefault(record[panel] if panel else "", []).append(record)
    if pyplot is None or not panels:
        return
    tallest = max(len(some) for some in panels.values())
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(8 * len(panels), 1.6 + 0.3 * tallest), squeeze=False, layout="constrained"
    )
    names = dict.fromkeys(name for record in records for name in record.get("ratio_to_ours", {}))
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    for axis, (title, some) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            dots = [(r["ratio_to_ours"][name], i) for i, r in enumerate(some) if name in r["ratio_to_ours"]]
            if dots:
                axis.scatter(*zip(*dots, strict=True), color=colors[name], label=name, s=28, zorder=3)
        axis.set_yticks(range(len(some)), [record["title"] for record in some], fontsize=8)
        axis.set(xscale="log", title=title, xlabel="time / ours (right of the line: ours is faster)")
        axis.axvline(1, color="black", linewidth=1)
        axis.grid(color="#e6e6e6", zorder=0)
        axis.invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

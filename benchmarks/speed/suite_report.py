"""What the operators' suite found: a record for JSON, Markdown tables, figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import common, report
from .suite_problem import COMPILED, CONTESTANTS, EAGER, FAIR, JAX, OURS

PERCENTILES = (5, 25, 50, 75, 95)
RIVALS = CONTESTANTS[1:]
STEADY = 1.5
"""the highest rate of a steady machine over its lowest, at most"""
COLORS = {OURS: "#222222", EAGER: "#b0b0b0", FAIR: "#4878a8", COMPILED: "#d1753a", JAX: "#5a9e58"}

LEGEND = f"""\
"forward" is a call without gradients, "backward" a call and the gradients to all inputs and parameters. Times are
medians in ms, with quartiles; the other columns are a rival's time over ours (above 1: ours is faster), and ours over
the floor: the fewest operations of matrix products at the rate of a large square one, or the fewest bytes at the rate
of a large copy, whichever takes longer, both rates measured just before (a call that reads more than it writes can
beat the copy). Every contestant agreed with float64 before it was timed. What an empty cell lacks was left out by
--quick, or is noted below.

- hamiltonian_flow: {EAGER}, two forces a step; {FAIR}, K + 1 forces, weights of convolutions in channels_last
- leapfrog: {EAGER}, the two formulas as they stand; {FAIR}, with torch.addcmul
- jacobian_l1: {EAGER}, reverse over reverse, all latents beside each other; {FAIR}, vmap(jacfwd)
- grad_dot: {EAGER}, gradients of 64 samples at a time and their product; {FAIR}, Gram matrices
- gaussian_kl: {EAGER}, torch.distributions; {FAIR}, the formula
- log_px: {EAGER}, all codes at once; {FAIR}, 64 at a time, in channels_last
- {COMPILED}: of the fair one (of the flow: its twin by torch.func); {JAX}: of the same formulas"""


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    if len(seconds) == 1:
        return {str(percent): 1e3 * seconds[0] for percent in PERCENTILES}
    twentieths = statistics.quantiles(seconds, n=20, method="inclusive")
    return {str(percent): 1e3 * twentieths[percent // 5 - 1] for percent in PERCENTILES}


def condense(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run from pytest-benchmark's JSON."""
    timings: list[dict[str, Any]] = []
    scaling: list[dict[str, Any]] = []
    for benchmark in raw["benchmarks"]:
        stats = benchmark["stats"]
        row = {
            **benchmark["extra_info"],
            "percentiles_ms": percentiles(stats["data"]),
            "rounds": stats["rounds"],
            "repeats": stats["iterations"],
        }
        (scaling if "sweep" in row else timings).append(row)
    return {
        "benchmark": "suite",
        "environment": raw["machine_info"],
        "settings": dict(settings),
        "timings": timings,
        "scaling": scaling,
        "notes": raw["notes"],
    }


def grouped(timings: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[str, Mapping[str, Any]]]:
    """Contestants of each operator, size and direction, where ours is one."""
    groups: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in timings:
        key = row["operator"], row["size"], row["direction"]
        groups.setdefault(key, {})[row["contestant"]] = row
    return {key: rows for key, rows in groups.items() if OURS in rows}


def median(row: Mapping[str, Any]) -> float:
    return row["percentiles_ms"]["50"]


def timing_table(timings: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for key, rows in grouped(timings).items():
        mine = rows[OURS]
        ratios = [f"{median(rows[name]) / median(mine):.2f}" if name in rows else "" for name in RIVALS]
        quartiles = f"{mine['percentiles_ms']['25']:.3g} to {mine['percentiles_ms']['75']:.3g}"
        floor = median(mine) / mine["floor_ms"]
        cells.append([*key, f"{median(mine):.3g}", quartiles, *ratios, f"{floor:.3g}"])
    header = ["operator", "size", "direction", "ours, ms", "quartiles", *RIVALS, "ours / floor"]
    return common.markdown_table(header, cells)


def size_table(timings: Sequence[Mapping[str, Any]]) -> str:
    """Sizes in words, and the rates that their floors are taken at."""
    rows = {(row["operator"], row["size"]): row for row in timings}
    cells = [
        [*key, row["title"], f"{row['gflops']:.0f}", f"{row['gigabytes']:.1f}"] for key, row in rows.items()
    ]
    return common.markdown_table(["operator", "size", "", "GEMM, GFLOP/s", "copy, GB/s"], cells)


def memory_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        ours, fair = row["bytes"][OURS], row["bytes"][FAIR]
        share = f"{fair / ours:.1f}" if ours else ""
        cells.append(
            [row["operator"], row["size"], f"{ours / 2**20:.1f}", f"{fair / 2**20:.1f}", share],
        )
    return common.markdown_table(["operator", "size", "ours, MiB", f"{FAIR}, MiB", "/ ours"], cells)


def scaling_table(points: Sequence[Mapping[str, Any]]) -> str:
    by_point: dict[tuple[str, int], dict[str, float]] = {}
    for point in points:
        by_point.setdefault((point["sweep"], point["value"]), {})[point["contestant"]] = median(point)
    cells = [
        [sweep, str(value), f"{times[OURS]:.3g}", f"{times[FAIR]:.3g}", f"{times[FAIR] / times[OURS]:.2f}"]
        for (sweep, value), times in by_point.items()
    ]
    return common.markdown_table(["sweep", "value", "ours, ms", f"{FAIR}, ms", "/ ours"], cells)


def markdown(record: Mapping[str, Any], figures: Sequence[str]) -> str:
    """The whole report; ``figures`` are file names beside it."""
    parts = ["# Every operator", LEGEND, *disturbance(record["timings"]), timing_table(record["timings"])]
    parts += [f"![{name}]({name})" for name in figures]
    if record["notes"]:
        parts += ["Not timed:", "\n".join(noted(record["notes"]))]
    if record["scaling"]:
        parts += ["## Scaling, backward", scaling_table(record["scaling"])]
    if record["memory"]:
        parts += [
            "## Peak extra memory, with gradients where there are any",
            memory_table(record["memory"]),
        ]
    parts += [
        "## Sizes",
        size_table(record["timings"]),
        report.environment_table(record["environment"], record["settings"]),
    ]
    return "\n\n".join(parts)


def disturbance(timings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning if the machine's own rate changed between operators: contestants are not interleaved."""
    rates = [row["gflops"] for row in timings]
    if not rates or max(rates) <= STEADY * min(rates):
        return []
    return [
        f"**The machine was disturbed:** the rate of the same matrix product went from {min(rates):.0f} to "
        f"{max(rates):.0f} GFLOP/s within this run. Compare nothing finely."
    ]


def noted(notes: Sequence[Mapping[str, str]]) -> list[str]:
    return [
        f"- {note['operator']}, {note['size']}, {note['direction']}, {note['contestant']}: {note['note']}"
        for note in notes
    ]


def plot_ratios(path: Path, timings: Sequence[Mapping[str, Any]]) -> bool:
    """Speed-ups over the rivals, and times over the floor, of every row; False, and no file, without matplotlib."""
    pyplot = common.plotter()
    groups = grouped(timings)
    if pyplot is None or not groups:
        return False
    figure, (speed, floor) = pyplot.subplots(
        1, 2, figsize=(12, 1.9 + 0.26 * len(groups)), sharey=True, layout="constrained"
    )
    labels = [", ".join(key) for key in groups]
    for name in CONTESTANTS:
        here = [(index, rows) for index, rows in enumerate(groups.values()) if name in rows]
        places = [index for index, _ in here]
        dots = {"color": COLORS[name], "label": name, "s": 28, "zorder": 3}
        if name != OURS:
            speed.scatter([median(rows[name]) / median(rows[OURS]) for _, rows in here], places, **dots)
        floor.scatter([median(rows[name]) / rows[name]["floor_ms"] for _, rows in here], places, **dots)
    speed.set_yticks(range(len(labels)), labels)
    speed.set_ylim(len(labels) - 0.4, -0.6)
    speed.set_xlabel("rival's time / ours (right of the line: ours is faster)")
    floor.set_xlabel("time / floor")
    for axis in (speed, floor):
        axis.set_xscale("log")
        axis.axvline(1, color="black", linewidth=1)
        axis.grid(axis="both", color="#e6e6e6", zorder=0)
    figure.legend(*floor.get_legend_handles_labels(), loc="outside lower center", ncols=len(CONTESTANTS))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def plot_scaling(path: Path, points: Sequence[Mapping[str, Any]]) -> bool:
    """A panel of time against the changed number for each sweep; False, and no file, without matplotlib."""
    pyplot = common.plotter()
    sweeps = list(dict.fromkeys(point["sweep"] for point in points))
    if pyplot is None or not sweeps:
        return False
    figure, axes = pyplot.subplots(
        1, len(sweeps), figsize=(3.4 * len(sweeps), 3), squeeze=False, layout="constrained"
    )
    for axis, sweep in zip(axes[0], sweeps, strict=True):
        seen: list[float] = []
        for name in (OURS, FAIR):
            mine = [row for row in points if row["sweep"] == sweep and row["contestant"] == name]
            values, low, middle, high = (
                [row["value"] for row in mine],
                *([row["percentiles_ms"][percent] for row in mine] for percent in ("25", "50", "75")),
            )
            axis.plot(values, middle, marker="o", color=COLORS[name], label=name)
            axis.fill_between(values, low, high, color=COLORS[name], alpha=0.2, linewidth=0)
            seen += low + high
        axis.set_xscale("log")
        axis.set_yscale("log", base=2)
        axis.set_ylim(2 ** math.floor(math.log2(min(seen))), 2 ** math.ceil(math.log2(max(seen))))
        axis.set_xticks(values, [str(value) for value in values])
        axis.xaxis.set_minor_locator(pyplot.NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set(xlabel=sweep, ylabel="ms")
        axis.grid(color="#e6e6e6")
    axes[0][0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True

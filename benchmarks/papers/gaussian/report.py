"""The tables, the verdicts beside the paper's, and the figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .measures import ENCODER_LIKE, EXACT, Row, describe

TEMPERED = ("HVAE K=10 fixed", "HVAE K=10 free", "HVAE K=1 tempered")


def table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> str:
    """Rows as text; a column is (key, heading, format)."""
    cells = [[heading for _, heading, _ in columns]]
    for row in rows:
        cells.append(["-" if row[key] is None else format(row[key], spec) for key, _, spec in columns])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    text = []
    for line in cells:
        rest = "  ".join(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        text.append(f"{line[0].ljust(widths[0])}  {rest}")
    return "\n".join(text)


def error_table(rows: Sequence[Row]) -> str:
    return table(
        rows,
        [
            ("method", "method", ""),
            ("d", "d", "d"),
            ("delta_error", "|Delta error|^2", ".3g"),
            ("delta_error_se", "+-", ".1g"),
            ("sigma_error", "|sigma error|^2", ".3g"),
            ("sigma_error_se", "+-", ".1g"),
        ],
    )


def weight_table(rows: Sequence[Row]) -> str:
    return table(
        rows,
        [
            ("method", "method", ""),
            ("base", "q(z_0)", ""),
            ("num_data", "N", "d"),
            ("d", "d", "d"),
            ("log_evidence", "log evidence", ".4f"),
            ("log_mean_weight", "log mean weight", ".4f"),
            ("effective_samples", "effective samples", ".0f"),
            ("mean_ratio", "mean w / evidence", ".5f"),
            ("standard_error", "+-", ".5f"),
            ("z_score", "z", "+.2f"),
        ],
    )


def variance_table(rows: Sequence[Row]) -> str:
    return table(
        rows,
        [
            ("method", "method", ""),
            ("base", "q or q(z_0)", ""),
            ("d", "d", "d"),
            ("gradient_evaluations", "gradients", "d"),
            ("gap", "log p(x) - ELBO", ".3g"),
            ("elbo_sd", "sd of ELBO", ".3g"),
            ("delta_gradient_sd", "sd of grad Delta", ".3g"),
            ("log_sigma_gradient_sd", "sd of grad log sigma", ".3g"),
            ("log_sigma_gradient_bias", "|mean grad log sigma|", ".3g"),
        ],
    )


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the published figure says (the sum of both errors, at the largest d), and what came out here.

    A tie: a difference within two standard errors, the data sets taken as independent.
    """
    d = max(row["d"] for row in rows)
    at_d = {row["method"]: row for row in rows if row["d"] == d}
    planar = tuple(name for name in at_d if name.startswith("planar"))
    vb = tuple(name for name in at_d if name.startswith("VB"))
    hvae = tuple(name for name in at_d if name.startswith("HVAE"))
    claims = [
        ("tempered beats untempered, K = 10", TEMPERED[:2], ("HVAE K=10 untempered",)),
        ("tempered beats untempered, K = 1", TEMPERED[2:], ("HVAE K=1 untempered",)),
        ("every HVAE beats planar flows", hvae, planar),
        ("every HVAE beats VB", hvae, vb),
        ("tempered HVAE with K = 10 beats VB", TEMPERED[:2], vb),
    ]
    lines = []
    for claim, winners, losers in claims:
        outcomes = []
        for label, keys in (("sum", ("delta", "sigma")), ("Delta", ("delta",)), ("sigma", ("sigma",))):
            worst, worst_se = max(_error(at_d[name], keys) for name in winners)
            best, best_se = min(_error(at_d[name], keys) for name in losers)
            tie = abs(worst - best) <= 2 * math.hypot(worst_se, best_se)
            outcome = "tie" if tie else "yes" if worst < best else "NO"
            outcomes.append(f"{label}: {outcome} ({worst:.3g} against {best:.3g})")
        lines.append(f"{claim} (d = {d}): {'; '.join(outcomes)}")
    return lines


def _error(row: Row, keys: Sequence[str]) -> tuple[float, float]:
    """The sum of the errors and its standard error (0 for a single data set, which gives none)."""
    errors = (row[f"{key}_error_se"] or 0.0 for key in keys)
    return sum(row[f"{key}_error"] for key in keys), math.hypot(*errors)


def draw(errors: Sequence[Row], variances: Sequence[Row], path: Path) -> None:
    """The published figure, Delta and sigma apart, and below it the noise of the estimates, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    near = describe(ENCODER_LIKE)
    far = [row for row in variances if row["base"] != near]
    close = [row for row in variances if row["base"] == near]
    panels = [
        (errors, "delta_error", "squared error of Delta"),
        (errors, "sigma_error", "squared error of sigma"),
        (far, "elbo_sd", "sd of the ELBO estimate [nats], cut at 1e-5"),
        (far, "log_sigma_gradient_sd", "sd of its gradient to log sigma"),
        (close, "elbo_sd", f"sd of the ELBO estimate [nats], all from q {near}"),
        (close, "log_sigma_gradient_sd", "sd of its gradient to log sigma"),
    ]
    figure, axes = pyplot.subplots(3, 2, figsize=(14, 15), constrained_layout=True)
    for axis, (rows, key, title) in zip(axes.flat, panels, strict=True):
        names = [_label(row) for row in rows]
        for name, (colour, marker, line) in _styles(sorted(names)).items():
            chosen = sorted((row["d"], row[key]) for row in rows if _label(row) == name)
            axis.plot(*zip(*chosen, strict=True), f"{colour}{marker}{line}", markersize=4, label=name)
        axis.set(title=title, xlabel="d", xscale="log", yscale="log")
        # Rounding alone, where q is the exact posterior, would take most of the axis.
        axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-5))
        axis.grid(alpha=0.3)
    for axis in axes[:, 1]:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=65)
    pyplot.close(figure)


def _label(row: Row) -> str:
    """A curve's name; for the third table with q and the gradients that an estimate takes."""
    if "gradient_evaluations" not in row:
        return row["method"]
    learnt = f", q {row['base']}" if row["method"] in ("VB", "IWAE") else ""
    return f"{row['method']}{learnt} ({row['gradient_evaluations']})"


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of each curve; a colour a family."""
    families = {"HVAE K=10": "C0", "HVAE K=1 ": "C2", "VB": "C1", "planar": "C3", "IWAE": "C4"}
    styles: dict[str, tuple[str, str, str]] = {}
    seen: dict[str, int] = {}
    for name in dict.fromkeys(names):
        colour = next((c for family, c in families.items() if name.startswith(family)), "k")
        rank = seen.get(colour, 0)
        seen[colour] = rank + 1
        styles[name] = (colour, "osv^D"[rank % 5], ":" if name == EXACT else ("-", "--", "-.", ":")[rank % 4])
    return styles

"""Every target that the benchmarks set themselves, beside what the results in a folder say.

    python -m benchmarks.speed targets              prints the table, writes results/README.md, draws headline-cpu.png
    python -m benchmarks.speed targets --output F   of the results in another folder

A result's own page has all contestants, quartiles and floors. Targets of other devices are on pages of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import writing
from . import harness, report


@dataclass(frozen=True)
class Headline:
    """A bar pair of the figure: what is in use today, and the quickest rival that computes the same."""

    label: str
    result: str
    case: str
    usual: str


HEADLINES = (
    Headline("Hamiltonian flow, MLP", "flow", "mlp", "eager, 2K forces"),
    Headline("Hamiltonian flow, convolutional", "flow", "conv", "eager, 2K forces"),
    Headline("Jacobian L1, MLP", "jacobian", "mlp", "differences, looped"),
    Headline("Jacobian L1, convolutional", "jacobian", "conv", "differences, looped"),
    Headline("TracIn, MLP", "tracin", "mlp", "captum TracInCP"),
    Headline("TracIn, convolutional", "tracin", "conv", "loop, one backward a sample"),
    Headline("likelihood regret, MLP", "regret-mlp", "mlp-score", "one image, as published"),
    Headline("likelihood regret, DCGAN", "regret", "dcgan-score", "one image, as published"),
    Headline("log-likelihood, DCGAN", "log_likelihood", "dcgan", "eager, copies"),
)


def draw(folder: Path, slug: str) -> bool:
    """headline-<slug>.png from the results of a device; False, and no file, where there are none or no matplotlib."""
    rows = []
    for headline in HEADLINES:
        path = folder / f"{headline.result}-{slug}.json"
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else []
        for case in cases:
            if case["case"] == headline.case:
                ratios = case["ratio_to_ours"]
                same = case.get("relative_error", ratios)  # what computes another thing has no error
                rivals = [name for name in ratios if name in same and "ours" not in name]
                best = min(rivals, key=ratios.__getitem__)
                rows.append((headline.label, headline.usual, ratios[headline.usual], best, ratios[best]))
    pyplot = writing.plotter()
    if pyplot is None or not rows:
        return False
    figure, axis = pyplot.subplots(figsize=(9, 0.62 * len(rows) + 0.9), layout="constrained")
    for index, (_, usual, usual_ratio, best, best_ratio) in enumerate(rows):
        for name, ratio, shift, color in (
            (usual, usual_ratio, -0.2, "#b8c4d0"),
            (best, best_ratio, 0.2, "#2f6f9f"),
        ):
            axis.barh(index + shift, ratio, height=0.38, color=color)
            axis.text(ratio * 1.05, index + shift, f"{ratio:.3g}x  {name}", va="center", fontsize=8)
    axis.set(xscale="log", yticks=range(len(rows)), yticklabels=[row[0] for row in rows])
    axis.set_xlim(0.8, 8 * max(row[2] for row in rows))
    axis.set_xlabel(
        f"time / fastvae's ({slug}): light, what is in use; dark, the quickest rival of the same run"
    )
    axis.axvline(1, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / f"headline-{slug}.png", dpi=120)
    pyplot.close(figure)
    return True


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results with targets by the name of their file, without those of trial runs."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not path.stem.endswith("-quick") and record.get("targets"):
            found[path.stem] = record
    return found


def page(records: dict[str, dict[str, Any]]) -> str:
    """The targets that were reached and those that were not, a table for each result."""
    rows = [row for record in records.values() for row in record["targets"]]
    reached = sum(row["reached"] is True for row in rows)
    sections = [
        "# Results",
        f"{reached} of {len(rows)} targets reached. Written by `python -m benchmarks.speed targets` from the results "
        "beside it; ratios are of medians of one run. What the papers' experiments gave is in "
        "[results](../../docs/results.md).",
    ]
    for name, record in records.items():
        environment = record["environment"]
        sections += [
            f"## [{name}]({name}.md)",
            f"{environment['device']}, commit {environment['commit']}, torch {environment['torch, running']}, "
            f"{environment['date']}",
            report.target_table(record["targets"]),
        ]
    return "\n\n".join(sections)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder of the results")
    folder = parser.parse_args(arguments).output
    records = read(folder)
    if not records:
        parser.error(f"--output: {folder} holds no result with targets")
    text = page(records)
    draw(folder, "cpu")
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")
    print(text)

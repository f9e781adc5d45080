"""Every target that the benchmarks set themselves, beside what the results in a folder say.

    python benchmarks/targets.py                 prints the table, and writes results/README.md
    python benchmarks/targets.py --output F      of the results in another folder

A result's own page has all contestants, quartiles and floors. Targets of other devices are on pages of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __package__:  # as python -m benchmarks.targets
    sys.path.insert(0, str(HERE))
sys.path.append(
    str(HERE.parent)
)  # a checkout that is not installed, but never in place of an installed fastvae

import common  # noqa: E402
import report  # noqa: E402


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
        f"{reached} of {len(rows)} targets reached. Written by `python benchmarks/targets.py` from the results beside "
        "it; ratios are of medians of one run. What the papers' experiments gave is in [papers](papers).",
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
    parser.add_argument("--output", type=Path, default=common.RESULTS, help="folder of the results")
    folder = parser.parse_args(arguments).output
    records = read(folder)
    if not records:
        parser.error(f"--output: {folder} holds no result with targets")
    text = page(records)
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

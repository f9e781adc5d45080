"""Every operator at every size against its rivals, in one record and one figure: ``make bench``, half an hour.

The cases are those of the benchmarks ``operators``, ``flow``, ``jacobian`` and ``log_likelihood``, which say what is
computed and go deeper (memory, targets).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from . import flow, harness, jacobian, log_likelihood, operators, report


def cases(options: harness.Options) -> Iterator[harness.Case]:
    for part in (operators, flow, jacobian, log_likelihood):
        name = part.__name__.rpartition(".")[2]
        for case in part.cases(options.quick):
            title = case.title if part is operators else f"{name}, {case.title}"
            yield replace(
                case, title=title, group=case.group or name, labels={"operator": case.group or name}
            )


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(flow.parser(__doc__), arguments)
    harness.Benchmark("suite", "Every operator", cases(options), summary=report.overview).run(options)

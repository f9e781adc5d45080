"""Fuzzers: seeded cases by the thousand, each judged against PyTorch or against what is documented.

A fuzzer is a module of this package with ``run_case(seed: int) -> str``: it draws one case from the seed alone, and
returns a word for how it ended ("agreed", "both refused", ...), which is counted; whatever is wrong it raises.
``CASES`` says how many of them ``make test`` takes, for about 10 seconds. Cases run in a forked worker
(:mod:`fuzzing.harness`), so that a crash or a hang is one failed case and not the end.

    make fuzz ARGS="raw_entries --seconds 600"     or, of one case,  ARGS="raw_entries --only 4711"
"""

from __future__ import annotations

import pkgutil


def fuzzer_names() -> list[str]:
    """The fuzzers of this package; `misbehaving` is the harness's own test."""
    others = (
        "decoders",
        "draws",
        "facts",
        "graph_layers",
        "harness",
        "misbehaving",
        "raw_arguments",
        "spoiling",
    )
    return sorted(name for _, name, _ in pkgutil.iter_modules(__path__) if name not in others)

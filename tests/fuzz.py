"""Run one fuzzer, or all, for as long as you like; --help says how.

Says how many cases ended in which way, and how to repeat those that failed; exits with 1 if any did.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # `tests` itself Python has put first

from fuzzing import fuzzer_names
from fuzzing.harness import Report, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*fuzzer_names(), "all"])
    parser.add_argument(
        "--seconds", type=float, help="how long to run (of each, for all); 60 unless --cases is given"
    )
    parser.add_argument("--cases", type=int, help="how many cases to run")
    parser.add_argument("--seed", type=int, default=0, help="the first case; 0 unless given")
    parser.add_argument("--only", type=int, metavar="SEED", help="run this case alone, in this process")
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(importlib.import_module(f"fuzzing.{arguments.name}").run_case(arguments.only))
        return 0
    seconds = 60.0 if arguments.cases is None and arguments.seconds is None else arguments.seconds
    failed = False
    for name in fuzzer_names() if arguments.name == "all" else [arguments.name]:
        said, told = time.monotonic(), 0

        def progress(report: Report, name: str = name) -> None:
            nonlocal said, told
            for seed, reason in report.failures[told:]:
                print(f"--- {name}: case {seed} failed\n{reason}", file=sys.stderr, flush=True)
            told = len(report.failures)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                print(
                    f"  {name}: {report.cases} cases, {len(report.failures)} failed",
                    file=sys.stderr,
                    flush=True,
                )

        report = fuzz(
            name, first_seed=arguments.seed, cases=arguments.cases, seconds=seconds, on_progress=progress
        )
        print(report.describe(name), flush=True)
        failed = failed or bool(report.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

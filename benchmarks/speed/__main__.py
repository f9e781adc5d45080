"""``python -m benchmarks.speed NAME [OPTION...]``, from the folder that holds ``benchmarks``."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    *(
        "ais",
        "consistency",
        "encoders",
        "flow",
        "jacobian",
        "likelihoods",
        "log_likelihood",
        "models",
        "operators",
    ),
    *("regret", "scale", "suite", "targets", "tracin", "zoo"),
)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in NAMES:
        sys.exit(f"benchmarks.speed: expected one of {', '.join(NAMES)}, got {name!r}")
    sys.argv[:2] = [f"benchmarks.speed {name}"]
    importlib.import_module(f"benchmarks.speed.{name}").main()


if __name__ == "__main__":
    main()

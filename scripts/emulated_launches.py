"""Which CUDA kernels a run of tests on the build that emulates CUDA has launched, and whether none is missing.

    scripts/emulated_launches.py build/emulated/launches

reads what tests/conftest.py has left there, a file for each process, and names every ``__global__`` function of
csrc/kernels/cuda that nobody launched.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "kernels" / "cuda"
KERNEL = re.compile(r"__global__\s[^;{]*?\b(\w+_kernel)\s*\(")


def kernels() -> dict[str, str]:
    """Every kernel and the file that defines it."""
    return {
        name: path.name
        for path in sorted(SOURCES.glob("*.cu*"))
        for name in KERNEL.findall(path.read_text(encoding="utf-8"))
    }


def main() -> int:
    """Print launches and instantiations of each kernel; 1 if a kernel has none."""
    launches: Counter[str] = Counter()
    for path in Path(sys.argv[1]).glob("*.json"):
        launches.update(json.loads(path.read_text(encoding="utf-8")))
    # A kernel's name, and in angle brackets what it was instantiated with.
    of_kernel = {name: Counter[str]() for name in kernels()}
    for name, count in launches.items():
        of_kernel[name.split("<")[0]][name] += count
    for name, found in of_kernel.items():
        print(f"{name:32}{found.total():10} launches of {len(found):3} instantiations")
    missing = [f"{name} ({file})" for name, file in kernels().items() if not of_kernel[name]]
    if missing:
        print("emulated-launches: no test has launched", ", ".join(missing), file=sys.stderr)
        return 1
    print(f"emulated-launches: {launches.total()} launches of all {len(of_kernel)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())

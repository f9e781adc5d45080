"""Times, errors and memory of the operators beside their rivals: ``python -m benchmarks.speed NAME``."""

import sys
from pathlib import Path

# Other people's networks lie among the tests, in zoo.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

"""Print what pyproject.toml asks for: the build requirements and the extras named, one a line.

    python scripts/requirements.py test lint | pip install -r /dev/stdin

pip can install extras only together with the package, which would compile it.
"""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main(extras: list[str]) -> None:
    """Print the build requirements, then those of the extras."""
    content = tomllib.loads(PYPROJECT.read_text())
    known = content["project"]["optional-dependencies"]
    unknown = sorted(set(extras) - set(known))
    if unknown:
        raise SystemExit(f"requirements.py: extras: expected some of {sorted(known)}, got {unknown}")
    for requirement in content["build-system"]["requires"] + [r for extra in extras for r in known[extra]]:
        print(requirement)


if __name__ == "__main__":
    main(sys.argv[1:])

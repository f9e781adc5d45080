"""What is installed where: this package's files, the other project of its name, and packages that are not there.

The name ``fastvae`` on PyPI belongs to another project with the same import name, so this one's distribution is
``fastvae-ops``. Installed side by side the two write into one folder, which nothing else would ever say.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["faults", "installed_elsewhere", "other_project", "to_mend"]

DISTRIBUTION = "fastvae-ops"
_AUTHOR = "The fastvae authors"
_PACKAGE = Path(__file__).resolve().parent
_CURE = (
    f"To mend it: pip uninstall fastvae {DISTRIBUTION}, then install this package again, in its checkout: "
    "pip install ."
)


def to_mend(package: str, extra: str = "") -> str:
    """The end of a message that asks for a package: how to get it, alone or with the extra that holds it, if any."""
    with_extra = f' (or, in a checkout of fastvae: pip install ".[{extra}]")' if extra else ""
    return f"to mend it: pip install {package}{with_extra}"


def other_project(path: list[str] | None = None) -> str | None:
    """A sentence that names the other project's installation, if there is one.

    Args:
        path: where to look for distributions (None: ``sys.path``).
    """
    for found in importlib.metadata.distributions(name="fastvae", path=sys.path if path is None else path):
        if (
            found.metadata["Author"] != _AUTHOR
        ):  # else it is this package, from before it had a name of its own
            return (
                f"fastvae: another project that is imported under this name is installed too (fastvae {found.version} "
                f"in {found.locate_file('')}; this package is {DISTRIBUTION}). Both write into one folder, and "
                f"whichever came last is what runs. {_CURE}"
            )
    return None


def faults(path: list[str] | None = None) -> list[str]:
    """What is wrong with the files of this installation, a sentence each; none for one that was built in place.

    Args:
        path: see :func:`other_project`.
    """
    found = [sentence for sentence in [other_project(path)] if sentence]
    expected = _recorded(sys.path if path is None else path)
    if not expected:
        return found
    altered = sorted(name for name, digest in expected.items() if digest != _digest(_PACKAGE / name))
    strange = sorted(
        name
        for name in (str(path.relative_to(_PACKAGE)) for path in _PACKAGE.rglob("*.*") if path.is_file())
        if name not in expected and "__pycache__" not in name
    )
    for what, names in (("not as they were installed", altered), ("not this package's", strange)):
        if names:
            found.append(f"fastvae: files in {_PACKAGE} are {what}: {', '.join(names)}. {_CURE}")
    return found


def _recorded(path: list[str]) -> dict[str, str]:
    """Each file of the package by its path in it, with the digest that its installation recorded."""
    for found in importlib.metadata.distributions(name=DISTRIBUTION, path=path):
        files = {
            Path(str(found.locate_file(""))).resolve() / file: file.hash.value
            for file in found.files or ()
            if file.hash is not None and file.hash.mode == "sha256"
        }
        inside = {path: value for path, value in files.items() if path.is_relative_to(_PACKAGE)}
        if inside:
            return {str(path.relative_to(_PACKAGE)): value for path, value in inside.items()}
    return {}


def _digest(path: Path) -> str:
    if not path.is_file():
        return ""
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")


def installed_elsewhere() -> Iterator[tuple[Path, bool]]:
    """Other folders of this package on ``sys.path`` that hold a build, and whether they have this one's sources."""
    own = _sources(_PACKAGE)
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "fastvae"
        if folder != _PACKAGE and (folder / "_build.py").is_file():
            yield folder, _sources(folder) == own


def _sources(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}
    found.pop("_build.py", None)
    return found

"""Environments as a user may have them, for Python in a process of its own: some packages missing, others there."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import site
import subprocess
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastvae

PACKAGE = Path(fastvae.__file__).parent


class Environment:
    """A virtual environment with what is installed where the tests run, but for fastvae.

    Args:
        folder: a new one.
        missing: packages that it does not have.
        only: it has these and what they need, and nothing else (None: everything).
    """

    def __init__(self, folder: Path, *missing: str, only: Iterable[str] | None = None) -> None:
        venv.create(folder, symlinks=True, with_pip=False)
        self.python = folder / "bin" / "python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        hidden = tuple(name.lower().replace("-", "_") for name in (*missing, "fastvae"))
        wanted = None if only is None else _entries(closure(only))
        for packages in map(Path, site.getsitepackages()):
            for entry in packages.iterdir() if packages.is_dir() else ():
                name = entry.name.lower().replace("-", "_").split(".")[0]
                is_hidden = any(name == package or name.startswith(f"{package}_") for package in hidden)
                if not is_hidden and (wanted is None or entry.name in wanted):
                    (self.packages / entry.name).symlink_to(entry)
        # The commands that pages call.
        for name, module in (("torchrun", "torch.distributed.run"), ("fastvae", "fastvae.__main__")):
            command = self.python.with_name(name)
            command.write_text(
                f"#!{self.python}\nimport sys\nfrom {module} import main\n\nsys.exit(main())\n"
            )
            command.chmod(0o755)

    def run(self, *arguments: str, cwd: Path, path: str | Path = "") -> subprocess.CompletedProcess[str]:
        """Its Python, with PYTHONPATH."""
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)}
        return subprocess.run(
            [self.python, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
        )


def closure(names: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """Distributions by name: these, and what they require, with their extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), extra
            if key in seen:
                continue
            seen.add(key)
            distribution = found[key[0]] = importlib.metadata.distribution(requirement.name)
            further = map(Requirement, distribution.requires or ())
            waiting += [one for one in further if one.marker is None or one.marker.evaluate({"extra": extra})]
    return found


def _entries(distributions: dict[str, importlib.metadata.Distribution]) -> set[str]:
    """What they have written into site-packages, at its top."""
    return {file.parts[0] for found in distributions.values() for file in found.files or ()}


def install(folder: Path, *, distribution: str = "fastvae_ops", name: str = "fastvae-ops") -> Path:
    """This package in a folder of packages, with the metadata that pip writes; the shared object is a link."""
    target = folder / "fastvae"
    copy_sources(target)
    for file in ("_build.py", *(path.name for path in PACKAGE.glob("_C.*"))):
        (target / file).symlink_to(PACKAGE / file)
    lines = [f"fastvae/{path.relative_to(target)},{digest(path)}," for path in sorted(target.rglob("*.*"))]
    write_metadata(folder, distribution, name, "The fastvae authors", lines)
    return target


def copy_sources(target: Path) -> None:
    """The files of this package, and no build."""
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".html", ".typed") and path.name != "_build.py":
            copy = target / path.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def digest(path: Path) -> str:
    """As a RECORD holds it."""
    value = hashlib.sha256(path.read_bytes()).digest()
    return "sha256=" + base64.urlsafe_b64encode(value).decode().rstrip("=")


def write_metadata(folder: Path, distribution: str, name: str, author: str, record: Sequence[str]) -> None:
    """A .dist-info folder."""
    info = folder / f"{distribution}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\nAuthor: {author}\n")
    (info / "RECORD").write_text(
        "\n".join([*record, f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]) + "\n"
    )

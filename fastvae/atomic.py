"""Files that are written whole or not at all, under temporary names that nobody can foresee."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["remove_leftovers", "write_atomically"]

_TEMPORARY = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{16})?\.tmp")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace the file at ``path`` by what ``write`` writes, or leave it as it was.

    A link at ``path`` is replaced and not followed.

    Raises:
        OSError: the disk is full, the folder is not writable, ...; names ``path`` and says why.
        KeyboardInterrupt: names ``path``.
    """
    # Random and opened exclusively: neither another process nor a link planted in advance can be there.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    unchanged = "not written, and what was there before is unchanged"
    try:
        with open(temporary, "xb", opener=_open_no_link) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{unchanged}: {error.strerror}", str(path)) from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{path}: interrupted; {unchanged}") from error
        raise
    # The rename itself must reach the disk; Windows has no descriptors of folders.
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Remove what killed processes left of files of these names; for a folder where nobody else is writing."""
    for entry in os.scandir(folder):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is not None and names.fullmatch(match["name"]) and not entry.is_dir(follow_symlinks=False):
            Path(entry.path).unlink(missing_ok=True)


def _open_no_link(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

"""Reads a file of torch.save without running code in it, and without believing what it says of itself."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["DamagedFileError", "read_archive"]


class DamagedFileError(ValueError):
    """A checkpoint that cannot be read: damaged, cut short, or no checkpoint at all; names the file."""

    def __init__(self, path: Path, found: object) -> None:
        self.path, self.found = path, " ".join(str(found).removeprefix(f"{path}: ").split())
        super().__init__(f"{path}: expected a checkpoint, found a damaged or foreign file ({self.found})")

    def __reduce__(self) -> tuple[type[DamagedFileError], tuple[Path, str]]:
        return type(self), (self.path, self.found)


def read_archive(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU.

    Raises:
        DamagedFileError: whatever is wrong with the file.
        FileNotFoundError: there is none.
    """
    try:
        # Opened once: what was checked is what is loaded, also if the file is replaced meanwhile.
        with open(path, "rb") as file:
            _check(file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        _check_hooks(content)
        return content
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise anything, from zlib.error to KeyError
        raise DamagedFileError(path, f"{type(error).__name__}: {error}") from error


def _check_hooks(value: Any) -> None:
    """ValueError for a tensor with backward hooks, which may be anything: torch.save and autograd would use them."""
    if isinstance(value, torch.Tensor):
        hooks = value._backward_hooks
        if hooks is not None and (type(hooks) not in (dict, OrderedDict) or hooks):
            raise ValueError("a tensor with backward hooks")
    elif isinstance(value, dict):
        _check_hooks([*value.values()])
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _check_hooks(entry)


def _check(file: IO[bytes]) -> None:
    """ValueError and others unless checksums hold and every size is that of what is there."""
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("two entries of one name")
        for name, entry in entries.items():
            # torch.save does not compress; whoever announces more than the file holds would have it allocated.
            if (
                entry.compress_type != zipfile.ZIP_STORED
                or not entry.file_size == entry.compress_size <= size
            ):
                raise ValueError(f"{name}: {entry.file_size} bytes in {entry.compress_size}, compressed")
        # torch.load does not compare checksums: a flipped bit would load as a wrong weight.
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} entries data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        for key, announced in _storages(archive.read(pickles[0])):
            # Not every torch compares: some make a tensor of the announced size around fewer bytes.
            held = entries[f"{folder}data/{key}"].file_size
            if announced > held:
                raise ValueError(f"a tensor of {announced} bytes in {held}")


_BYTES = dict.fromkeys(("ComplexDouble",), 16)
_BYTES |= dict.fromkeys(("Double", "Long", "ComplexFloat"), 8)
_BYTES |= dict.fromkeys(("Float", "Int", "QInt32"), 4)
_BYTES |= dict.fromkeys(("Half", "BFloat16", "Short"), 2)
"""Of an element of torch.FloatStorage and the like; 1 of all others, which is the least."""


def _storages(data: bytes) -> list[tuple[str, int]]:
    """Key and size in bytes of each piece of memory that a pickle of torch.save asks for."""
    unpickler = _Sizes(io.BytesIO(data))
    unpickler.load()
    return unpickler.found


class _Sizes(pickle._Unpickler):
    """Goes through a pickle without importing or calling anything that it names.

    In Python, because the one in C allocates a table as long as the largest number in it says.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.found: list[tuple[str, int]] = []

    def find_class(self, module: str, name: str) -> Any:
        kind = re.fullmatch(r"(\w+)Storage", name)
        return _BYTES.get(kind[1], 1) if kind is not None else _Nothing

    def persistent_load(self, identity: Any) -> Any:
        what, each, key, _, count = identity
        if what != "storage" or not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise ValueError(f"a tensor of {count!r} numbers")
        self.found.append((key, count * (each if isinstance(each, int) else 1)))
        return _Nothing()


class _Nothing(dict[Any, Any]):
    """Stands for whatever a pickle would make: takes any arguments, entries and state, and keeps none."""

    def __init__(self, *arguments: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass

    def add(self, value: object) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return 0

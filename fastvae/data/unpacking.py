"""Arrays from IDX, ``.npy`` and ``.npz`` files; what a header announces is believed only if the file can hold it."""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = ["keys_of_npz", "read_idx", "read_npy", "read_npz", "shape_of_npy"]

_Array = np.ndarray[Any, Any]
_DEFLATE = 1032
"""Bytes that deflate, of gzip and zip, can make of one."""


def read_idx(path: Path, ranks: Sequence[int], max_unpacked: int) -> _Array:
    """One IDX file of bytes: 00 00 08 rank, the sizes as big-endian uint32, the values; gzipped or not.

    ValueError, naming the file, for anything else, or for more than ``max_unpacked`` bytes in a gzipped one.
    """
    with open(path, "rb") as file:
        held = os.fstat(file.fileno()).st_size
        # By content: browsers and servers gunzip silently and keep the name, or the other way round.
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            return _read_idx(file, path, ranks, held, None)
        try:
            with gzip.open(file) as unpacked:
                return _read_idx(unpacked, path, ranks, held, max_unpacked)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, found a damaged one ({error})") from error


def _read_idx(
    file: IO[bytes] | gzip.GzipFile, path: Path, ranks: Sequence[int], held: int, max_unpacked: int | None
) -> _Array:
    start = file.read(4)
    magics = [bytes((0, 0, 8, rank)) for rank in ranks]
    if start not in magics:
        expected = " or ".join(magic.hex(" ") for magic in magics)
        raise ValueError(
            f"{path}: expected an IDX file of bytes (magic {expected}), found {start.hex(' ') or 'nothing'}"
        )
    rank = start[3]
    header = 4 + 4 * rank
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise ValueError(f"{path}: expected an IDX header of {header} bytes, found {4 + len(sizes)} bytes")
    shape = struct.unpack(f">{rank}I", sizes)
    announced = header + int(np.prod(shape, dtype=object))
    message = f"{path}: expected {announced} bytes for shape {list(shape)}, found "
    if max_unpacked is None:
        if held != announced:
            raise ValueError(f"{message}{held}")
    elif announced > max_unpacked:
        raise ValueError(_beyond(path, announced, max_unpacked))
    elif announced > _DEFLATE * held:
        raise ValueError(f"{message}{held} gzipped, which cannot hold as many")
    # Filled in parts, so that memory is taken for what comes and not for what is announced.
    values = np.empty(announced - header, np.uint8)
    came = 0
    while came < len(values) and (part := file.read(min(2**20, len(values) - came))):
        values[came : came + len(part)] = np.frombuffer(part, np.uint8)
        came += len(part)
    if came < len(values):
        raise ValueError(f"{message}{header + came}")
    # Up to the end, where gzip compares its checksum.
    if file.read(1):
        raise ValueError(f"{message}more than {announced}")
    return values.reshape(shape)


def read_npy(path: Path) -> _Array:
    """The array of an ``.npy`` file. ValueError, naming the file, for anything else; nothing is unpickled."""
    try:
        with open(path, "rb") as file:
            _check_header(file, os.fstat(file.fileno()).st_size)
            file.seek(0)
            array: _Array = np.lib.format.read_array(file, allow_pickle=False)
            return array
    except OSError:
        raise
    except Exception as error:  # a damaged header can raise anything
        raise ValueError(f"{path}: expected a plain array, found another kind of file ({error})") from error


def read_npz(path: Path, names: Sequence[str], max_unpacked: int) -> dict[str, _Array]:
    """The arrays of these names that are in an ``.npz`` file, the first of which must be.

    ValueError, naming the file, for anything else, or for an array of more than ``max_unpacked`` bytes in fewer.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected an .npz file, found another kind of file or a truncated one")
    arrays: dict[str, _Array] = {}
    keys: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            held = os.stat(path).st_size
            entries = {entry.filename: entry for entry in archive.infolist()}
            keys = sorted(name.removesuffix(".npy") for name in entries)
            for listed in entries.values():
                # Compares its name with that in the directory, or a damaged directory would hide the labels.
                archive.open(listed).close()
            for name in names:
                entry = entries.get(f"{name}.npy")
                if entry is not None:
                    _check_entry(entry, held, max_unpacked)
                    with archive.open(entry) as file:
                        _check_header(file, entry.file_size)
                    with archive.open(entry) as file:
                        arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                        # Up to the end, where zip compares its checksum.
                        if file.read(1):
                            raise ValueError(f"{entry.filename}: more than its array")
    except _BeyondLimitError as error:
        raise ValueError(_beyond(path, error.announced, max_unpacked)) from None
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"{path}: expected plain arrays, found an unreadable entry ({error})") from error
    if names[0] not in arrays:
        raise ValueError(
            f"{path}: expected the key {names[0]} (and {', '.join(names[1:])}), found {', '.join(keys) or 'none'}"
        )
    return arrays


def shape_of_npy(path: Path) -> tuple[int, ...] | None:
    """What the header of an ``.npy`` file announces; None for anything else."""
    try:
        with open(path, "rb") as file:
            return _header(file)[0]
    except Exception:  # a damaged header can raise anything
        return None


def keys_of_npz(path: Path) -> set[str]:
    """The names of the arrays of an ``.npz`` file; none of anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()


class _BeyondLimitError(Exception):
    def __init__(self, announced: int) -> None:
        super().__init__(announced)
        self.announced = announced


def _beyond(path: Path, announced: int, max_unpacked: int) -> str:
    return (
        f"{path}: expected at most max_unpacked={max_unpacked} bytes in a compressed array, found {announced}; "
        "if you trust the file, pass fastvae.data.load a larger max_unpacked"
    )


def _check_entry(entry: zipfile.ZipInfo, held: int, max_unpacked: int) -> None:
    """ValueError unless the archive, of ``held`` bytes, can hold what the entry announces."""
    if entry.compress_size > held:
        raise ValueError(f"{entry.filename}: {entry.compress_size} bytes in a file of {held}")
    if entry.compress_type == zipfile.ZIP_STORED:
        most = entry.compress_size
    elif entry.file_size > max_unpacked:
        raise _BeyondLimitError(entry.file_size)
    elif entry.compress_type == zipfile.ZIP_DEFLATED:
        most = _DEFLATE * entry.compress_size
    else:
        most = max_unpacked
    if entry.file_size > most:
        raise ValueError(f"{entry.filename}: {entry.file_size} bytes in {entry.compress_size}")


def _check_header(file: IO[bytes], size: int) -> None:
    """ValueError unless an .npy entry of ``size`` bytes holds the array that its header announces."""
    shape, dtype = _header(file)
    # Objects are pickled and have no size; reading refuses them.
    announced = file.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not dtype.hasobject and (min(shape, default=0) < 0 or announced != size):
        raise ValueError(f"{dtype} {list(shape)} needs {announced} bytes, found {size}")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an .npy entry, read up to its values."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the format, which plain arrays do not need")
    return shape, dtype

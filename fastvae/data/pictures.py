"""Pictures in the formats that Pillow reads, as bytes [C, H, W]: what they hold, turned upright, in one size."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastvae._distribution import to_mend
from fastvae.progress import bar_of

__all__ = ["SUFFIXES", "bytes_of", "pictures_below", "read_pictures"]

_Array = np.ndarray[Any, Any]

SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "jp2", "avif", "webp", "gif", "bmp", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm"),
    )
)
"""Of files that are taken for pictures, in small letters."""

# Pillow goes by content, and its reader of PostScript would start a program.
_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
_GREY = ("1", "L", "LA", "La", "I", "F")
_ORIENTATION = 0x0112  # of EXIF
_NAMED = 5
"""Bad files in a message."""


def pictures_below(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders, by their suffixes, sorted by their paths.

    Links are followed, each folder being gone through once. What begins with a dot is left out.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # In one order everywhere, also where two names lead to one folder.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(place, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def read_pictures(
    paths: Sequence[Path],
    source: str,
    size: tuple[int, int] | None,
    channels: int | None,
    most: int,
    progress: bool,
) -> _Array:
    """Files as uint8 [N, C, H, W].

    Args:
        paths: at least one.
        source: where they are from, for messages.
        size, channels: see ``fastvae.data.load``.
        most: bytes of the result.
        progress: a bar, where it takes long.

    ValueError names the files that are no pictures, or those of several sizes.
    """
    pillow = _pillow()
    heads = _each(paths, lambda path: _head(pillow, path), "reading headers", progress)
    if size is None:
        size = _one_size(paths, [head.size for head in heads], source)
    if channels is None:
        channels = 1 if all(head.is_grey for head in heads) else 3
    total = len(paths) * channels * size[0] * size[1]
    if total > most:
        shape = f"{channels}x{size[0]}x{size[1]}"
        raise ValueError(
            f"{source}: {len(paths)} images of {shape} take {total / 2**30:.3g} GiB of memory, expected at most "
            f"max_unpacked={most} bytes; pass a smaller size, such as size=64, or a larger max_unpacked"
        )
    images = np.empty((len(paths), channels, *size), np.uint8)

    def fill(index: int) -> None:
        with pillow.Image.open(paths[index], formats=_formats(pillow)) as picture:
            if picture.format in ("JPEG", "MPO"):
                # Photographs are decoded at a part of their size; what is left is twice what is wanted, or more.
                picture.draft(None, (2 * max(size), 2 * max(size)))
            images[index] = bytes_of(picture, size, channels)

    def name(index: int) -> Path:
        return paths[index]

    _each(range(len(paths)), fill, "reading images", progress, name)
    return images


def bytes_of(picture: Any, size: tuple[int, int] | None, channels: int | None) -> _Array:
    """A Pillow image, turned as its EXIF data say, as uint8 [C, H, W].

    Args:
        size: (height, width), to which it is scaled so that it covers them, and cropped around its centre; None: its
            own.
        channels: 1 or 3; None: its own, without transparency.

    ValueError for a mode that has no bytes.
    """
    pillow = _pillow()
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        picture = pillow.ImageOps.exif_transpose(picture)
    grey = _is_grey(picture.mode) if channels is None else channels == 1
    picture = _plain(pillow, picture).convert("L" if grey else "RGB")
    if size is not None and picture.size != size[::-1]:
        picture = pillow.ImageOps.fit(picture, size[::-1], pillow.Image.Resampling.LANCZOS)
    found = np.asarray(picture)
    return found[None] if grey else found.transpose(2, 0, 1)


class _Head(NamedTuple):
    size: tuple[int, int]
    """Height and width, upright."""
    is_grey: bool


def _head(pillow: Any, path: Path) -> _Head:
    if path.exists() and not path.is_file():
        # A pipe would wait for whoever writes to it.
        raise ValueError("no regular file")
    with pillow.Image.open(path, formats=_formats(pillow)) as picture:
        width, height = picture.size
        # Of a PNG without it Pillow would decode all, to look behind the image.
        has_exif = picture.format != "PNG" or "exif" in picture.info
        if has_exif and picture.getexif().get(_ORIENTATION, 1) > 4:
            width, height = height, width
        return _Head((height, width), _is_grey(picture.mode))


def _is_grey(mode: str) -> bool:
    return mode in _GREY or mode.startswith("I;16")


def _plain(pillow: Any, picture: Any) -> Any:
    """A picture of 8 bits without transparency: on white, as a browser shows it."""
    mode = picture.mode
    if mode == "I" or mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values from {values.min()} to {values.max()}, where 16 bits hold 0 to 65535")
        return pillow.Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if mode == "F":
        raise ValueError("floating values, of which nothing says what is black and what is white")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return pillow.Image.alpha_composite(pillow.Image.new("RGBA", picture.size, "white"), picture)
    return picture


def _one_size(paths: Sequence[Path], sizes: Sequence[tuple[int, int]], source: str) -> tuple[int, int]:
    counts: dict[tuple[int, int], list[Path]] = {}
    for path, size in zip(paths, sizes, strict=True):
        counts.setdefault(size, []).append(path)
    if len(counts) == 1:
        return sizes[0]
    common = sorted(counts.items(), key=lambda entry: -len(entry[1]))
    listed = "; ".join(f"{h}x{w}: {len(p)}, such as {p[0].name}" for (h, w), p in common[:3])
    more = f"; and {len(common) - 3} more sizes" if len(common) > 3 else ""
    raise ValueError(
        f"{source}: expected images of one size (height x width), found {listed}{more}; pass size=64, say, to "
        "scale and crop them"
    )


def _each(
    items: Sequence[Any],
    read: Callable[[Any], Any],
    what: str,
    progress: bool,
    name: Callable[[Any], Path] = lambda item: item,
) -> list[Any]:
    """``read`` of each item, by several threads; ValueError that names those whose files cannot be read."""
    found: list[Any] = []
    bad: list[tuple[Path, str]] = []
    with bar_of(len(items), what, "image", progress, delay=1) as bar:
        for item, future in _in_order(items, read):
            try:
                found.append(future.result())
            except MemoryError:
                raise
            except Exception as error:  # a damaged file can raise anything, from SyntaxError to zlib.error
                bad.append((name(item), " ".join(str(error).split()) or type(error).__name__))
            bar.update(1)
    if not bad:
        return found
    path, why = bad[0]
    message = f"{path}: expected a picture that Pillow can read, found a damaged or foreign file ({why})"
    if len(bad) > 1:
        names = ", ".join(str(path) for path, _ in bad[1:_NAMED])
        rest = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        message += f"; {len(bad)} of {len(items)} files are bad, also {names}{rest}"
    raise ValueError(message)


def _in_order(items: Sequence[Any], read: Callable[[Any], Any]) -> Iterator[tuple[Any, Future[Any]]]:
    """Decoders leave Python's lock to others."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        futures = [pool.submit(read, item) for item in items]
        yield from zip(items, futures, strict=True)
    finally:
        # After an error or Ctrl-C nobody waits for the rest.
        pool.shutdown(cancel_futures=True)


def _formats(pillow: Any) -> list[str]:
    """Those of ``_FORMATS`` that this Pillow was built with."""
    return [name for name in _FORMATS if name in pillow.Image.OPEN]


def _pillow() -> Any:
    try:
        package = importlib.import_module("PIL")
        for name in ("Image", "ImageOps"):
            importlib.import_module(f"PIL.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(f"load: pictures need Pillow; {to_mend('pillow')}") from error
    package.Image.init()
    return package


def _raise(error: OSError) -> None:
    raise error

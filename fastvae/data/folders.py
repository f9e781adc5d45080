"""Folders of pictures: subfolders are labels, or the training and the test part."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastvae.data.images import ImageDataset
from fastvae.data.pictures import pictures_below, read_pictures

__all__ = ["load_pictures"]

_PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_PARTS |= dict.fromkeys(("val", "valid", "validation"), "validation")


def load_pictures(
    folder: Path,
    split: str,
    size: tuple[int, int] | None,
    channels: int | None,
    labelled: bool,
    most: int,
    progress: bool,
) -> tuple[ImageDataset, bool]:
    """The pictures of a folder, and whether they are ``split`` already: what is left is to be split at random.

    The arguments are those of ``fastvae.data.load``. ValueError for a folder without pictures, for files that cannot be
    read, and where only some pictures are in subfolders.
    """
    paths = pictures_below(folder)
    if not paths:
        raise ValueError(
            f"{folder}: expected pictures (PNG, JPEG, ...), IDX files or one .npz file, found {_entries(folder)}"
        )
    parts = _parts(folder, paths)
    depth = 1 if parts else 0
    classes = _classes(folder, paths, depth) if labelled else None
    if len(parts) > 1 and split != "all":
        # Where nothing is called a test part, the validation part is one.
        wanted = split if split in parts else "validation"
        if wanted not in parts:
            raise FileNotFoundError(
                f"{folder}: expected a subfolder for split={split!r}, found {', '.join(sorted(parts))}"
            )
        paths = parts[wanted]
    elif len(parts) > 1:
        paths = [path for name in ("train", "validation", "test") for path in parts.get(name, ())]
    images = read_pictures(paths, str(folder), size, channels, most, progress)
    labels = None
    if classes is not None:
        number = {name: index for index, name in enumerate(classes)}
        labels = torch.tensor([number[_words(folder, path)[depth]] for path in paths], device="cpu")
    names = tuple(path.relative_to(folder).as_posix() for path in paths)
    found = ImageDataset(torch.from_numpy(images), labels, str(folder), classes=classes, files=names)
    return found, len(parts) > 1 and split != "all"


def _parts(folder: Path, paths: list[Path]) -> dict[str, list[Path]]:
    """Pictures by part, where all are in subfolders that are called "train", "test" and the like; else none."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        words = _words(folder, path)
        part = _PARTS.get(words[0].lower()) if len(words) > 1 else None
        if part is None:
            return {}
        found.setdefault(part, []).append(path)
    # Several names of one part, or no training part: these are labels.
    names = {_words(folder, path)[0] for path in paths}
    return found if "train" in found and len(names) == len(found) else {}


def _classes(folder: Path, paths: list[Path], depth: int) -> tuple[str, ...] | None:
    """The names of the subfolders below ``depth`` others, in order; None where there are none."""
    outside = [path for path in paths if len(_words(folder, path)) == depth + 1]
    inside = {_words(folder, path)[depth] for path in paths if len(_words(folder, path)) > depth + 1}
    if inside and outside:
        raise ValueError(
            f"{folder}: expected all pictures in subfolders, which are their labels, or none, found {outside[0].name} "
            f"({len(outside)} such) beside the subfolder {min(inside)}; move them, or pass labels=None to take all "
            "without labels"
        )
    # 2 before 10.
    ordered = sorted(
        inside,
        key=lambda name: [
            (not w.isdigit(), int(w) if w.isdigit() else 0, w) for w in re.split(r"(\d+)", name)
        ],
    )
    return tuple(ordered) or None


def _words(folder: Path, path: Path) -> tuple[str, ...]:
    return path.relative_to(folder).parts


def _entries(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more

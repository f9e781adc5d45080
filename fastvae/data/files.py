"""``load``: images from whatever holds them. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastvae._distribution import to_mend
from fastvae.arguments import expect, expect_numbers, is_integer
from fastvae.data.folders import load_pictures
from fastvae.data.images import ImageDataset
from fastvae.data.pictures import SUFFIXES, read_pictures
from fastvae.data.sources import fitted, from_array, from_dataset, is_dataset
from fastvae.data.unpacking import read_idx, read_npy, read_npz

__all__ = ["load"]

_Array = np.ndarray[Any, Any]
_IDX_NAME = re.compile(r"(?:(?P<prefix>.+)[-_.])?images[-.]idx[34]-ubyte(?:\.gz)?")
_ROLES = {"train": "train", "t10k": "test", "test": "test"}


def load(
    source: Any = "digits",
    *,
    split: Literal["train", "test", "all"] = "train",
    test_fraction: float = 0.1,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    channels: Literal[1, 3] | None = None,
    labels: Any = "auto",
    max_unpacked: int = 2**32,
    progress: bool = True,
) -> ImageDataset:
    """Load images: a folder of pictures, arrays, a data set, IDX, ``.npy`` or ``.npz`` files, or scikit-learn's digits.

    Args:
        source: one of

            - a folder with pictures (PNG, JPEG, GIF, BMP, TIFF, WebP, ...; by Pillow), its subfolders included. The
              first subfolder on the way to a picture is its label. Subfolders ``train`` and ``test`` (or ``val``) are
              the two parts, with labels below them. Other files are left out; so is what begins with a dot. A picture
              is turned as its EXIF data say, shown on white where it is transparent, and scaled from 16 bits to 8; of
              one that moves, the first frame is taken. One picture alone is a source, too.
            - an array or tensor [N, H, W] or [N, C, H, W]: uint8, or floating in [0, 1] (kept in 255 steps);
            - a data set, with ``len`` and samples by number that are images or (image, label), as torchvision's, or
              mappings with "image" (or "img", "data", "pixel_values") and "label": of Pillow, or [C, H, W] as above.
              It is read once, whole;
            - a folder with IDX files (``train-images-idx3-ubyte``, ``t10k-images-idx3-ubyte``, their ``labels-idx1``
              twins; gzipped or not; other prefixes too), or with one ``.npz``; an ``.npz`` with ``images`` and, if
              wanted, ``labels``; an ``.npy``: arrays as above, of which none is unpickled;
            - ``"digits"``: 1,797 images 1x8x8 of scikit-learn, values 0..16 scaled to 0..255;
            - None: what the environment variable FASTVAE_DATA names, or ``"digits"`` where it is not set.

            A path that does not exist is looked for in the folder FASTVAE_DATA, with and without ``.npz``.
        split: IDX folders, and folders with ``train`` and ``test``, keep their own parts. Sources without a split of
            their own are split at random by ``seed`` and the number of images; ``"all"`` is everything, in the order of
            the source (files by name; training part first).
        test_fraction: share of images in the random test part; 0.1 makes 9,000/1,000 of 10,000.
        seed: of the random split.
        size: side, or (height, width), that images are scaled to cover and then cropped to, around their centre. None:
            as they are, which must be of one size.
        channels: 1 for grey, 3 for colour. None: as they are; of pictures, colour unless all of them are grey.
        labels: of an array, integers or strings [N]. "auto": those of the source, if it has any; None: without.
            Strings are numbered in their order and become ``classes``; of a data set, labels of another kind are left
            out.
        max_unpacked: bytes that a compressed array, or all pictures, may unpack to, 4 GiB unless given. What is not
            compressed has no limit but the size of its file.
        progress: show a bar on a terminal, where it takes long.

    Returns:
        :class:`ImageDataset`, with ``classes`` and ``files`` where the source has them.

    Raises:
        ValueError: a damaged or unsuitable file (its name, what was expected, what was found), or arguments.
        FileNotFoundError: no such source, or a folder without this split.
        ImportError: ``"digits"`` without scikit-learn, pictures without Pillow.
    """
    expect(split in ("train", "test", "all"), 'load: split: expected "train", "test" or "all"', repr(split))
    expect_numbers("load", test_fraction=test_fraction, seed=seed)
    expect(
        0.0 < test_fraction < 1.0,
        "load: test_fraction: expected a number between 0 and 1",
        repr(test_fraction),
    )
    if isinstance(max_unpacked, bool) or not isinstance(max_unpacked, int) or max_unpacked < 0:
        raise ValueError(f"load: max_unpacked: expected a number of bytes, got {max_unpacked!r}")
    shape = _checked_size(size)
    expect(channels in (None, 1, 3), "load: channels: expected 1, 3 or None", repr(channels))
    auto = isinstance(labels, str) and labels == "auto"
    is_array = isinstance(source, (Tensor, np.ndarray))
    if not (auto or labels is None or is_array):
        raise ValueError(
            "load: labels: expected labels with an array of images; other sources bring their own"
        )
    if source is None:
        source = os.environ.get("FASTVAE_DATA") or "digits"
    is_split = False
    if is_array:
        whole = from_array(source, None if auto else labels, "array")
    elif isinstance(source, ImageDataset):
        whole = source
    elif not isinstance(source, (str, os.PathLike)):
        expect(
            is_dataset(source),
            "load: source: expected a path, an array, a tensor or a data set with len() and samples by number",
            type(source).__name__,
            TypeError,
        )
        whole = from_dataset(source, shape, channels, labels is not None, max_unpacked, progress)
    elif source == "digits":
        whole = _load_digits()
    else:
        path = _find(source)
        options = shape, channels, labels is not None, max_unpacked, progress
        whole, is_split = _load_path(path, split, *options)
    whole = fitted(whole, shape, channels, progress)
    if labels is None and whole.labels is not None:
        whole = ImageDataset(whole.images, None, whole.name, files=whole.files)
    if split == "all" or is_split:
        return whole
    test_size = min(max(round(test_fraction * len(whole)), 1), len(whole) - 1)
    if test_size < 1:
        raise ValueError(
            f'{whole.name}: a single image cannot be split, got split={split!r}; use split="all"'
        )
    train, test = whole.split(len(whole) - test_size, test_size, seed=seed)
    return train if split == "train" else test


def _checked_size(size: Any) -> tuple[int, int] | None:
    """(height, width)."""
    if size is None:
        return None
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    expect(
        len(sides) == 2 and all(is_integer(side) and 1 <= side <= 2**14 for side in sides),
        "load: size: expected an int of at least 1, or (height, width)",
        repr(size),
    )
    return int(sides[0]), int(sides[1])


def _load_path(
    path: Path,
    split: str,
    size: tuple[int, int] | None,
    channels: int | None,
    labelled: bool,
    max_unpacked: int,
    progress: bool,
) -> tuple[ImageDataset, bool]:
    """What a path holds, and whether that is of this split already."""
    if not path.is_dir():
        if path.suffix.lower() in SUFFIXES:
            images = read_pictures([path], str(path), size, channels, max_unpacked, progress)
            return ImageDataset(torch.from_numpy(images), None, str(path), files=(path.name,)), False
        if path.suffix.lower() == ".npy":
            return from_array(read_npy(path), None, str(path)), False
        return _load_npz(path, max_unpacked), False
    files = _idx_files(path)
    if "train" in files or "test" in files:
        return _load_idx_parts(path, files, split, max_unpacked), True
    if files:
        return _load_idx(files["all"], max_unpacked), False
    archives = sorted(path.glob("*.npz"))
    if len(archives) == 1:
        return _load_npz(archives[0], max_unpacked), False
    if archives:
        raise ValueError(
            f"{path}: expected one .npz file, found {', '.join(entry.name for entry in archives)}"
        )
    return load_pictures(path, split, size, channels, labelled, max_unpacked, progress)


def _find(source: str | os.PathLike[str]) -> Path:
    path = Path(source).expanduser()
    folder = os.environ.get("FASTVAE_DATA")
    candidates = [path]
    if folder:
        candidates += [Path(folder) / path, Path(folder) / f"{path}.npz"]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise FileNotFoundError(
        'load: source: expected "digits", a folder of pictures or IDX files, or an .npy or .npz file, got '
        f"{os.fspath(source)!r}; "
        f"no such file: {', '.join(map(str, candidates))}" + ("" if folder else " (FASTVAE_DATA is not set)")
    )


def _load_digits() -> ImageDataset:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ImportError(
            f'load: source "digits" needs scikit-learn; {to_mend("scikit-learn", "demo")}'
        ) from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return ImageDataset(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(digits.target), "digits")


def _idx_files(folder: Path) -> dict[str, Path]:
    """The images files of a folder by role: "train" and "test" by their prefix, or one "all"."""
    found: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for path in sorted(folder.iterdir()):
        match = _IDX_NAME.fullmatch(path.name)
        # Sorted, a file comes before its gzipped copy: the plain one is read.
        if match is None or path.name.removesuffix(".gz") in seen or not path.is_file():
            continue
        seen.add(path.name)
        last_word = re.split("[-_.]", match["prefix"] or "")[-1]
        found.setdefault(_ROLES.get(last_word, "all"), []).append(path)
    if any(len(paths) > 1 for paths in found.values()) or ("all" in found and len(found) > 1):
        names = ", ".join(path.name for paths in found.values() for path in paths)
        raise ValueError(f"{folder}: expected one images file for each of training and test, found {names}")
    return {role: paths[0] for role, paths in found.items()}


def _load_idx_parts(folder: Path, files: dict[str, Path], split: str, max_unpacked: int) -> ImageDataset:
    if split != "all":
        if split not in files:
            names = ", ".join(path.name for path in files.values())
            raise FileNotFoundError(f"{folder}: expected an images file for split={split!r}, found {names}")
        return _load_idx(files[split], max_unpacked)
    parts = [_load_idx(files[role], max_unpacked) for role in ("train", "test") if role in files]
    if len({part.images.shape[1:] for part in parts}) > 1 or len({part.labels is None for part in parts}) > 1:
        raise ValueError(f"{folder}: expected images of one shape, all or none labelled, found {parts}")
    images = torch.cat([part.images for part in parts])
    labels = [part.labels for part in parts if part.labels is not None]
    return ImageDataset(images, torch.cat(labels) if labels else None, str(folder))


def _load_idx(path: Path, max_unpacked: int) -> ImageDataset:
    images = read_idx(path, (3, 4), max_unpacked)
    base = re.sub(r"images([-.])idx[34]", r"labels\1idx1", path.name.removesuffix(".gz"))
    twins = [path.with_name(base), path.with_name(base + ".gz")]
    labels_path = next((twin for twin in twins if twin.is_file()), None)
    labels = None if labels_path is None else read_idx(labels_path, (1,), max_unpacked)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{labels_path}: expected {len(images)} labels, one an image, found {len(labels)}")
    return from_array(images, labels, str(path))


def _load_npz(file: Path, max_unpacked: int) -> ImageDataset:
    arrays = read_npz(file, ("images", "labels"), max_unpacked)
    return from_array(arrays["images"], arrays.get("labels"), str(file))

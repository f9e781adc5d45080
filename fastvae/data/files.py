"""Images from scikit-learn's digits, IDX files and ``.npz`` files. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastvae._distribution import to_mend
from fastvae.arguments import expect_numbers
from fastvae.data.images import ImageDataset
from fastvae.data.unpacking import read_idx, read_npz

__all__ = ["load"]

_Array = np.ndarray[Any, Any]
_IDX_NAME = re.compile(r"(?:(?P<prefix>.+)[-_.])?images[-.]idx[34]-ubyte(?:\.gz)?")
_ROLES = {"train": "train", "t10k": "test", "test": "test"}


def load(
    source: str | os.PathLike[str] | None = "digits",
    *,
    split: Literal["train", "test", "all"] = "train",
    test_fraction: float = 0.1,
    seed: int = 0,
    max_unpacked: int = 2**32,
) -> ImageDataset:
    """Load images from scikit-learn, a folder of IDX files or an ``.npz`` file.

    Args:
        source: ``"digits"`` (1,797 images 1x8x8 of scikit-learn, values 0..16 scaled to 0..255); a folder
            with IDX files (``train-images-idx3-ubyte``, ``t10k-images-idx3-ubyte``, their ``labels-idx1``
            twins; gzipped or not; other prefixes too), or with one ``.npz``; an ``.npz`` with ``images``
            (uint8 [N, H, W] or [N, C, H, W]) and, if wanted, ``labels`` (integers [N]). A path that does not
            exist is looked for in the folder named by the environment variable FASTVAE_DATA, with and
            without ``.npz``. None: FASTVAE_DATA itself, or ``"digits"`` where it is not set.
        split: IDX folders keep their own training and test files. Sources without a split of their own are
            split at random by ``seed``; ``"all"`` is everything, in file order (training files first).
        test_fraction: share of images in the random test part; 0.1 makes 9,000/1,000 of 10,000.
        seed: of the random split.
        max_unpacked: bytes that a compressed array may unpack to, 4 GiB unless given. What is not compressed has no
            limit but the size of its file.

    Returns:
        :class:`ImageDataset`.

    Raises:
        ValueError: a damaged or unsuitable file (its name, what was expected, what was found), or arguments.
        FileNotFoundError: no such source, or an IDX folder without this split.
        ImportError: ``"digits"`` without scikit-learn.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f'load: split: expected "train", "test" or "all", got {split!r}')
    expect_numbers("load", test_fraction=test_fraction, seed=seed)
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"load: test_fraction: expected a number between 0 and 1, got {test_fraction!r}")
    if isinstance(max_unpacked, bool) or not isinstance(max_unpacked, int) or max_unpacked < 0:
        raise ValueError(f"load: max_unpacked: expected a number of bytes, got {max_unpacked!r}")
    if source is None:
        source = os.environ.get("FASTVAE_DATA") or "digits"
    if source == "digits":
        whole = _load_digits()
    else:
        path = _find(source)
        files = _idx_files(path) if path.is_dir() else {}
        if "train" in files or "test" in files:
            return _load_idx_parts(path, files, split, max_unpacked)
        if files:
            whole = _load_idx(files["all"], max_unpacked)
        else:
            file = _only_npz(path) if path.is_dir() else path
            arrays = read_npz(file, ("images", "labels"), max_unpacked)
            whole = _from_arrays(arrays["images"], arrays.get("labels"), file)
    if split == "all":
        return whole
    test_size = min(max(round(test_fraction * len(whole)), 1), len(whole) - 1)
    if test_size < 1:
        raise ValueError(
            f'{whole.name}: a single image cannot be split, got split={split!r}; use split="all"'
        )
    train, test = whole.split(len(whole) - test_size, test_size, seed=seed)
    return train if split == "train" else test


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
        f'load: source: expected "digits", a folder of IDX files or an .npz file, got {os.fspath(source)!r}; '
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
    return _from_arrays(images, labels, path)


def _only_npz(folder: Path) -> Path:
    found = sorted(folder.glob("*.npz"))
    if len(found) != 1:
        entries = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder}: expected IDX files or one .npz file, found {entries}")
    return found[0]


def _from_arrays(images: _Array, labels: _Array | None, path: Path) -> ImageDataset:
    found = f"found {images.dtype} {list(images.shape)}"
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"{path}: expected images as uint8 [N, H, W] or [N, C, H, W], {found}")
    if images.ndim == 4 and images.shape[3] <= 4 < images.shape[1]:
        raise ValueError(f"{path}: expected images with channels first, [N, C, H, W], {found}")
    if labels is not None and labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected labels as integers, found {labels.dtype} {list(labels.shape)}")
    return ImageDataset(
        torch.from_numpy(images if images.ndim == 4 else images[:, None]),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        str(path),
    )

"""Image data sets for training: scikit-learn's digits, IDX files, ``.npz`` files; dynamic binarisation.

Nothing is downloaded. DATA.md says where the usual files come from and under which licence.
"""

from __future__ import annotations

import gzip
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

__all__ = ["ImageDataset", "binarize", "collate_binarized", "images_of", "load"]

_Array = np.ndarray[Any, Any]
_IDX_NAME = re.compile(r"(?:(?P<prefix>.+)[-_.])?images[-.]idx[34]-ubyte(?:\.gz)?")
_ROLES = {"train": "train", "t10k": "test", "test": "test"}


class ImageDataset(Dataset[tuple[Any, ...]]):
    """Images held in memory as bytes.

    Item ``i`` is ``(image, label)``: image float32 [C, H, W] in [0, 1], label an int. Without labels it is
    ``(image,)``, as with ``torch.utils.data.TensorDataset``.

    Attributes:
        images: uint8 [N, C, H, W]; anything else, or N = 0, is a ValueError.
        labels: int64 [N], or None.
        name: where the images come from.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, name: str = "images") -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.numel() == 0:
            raise ValueError(
                f"{name}: expected images as uint8 [N, C, H, W] with at least one image, "
                f"got {images.dtype} {list(images.shape)}"
            )
        if labels is not None:
            if labels.is_floating_point() or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{name}: expected labels as integers [{images.shape[0]}], one an image, "
                    f"got {labels.dtype} {list(labels.shape)}"
                )
            labels = labels.to(torch.int64)
        self.images = images
        self.labels = labels
        self.name = name

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = self.images[index].to(torch.float32).div_(255)
        return (image,) if self.labels is None else (image, int(self.labels[index]))

    def __repr__(self) -> str:
        count, *shape = self.images.shape
        labels = "no labels" if self.labels is None else f"{self.labels.unique().numel()} labels"
        return f"ImageDataset({self.name!r}, {count} images of {'x'.join(map(str, shape))}, {labels})"

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """All images as float32 [N, C, H, W] in [0, 1], and the labels int64 [N] or None."""
        return self.images.to(torch.float32).div_(255), self.labels

    def subset(self, indices: Tensor | Sequence[int]) -> ImageDataset:
        """The images at ``indices`` (integers [M]), in that order, as a data set of its own."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ImageDataset(
            self.images[chosen], None if self.labels is None else self.labels[chosen], self.name
        )

    def split(self, *sizes: int, seed: int = 0) -> tuple[ImageDataset, ...]:
        """Disjoint random parts of the given sizes; ``split(9000, 1000)`` of 10,000 images leaves none out.

        The parts depend on ``seed`` and the number of images only, not on torch's global generator. Sizes
        below 1, or more images than there are, raise ValueError.
        """
        if not sizes or min(sizes) < 1 or sum(sizes) > len(self):
            raise ValueError(
                f"ImageDataset.split: expected sizes of at least 1 that sum to at most {len(self)} "
                f"(the images of {self.name}), got {sizes}"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return tuple(self.subset(part) for part in order[: sum(sizes)].split(list(sizes)))


def load(
    source: str | os.PathLike[str] | None = "digits",
    *,
    split: Literal["train", "test", "all"] = "train",
    test_fraction: float = 0.1,
    seed: int = 0,
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

    Returns:
        :class:`ImageDataset`.

    Raises:
        ValueError: a damaged or unsuitable file (its name, what was expected, what was found), or arguments.
        FileNotFoundError: no such source, or an IDX folder without this split.
        ImportError: ``"digits"`` without scikit-learn.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f'load: split: expected "train", "test" or "all", got {split!r}')
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"load: test_fraction: expected a number between 0 and 1, got {test_fraction!r}")
    if source is None:
        source = os.environ.get("FASTVAE_DATA") or "digits"
    if source == "digits":
        whole = _load_digits()
    else:
        path = _find(source)
        files = _idx_files(path) if path.is_dir() else {}
        if "train" in files or "test" in files:
            return _load_idx_parts(path, files, split)
        whole = _load_idx(files["all"]) if files else _load_npz(_only_npz(path) if path.is_dir() else path)
    if split == "all":
        return whole
    test_size = min(max(round(test_fraction * len(whole)), 1), len(whole) - 1)
    if test_size < 1:
        raise ValueError(
            f'{whole.name}: a single image cannot be split, got split={split!r}; use split="all"'
        )
    train, test = whole.split(len(whole) - test_size, test_size, seed=seed)
    return train if split == "train" else test


def binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Dynamic binarisation: each pixel is 1 with probability its value, drawn anew at each call.

    As in Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, section 5.

    Args:
        x: floating point, any shape, values in [0, 1]. The range is checked on the CPU only: elsewhere the
            check would stop the device's queue, and values outside clamp to probability 0 or 1.
        generator: of x's device; None draws from torch's global one.

    Returns:
        Tensor like ``x`` with values 0 and 1. ValueError unless floating point and (CPU) within [0, 1].
    """
    if not x.is_floating_point():
        raise ValueError(
            f"binarize: x: expected floating point values in [0, 1], got {x.dtype}; divide by 255?"
        )
    if x.device.type == "cpu" and not bool(((x >= 0) & (x <= 1)).all()):
        found = f"{float(x.min()):.6g} to {float(x.max()):.6g}"
        raise ValueError(f"binarize: x: expected values in [0, 1], got {found}")
    # Single precision at least: bfloat16 draws take 256 values and would bias every probability.
    noise_dtype = torch.promote_types(x.dtype, torch.float32)
    noise = torch.rand(x.shape, dtype=noise_dtype, device=x.device, generator=generator)
    return (noise < x).to(x.dtype)


def collate_binarized(samples: list[Any]) -> Any:
    """A DataLoader's ``collate_fn``: the default collation, then :func:`binarize` of the images.

    The noise comes from torch's global generator of the process that collates. DataLoader seeds its workers
    from the main process at every epoch (with ``persistent_workers`` only once), so ``torch.manual_seed`` or
    the ``seed`` of ``fit`` repeats the batches, and each epoch still sees fresh noise.
    """
    batch = default_collate(samples)
    binary = binarize(images_of(batch))
    if isinstance(batch, Tensor):
        return binary
    if isinstance(batch, Mapping):
        return {**batch, "data": binary}
    return [binary, *batch[1:]]


def images_of(batch: Any) -> Tensor:
    """The images of a loader's batch: a tensor, the first entry of a tuple or list, or ``batch["data"]``.

    TypeError for anything else; the message says what the batch is made of.
    """
    if isinstance(batch, Tensor):
        return batch
    found = type(batch).__name__
    if isinstance(batch, Mapping):
        data = batch.get("data")
        if isinstance(data, Tensor):
            return data
        found += " with keys " + ", ".join(f"{k!r} ({type(v).__name__})" for k, v in batch.items())
    elif isinstance(batch, (tuple, list)):
        if batch and isinstance(batch[0], Tensor):
            return batch[0]
        found += " of " + (", ".join(type(v).__name__ for v in batch[:4]) or "nothing")
    raise TypeError(
        "images_of: batch: expected a tensor, a tuple or list whose first entry is a tensor, "
        f'or a mapping with a tensor "data"; got {found}'
    )


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
            'load: source "digits" needs scikit-learn; to mend it: pip install "fastvae[demo]"'
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


def _load_idx_parts(folder: Path, files: dict[str, Path], split: str) -> ImageDataset:
    if split != "all":
        if split not in files:
            names = ", ".join(path.name for path in files.values())
            raise FileNotFoundError(f"{folder}: expected an images file for split={split!r}, found {names}")
        return _load_idx(files[split])
    parts = [_load_idx(files[role]) for role in ("train", "test") if role in files]
    if len({part.images.shape[1:] for part in parts}) > 1 or len({part.labels is None for part in parts}) > 1:
        raise ValueError(f"{folder}: expected images of one shape, all or none labelled, found {parts}")
    images = torch.cat([part.images for part in parts])
    labels = [part.labels for part in parts if part.labels is not None]
    return ImageDataset(images, torch.cat(labels) if labels else None, str(folder))


def _load_idx(path: Path) -> ImageDataset:
    images = _read_idx(path, (3, 4))
    base = re.sub(r"images([-.])idx[34]", r"labels\1idx1", path.name.removesuffix(".gz"))
    twins = [path.with_name(base), path.with_name(base + ".gz")]
    labels_path = next((twin for twin in twins if twin.is_file()), None)
    labels = None if labels_path is None else _read_idx(labels_path, (1,))
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{labels_path}: expected {len(images)} labels, one an image, found {len(labels)}")
    return _from_arrays(images, labels, path)


def _read_idx(path: Path, ranks: tuple[int, ...]) -> _Array:
    """One IDX file of bytes: 00 00 08 rank, the sizes as big-endian uint32, the values."""
    data = path.read_bytes()
    # By content: browsers and servers gunzip silently and keep the name, or the other way round.
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, found a damaged one ({error})") from error
    magics = [bytes((0, 0, 8, rank)) for rank in ranks]
    if data[:4] not in magics:
        expected = " or ".join(magic.hex(" ") for magic in magics)
        found = data[:4].hex(" ") or "nothing"
        raise ValueError(f"{path}: expected an IDX file of bytes (magic {expected}), found {found}")
    rank = data[3]
    header = 4 + 4 * rank
    if len(data) < header:
        raise ValueError(f"{path}: expected an IDX header of {header} bytes, found {len(data)} bytes")
    shape = struct.unpack(f">{rank}I", data[4:header])
    expected_bytes = header + int(np.prod(shape, dtype=object))
    if len(data) != expected_bytes:
        raise ValueError(
            f"{path}: expected {expected_bytes} bytes for shape {list(shape)}, found {len(data)}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _only_npz(folder: Path) -> Path:
    found = sorted(folder.glob("*.npz"))
    if len(found) != 1:
        entries = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder}: expected IDX files or one .npz file, found {entries}")
    return found[0]


def _load_npz(path: Path) -> ImageDataset:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected an .npz file, found another kind of file or a truncated one")
    arrays: dict[str, _Array] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = sorted(archive.files)
            for key in ("images", "labels"):
                if key in keys:
                    arrays[key] = archive[key]
    except (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected plain arrays, found an unreadable entry ({error})") from error
    if "images" not in arrays:
        raise ValueError(f"{path}: expected the key images (and labels), found {', '.join(keys) or 'none'}")
    return _from_arrays(arrays["images"], arrays.get("labels"), path)


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

"""Arrays and data sets in memory, as bytes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from fastvae.arguments import is_integer
from fastvae.data.images import ImageDataset
from fastvae.data.pictures import bytes_of
from fastvae.progress import bar_of

__all__ = ["as_bytes", "fitted", "from_array", "from_dataset", "is_dataset", "numbered"]

_Array = np.ndarray[Any, Any]
_KEYS = ("image", "img", "data", "pixel_values"), ("label", "labels", "target", "fine_label")
"""Of image and label in samples that are mappings, as those of Hugging Face's data sets."""


def is_dataset(source: object) -> bool:
    """Whether it has samples by number, as torchvision's data sets have."""
    return (
        hasattr(source, "__len__")
        and hasattr(source, "__getitem__")
        and not isinstance(source, (str, bytes, dict))
    )


def as_bytes(values: _Array, name: str) -> _Array:
    """Images as uint8: bytes as they are, floats in [0, 1] in 255 steps, False and True as black and white.

    ValueError for anything else.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind != "f":
        raise ValueError(f"{name}: expected images as uint8, or floating in [0, 1], found {values.dtype}")
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = values.size - int(np.isfinite(values).sum())
        raise ValueError(
            f"{name}: expected floating images with values in [0, 1], found {bad} of {values.size} that are NaN or "
            "infinite"
        )
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ValueError(
            f"{name}: expected floating images with values in [0, 1], found {low:.6g} to {high:.6g}; divide by "
            "255, or leave out what normalises them"
        )
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def from_array(source: _Array | Tensor, labels: Any, name: str) -> ImageDataset:
    """Images [N, H, W] or [N, C, H, W]; see ``as_bytes``.

    ValueError for others, or labels that are neither integers nor strings [N].
    """
    values = _numpy(source, name)
    found = f"found {values.dtype} {list(values.shape)}"
    if values.ndim not in (3, 4):
        remedy = "; fastvae.data.load_table takes tables" if values.ndim == 2 else ""
        raise ValueError(f"{name}: expected images as uint8 [N, H, W] or [N, C, H, W], {found}{remedy}")
    if values.ndim == 4 and values.shape[3] <= 4 < values.shape[1]:
        raise ValueError(
            f"{name}: expected images with channels first, [N, C, H, W], {found}; pass images.transpose(0, 3, 1, 2) "
            "(a tensor: permute)"
        )
    numbers, classes = (None, None) if labels is None else numbered(labels, name)
    images = torch.from_numpy(as_bytes(values, name))
    return ImageDataset(images if images.dim() == 4 else images[:, None], numbers, name, classes=classes)


def from_dataset(
    source: Any, size: tuple[int, int] | None, channels: int | None, labelled: bool, most: int, progress: bool
) -> ImageDataset:
    """Everything in a data set of images, or of (image, label): Pillow's, tensors or arrays [C, H, W] or [H, W].

    Labels that are neither integers nor strings are left out. ValueError, with the number of the sample, for what is
    no image or does not have the others' shape.
    """
    name = type(source).__name__
    images: list[Tensor] = []
    labels: list[int | str | None] = []
    with bar_of(len(source), f"reading {name}", "image", progress, delay=1) as bar:
        for index in range(len(source)):
            image, label = _sample(source[index], f"{name}[{index}]")
            images.append(_one(image, size, channels, f"{name}[{index}]"))
            labels.append(label)
            if images[-1].shape != images[0].shape:
                raise ValueError(
                    f"{name}[{index}]: expected an image of {_shape(images[0])} like those before, found "
                    f"{_shape(images[-1])}; pass size=64, say, to scale and crop them, and channels=3 if some are grey"
                )
            if len(source) * images[0].numel() > most:
                raise ValueError(
                    f"{name}: {len(source)} images of {_shape(images[0])} are more than max_unpacked={most} bytes; "
                    "pass a smaller size, or a larger max_unpacked"
                )
            bar.update(1)
    if not images:
        raise ValueError(f"{name}: expected at least one image, found none")
    known = [label for label in labels if label is not None] if labelled else []
    if known and len(known) < len(labels):
        raise ValueError(
            f"{name}: expected a label for every image or for none, found {len(known)} for {len(labels)}"
        )
    numbers, classes = numbered(known, name) if known else (None, None)
    return ImageDataset(torch.stack(images), numbers, name, classes=classes or _classes_of(source, numbers))


def fitted(
    dataset: ImageDataset, size: tuple[int, int] | None, channels: int | None, progress: bool
) -> ImageDataset:
    """The data set in another size or with another number of channels; itself, if it has these."""
    wanted = (channels or dataset.images.shape[1], *(size or dataset.images.shape[2:]))
    if tuple(dataset.images.shape[1:]) == wanted:
        return dataset
    with bar_of(len(dataset), "scaling images", "image", progress, delay=1) as bar:
        changed = []
        for index, image in enumerate(dataset.images):
            changed.append(_one(image, size, channels, f"{dataset.name}[{index}]"))
            bar.update(1)
    return ImageDataset(
        torch.stack(changed), dataset.labels, dataset.name, classes=dataset.classes, files=dataset.files
    )


def numbered(labels: Any, name: str) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels as int64, and their names where they are strings."""
    values = np.asarray(_numpy(labels, name) if isinstance(labels, Tensor) else labels)
    if values.dtype.kind == "U":
        classes, numbers = np.unique(values, return_inverse=True)
        return torch.from_numpy(numbers.reshape(values.shape)), tuple(map(str, classes))
    if values.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected labels as integers or strings, found {values.dtype} {list(values.shape)}"
        )
    return torch.from_numpy(values.astype(np.int64)), None


def _classes_of(source: Any, numbers: Tensor | None) -> tuple[str, ...] | None:
    """The names that a data set has for its labels, itself or as a part of another."""
    classes = getattr(source, "classes", None)
    if classes is None and isinstance(source, Subset):
        return _classes_of(source.dataset, numbers)
    if not (isinstance(classes, Sequence) and all(isinstance(entry, str) for entry in classes)):
        return None
    is_named = numbers is not None and 0 <= int(numbers.min()) <= int(numbers.max()) < len(classes)
    return tuple(classes) if is_named else None


def _sample(sample: Any, name: str) -> tuple[Any, int | str | None]:
    """Image and label of a sample; None for a label that is neither an integer nor a string."""
    if isinstance(sample, Mapping):
        image, label = (next((sample[key] for key in keys if key in sample), None) for keys in _KEYS)
        if image is None:
            raise ValueError(
                f"{name}: expected an image, (image, label) or a mapping with {' or '.join(map(repr, _KEYS[0]))}, "
                f"found a mapping with {', '.join(map(str, sample))}"
            )
    elif not isinstance(sample, (tuple, list)):
        return sample, None
    elif not sample:
        raise ValueError(f"{name}: expected an image or (image, label), found nothing")
    else:
        image, label = sample[0], sample[1] if len(sample) > 1 else None
    if isinstance(label, (Tensor, np.ndarray)):
        # One that is drawn out, or one-hot, is none.
        label = label.item() if max(label.shape, default=1) == 1 and 0 not in label.shape else None
    return image, str(label) if isinstance(label, str) else int(label) if is_integer(label) else None


def _one(image: Any, size: tuple[int, int] | None, channels: int | None, name: str) -> Tensor:
    """An image as uint8 [C, H, W]."""
    if "PIL.Image" in sys.modules and isinstance(image, sys.modules["PIL.Image"].Image):
        return torch.from_numpy(bytes_of(image, size, channels).copy())
    if not isinstance(image, (Tensor, np.ndarray)):
        raise ValueError(
            f"{name}: expected an image of Pillow, a tensor or an array, found {type(image).__name__}"
        )
    values = as_bytes(_numpy(image, name), name)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"{name}: expected an image [C, H, W] or [H, W], found {list(values.shape)}")
    if values.shape[0] > 4 and values.shape[2] in (1, 3):
        raise ValueError(
            f"{name}: expected an image with channels first, [C, H, W], found {list(values.shape)}"
        )
    if channels in (None, len(values)) and size in (None, values.shape[1:]):
        return torch.from_numpy(np.ascontiguousarray(values))
    if len(values) not in (1, 3):
        raise ValueError(f"{name}: expected 1 or 3 channels to scale or to convert, found {len(values)}")
    from PIL import Image

    picture = Image.fromarray(
        np.ascontiguousarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))
    )
    return torch.from_numpy(bytes_of(picture, size, channels).copy())


def _numpy(values: _Array | Tensor, name: str) -> _Array:
    if isinstance(values, np.ma.MaskedArray) or (
        isinstance(values, Tensor) and values.layout != torch.strided
    ):
        kind = values.layout if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name}: expected a dense array or tensor, found {kind}")
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _shape(image: Tensor) -> str:
    return "x".join(map(str, image.shape))

"""Images in memory, their batches, and dynamic binarisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

__all__ = ["ImageDataset", "binarize", "collate_binarized", "condition_of", "images_of", "random_parts"]


class ImageDataset(Dataset[tuple[Any, ...]]):
    """Images held in memory as bytes.

    Item ``i`` is ``(image, label)``: image float32 [C, H, W] in [0, 1], label an int. Without labels it is
    ``(image,)``, as with ``torch.utils.data.TensorDataset``.

    Attributes:
        images: uint8 [N, C, H, W]; anything else, or N = 0, is a ValueError.
        labels: int64 [N], or None.
        name: where the images come from.
        classes: the names of the labels 0, 1, ..., or None.
        files: N names of files, relative to the folder that they were read from, or None.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        name: str = "images",
        *,
        classes: tuple[str, ...] | None = None,
        files: tuple[str, ...] | None = None,
    ) -> None:
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
        if files is not None and len(files) != len(images):
            raise ValueError(f"{name}: files: expected {len(images)} names, one an image, got {len(files)}")
        self.images = images
        self.labels = labels
        self.name = name
        self.classes = classes
        self.files = files

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = self.images[index].to(torch.float32).div_(255)
        return (image,) if self.labels is None else (image, int(self.labels[index]))

    def __repr__(self) -> str:
        count, *shape = self.images.shape
        labels = "no labels" if self.labels is None else f"{self.labels.unique().numel()} labels"
        return (
            f"{type(self).__name__}({self.name!r}, {count} images of {'x'.join(map(str, shape))}, {labels})"
        )

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """All images as float32 [N, C, H, W] in [0, 1], and the labels int64 [N] or None."""
        return self.images.to(torch.float32).div_(255), self.labels

    def subset(self, indices: Tensor | Sequence[int]) -> ImageDataset:
        """The images at ``indices`` (integers [M]), in that order, as a data set of its own."""
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        return ImageDataset(
            self.images[chosen],
            None if self.labels is None else self.labels[chosen],
            self.name,
            classes=self.classes,
            files=None if self.files is None else tuple(self.files[i] for i in chosen.tolist()),
        )

    def split(self, *sizes: int, seed: int = 0) -> tuple[ImageDataset, ...]:
        """Disjoint random parts of the given sizes; ``split(9000, 1000)`` of 10,000 images leaves none out.

        The parts depend on ``seed`` and the number of images only, not on torch's global generator. Sizes
        below 1, or more images than there are, raise ValueError.
        """
        return tuple(self.subset(part) for part in random_parts(self, "images", sizes, seed))


def random_parts(data: Any, noun: str, sizes: Sequence[int], seed: int) -> tuple[Tensor, ...]:
    """Disjoint random indices of so many samples each, by ``seed`` and the number of samples; see ``ImageDataset``."""
    if not sizes or min(sizes) < 1 or sum(sizes) > len(data):
        raise ValueError(
            f"{type(data).__name__}.split: expected sizes of at least 1 that sum to at most {len(data)} "
            f"(the {noun} of {data.name}), got {sizes}"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(int(seed)), device="cpu")
    return order[: sum(sizes)].split(list(sizes))


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
    slack = max(1e-6, 2 * torch.finfo(x.dtype).eps)  # what rounding puts beyond
    if x.device.type == "cpu" and not bool(((x >= -slack) & (x <= 1 + slack)).all()):
        found = f"{float(x.min()):.9g} to {float(x.max()):.9g}"
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


def condition_of(batch: Any, place: int | str | Callable[[Any], Tensor]) -> Tensor:
    """What a conditional model is given besides the images of a loader's batch.

    Args:
        batch: as of ``images_of``.
        place: its index in a tuple or list, its key in a mapping, or a function of the batch.

    Raises:
        TypeError: no tensor there.
    """
    return tensor_at(batch, place, "condition_of: batch")


def tensor_at(batch: Any, place: int | str | Callable[[Any], Tensor], owner: str) -> Tensor:
    """As ``condition_of``, with the ``owner`` whom errors name."""
    found: object = None
    if callable(place):
        found = place(batch)
    elif isinstance(batch, Mapping):
        found = batch.get(place)
    elif isinstance(batch, (tuple, list)) and isinstance(place, int) and -len(batch) <= place < len(batch):
        found = batch[place]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{owner}: expected a tensor at {place!r}, got {type(found).__name__} in a batch that is a "
            f"{type(batch).__name__}"
        )
    return found


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

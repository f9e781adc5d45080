"""The model and the images that a page looks at, and how many each section can afford."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastvae.arguments import expect, expect_positive, is_integer
from fastvae.data import ImageDataset, binarize
from fastvae.likelihoods import Bernoulli
from fastvae.metrics.posteriors import private_model
from fastvae.models import HVAE, BaseVAE, DivergenceError
from fastvae.models.inputs import needs_condition
from fastvae.training import History

__all__ = ["Foreign", "Subject", "resized"]

Foreign = Mapping[str, ImageDataset] | Sequence[ImageDataset] | ImageDataset | None

_MOST = {"train": 2000, "test": 500, "foreign": 200}
"""Images that a page looks at."""
_BUDGET = 3e11
"""Floating-point operations of a section, about: ten seconds of a laptop."""


@dataclass(frozen=True)
class Subject:
    """What a page is about. Images are float32 on the CPU, as the model takes them."""

    model: BaseVAE
    """A private copy in eval mode, without what training adds to a step."""
    train: Tensor
    """[N, C, H, W], chosen at random."""
    train_indices: Tensor
    """int64 [N] which they are of all training images."""
    train_labels: Tensor | None
    test: Tensor
    """[M, C, H, W], chosen at random."""
    test_labels: Tensor | None
    foreign: Mapping[str, Tensor]
    """[n, C, H, W] by name."""
    names: tuple[str, str]
    """Where training and test images come from."""
    sizes: tuple[int, int]
    """How many there are in all."""
    is_binarised: bool
    """Whether pixels were drawn from their grey values, once."""
    seed: int = 0
    effort: float = 1.0
    histories: Mapping[str, History] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    """Names of the labels."""
    command: str = ""

    @classmethod
    def of(
        cls,
        model: BaseVAE,
        train: ImageDataset,
        test: ImageDataset,
        *,
        foreign: Foreign = None,
        binarised: bool | None = None,
        seed: int = 0,
        effort: float = 1.0,
        **rest: Any,
    ) -> Subject:
        """Choose the images; see :func:`fastvae.report.write_report`."""
        expect_positive("write_report", effort=effort)
        expect(is_integer(seed), "write_report: seed: expected an int", repr(seed))
        private = private_model("write_report", model)
        if any(needs_condition(part) for part in (private.encoder, private.decoder)):
            raise ValueError("write_report: model: expected one without a condition, got a conditional model")
        if not all(bool(torch.isfinite(parameter).all()) for parameter in private.parameters()):
            raise ValueError("write_report: model: expected finite parameters, got NaN or infinite ones")
        generator = torch.Generator().manual_seed(seed)
        parts = {name: _chosen(name, part, generator) for name, part in (("train", train), ("test", test))}
        shapes = [images.shape[1:] for images, _, _ in parts.values()]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"write_report: test: expected images of {list(shapes[0])} as in train, got {list(shapes[1])}"
            )
        others = {
            name: resized(_chosen("foreign", part, generator)[0], shapes[0])
            for name, part in _named(foreign).items()
        }
        images = [parts["train"][0], parts["test"][0], *others.values()]
        is_grey = not all(bool(((each == 0) | (each == 1)).all()) for each in images)
        drawn = isinstance(private.likelihood, Bernoulli) and is_grey if binarised is None else binarised
        if drawn:
            images = [binarize(each, generator) for each in images]
        _check_model_takes(private, images[0][:2])
        return cls(
            private,
            images[0],
            parts["train"][2],
            parts["train"][1],
            images[1],
            parts["test"][1],
            dict(zip(others, images[2:], strict=True)),
            (train.name, test.name),
            (len(train), len(test)),
            drawn,
            seed,
            effort,
            classes=train.classes,
            **rest,
        )

    @property
    def shape(self) -> torch.Size:
        """[C, H, W] of an image."""
        return self.test.shape[1:]

    @property
    def is_binary(self) -> bool:
        """Whether all pixels are 0 or 1."""
        return bool(((self.test == 0) | (self.test == 1)).all())

    def label(self, number: int | Tensor) -> str:
        """The name of a label, in a few characters, or its number."""
        index = int(number)
        if self.classes is None or not 0 <= index < len(self.classes):
            return str(index)
        name = self.classes[index]
        return name if len(name) <= 6 else f"{name[:5]}…"

    def generator(self) -> torch.Generator:
        """A new one, always of the same numbers."""
        return torch.Generator().manual_seed(self.seed)

    def here(self, x: Tensor) -> Tensor:
        """On the model's device."""
        return x.to(next(self.model.parameters()).device)

    def afford(self, wanted: int, each: float, *, least: int = 1) -> int:
        """How many of what takes ``each`` floating-point operations: ``wanted`` unless the budget ends before."""
        budget, wanted = _BUDGET * self.effort, max(least, math.ceil(wanted * min(1.0, self.effort)))
        return max(least, min(wanted, int(budget / max(each, 1.0))))

    @cached_property
    def flops(self) -> tuple[float, float]:
        """Floating-point operations of encoding one image and of decoding one code."""
        found = []
        with torch.no_grad():
            x = self.here(self.test[:1])
            for run in (lambda: self.model.encode(x), lambda: self.model.decode(self.model.encode(x)[0])):
                with FlopCounterMode(display=False) as counter:
                    run()
                found.append(float(counter.get_total_flops()))
        return max(1.0, found[0]), max(1.0, found[1] - found[0])

    @property
    def flops_of_weight(self) -> float:
        """Of one importance weight: a decoder's forward, or a Hamiltonian trajectory, by their passes."""
        steps = self.model.num_steps + 1 if isinstance(self.model, HVAE) else 0
        return self.flops[1] * (1 + 3 * steps)

    @property
    def encoder_size(self) -> int:
        """Parameters of the encoder."""
        return _size(self.model.encoder)

    @property
    def size(self) -> int:
        """Parameters of the model."""
        return _size(self.model)


def resized(images: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, C, H, W] in [0, 1] at that shape; another number of channels becomes their mean, repeated."""
    if images.shape[1] != shape[0]:
        images = images.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)
    if images.shape[2:] == torch.Size(shape[1:]):
        return images
    return F.interpolate(images, size=tuple(shape[1:]), mode="bilinear", antialias=True).clamp(0, 1)


def _chosen(
    name: str, data: ImageDataset, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Images, their labels, and which they are."""
    if not isinstance(data, ImageDataset):
        raise TypeError(
            f"write_report: {name}: expected an ImageDataset, got {type(data).__name__}; "
            'fastvae.data.load(..., split="all") makes one of tensors, data sets and folders'
        )
    images, labels = data.tensors()
    if images.dim() != 4 or not len(images):
        raise ValueError(
            f"write_report: {name}: expected images [N, C, H, W], at least one, got {list(images.shape)}"
        )
    # Files are often sorted by label: the first images would not do.
    chosen = torch.randperm(len(images), generator=generator, device="cpu")[: _MOST[name]]
    return images[chosen].float().cpu(), None if labels is None else labels[chosen].cpu(), chosen


def _named(foreign: Foreign) -> dict[str, ImageDataset]:
    if foreign is None:
        return {}
    if isinstance(foreign, Mapping):
        return dict(foreign)
    sets = [foreign] if isinstance(foreign, ImageDataset) or not isinstance(foreign, Sequence) else foreign
    named: dict[str, ImageDataset] = {}
    for each in sets:
        source = str(getattr(each, "name", ""))
        name = Path(source).name or source
        while name in named:
            name += " (another)"
        named[name] = each
    return named


def _check_model_takes(model: BaseVAE, x: Tensor) -> None:
    """ValueError unless there is a bound of images x: nothing on the page would be left."""
    try:
        with torch.no_grad():
            here = x.to(next(model.parameters()).device)
            model.elbo(here, generator=torch.Generator().manual_seed(0))
    except DivergenceError:
        pass  # of these images, or of this noise
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"write_report: train: expected images that the model takes, got {list(x.shape[1:])}: {error}"
        ) from error


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

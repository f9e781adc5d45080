"""The images of the demonstration, and the networks that suit them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvae import architectures
from fastvae.data import ImageDataset, binarize, load
from fastvae.models import BaseVAE

__all__ = ["Batches", "Problem", "dense_networks", "load_problem"]


class Batches:
    """Batches of images in a new random order at every iteration, the last one smaller.

    Args:
        images: [N, C, H, W] in [0, 1].
        batch_size: images in a batch.
        limit: images in an iteration; larger data sets give a random part each time.
    """

    def __init__(self, images: Tensor, batch_size: int, limit: int) -> None:
        self.images, self.batch_size, self.size = images, batch_size, min(limit, len(images))

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for indices in torch.randperm(len(self.images))[: self.size].split(self.batch_size):
            yield self.images[indices]


@dataclass
class Problem:
    """Training images, held-out images, and how large the models and their evaluation may be."""

    name: str
    train: Tensor
    """[N, C, H, W] grey values in [0, 1], binarised anew in every step."""
    held_out: Tensor
    """[M, C, H, W] zeros and ones, drawn once."""
    held_out_grey: Tensor
    """[M, C, H, W] the grey values they were drawn from."""
    held_out_in_all: int
    """Images in the test part that ``held_out`` was taken from."""
    convolutional: bool
    importance_samples: int
    """For each held-out image."""
    curve_draws: int
    """Codes for each held-out image in the training curves, the same noise after every epoch."""
    learning_rate: float
    epoch_limit: int
    """Images in an epoch at most: time limits are looked at between epochs."""
    batch_size: int = 100
    foreign: Sequence[ImageDataset] = ()
    """Images of other kinds, to be told from these."""

    def build(self, kind: type[BaseVAE], seed: int, **options: object) -> BaseVAE:
        """A model of that kind; for one seed all start with the same encoder and decoder."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder, decoder = (
                _convolutional() if self.convolutional else dense_networks(self.train.shape[1:], 16, 128)
            )
            return kind(encoder, decoder, "bernoulli", **options)  # type: ignore[arg-type]

    @property
    def networks(self) -> str:
        """The networks in words."""
        if self.convolutional:
            return (
                "the convolutional networks of Caterini et al. (NeurIPS 2018): three 5x5 convolutions of "
                "stride 2 (16, 32, 32 channels) and 450 hidden units, 64 latent dimensions, and back; softplus, "
                "Glorot initial weights"
            )
        size = math.prod(self.train.shape[1:])
        return f"encoder {size}-128-128 to 16 latent dimensions, decoder 16-128-128-{size}, ELU"


def load_problem(source: str, seed: int, foreign: Sequence[str] = ()) -> Problem:
    """Images from ``fastvae.data.load(source)``, whose errors it passes on, and a budget that suits them.

    ``foreign``: sources of images of other kinds.
    """
    train, test = load(source, split="train"), load(source, split="test")
    images, grey = train.tensors()[0], test.tensors()[0]
    convolutional = tuple(images.shape[1:]) == (1, 28, 28)
    limit = 200 if convolutional else 500
    # Files are often sorted by label: the first images would not do.
    generator = torch.Generator().manual_seed(seed)
    chosen = grey[torch.randperm(len(grey), generator=generator)[:limit]]
    held_out = binarize(chosen, generator)
    return Problem(
        name=train.name,
        train=images,
        held_out=held_out,
        held_out_grey=chosen,
        held_out_in_all=len(grey),
        convolutional=convolutional,
        importance_samples=100 if convolutional else 1000,
        curve_draws=1 if convolutional else 4,
        learning_rate=4e-3 if convolutional else 2e-3,
        epoch_limit=1000 if convolutional else 5000,
        foreign=[load(other, split="all") for other in foreign],
    )


def dense_networks(shape: torch.Size, latent: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder with two hidden layers of ``hidden`` units for images of any shape."""
    size = shape.numel()
    encoder = nn.Sequential(
        nn.Flatten(),
        nn.Linear(size, hidden),
        nn.ELU(),
        nn.Linear(hidden, hidden),
        nn.ELU(),
        nn.Linear(hidden, 2 * latent),
    )
    decoder = nn.Sequential(
        nn.Linear(latent, hidden),
        nn.ELU(),
        nn.Linear(hidden, hidden),
        nn.ELU(),
        nn.Linear(hidden, size),
        nn.Unflatten(1, tuple(shape)),
    )
    return encoder, decoder


def _convolutional() -> tuple[nn.Module, nn.Module]:
    encoder, decoder = architectures.hvae_encoder(), architectures.hvae_decoder()
    # PyTorch's own initial weights, under softplus, leave the code unused for longer than a demonstration.
    for module in (*encoder, *decoder):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return encoder, decoder

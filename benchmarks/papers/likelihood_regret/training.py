"""The two models of the experiment: of the images, and of their background."""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler

import fastvae
from fastvae.architectures import dcgan_decoder, dcgan_encoder
from fastvae.data import ImageDataset
from fastvae.ood import MutatedImages

SIDE = 32  # of the networks' images


def resized(images: ImageDataset, channels: int) -> ImageDataset:
    """The images at 32x32, bilinearly as in the paper's code; grey ones repeated for colour models."""
    pixels = F.interpolate(images.images.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True)
    pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    if pixels.shape[1] not in (1, channels):
        raise SystemExit(f"{images.name}: expected {channels} channels (or 1), got {pixels.shape[1]}")
    return ImageDataset(pixels.expand(-1, channels, -1, -1).contiguous(), images.labels, images.name)


def new_model(channels: int, arguments: Namespace) -> fastvae.VAE:
    """The paper's VAE, untrained, the same at every call."""
    torch.manual_seed(arguments.seed)
    encoder = dcgan_encoder(channels, arguments.width, arguments.latent_dim)
    decoder = dcgan_decoder(channels, arguments.width, arguments.latent_dim)
    return fastvae.VAE(encoder, decoder, "categorical")


def trained(images: ImageDataset, arguments: Namespace, *, background: bool) -> fastvae.VAE:
    """A model after the asked number of steps, resumed from its folder if there is a part of them."""
    model = new_model(images.images.shape[1], arguments).to(arguments.device)
    # In which CPUs train it half as fast again.
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = arguments.background_steps if background else arguments.steps
    # An "epoch" is as many steps as lie between checkpoints; the last one may be shorter.
    epoch = min(arguments.checkpoint_steps, steps)
    epochs = math.ceil(steps / epoch)
    generator = torch.Generator().manual_seed(arguments.seed)
    sampler = RandomSampler(images, num_samples=epoch * arguments.batch_size, generator=generator)
    loader = DataLoader(images, arguments.batch_size, sampler=sampler, generator=generator)
    folder: Path = arguments.checkpoint / ("background" if background else "model")
    history = fastvae.fit(
        model,
        MutatedImages(loader) if background else loader,
        epochs=epochs,
        max_steps=steps,
        optimizer=functools.partial(torch.optim.Adam, lr=arguments.lr),
        run_dir=folder,
        checkpoint_every=epochs,
        keep_latest=True,
        seed=arguments.seed,
    )
    print(f"{folder.name}: {steps} steps, last training loss {history.train_loss[-1]:.1f} nats", flush=True)
    return model.to(memory_format=torch.contiguous_format).eval()

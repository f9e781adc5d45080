"""Decoders of packages on PyPI, as they are, in small configurations where they have any."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fastvae.likelihoods import Bernoulli, Gaussian

from .entry import Entry

REQUIREMENTS = Path(__file__).resolve().parent.parent / "zoo-requirements.txt"


def version_of(package: str) -> str:
    """As pinned."""
    pins = dict(line.split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line)
    return pins[package].split(";")[0].strip()


def build(where: str, *arguments: Any, **options: Any) -> Callable[[int], nn.Module]:
    """What "module:Class" makes of the arguments, imported when asked for. Sizes are the package's own."""
    module, _, kind = where.partition(":")

    def make(width: int) -> nn.Module:
        del width
        return getattr(importlib.import_module(module), kind)(*arguments, **options)

    return make


def reconstruction(found: Any) -> Tensor:
    return found["reconstruction"]


def sample(found: Any) -> Tensor:
    return found.sample


def pythae(name: str, where: str, latent_dim: int, input_dim: tuple[int, ...], heavy: bool = False) -> Entry:
    config = SimpleNamespace(latent_dim=latent_dim, input_dim=input_dim)
    return Entry(
        f"pythae-{name}",
        build(f"pythae.models.nn.{where}", config),
        (latent_dim,),
        Bernoulli(probs=True),
        origin=f"PyPI: pythae {version_of('pythae')}",
        package="pythae",
        output=reconstruction,
        heavy=heavy,
    )


def pythae_quantised(name: str, where: str, code: tuple[int, ...]) -> Entry:
    """Of a VQ-VAE: from an embedding of each position."""
    config = SimpleNamespace(latent_dim=code[0])
    return Entry(
        f"pythae-{name}",
        build(f"pythae.models.nn.{where}", config),
        code,
        Bernoulli(probs=True),
        origin=f"PyPI: pythae {version_of('pythae')}",
        package="pythae",
        output=reconstruction,
        heavy=True,
    )


def disent(name: str, kind: str, heavy: bool = False, **options: Any) -> Entry:
    options = {"x_shape": (1, 64, 64), "z_size": 6, **options}
    return Entry(
        f"disent-{name}",
        build(f"disent.model.ae:{kind}", **options),
        (options["z_size"],),
        origin=f"PyPI: disent {version_of('disent')}",
        package="disent",
        heavy=heavy,
    )


def monai(name: str, code: int, *, today: Mapping[str, str] | None = None, **options: Any) -> Entry:
    return Entry(
        f"monai-{name}",
        build("monai.networks.nets:VarAutoEncoder", latent_size=code, out_channels=1, **options),
        (code,),
        Bernoulli(probs=True),
        origin=f"PyPI: monai {version_of('monai')}",
        package="monai",
        method="decode_forward",
        today=today or {},
    )


def diffusers(name: str, kind: str, code: tuple[int, ...], own_gradients: str = "", **options: Any) -> Entry:
    return Entry(
        f"diffusers-{name}",
        build(f"diffusers:{kind}", **options),
        code,
        Gaussian(0.5),
        origin=f"PyPI: diffusers {version_of('diffusers')}",
        package="diffusers",
        method="decode",
        output=sample,
        own_gradients=own_gradients,
    )


ENTRIES = [
    pythae("mlp", "default_architectures:Decoder_AE_MLP", 5, (1, 12, 12)),
    pythae("mnist-convnet", "benchmarks.mnist:Decoder_Conv_AE_MNIST", 4, (1, 28, 28), heavy=True),
    pythae("mnist-resnet", "benchmarks.mnist:Decoder_ResNet_AE_MNIST", 4, (1, 28, 28)),
    pythae("cifar-convnet", "benchmarks.cifar:Decoder_Conv_AE_CIFAR", 2, (3, 32, 32), heavy=True),
    pythae("cifar-resnet", "benchmarks.cifar:Decoder_ResNet_AE_CIFAR", 4, (3, 32, 32), heavy=True),
    pythae("celeba-convnet", "benchmarks.celeba:Decoder_Conv_AE_CELEBA", 2, (3, 64, 64), heavy=True),
    pythae("celeba-resnet", "benchmarks.celeba:Decoder_ResNet_AE_CELEBA", 3, (3, 64, 64), heavy=True),
    pythae_quantised("mnist-resnet-vqvae", "benchmarks.mnist:Decoder_ResNet_VQVAE_MNIST", (4, 3, 3)),
    disent("linear", "DecoderLinear"),
    disent("fc", "DecoderFC", x_shape=(1, 16, 16)),
    disent("conv64", "DecoderConv64"),
    disent("conv64-layernorm", "DecoderConv64Norm", heavy=True, norm="layer"),
    disent(
        "conv64-instancenorm-swish",
        "DecoderConv64Norm",
        norm="instance",
        activation="swish",
        heavy=True,
    ),
    disent("conv64-batchnorm", "DecoderConv64Norm", norm="batch", norm_pre_act=False),
    monai("2d", 4, spatial_dims=2, in_shape=(1, 16, 16), channels=(4, 8, 8), strides=(1, 2, 2)),
    monai("3d", 4, spatial_dims=3, in_shape=(1, 8, 8, 8), channels=(4, 8), strides=(2, 2)),
    monai(
        "2d-residual-batchnorm",
        4,
        spatial_dims=2,
        in_shape=(1, 16, 16),
        channels=(4, 8),
        strides=(2, 2),
        num_res_units=2,
        inter_channels=(8, 8),
        inter_dilations=(1, 2),
        norm="batch",
        act="LEAKYRELU",
        dropout=0.1,
    ),
    diffusers(
        "autoencoder-kl",
        "AutoencoderKL",
        (4, 4, 4),
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    ),
    diffusers(
        "autoencoder-tiny",
        "AutoencoderTiny",
        (4, 4, 4),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    diffusers(
        "vq-model",
        "VQModel",
        (3, 4, 4),
        own_gradients="quantising passes its gradient straight through",
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=16,
    ),
]

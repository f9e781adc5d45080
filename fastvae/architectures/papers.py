"""The papers' encoders and decoders, with PyTorch's initial weights where nothing else is said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastvae.architectures.naming import named
from fastvae.arguments import expect

__all__ = [
    "dcgan_decoder",
    "dcgan_encoder",
    "dcgan_states",
    "hvae_decoder",
    "hvae_encoder",
    "jacobian_l1_decoder",
    "jacobian_l1_encoder",
    "tracin_decoder",
    "tracin_encoder",
]


@named
def hvae_encoder(
    width: int = 16, *, padding: str = "centred", initialization: str = "torch"
) -> nn.Sequential:
    """The convolutional encoder for MNIST of Caterini, Doucet, Sejdinovic, NeurIPS 2018.

    Three 5x5 convolutions of stride 2 and a hidden layer of 450, softplus between them. The paper's standard
    deviations are a softplus of the last layer; models here take log variances.

    Args:
        width: channels of the first convolution; the paper has 16, and twice that in the other two.
        padding: "centred": 2 on every side, which for even sizes is the mirror image of TensorFlow's; "same":
            TensorFlow's in the authors' code, 1 above and left, 2 below and right.
        initialization: of the weights; "torch", or "paper": the authors' normal with variance 1 / (n_in + n_out), n
            numbers of whole maps; biases 0, those of the log variances 2 log(log 2), for the authors' sigma.

    Returns:
        A module from images [B, 1, 28, 28] to [B, 128]: mean and log variance of 64 latent variables.

    Raises:
        ValueError: another padding or initialization.
    """
    encoder = nn.Sequential(
        *_halving(1, width, padding),
        nn.Softplus(),
        *_halving(width, 2 * width, padding),
        nn.Softplus(),
        nn.Conv2d(2 * width, 2 * width, 5, stride=2, padding=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(32 * width, 450),
        nn.Softplus(),
        nn.Linear(450, 128),
    )
    if _from_paper(initialization):
        last = _initialize(encoder, [784, 196 * width, 98 * width, 32 * width, 450, 64])
        nn.init.constant_(last[64:], 2 * math.log(math.log(2)))
    return encoder


@named
def hvae_decoder(
    width: int = 16, *, padding: str = "centred", initialization: str = "torch", mean_logit: float = 0.0
) -> nn.Sequential:
    """The decoder that mirrors :func:`hvae_encoder`, with transposed convolutions.

    Args:
        width: channels before the last layer; the paper has 16, and twice that further up.
        padding: see :func:`hvae_encoder`. Layers that crop ("same") run as a graph, in about 1.3 times the time.
        initialization: see :func:`hvae_encoder`.
        mean_logit: with initialization="paper" the last layer's bias; theirs is log(p / (1 - p)), p the mean pixel.

    Returns:
        A module from [B, 64] to logits [B, 1, 28, 28].

    Raises:
        ValueError: another padding or initialization.
    """
    decoder = nn.Sequential(
        nn.Linear(64, 450),
        nn.Softplus(),
        nn.Linear(450, 32 * width),
        nn.Softplus(),
        nn.Unflatten(1, (2 * width, 4, 4)),
        nn.ConvTranspose2d(2 * width, 2 * width, 5, stride=2, padding=2),
        nn.Softplus(),
        *_doubling(2 * width, width, padding),
        nn.Softplus(),
        *_doubling(width, 1, padding),
    )
    if _from_paper(initialization):
        last = _initialize(decoder, [64, 450, 32 * width, 98 * width, 196 * width, 784])
        nn.init.constant_(last, mean_logit)
    return decoder


def _halving(channels: int, wider: int, padding: str) -> list[nn.Module]:
    """A 5x5 convolution from maps of an even size to half of it."""
    if _is_same(padding):
        return [nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(channels, wider, 5, stride=2)]
    return [nn.Conv2d(channels, wider, 5, stride=2, padding=2)]


def _doubling(channels: int, fewer: int, padding: str) -> list[nn.Module]:
    """The transposed convolution of :func:`_halving`."""
    if _is_same(padding):
        # A transposed convolution's padding is what it leaves out: 1 above and left, 1 and 1 below and right.
        return [nn.ConvTranspose2d(channels, fewer, 5, stride=2, padding=1), nn.ZeroPad2d((0, -1, 0, -1))]
    return [nn.ConvTranspose2d(channels, fewer, 5, stride=2, padding=2, output_padding=1)]


def _is_same(padding: str) -> bool:
    expect(padding in ("centred", "same"), "hvae: padding: expected 'centred' or 'same'", repr(padding))
    return padding == "same"


def _from_paper(initialization: str) -> bool:
    expect(
        initialization in ("torch", "paper"),
        "hvae: initialization: expected 'torch' or 'paper'",
        repr(initialization),
    )
    return initialization == "paper"


def _initialize(network: nn.Sequential, sizes: Sequence[int]) -> Tensor:
    """Normal weights with variance 1 / (n_in + n_out), ``sizes`` between layers; biases 0, of which the last."""
    layers = [layer for layer in network if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
    for layer, n_in, n_out in zip(layers, sizes[:-1], sizes[1:], strict=True):
        nn.init.normal_(layer.weight, std=(n_in + n_out) ** -0.5)
        assert layer.bias is not None
        bias = nn.init.zeros_(layer.bias)
    return bias.detach()


@named
def jacobian_l1_encoder(latent_dim: int = 10) -> nn.Sequential:
    """The encoder for 64x64 images of Rhodes, Lee, NeurIPS 2021: 4x4 convolutions of stride 2, ReLU.

    As in the authors' code (jlonevae) nothing is padded (64, 31, 14, 6, 2), the two heads are the two halves of the
    last layer, and 3 is taken off the initial biases of the log variances. 186,324 parameters with d = 10.

    Args:
        latent_dim: d.

    Returns:
        A module from images [B, 1, 64, 64] to [B, 2 d]: mean and log variance.
    """
    heads = nn.Linear(256, 2 * latent_dim)
    with torch.no_grad():
        heads.bias[latent_dim:] -= 3
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 4, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 256),
        nn.ReLU(),
        heads,
    )


@named
def jacobian_l1_decoder(channels: int = 1, width: int = 32, latent_dim: int = 10) -> nn.Sequential:
    """The decoder for 64x64 images of Rhodes, Lee, NeurIPS 2021, without its sigmoid: likelihoods take logits.

    Args:
        channels: of the images.
        width: channels before the last layer; the paper has 32, and twice that further up.
        latent_dim: d.

    Returns:
        A module from [B, d] to logits [B, channels, 64, 64].
    """
    return nn.Sequential(
        nn.Linear(latent_dim, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, 32 * width),
        nn.ReLU(),
        nn.Unflatten(1, (2 * width, 4, 4)),
        nn.ConvTranspose2d(2 * width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
    )


@named
def dcgan_encoder(channels: int = 3, width: int = 32, latent_dim: int = 100) -> nn.Sequential:
    """The encoder for 32x32 images of Xiao, Yan, Amit, NeurIPS 2020: 4x4 convolutions, batch norm, ReLU.

    The paper's two heads, one for the mean and one for the log variance, are the two halves of the last
    convolution; :func:`dcgan_states` renames the authors' trained weights.

    Args:
        channels: of the images.
        width: channels of the first convolution; the paper has 32, and twice and four times that further up.
        latent_dim: d; the paper has 100.

    Returns:
        A module from images [B, channels, 32, 32] to [B, 2 d]: mean and log variance.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
        nn.Conv2d(4 * width, 2 * latent_dim, 4),
        nn.Flatten(),
    )


@named
def dcgan_decoder(
    channels: int = 3, width: int = 32, latent_dim: int = 100, *, values_per_element: int = 256
) -> nn.Sequential:
    """The decoder that mirrors :func:`dcgan_encoder`, with transposed convolutions.

    Args:
        channels: of the images.
        width: channels before the last layer; the paper has 32, and twice and four times that further up.
        latent_dim: d; the paper has 100.
        values_per_element: outputs for one sub-pixel: 256 for ``Categorical(256)``, the paper's likelihood,
            1 for the others.

    Returns:
        A module from [B, d] to [B, channels * values_per_element, 32, 32].
    """
    return nn.Sequential(
        nn.Unflatten(1, (latent_dim, 1, 1)),
        nn.ConvTranspose2d(latent_dim, 4 * width, 4, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, channels * values_per_element, 4, stride=2, padding=1, bias=False),
    )


def dcgan_states(
    encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of Xiao, Yan, Amit's code (NeurIPS 2020), renamed for :func:`dcgan_encoder` and :func:`dcgan_decoder`.

    Their decoder orders a last layer's outputs as ours does, the 256 values of a channel side by side.

    Args:
        encoder: the state of their ``Encoder``: "main.", and the heads "conv1." (means) and "conv2." (log variances).
        decoder: the state of their ``DCGAN_G``.

    Returns:
        What ``load_state_dict`` of the two networks takes, strictly.

    Raises:
        ValueError: states of other networks.
    """
    body = [value for name, value in encoder.items() if name.startswith("main.")]
    heads = [f"conv{head}.{kind}" for kind in ("weight", "bias") for head in (1, 2)]
    ours = [dcgan_encoder(1, 1, 1).state_dict(), dcgan_decoder(1, 1, 1).state_dict()]
    if len(body) != len(ours[0]) - 2 or len(decoder) != len(ours[1]) or not set(heads) <= encoder.keys():
        raise ValueError(
            "dcgan_states: encoder, decoder: expected states of the authors' Encoder and DCGAN_G for 32x32 images, got "
            f"{', '.join(encoder) or 'nothing'}; {', '.join(decoder) or 'nothing'}"
        )
    body += [torch.cat([encoder[mean], encoder[logvar]]) for mean, logvar in (heads[:2], heads[2:])]
    return dict(zip(ours[0], body, strict=True)), dict(zip(ours[1], decoder.values(), strict=True))


@named
def tracin_encoder(pixels: int = 784, latent_dim: int = 128, width: int = 1024) -> nn.Sequential:
    """The encoder for MNIST of Kong, Chaudhuri, NeurIPS 2021: three hidden layers, ReLU.

    Args:
        pixels: of an image, its channels included.
        latent_dim: d.
        width: of the first hidden layer; the next ones have half and a quarter of it.

    Returns:
        A module from images [B, ...] of so many pixels to [B, 2 d]: mean and log variance.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, width),
        nn.ReLU(),
        nn.Linear(width, width // 2),
        nn.ReLU(),
        nn.Linear(width // 2, width // 4),
        nn.ReLU(),
        nn.Linear(width // 4, 2 * latent_dim),
    )


@named
def tracin_decoder(pixels: int = 784, latent_dim: int = 128, width: int = 1024) -> nn.Sequential:
    """The decoder that mirrors :func:`tracin_encoder`.

    Args:
        pixels: of an image, its channels included.
        latent_dim: d.
        width: of the last hidden layer; the ones before have half and a quarter of it.

    Returns:
        A module from [B, d] to logits [B, pixels].
    """
    return nn.Sequential(
        nn.Linear(latent_dim, width // 4),
        nn.ReLU(),
        nn.Linear(width // 4, width // 2),
        nn.ReLU(),
        nn.Linear(width // 2, width),
        nn.ReLU(),
        nn.Linear(width, pixels),
    )

"""The encoders and decoders of the papers, untrained, with PyTorch's initial weights."""

from __future__ import annotations

from torch import nn

__all__ = [
    "dcgan_decoder",
    "dcgan_encoder",
    "hvae_decoder",
    "hvae_encoder",
    "jacobian_l1_decoder",
    "jacobian_l1_encoder",
    "tracin_decoder",
    "tracin_encoder",
]


def hvae_encoder(width: int = 16) -> nn.Sequential:
    """The convolutional encoder for MNIST of Caterini, Doucet, Sejdinovic, NeurIPS 2018.

    Three 5x5 convolutions of stride 2 and a hidden layer of 450, softplus between them.

    Args:
        width: channels of the first convolution; the paper has 16, and twice that in the other two.

    Returns:
        A module from images [B, 1, 28, 28] to [B, 128]: mean and log variance of 64 latent variables.
    """
    return nn.Sequential(
        nn.Conv2d(1, width, 5, stride=2, padding=2),
        nn.Softplus(),
        nn.Conv2d(width, 2 * width, 5, stride=2, padding=2),
        nn.Softplus(),
        nn.Conv2d(2 * width, 2 * width, 5, stride=2, padding=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(32 * width, 450),
        nn.Softplus(),
        nn.Linear(450, 128),
    )


def hvae_decoder(width: int = 16) -> nn.Sequential:
    """The decoder that mirrors :func:`hvae_encoder`, with transposed convolutions.

    Args:
        width: channels before the last layer; the paper has 16, and twice that further up.

    Returns:
        A module from [B, 64] to logits [B, 1, 28, 28].
    """
    return nn.Sequential(
        nn.Linear(64, 450),
        nn.Softplus(),
        nn.Linear(450, 32 * width),
        nn.Softplus(),
        nn.Unflatten(1, (2 * width, 4, 4)),
        nn.ConvTranspose2d(2 * width, 2 * width, 5, stride=2, padding=2),
        nn.Softplus(),
        nn.ConvTranspose2d(2 * width, width, 5, stride=2, padding=2, output_padding=1),
        nn.Softplus(),
        nn.ConvTranspose2d(width, 1, 5, stride=2, padding=2, output_padding=1),
    )


def jacobian_l1_encoder(latent_dim: int = 10) -> nn.Sequential:
    """The encoder for 64x64 images of Rhodes, Lee, NeurIPS 2021: 4x4 convolutions of stride 2, ReLU.

    Args:
        latent_dim: d.

    Returns:
        A module from images [B, 1, 64, 64] to [B, 2 d]: mean and log variance.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 256),
        nn.ReLU(),
        nn.Linear(256, 2 * latent_dim),
    )


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


def dcgan_encoder(channels: int = 3, width: int = 32, latent_dim: int = 100) -> nn.Sequential:
    """The encoder for 32x32 images of Xiao, Yan, Amit, NeurIPS 2020: 4x4 convolutions, batch norm, ReLU.

    The paper's two heads, one for the mean and one for the log variance, are the two halves of the last
    convolution: concatenate their weights and biases to load weights that were trained apart.

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
        nn.ConvTranspose2d(width, channels * values_per_element, 4, stride=2, padding=1),
    )


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

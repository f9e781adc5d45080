"""The papers' networks: shapes, sizes, and that the operators run them."""

import pytest
import torch
from torch import nn

from fastvae import architectures, lowering


@pytest.mark.parametrize("width", [2, 16])
def test_hvae_networks_fit_each_other_and_mnist(width):
    encoder, decoder = architectures.hvae_encoder(width), architectures.hvae_decoder(width)
    images = torch.rand(3, 1, 28, 28)
    code = encoder(images)
    assert code.shape == (3, 2 * 64)
    assert decoder(code[:, :64]).shape == images.shape
    lowering.lower(decoder)
    for network in (encoder, decoder):
        hidden = [layer for layer in network if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
        assert sum(isinstance(layer, nn.Softplus) for layer in network) == len(hidden) - 1


def test_jacobian_l1_networks_fit_each_other_and_64x64():
    images = torch.rand(2, 1, 64, 64)
    code = architectures.jacobian_l1_encoder()(images)
    assert code.shape == (2, 2 * 10)
    decoder = architectures.jacobian_l1_decoder()
    assert decoder(code[:, :10]).shape == images.shape
    lowering.lower(decoder)


@pytest.mark.parametrize("channels", [1, 3])
def test_dcgan_networks_fit_each_other_and_32x32(channels):
    images = torch.rand(2, channels, 32, 32)
    code = architectures.dcgan_encoder(channels, width=4).eval()(images)
    assert code.shape == (2, 2 * 100)
    decoder = architectures.dcgan_decoder(channels, width=4).eval()
    assert decoder(code[:, :100]).shape == (2, 256 * channels, 32, 32)
    lowering.lower(decoder)
    assert (
        architectures.dcgan_decoder(channels, 4, 7, values_per_element=1)(code[:, :7]).shape == images.shape
    )

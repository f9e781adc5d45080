"""The package's networks: shapes, sizes, that the operators run them and models train with them."""

import functools

import pytest
import torch
from torch import nn

import fastvae
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


SIZES = [(1, 28, 28), (3, 28, 28), (1, 32, 32), (3, 32, 32), (1, 64, 64), (3, 64, 64)]
KINDS = {
    "VAE": fastvae.VAE,
    "HVAE": functools.partial(fastvae.HVAE, num_steps=2),
    "IWAE": functools.partial(fastvae.IWAE, num_samples=3),
    "JacobianL1VAE": fastvae.JacobianL1VAE,
    "ConsistencyVAE": functools.partial(fastvae.ConsistencyVAE, augment=fastvae.data.RandomAffine()),
}


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_trains_with_the_networks_for_images(kind, shape):
    """Some steps of Adam on a batch lower its loss, with gradients everywhere and everything in kernels."""
    torch.manual_seed(0)
    encoder, decoder = architectures.image_networks(shape, 5, width=4)
    assert lowering.explain(decoder).splitlines()[-1].startswith("Lowered")
    likelihood = fastvae.likelihoods.Gaussian("learned") if shape[0] == 3 else "bernoulli"
    model = KINDS[kind](encoder, decoder, likelihood)
    x = torch.rand(4, *shape)
    assert model.sample(2).shape == (2, *shape) and model.reconstruct(x).shape == x.shape
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.loss(x, generator=torch.Generator().manual_seed(0))
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_networks_for_images_of_other_sizes():
    for height, width in ((8, 8), (16, 32), (48, 48), (96, 96)):
        encoder, decoder = architectures.image_networks((2, height, width), 3, width=2, values_per_element=4)
        code = encoder(torch.rand(2, 2, height, width))
        assert code.shape == (2, 6) and decoder(code[:, :3]).shape == (2, 8, height, width)
    for shape, message in (
        ((3, 33, 33), r"halved to at most 8, such as .* got 33x33; fastvae\.data\.load\(\.\.\., size=32\)"),
        ((3, 30, 30), "got 30x30"),
        ((28, 28), r"shape: expected \(channels, height, width\)"),
        ((0, 28, 28), "shape: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            architectures.image_networks(shape)
    with pytest.raises(ValueError, match="latent_dim: expected an int of at least 1, got 0"):
        architectures.image_networks((1, 28, 28), 0)


def test_networks_say_what_made_them():
    assert set(architectures.BY_NAME) == set(architectures.__all__) - {"BY_NAME", "image_networks"}
    decoder = architectures.dcgan_decoder(1, width=4)
    assert decoder.made_by["name"] == "dcgan_decoder"
    again = architectures.BY_NAME["dcgan_decoder"](**decoder.made_by["arguments"])
    assert str(again) == str(decoder)

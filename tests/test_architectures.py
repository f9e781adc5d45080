"""The package's networks: shapes, sizes, that the operators run them and models train with them."""

import functools
import itertools
import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
    assert set(architectures.BY_NAME) == set(architectures.__all__) - {
        "BY_NAME",
        "dcgan_states",
        "image_networks",
        "table_networks",
    }
    decoder = architectures.dcgan_decoder(1, width=4)
    assert decoder.made_by["name"] == "dcgan_decoder"
    again = architectures.BY_NAME["dcgan_decoder"](**decoder.made_by["arguments"])
    assert str(again) == str(decoder)


def numel(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_jacobian_l1_encoder_is_the_authors():
    """jlonevae's ConvVAE for 64x64: no padding, and log variances that start at about -3."""
    torch.manual_seed(0)
    encoder = architectures.jacobian_l1_encoder()
    assert numel(encoder) == 186_324
    convolutions = [layer for layer in encoder if isinstance(layer, nn.Conv2d)]
    assert all(layer.padding == (0, 0) and layer.stride == (2, 2) for layer in convolutions)
    assert [layer.in_features for layer in encoder if isinstance(layer, nn.Linear)] == [256, 256]
    # torch's initial biases of a layer with 256 inputs are within 1/16.
    assert (encoder[-1].bias[10:] + 3).abs().max() <= 1 / 16
    assert encoder[-1].bias[:10].abs().max() <= 1 / 16


class SameConv(nn.Module):
    """TensorFlow's SAME convolution of stride 2 by its definition: what is odd of the padding goes behind."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        size, kernel = x.shape[-1], self.weight.shape[-1]
        total = max(0, (math.ceil(size / 2) - 1) * 2 + kernel - size)
        sides = (total // 2, total - total // 2)
        return F.conv2d(F.pad(x, sides * 2), self.weight, self.bias, stride=2)


def transposed(layer, z, size):
    """TensorFlow's conv2d_transpose: the gradient of the SAME convolution to its input."""
    x = torch.zeros(len(z), layer.out_channels, size, size, dtype=z.dtype, requires_grad=True)
    (found,) = torch.autograd.grad(SameConv(layer.weight, None)(x), x, z)
    return found + layer.bias[:, None, None]


def test_same_padding_is_that_of_tensorflow():
    torch.manual_seed(1)
    encoder = architectures.hvae_encoder(3, padding="same").double()
    decoder = architectures.hvae_decoder(3, padding="same").double()
    x, z = torch.rand(2, 1, 28, 28, dtype=torch.float64), torch.randn(2, 64, dtype=torch.float64)
    expected = x
    for layer in encoder:
        if isinstance(layer, nn.Conv2d):
            layer = SameConv(layer.weight, layer.bias)
        elif isinstance(layer, nn.ZeroPad2d):
            continue
        expected = layer(expected)
    # Sums of at most 512 products in another order.
    torch.testing.assert_close(encoder(x), expected, rtol=1e-12, atol=1e-12)
    expected, sizes = z, iter((7, 14, 28))
    for layer in decoder:
        if isinstance(layer, nn.ConvTranspose2d):
            expected = transposed(layer, expected, next(sizes))
        elif not isinstance(layer, nn.ZeroPad2d):
            expected = layer(expected)
    torch.testing.assert_close(decoder(z), expected, rtol=1e-12, atol=1e-12)


def test_centred_padding_is_the_mirror_image_of_same():
    """The same numbers from images and kernels turned by 180 degrees."""
    same, centred = architectures.hvae_encoder(2, padding="same"), architectures.hvae_encoder(2)
    same, centred = same.double(), centred.double()
    theirs = [layer for layer in same if not isinstance(layer, nn.ZeroPad2d)]
    for ours, layer in zip(centred, theirs, strict=True):
        ours.load_state_dict(layer.state_dict())
        if isinstance(ours, nn.Conv2d):
            ours.weight.data = ours.weight.flip(2, 3)
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    # Up to the last maps; two layers of padding more in the one.
    first, second = same[:8], centred[:6]
    torch.testing.assert_close(second(x.flip(2, 3)).flip(2, 3), first(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ["centred", "same"])
def test_initialization_of_the_hvae_paper(padding):
    torch.manual_seed(2)
    options = {"padding": padding, "initialization": "paper"}
    encoder = architectures.hvae_encoder(**options)
    decoder = architectures.hvae_decoder(**options, mean_logit=-1.5)
    # The authors' sizes of whole maps.
    sizes = [28 * 28, 14 * 14 * 16, 7 * 7 * 32, 512, 450, 64]
    for network, widths in ((encoder, sizes), (decoder, sizes[::-1])):
        layers = [layer for layer in network if hasattr(layer, "weight")]
        for layer, n_in, n_out in zip(layers, widths[:-1], widths[1:], strict=True):
            # Five standard errors of a standard deviation, of 400 weights at least.
            spread = 5 / math.sqrt(2 * layer.weight.numel())
            assert float(layer.weight.detach().std()) == pytest.approx((n_in + n_out) ** -0.5, rel=spread)
        assert not any(layer.bias.any() for layer in layers[:-1])
    assert decoder[-1 if padding == "centred" else -2].bias.tolist() == [-1.5]
    # Zero weights leave sigma = softplus(0), as theirs.
    torch.testing.assert_close((encoder[-1].bias[64:] / 2).exp(), F.softplus(torch.zeros(64)))
    x = torch.rand(2, 1, 28, 28).bernoulli()
    assert bool(torch.isfinite(fastvae.HVAE(encoder, decoder, num_steps=2)(x)).all())


@pytest.mark.parametrize("network", [architectures.hvae_encoder, architectures.hvae_decoder])
def test_hvae_options_that_there_are_not(network):
    with pytest.raises(ValueError, match="padding: expected 'centred' or 'same', got 'valid'"):
        network(padding="valid")
    with pytest.raises(ValueError, match="initialization: expected 'torch' or 'paper', got 'xavier'"):
        network(initialization="xavier")


def authors_dcgan(channels, width, latent_dim):
    """Xiao, Yan and Amit's networks for 32x32, with their names: a body and two heads; a decoder without biases."""
    body, generator = OrderedDict(), OrderedDict()
    widths = [channels, width, 2 * width, 4 * width]
    for index, (narrow, wide) in enumerate(itertools.pairwise(widths)):
        body[f"pyramid-{index}-conv"] = nn.Conv2d(narrow, wide, 4, 2, 1, bias=False)
        body[f"pyramid-{index}-batchnorm"] = nn.BatchNorm2d(wide)
        body[f"pyramid-{index}-relu"] = nn.ReLU()
    encoder = nn.Module()
    encoder.conv1, encoder.conv2 = nn.Conv2d(4 * width, latent_dim, 4), nn.Conv2d(4 * width, latent_dim, 4)
    encoder.main = nn.Sequential(body)
    generator["initial-convt"] = nn.ConvTranspose2d(latent_dim, 4 * width, 4, 1, 0, bias=False)
    for index, wide in enumerate((4 * width, 2 * width, width)):
        generator[f"pyramid-{index}-batchnorm"] = nn.BatchNorm2d(wide)
        generator[f"pyramid-{index}-relu"] = nn.ReLU()
        narrow = wide // 2 if index < 2 else 256 * channels
        generator[f"pyramid-{index}-convt"] = nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)
    decoder = nn.Module()
    decoder.main = nn.Sequential(generator)
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return encoder.double().eval(), decoder.double().eval()


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_the_authors_dcgan_load_strictly(channels):
    torch.manual_seed(3)
    theirs = authors_dcgan(channels, 4, 7)
    ours = architectures.dcgan_encoder(channels, 4, 7), architectures.dcgan_decoder(channels, 4, 7)
    states = architectures.dcgan_states(theirs[0].state_dict(), theirs[1].state_dict())
    encoder, decoder = (network.double().eval() for network in ours)
    for network, state in zip((encoder, decoder), states, strict=True):
        network.load_state_dict(state)
    assert [numel(network) for network in ours] == [numel(network) for network in theirs]
    x = torch.rand(2, channels, 32, 32, dtype=torch.float64)
    hidden = theirs[0].main(x)
    code = torch.cat([theirs[0].conv1(hidden), theirs[0].conv2(hidden)], 1).flatten(1)
    # The same operations; heads side by side may sum in another order.
    torch.testing.assert_close(encoder(x), code, rtol=1e-12, atol=1e-12)
    z = torch.randn(2, 7, dtype=torch.float64)
    torch.testing.assert_close(decoder(z), theirs[1].main(z[:, :, None, None]), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="dcgan_states: encoder, decoder: expected states"):
        architectures.dcgan_states(theirs[1].state_dict(), theirs[0].state_dict())

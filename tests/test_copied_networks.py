"""Copies of encoders that are read as graphs, in forms that fold, move or share things: against Adam by hand."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from influence_problems import mlp
from torch import Tensor, nn

from fastvae.lowering import UnsupportedLayer
from fastvae.models import VAE
from fastvae.network.copied.rows import Axis, axis_of, rows_of, whole_of
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.copies import Adam
from fastvae.ood.encoding import read_encoder
from fastvae.ood.read_copies import ReadCopies
from fastvae.ood.sequential import refit_one

STEPS = 8


class Encoder(nn.Module):
    """From x [B, 24] to [B, 6] in a way of its own."""

    def __init__(
        self, forward: Callable[[Encoder, Tensor], Tensor], **parts: nn.Module | nn.Parameter
    ) -> None:
        super().__init__()
        self.last, self.way = nn.LazyLinear(6), forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self, x))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def attention(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)
    if batch_first:
        return Encoder(lambda m, x: m.layer(x.view(-1, 6, 4)).flatten(1), layer=layer)
    return Encoder(lambda m, x: m.layer(x.view(-1, 6, 4).transpose(0, 1))[-1], layer=layer)


def with_token() -> nn.Module:
    def forward(m: Encoder, x: Tensor) -> Tensor:
        h = m.embed(x.view(len(x), 6, 4))
        h = torch.cat([m.token.expand(len(x), -1, -1), h], 1) + m.positions
        return m.norm(h).mean(1) * m.scale

    return Encoder(
        forward,
        embed=nn.Linear(4, 5),
        token=weight(1, 1, 5),
        positions=weight(7, 5),
        norm=nn.LayerNorm(5),
        scale=weight(5),
    )


def frames() -> nn.Module:
    """Folded into the batch on the way through a convolution and a norm."""

    def forward(m: Encoder, x: Tensor) -> Tensor:
        h = torch.relu(m.norm(m.convolution(x.view(-1, 1, 3, 4))))
        return h.flatten(1).view(len(x), -1)

    return Encoder(forward, convolution=nn.Conv2d(1, 3, 2), norm=nn.BatchNorm2d(3))


def frames_outside() -> nn.Module:
    """The same with the frames before the samples."""

    def forward(m: Encoder, x: Tensor) -> Tensor:
        h = x.view(len(x), 2, 12).transpose(0, 1).reshape(-1, 1, 3, 4)
        h = m.group(torch.relu(m.convolution(h))).flatten(1)
        return torch.tanh(m.dense(h)).view(2, len(x), -1).sum(0)

    parts = {"convolution": nn.Conv2d(1, 4, 2), "group": nn.GroupNorm(2, 4), "dense": nn.Linear(24, 5)}
    return Encoder(forward, **parts)


def slopes() -> nn.Module:
    """PReLU of frames folded into the batch, one a channel; then of vectors, and of a parameter alone."""

    def forward(m: Encoder, x: Tensor) -> Tensor:
        h = m.each(m.convolution(x.view(-1, 1, 3, 4)).relu() - m.each(x.view(-1, 3, 2, 2)))
        return m.one(h.flatten(1).view(len(x), -1)) * nn.functional.prelu(m.scale, m.one.weight)

    parts = {
        "convolution": nn.Conv2d(1, 3, (2, 3)),
        "each": nn.PReLU(3),
        "one": nn.PReLU(),
        "scale": weight(24),
    }
    return Encoder(forward, **parts)


def there_and_back() -> nn.Module:
    """A convolution and its transpose with the same weight, and a dense layer used twice and once transposed."""

    def forward(m: Encoder, x: Tensor) -> Tensor:
        h = nn.functional.conv2d(x.view(-1, 1, 4, 6), m.kernel, stride=2)
        h = nn.functional.conv_transpose2d(torch.tanh(h), m.kernel, stride=2).flatten(1)
        h = torch.tanh(m.dense(torch.tanh(m.dense(h))))
        return nn.functional.linear(h, m.dense.weight.t())

    return Encoder(forward, kernel=weight(3, 1, 2, 2), dense=nn.Linear(24, 24))


def upwards() -> nn.Module:
    layers = nn.Sequential(
        nn.Unflatten(1, (2, 3, 4)),
        nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, groups=2),
        nn.InstanceNorm2d(4, affine=True),
        nn.PReLU(4),
        nn.Conv2d(4, 4, 3, 2, padding=1, groups=2, dilation=2, padding_mode="circular"),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    return Encoder(lambda m, x: m.layers(x), layers=layers)


def lines() -> nn.Module:
    layers = nn.Sequential(
        nn.Unflatten(1, (3, 8)),
        nn.Conv1d(3, 6, 4, padding="same"),
        nn.BatchNorm1d(6),
        nn.GELU(),
        nn.Flatten(),
    )
    return Encoder(lambda m, x: m.layers(x), layers=layers)


def tokens() -> nn.Module:
    def forward(m: Encoder, x: Tensor) -> Tensor:
        numbers = (x * 9).round().long()
        return m.table(numbers).flatten(1) + nn.functional.embedding(numbers, m.table.weight * 2).flatten(1)

    return Encoder(forward, table=nn.Embedding(10, 3, padding_idx=2))


def gates() -> nn.Module:
    def forward(m: Encoder, x: Tensor) -> Tensor:
        h = torch.where(m.threshold > x, x * m.slope.exp(), m.a(x))
        return torch.stack([h, m.shift / (1 + h.square())], 1).flatten(1)

    return Encoder(forward, threshold=weight(24), slope=weight(1), a=nn.Linear(24, 24), shift=weight(24))


def straight_through() -> nn.Module:
    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return (x > 0).to(x)

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            return dy

    return Encoder(lambda m, x: Step.apply(m.dense(x)), dense=nn.Linear(24, 8))


def with_a_buffer() -> nn.Module:
    """A chain of layers, one of whose weights is a buffer."""

    def forward(m: Encoder, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(x, m.fixed, m.shift))

    encoder = Encoder(forward, shift=weight(8))
    encoder.register_buffer("fixed", torch.randn(8, 24))
    return encoder


def one_weight_of_two_names() -> nn.Module:
    """A chain of layers, two of which are tied."""
    parts = {"a": nn.Linear(24, 24), "b": nn.Linear(24, 24), "c": nn.Linear(24, 8)}
    parts["b"].weight = parts["a"].weight
    return Encoder(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x.view(len(x), -1)))))), **parts)


def partly_unused() -> nn.Module:
    parts = {"dense": nn.Linear(24, 8), "unused": nn.Linear(3, 3), "stopped": nn.Linear(24, 8)}
    return Encoder(lambda m, x: torch.relu(m.dense(x)) + m.stopped(x).detach(), **parts)


ENCODERS: list[Callable[[], nn.Module]] = [
    *(with_token, frames, frames_outside, slopes, there_and_back, upwards, lines, tokens, gates),
    *(straight_through, partly_unused, with_a_buffer, one_weight_of_two_names),
]


def model_of(encoder: nn.Module) -> VAE:
    with torch.no_grad():
        encoder.eval()(torch.rand(2, 24))
    model = VAE(encoder, mlp(3, 8, 24), "gaussian", latent_dim=3).double().eval()
    for part in encoder.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


def compare(model: VAE, x: Tensor, condition: Tensor | None = None) -> None:
    """Regret's encoders with those of Adam by hand, twice: the second time calls are made by straight code."""
    detector = LikelihoodRegret(model, num_steps=STEPS, num_samples=2, lr=1e-2)
    for batch in (x, 1 - x):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = detector.refit(batch, parameters=True, condition=condition)
        for i, image in enumerate(batch.split(1)):
            given = None if condition is None else condition[i : i + 1]
            own, losses = refit_one(
                model,
                image,
                SampleNoise(keys_of(image), 0, 1),
                num_steps=STEPS,
                lr=1e-2,
                condition=given,
            )
            torch.testing.assert_close(found.losses[i], losses, rtol=1e-8, atol=1e-8)
            for name, parameter in own.encoder.named_parameters():
                if name.endswith("in_proj_bias"):
                    # The gradient to the keys' bias is zero, which leaves Adam steps of round-off over eps.
                    continue
                torch.testing.assert_close(
                    found.parameters[name][i], parameter.detach(), rtol=1e-8, atol=1e-8, msg=name
                )


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("make", ENCODERS, ids=lambda make: make.__name__)
def test_encoders(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    compare(model_of(make()), torch.rand(3, 24))


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_transformer(batch_first: bool) -> None:
    torch.manual_seed(0)
    compare(model_of(attention(batch_first)), torch.rand(2, 24))


def test_a_condition_and_one_sample() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other, self.last = nn.Linear(24, 5), nn.Linear(2, 5), nn.Linear(5, 6)

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)) * torch.sigmoid(self.other(condition)))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 24)

        def forward(self, z: Tensor, condition: Tensor) -> Tensor:
            return self.layer(torch.cat([z, condition], 1))

    torch.manual_seed(0)
    model = VAE(Conditional(), Decoder(), "gaussian", latent_dim=3).double().eval()
    compare(model, torch.rand(3, 24), torch.rand(3, 2, dtype=torch.float64))
    compare(model, torch.rand(1, 24), torch.rand(1, 2, dtype=torch.float64))


def test_weights_that_change_between_calls() -> None:
    """What was read stays; its tensors are those of the moment."""
    torch.manual_seed(0)
    model = model_of(with_token())
    compare(model, torch.rand(2, 24))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    compare(model, torch.rand(2, 24))


def test_an_encoder_that_changes_is_read_again() -> None:
    torch.manual_seed(0)
    encoder = gates()
    model = model_of(encoder)
    compare(model, torch.rand(2, 24))
    encoder.a = nn.Sequential(nn.Linear(24, 24), nn.Tanh()).double()
    compare(model, torch.rand(2, 24))


def test_parameters_that_become_one() -> None:
    torch.manual_seed(0)
    parts = {"a": nn.Linear(24, 24), "b": nn.Linear(24, 24), "scale": weight(24)}
    encoder = Encoder(lambda m, x: m.scale * torch.tanh(m.b(torch.tanh(m.a(x)))), **parts)
    model = model_of(encoder)
    compare(model, torch.rand(2, 24))
    encoder.b.weight = encoder.a.weight
    compare(model, torch.rand(2, 24))


def test_images_in_another_order_of_memory() -> None:
    def forward(m: Encoder, x: Tensor) -> Tensor:
        return nn.functional.normalize(m.dense(x.flatten(1)), dim=1) * m.scale

    torch.manual_seed(0)
    encoder = Encoder(forward, dense=nn.Linear(24, 8), scale=weight(8))
    with torch.no_grad():
        encoder.eval()(torch.rand(2, 24))
    decoder = nn.Sequential(mlp(3, 8, 24), nn.Unflatten(1, (2, 3, 4)))
    model = VAE(encoder, decoder, "gaussian", latent_dim=3).double().eval()
    compare(model, torch.rand(4, 3, 2, 3).permute(3, 2, 1, 0))


def test_samples_that_depend_on_each_other_are_refused() -> None:
    torch.manual_seed(0)
    model = model_of(Encoder(lambda m, x: m.dense(x - x.mean(0)), dense=nn.Linear(24, 8)))
    with pytest.raises((ValueError, UnsupportedLayer)):
        ReadCopies(model, torch.rand(3, 24), Adam(1e-2, (0.9, 0.999), 0.0))


@pytest.mark.parametrize(("axis", "shape"), [((0, 1, 1), (3, 4)), ((0, 1, 2), (6, 4)), ((0, 2, 1), (6, 4)),
                                             ((1, 1, 1), (2, 3, 4)), ((1, 2, 2), (2, 12, 4))])  # fmt: skip
def test_where_the_samples_are(axis: tuple[int, int, int], shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    rows = rows_of(whole, Axis(*axis), 3)
    assert len(rows) == 3 and torch.equal(whole_of(rows, Axis(*axis)), whole)
    assert axis_of(whole, list(rows)) == axis


def test_values_without_an_axis_of_samples() -> None:
    assert axis_of(torch.ones(4, 4), [torch.ones(4, 4)] * 2) is None
    assert axis_of(torch.ones(4, 4), [torch.ones(2, 2)] * 2) is None
    assert axis_of(torch.arange(4.0), [torch.tensor([0.0, 2.0]), torch.tensor([3.0, 1.0])]) is None
    assert axis_of(3, [3, 3]) is None


def test_nothing_outlives_the_encoder() -> None:
    torch.manual_seed(0)
    encoder = gates()
    model = model_of(encoder)
    detector = LikelihoodRegret(model, num_steps=4, num_samples=2)
    detector.refit(torch.rand(2, 24))
    detector.refit(torch.rand(2, 24))
    read = read_encoder(model, torch.rand(2, 24, dtype=torch.float64))
    gone = [weakref.ref(encoder), weakref.ref(read.sweeps), weakref.ref(read.sweeps.program)]
    del encoder, model, detector, read
    gc.collect()
    assert [each() for each in gone] == [None, None, None]

"""fastvae.data: random affine views, flips, colour jitter, and what they are given."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastvae.data import ColorJitter, Compose, RandomAffine, RandomFlip, accepts_generator
from fastvae.influence.noise import KeyedNoise
from fastvae.noise import Stream, draws_of, keys_of

EACH = [RandomAffine(), RandomFlip(0.5, 0.5), ColorJitter(), Compose(RandomFlip(), RandomAffine())]
each_one = pytest.mark.parametrize("augment", EACH, ids=lambda augment: type(augment).__name__)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=seeded())


def blob(height: int, width: int, row: float, column: float) -> Tensor:
    """A smooth spot with its centre there, in pixels."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    return torch.exp(-((y - row) ** 2 + (x - column) ** 2) / 8)[None, None]


def centre(image: Tensor) -> tuple[float, float]:
    total = image.sum()
    y, x = torch.arange(image.shape[2])[:, None], torch.arange(image.shape[3])[None]
    return float((image[0, 0] * y).sum() / total), float((image[0, 0] * x).sum() / total)


@pytest.mark.parametrize("height, width", [(33, 33), (25, 41)])
def test_places_move_as_the_drawn_numbers_say(height: int, width: int) -> None:
    """A spot's centre goes to scale R(angle) (p - middle) + shift, in pixels whatever the aspect ratio."""
    augment = RandomAffine(degrees=40, translate=0.1, scale=(0.8, 1.2))
    middle = ((height - 1) / 2, (width - 1) / 2)
    for seed in range(8):
        offset = (4.0, -3.0)
        moved = augment(blob(height, width, middle[0] + offset[0], middle[1] + offset[1]), seeded(seed))
        angle, right, down, size = torch.rand(1, 4, generator=seeded(seed))[0].double().tolist()
        angle, size = math.radians(40) * (2 * angle - 1), 0.8 + 0.4 * size
        expected = (
            middle[0]
            + size * (math.sin(angle) * offset[1] + math.cos(angle) * offset[0])
            + 0.1 * (2 * down - 1) * height,
            middle[1]
            + size * (math.cos(angle) * offset[1] - math.sin(angle) * offset[0])
            + 0.1 * (2 * right - 1) * width,
        )
        assert centre(moved) == pytest.approx(expected, abs=0.02)


def test_no_motion_is_the_image_itself() -> None:
    x = images(4, 3, 9, 7)
    torch.testing.assert_close(RandomAffine(0, 0, (1, 1))(x), x, atol=2e-6, rtol=0)
    assert torch.equal(RandomFlip(0, 0)(x), x) and torch.equal(RandomFlip(1, 1)(x), x.flip(2, 3))
    torch.testing.assert_close(ColorJitter(0, 0, 0)(x), x)


def test_images_move_one_by_one() -> None:
    x = images(1, 1, 12, 12).expand(6, 1, 12, 12)
    for augment in (RandomAffine(), ColorJitter()):
        x = x.expand(6, 3 if isinstance(augment, ColorJitter) else 1, 12, 12)
        views = augment(x, seeded())
        assert all(not torch.equal(views[0], view) for view in views[1:])
    flipped = RandomFlip(0.5)(images(1, 1, 4, 4).expand(200, 1, 4, 4), seeded())
    assert 60 < int((flipped == flipped[0]).flatten(1).all(1).sum()) < 140


def test_colours_written_out() -> None:
    x = images(1, 3, 4, 5)
    b, c, s = (1 + 0.5 * (2 * torch.rand(1, 3, generator=seeded()) - 1))[0]
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    expected = x * b
    grey = (expected * weights).sum(1, keepdim=True).mean()
    expected = grey + c * (expected - grey)
    grey = (expected * weights).sum(1, keepdim=True)
    expected = (grey + s * (expected - grey)).clamp(0, 1)
    torch.testing.assert_close(ColorJitter(0.5, 0.5, 0.5)(x, seeded()), expected)


@each_one
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool], ids=str
)
def test_types_and_ranges(augment: object, dtype: torch.dtype) -> None:
    """The dtype comes back; integers are what the floats round to; nothing leaves the range."""
    x = images(5, 3, 8, 6)
    x = (
        (x * 255).round().to(torch.uint8)
        if dtype == torch.uint8
        else (x > 0.5)
        if dtype == torch.bool
        else x.to(dtype)
    )
    found = augment(x, seeded())
    assert found.shape == x.shape and found.dtype == dtype
    if dtype == torch.uint8:
        as_float = augment(x.float() / 255, seeded()) * 255
        assert float((found.float() - as_float).abs().max()) <= 0.501
    if dtype.is_floating_point:
        assert float(found.min()) >= 0 and float(found.max()) <= float(
            x.max() if augment is not EACH[2] else 1
        )
    assert augment(x[:0]).shape == (0, 3, 8, 6)


def test_ones_stay_ones() -> None:
    """Weights of an interpolation that sum to 1.0000001 would be refused by a likelihood."""
    views = RandomAffine(180, 0.2, (0.5, 2))(torch.ones(200, 1, 15, 15), seeded())
    assert float(views.max()) == 1 and float(views.min()) == 0


def test_nearest_keeps_binary_images_binary() -> None:
    x = images(20, 1, 9, 9).round()
    assert set(RandomAffine(interpolation="nearest")(x, seeded()).unique().tolist()) == {0.0, 1.0}
    assert len(RandomAffine()(x, seeded()).unique()) > 2


def test_nearest_takes_the_pixel_that_is_there() -> None:
    """Pixel by pixel: from a place in the view back to the image, and 0 from outside."""
    x = images(1, 1, 9, 9)
    augment = RandomAffine(30, 0.1, (0.8, 1.2), interpolation="nearest")
    for seed in range(4):
        angle, right, down, size = torch.rand(1, 4, generator=seeded(seed))[0].double().tolist()
        angle, size = math.radians(30) * (2 * angle - 1), 0.8 + 0.4 * size
        expected = torch.zeros_like(x)
        for row in range(9):
            for column in range(9):
                y, u = row - 4 - 0.9 * (2 * down - 1), column - 4 - 0.9 * (2 * right - 1)
                i = round(4 + (math.cos(angle) * y - math.sin(angle) * u) / size)
                j = round(4 + (math.sin(angle) * y + math.cos(angle) * u) / size)
                if 0 <= i < 9 and 0 <= j < 9:
                    expected[0, 0, row, column] = x[0, 0, i, j]
        assert torch.equal(augment(x, seeded(seed)), expected)


def test_flat_images() -> None:
    x = images(4, 3, 5, 6)
    for kind in (RandomAffine, RandomFlip, ColorJitter):
        flat = kind(shape=(3, 5, 6))(x.flatten(1), seeded())
        assert torch.equal(flat, kind()(x, seeded()).flatten(1))
        with pytest.raises(
            ValueError, match=rf"{kind.__name__}: x: .*\[4, 90\]; for flat images pass shape=\(C, H, W\)"
        ):
            kind()(x.flatten(1))
        with pytest.raises(ValueError, match=r"expected images of shape \(1, 5, 6\), got \[4, 90\]"):
            kind(shape=(1, 5, 6))(x.flatten(1))


@each_one
def test_a_generator_decides(augment: object) -> None:
    x = images(6, 3, 8, 8)
    first = augment(x, seeded())
    torch.manual_seed(9)
    assert torch.equal(augment(x, generator=seeded()), first) and not torch.equal(
        augment(x, seeded(4)), first
    )
    torch.manual_seed(5)
    without = augment(x)
    torch.manual_seed(5)
    assert torch.equal(augment(x), without)
    assert accepts_generator(augment)


def test_autocast_leaves_places_alone() -> None:
    x = images(4, 1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = RandomAffine()(x, seeded())
    torch.testing.assert_close(found, RandomAffine()(x, seeded()))


@each_one
def test_noise_can_be_keyed_by_sample(augment: object) -> None:
    """As TracIn asks: a sample's view does not depend on where it stands in a batch."""
    x = images(4, 3, 8, 8)

    def views(x: Tensor) -> Tensor:
        with KeyedNoise(Stream(draws_of(keys_of(x), 0, 1))):
            return augment(x)

    torch.testing.assert_close(views(x.flip(0)).flip(0), views(x))


def test_compose_and_what_takes_a_generator() -> None:
    augment = Compose(lambda x: x / 2, RandomFlip(1.0), torch.abs)
    x = images(3, 1, 4, 4)
    assert torch.equal(augment(x, seeded()), (x / 2).flip(3)) and "RandomFlip" in repr(augment)
    assert not accepts_generator(torch.abs) and not accepts_generator(lambda x: x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomAffine(degrees=-1), "RandomAffine: degrees: expected a finite number of at least 0"),
        (lambda: RandomAffine(translate=math.nan), "translate: expected a finite number"),
        (lambda: RandomAffine(scale=(0, 1)), "scale: expected two numbers 0 < low <= high"),
        (
            lambda: RandomAffine(interpolation="cubic"),
            "interpolation: expected 'bilinear' or 'nearest', got 'cubic'",
        ),
        (lambda: RandomFlip(1.5), "RandomFlip: horizontal: expected a probability, got 1.5"),
        (lambda: ColorJitter(contrast=2), r"ColorJitter: contrast: expected a number in \[0, 1\], got 2"),
        (lambda: ColorJitter()(images(2, 1, 4, 4)), "expected images of 3 channels, got 1"),
        (
            lambda: RandomAffine()(images(2, 1, 4, 4).long()),
            "expected floating, uint8 or bool images, got torch.int64",
        ),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_one
def test_views_on_cuda(augment: object) -> None:
    x = images(6, 3, 8, 8)
    found = augment(x.cuda(), seeded())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), augment(x, seeded()), atol=1e-4, rtol=0)

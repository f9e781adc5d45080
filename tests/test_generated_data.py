"""fastvae.data.three_dots and shapes: what their factors mean, seeds, and refusals."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from fastvae.data import FactorSpace, ImageDataset, shapes, three_dots
from fastvae.data.factors import FactorDataset

KINDS = [three_dots, shapes]


def centre_of_mass(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Column and row of the centre of mass of [N, H, W], in pixels from the left and upper border."""
    weights = weights.double()
    at = torch.arange(weights.shape[1]).double() + 0.5
    total = weights.sum((1, 2))
    return (weights.sum(1) * at).sum(1) / total, (weights.sum(2) * at).sum(1) / total


@pytest.mark.parametrize("make", KINDS)
def test_generated_images_are_a_data_set(make) -> None:  # type: ignore[no-untyped-def]
    before = torch.get_rng_state()
    data = make(50, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(data, ImageDataset) and data.images.dtype == torch.uint8
    assert data.images.shape == (50, 1, 64, 64) and data.factors.dtype == torch.int64
    assert data[4][0].shape == (1, 64, 64) and data.labels is None and "50 images of 1x64x64" in repr(data)
    assert torch.equal(data.images, make(50, seed=3).images)
    assert not torch.equal(data.factors, make(50, seed=4).factors)
    assert torch.equal(data.space.render(data.factors[7:9]), data.images[7:9])
    part, rest = data.split(30, 20)
    assert isinstance(part, FactorDataset) and isinstance(rest, FactorDataset)
    assert torch.equal(part.images, part.space.render(part.factors)) and len(rest.factors) == 20
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.space.render(again.factors), data.images)


@pytest.mark.parametrize("make", KINDS)
def test_factors_are_uniform(make) -> None:  # type: ignore[no-untyped-def]
    space = make(1).space
    factors = space.sample(20_000, torch.Generator().manual_seed(0))
    for column, size in zip(factors.T, space.sizes, strict=True):
        counts = torch.bincount(column, minlength=size).double()
        expected = 20_000 / size
        # Five standard deviations of a binomial count; about 200 of them are looked at.
        assert counts.shape == (size,) and float((counts - expected).abs().max()) < 5 * expected**0.5


@pytest.mark.parametrize(("size", "values", "share"), [(15, 40, 0.08), (64, 64, 0.08), (16, 64, 0.15)])
def test_one_dot_lies_where_its_factors_say(size: int, values: int, share: float) -> None:
    """All three dots at one place: its centre of mass, and its area where none of it leaves the image."""
    space = three_dots(1, size=size, values=values, radius=share).space
    grid = torch.cartesian_prod(torch.arange(0, values, 3), torch.arange(0, values, 3))
    black = 1 - space.render(grid.repeat(1, 3))[:, 0].double() / 255
    centre = grid.double() * (size / (values - 1))
    radius = share * size
    whole = ((centre > radius + 1) & (centre < size - radius - 1)).all(1)
    across, down = centre_of_mass(black[whole])
    # Edges are grey to first order only; a small dot is all edge.
    torch.testing.assert_close(across, centre[whole, 0], atol=0.1, rtol=0)
    torch.testing.assert_close(down, centre[whole, 1], atol=0.1, rtol=0)
    area = torch.full_like(across, torch.pi * radius**2)
    torch.testing.assert_close(black[whole].sum((1, 2)), area, atol=0, rtol=0.01 if size == 64 else 0.1)


def test_dots_overlap_as_a_union_and_look_alike() -> None:
    data = three_dots(40)
    one = [data.space.render(data.factors[:, 2 * dot : 2 * dot + 2].repeat(1, 3)) for dot in range(3)]
    assert torch.equal(data.images, torch.stack(one).amin(0))
    assert torch.equal(data.images, data.space.render(data.factors[:, [4, 5, 0, 1, 2, 3]]))


def test_shapes_follow_their_factors() -> None:
    space = shapes(1).space
    assert space.sizes == (3, 6, 40, 32, 32)
    factors = space.sample(400, torch.Generator().manual_seed(0))
    white = space.render(factors)[:, 0]
    assert set(white.unique().tolist()) == {0, 255}
    for border in (white[:, 0], white[:, -1], white[:, :, 0], white[:, :, -1]):
        assert int(border.max()) == 0, "no shape is cut off"
    # A heart's centre of mass is off its middle; pixels are whole.
    symmetric = factors[:, 0] < 2
    across, down = centre_of_mass(white[symmetric])
    for found, factor in ((across, factors[symmetric, 3]), (down, factors[symmetric, 4])):
        torch.testing.assert_close(found, 64 * (0.2 + 0.6 * factor.double() / 31), atol=0.6, rtol=0)
    still = factors[:40].clone()
    still[:, 2:] = torch.tensor([0, 16, 16])
    areas = [
        (space.render(torch.cat([torch.full((40, 1), kind), still[:, 1:]], 1)) > 0).double().sum((1, 2, 3))
        for kind in range(3)
    ]
    for kind, area in enumerate(areas):
        order = area[still[:, 1].argsort()]
        assert bool((order.diff() >= 0).all()), f"shape {kind} grows with its scale"
    # Half-way round, a square and an ellipse look as before; a heart does not.
    turned = torch.stack([still[0], still[0]])
    turned[:, 1] = 5
    turned[1, 2] = 20
    for kind, alike in ((0, True), (1, True), (2, False)):
        turned[:, 0] = kind
        first, second = space.render(turned).double() / 255
        # Rounding may move single pixels of an edge.
        assert (float((first - second).abs().sum()) <= 4) == alike


def test_rendering_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    space = three_dots(1).space
    factors = space.sample(7)
    whole = space.render(factors)
    monkeypatch.setattr("fastvae.data.factors._PIXELS_AT_ONCE", 2 * 64 * 64)
    assert torch.equal(space.render(factors), whole)
    assert space.render(factors[:0]).shape == (0, 1, 64, 64)


def test_refusals() -> None:
    space = three_dots(1, size=4, values=8).space
    with pytest.raises(ValueError, match="three_dots: values: expected at least 2, got 1"):
        three_dots(1, values=1)
    with pytest.raises(ValueError, match=r"three_dots: radius: expected a number in \(0, 0\.5\], got 0"):
        three_dots(1, radius=0)
    for make in KINDS:
        with pytest.raises(ValueError, match="num_images: expected at least 1, got 0"):
            make(0)
        with pytest.raises(ValueError, match="size: expected at least 2 pixels, got 1"):
            make(1, size=1)
    with pytest.raises(
        ValueError, match=r"three dots: factors: expected int64 \[N, 6\], got torch.int64 \[2, 5\]"
    ):
        space.render(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"int64 \[N, 6\], got torch.float32"):
        space.render(torch.zeros(2, 6))
    wrong = torch.zeros(3, 6, dtype=torch.int64)
    wrong[1, 3] = 8
    with pytest.raises(ValueError, match=r"y of dot 2 in 0\.\.7, got 8 in row 1"):
        space.render(wrong)
    with pytest.raises(ValueError, match="a name and a size of at least 1 for each factor"):
        FactorSpace("none", ("a",), (3, 2), (1, 1, 1), lambda factors: factors)

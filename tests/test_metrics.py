"""fastvae.metrics: scores of codes whose value is known, a slow loop, and how neighbourhoods are drawn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae.data import FactorSpace, three_dots
from fastvae.metrics import (
    codes_of,
    factor_information,
    local_codes,
    local_mig,
    local_modularity,
    mig,
    modularity,
)


def numbers(*sizes: int) -> FactorSpace:
    """Images that are nothing but their factors, as bytes."""
    names = tuple(f"factor {index}" for index in range(len(sizes)))
    return FactorSpace(
        "numbers", names, sizes, (1, 1, len(sizes)), lambda f: f.to(torch.uint8)[:, None, None]
    )


def read(x: Tensor) -> Tensor:
    """The factors of such an image."""
    return (255 * x).flatten(1)


def grid(*sizes: int) -> Tensor:
    """Every combination of the factors' values once."""
    return torch.tensor(list(itertools.product(*map(range, sizes))))


def rotated(values: Tensor) -> Tensor:
    """Two codes turned by 45 degrees against two factors."""
    return values.double() @ torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


# --- known values ------------------------------------------------------------------------------


def test_one_code_for_each_factor_scores_one() -> None:
    factors = grid(5, 4, 3)
    codes = torch.stack([-2.0 * factors[:, 1], 0.1 * factors[:, 0] + 3, factors[:, 2].float() ** 3], 1)
    for bins in (20, 60):
        assert mig(codes, factors, bins=bins) == pytest.approx(1, abs=1e-12)
        assert modularity(codes, factors, bins=bins) == pytest.approx(1, abs=1e-12)


def test_a_rotated_code_scores_low() -> None:
    factors = grid(16, 16)
    straight, turned = factors.double(), rotated(factors)
    assert mig(straight, factors, bins=5) == pytest.approx(
        float(factor_information(straight, factors, bins=5)[0][0, 0]) / math.log(16), rel=1e-12
    )
    # Both codes say as much about both factors, by symmetry.
    assert mig(turned, factors, bins=5) == pytest.approx(0, abs=0.02)
    assert modularity(turned, factors, bins=5) == pytest.approx(0, abs=0.1)
    assert modularity(straight, factors, bins=5) == pytest.approx(1, abs=1e-12)


def test_values_worked_out_by_hand() -> None:
    """Two binary factors. Code 0 is their sum, code 1 the first of them, code 2 a constant."""
    factors = grid(2, 2).repeat(3, 1)
    codes = torch.stack([factors.sum(1), factors[:, 0], torch.ones(12)], 1).float()
    information, entropy = factor_information(codes, factors, bins=3)
    one, half = math.log(2), 0.5 * math.log(2)
    expected = torch.tensor([[half, half], [one, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(information, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, torch.full((2,), one, dtype=torch.float64))
    assert mig(codes, factors, bins=3) == pytest.approx((0.5 + 0.5) / 2)
    # 1 - 1, 1 - 0, and nothing.
    assert modularity(codes, factors, bins=3) == pytest.approx((0 + 1 + 0) / 3)


def test_factors_that_do_not_vary_are_left_out() -> None:
    factors = grid(4, 4)
    codes = torch.stack([factors[:, 0], 2 * factors[:, 0] + factors[:, 1]], 1).double()
    still = torch.cat([factors, torch.full((16, 2), 3)], 1)
    for score in (mig, modularity):
        assert score(codes, still) == score(codes, factors)
        with pytest.raises(ValueError, match="factors: expected one that varies, got 2 constant ones"):
            score(codes, still[:, 2:])
    one = factors[:, :1]
    assert mig(codes[:, :1], one) == pytest.approx(1) and modularity(codes[:, :1], one) == 1


def test_constant_factors_can_be_counted_as_in_the_authors_code() -> None:
    """Their F - 1 is 3 with the two that stand still, and 1 without: 1 - b becomes 1 - b / 3."""
    factors = grid(4, 4)
    still = torch.cat([factors, torch.full((16, 2), 3)], 1)
    code = (2 * factors[:, :1] + factors[:, 1:]).double()
    information = factor_information(code, factors, bins=4)[0][0].square()
    ratio = float(information.min() / information.max())
    assert 0.05 < ratio < 0.95
    assert modularity(code, still, bins=4) == pytest.approx(1 - ratio, rel=1e-12)
    counted = modularity(code, still, bins=4, count_constant_factors=True)
    assert counted == pytest.approx(1 - ratio / 3, rel=1e-12)
    assert modularity(code, factors, bins=4, count_constant_factors=True) == modularity(code, factors, bins=4)
    # A code that says nothing is worth nothing, however many factors there are.
    assert modularity(torch.ones(16, 1), still, count_constant_factors=True) == 0


def test_bins_are_of_equal_width_and_hold_both_ends() -> None:
    codes = torch.tensor([[0.0], [0.19], [0.21], [0.99], [1.0]])
    factors = torch.tensor([[0], [0], [1], [2], [2]])
    information, entropy = factor_information(codes, factors, bins=5)
    assert float(information) == pytest.approx(float(entropy), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_independent_codes_have_the_bias_that_is_documented(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(0, 13, (5_000, 1), generator=generator)
    codes = torch.rand(5_000, 100, generator=generator).to(dtype)
    information, _ = factor_information(codes, factors, bins=5)
    # Chi-squared of 48 degrees of freedom over 2 N, averaged over 100 codes; four standard errors are 8%.
    assert float(information.mean()) == pytest.approx(4 * 12 / (2 * 5_000), rel=0.08)


def by_loops(codes: list[list[float]], factors: list[list[int]], bins: int) -> tuple[float, float]:
    """MIG and modularity, written down from their definitions."""
    n, d, f = len(codes), len(codes[0]), len(factors[0])

    def entropy(values: list[object]) -> float:
        shares = [values.count(value) / n for value in set(values)]
        return -sum(share * math.log(share) for share in shares)

    columns: list[list[object]] = []
    for i in range(d):
        column = [row[i] for row in codes]
        low, high = min(column), max(column)
        columns.append([min(bins - 1, int((value - low) / (high - low) * bins)) for value in column])
    targets: list[list[object]] = [[row[j] for row in factors] for j in range(f)]
    table = [
        [entropy(a) + entropy(b) - entropy(list(zip(a, b, strict=True))) for b in targets] for a in columns
    ]
    gaps = []
    for j in range(f):
        first, second = sorted((table[i][j] for i in range(d)), reverse=True)[:2]
        gaps.append((first - second) / entropy(targets[j]))
    scores = []
    for row in table:
        squares = sorted((value**2 for value in row), reverse=True)
        scores.append(1 - sum(squares[1:]) / (squares[0] * (f - 1)))
    return sum(gaps) / f, sum(scores) / d


@pytest.mark.parametrize(("n", "d", "bins"), [(40, 2, 5), (97, 4, 3)])
def test_against_loops(n: int, d: int, bins: int) -> None:
    generator = torch.Generator().manual_seed(n)
    factors = torch.randint(0, 6, (n, 3), generator=generator)
    codes = torch.randn(n, d, generator=generator).double() + factors[:, :1] * 0.7
    expected_mig, expected_modularity = by_loops(codes.tolist(), factors.tolist(), bins)
    assert mig(codes, factors, bins=bins) == pytest.approx(expected_mig, rel=1e-10)
    assert modularity(codes, factors, bins=bins) == pytest.approx(expected_modularity, rel=1e-10)


# --- neighbourhoods ----------------------------------------------------------------------------


def test_points_lie_around_a_centre_and_borders_cut_them_off() -> None:
    space = numbers(64, 9, 10, 1)
    widths = set()
    for codes, factors in local_codes(read, space, 0.1, num_points=2000, num_clusters=40, seed=1):
        torch.testing.assert_close(codes, factors.float())
        low, high = factors.aminmax(dim=0)
        assert bool((low >= 0).all()) and bool((high < torch.tensor(space.sizes)).all())
        # floor(6.4) on either side, floor(0.9), floor(1.0): all 13, 1 and 3 values, fewer at a border.
        width = (high - low + 1).tolist()
        assert 7 <= width[0] <= 13 and width[1] == 1 and 2 <= width[2] <= 3 and width[3] == 1
        if low[0] > 0 and high[0] < 63:
            assert width[0] == 13
        counts = torch.bincount(factors[:, 0] - low[0]).double()
        expected = 2000 / width[0]
        assert float((counts - expected).abs().max()) < 5 * expected**0.5
        widths.add(width[0])
    assert 13 in widths and min(widths) < 13


def test_all_values_at_rho_one() -> None:
    for _, factors in local_codes(read, numbers(6, 3), 1, num_points=500, num_clusters=3):
        assert [len(column.unique()) for column in factors.T] == [6, 3]


def test_factors_of_few_values_can_be_kept_still() -> None:
    """The authors' cutoff of 10: a factor of 9 values keeps the centre's, one of 10 does not."""
    space = numbers(64, 9, 10, 3)
    for _, factors in local_codes(read, space, 1, num_points=800, num_clusters=3, continuity_cutoff=10):
        assert [len(column.unique()) for column in factors.T] == [64, 1, 10, 1]
    options = {"num_points": 500, "num_clusters": 2, "continuity_cutoff": 10}
    pairs = list(local_codes(read, space, 1, **options))
    assert local_mig(read, space, 1, **options) == sum(mig(*pair, bins=5) for pair in pairs) / 2
    counted = local_modularity(read, space, 1, count_constant_factors=True, **options)
    assert counted == pytest.approx(
        sum(modularity(*pair, bins=5, count_constant_factors=True) for pair in pairs) / 2
    )
    # The points of the others are the same ones.
    (_, still), (_, free) = (
        next(local_codes(read, space, 0.5, num_points=50, continuity_cutoff=cutoff)) for cutoff in (10, 0)
    )
    assert torch.equal(still[:, [0, 2]], free[:, [0, 2]]) and not torch.equal(still, free)


def test_local_scores_of_known_encoders() -> None:
    space = numbers(64, 64)
    options = {"num_points": 4000, "num_clusters": 5}

    def bent(x: Tensor) -> Tensor:
        """Straight on one half of the first factor, rotated on the other half."""
        values = read(x)
        return torch.where(values[:, :1] < 32, values.double(), rotated(values))

    straight, turned = (
        local_mig(read, space, 0.1, **options),
        local_mig(lambda x: rotated(read(x)), space, **options),
    )
    # 13 values in 5 bins: log 5 of log 13 at most, and a gap without a second code. A border cuts that.
    assert 0.55 < straight < 0.85 and turned < 0.05
    assert turned < local_mig(bent, space, **options) < straight
    assert local_modularity(read, space, **options) == pytest.approx(1, abs=1e-3)
    assert local_modularity(lambda x: rotated(read(x)), space, **options) < 0.3
    pairs = list(local_codes(read, space, 0.1, **options))
    assert straight == sum(mig(*pair, bins=5) for pair in pairs) / 5


def test_a_seed_gives_the_same_points_to_every_model() -> None:
    space, before = numbers(30, 30), torch.get_rng_state()
    seen = [
        torch.cat([factors for _, factors in local_codes(model, space, 0.2, num_points=9, seed=seed)])
        for model, seed in ((read, 0), (lambda x: read(x)[:, :1] ** 2, 0), (read, 1))
    ]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_codes_of_a_model_are_its_means_in_eval_mode() -> None:
    space = three_dots(1, size=8).space
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 6))
    model = fastvae.VAE(encoder, nn.Linear(3, 64))
    factors = space.sample(1100, torch.Generator().manual_seed(0))
    codes = codes_of(model, space, factors)
    assert model.training and encoder[1].num_batches_tracked == 0
    model.eval()
    x = space.render(factors).float() / 255
    # Batches of another size: the order of float32 sums.
    torch.testing.assert_close(codes, model.encode(x)[0].detach(), rtol=1e-4, atol=1e-5)
    assert not codes.requires_grad and 0 <= local_mig(model, space, 0.2, num_points=50, num_clusters=2) <= 1


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 1).long(), r"codes: expected floating \[N, d\].*float32 \[3\]"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 1).long(), "codes: expected floating"),
        (torch.zeros(0, 2), torch.zeros(0, 1).long(), "not empty"),
        (torch.zeros(3, 2), torch.zeros(3, 1), r"factors: expected integers \[3, F\], got torch.float32"),
        (torch.zeros(3, 2), torch.zeros(4, 1).long(), r"factors: expected integers \[3, F\].*\[4, 1\]"),
        (
            torch.full((3, 2), math.nan),
            torch.zeros(3, 1).long(),
            "codes: expected finite values, got 6 others",
        ),
        (
            torch.zeros(3, 2),
            torch.tensor([[0], [-1], [0]]),
            "factors: expected integers of at least 0, got -1",
        ),
    ],
)
def test_what_cannot_be_scored(codes: Tensor, factors: Tensor, message: str) -> None:
    for score in (mig, modularity):
        with pytest.raises(ValueError, match=message):
            score(codes, factors)


def test_what_cannot_be_sampled() -> None:
    space = numbers(9, 1)
    for rho in (0.1, 0, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"rho: expected a number in \(0, 1\] that lets .* 9, 1 values"):
            local_codes(read, space, rho)
    with pytest.raises(ValueError, match="num_points: expected at least 1, got 0"):
        local_codes(read, space, 1, num_points=0)
    with pytest.raises(ValueError, match="continuity_cutoff: expected at least 0, got -1"):
        local_codes(read, space, 1, continuity_cutoff=-1)
    with pytest.raises(ValueError, match=r"continuity_cutoff: expected one of .* 9, 1 values.* got 10"):
        local_codes(read, space, 1, continuity_cutoff=10)
    with pytest.raises(ValueError, match=r"codes_of: model: expected codes \[4, d\], got \[4\]"):
        codes_of(lambda x: read(x)[:, 0], space, space.sample(4))
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        mig(torch.zeros(3, 1), torch.zeros(3, 1).long(), bins=0)

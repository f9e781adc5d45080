"""Likelihoods against torch.distributions, layouts, derivatives and error messages."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import distributions as D
from torch import nn

from fastvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, check_decoder, resolve

ALL: list[Likelihood] = [Bernoulli(), Gaussian(0.7), Categorical(5)]
IDS = ["bernoulli", "gaussian", "categorical"]


def make(likelihood: Likelihood, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    params = torch.randn(4, 2 * likelihood.values_per_element, 3, 3, generator=g, dtype=dtype) * 2
    x = torch.rand(4, 2, 3, 3, generator=g, dtype=dtype)
    if isinstance(likelihood, Bernoulli):
        x = x.round()
    return params, x


def test_bernoulli_agrees_with_torch_and_interpolates_linearly_in_x() -> None:
    params, x = make(Bernoulli())
    expected = D.Bernoulli(logits=params).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Bernoulli().log_prob(params, x), expected, rtol=1e-12, atol=0)
    half = Bernoulli().log_prob(params, torch.full_like(x, 0.5))
    both = Bernoulli().log_prob(params, torch.zeros_like(x)) + Bernoulli().log_prob(
        params, torch.ones_like(x)
    )
    torch.testing.assert_close(half, both / 2, rtol=1e-12, atol=0)


def test_bernoulli_is_exact_for_large_logits() -> None:
    a = torch.tensor([[-800.0, 800.0, 25.0, -25.0]], dtype=torch.float64)
    got = Bernoulli().log_prob(a, torch.tensor([[1.0, 0.0, 1.0, 1.0]]))
    expected = -800 - 800 - math.log1p(math.exp(-25)) - 25 - math.log1p(math.exp(-25))
    assert got.item() == pytest.approx(expected, rel=1e-15)


def test_gaussian_agrees_with_torch() -> None:
    params, x = make(Gaussian(0.7))
    expected = D.Normal(params, 0.7).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian(0.7).log_prob(params, x), expected, rtol=1e-12, atol=0)


def test_categorical_is_channel_major() -> None:
    likelihood = Categorical(5)
    params, x = make(likelihood)
    expected = torch.zeros(4, dtype=torch.float64)
    for c in range(2):
        for i in range(3):
            for j in range(3):
                logits = params[:, 5 * c : 5 * c + 5, i, j]
                expected += D.Categorical(logits=logits).log_prob(torch.round(4 * x[:, c, i, j]))
    torch.testing.assert_close(likelihood.log_prob(params, x), expected, rtol=1e-12, atol=0)
    last = params.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(likelihood.log_prob(last, x), expected, rtol=1e-12, atol=0)
    flat = params[:, :, 0, 0]
    corner = x[:, :, 0, 0]
    as_image = likelihood.log_prob(flat[:, :, None, None], corner[:, :, None, None])
    torch.testing.assert_close(likelihood.log_prob(flat, corner), as_image, rtol=1e-12, atol=0)


def test_categorical_reads_uint8_as_classes_and_floats_as_rounded() -> None:
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    params = torch.randn(1, 256, 16, 16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(Categorical().classes(x.to(dtype) / 255), x.long())
        assert torch.equal(
            Categorical().log_prob(params, x.to(dtype) / 255), Categorical().log_prob(params, x)
        )


@pytest.mark.parametrize("likelihood", ALL, ids=IDS)
def test_two_derivatives(likelihood: Likelihood) -> None:
    params, x = make(likelihood)
    params = params[:2, :, :1, :2].contiguous().requires_grad_()
    x = x[:2, :, :1, :2]
    assert torch.autograd.gradcheck(lambda p: likelihood.log_prob(p, x), (params,))
    assert torch.autograd.gradgradcheck(lambda p: likelihood.log_prob(p, x), (params,))


@pytest.mark.parametrize("likelihood", ALL[:2], ids=IDS[:2])
def test_derivative_in_x(likelihood: Likelihood) -> None:
    params, x = make(likelihood)
    assert torch.autograd.gradcheck(
        lambda p, y: likelihood.log_prob(p, y),
        (params[:2, :, :1, :1].clone().requires_grad_(), x[:2, :, :1, :1].clone().requires_grad_()),
    )


@pytest.mark.parametrize("likelihood", ALL, ids=IDS)
def test_mean_is_the_expectation_of_samples(likelihood: Likelihood) -> None:
    params, x = make(likelihood, torch.float32)
    mean = likelihood.mean(params)
    assert mean.shape == x.shape
    g = torch.Generator().manual_seed(1)
    draws = torch.stack([likelihood.sample(params, generator=g) for _ in range(2000)])
    assert draws.shape == (2000, *x.shape)
    # 72 elements: the largest of 72 standard normals stays below 4.5 with probability 0.9995.
    standard_error = draws.std(0).clamp(min=0.01) / math.sqrt(2000)
    assert ((draws.mean(0) - mean).abs() / standard_error).max() < 4.5
    again = likelihood.sample(params, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, draws[0])


@pytest.mark.parametrize("likelihood", ALL, ids=IDS)
def test_density_sums_to_one(likelihood: Likelihood) -> None:
    params = torch.randn(1, likelihood.values_per_element, dtype=torch.float64)
    if isinstance(likelihood, Gaussian):
        grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
        total = torch.trapezoid(likelihood.log_prob(params.expand(4001, 1), grid).exp(), grid[:, 0])
    else:
        n = 2 if isinstance(likelihood, Bernoulli) else likelihood.values_per_element
        grid = torch.linspace(0, 1, n, dtype=torch.float64)[:, None]
        total = likelihood.log_prob(params.expand(n, -1), grid).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("likelihood", ALL, ids=IDS)
def test_shapes_dtypes_and_half_precision(likelihood: Likelihood) -> None:
    params, x = make(likelihood, torch.float32)
    expected = likelihood.log_prob(params, x)
    assert expected.shape == (4,) and expected.dtype == torch.float32
    torch.testing.assert_close(likelihood.log_prob(params, x.flatten(1)), expected)
    torch.testing.assert_close(likelihood.log_prob(params, x.double()), expected)
    strided = params.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(likelihood.log_prob(strided, x), expected)
    assert likelihood.log_prob(params.bfloat16(), x).dtype == torch.float32
    assert likelihood.log_prob(params[:0], x[:0]).shape == (0,)
    byte = torch.randint(0, 5, x.shape, dtype=torch.uint8)
    scale = 4 if isinstance(likelihood, Categorical) else 255
    torch.testing.assert_close(likelihood.log_prob(params, byte), likelihood.log_prob(params, byte / scale))
    torch.testing.assert_close(likelihood.as_float(byte, torch.float32), byte / scale)
    torch.testing.assert_close(
        likelihood.log_prob(params, byte > 2), likelihood.log_prob(params, (byte > 2).float())
    )


def test_probabilities_of_a_sigmoid_decoder() -> None:
    logits, x = make(Bernoulli())
    likelihood = Bernoulli(probs=True)
    torch.testing.assert_close(
        likelihood.log_prob_of_output(torch.sigmoid(logits), x),
        likelihood.log_prob(logits, x),
        rtol=1e-12,
        atol=0,
    )
    # Saturated probabilities: the value stays finite, and so do both derivatives.
    p = torch.tensor([[0.0, 1.0, 1e-30, 0.5]], requires_grad=True)
    value = likelihood.log_prob_of_output(p, torch.tensor([[1.0, 0.0, 1.0, 1.0]]))
    (first,) = torch.autograd.grad(value.sum(), p, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), p)
    assert torch.isfinite(value).all() and torch.isfinite(first).all() and second.shape == p.shape
    assert first[0, 2].item() == pytest.approx(1e30, rel=1e-5)


def test_resolve_and_specs() -> None:
    assert (
        resolve("bernoulli") == Bernoulli()
        and resolve("gaussian") == Gaussian()
        and resolve("categorical").spec
    )
    assert [
        item.spec for item in (Bernoulli(), Bernoulli(probs=True), Gaussian(2), Gaussian(1e-3), Categorical())
    ] == [
        "bernoulli",
        "bernoulli",
        "gaussian 2.0",
        "gaussian 0.001",
        "categorical 256",
    ]
    own = Gaussian(0.1)
    assert resolve(own) is own
    assert pickle.loads(pickle.dumps(own)) == own and hash(own) == hash(Gaussian(0.1))
    with pytest.raises(ValueError, match=r"likelihood: expected one of.*'poisson'"):
        resolve("poisson")
    with pytest.raises(TypeError, match=r"likelihood: expected a name.*int"):
        resolve(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("likelihood", ALL, ids=IDS)
def test_errors_name_what_was_expected(likelihood: Likelihood) -> None:
    params, x = make(likelihood)
    with pytest.raises(ValueError, match="x: 12 elements a sample need"):
        likelihood.log_prob(params, x[:, :, :2])
    with pytest.raises(ValueError, match="expected 4 samples"):
        likelihood.log_prob(params, x[:3])
    if not isinstance(likelihood, Categorical):  # whose data integers are
        with pytest.raises(ValueError, match=r"expected uint8, bool or a floating dtype, got torch\.int64"):
            likelihood.log_prob(params, x.long())
        with pytest.raises(ValueError, match=r"expected uint8, bool or a floating dtype, got torch\.int64"):
            likelihood.check(x.long())
    broken = x.clone()
    broken[1, 0, 0, 0] = float("nan")
    broken[2, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="x holds 2 NaN or infinite value"):
        likelihood.check(broken)
    if isinstance(likelihood, Gaussian):
        likelihood.check(3 * x - 1)
    else:
        with pytest.raises(ValueError, match=r"expected values in \[0, 1\]"):
            likelihood.check(3 * x - 1)
    likelihood.check(x)
    likelihood.check(x[:0])


def test_categorical_and_gaussian_arguments() -> None:
    with pytest.raises(ValueError, match="scale: expected a finite number above 0, got 0"):
        Gaussian(0)
    with pytest.raises(ValueError, match="num_classes: expected an integer above 1"):
        Categorical(1)
    with pytest.raises(ValueError, match=r"expected \[B, C \* 5, \.\.\.\], got \[4, 6, 5\]"):
        Categorical(5).log_prob(torch.zeros(4, 6, 5), torch.zeros(4, 6))
    with pytest.raises(ValueError, match="a class has no gradient"):
        Categorical(5).log_prob(torch.zeros(4, 5), torch.zeros(4, 1, requires_grad=True))
    with pytest.raises(ValueError, match="expected classes below num_classes = 5, got 7"):
        Categorical(5).check(torch.full((2, 3), 7, dtype=torch.uint8))


def test_a_sigmoid_decoder_is_refused_by_the_plain_bernoulli() -> None:
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4))
    ending = nn.Sequential(plain, nn.Dropout(), nn.Sigmoid())
    network = check_decoder(plain, Bernoulli())
    assert network is not None and network.spec.startswith("linear 0 1;tanh")
    assert check_decoder(nn.Sequential(nn.Linear(2, 3), nn.Softmax(1)), Bernoulli()) is None
    check_decoder(ending, Bernoulli(probs=True))
    check_decoder(ending, Gaussian())
    with pytest.raises(ValueError, match=r"returns logits, and this one ends in a Sigmoid"):
        check_decoder(ending, Bernoulli())
    with pytest.raises(ValueError, match=r"Bernoulli\(probs=True\) expects a decoder that ends in a Sigmoid"):
        check_decoder(plain, Bernoulli(probs=True))
    # The check looks at the decoder in eval mode and leaves it as it was.
    assert all(module.training for module in ending.modules())

"""Decoders that return probabilities: found where the likelihood wants logits, and exact where it wants them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae import HVAE, VAE, ops, reference
from fastvae.decoding import check_decoder, natural_parameters
from fastvae.likelihoods import Bernoulli, Gaussian
from fastvae.sigmoids import SigmoidInputs, ending_of_module, ending_of_output

PIXELS = 12


def layers(*last: nn.Module) -> nn.Sequential:
    """What cannot be lowered, for its LayerNorm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, PIXELS), *last)


class Last(nn.Module):
    """Its last step is a function."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.last = layers(), last

    def forward(self, z: Tensor) -> Tensor:
        return self.last(self.inner(z))


class Branching(Last):
    """torch.fx cannot trace it."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) if bool((z == z).all()) else z


class Scaled(torch.autograd.Function):
    """A sigmoid of which autograd knows no name."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return torch.sigmoid(a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


SIGMOIDS: dict[str, Callable[[], nn.Module]] = {
    "the last of layers": lambda: layers(nn.Sigmoid()),
    "nested": lambda: nn.Sequential(layers(), nn.Sequential(nn.Sigmoid()), nn.Unflatten(1, (3, 4))),
    "torch.sigmoid": lambda: Last(torch.sigmoid),
    "F.sigmoid": lambda: Last(F.sigmoid),
    "expit": lambda: Last(torch.special.expit),
    "a method": lambda: Last(lambda h: h.sigmoid().view(-1, 3, 4).permute(0, 2, 1)),
    "a compiled module": lambda: torch.compile(layers(nn.Sigmoid()), backend="eager"),  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("build", SIGMOIDS.values(), ids=SIGMOIDS.keys())
def test_a_sigmoid_at_the_end_is_found_in_the_layers(build: Callable[[], nn.Module]) -> None:
    decoder = build()
    assert ending_of_module(decoder) == "sigmoid"
    with pytest.raises(
        ValueError, match=r"Bernoulli\(probs=False\) expects a decoder that returns logits, and this"
    ):
        VAE(nn.Linear(PIXELS, 4), decoder)
    check_decoder(decoder, Bernoulli(probs=True))
    check_decoder(decoder, Gaussian())


def test_a_sigmoid_at_the_end_is_found_in_the_graph_of_the_first_outputs() -> None:
    decoder = Branching(torch.sigmoid)
    assert ending_of_module(decoder) == "unknown"
    model = VAE(nn.Linear(PIXELS, 4), decoder)
    with pytest.raises(ValueError, match="this one ends in a Sigmoid"):
        model(torch.rand(3, PIXELS))


@pytest.mark.filterwarnings("ignore:.*cannot be lowered")
@pytest.mark.parametrize("op", ["flow", "log_px", "reference"])
def test_operators_refuse_it_where_the_decoder_is_not_lowered(op: str) -> None:
    decoder, x = layers(nn.Sigmoid()), torch.rand(3, PIXELS)
    z, alpha = torch.zeros(3, 2), torch.ones(2)
    calls: dict[str, Callable[[], object]] = {
        "flow": lambda: ops.hamiltonian_flow(decoder, z, z, x, 0.1, alpha, "bernoulli"),
        "log_px": lambda: ops.log_px(decoder, z[None], x, "bernoulli"),
        "reference": lambda: reference.hamiltonian_flow(decoder, z, z, x, 0.1, alpha, "bernoulli"),
    }
    with pytest.raises(ValueError, match="this one ends in a Sigmoid"):
        calls[op]()


def test_a_warning_once_where_nothing_tells() -> None:
    decoder = Branching(Scaled.apply)
    model = VAE(nn.Linear(PIXELS, 4), decoder)
    with pytest.warns(
        UserWarning, match=r"the first ones of this Branching are all in \[0, 1\]; if they are"
    ):
        model(torch.rand(3, PIXELS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.rand(3, PIXELS))
        VAE(nn.Linear(PIXELS, 4), decoder)(torch.rand(3, PIXELS))


@pytest.mark.parametrize(
    "build",
    [
        lambda: layers(),
        lambda: layers(nn.Unflatten(1, (3, 4))),
        lambda: Branching(lambda h: h.view(-1, 3, 4)),
        lambda: Branching(lambda h: 3 * h),
        lambda: Branching(lambda h: 0 * h),
        lambda: Last(lambda h: torch.sigmoid(h[:, :1]) * h),
    ],
)
def test_logits_pass_without_a_word(build: Callable[[], nn.Module]) -> None:
    model = VAE(nn.Linear(PIXELS, 4), build())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.rand(3, PIXELS)).sum().backward()
        with torch.no_grad():
            model(torch.rand(3, PIXELS))


def test_outputs_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match="decoder that returns probabilities, and this Last returned values"):
        VAE(nn.Linear(PIXELS, 4), Last(lambda h: 9 * h), Bernoulli(probs=True))(torch.rand(3, PIXELS))


def test_graphs_are_read_through_what_moves_values_only() -> None:
    a = torch.randn(2, 6, requires_grad=True)
    assert ending_of_output(torch.sigmoid(a).view(2, 3, 2).permute(0, 2, 1)[:, 1:]) == "sigmoid"
    assert ending_of_output(torch.sigmoid(a) + 1) == "unknown" and ending_of_output(a.detach()) == "unknown"
    assert ending_of_output(F.linear(a, torch.ones(3, 6), torch.zeros(3))) == "signed"


# ---- Bernoulli(probs=True) ----


class Logits(nn.Module):
    """A decoder that returns the sigmoid of its input, or what cannot be seen to be one."""

    def __init__(self, recoverable: bool = True) -> None:
        super().__init__()
        self.recoverable = recoverable

    def forward(self, z: Tensor) -> Tensor:
        p = torch.sigmoid(z)
        return p if self.recoverable else torch.where(p >= 0, p, -p)


def derivatives(log_px: Callable[[Tensor], Tensor], a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = a.clone().requires_grad_()
    value = log_px(a)
    (first,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    return value.detach(), first.detach(), second


def exactly(a: Tensor, x: float) -> tuple[Tensor, Tensor, Tensor]:
    return derivatives(lambda a: Bernoulli().log_prob(a, torch.full_like(a, x)), a.double())


@pytest.mark.parametrize("x", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("logit", [-800.0, -100.0, -87.0, -60.0, -44.0, -5.0, 0.0, 5.0, 16.5, 17.5, 60.0])
@pytest.mark.parametrize("route", ["reference", "model"])
def test_value_and_both_derivatives_are_those_of_the_logits(route: str, logit: float, x: float) -> None:
    decoder, likelihood = Logits(), Bernoulli(probs=True)
    a = torch.tensor([[logit]])
    data = torch.tensor([[x]])
    model = VAE(nn.Linear(1, 2), decoder, likelihood, latent_dim=1)

    def log_px(a: Tensor) -> Tensor:
        if route == "model":
            return model.log_px(a, data)
        return likelihood.log_prob(natural_parameters(decoder, a, likelihood), data)

    for found, expected in zip(derivatives(log_px, a), exactly(a, x), strict=True):
        # x a and log(1 + e^a) cancel in float32, as in Bernoulli() itself.
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("x", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("logit", [-86.0, -70.0, -50.0, -44.0, -20.0, -5.0, 0.0, 5.0])
def test_probabilities_alone_are_as_good_as_their_rounding(logit: float, x: float) -> None:
    likelihood, decoder = Bernoulli(probs=True), Logits(recoverable=False)
    data = torch.tensor([[x]])
    found = derivatives(
        lambda a: likelihood.log_prob(natural_parameters(decoder, a, likelihood), data),
        torch.tensor([[logit]]),
    )
    for mine, exact in zip(found, exactly(torch.tensor([[logit]]), x), strict=True):
        # 1 - p is a multiple of 6e-8 where p is near 1.
        torch.testing.assert_close(mine.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_probabilities_stay_finite(dtype: torch.dtype) -> None:
    a = torch.tensor([[-800.0, -300.0, -88.0, 16.5, 17.5, 40.0, 800.0]], dtype=dtype)
    likelihood, decoder = Bernoulli(probs=True), Logits(recoverable=False)
    for x in (torch.zeros_like(a), torch.ones_like(a)):
        for found in derivatives(
            lambda a, x=x: likelihood.log_prob(natural_parameters(decoder, a, likelihood), x), a
        ):
            assert torch.isfinite(found).all()
    near = likelihood.log_prob_of_output(torch.sigmoid(torch.tensor([[16.5]])), torch.zeros(1, 1))
    assert near.item() == pytest.approx(-16.5, abs=0.6)


@pytest.mark.filterwarnings("ignore:.*cannot be lowered")
def test_a_flow_through_probabilities_is_that_through_logits() -> None:
    logits, x = layers(), torch.rand(3, PIXELS).round()
    with torch.no_grad():
        logits[3].weight.mul_(40)
    ending = nn.Sequential(logits, nn.Sigmoid(), nn.Unflatten(1, (3, 4)))
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    found, expected = (
        ops.hamiltonian_flow(decoder, z, z, x, 0.05, torch.ones(3), likelihood)
        for decoder, likelihood in ((ending, Bernoulli(probs=True)), (logits, Bernoulli()))
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    model = HVAE(nn.Linear(PIXELS, 4), ending, Bernoulli(probs=True), num_steps=2)
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.decoder.parameters())  # type: ignore[arg-type]


def test_what_is_done_to_a_sigmoid_afterwards_counts() -> None:
    a = torch.linspace(-3, 3, 8).reshape(2, 4)

    def seen(call: Callable[[Tensor], Tensor]) -> Tensor | None:
        with SigmoidInputs() as inputs:
            output = call(a.clone())
        return inputs.logits_of(output)

    def halved(a: Tensor) -> Tensor:
        return torch.sigmoid(a).mul_(0.5)

    def cut(a: Tensor) -> Tensor:
        p = torch.sigmoid(a)
        p[0] = 0
        return p

    def through_a_view(a: Tensor) -> Tensor:
        p = torch.sigmoid(a)
        p.view(-1)[0] = 0
        return p

    def after_reading(a: Tensor) -> Tensor:
        p = torch.sigmoid(a)
        a.zero_()
        return p

    def in_place(a: Tensor) -> Tensor:
        return F.relu(torch.sigmoid(a), inplace=True)

    for call in (
        halved,
        cut,
        through_a_view,
        after_reading,
        in_place,
        lambda a: torch.sigmoid(a) * 1,
        torch.sigmoid_,
    ):
        assert seen(call) is None
    for call in (torch.sigmoid, F.sigmoid, nn.Sigmoid(), lambda a: (torch.sigmoid(a), torch.relu(a))[0]):
        found = seen(call)
        assert found is not None and torch.equal(found, a)
    moved = seen(lambda a: torch.sigmoid(a).view(2, 2, 2).transpose(1, 2)[:, 1:].flatten(1))
    assert moved is not None and torch.equal(moved, a.view(2, 2, 2).transpose(1, 2)[:, 1:].flatten(1))


def test_the_logits_are_also_found_under_torch_func_and_without_gradients() -> None:
    decoder, likelihood = Logits(), Bernoulli(probs=True)
    a = torch.tensor([[17.5], [-60.0]])

    def log_px(a: Tensor) -> Tensor:
        return likelihood.log_prob(natural_parameters(decoder, a[None], likelihood), torch.zeros(1, 1))[0]

    expected = torch.tensor([-17.5 - math.log1p(math.exp(-17.5)), 0.0])
    torch.testing.assert_close(torch.func.vmap(log_px)(a), expected)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(log_px))(a).flatten(), -torch.sigmoid(a).flatten()
    )
    with torch.inference_mode():
        torch.testing.assert_close(torch.stack([log_px(row) for row in a]), expected)

"""TracIn of HVAEs whose decoders are read and swept in PyTorch, against one sample's gradient at a time in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from influence_problems import images, mlp, scaled, tracin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from zoo import ZOO, Entry, is_installed, problem

from fastvae import likelihoods, reference
from fastvae.decoding import conditioned
from fastvae.influence import TracIn, UncoveredParameter
from fastvae.models import HVAE
from fastvae.models.observation import Observation
from fastvae.noise import Stream, draws_of, key_of_weights
from fastvae.private import twin_of

# Sums of the same numbers in another order: round-off alone.
FLOAT64 = 1e-10

QUICK = {"asserts-and-sizes", "resnet-batchnorm", "time-series"}
"""The others of the zoo are for the slow tests."""


def gradients_of(model: Any, x: Tensor, draws: int, *, key: int | None = None, **besides: Tensor) -> Tensor:
    """[B, S, P] of each draw of each sample alone, by autograd through the definition of the flow.

    ``key``: of the noise, if not that of the weights.
    """

    def flow(
        z: Tensor,
        rho: Tensor,
        x: Tensor,
        step: Tensor,
        alpha: Tensor,
        condition: Any = None,
        weight: Any = None,
    ) -> Any:
        decoder = conditioned(model.decoder, condition)
        return reference.hamiltonian_flow(decoder, z, rho, x, step, alpha, model.likelihood, weight=weight)

    twin = twin_of(model.eval(), flow=flow)
    key = key_of_weights(model) if key is None else key
    rows = []
    for i in range(len(x)):
        seen = Observation(x[i : i + 1], **{name: tensor[i : i + 1] for name, tensor in besides.items()})
        keys = draws_of(seen.keys ^ key, 0, draws)
        for noise in Stream(keys).normal((2, model.latent_dim)).to(torch.float64)[:, :, None]:
            loss = twin(seen.x.double(), noise=noise, **seen.given)
            found = torch.autograd.grad(
                loss.sum(), list(model.parameters()), materialize_grads=True, allow_unused=True
            )
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows).unflatten(0, (len(x), draws))


def agree(found: TracIn, model: nn.Module, x: Tensor, draws: int = 2, **besides: Tensor) -> None:
    """Scores of all against the first two, and with themselves."""
    g = gradients_of(model, x, draws, **besides).mean(1)
    expected, size = g[:2] @ g.T, float((g[:2] @ g.T).abs().max())
    queries = tuple(each[:2] for each in (x, *besides.values()))
    scores = found.influence(queries if besides else queries[0])
    torch.testing.assert_close(scores, expected, rtol=0, atol=FLOAT64 * size)
    torch.testing.assert_close(found.self_influence(), g.square().sum(1), rtol=FLOAT64, atol=0)


def ways(found: TracIn) -> dict[str, str]:
    return {row.name: f"{row.rule}, {row.route}" for row in found.coverage().rows}


def hvae(decoder: nn.Module, x: Tensor, latents: int, likelihood: Any = "bernoulli", **options: Any) -> HVAE:
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2 * latents))
    options = {"num_steps": 2, "step_size": 0.05, "latent_dim": latents} | options
    return HVAE(encoder, decoder, likelihood, **options).double().eval()


def decoders() -> list[Any]:
    return [
        pytest.param(
            entry,
            id=entry.name,
            marks=[
                *([] if entry.name in QUICK else [pytest.mark.slow]),
                *([pytest.mark.heavy] if entry.heavy else []),
                pytest.mark.skipif(not is_installed(entry), reason=f"{entry.package} is not installed"),
            ],
        )
        for entry in ZOO.values()
        if len(entry.code) == 1 and entry.condition is None
    ]


@pytest.mark.parametrize("entry", decoders())
def test_decoders_of_the_zoo(entry: Entry) -> None:
    p = problem(entry, batch=3)
    x = p.x.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hvae(p.decoder, x, entry.code[0], p.likelihood)
        found = tracin(model, x, num_samples=2, uncovered="error")
        agree(found, model, x)
    assert "sample by sample" not in str(found.coverage())


class Residual(nn.Module):
    """A residual decoder with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.inner = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.leave = nn.Linear(8, 6)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.enter(z))
        return self.leave(h + F.silu(self.inner(self.norm(h))))


class Tied(nn.Module):
    """One weight as it is, turned, and in a product; a bias of two layers; a weight in a linear layer and a window."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
        self.window = nn.Parameter(torch.randn(3, 3, 1))
        self.leave = nn.Linear(3, 6)
        self.never = nn.Linear(2, 2)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(F.linear(z, self.weight, self.bias))
        h = torch.tanh(F.linear(h, self.weight.T, self.bias) + h @ self.weight)
        h = F.conv1d(h[:, :, None], self.window)[:, :, 0] + F.linear(h, self.window[:, :, 0])
        return self.leave(h)


class Repeated(nn.Module):
    """Layers that run twice: all pairs of uses."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 6)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.enter(z))
        return self.leave(torch.tanh(self.inner(torch.tanh(self.inner(h)))))


class Tokens(nn.Module):
    """Parameters that a batch has a row of each, and steps before samples in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.start = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(1, 1, 3))
        self.mix, self.leave, self.scale = nn.Linear(3, 3), nn.Linear(3, 2), nn.Parameter(torch.randn(2))

    def forward(self, z: Tensor) -> Tensor:
        h = torch.cat([self.start.expand(len(z), -1, -1), z[:, None] * self.places], 1)
        h = torch.tanh(self.mix(h.transpose(0, 1)))
        return (self.leave(h.reshape(-1, 3)).view(5, len(z), 2) * self.scale).transpose(0, 1).flatten(1)


def weight_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 8)),
        nn.LayerNorm(8),
        nn.Softplus(),
        parametrizations.weight_norm(nn.Linear(8, 6)),
    )


OWN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "residual": (Residual, 6),
    "tied": (Tied, 6),
    "repeated": (Repeated, 6),
    "tokens": (Tokens, 10),
    "weight-norm": (weight_normed, 6),
}


def own(name: str, count: int = 5, **options: Any) -> tuple[HVAE, Tensor]:
    make, size = OWN[name]
    torch.manual_seed(0)
    x = images(count, size)
    return hvae(make(), x, 3, **options), x


@pytest.mark.parametrize("name", OWN)
@pytest.mark.filterwarnings("error")
def test_decoders_of_ones_own(name: str) -> None:
    model, x = own(name)
    found = tracin(model, x, num_samples=2)
    agree(found, model, x)


def test_coverage_says_which_way() -> None:
    found = ways(tracin(*own("tied"), num_samples=2))
    assert found["decoder.leave.weight"].startswith("Linear, ")
    assert "linear, matmul, by torch.vmap, tiles" in found["decoder.weight"]
    assert found["decoder.never.weight"] == "not used, tiles"
    found = ways(tracin(*own("residual"), num_samples=2))
    assert found["decoder.norm.weight"] == "Hamiltonian flow: layer_norm, by torch.vmap, tiles"
    # Two pairs at three forces of two draws.
    model, x = own("residual", 200)
    assert "gram, T = 12" in str(tracin(model.float(), x.float(), num_samples=2).coverage(1))
    assert ways(tracin(*own("repeated"), num_samples=2))["decoder.inner.weight"].startswith("Linear, ")
    found = ways(tracin(*own("weight-norm"), num_samples=2))
    assert ", linear, by torch.vmap" in found["decoder.0.parametrizations.weight.original0"]


@pytest.mark.parametrize(
    "step_size", [0.1, [0.05, 0.1, 0.02], [[0.05], [0.1]]], ids=["one", "latents", "steps"]
)
@pytest.mark.parametrize("tempering", ["free", "fixed"])
def test_parameters_of_the_flow(step_size: Any, tempering: str) -> None:
    step = torch.tensor(step_size) if isinstance(step_size, list) else step_size
    model, x = own("residual", step_size=step, tempering=tempering)
    agree(tracin(model, x, num_samples=2), model, x)


def test_draws_and_checkpoints() -> None:
    model, x = own("residual")
    found = tracin(model, x, num_samples=4)
    each = gradients_of(model, x, 4)
    unbiased = (each.sum(1).square().sum(1) - each.square().sum((1, 2))) / 12
    torch.testing.assert_close(found.self_influence(unbiased=True), unbiased, rtol=FLOAT64, atol=1e-12)
    scores, error = found.influence_with_error(x[:2])
    torch.testing.assert_close(scores, found.influence(x[:2]), check_dtype=False)
    assert bool((error > 0).all())
    both = TracIn(model, x, [1.0, 0.5], scaled, num_samples=2).influence(x[:2])
    alone = [TracIn(model, x, [factor], scaled, num_samples=2).influence(x[:2]) for factor in (1.0, 0.5)]
    torch.testing.assert_close(both, alone[0] + alone[1])


def test_layers_that_are_chosen_and_frozen() -> None:
    model, x = own("residual")
    model.decoder.enter.weight.requires_grad_(False)
    found = tracin(model, x, num_samples=2, layers=["decoder.enter", "decoder.norm"])
    g = gradients_of_some(model, x, ["decoder.enter.bias", "decoder.norm.weight", "decoder.norm.bias"])
    torch.testing.assert_close(found.influence(x[:2]), g[:2] @ g.T, rtol=FLOAT64, atol=1e-12)


def gradients_of_some(model: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    for parameter in model.parameters():
        parameter.requires_grad_()
    whole = gradients_of(model, x, 2).mean(1)
    sizes = [parameter.numel() for parameter in model.parameters()]
    parts = dict(zip([name for name, _ in model.named_parameters()], whole.split(sizes, 1), strict=True))
    return torch.cat([parts[name] for name in names], 1)


class Conditional(nn.Module):
    """A condition that is embedded, beside the codes and as a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Linear(2, 4), nn.Linear(2, 8)
        self.enter, self.leave = nn.Linear(7, 8), nn.Linear(8, 6)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        h = torch.tanh(self.enter(torch.cat([z, torch.tanh(self.embed(condition))], 1)))
        return self.leave(h * torch.sigmoid(self.table(condition)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.layer(torch.cat([x, condition], 1))


def test_conditions() -> None:
    torch.manual_seed(0)
    model = HVAE(Encoder(), Conditional(), num_steps=2, step_size=0.05, latent_dim=3).double()
    x, condition = images(5, 6), images(5, 2, seed=3)
    found = tracin(model, (x, condition), num_samples=2, condition=1)
    agree(found, model, x, condition=condition)


def test_weights_of_elements() -> None:
    model, x = own("residual")
    weight = (images(5, 6, seed=4) > 0.3).double()
    found = tracin(model, (x, weight), num_samples=2, weight=1)
    agree(found, model, x, weight=weight)


@pytest.mark.parametrize("kind", ["learned-scale", "student-t", "laplace"])
def test_likelihoods(kind: str) -> None:
    torch.manual_seed(0)
    likelihood, decoder = {
        "learned-scale": (likelihoods.Gaussian("learned"), Residual()),
        # Its kernels are for other operators than a flow: a chain of layers is read for it.
        "student-t": (likelihoods.StudentT(3.0, 0.5), mlp(3, 8, 6)),
        "laplace": (likelihoods.Laplace(0.5), Residual()),
    }[kind]
    x = images(5, 6)
    model = hvae(decoder, x, 3, likelihood)
    found = tracin(model, x, num_samples=2)
    agree(found, model, x)
    if kind == "learned-scale":
        assert "by torch.vmap" in ways(found)["likelihood.log_scale"]


class Outer(torch.autograd.Function):
    """A function of somebody's that torch.vmap cannot run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dy * weight, (dy * x).sum(0)


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.scale, self.leave = nn.Linear(3, 5), nn.Parameter(torch.randn(5)), nn.Linear(5, 6)

    def forward(self, z: Tensor) -> Tensor:
        return self.leave(torch.tanh(Outer.apply(torch.tanh(self.enter(z)), self.scale)))


def test_what_cannot_be_taken_apart_is_refused_or_materialised() -> None:
    torch.manual_seed(0)
    x = images(5, 6)
    model = hvae(Foreign(), x, 3)
    with pytest.raises(UncoveredParameter, match=r"decoder\.scale"):
        tracin(model, x, num_samples=2).influence(x[:2])
    found = tracin(model, x, num_samples=2, uncovered="materialise")
    agree(found, model, x)
    assert [name for name, way in ways(found).items() if "sample by sample" in way] == ["decoder.scale"]


def test_a_parameter_of_encoder_and_decoder() -> None:
    model, x = own("residual")
    model.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    model.encoder[0].bias = model.decoder.inner.bias
    with pytest.raises(UncoveredParameter, match="shared by"):
        tracin(model, x, num_samples=2)
    agree(tracin(model, x, num_samples=2, uncovered="materialise"), model, x)


def test_a_compiled_decoder() -> None:
    """Which has no length, unlike a Sequential: asked for one, as by bool(), it raises."""
    model, x = own("residual")
    model.decoder = torch.compile(model.decoder, backend="eager")
    found = tracin(model, x, num_samples=2)
    assert not any("sample by sample" in way for way in ways(found).values())
    model.decoder = model.decoder._orig_mod
    agree(found, model, x)


def test_a_latent_dimension_that_the_first_samples_tell() -> None:
    model, x = own("residual")
    model.latent_dim = None
    found = tracin(model, x, num_samples=2)
    model.latent_dim = 3
    agree(found, model, x)


def test_float32() -> None:
    model, x = own("residual")
    model, x = model.float(), x.float()
    found, key = tracin(model, x, num_samples=2).influence(x[:2]), key_of_weights(model)
    g = gradients_of(model.double(), x, 2, key=key).mean(1)
    expected = (g[:2] @ g.T).float()
    # Thirty times the round-off of a number: sums of some hundred products of what went through the decoder six times.
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6 * float(expected.abs().max()))


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_hooks_that_are_tracins_own() -> None:
    """A learned dispersion stands behind the decoder's outputs, so that its copy is part of something larger."""
    torch.manual_seed(0)
    x = torch.poisson(torch.full((6, 20), 3.0))
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 20))
    model = HVAE(nn.Linear(20, 4), decoder, likelihoods.NegativeBinomial("learned"), num_steps=2)
    assert tracin(model, x, num_samples=2).influence(x, k=2) is not None

"""jacobian_l1 by differences against quotients taken one by one in float64, and what their gradient is for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from decoders import DECODERS as PUBLIC
from flow_problems import Residual
from jacobian_problems import FLOAT32, FLOAT64, assert_close, gradients, on, problem
from test_conditions import CLASSES, Decoder
from test_penalties import DIM, MODELS, PIXELS, data, make, mlp, seeded
from torch import Tensor, nn

import fastvae
from fastvae import reference
from fastvae.lowering import CoupledSamples
from fastvae.models import BaseVAE
from fastvae.network import differences, jacobian
from fastvae.ops import jacobian_l1
from fastvae.penalties import JacobianL1

DIFFERENCE = 100 * FLOAT64
"""Cotangents are of size 1 / step, a hundred, and cancel where a gradient is zero (the last bias)."""

pytestmark = pytest.mark.usefixtures("one_thread")


def quotients(
    decoder: Callable[..., Tensor],
    z: Tensor,
    reduction: str = "mean",
    *,
    output: str = "identity",
    latents: Iterable[int] | None = None,
    p: int = 1,
    step: float = 1e-2,
    condition: Tensor | None = None,
) -> Tensor:
    """The definition, latent by latent."""
    given = () if condition is None else (condition,)

    def decode(z: Tensor) -> Tensor:
        y = decoder(z, *given).flatten(1)
        return torch.sigmoid(y) if output == "sigmoid" else y

    total = decode(z)[:, :0].sum(1)
    for latent in range(math.prod(z.shape[1:])) if latents is None else latents:
        moved = z.flatten(1).clone()
        moved[:, latent] += step
        total = total + ((decode(moved.view_as(z)) - decode(z)) / step).abs().pow(p).sum(1)
    return total if reduction == "none" else total.mean() if reduction == "mean" else total.sum()


def check(
    decoder: nn.Module, z: Tensor, device: torch.device, tolerance: float = DIFFERENCE, **options: Any
) -> None:
    expected = quotients(decoder, z, **options)
    wanted = gradients(expected, decoder, z)
    module, point = on(decoder, z, device, torch.float64 if tolerance == DIFFERENCE else torch.float32)
    if "condition" in options:
        options["condition"] = options["condition"].to(device)
    for function in (jacobian_l1, reference.jacobian_l1):
        if function is reference.jacobian_l1 and "condition" in options:
            continue
        actual = function(module, point, estimator="difference", **options)
        assert_close(actual, expected, tolerance, "value")
        for name, gradient in gradients(actual, module, point).items():
            assert_close(gradient, wanted[name], tolerance, name)
        with torch.no_grad():
            assert_close(function(module, point, estimator="difference", **options), expected, tolerance)


SIZES = {"whole": {}, "parts": {"at_once": 1}, "held": {"held": 0}, "parts held": {"at_once": 500, "held": 0}}


@pytest.fixture(params=SIZES)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All latents at once, or a few; held for the backward pass, or computed again."""
    chosen = SIZES[request.param]
    if "at_once" in chosen:
        monkeypatch.setattr(
            jacobian, "NUMBERS_AT_ONCE", {"cpu": chosen["at_once"], "cuda": chosen["at_once"]}
        )
    if "held" in chosen:
        monkeypatch.setattr(differences, "FEWEST_HELD", chosen["held"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("decoder", ["mlp", "wide"])
def test_options(decoder: str, reduction: str, sizes: None, device: torch.device) -> None:
    module, z = problem(decoder)
    for output, latents, p in (("identity", None, 1), ("sigmoid", [2, 0], 2), ("identity", [], 1)):
        check(module, z, device, reduction=reduction, p=p, output=output, latents=latents, step=0.03)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_conditions(reduction: str, sizes: None, device: torch.device) -> None:
    torch.manual_seed(0)
    decoder, labels = Decoder().double(), torch.arange(5) % CLASSES
    z = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    check(decoder, z, device, reduction=reduction, condition=labels)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_decoders(name: str, device: torch.device) -> None:
    """Lowered or not, parametrised, with parts that no rule knows."""
    module = PUBLIC[name].make()
    torch.manual_seed(1)
    z = torch.randn(3, PUBLIC[name].latent_dim, dtype=torch.float64, requires_grad=True)
    check(module, z, device, latents=[1, 3], reduction="none")


class Spatial(nn.Module):
    """A code that is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(2, 3, 3, stride=2)

    def forward(self, z: Tensor) -> Tensor:
        return torch.relu(self.layer(z))


class OneSize(nn.Module):
    """Made for one batch size, and written so that no reader takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, z: Tensor) -> Tensor:
        assert len(z) == 4 and float(z.detach().sum()) > -1e9
        return torch.relu(self.layer(z))


def test_codes_of_several_dimensions(device: torch.device) -> None:
    torch.manual_seed(2)
    z = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    check(Spatial().double(), z, device, latents=[0, 5])


@pytest.mark.filterwarnings("ignore:fastvae.ops.jacobian_l1")
def test_a_decoder_that_cannot_be_read(device: torch.device) -> None:
    check(*problem(OneSize()), device)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int, device: torch.device) -> None:
    for reduction in ("sum", "none"):
        check(*problem("mlp", batch=batch), device, reduction=reduction)


def test_float32(device: torch.device) -> None:
    """Quotients lose eps |y| / step = 6e-6 |y|, which a step of 0.1 makes a tenth of."""
    check(*problem("mlp"), device, tolerance=10 * FLOAT32, step=0.1)


def test_gradients_of_subsets_and_twice(sizes: None, device: torch.device) -> None:
    decoder, z = on(*problem("mlp"), device)
    decoder[0].weight.requires_grad_(False)
    for reduction in ("mean", "none"):
        value = jacobian_l1(decoder, z.detach(), reduction, estimator="difference").sum()
        wanted = quotients(decoder, z.detach(), reduction).sum()
        parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        expected = torch.autograd.grad(wanted, parameters)
        for _ in range(2):
            found = torch.autograd.grad(value, parameters, retain_graph=True)
            for a, b in zip(found, expected, strict=True):
                assert_close(a, b, DIFFERENCE)
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    assert not jacobian_l1(decoder, z.detach(), estimator="difference").requires_grad
    (again,) = torch.autograd.grad(jacobian_l1(decoder, z, "sum", estimator="difference"), z)
    assert_close(again, torch.autograd.grad(quotients(decoder, z, "sum"), z)[0], DIFFERENCE)
    value = jacobian_l1(decoder, z, "none", estimator="difference").sum()
    with pytest.raises(NotImplementedError, match=r"differentiable once.*reference.jacobian_l1"):
        torch.autograd.grad(torch.autograd.grad(value, z, create_graph=True)[0].sum(), z)


@pytest.mark.parametrize("module", [None, Residual(3, 4)], ids=["lowered", "not lowered"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction: str, module: nn.Module | None, device: torch.device) -> None:
    decoder, z = on(*problem(module or "conv"), device)

    def step(z: Tensor) -> Tensor:
        return jacobian_l1(decoder, 1.5 * z, reduction, output="sigmoid", estimator="difference")

    expected = step(z)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(z)
    assert_close(compiled, expected, DIFFERENCE)
    wanted = gradients(expected, decoder, z)
    for name, gradient in gradients(compiled, decoder, z).items():
        assert_close(gradient, wanted[name], DIFFERENCE, name)


def test_compile_with_a_dynamic_batch(device: torch.device) -> None:
    decoder, z = on(*problem("mlp", batch=6), device)

    def step(z: Tensor) -> Tensor:
        return jacobian_l1(decoder, z, estimator="difference")

    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (6, 4, 3):
            part = z.detach()[:batch].clone()
            assert_close(compiled(part), step(part), DIFFERENCE)


def test_autocast_and_inference_mode(device: torch.device) -> None:
    decoder, z = on(*problem("mlp"), device, torch.float32)
    expected = jacobian_l1(decoder, z, estimator="difference")
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(jacobian_l1(decoder, z, estimator="difference"), expected)
    with torch.inference_mode():
        assert_close(jacobian_l1(decoder, z.clone(), estimator="difference"), expected, FLOAT32)


@pytest.mark.parametrize("step", [0.0, -1e-2, math.nan, math.inf])
def test_a_step_that_is_none_raises(step: float) -> None:
    for function in (jacobian_l1, reference.jacobian_l1):
        with pytest.raises(ValueError, match="jacobian_l1: step: expected a positive finite number"):
            function(nn.Linear(3, 4), torch.zeros(2, 3), estimator="difference", step=step)
    with pytest.raises(ValueError, match="JacobianL1: step: expected a positive finite number"):
        JacobianL1(step=step)


def test_refusals() -> None:
    decoder, z = nn.Linear(3, 4), torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match="jacobian_l1: estimator: expected 'exact' or 'difference', got 'best'"
    ):
        jacobian_l1(decoder, z, estimator="best")
    with pytest.raises(TypeError, match="jacobian_l1: step: expected a number"):
        jacobian_l1(decoder, z, estimator="difference", step="long")  # type: ignore[arg-type]
    with pytest.raises(CoupledSamples):
        jacobian_l1(nn.Sequential(decoder, nn.BatchNorm1d(4)), z, estimator="difference")
    with pytest.raises(ValueError, match="'sigmoid' expects a decoder that returns logits"):
        jacobian_l1(nn.Sequential(decoder, nn.Sigmoid()), z, output="sigmoid", estimator="difference")
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        torch.func.grad(lambda z: jacobian_l1(decoder, z, estimator="difference"))(z)


def test_what_moving_a_kink_does_is_in_the_gradient_of_differences_alone() -> None:
    """y = relu(w z + b), z standard normal: the mean of |dy/dz| is w Phi(b / w), and so its derivatives are known."""
    decoder = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).double()
    w, b = 0.8, 0.3
    with torch.no_grad():
        decoder[0].weight.fill_(w)
        decoder[0].bias.fill_(b)
    z = torch.linspace(-8, 8, 400_001, dtype=torch.float64)[:, None]
    density = torch.exp(-(z[:, 0] ** 2) / 2) / math.sqrt(2 * math.pi) * (z[1, 0] - z[0, 0])

    def derivatives(**options: Any) -> list[float]:
        mean = (jacobian_l1(decoder, z, "none", **options) * density).sum()
        return [float(g) for g in torch.autograd.grad(mean, decoder.parameters(), materialize_grads=True)]

    at, phi = b / w, math.exp(-((b / w) ** 2) / 2) / math.sqrt(2 * math.pi)
    inside = 0.5 * (1 + math.erf(at / math.sqrt(2)))
    assert derivatives() == pytest.approx([inside, 0], abs=1e-4)
    # The bias of forward differences is of first order in the step.
    assert derivatives(estimator="difference") == pytest.approx([inside - at * phi, phi], abs=1e-2)
    assert derivatives(estimator="difference", step=1e-3) == pytest.approx([inside - at * phi, phi], abs=2e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_penalty(kind: type[BaseVAE]) -> None:
    penalty = JacobianL1(0.3, estimator="difference", step=0.05)
    model, plain = make(kind, penalties=[penalty]).double(), make(kind).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = data(dtype=torch.float64)
    seen: list[Tensor] = []
    penalty.register_forward_hook(lambda module, args, out: seen.append((args[0].z.detach(), out)))  # type: ignore[arg-type]
    loss = model(x, generator=seeded())
    z, value = seen[0]
    expected = 0.3 * quotients(model.decoder, z, "none", output="sigmoid", step=0.05)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(loss, plain(x, generator=seeded()) + value, rtol=1e-11, atol=1e-11)
    loss.sum().backward()
    assert "estimator='difference', step=0.05" in repr(penalty)


def test_model_passes_its_estimator_on() -> None:
    model = fastvae.JacobianL1VAE(
        mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), gamma=0.3, estimator="difference", step=0.1
    )
    (penalty,) = model.penalties
    assert penalty.estimator == "difference" and penalty.difference_step == 0.1
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), data()
    noise = model.draw_noise(model.encode(x)[0], seeded())
    torch.testing.assert_close(compiled(x, noise=noise), model(x, noise=noise))

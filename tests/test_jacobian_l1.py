"""jacobian_l1 against torch.func.jacfwd in float64: values and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoders import DECODERS as PUBLIC
from flow_problems import ACTIVATIONS, Residual
from jacobian_problems import DECODERS, FLOAT32, FLOAT64, assert_close, gradients, on, oracle, problem, wide
from torch import Tensor, nn

from fastvae import ops, reference
from fastvae.ops import jacobian_l1


def check(
    decoder: nn.Module,
    z: Tensor,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    reduction: str = "mean",
    **options: Any,
) -> None:
    expected = oracle(decoder, z, reduction, **options)
    wanted = gradients(expected, decoder, z)
    module, point = on(decoder, z, torch.device(device), dtype)
    actual = jacobian_l1(module, point, reduction, **options)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert actual.dtype == dtype
    assert_close(actual, expected, tolerance, "value")
    for name, gradient in gradients(actual, module, point).items():
        assert_close(gradient, wanted[name], tolerance, name)
    with torch.no_grad():
        assert_close(jacobian_l1(module, point, reduction, **options), expected, tolerance, "value alone")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("output", ["identity", "sigmoid"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("decoder", ["mlp", "conv"])
def test_every_activation(
    decoder: str, activation: str, output: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(3)
    check(*problem(DECODERS[decoder](ACTIVATIONS[activation])), device, dtype, output=output)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("latents", [None, [2, 0], []], ids=["all", "two", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("decoder", ["mlp", "wide"])
def test_options(
    decoder: str, reduction: str, latents: list[int] | None, p: int, device: torch.device
) -> None:
    for output in ("identity", "sigmoid"):
        check(*problem(decoder), device, reduction=reduction, latents=latents, p=p, output=output)


@pytest.mark.parametrize("name", [name for name, case in PUBLIC.items() if case.lowered])
def test_public_decoders(name: str, device: torch.device) -> None:
    """With sigmoids at the end, parametrisations, BatchNorm in eval mode, and a view in front."""
    module = PUBLIC[name].make()
    torch.manual_seed(1)
    check(
        module,
        torch.randn(3, PUBLIC[name].latent_dim, dtype=torch.float64, requires_grad=True),
        device,
        latents=[1, 3],
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_at_the_end(activation: str, device: torch.device) -> None:
    check(
        *problem(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), ACTIVATIONS[activation]())),
        device,
    )


ODD: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: nn.Sequential(nn.Linear(3, 5)),
    "one layer, sigmoid": lambda: nn.Sequential(nn.Linear(3, 5), nn.Sigmoid()),
    "an activation alone": lambda: nn.Sequential(nn.Tanh()),
    "an activation in front": lambda: nn.Sequential(nn.Softplus(), nn.Linear(3, 5), nn.ELU()),
    "two activations": lambda: nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.SiLU(), nn.Linear(5, 4), nn.GELU()
    ),
    "curved, then linear": lambda: nn.Sequential(
        nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.LeakyReLU()
    ),
    "a BatchNorm at both ends": lambda: nn.Sequential(
        nn.BatchNorm1d(3), nn.Linear(3, 6), nn.Tanh(), nn.BatchNorm1d(6)
    ),
    "no bias": lambda: nn.Sequential(nn.Linear(3, 6, bias=False), nn.SiLU(), nn.Linear(6, 5, bias=False)),
    "wide in float64": lambda: wide(nn.Softplus, outputs=1),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_chains(name: str, device: torch.device) -> None:
    for p in (1, 2):
        check(*problem(ODD[name]()), device, p=p, output="identity" if "sigmoid" in name else "sigmoid")


def test_wide_layers_in_float32(device: torch.device) -> None:
    for outputs in (1, 3, 10):
        torch.manual_seed(2)
        check(*problem(wide(nn.Tanh, outputs), batch=2), device, torch.float32)


def test_blocks_of_columns_and_tiles(device: torch.device) -> None:
    """A last layer and hidden layers so large that columns, samples and latents are taken in parts."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(70, 9), nn.Softplus(), nn.Linear(9, 40_000)).double()
    check(decoder, torch.randn(3, 70, dtype=torch.float64, requires_grad=True), device)
    decoder = nn.Sequential(
        nn.Linear(9, 60_000), nn.Tanh(), nn.Unflatten(1, (4, 3000, 5)), nn.Conv2d(4, 1, 3, stride=3)
    ).double()
    check(decoder, torch.randn(3, 9, dtype=torch.float64, requires_grad=True), device, reduction="none")


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_small_batches(reduction: str, batch: int, device: torch.device) -> None:
    decoder, z = on(*problem("wide", batch=5), device)
    part = z.detach()[:batch].clone().requires_grad_()
    value = jacobian_l1(decoder, part, reduction)
    whole = jacobian_l1(decoder, z, "none")[:batch]
    expected = whole if reduction == "none" else whole.mean() if reduction == "mean" else whole.sum()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    for name, gradient in gradients(value, decoder, part).items():
        assert batch or not gradient.any(), f"{name}: no samples, no gradient"


@pytest.mark.parametrize(
    "names", [["z"], ["0.weight"], ["4.bias"], ["2.weight", "2.bias"], ["4.weight", "z"]]
)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_subsets_of_gradients(
    activation: Callable[[], nn.Module], names: list[str], device: torch.device
) -> None:
    decoder, z = on(*problem(DECODERS["mlp"](activation)), device)
    for output in ("identity", "sigmoid"):
        full = gradients(jacobian_l1(decoder, z, output=output), decoder, z)
        leaves = {"z": z, **dict(decoder.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in names)
        part = gradients(jacobian_l1(decoder, z, output=output), decoder, z)
        assert set(part) == set(names)
        for name, gradient in part.items():
            assert_close(gradient, full[name], 1e-13, name)
        for leaf in leaves.values():
            leaf.requires_grad_()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str, device: torch.device) -> None:
    decoder, z = on(*problem(batch=2), device)

    def run(*_: Tensor) -> Tensor:  # gradcheck perturbs the leaves in place
        return jacobian_l1(decoder, z, reduction, output="sigmoid", p=2)

    assert torch.autograd.gradcheck(run, (z, *decoder.parameters()))


def test_tied_parameters(device: torch.device) -> None:
    first = nn.Linear(3, 3)
    check(*problem(nn.Sequential(first, nn.Tanh(), first, nn.SiLU(), nn.Linear(3, 5))), device)


def test_reference_takes_any_decoder(device: torch.device) -> None:
    decoder, z = on(*problem(Residual(3, 5)), device)
    for p in (1, 2):
        value = reference.jacobian_l1(decoder, z, output="sigmoid", latents=[1, 2], p=p)
        expected = oracle(decoder, z, output="sigmoid", latents=[1, 2], p=p)
        assert_close(value, expected, FLOAT64)
        wanted = gradients(expected, decoder, z)
        for name, gradient in gradients(value, decoder, z).items():
            assert_close(gradient, wanted[name], FLOAT64, name)
    assert torch.autograd.gradgradcheck(
        lambda z: reference.jacobian_l1(decoder, z, output="sigmoid", p=2), (z,)
    )
    assert ops.jacobian_l1 is jacobian_l1

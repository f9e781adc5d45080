"""Convolutions of every geometry: what PyTorch refuses is refused by name, what it takes is right."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvae
from fastvae import ops, reference
from fastvae.lowering import explain, lower
from fastvae.lowering.errors import ImpossibleLayer

raw: Any = torch.ops.fastvae

CONVOLUTIONS = {"conv2d": nn.Conv2d, "conv_transpose2d": nn.ConvTranspose2d}
# Below and above each limit. The numbers of both axes are drawn apart.
KERNELS, STRIDES, PADDINGS = (0, 1, 2, 3, 5), (-2, 0, 1, 2, 3, 70), (-1, 0, 1, 2)
EXTRAS, DILATIONS = (-1, 0, 1, 2), (-1, 0, 1, 2, 3)


def draw(kind: str, legal: bool) -> dict[str, Any]:
    """Arguments of a convolution; legal alone, or anything."""

    def pair(values: tuple[int, ...], least: int) -> tuple[int, ...]:
        return tuple(random.choices([value for value in values if not legal or value >= least], k=2))

    numbers = {
        "kernel_size": pair(KERNELS, 1),
        "stride": pair(STRIDES, 1),
        "padding": pair(PADDINGS, 0),
        "dilation": pair(DILATIONS, 1),
    }
    return {**numbers, "output_padding": pair(EXTRAS, 0)} if kind == "conv_transpose2d" else numbers


def layer(kind: str, numbers: dict[str, Any]) -> nn.Module:
    """With channels for each of the routes that transposed convolutions take on a CPU."""
    groups, channels = random.choice(((1, (4, 2)), (1, (4, 8)), (1, (8, 4)), (1, (2, 5)), (2, (4, 6))))
    return CONVOLUTIONS[kind](*channels, groups=groups, bias=random.random() < 0.5, **numbers)


def outputs_or_none(module: Callable[[Tensor], Tensor], z: Tensor) -> Tensor | None:
    try:
        return module(z)
    except RuntimeError:
        return None


def gradients(function: Any, decoder: nn.Module, z: Tensor, x: Tensor) -> list[Tensor]:
    alpha = torch.full((1,), 0.9, dtype=z.dtype)
    leaves = [z, *decoder.parameters()]
    z_K, rho_K, log_px = function(decoder, z, z.detach().flip(0), x, 0.05, alpha, fastvae.Gaussian(0.7))
    found = torch.autograd.grad((z_K.sin() + rho_K.square()).sum() + log_px.sum(), leaves, allow_unused=True)
    return [
        z_K.detach(),
        rho_K.detach(),
        log_px.detach(),
        *(g if g is not None else torch.zeros_like(p) for g, p in zip(found, leaves, strict=True)),
    ]


# A kernel of size 0 makes an empty weight.
no_warning_of_empty_weights = pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors:UserWarning"
)


@no_warning_of_empty_weights
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_geometry_is_right_or_refused(kind: str) -> None:
    ended = {"right": 0, "refused": 0}
    for seed in range(300):
        random.seed(seed)
        torch.manual_seed(seed)
        numbers = draw(kind, legal=seed % 3 > 0)
        convolution = layer(kind, numbers)
        shape = (convolution.in_channels, *random.choices((1, 2, 3, 5), k=2))
        decoder = nn.Sequential(
            nn.Linear(2, torch.Size(shape).numel()), nn.Unflatten(1, shape), convolution, nn.Flatten()
        ).double()
        z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        outputs = outputs_or_none(decoder, z)
        if outputs is None:
            with pytest.raises(ImpossibleLayer, match=r"layer '2' \(Conv"):
                ops.jacobian_l1(decoder, z)
            ended["refused"] += 1
            continue
        x = torch.rand_like(outputs).detach()
        wanted = gradients(reference.hamiltonian_flow, decoder, z, x)
        for found, expected in zip(gradients(ops.hamiltonian_flow, decoder, z, x), wanted, strict=True):
            assert (found - expected).norm() <= 1e-10 * max(1.0, float(expected.norm())), (numbers, shape)
        ended["right"] += 1
    assert min(ended.values()) > 50, ended


BAD = {
    "stride": {"stride": 0},
    "a negative stride": {"stride": (1, -2)},
    "padding": {"padding": -1},
    "dilation": {"dilation": 0},
    "kernel_size": {"kernel_size": (2, 0)},
    "a stride that is no integer": {"stride": 1.5},
    "an empty output": {"kernel_size": 9},
}


@no_warning_of_empty_weights
@pytest.mark.parametrize("name", BAD)
def test_lowering_names_the_layer(name: str) -> None:
    decoder = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, **{"kernel_size": 1, **BAD[name]}))
    with pytest.raises(RuntimeError if name != "a stride that is no integer" else TypeError):
        decoder(torch.rand(1, 4))
    with pytest.raises(ImpossibleLayer, match=r"lower: layer '1' \(Conv2d\): "):
        lower(decoder)
    with pytest.raises(ImpossibleLayer, match=r"layer '1' \(Conv2d\): "):
        ops.log_px(decoder, torch.zeros(1, 1, 4), torch.zeros(1, 4))
    assert "PyTorch raises as well" in explain(decoder)


def test_output_padding_is_below_stride_or_dilation() -> None:
    def decoder(**numbers: int) -> nn.Module:
        return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 1, 2, **numbers))

    with pytest.raises(ImpossibleLayer, match="output_padding must be smaller than stride or dilation"):
        lower(decoder(stride=2, output_padding=2))
    assert " 2 2 1 1 1" in lower(decoder(output_padding=2, dilation=3, stride=1)).spec.replace("3 3", "1 1")


@no_warning_of_empty_weights
def test_what_is_only_too_large_for_the_kernels_runs_by_autograd() -> None:
    decoder = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1, stride=2**21))
    z = torch.randn(2, 4)
    with pytest.warns(UserWarning, match="numbers beyond 1048576"):
        found = ops.log_px(decoder, z[None], torch.zeros(2, 3))
    torch.testing.assert_close(found[0], fastvae.Bernoulli().log_prob(decoder(z), torch.zeros(2, 3)))
    with pytest.warns(UserWarning, match="is empty"):
        assert ops.log_px(nn.Linear(4, 0), z[None], torch.zeros(2, 0)).tolist() == [[0.0, 0.0]]


# --- the raw operators, which read the same from text ------------------------------------------

NUMBERS = {
    "conv2d": "{stride} 1 {padding} 0 {dilation} 1 1",
    "conv_transpose2d": "{stride} 1 {padding} 0 {output_padding} 0 {dilation} 1 1",
}
GOOD = {"stride": "1", "padding": "0", "output_padding": "0", "dilation": "1"}
NEVER = ("-1", "-2", "1048577", "9223372036854775807", "99999999999999999999", "1.5", "nan", "0x1", "")


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name", GOOD)
def test_the_parser_checks_every_number(kind: str, name: str) -> None:
    z, weight = torch.rand(2, 4), torch.rand(1, 1, 2, 2)

    def spec(value: str) -> str:
        return f"reshape 1 2 2;{kind} 0 -1 " + NUMBERS[kind].format_map({**GOOD, name: value})

    def refused(spec: str) -> None:
        with pytest.raises(ValueError, match="fastvae::jacobian_l1: network: "):
            raw.jacobian_l1(z, [weight], spec, [0], 1, "sum")
        with pytest.raises(ValueError, match="fastvae::log_px: network: "):
            raw.log_px(z[None], torch.zeros(2, 1), [weight], spec, "bernoulli")

    if f"{{{name}}}" not in NUMBERS[kind]:
        return
    for value in NEVER:
        refused(spec(value))
    function = {"conv2d": F.conv2d, "conv_transpose2d": F.conv_transpose2d}[kind]
    for value in ("0", "1", "2"):
        pair = (int(value), 0 if "padding" in name else 1)
        outputs = outputs_or_none(
            lambda h, pair=pair: function(h, weight, **{name: pair}), z.view(2, 1, 2, 2)
        )
        if outputs is None:
            refused(spec(value))
        else:
            x = torch.rand(2, outputs[0].numel())
            found = raw.log_px(z[None], x, [weight], spec(value), "bernoulli")[0]
            torch.testing.assert_close(found, fastvae.Bernoulli().log_prob(outputs, x))


@pytest.mark.parametrize(
    "spec",
    [
        "reshape -1 -1",
        "reshape 0 4",
        "reshape -2 -2",
        "reshape 4294967296 4294967296 4294967296",
        "reshape",
        "reshape 1 2 2 1",
        "linear 0",
        "linear 1 -1",
        "linear 0 -2",
        "linear 0 7",
        "linear 0 -1 3",
        "linear 2 -1",
        "relu 1",
        "elu",
        "elu 1e999",
        "leaky_relu nan",
        "softplus 1",
        "softplus inf 20",
        "batch_norm -1 -1 -1 -1 1e-5",
        "reshape 1 2 2;conv2d 1 -1 1 1 0 0 1 1 0",
        "reshape 1 2 2;conv2d 1 -1 1 1 0 0 1 1 -1",
        "reshape 1 2 2;conv2d 1 -1 1 1 0 0 1 1 9223372036854775807",
        "reshape 1 2 2;conv_transpose2d 1 -1 1048576 1048576 0 0 0 0 1 1 1;" * 3 + "relu",
    ],
)
def test_malformed_programs_are_refused(spec: str) -> None:
    tensors = [torch.rand(3, 4), torch.rand(1, 1, 2, 2), torch.rand(0, 4)]
    for call in (
        lambda: raw.jacobian_l1(torch.rand(2, 4), tensors, spec, [0], 1, "sum"),
        lambda: raw.hamiltonian_flow(
            *[torch.rand(2, 4)] * 3, *[torch.rand(1)] * 2, tensors, spec, "bernoulli", True, False
        ),
        lambda: fastvae._C.decoder_gradient(torch.rand(2, 4), torch.rand(2, 4), tensors, spec, "gaussian 1"),
        lambda: fastvae._C.hamiltonian_flow_stash(
            spec, "bernoulli", [list(t.shape) for t in tensors], 4, 4, -1
        ),
    ):
        with pytest.raises(ValueError, match="network: "):
            call()

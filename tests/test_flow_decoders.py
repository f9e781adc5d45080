"""hamiltonian_flow against the float64 reference on decoders of every shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from decoders import unit_rows
from flow_problems import MEMORY, Function, check_against_reference, conv, problem, seeded
from torch import Tensor, nn

from fastvae import reference
from fastvae.likelihoods import Bernoulli, Categorical

each_memory = pytest.mark.parametrize("memory", MEMORY)


# The latent dimension is 3; the likelihood is Gaussian where the name does not say.
SHAPES: dict[str, Callable[[], list[nn.Module]]] = {
    "linear": lambda: [nn.Linear(3, 6)],
    "linear_without_bias": lambda: [nn.Linear(3, 6, bias=False)],
    "unflatten_2x3": lambda: [
        nn.Linear(3, 6),
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 2, 2),
        nn.Tanh(),
        nn.Conv2d(2, 1, 1),
    ],
    "one_channel_flatten": lambda: [
        nn.Linear(3, 12),
        nn.Unflatten(1, (3, 2, 2)),
        nn.ELU(),
        nn.ConvTranspose2d(3, 1, 2, 2),
        nn.Flatten(),
    ],
    "many_channels_flatten": lambda: [
        nn.Linear(3, 12),
        nn.Unflatten(1, (3, 2, 2)),
        nn.ELU(),
        nn.ConvTranspose2d(3, 4, 2, 2),
        nn.Flatten(),
    ],
    "flatten_linear": lambda: [
        nn.Linear(3, 12),
        nn.Unflatten(1, (3, 2, 2)),
        nn.Conv2d(3, 4, 2, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(36, 5),
    ],
    "one_pixel_start": lambda: [
        nn.Unflatten(1, (3, 1, 1)),
        nn.ConvTranspose2d(3, 4, (2, 3)),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, padding=1),
    ],
    "rows_and_columns": lambda: [nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 12), nn.Unflatten(1, (3, 4))],
    "rows_then_image": lambda: [
        nn.Linear(3, 12),
        nn.Unflatten(1, (3, 4)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Unflatten(1, (2, 3, 2)),
        nn.Conv2d(2, 3, 2),
    ],
    "image_to_image": lambda: [
        nn.Linear(3, 12),
        nn.Unflatten(1, (2, 3, 2)),
        nn.Conv2d(2, 4, 1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Unflatten(1, (3, 4, 2)),
        nn.Conv2d(3, 2, 2),
    ],
    "image_end": lambda: [nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 12), nn.Unflatten(1, (2, 2, 3))],
    "sigmoid_end": lambda: [nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 5), nn.Sigmoid()],
    "tanh_image_end": lambda: [
        nn.Linear(3, 12),
        nn.Unflatten(1, (3, 2, 2)),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 2, 2, 2),
        nn.Tanh(),
    ],
    "gelu_end": lambda: [nn.Linear(3, 8), nn.GELU()],
    "activation_first": lambda: [nn.Tanh(), nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 4)],
    "two_activations": lambda: [
        nn.Linear(3, 8),
        nn.Softplus(),
        nn.Tanh(),
        nn.GELU(),
        nn.ReLU(),
        nn.Linear(8, 4),
    ],
    "identity_stages": lambda: [
        nn.Identity(),
        nn.Linear(3, 8),
        nn.Dropout(0.5),
        nn.Tanh(),
        nn.Identity(),
        nn.Linear(8, 4),
        nn.Identity(),
    ],
    "linear_chain": lambda: [nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(2, 4)],
    "norm_first": lambda: [
        nn.BatchNorm1d(3),
        nn.Linear(3, 8),
        nn.BatchNorm1d(8),
        nn.BatchNorm1d(8, affine=False),
        nn.ELU(),
        nn.Linear(8, 4),
    ],
    "norm_last": lambda: [
        nn.Linear(3, 12),
        nn.Unflatten(1, (3, 2, 2)),
        nn.Tanh(),
        nn.ConvTranspose2d(3, 2, 2, 2, bias=False),
        nn.BatchNorm2d(2),
    ],
    "norm_of_one_channel": lambda: [
        nn.Linear(3, 6),
        nn.Unflatten(1, (1, 2, 3)),
        nn.BatchNorm2d(1),
        nn.SiLU(),
        nn.Conv2d(1, 1, 2),
        nn.BatchNorm2d(1),
        nn.Flatten(),
    ],
    "activations_only": lambda: [nn.Softplus(), nn.Tanh()],
}


@each_memory
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_decoders(shape: str, likelihood: str, memory: str, device: torch.device) -> None:
    if shape == "sigmoid_end" and likelihood == "bernoulli":
        likelihood = Bernoulli(probs=True)  # type: ignore[assignment]
    check_against_reference(
        problem(nn.Sequential(*SHAPES[shape]()), likelihood, steps=2), device, memory=memory
    )


# Four classes: which four outputs belong to one element of x depends on the shape at the end.
CATEGORICAL_SHAPES: dict[str, Callable[[], list[nn.Module]]] = {
    "flat": lambda: [nn.Linear(3, 12)],
    "channels": lambda: [nn.Linear(3, 8), nn.Unflatten(1, (2, 2, 2)), nn.ELU(), nn.Conv2d(2, 8, 1)],
    "one_pixel": lambda: [nn.Unflatten(1, (3, 1, 1)), nn.ConvTranspose2d(3, 8, 1)],
    "channels_and_positions": lambda: [nn.Linear(3, 24), nn.Unflatten(1, (8, 3))],
    "unflattened": lambda: [nn.Linear(3, 24), nn.Unflatten(1, (4, 2, 3))],
    "flattened": lambda: [
        nn.Linear(3, 12),
        nn.Unflatten(1, (3, 2, 2)),
        nn.ConvTranspose2d(3, 8, 1),
        nn.Flatten(),
    ],
    "one_channel_flattened": lambda: [
        nn.Linear(3, 12),
        nn.Unflatten(1, (3, 2, 2)),
        nn.ConvTranspose2d(3, 1, 2, 2),
        nn.Flatten(),
    ],
}


@pytest.mark.parametrize("shape", CATEGORICAL_SHAPES)
def test_categorical_shapes(shape: str, device: torch.device) -> None:
    check_against_reference(
        problem(nn.Sequential(*CATEGORICAL_SHAPES[shape]()), "categorical", steps=2), device
    )


def test_categorical_needs_its_channels(device: torch.device) -> None:
    """The classes are channels: one channel of 4 x 4 is no four classes, though the sizes would fit."""
    decoder = seeded(nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4))))
    p = problem(nn.Linear(3, 16), "categorical").to(device)
    p = replace(p, decoder=decoder.to(device))
    for run in (p.reference, p.run):
        with pytest.raises(ValueError, match=r"expected .*4"):
            run()


def test_categorical_of_256_classes(device: torch.device) -> None:
    p = problem(conv(256), Categorical(256), steps=2)
    check_against_reference(p, device)
    check_against_reference(p, device, torch.float32)


def _view(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.tanh(h).view(-1, *shape)


def test_view_to_rows_and_columns(device: torch.device) -> None:
    check_against_reference(problem(Function(3, 28, _view(4, 7)), "bernoulli"), device)
    check_against_reference(problem(Function(3, 28, _view(1, 4, 7)), "gaussian"), device)


def test_probabilities(device: torch.device) -> None:
    """Bernoulli(probs=True): the Sigmoid at the end is taken off, wherever it stands."""
    flat = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Sigmoid())
    image = nn.Sequential(flat, nn.Unflatten(1, (1, 2, 2)))
    for decoder in (flat, image):
        check_against_reference(problem(decoder, Bernoulli(probs=True)), device)


def test_shared_parameter(device: torch.device) -> None:
    """One layer used twice collects both gradients."""
    shared = nn.Linear(4, 4)
    decoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), shared, nn.Tanh(), shared)
    check_against_reference(problem(decoder, "gaussian", steps=2), device)


def test_one_tensor_read_by_two_layers(device: torch.device) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).to(device, torch.float64)
    z, rho, x, steps, alpha = (
        torch.rand(shape, device=device, dtype=torch.float64)
        for shape in ((5, 4), (5, 4), (5, 4), (2, 4), (2,))
    )
    tensors = list(layer.parameters())
    out = torch.ops.fastvae.hamiltonian_flow(
        z, rho, x, steps, alpha, tensors, "linear 0 1;tanh;linear 0 1", "bernoulli", True, False
    )
    found = torch.autograd.grad(out[0].sum() + out[2].sum(), tensors)
    expected = reference.hamiltonian_flow(nn.Sequential(layer, nn.Tanh(), layer), z, rho, x, steps, alpha)
    torch.testing.assert_close(found, torch.autograd.grad(expected[0].sum() + expected[2].sum(), tensors))


def test_parametrised_weight(device: torch.device) -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), unit_rows(nn.Linear(6, 4)))
    check_against_reference(problem(decoder, "gaussian", steps=2), device)


def test_bare_layer(device: torch.device) -> None:
    """The decoder itself is a Linear."""
    check_against_reference(problem(nn.Linear(3, 6), "gaussian"), device)


@pytest.mark.parametrize("depth", [2, 7, 8, 9, 12, 17])
@each_memory
def test_depths(depth: int, memory: str, device: torch.device) -> None:
    """Small networks run in one kernel up to some depth."""
    layers: list[nn.Module] = [nn.Linear(3, 5)]
    for _ in range(depth - 2):
        layers += [nn.Tanh(), nn.Linear(5, 5)]
    decoder = nn.Sequential(*layers, nn.SiLU(), nn.Linear(5, 4))
    check_against_reference(problem(decoder, "bernoulli", steps=2), device, memory=memory)


@pytest.mark.parametrize("width", [120, 170, 190, 260])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_widths(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Around 256 KB of weights, up to which a small network is one kernel, in either type."""
    decoder = nn.Sequential(
        nn.Linear(3, width), nn.Softplus(), nn.Linear(width, width), nn.ELU(), nn.Linear(width, 7)
    )
    check_against_reference(problem(decoder, "gaussian", steps=2, batch=5), device, dtype)

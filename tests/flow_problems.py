"""Small Hamiltonian flows, and their comparison with the float64 reference, for the tests that share them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import ops, reference
from fastvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fastvae.lowering import activations

LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(0.7),
    "categorical": Categorical(4),
}
MEMORY = ("store", "recompute")

# Both sides sum a few hundred products in another order: about 1e-15 each, grown by the leapfrog steps and
# the second derivatives to below 1e-12. 1e-10 leaves room for wider SIMD; a term left out shows at 1e-2.
FLOAT64 = 1e-10
# Unit roundoff 6e-8 over the same sums, elementary functions of a few ulp, K = 10 steps: up to 2e-5 seen.
FLOAT32 = 1e-4

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **{activation.operator: activation.module for activation in activations.ACTIVATIONS},
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": lambda: nn.ELU(0.7),
    "softplus_beta": lambda: nn.Softplus(beta=3.0),
    # Turns linear within the range of the activations.
    "softplus_threshold": lambda: nn.Softplus(beta=2.0, threshold=1.5),
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class Function(nn.Module):
    """A Linear layer and a function of its output, traced by fx."""

    def __init__(self, inputs: int, outputs: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(self.fc(z))


class Residual(nn.Module):
    """A skip connection: not lowered."""

    def __init__(self, latent_dim: int, outputs: int) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(latent_dim, 6), nn.Linear(6, outputs)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.inp(z))
        return self.out(h + torch.sin(h))


def mlp(outputs: int, activation: Callable[[], nn.Module] = nn.Tanh, latent_dim: int = 3) -> nn.Module:
    """Widths that no vector length divides."""
    return nn.Sequential(
        nn.Linear(latent_dim, 11), activation(), nn.Linear(11, 9), activation(), nn.Linear(9, outputs)
    )


def conv(values: int, activation: Callable[[], nn.Module] = nn.Softplus, latent_dim: int = 3) -> nn.Module:
    """Grouped, dilated, strided, padded convolutions of both kinds, with and without bias; BatchNorm."""
    return nn.Sequential(
        nn.Linear(latent_dim, 24),
        nn.BatchNorm1d(24),
        activation(),
        nn.Unflatten(1, (4, 2, 3)),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=(1, 0), groups=2),
        nn.BatchNorm2d(6),
        activation(),
        nn.Conv2d(6, 4, (3, 2), padding=(2, 1), dilation=(2, 1), groups=2, bias=False),
        nn.BatchNorm2d(4, affine=False),
        activation(),
        nn.ConvTranspose2d(4, 4, 2, stride=(1, 2), padding=(0, 1), dilation=(1, 2), bias=False),
        activation(),
        nn.Conv2d(4, 2 * values, 3, stride=(2, 3), padding=1),
    )


@dataclass(frozen=True)
class Problem:
    """The arguments of one flow. x is the data, in the shape of the decoder's output."""

    decoder: nn.Module
    z: Tensor
    rho: Tensor
    x: Tensor
    step_size: Any
    alpha: Tensor
    likelihood: Likelihood

    def to(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Problem:
        """A copy whose tensors are leaves, with the same requires_grad."""
        decoder = copy.deepcopy(self.decoder).to(device, dtype)
        return replace(self, decoder=decoder, **{name: _leaf(t, device, dtype) for name, t in self.tensors()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("z", "rho", "x", "step_size", "alpha"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                yield name, value

    def leaves(self) -> dict[str, Tensor]:
        """Everything a gradient may be asked for, by name."""
        return {**dict(self.tensors()), **dict(self.decoder.named_parameters())}

    def require(self, names: Sequence[str] | None = None) -> Problem:
        """Gradients for these leaves alone; None: for all (x only where it has one)."""
        for name, tensor in self.leaves().items():
            wanted = name in names if names is not None else self.has_gradient(name)
            tensor.requires_grad_(wanted)
        return self

    def has_gradient(self, name: str) -> bool:
        return name != "x" or not isinstance(self.likelihood, Categorical)

    def args(self) -> tuple[Any, ...]:
        return self.decoder, self.z, self.rho, self.x, self.step_size, self.alpha, self.likelihood

    def run(self, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.hamiltonian_flow(*self.args(), **options)

    def trajectory(self) -> reference.Trajectory:
        return ops.trajectory(*self.args())

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        return reference.hamiltonian_flow(*self.args())


def _leaf(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    target = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device, target, copy=True).requires_grad_(tensor.requires_grad)


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """float64 and eval, weights of order one, running statistics that differ from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point():
            fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 2
            tensor.normal_(0.0, fan_in**-0.5, generator=generator)
    return module


def problem(
    decoder: nn.Module | Callable[[int], nn.Module] = mlp,
    likelihood: str | Likelihood = "bernoulli",
    *,
    steps: int = 3,
    batch: int = 3,
    latent_dim: int = 3,
    outputs: int = 4,
    seed: int = 0,
) -> Problem:
    """A float64 flow on the CPU.

    ``decoder`` is a module, or builds one from its number of outputs (:func:`mlp`: all of a sample's;
    :func:`conv`: those of one pixel).
    """
    like = LIKELIHOODS[likelihood] if isinstance(likelihood, str) else likelihood
    if not isinstance(decoder, nn.Module):
        decoder = decoder(like.values_per_element * (1 if decoder is conv else outputs))
    decoder = seeded(decoder, seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    z, rho = (uniform(batch, latent_dim) * 3 - 1.5 for _ in range(2))
    with torch.no_grad():
        shape = like.mean(like.params_of_output(decoder(z))).shape
    return Problem(
        decoder=decoder,
        z=z,
        rho=rho,
        x=uniform(*shape),
        step_size=0.05 + 0.25 * uniform(steps, latent_dim),
        alpha=0.7 + 0.3 * uniform(steps),
        likelihood=like,
    )


def cotangents(outputs: Sequence[Tensor], seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]


def gradients(p: Problem, outputs: Sequence[Tensor], keep: bool = False) -> dict[str, Tensor | None]:
    """Of a fixed random combination of all outputs, for every leaf that requires one."""
    leaves = {name: leaf for name, leaf in p.leaves().items() if leaf.requires_grad}
    found = torch.autograd.grad(
        list(outputs), list(leaves.values()), cotangents(outputs), retain_graph=keep, allow_unused=True
    )
    return dict(zip(leaves, found, strict=True))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Every element within ``tolerance`` of the largest expected magnitude."""
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)} and not {list(expected.shape)}"
    if not expected.numel():
        return
    scale = max(expected.abs().max().item(), 1e-3)
    error = (actual.detach().cpu().double() - expected.detach().cpu()).abs().max().item() / scale
    assert error <= tolerance, f"{name}: relative error {error:.3g} above {tolerance:.3g}"


def check_against_reference(
    p: Problem,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    names: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Outputs and gradients of the op on ``device`` against the float64 reference on the CPU."""
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    p = p.to().require(names)
    on_device = p.to(device, dtype)
    expected = p.reference()
    actual = on_device.run(**options)
    for name, a, e in zip(("z_K", "rho_K", "log_px"), actual, expected, strict=True):
        assert a.dtype == dtype and a.device.type == device.type
        assert_near(a, e, tolerance, name)
    if not any(leaf.requires_grad for leaf in p.leaves().values()):
        assert not any(output.requires_grad for output in actual)
        return
    wanted, found = gradients(p, expected), gradients(on_device, actual)
    for name, gradient in wanted.items():
        got = found[name]
        if gradient is None:
            assert got is None or not got.any(), name
            continue
        assert got is not None, name
        assert got.dtype == dtype, name
        assert_near(got, gradient, tolerance, f"gradient to {name}")

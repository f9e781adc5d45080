"""Batch norms folded into the product in front of them, against the reference: flow, Jacobian, log_px and ELBO."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastvae import ops, reference
from fastvae._extension import raw
from fastvae.likelihoods import Gaussian
from fastvae.lowering import lower

IMAGE = nn.Unflatten(1, (4, 3, 3))
NETWORKS: dict[str, Callable[[], list[nn.Module]]] = {
    "linear": lambda: [nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5)],
    "without bias": lambda: [nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, 5)],
    "not affine": lambda: [nn.Linear(3, 6), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Linear(6, 5)],
    "at the end": lambda: [nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5)],
    "first": lambda: [nn.BatchNorm1d(3), nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)],
    "first product": lambda: [nn.Linear(3, 6), nn.BatchNorm1d(6)],
    "two in a row": lambda: [
        nn.Linear(3, 6),
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6),
        nn.ELU(),
        nn.Linear(6, 5),
    ],
    "of one pixel": lambda: [
        nn.Linear(3, 6),
        nn.Unflatten(1, (6, 1, 1)),
        nn.BatchNorm2d(6),
        nn.Softplus(),
        nn.ConvTranspose2d(6, 2, 3),
        nn.BatchNorm2d(2),
    ],
    "behind an image": lambda: [nn.Linear(3, 36), IMAGE, nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 2)],
    "convolutions": lambda: [
        nn.Linear(3, 36),
        IMAGE,
        nn.ConvTranspose2d(4, 9, 3, 2, 1, 1, bias=False),
        nn.BatchNorm2d(9),
        nn.GELU(),
        nn.Conv2d(9, 4, 3, padding=1, groups=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2),
    ],
    "groups": lambda: [
        nn.Linear(3, 36),
        IMAGE,
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Conv2d(6, 4, 2, groups=2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 5),
    ],
}
TRAINED: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "weights of norms": lambda name: is_norm(name) and name.endswith("weight"),
    "biases": lambda name: name.endswith("bias"),
    "products": lambda name: not is_norm(name),
}


def is_norm(name: str) -> bool:
    return name.startswith("norm")


def network(kind: str, trained: str = "all") -> nn.Module:
    """In float64 and eval mode, with statistics as after training."""
    torch.manual_seed(5)
    module = nn.Sequential()
    for index, layer in enumerate(NETWORKS[kind]()):
        module.add_module(
            f"{'norm' if isinstance(layer, nn.modules.batchnorm._BatchNorm) else 'layer'}{index}", layer
        )
    for layer in module:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean = 0.3 * torch.randn(layer.num_features)
            layer.running_var = 0.5 + torch.rand(layer.num_features)
            for parameter in layer.parameters():
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(TRAINED[trained](name))
    return module.double().eval()


def drawn(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """z, rho and x of four samples."""
    generator = torch.Generator().manual_seed(6)
    z, rho = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    shape = module(z).shape
    return z.requires_grad_(), rho, torch.randn(shape, dtype=torch.float64, generator=generator)


def check(function: Callable[[], Tensor], exact: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    found, expected = (
        [value, *torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)]
        for value in (function(), exact())
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("kind", NETWORKS)
def test_flow_and_jacobian_are_those_of_the_module(kind: str, trained: str) -> None:
    module = network(kind, trained)
    z, rho, x = drawn(module)
    leaves = [z, *(p for p in module.parameters() if p.requires_grad)]
    step, alpha, like = torch.tensor(0.1).double(), torch.tensor([0.9, 0.8]).double(), Gaussian(0.7)

    def flow(of: Callable[..., tuple[Tensor, ...]], **options: str) -> Tensor:
        end, momentum, log_px, *_ = of(module, z, rho, x, step, alpha, like, **options)
        return end.sum(1) + momentum.square().sum(1) + log_px

    for memory in ("store", "recompute"):
        mine = functools.partial(flow, ops.hamiltonian_flow, memory=memory)
        check(mine, lambda: flow(reference.hamiltonian_flow), leaves)
    for p in (1, 2):
        one = functools.partial(ops.jacobian_l1, module, z, p=p)
        check(one, functools.partial(reference.jacobian_l1, module, z, "mean", p=p), leaves)


@pytest.mark.parametrize("kind", NETWORKS)
def test_log_px_and_the_elbo_are_those_of_the_module(kind: str) -> None:
    module = network(kind)
    z, _, x = drawn(module)
    like = Gaussian(0.7)
    expected = like.log_prob(module(z), x)
    torch.testing.assert_close(ops.log_px(module, z[None], x, like)[0], expected, rtol=1e-12, atol=1e-12)
    torch.manual_seed(8)
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(x[0].numel(), 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6)
    )
    encoder = encoder.double().eval()
    noise = torch.randn_like(z)
    leaves = [*encoder.parameters(), *module.parameters()]

    def exact() -> Tensor:
        mean, logvar = encoder(x).chunk(2, 1)
        code = mean + (logvar / 2).exp() * noise
        divergence = (mean.square() + logvar.exp() - 1 - logvar).sum(1) / 2
        return like.log_prob(module(code), x) - divergence

    check(lambda: ops.elbo(encoder, module, x, noise, like), exact, leaves)


def test_nothing_is_kept_for_a_folded_norm() -> None:
    def kept(kind: str) -> int:
        lowered = lower(network(kind))
        shapes = [list(tensor.shape) for tensor in lowered.tensors]
        numel, _ = raw.hamiltonian_flow_stash(lowered.spec, "gaussian 0.7", shapes, 3, 8, -1)
        return numel

    of_layers = 2 * 6 + 5
    assert kept("linear") == of_layers + 3
    assert kept("two in a row") == kept("linear") + 2 * 6

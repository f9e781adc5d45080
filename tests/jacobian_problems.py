"""Small Jacobian penalties and their oracle, torch.func.jacfwd in float64, for the tests that share them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from flow_problems import conv, mlp
from torch import Tensor, nn

# Both sides sum up to a few thousand products in another order; a term left out shows at 1e-2.
FLOAT64 = 1e-10
# Unit roundoff 6e-8 over the same sums, by norms. The sign of an entry that is nearly zero may differ, where its
# share of a gradient is an entry's of the Jacobian: the problems have none that close.
FLOAT32 = 1e-5


def wide(activation: Callable[[], nn.Module] = nn.ReLU, outputs: int = 3, latent_dim: int = 3) -> nn.Module:
    """Transposed convolutions that take the kernels of a CPU: 8 to 32 channels, and few at the end."""
    return nn.Sequential(
        nn.Linear(latent_dim, 9 * 6),
        activation(),
        nn.Unflatten(1, (9, 2, 3)),
        nn.ConvTranspose2d(9, 33, 3, stride=(2, 1), padding=1, output_padding=(1, 0)),
        activation(),
        nn.ConvTranspose2d(33, 8, 4, stride=2, padding=1, bias=False),
        activation(),
        nn.ConvTranspose2d(8, 16, (2, 1), stride=(3, 2), padding=(0, 1), output_padding=(1, 0)),
        activation(),
        nn.ConvTranspose2d(16, outputs, 5, stride=2, padding=2, output_padding=1),
    )


DECODERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": lambda activation=nn.Tanh: mlp(7, activation),
    "conv": lambda activation=nn.Softplus: conv(1, activation),
    "wide": wide,
}


def problem(
    decoder: str | nn.Module = "mlp", batch: int = 4, latent_dim: int = 3, seed: int = 0
) -> tuple[nn.Module, Tensor]:
    """A decoder in eval mode and z, in float64, requiring gradients."""
    torch.manual_seed(seed)
    module = DECODERS[decoder]() if isinstance(decoder, str) else decoder
    module = module.double().eval()
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_(std=0.3)
    return module, torch.randn(batch, latent_dim, dtype=torch.float64, requires_grad=True)


def on(module: nn.Module, z: Tensor, device: torch.device, dtype: torch.dtype = torch.float64):
    """Copies of both."""
    return copy.deepcopy(module).to(device, dtype), z.detach().to(device, dtype).requires_grad_(
        z.requires_grad
    )


def oracle(
    decoder: nn.Module,
    z: Tensor,
    reduction: str = "mean",
    *,
    output: str = "identity",
    latents: Sequence[int] | None = None,
    p: int = 1,
) -> Tensor:
    """The definition, entry by entry."""

    def decode(point: Tensor) -> Tensor:
        y = decoder(point[None]).flatten()
        return torch.sigmoid(y) if output == "sigmoid" else y

    jacobian = torch.func.vmap(torch.func.jacfwd(decode))(z)
    if latents is not None:
        jacobian = jacobian[:, :, list(latents)]
    terms = jacobian.abs().pow(p).sum((1, 2))
    return terms if reduction == "none" else terms.mean() if reduction == "mean" else terms.sum()


def gradients(value: Tensor, decoder: nn.Module, z: Tensor) -> dict[str, Tensor]:
    """Of the value, or of a sum of its entries with uneven weights, to z and every parameter."""
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).to(value).view(value.shape)
    leaves = {"z": z, **dict(decoder.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(
        (value * weights).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """|actual - expected| <= tolerance (|expected| + 1e-3), in norms."""
    assert actual.shape == expected.shape, name
    a, b = actual.detach().to("cpu", torch.float64), expected.detach().to("cpu", torch.float64)
    error, size = (a - b).norm(), b.norm()
    assert error <= tolerance * (size + 1e-3), f"{name}: off by {error:.2e} of {size:.2e}"


def entries(module: Callable[[Tensor], Tensor], z: Tensor, p: int = 1) -> Tensor:
    """The sum over latents and outputs by one reverse pass an output, reverse over reverse: [B]."""
    y = module(z).flatten(1)
    terms = torch.zeros(len(z), dtype=z.dtype)
    for column in y.unbind(1):
        terms = terms + torch.autograd.grad(column.sum(), z, create_graph=True)[0].abs().pow(p).sum(1)
    return terms

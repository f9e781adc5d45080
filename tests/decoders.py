"""Decoders as people write them in public VAE code; other tests draw on them too.

``DECODERS`` maps a name to a :class:`Case`: how to build the module (in eval mode, float64, seeded), its
latent dimension, and whether it is lowered.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


class FunctionalMLP(nn.Module):
    """The forward of the PyTorch examples' VAE: F.relu and torch.sigmoid."""

    def __init__(self, latent_dim: int = 6) -> None:
        super().__init__()
        self.fc3 = nn.Linear(latent_dim, 20)
        self.fc4 = nn.Linear(20, 64)

    def forward(self, z: Tensor) -> Tensor:
        h3 = F.relu(self.fc3(z))
        return torch.sigmoid(self.fc4(h3))


class ViewConv(nn.Module):
    """Linear, view to an image with the batch size read from the input, upsampling convolutions."""

    def __init__(self, latent_dim: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(latent_dim, 8 * 4 * 4)
        self.deconv1 = nn.ConvTranspose2d(8, 6, kernel_size=3, stride=2, padding=1, output_padding=1)
        self.deconv2 = nn.ConvTranspose2d(6, 4, kernel_size=4, stride=2, padding=1, bias=False)
        self.conv = nn.Conv2d(4, 1, kernel_size=3, padding=1)

    def forward(self, z: Tensor, **kwargs: object) -> Tensor:
        x = F.softplus(self.fc(z))
        x = x.view(x.size(0), 8, 4, 4)
        x = F.elu(self.deconv1(x), alpha=0.7)
        x = F.leaky_relu(self.deconv2(x), 0.2)
        x = torch.tanh(self.conv(x))
        return x.reshape(z.shape[0], -1).contiguous()


class PyTorchVAE(nn.Module):
    """decoder_input, view(-1, C, h, w), transposed convolutions with BatchNorm and LeakyReLU, final layer."""

    def __init__(self, latent_dim: int = 7) -> None:
        super().__init__()
        hidden_dims = [12, 8, 6]
        self.decoder_input = nn.Linear(latent_dim, hidden_dims[0] * 4)
        modules = []
        for before, after in pairwise(hidden_dims):
            modules.append(
                nn.Sequential(
                    nn.ConvTranspose2d(before, after, kernel_size=3, stride=2, padding=1, output_padding=1),
                    nn.BatchNorm2d(after),
                    nn.LeakyReLU(),
                )
            )
        self.decoder = nn.Sequential(*modules)
        self.final_layer = nn.Sequential(
            nn.ConvTranspose2d(
                hidden_dims[-1], hidden_dims[-1], kernel_size=3, stride=2, padding=1, output_padding=1
            ),
            nn.BatchNorm2d(hidden_dims[-1]),
            nn.LeakyReLU(),
            nn.Conv2d(hidden_dims[-1], out_channels=3, kernel_size=3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        result = self.decoder_input(z)
        result = result.view(-1, 12, 2, 2)
        result = self.decoder(result)
        return self.final_layer(result)


class DCGAN(nn.Module):
    """z[:, :, None, None] into a stack of bias-free transposed convolutions with BatchNorm."""

    def __init__(self, nz: int = 10, ngf: int = 4) -> None:
        super().__init__()
        self.nz = nz
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, 1, 4, 2, 1, bias=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z[:, :, None, None])


class DCGANView(DCGAN):
    """The same with view(B, nz, 1, 1), and a dropout that eval mode switches off."""

    def __init__(self, nz: int = 10) -> None:
        super().__init__(nz)
        self.p = 0.25

    def forward(self, input: Tensor) -> Tensor:
        batch_size = input.shape[0]
        hidden = F.dropout(input.view(batch_size, self.nz, 1, 1), p=self.p, training=self.training)
        return self.main(hidden).sigmoid()


class Residual(nn.Module):
    """Two linear layers with a skip connection between them."""

    def __init__(self, latent_dim: int = 5) -> None:
        super().__init__()
        self.inp = nn.Linear(latent_dim, 16)
        self.block = nn.Linear(16, 16)
        self.out = nn.Linear(16, 30)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.inp(z))
        h = h + torch.tanh(self.block(h))
        return self.out(h)


class Conditional(nn.Module):
    """Concatenates z again, and looks at the values of its input."""

    def __init__(self, latent_dim: int = 5) -> None:
        super().__init__()
        self.inp = nn.Linear(latent_dim, 16)
        self.out = nn.Linear(16 + latent_dim, 30)

    def forward(self, z: Tensor) -> Tensor:
        h = F.silu(self.inp(z))
        if z.abs().max() > 1e6:
            h = h.clamp(max=1.0)
        return self.out(torch.cat([h, z], dim=1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.Softplus(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 36))


def unflatten() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8 * 9),
        nn.ELU(),
        nn.Unflatten(1, (8, 3, 3)),
        nn.Conv2d(8, 8, 3, padding="same", groups=2),
        nn.SiLU(),
        nn.ConvTranspose2d(8, 4, 5, stride=2, padding=2, output_padding=1, dilation=1),
        nn.GELU(),
        nn.Conv2d(4, 2, 3, stride=1, dilation=2, padding=(2, 1)),
        nn.GELU(approximate="tanh"),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Identity(),
        nn.Sigmoid(),
    )


def nested() -> nn.Module:
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU(0.1))

    return nn.Sequential(
        nn.Sequential(block(5, 12), block(12, 20)),
        nn.Sequential(nn.Linear(20, 28), nn.Unflatten(-1, (1, 4, 7))),
    )


class UnitRows(nn.Module):
    """Rows of length 1. PyTorch's weight_norm takes its root in float32 on a GPU, also of float64."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))


def unit_rows(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", UnitRows())
    return layer


def parametrised() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(5, 12)),
        nn.ReLU(),
        unit_rows(nn.Linear(12, 16)),
        nn.Softplus(beta=2, threshold=10),
        nn.Unflatten(1, (4, 2, 2)),
        unit_rows(nn.ConvTranspose2d(4, 2, 4, 2, 1)),
    )


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    latent_dim: int
    lowered: bool

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The module in eval mode, with running statistics that differ from their defaults."""
        torch.manual_seed(seed)
        module = self.build().to(dtype).eval()
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
        return module


DECODERS: dict[str, Case] = {
    "sequential_mlp": Case(mlp, 4, True),
    "functional_mlp": Case(FunctionalMLP, 6, True),
    "view_conv": Case(ViewConv, 5, True),
    "pytorch_vae": Case(PyTorchVAE, 7, True),
    "unflatten_conv": Case(unflatten, 6, True),
    "dcgan_index": Case(DCGAN, 10, True),
    "dcgan_view": Case(DCGANView, 10, True),
    "nested_sequential": Case(nested, 5, True),
    "parametrised": Case(parametrised, 5, True),
    "residual": Case(Residual, 5, False),
    "conditional": Case(Conditional, 5, False),
}

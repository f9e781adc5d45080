"""Networks of one layer of fastvae.network each: by the file of its rules, the ways in which forwards use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from layer_kinds import IMAGE, ROWS, SIGNAL, VECTOR, VOLUME, Around, Call
from torch import Tensor, nn


class Case(NamedTuple):
    """A layer on a sample of some shape, and the operators that torch.export must have made of it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    takes: tuple[str, ...]


def call(function: Callable[..., Tensor], shape: tuple[int, ...], *takes: str, held: tuple = ()) -> Case:
    """A function of h and of parameters of the shapes in ``held``."""
    return Case(lambda: Call(function, *(Held(size) for size in held)), shape, takes)


def layer(make: Callable[[], nn.Module], shape: tuple[int, ...], *takes: str) -> Case:
    return Case(make, shape, takes)


class Held(nn.Module):
    """One parameter; called, it is that."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.tensor = nn.Parameter(torch.randn(shape))

    def forward(self) -> Tensor:
        return self.tensor


AFFINE: dict[str, Case] = {
    "Linear": layer(lambda: nn.Linear(6, 5), VECTOR, "linear"),
    "Linear without bias": layer(lambda: nn.Linear(6, 5, bias=False), VECTOR, "linear"),
    "Linear of rows": layer(lambda: nn.Linear(6, 5), ROWS, "linear"),
    "Linear of rows of rows": layer(lambda: nn.Linear(4, 3), VOLUME, "linear"),
    "Linear of one row": layer(lambda: nn.Linear(6, 3), (1, 6), "linear"),
    "Linear, its weight larger than the batch": layer(lambda: nn.Linear(6, 40), VECTOR, "linear"),
    "Linear, its weight smaller than the batch": layer(lambda: nn.Linear(2, 2), (20, 2), "linear"),
    "Linear, frozen": layer(lambda: nn.Linear(6, 5).requires_grad_(False), VECTOR, "linear"),
    "Linear, its weight frozen": layer(lambda: _frozen(nn.Linear(6, 5), "weight"), VECTOR, "linear"),
    "Linear, its bias frozen": layer(lambda: _frozen(nn.Linear(6, 5), "bias"), VECTOR, "linear"),
    "Linear, a weight that is computed": call(
        lambda h, w, g: F.linear(h, g().exp() * w() / w().norm(dim=1, keepdim=True)), VECTOR, "linear",
        held=((5, 6), (5, 1)),
    ),
    "Linear, used twice": Case(
        lambda: Call(lambda h, inner: inner(torch.tanh(inner(h))), nn.Linear(6, 6)), VECTOR, ("linear",)
    ),
    "Linear, used on rows and on their sum": Case(
        lambda: Call(lambda h, inner: inner(torch.tanh(inner(h)).sum(1)), nn.Linear(6, 6)), ROWS, ("linear",)
    ),
    "Linear, its weight used transposed, too": Case(
        lambda: Call(lambda h, inner: F.linear(torch.tanh(inner(h)), inner.weight.t()), nn.Linear(6, 4)),
        VECTOR, ("linear",),
    ),
    "Conv1d": layer(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), SIGNAL, "conv1d"),
    "Conv1d, no bias": layer(lambda: nn.Conv1d(4, 3, 1, bias=False), SIGNAL, "conv1d"),
    "Conv2d": layer(lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2), IMAGE, "conv2d"),
    "Conv2d, depthwise": layer(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), IMAGE, "conv2d"),
    "Conv2d of one pixel": layer(lambda: nn.Conv2d(4, 3, 1), (4, 1, 1), "conv2d"),
    "Conv2d, numbers": call(
        lambda h, w: F.conv2d(h, w(), None, 2, 1), IMAGE, "conv2d", held=((3, 4, 3, 3),)
    ),
    "Conv2d, channels last": Case(
        lambda: Call(lambda h, c: c(h.contiguous(memory_format=torch.channels_last)), nn.Conv2d(4, 3, 3)),
        IMAGE, ("conv2d",),
    ),
    "Conv2d, used twice": Case(
        lambda: Call(lambda h, c: c(torch.tanh(c(h))), nn.Conv2d(4, 4, 3, padding=1)), IMAGE, ("conv2d",)
    ),
    "Conv2d, circular": layer(lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), IMAGE, "conv2d"),
    "Conv2d, same": layer(lambda: nn.Conv2d(4, 2, 3, padding="same"), IMAGE, "conv2d"),
    "Conv2d, valid": layer(lambda: nn.Conv2d(4, 2, 3, padding="valid"), IMAGE, "conv2d"),
    "Conv2d, same, uneven": layer(
        lambda: nn.Conv2d(4, 2, (2, 4), padding="same", dilation=(1, 2), groups=2), IMAGE, "conv2d"
    ),
    "Conv1d, same": layer(lambda: nn.Conv1d(4, 2, 2, padding="same", dilation=3), SIGNAL, "conv1d"),
    "Conv3d": layer(lambda: nn.Conv3d(2, 4, 2, (1, 2, 1), (0, 1, 1), (1, 1, 2), 2), VOLUME, "conv3d"),
    "ConvTranspose1d": layer(lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2, dilation=2), SIGNAL, "conv_transpose1d"),
    "ConvTranspose2d": layer(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2, dilation=(2, 1)),
        IMAGE, "conv_transpose2d",
    ),
    "ConvTranspose2d, no bias": layer(lambda: nn.ConvTranspose2d(4, 2, 3, bias=False), IMAGE, "conv_transpose2d"),
    "ConvTranspose2d of one pixel": layer(lambda: nn.ConvTranspose2d(8, 2, 4), (8, 1, 1), "conv_transpose2d"),
    "ConvTranspose2d, a size": Case(
        lambda: Call(lambda h, c: c(h, output_size=(8, 7)), nn.ConvTranspose2d(4, 2, 3, 2, 1)),
        IMAGE, ("conv_transpose2d",),
    ),
    "ConvTranspose3d": layer(
        lambda: nn.ConvTranspose3d(2, 2, 2, 2, (1, 0, 1), (0, 1, 0)), VOLUME, "conv_transpose3d"
    ),
    "convolution": call(
        lambda h, w: torch.convolution(h, w(), None, [1, 2], [0, 1], [1, 1], False, [0, 0], 2),
        IMAGE, "convolution", held=((4, 2, 2, 3),),
    ),
    "convolution, transposed": call(
        lambda h, w: torch.convolution(h, w(), None, [1, 2], [0, 1], [1, 1], True, [0, 1], 2),
        IMAGE, "convolution", held=((4, 2, 2, 3),),
    ),
}  # fmt: skip


def _frozen(module: nn.Module, name: str) -> nn.Module:
    getattr(module, name).requires_grad_(False)
    return module


FILES = {"affine": AFFINE}


def network_of(case: Case) -> nn.Module:
    """The layer behind a Linear layer and tanh, in float64 and eval, its running statistics drawn."""
    torch.manual_seed(0)
    module = Around(case.make(), case.shape).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for key, buffer in module.named_buffers():
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif key.endswith("running_mean"):
                buffer.normal_(std=0.3)
    return module

"""Decoders of three latents around one layer each, of every kind of torch.nn that can stand in one, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Around(nn.Module):
    """Linear, the sample's shape, the layer, flat."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Linear(3, torch.Size(shape).numel())
        self.shape, self.layer = shape, layer

    def forward(self, z: Tensor) -> Tensor:
        h = self.layer(torch.tanh(self.first(z)).unflatten(1, self.shape))
        return (h[0] if isinstance(h, tuple) else h).flatten(1)


class Call(nn.Module):
    """A function of a tensor, with the modules that it uses."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h, *self.inner)


class Wave(torch.autograd.Function):
    """A user's own function, without a forward mode and without vmap."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return torch.sin(h) * h

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return grad * (torch.sin(h) + h * torch.cos(h))


VECTOR, ROWS, SIGNAL, IMAGE, VOLUME = (6,), (4, 6), (4, 6), (4, 4, 4), (2, 4, 4, 4)

ELEMENTWISE = [
    *(
        nn.CELU,
        nn.ELU,
        nn.GELU,
        nn.Hardshrink,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Hardtanh,
        nn.Identity,
        nn.LeakyReLU,
    ),
    *(
        nn.LogSigmoid,
        nn.Mish,
        nn.PReLU,
        nn.ReLU,
        nn.ReLU6,
        nn.RReLU,
        nn.SELU,
        nn.Sigmoid,
        nn.SiLU,
        nn.Softplus,
    ),
    *(nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Dropout, nn.AlphaDropout),
]

# Not among them: CrossMapLRN2d, whose first derivative torch gets wrong, and what draws at random (FractionalMaxPool).
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{kind.__name__: (kind, VECTOR) for kind in ELEMENTWISE},
    "GELU, tanh": (lambda: nn.GELU(approximate="tanh"), VECTOR),
    "Threshold": (lambda: nn.Threshold(0.1, -0.3), VECTOR),
    "GLU": (nn.GLU, VECTOR),
    "GLU of channels": (lambda: nn.GLU(1), IMAGE),
    "Softmax": (lambda: nn.Softmax(-1), VECTOR),
    "Softmin": (lambda: nn.Softmin(-1), VECTOR),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), VECTOR),
    "Softmax2d": (nn.Softmax2d, IMAGE),
    "PReLU of channels": (lambda: nn.PReLU(4), IMAGE),
    "Linear": (lambda: nn.Linear(6, 5), VECTOR),
    "Linear of rows": (lambda: nn.Linear(6, 3), ROWS),
    "Bilinear": (lambda: Call(lambda h, b: b(h, h.flip(1)), nn.Bilinear(6, 6, 4)), VECTOR),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 3, padding=1), SIGNAL),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), IMAGE),
    "Conv2d, reflecting": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), IMAGE),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), VOLUME),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, 2, 1, 1), SIGNAL),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, 1), IMAGE),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 1, 2, 2), VOLUME),
    "Unfold": (lambda: nn.Unfold(2), IMAGE),
    "Fold": (lambda: nn.Fold((3, 4), 2), (8, 6)),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), SIGNAL),
    "MaxPool2d": (lambda: nn.MaxPool2d(2, 1), IMAGE),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), VOLUME),
    "MaxUnpool2d": (
        lambda: Call(
            lambda h, pool, unpool: unpool(*pool(h)), nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        ),
        IMAGE,
    ),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), SIGNAL),
    "AvgPool2d": (lambda: nn.AvgPool2d(2, 1, 1), IMAGE),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), VOLUME),
    "LPPool1d": (lambda: nn.LPPool1d(2, 2), SIGNAL),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), IMAGE),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(4), SIGNAL),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((3, 2)), IMAGE),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(3), VOLUME),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(4), SIGNAL),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d((3, 2)), IMAGE),
    "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(2), VOLUME),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), IMAGE),
    "ReplicationPad2d": (lambda: nn.ReplicationPad2d((1, 0, 2, 1)), IMAGE),
    "ReplicationPad3d": (lambda: nn.ReplicationPad3d(1), VOLUME),
    "CircularPad1d": (lambda: nn.CircularPad1d(2), SIGNAL),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), IMAGE),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), VECTOR),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), IMAGE),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), VOLUME),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4), SIGNAL),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "InstanceNorm2d, tracking": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), IMAGE),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2, affine=True), VOLUME),
    "LayerNorm": (lambda: nn.LayerNorm(6), VECTOR),
    "LayerNorm, plain": (lambda: nn.LayerNorm((4, 6), elementwise_affine=False), ROWS),
    "RMSNorm": (lambda: nn.RMSNorm(6), ROWS),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), IMAGE),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), VECTOR),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), VECTOR),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), IMAGE),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), IMAGE),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), IMAGE),
    "Upsample, nearest": (lambda: nn.Upsample(scale_factor=2), IMAGE),
    "Upsample, nearest-exact": (lambda: nn.Upsample(size=(3, 5), mode="nearest-exact"), IMAGE),
    "Upsample, linear": (lambda: nn.Upsample(scale_factor=1.5, mode="linear"), SIGNAL),
    "Upsample, bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "Upsample, bicubic": (
        lambda: nn.Upsample(scale_factor=2, mode="bicubic", align_corners=True),
        (1, 4, 4),
    ),
    "Upsample, trilinear": (lambda: nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 2, 2)),
    "UpsamplingBilinear2d": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), IMAGE),
    "CosineSimilarity": (
        lambda: Call(lambda h, s: s(h, h.flip(2))[:, None], nn.CosineSimilarity(2)),
        (4, 6),
    ),
    "PairwiseDistance": (
        lambda: Call(lambda h, s: s(h[:, 0], h[:, 1])[:, None], nn.PairwiseDistance()),
        (2, 6),
    ),
    "RNN": (lambda: nn.RNN(6, 4, batch_first=True), ROWS),
    "LSTM": (lambda: nn.LSTM(6, 4, batch_first=True, num_layers=2, bidirectional=True), ROWS),
    "LSTM, projected": (lambda: nn.LSTM(6, 4, batch_first=True, proj_size=2), ROWS),
    "GRU": (lambda: nn.GRU(6, 4, batch_first=True, bidirectional=True), ROWS),
    "RNNCell": (lambda: nn.RNNCell(6, 4), VECTOR),
    "LSTMCell": (lambda: nn.LSTMCell(6, 4), VECTOR),
    "GRUCell": (lambda: nn.GRUCell(6, 4), VECTOR),
    "MultiheadAttention": (
        lambda: Call(lambda h, a: a(h, h, h)[0], nn.MultiheadAttention(6, 2, batch_first=True)),
        ROWS,
    ),
    "MultiheadAttention, no weights": (
        lambda: Call(
            lambda h, a: a(h, h, h, need_weights=False)[0], nn.MultiheadAttention(6, 2, batch_first=True)
        ),
        ROWS,
    ),
    "scaled_dot_product_attention": (
        lambda: Call(lambda h: F.scaled_dot_product_attention(h[:, None], h[:, None], h.flip(1)[:, None])),
        ROWS,
    ),
    "scaled_dot_product_attention, causal": (
        lambda: Call(
            lambda h: F.scaled_dot_product_attention(
                h[:, None], h[:, None], h[:, None], is_causal=True, scale=0.7
            )
        ),
        ROWS,
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True, activation="gelu"),
        ROWS,
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2),
        ROWS,
    ),
    "TransformerDecoderLayer": (
        lambda: Call(lambda h, d: d(h, h.flip(1)), nn.TransformerDecoderLayer(6, 2, 8, batch_first=True)),
        ROWS,
    ),
    "an autograd.Function": (lambda: Call(Wave.apply), VECTOR),
    "einsum, where, clamp": (
        lambda: Call(lambda h: torch.where(h > 0, torch.einsum("bi,bj->bij", h, h).sum(1), h.clamp(-0.4))),
        VECTOR,
    ),
    "matrix_exp": (lambda: Call(torch.linalg.matrix_exp), (3, 3)),
}


def draw_statistics(module: nn.Module, std: float = 0.3) -> None:
    """Give the running statistics of its norms numbers as training leaves them; under no_grad."""
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.normal_(std=std)


def decoder(name: str) -> nn.Module:
    """The decoder around a kind of layer, in eval mode, its running statistics drawn."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module = Around(make(), shape).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        draw_statistics(module)
    return module

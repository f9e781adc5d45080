"""By the file of their rules, how forwards use layers without weights; and all cases by file."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from layer_kinds import IMAGE, ROWS, SIGNAL, VECTOR, VOLUME, Call
from network_layer import Case, call, layer, left_over
from network_weighted_cases import AFFINE, JOINS, NORMS, SOFTMAX
from torch import Tensor, nn

aten = torch.ops.aten

MAPS: dict[str, Case] = {
    "Upsample, nearest": Case(
        lambda: Call(
            lambda h: torch.cat(
                [F.interpolate(h, scale_factor=2).flatten(1), F.interpolate(h, size=(3, 5)).flatten(1)], 1
            )
        ),
        IMAGE, ("upsample_nearest2d",),
    ),
    "Upsample of signals, nearest": layer(lambda: nn.Upsample(scale_factor=2), SIGNAL, "upsample_nearest1d"),
    "Upsample of volumes, nearest": layer(lambda: nn.Upsample(scale_factor=1.5), VOLUME, "upsample_nearest3d"),
    "Upsample of signals, nearest-exact": layer(
        lambda: nn.Upsample(size=9, mode="nearest-exact"), SIGNAL, "_upsample_nearest_exact1d"
    ),
    "Upsample, nearest-exact": layer(
        lambda: nn.Upsample(size=(3, 5), mode="nearest-exact"), IMAGE, "_upsample_nearest_exact2d"
    ),
    "Upsample of volumes, nearest-exact": layer(
        lambda: nn.Upsample(size=3, mode="nearest-exact"), VOLUME, "_upsample_nearest_exact3d"
    ),
    "Upsample of signals, linear": layer(
        lambda: nn.Upsample(scale_factor=1.5, mode="linear"), SIGNAL, "upsample_linear1d"
    ),
    "Upsample, bilinear": Case(
        lambda: Call(
            lambda h: F.interpolate(h, scale_factor=2, mode="bilinear")
            * F.interpolate(h, size=(8, 8), mode="bilinear", align_corners=True)
        ),
        IMAGE, ("upsample_bilinear2d",),
    ),
    "Upsample, bicubic": layer(lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (1, 4, 4), "upsample_bicubic2d"),
    "Upsample of volumes, trilinear": layer(
        lambda: nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 2, 2), "upsample_trilinear3d"
    ),
    "ReflectionPad1d": layer(lambda: nn.ReflectionPad1d((1, 2)), SIGNAL),
    "ReflectionPad2d": layer(lambda: nn.ReflectionPad2d((1, 2, 3, 0)), IMAGE),
    "ReflectionPad3d": layer(lambda: nn.ReflectionPad3d((1, 0, 2, 1, 1, 0)), VOLUME),
    "ReplicationPad1d": layer(lambda: nn.ReplicationPad1d((3, 1)), SIGNAL),
    "ReplicationPad2d": layer(lambda: nn.ReplicationPad2d((1, 0, 2, 1)), IMAGE),
    "ReplicationPad3d": layer(lambda: nn.ReplicationPad3d((1, 0, 2, 1, 0, 3)), VOLUME),
    "CircularPad2d": layer(lambda: nn.CircularPad2d((1, 2, 0, 1)), IMAGE),
    "ZeroPad2d": layer(lambda: nn.ZeroPad2d((1, 0, 2, 3)), IMAGE, "pad"),
    "ConstantPad1d": layer(lambda: nn.ConstantPad1d((1, 2), 1.5), SIGNAL, "pad"),
    "padding with a negative count": call(lambda h: F.pad(h, (-1, 2, 1, -2), value=0.5).sin(), IMAGE, "pad"),
    "padding of channels": call(lambda h: F.pad(h, (0, 0, 0, 0, 1, 2), value=-1.0).sin(), IMAGE, "pad"),
    "padding of a vector": call(lambda h: F.pad(h, (2, 1)).cos(), VECTOR, "pad"),
    "AvgPool1d": layer(lambda: nn.AvgPool1d(2), SIGNAL, "avg_pool1d"),
    "AvgPool2d": layer(lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE, "avg_pool2d"),
    "AvgPool2d, a divisor": layer(lambda: nn.AvgPool2d(2, 1, divisor_override=3), IMAGE, "avg_pool2d"),
    "AvgPool3d": layer(lambda: nn.AvgPool3d(2, padding=1), VOLUME, "avg_pool3d"),
    "Unfold and Fold": layer(
        lambda: nn.Sequential(nn.Unfold(2, padding=1), nn.Tanh(), nn.Fold((4, 4), 2, padding=1)),
        IMAGE, "im2col", "col2im",
    ),
    "AdaptiveAvgPool1d": layer(lambda: nn.AdaptiveAvgPool1d(4), SIGNAL, "adaptive_avg_pool1d"),
    "AdaptiveAvgPool2d": layer(lambda: nn.AdaptiveAvgPool2d((3, 2)), IMAGE),
    "AdaptiveAvgPool2d, of all": layer(lambda: nn.AdaptiveAvgPool2d(1), IMAGE),
    "AdaptiveAvgPool3d": layer(lambda: nn.AdaptiveAvgPool3d((3, 1, None)), VOLUME),
    "PixelShuffle": layer(lambda: nn.PixelShuffle(2), IMAGE),
    "PixelUnshuffle": layer(lambda: nn.PixelUnshuffle(2), IMAGE),
    "ChannelShuffle": layer(lambda: nn.ChannelShuffle(2), IMAGE),
    "operators of padding": call(
        lambda h: torch.cat(
            [aten.reflection_pad2d(h, [1, 2, 0, 1]).flatten(1), aten.replication_pad2d(h, [1, 0, 2, 1]).flatten(1),
             aten.constant_pad_nd(h, [1, 1], 0.5).flatten(1), aten._adaptive_avg_pool2d(h, [3, 2]).flatten(1),
             aten.reflection_pad1d(h[:, 0], [1, 2]).flatten(1), aten.replication_pad1d(h[:, 0], [1, 2]).flatten(1)], 1
        ),
        IMAGE, "reflection_pad2d", "replication_pad2d",
    ),
    "operators of padding of volumes": call(
        lambda h: torch.cat(
            [aten.reflection_pad3d(h, [1, 0, 2, 1, 1, 0]).flatten(1),
             aten.replication_pad3d(h, [1, 0, 2, 1, 0, 3]).flatten(1),
             aten._adaptive_avg_pool3d(h, [3, 1, 2]).flatten(1)], 1
        ),
        VOLUME, "reflection_pad3d", "replication_pad3d",
    ),
    "a map of images in another layout": Case(
        lambda: Call(lambda h: F.avg_pool2d(F.interpolate(h.transpose(1, 2), scale_factor=3), 2, 1)),
        IMAGE, ("upsample_nearest2d", "avg_pool2d"),
    ),
    "images after a convolution, whose layout is ours": Case(
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.PixelShuffle(2), nn.Upsample(scale_factor=2), nn.Flatten(2),
            nn.Unflatten(2, (8, 32)),
        ),
        IMAGE, ("conv2d",),
    ),
}  # fmt: skip


def _written(h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[:, 0], y[:, -1, 1:3] = h[:, 1].sin(), h[:, 0, :2] * h[:, 2, 2:]
    y[:, 1, :, -1] = 0.5
    y[..., 0:1].add_(h[..., 3:])
    y[h > 1] = 2.0
    y[y.sum((1, 2, 3)) > 1e3] = 0
    return torch.empty_like(y).copy_(y.cos() * h)


def branches(shape: tuple[int, ...], *takes: str, functions: list[Callable[[Tensor], Tensor]]) -> Case:
    """Functions of one tensor side by side."""
    return call(lambda h: torch.cat([function(1.3 * h) for function in functions], 1), shape, *takes)


POINTWISE: dict[str, Case] = {
    "piecewise linear": branches(
        VECTOR, "relu", "leaky_relu", "hardtanh", "clamp", "clamp_min", "clamp_max", "abs", "neg",
        functions=[
            F.relu, F.relu6, F.leaky_relu, lambda h: F.leaky_relu(h, 0.3), F.hardtanh,
            lambda h: F.hardtanh(h, -0.3, 0.7), F.hardsigmoid, lambda h: h.clamp(-0.4, 0.8), lambda h: h.clamp(-0.4),
            lambda h: h.clamp(max=0.3), lambda h: h.clamp_min(0.1), lambda h: h.clamp_max(0.1), torch.abs,
            torch.neg, torch.nn.Threshold(0.1, -0.3), nn.Hardshrink(), nn.Softshrink(),
        ],
    ),
    "activations": branches(
        VECTOR, "elu", "silu", "gelu", "softplus", "tanh", "sigmoid", "mish",
        functions=[
            F.elu, lambda h: F.elu(h, 0.3), F.selu, F.celu, lambda h: F.celu(h, 0.4), torch.tanh, torch.sigmoid,
            F.softplus, lambda h: F.softplus(h, 2.0, 1.0), lambda h: F.softplus(h, 5.0), F.silu, F.gelu,
            lambda h: F.gelu(h, approximate="tanh"), F.mish, F.logsigmoid, F.softsign, F.tanhshrink,
        ],
    ),
    "losses of logits and numbers": call(
        lambda h: torch.cat(
            [F.mse_loss(h, h.sin(), reduction="none"),
             F.binary_cross_entropy_with_logits(h, h.detach().cos().abs(), reduction="none"),
             F.cross_entropy(h.unflatten(1, (3, 2)), h[:, :2].argmax(1, keepdim=True).expand(-1, 2), reduction="none"),
             torch.xlogy(2.0 * (h.detach() > 0), 0.1 + h.exp()), torch.logaddexp(h, h[:, :1].cos())], 1
        ),
        VECTOR, "log_softmax", "gather", "logsumexp",
    ),
    "hardswish": call(lambda h: F.hardswish(4 * h), VECTOR, "hardswish"),
    "elementary functions": branches(
        VECTOR, "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos",
        functions=[
            torch.exp, lambda h: torch.log(2 + h.cos()), lambda h: torch.sqrt(2 + h.cos()),
            lambda h: torch.rsqrt(2 + h.cos()), lambda h: torch.reciprocal(2 + h.cos()), torch.sin, torch.cos,
            torch.square, torch.exp2, lambda h: torch.log1p(h.exp()), lambda h: torch.log2(2 + h.cos()),
            lambda h: torch.log10(2 + h.cos()), torch.erf, torch.erfc, torch.atan, torch.sinh, torch.cosh,
            lambda h: torch.tan(h.tanh()), torch.expm1, lambda h: torch.asin(0.9 * h.tanh()),
            lambda h: torch.acos(0.9 * h.tanh()), torch.asinh, lambda h: torch.acosh(1.1 + h.exp()),
            lambda h: torch.atanh(0.9 * h.tanh()),
        ],
    ),
    "functions of probabilities and counts": branches(
        VECTOR, "lgamma", "digamma", "logit",
        functions=[
            lambda h: torch.lgamma(0.5 + h.exp()), lambda h: torch.digamma(0.5 + h.exp()),
            lambda h: torch.logit(h.sigmoid() * 0.9), lambda h: torch.logit(h.sigmoid(), 0.3),
        ],
    ),
    "powers": branches(
        VECTOR, "pow",
        functions=[
            lambda h: h**2, lambda h: h**3, lambda h: h**1, lambda h: (2 + h.cos()) ** -0.5, lambda h: h.pow(2.0),
            lambda h: (h.exp()) ** 1.5, lambda h: (2 + h.sin()) ** 0.5,
        ],
    ),
    "activations of images": branches(
        IMAGE, "gelu", "elu", "silu", functions=[F.gelu, F.elu, F.silu, F.relu]
    ),
    "activations in place": Case(
        lambda: nn.Sequential(
            nn.Linear(6, 6), nn.ReLU(True), nn.Linear(6, 5), nn.ELU(0.5, True), nn.Linear(5, 5), nn.SiLU(True),
            nn.Linear(5, 5), nn.Hardtanh(inplace=True), nn.LeakyReLU(0.2, True),
        ),
        VECTOR, ("relu", "elu", "silu"),
    ),
    "PReLU": layer(nn.PReLU, VECTOR, "prelu"),
    "PReLU of channels": layer(lambda: nn.PReLU(4), IMAGE, "prelu"),
    "powers of a number and of another value": left_over(
        lambda h: 2**h + (2 + h.sin()) ** h.cos(), VECTOR, "pow"
    ),
}  # fmt: skip


SHAPES: dict[str, Case] = {
    "views": call(
        lambda h: h.view(h.shape[0], -1).unflatten(1, (6, 4)).unsqueeze(-2).squeeze(2).reshape(h.shape[0], 3, 8),
        ROWS, "view", "unsqueeze", "squeeze",
    ),
    "squeezing": call(
        lambda h: h.unsqueeze(1).squeeze() + h[:, :, None].squeeze((2,)) + h.unsqueeze(-1).squeeze(-1), VECTOR,
        "unsqueeze", "squeeze",
    ),
    "copies": call(lambda h: F.dropout(h.clone().contiguous(), 0.3, False).sin(), ROWS),
    "permutations": call(
        lambda h: h.permute(0, 3, 1, 2).transpose(1, -1).movedim(1, 2).mT.swapaxes(1, 2).reshape(h.shape[0], -1).sin(),
        IMAGE, "permute",
    ),
    "rows and samples exchanged and back": call(
        lambda h: (h.transpose(0, 1).sin() * 2).transpose(0, 1), ROWS, "transpose"
    ),
    "t": call(lambda h: h.t().sin().T, VECTOR),
    "slices": call(
        lambda h: torch.cat(
            [h[:, 1:], h[:, -2:-1], h[:, ::2], h[:, :-1], h[:, 2][:, None], h.narrow(1, 1, 2)], 1
        ).sin(),
        ROWS, "slice", "select",
    ),
    "a slice from behind": call(lambda h: h[..., 1:3].sin() * h[..., -1:] + h[..., 0, None], IMAGE, "slice"),
    "select, from behind": call(lambda h: h.select(-1, -2) * h.select(2, 1).sin(), IMAGE, "select"),
    "expand": call(
        lambda h: (h[:, :, None].expand(-1, -1, 4) * h.sin()[:, None, :4].expand(h.shape[0], 6, 4)).cos(), VECTOR,
        "expand",
    ),
    "expand to another rank": call(lambda h: (h.sum(1).expand(1, h.shape[0])[0][:, None] * h).sin(), VECTOR),
    "repeat": call(lambda h: h.repeat(1, 3).sin() + h.repeat(1, 1, 3)[0] , VECTOR, "repeat"),
    "repeat of rows": call(lambda h: h.repeat(1, 2, 3).sin(), ROWS, "repeat"),
    "repeat_interleave": left_over(lambda h: h.repeat_interleave(2, 1).sin(), ROWS, "repeat_interleave"),
    "sums over": call(
        lambda h: torch.cat(
            [h.sum(-1), h.mean((1, 2))[:, None], h.sum(1, keepdim=True).flatten(1), h.mean(-2),
             h.sum((-1, 1), keepdim=True)[:, 0], h.flatten(1).mean(1, keepdim=True)], 1,
        ).sin(),
        ROWS, "sum", "mean",
    ),
    "means over images": call(
        lambda h: h.sin() - h.mean((1, 2, 3), keepdim=True) * h.sum(1, keepdim=True), IMAGE, "mean"
    ),
    "split": call(lambda h: h.split(4, 1)[0] * h.split(2, 1)[1].repeat(1, 2), VECTOR, "split", "getitem"),
    "split with sizes, a part unused": call(
        lambda h: (lambda a, b, c: a.sin() * c.sum(1, keepdim=True))(*h.split([2, 1, 3], 1)), VECTOR,
        "split_with_sizes",
    ),
    "split, from behind": call(lambda h: torch.mul(*h.split(3, -1)).sin(), ROWS, "split"),
    "chunk": call(lambda h: (lambda a, b: a * b.sigmoid())(*h.chunk(2, 1)), IMAGE),
    "chunk, uneven": call(lambda h: h.chunk(4, 1)[2].sin() * h.chunk(4, 1)[0], VECTOR),
    "unbind": call(lambda h: (lambda a, b, c, d: a * d.sin())(*h.unbind(1)), ROWS, "unbind"),
    "unbind, from behind": call(lambda h: h.unbind(-1)[1].sin() * h.unbind(-1)[3], IMAGE, "unbind"),
    "GLU": layer(nn.GLU, VECTOR),
    "roll and flip": call(
        lambda h: h.roll(1, -1).sin() * h.flip(1) + h.roll((1, 2), (1, 2)).flip((-1, 1)), ROWS, "roll", "flip"
    ),
    "Fourier features": call(
        lambda h, w: torch.cat([(2 * torch.pi * h @ w()).sin(), (2 * torch.pi * h @ w()).cos()], -1), VECTOR,
        held=((6, 4),),
    ),
    "gathered columns": call(
        lambda h: h[:, [0, 3, 3, 1]].sin() + h.index_select(1, torch.tensor([1, 2, 0, 0])), VECTOR,
        "index", "index_select",
    ),
    "a cumulated sum": left_over(lambda h: h.cumsum(1).sin() * h.cumsum(-1), VECTOR, "cumsum"),
    "a filter of frequencies": left_over(
        lambda h: torch.fft.irfft2(torch.fft.rfft2(h)[:, :, :, :2] * torch.exp(1j * h.mean((1, 2, 3), keepdim=True))),
        IMAGE, "fft_rfft2", "fft_irfft2", "mul", "exp",
    ),
    "complex numbers": left_over(
        lambda h: torch.view_as_real(torch.view_as_complex(h.view(-1, 3, 2)).roll(1, 1).conj() ** 2).flatten(1),
        VECTOR, "view_as_complex", "view_as_real", "pow", "_conj",
    ),
    "a product of all": left_over(lambda h: h.sin() + h.prod(1, keepdim=True), VECTOR, "prod"),
    "variance and deviation": call(
        lambda h: h.std((1, 2), keepdim=True) * h + h.var(-1, unbiased=False, keepdim=True)
        + h.var(1, correction=2, keepdim=True) * h.std(2, correction=0).sin().unsqueeze(-1),
        ROWS, "linalg_vector_norm",
    ),
    "written to slices, entries and masked places": call(_written, IMAGE),
    "casts": call(lambda h: (h > 0).to(h) * h + (h > 0.2).double() + (h < 0.1) * h.sin(), VECTOR, "gt"),
}  # fmt: skip


CHOICES: dict[str, Case] = {
    "detach": call(lambda h: h.detach() * h + h.sin().detach(), VECTOR, "detach"),
    "detach of the tangents' cotangents": call(lambda h, w: (h.sin() * w()).detach() * w() + h, VECTOR, held=((6,),)),
    "no_grad": call(lambda h, w: _under_no_grad(h, w()) * h.sin(), VECTOR, held=((6,),)),
    "zeros and ones": call(
        lambda h, w: torch.cat(
            [torch.zeros_like(h), h * torch.ones_like(h) * w(), h.new_full((h.shape[0], 2), 0.3),
             h.new_ones(1, 2).expand(h.shape[0], 2) * h.new_zeros(2), torch.full_like(h, 2)], 1
        ).sin(),
        VECTOR, "zeros_like", "ones_like", "new_full", held=((6,),),
    ),
    "comparisons": call(
        lambda h: sum(
            mask.to(h) * h.sin()
            for mask in (
                h >= 0.1, h <= 0.3, h < 0.2, h == 0.5, h != 0.2, h.isnan(), h.isinf(), h.isfinite(), ~(h > 0),
                (h > 0) & (h < 1),
                (h > 0) | (h < -1), (h > 0).logical_and(h > 0.1), (h > 0).logical_or(h > 0.1),
                (h > 0).logical_xor(h > 0.1), (h > 0).logical_not(),
            )
        ),
        VECTOR, "ge", "le", "lt", "eq", "isfinite",
    ),
    "rounding": call(
        lambda h: h.sign() * h + (3 * h).floor() * h.sin() + (3 * h).ceil() + (3 * h).round() * h + (3 * h).trunc()
        + h.argmax(1, keepdim=True) * h + h.argmin(1, keepdim=True) + torch.ops.aten.type_as(h, h),
        VECTOR, "sign", "floor", "argmax",
    ),
    "a mask": call(
        lambda h: torch.where(torch.arange(6) > 2, h, h.sin()).masked_fill(torch.arange(6) == 1, 0.3), VECTOR, "where"
    ),
    "choices": call(
        lambda h, w: torch.where(h > 0, h.sin(), w()) + torch.where(w() > 0, h.sum(1, keepdim=True), h)
        + torch.where(h > 0.1, 0.0, h.cos()) + h.exp().masked_fill(h < -0.1, 2.0), VECTOR, "where", "masked_fill",
        held=((6,),),
    ),
    "choices that grow": call(lambda h, w: torch.where(w() > 0, h[:, :, None], w()), VECTOR, "where", held=((6, 2),)),
}  # fmt: skip


def _under_no_grad(h: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        return h.cos() * w


TABLES: dict[str, Case] = {
    "Embedding of the largest": call(
        lambda h, w: h * F.embedding(h.argmax(1), w()), VECTOR, "embedding", held=((6, 6),)
    ),
    "PReLU, its slope a parameter of one's own": call(
        lambda h, w: F.prelu(h, w().tanh()), VECTOR, "prelu", held=((1,),)
    ),
    "gathered by position": call(
        lambda h: (
            h.gather(1, torch.tensor([[0, 0, 3]]).expand(h.shape[0], 3)).sin()
            + h.sin().gather(-1, torch.tensor([[5, 1, 3]]).expand(h.shape[0], 3))
        ),
        VECTOR,
        "gather",
    ),
    "gathered by numbers that depend on z": call(
        lambda h: h.gather(1, h.argmax(1, keepdim=True)) * h, VECTOR, "gather"
    ),
}

LENGTHS: dict[str, Case] = {
    "normalize": call(lambda h: F.normalize(h.sin() + 0.1, dim=1), VECTOR, "linalg_vector_norm"),
    "normalize channels": call(lambda h: F.normalize(h.sin() + 0.1, dim=-3), IMAGE, "linalg_vector_norm"),
    "length of an image": call(
        lambda h: (
            torch.linalg.vector_norm(h.cos(), dim=(2, 3))
            * torch.linalg.vector_norm(h, 2, 1).mean((1, 2))[:, None]
        ),
        IMAGE,
        "linalg_vector_norm",
    ),
}


def picked(of: Callable[..., Tensor], shape: tuple[int, ...], *takes: str) -> Case:
    """A function of h and of positions that are a buffer."""
    return Case(lambda: Picking(of), shape, takes)


class Picking(nn.Module):
    """Positions, one of them twice."""

    def __init__(self, of: Callable[..., Tensor]) -> None:
        super().__init__()
        self.of = of
        self.register_buffer("positions", torch.tensor([1, 3, 0, 1, 2]))

    def forward(self, h: Tensor) -> Tensor:
        return self.of(h, self.positions)


POSITIONS: dict[str, Case] = {
    "columns": call(
        lambda h: h[:, [0, 3, 3, 1]].sin() + h.index_select(1, torch.tensor([1, 2, 0, 0])), VECTOR,
        "index", "index_select",
    ),
    "channels, of a buffer": picked(
        lambda h, at: h[:, at].sin() * h.index_select(1, at), IMAGE, "index", "index_select"
    ),
    "places of images": picked(
        lambda h, at: torch.cat(
            [h[:, :, at[:3], at[1:4]].flatten(1), h[..., at, :].flatten(1), h[:, at[:4].view(2, 2)].flatten(1),
             h[:, :, at[:2, None], at[:3]].flatten(1), h.index_select(-1, at[1]).flatten(1)], 1
        ).sin(),
        IMAGE, "index", "index_select",
    ),
    "windows of rows": picked(
        lambda h, at: h[:, torch.arange(3)[:, None] + torch.arange(2)].sin() * h[:, at[:3, None], :1], ROWS, "index"
    ),
    "dimensions apart": left_over(lambda h: h[:, [0, 1], :, [1, 0]].transpose(0, 1).sin(), IMAGE, "index"),
    "roll and flip": call(
        lambda h: h.roll(1, -1).sin() * h.flip(1) + h.roll((2, -1), (1, 2)) * h.flip((-1, 1)), ROWS, "roll", "flip"
    ),
}  # fmt: skip

FILES = {
    "affine": AFFINE, "choices": CHOICES, "joins": JOINS, "lengths": LENGTHS, "maps": MAPS, "norms": NORMS,
    "pointwise": POINTWISE, "positions": POSITIONS, "shapes": SHAPES, "softmax": SOFTMAX, "tables": TABLES,
}  # fmt: skip

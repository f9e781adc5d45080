"""By the file of their rules, how forwards use layers with weights: affine maps, joins, norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from layer_kinds import IMAGE, ROWS, SIGNAL, VECTOR, VOLUME, Call
from network_layer import Case, call, frozen, layer
from torch import nn

aten = torch.ops.aten

AFFINE: dict[str, Case] = {
    "Linear": layer(lambda: nn.Linear(6, 5), VECTOR, "linear"),
    "Linear without bias": layer(lambda: nn.Linear(6, 5, bias=False), VECTOR, "linear"),
    "Linear of rows": layer(lambda: nn.Linear(6, 5), ROWS, "linear"),
    "Linear of rows of rows": layer(lambda: nn.Linear(4, 3), VOLUME, "linear"),
    "Linear of one row": layer(lambda: nn.Linear(6, 3), (1, 6), "linear"),
    "Linear, its weight larger than the batch": layer(lambda: nn.Linear(6, 40), VECTOR, "linear"),
    "Linear, its weight smaller than the batch": layer(lambda: nn.Linear(2, 2), (20, 2), "linear"),
    "Linear, frozen": layer(lambda: nn.Linear(6, 5).requires_grad_(False), VECTOR, "linear"),
    "Linear, its weight frozen": layer(lambda: frozen(nn.Linear(6, 5), "weight"), VECTOR, "linear"),
    "Linear, its bias frozen": layer(lambda: frozen(nn.Linear(6, 5), "bias"), VECTOR, "linear"),
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


JOINS: dict[str, Case] = {
    "sums of both": call(
        lambda h: torch.add(h, h.sin(), alpha=2) + torch.sub(h.tanh(), h, alpha=0.3), VECTOR, "add", "sub"
    ),
    "sums with numbers": call(lambda h: 2 - (1 + (h - 0.5)), VECTOR, "add", "sub", "rsub"),
    "rsub": call(lambda h: torch.rsub(h.sin(), h, alpha=3), VECTOR, "rsub"),
    "a sum with itself": call(lambda h: h + h, VECTOR, "add"),
    "a sum with a parameter": call(lambda h, b: h.sin() + b(), IMAGE, "add", held=((4, 1, 1),)),
    "a parameter less a value": call(lambda h, b: b() - h.sin(), IMAGE, "sub", held=((1, 4),)),
    "a sum that grows to a parameter's size": call(
        lambda h, b: torch.sin(h + b()).transpose(0, 1), VECTOR, "add", held=((4, 1, 6),)
    ),
    "a sum that grows on both sides": call(
        lambda h: (h[:, :, None] + h.sin()[:, None]).sin(), VECTOR, "add"
    ),
    "a sum of different ranks": call(
        # [B, 4, 6] and [4, B, 6], of which the first has more rows than samples: [B, 1, 4, 6] + [B, 6, 1, 1].
        lambda h: (h[:, None] + h.sum(1)[:, :, None, None]).cos(), ROWS, "add"
    ),
    "a scalar parameter": call(lambda h, b, c: (h + b()) * c(), VECTOR, "add", "mul", held=((), ())),
    "a sum over samples' rows": call(
        lambda h, b: torch.sin(h + b().expand(h.shape[0], 6) * torch.ones(h.shape[0], 1).to(h) + b()),
        VECTOR, "add", held=((6,),),
    ),
    "products of both": call(lambda h: h * h.sin() * h, VECTOR, "mul"),
    "a square by itself": call(lambda h: h * h, VECTOR, "mul"),
    "products with numbers": call(lambda h: 3 * h.sin() * 0.5 / 4, VECTOR, "mul", "div"),
    "a product with a parameter": call(lambda h, b: torch.sin(h * b()), IMAGE, "mul", held=((4, 1, 1),)),
    "a parameter times a value": call(lambda h, b: torch.sin(b() * h), IMAGE, "mul", held=((1, 4),)),
    "a product that grows to a parameter's size": call(
        lambda h, b: (h * b()).sin().transpose(0, 1), VECTOR, "mul", held=((5, 1, 6),)
    ),
    "a product that grows on both sides": call(lambda h: h[:, :, None] * h.sin()[:, None], VECTOR, "mul"),
    "a product with a lower rank": call(
        lambda h: h.sum((1, 2))[:, None] * h.flatten(1) + h.mean(2).sum(1, keepdim=True), ROWS, "mul"
    ),
    "a gate of channels": call(lambda h: h * h.mean((2, 3), keepdim=True).sigmoid(), IMAGE, "mul"),
    "a quotient": call(
        lambda h, b: h / (2 + h.square()) + b() / (2 + h.cos()) + h.sin() / b().exp(), VECTOR, "div",
        held=((6,),),
    ),
    "a quotient that grows": call(
        lambda h, b: (h.sum(1, keepdim=True) / (2 + h.square()) + 1 / (2 + h.cos()))[:, None] + h[:, None] / b().exp(),
        VECTOR, "div", held=((3, 1),),
    ),
    "a matrix product": call(lambda h, w: h @ w(), ROWS, "matmul", held=((6, 3),)),
    "a matrix product from the left": call(lambda h, w: w() @ h, ROWS, "matmul", held=((5, 4),)),
    "a matrix product of rows": call(lambda h, w: torch.mm(h, w()), VECTOR, "mm", held=((6, 3),)),
    "a matrix product of both": call(lambda h: torch.bmm(h, h.sin().mT), ROWS, "bmm"),
    "a matrix product of images": call(lambda h: h @ h.sin().transpose(-1, -2), IMAGE, "matmul"),
    "a matrix product of a batch of parameters": call(lambda h, w: h[:, None] @ w(), ROWS, "matmul", held=((2, 6, 3),)),
    "a matrix product of images by a matrix of samples": call(
        lambda h: h @ h.sum(1, keepdim=True).sin(), IMAGE, "matmul"
    ),
    "a matrix product with a vector": call(
        lambda h, w: (h.sin() @ w() + torch.matmul(h, w()))[:, None], VECTOR, "matmul", held=((6,),)
    ),
    "a matrix product of rows with a vector": call(lambda h, w: h.sin() @ w(), ROWS, "matmul", held=((6,),)),
    "a vector times a matrix": call(lambda h, w: w() @ h.sin(), ROWS, "matmul", held=((4,),)),
    "addmm": call(lambda h, b, w: torch.addmm(b(), h, w(), beta=0.5, alpha=2), VECTOR, "matmul", held=((3,), (6, 3))),
    "baddbmm": call(lambda h: torch.baddbmm(h[:, :, :4], h, h.sin().mT, beta=0.5, alpha=2), ROWS),
    "addcmul": call(lambda h, b: torch.addcmul(b(), h, h.sin(), value=2), VECTOR, held=((6,),)),
    "lerp": call(lambda h, b: torch.lerp(h, h.sin(), 0.3) + torch.lerp(h, b(), h.sigmoid()), VECTOR, held=((6,),)),
    "attention": call(
        lambda h, q, k: torch.softmax((h @ q()) @ (h @ k()).mT / 6**0.5, -1) @ h, ROWS,
        "matmul", "softmax", held=((6, 6), (6, 6)),
    ),
    "attention, PyTorch's": call(
        lambda h: F.scaled_dot_product_attention(h[:, None], h[:, None].sin(), h[:, None]), ROWS, "softmax"
    ),
    "MultiheadAttention": Case(
        lambda: Call(lambda h, a: a(h, h, h)[0], nn.MultiheadAttention(6, 2, batch_first=True)), ROWS, ("softmax",)
    ),
    "TransformerEncoderLayer": layer(
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), ROWS, "softmax", "layer_norm"
    ),
    "einsum": call(
        lambda h, w: torch.einsum("bij,jk,bkl->bil", h, w(), h.mT).flatten(1), ROWS, held=((6, 6),)
    ),
    "cat": call(lambda h: torch.cat([h, h.sin(), h[:, :2]], 1), VECTOR, "cat"),
    "cat of rows, from behind": call(lambda h: torch.cat([h, h.sin()[:, :, :1]], -1), ROWS, "cat"),
    "cat with passive parts": call(
        lambda h, b: torch.cat([b().expand(h.shape[0], 2), h, torch.ones(h.shape[0], 1).to(h)], 1).sin(), VECTOR,
        "cat", held=((1, 2),),
    ),
    "cat with itself": call(lambda h: torch.cat([h, h], 1), VECTOR, "cat"),
    "stack": call(lambda h: torch.stack([h, h.sin()], 1) * torch.stack([h.cos(), h], 1), VECTOR, "stack"),
    "stack, from behind, with a parameter": call(
        lambda h, b: torch.stack([h, b().expand_as(h), h.sin()], -1).sin(), VECTOR, "stack", held=((6,),)
    ),
    "a value used three times": call(lambda h: h.sin() + h * h.cos() + torch.cat([h[:, 3:], h[:, :3]], 1), VECTOR),
    "a condition of each sample": call(
        lambda h, b: torch.cat([h, torch.ones(h.shape[0], 1).to(h) * b()], 1) * h.sum(1, keepdim=True), VECTOR, "cat",
        held=((6,),),
    ),
}  # fmt: skip


NORMS: dict[str, Case] = {
    "LayerNorm": layer(lambda: nn.LayerNorm(6), VECTOR, "layer_norm"),
    "LayerNorm, plain": layer(lambda: nn.LayerNorm((4, 6), elementwise_affine=False), ROWS, "layer_norm"),
    "LayerNorm without bias": layer(lambda: nn.LayerNorm((4, 6), bias=False, eps=0.1), (2, 4, 6), "layer_norm"),
    "LayerNorm, its gain frozen": layer(lambda: frozen(nn.LayerNorm(6), "weight"), ROWS, "layer_norm"),
    "LayerNorm, its bias frozen": layer(lambda: frozen(nn.LayerNorm(6), "bias"), ROWS, "layer_norm"),
    "LayerNorm, frozen": layer(lambda: nn.LayerNorm(6).requires_grad_(False), ROWS, "layer_norm"),
    "LayerNorm of a transposed image": call(
        lambda h, g: F.layer_norm(h.permute(0, 2, 3, 1), (4,), g()), IMAGE, "layer_norm", held=((4,),)
    ),
    "LayerNorm, a bias alone": call(
        lambda h, b: F.layer_norm(h, (6,), None, b()), ROWS, "layer_norm", held=((6,),)
    ),
    "LayerNorm, twice the same": Case(
        lambda: Call(lambda h, n: n(n(h).sin()), nn.LayerNorm(6)), ROWS, ("layer_norm",)
    ),
    "RMSNorm": layer(lambda: nn.RMSNorm(6), ROWS, "rms_norm"),
    "RMSNorm, plain": layer(lambda: nn.RMSNorm((4, 6), eps=0.1, elementwise_affine=False), ROWS, "rms_norm"),
    "GroupNorm": layer(lambda: nn.GroupNorm(2, 4), IMAGE, "group_norm"),
    "GroupNorm, plain": layer(lambda: nn.GroupNorm(2, 4, affine=False), SIGNAL, "group_norm"),
    "GroupNorm of vectors": layer(lambda: nn.GroupNorm(2, 6), VECTOR, "group_norm"),
    "GroupNorm of volumes, one group": layer(lambda: nn.GroupNorm(1, 2), VOLUME, "group_norm"),
    "GroupNorm, its gain frozen": layer(lambda: frozen(nn.GroupNorm(2, 4), "weight"), IMAGE, "group_norm"),
    "GroupNorm, channels last": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.SiLU(), nn.Conv2d(6, 2, 1)),
        IMAGE, ("group_norm",),
    ),
    "InstanceNorm1d": layer(lambda: nn.InstanceNorm1d(4), SIGNAL, "instance_norm"),
    "InstanceNorm2d": layer(lambda: nn.InstanceNorm2d(4, affine=True), IMAGE, "instance_norm"),
    "InstanceNorm3d": layer(lambda: nn.InstanceNorm3d(2, affine=True, eps=0.1), VOLUME, "instance_norm"),
    "InstanceNorm2d, tracking": layer(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
    "BatchNorm1d": layer(lambda: nn.BatchNorm1d(6), VECTOR),
    "BatchNorm1d, plain": layer(lambda: nn.BatchNorm1d(4, affine=False), SIGNAL),
    "BatchNorm2d": layer(lambda: nn.BatchNorm2d(4, eps=0.1), IMAGE),
    "BatchNorm2d, its gain frozen": layer(lambda: frozen(nn.BatchNorm2d(4), "weight"), IMAGE),
    "BatchNorm2d, frozen": layer(lambda: nn.BatchNorm2d(4).requires_grad_(False), IMAGE),
    "BatchNorm3d": layer(lambda: nn.BatchNorm3d(2), VOLUME),
    "BatchNorm, functional": call(
        lambda h, m, v, g: F.batch_norm(h, m().detach(), v().detach().exp(), g()), IMAGE, held=((4,), (4,), (4,))
    ),
}  # fmt: skip


SOFTMAX: dict[str, Case] = {
    "Softmax": call(
        lambda h: h.softmax(-1) * h.softmax(1) + aten._softmax(h, 1, False) * aten._log_softmax(h, -1, False),
        ROWS, "softmax", "_softmax", "_log_softmax",
    ),
    "Softmax2d": layer(nn.Softmax2d, IMAGE, "softmax"),
    "logsumexp": call(
        lambda h: (h.logsumexp(1).sin() + h.sin().logsumexp((-1, 1), keepdim=True)[:, 0])
        * h.logsumexp((1, 2))[:, None], ROWS, "logsumexp",
    ),
    "LogSoftmax": call(lambda h: h.log_softmax(-2).sin() + h.log_softmax(2), ROWS, "log_softmax"),
}  # fmt: skip

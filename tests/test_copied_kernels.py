"""Kernels of layers of which every sample has its own parameters: against PyTorch's, one sample after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae import _C
from fastvae.network.copied.convolutions import canonical, stored

SAMPLES = 3
F64 = torch.float64

GEOMETRIES: dict[str, tuple[Any, ...]] = {
    # channels, filters, images, size, kernel, stride, padding, dilation, groups
    "line": (2, 5, 1, (9,), (4,), (2,), (1,), (1,), 1),
    "dilated line": (3, 4, 2, (11,), (3,), (1,), (2,), (2,), 1),
    "image": (3, 5, 1, (7, 6), (3, 2), (2, 1), (1, 0), (1, 1), 1),
    "wide": (4, 40, 1, (12, 10), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "one pixel": (6, 7, 2, (4, 5), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one pixel, groups": (6, 4, 1, (4, 5), (1, 1), (1, 1), (0, 0), (1, 1), 2),
    "all of it": (3, 33, 1, (4, 4), (4, 4), (1, 1), (0, 0), (1, 1), 1),
    "groups": (4, 6, 2, (6, 5), (3, 3), (2, 2), (1, 2), (1, 2), 2),
    "each channel": (5, 5, 1, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 5),
    "more padding than kernel": (2, 3, 1, (3, 3), (2, 2), (3, 3), (4, 4), (1, 1), 1),
    "left over": (2, 3, 1, (8, 8), (2, 2), (3, 3), (0, 0), (1, 1), 1),
    "many positions": (8, 8, 1, (40, 40), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "volume": (2, 4, 1, (4, 5, 3), (3, 2, 3), (2, 1, 1), (1, 0, 1), (1, 1, 1), 1),
    "dilated volume": (2, 4, 2, (5, 5, 5), (2, 2, 2), (1, 1, 1), (1, 1, 1), (2, 2, 2), 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions(name: str, dtype: torch.dtype) -> None:
    channels, filters, images, size, kernel, stride, padding, dilation, groups = GEOMETRIES[name]
    torch.manual_seed(0)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    x = torch.randn(SAMPLES, images, channels, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(SAMPLES, filters, channels // groups, *kernel, dtype=dtype, requires_grad=True)
    bias = torch.randn(SAMPLES, filters, dtype=dtype)
    expected = torch.stack(
        [
            convolve(x[i], weight[i], bias[i], stride, padding, dilation, groups)  # type: ignore[operator]
            for i in range(SAMPLES)
        ]
    )
    rules = _C.CopiedConvolutionRules(list(kernel), list(stride), list(padding), list(dilation), groups)
    own = stored(weight.detach())
    near = {"rtol": 0.0, "atol": (1e-4 if dtype == torch.float32 else 1e-12) * math.sqrt(channels * 27)}
    found = rules.smaller(x.detach().flatten(0, 1), own, bias)
    torch.testing.assert_close(found, expected.detach().flatten(0, 1), **near)
    dy = torch.randn_like(expected)
    dx, dw = torch.autograd.grad(expected, (x, weight), dy)
    larger = rules.larger(dy.flatten(0, 1), own, None, list(size))
    torch.testing.assert_close(larger, dx.flatten(0, 1), **near)
    shift = torch.randn(SAMPLES, channels, dtype=dtype)
    shifted = rules.larger(dy.flatten(0, 1), own, shift, list(size))
    by_image = shift.repeat_interleave(images, 0).reshape(-1, channels, *[1] * len(size))
    torch.testing.assert_close(shifted, larger + by_image, **near)
    of_weight = rules.weight(x.detach().flatten(0, 1), dy.flatten(0, 1), SAMPLES)
    near["atol"] *= math.sqrt(dy[0].numel())
    torch.testing.assert_close(canonical(of_weight, kernel), dw, **near)


def test_convolutions_refuse_what_they_do_not_take() -> None:
    rules = _C.CopiedConvolutionRules([3, 3], [1, 1], [0, 0], [1, 1], 1)
    x, weight = torch.randn(4, 2, 5, 5), torch.randn(2, 9, 2, 6)
    y = rules.smaller(x, weight, None)
    calls: dict[str, Callable[[], object]] = {
        "kernel": lambda: _C.CopiedConvolutionRules([], [], [], [], 1),
        "stride": lambda: _C.CopiedConvolutionRules([3], [1, 1], [0], [1], 1),
        "kernel, stride": lambda: _C.CopiedConvolutionRules([0], [1], [0], [1], 1),
        "groups": lambda: _C.CopiedConvolutionRules([3], [1], [0], [1], 0),
        "larger": lambda: rules.smaller(x[0], weight, None),
        "weight": lambda: rules.smaller(x, weight[0], None),
        "weight: expected shape": lambda: rules.smaller(x[:3], weight, None),
        "weight: ": lambda: rules.smaller(x, weight[:, :8], None),
        "bias": lambda: rules.smaller(x, weight, torch.ones(2, 5)),
        "smaller": lambda: rules.smaller(x[:, :, :2], weight, None),
        "sizes": lambda: rules.larger(y, weight, None, [5]),
        "smaller: expected at most": lambda: rules.larger(y, weight, None, [4, 5]),
        "samples": lambda: rules.weight(x, y, 3),
        "smaller: expected 4 rows": lambda: rules.weight(x, y[:2], 2),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"copied_convolution: {name}"):
            call()
    for wrong in (x.double(), x.long()):
        with pytest.raises(TypeError, match="copied_convolution: "):
            rules.smaller(wrong, weight, None)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam(decay: float) -> None:
    torch.manual_seed(0)
    start = [torch.randn(2, 3, 70, dtype=F64), torch.randn(2, 5, dtype=F64), torch.randn(2, 4, dtype=F64)]
    ours, theirs = [each.clone() for each in start], [each.clone() for each in start]
    adam = _C.CopiesAdam(ours, 0.1, 0.8, 0.95, 1e-8, decay)
    optimizer = torch.optim.Adam(theirs, 0.1, (0.8, 0.95), 1e-8, decay)
    for step in range(6):
        delta, h, plain = (
            torch.randn(2, 3, dtype=F64),
            torch.randn(2, 70, dtype=F64),
            torch.randn(2, 5).double(),
        )
        theirs[0].grad = delta[:, :, None] * h[:, None]
        theirs[1].grad = plain
        optimizer.step()
        gradient = delta if step % 2 else theirs[0].grad.clone()
        adam.step([gradient, plain, None], [h if step % 2 else None, None, None])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours[2], start[2])


def test_adam_refuses_what_it_does_not_take() -> None:
    values = [torch.ones(2, 3, 4), torch.ones(2, 3)]
    adam = _C.CopiesAdam(values, 0.1, 0.8, 0.95, 1e-8, 0.0)
    calls: dict[str, Callable[[], object]] = {
        "values": lambda: _C.CopiesAdam([torch.ones(3, 2).T], 0.1, 0.8, 0.95, 1e-8, 0.0),
        "gradients, inputs": lambda: adam.step([None], [None]),
        "gradients": lambda: adam.step([torch.ones(2, 3), None], [None, None]),
        "inputs": lambda: adam.step([torch.ones(2, 3), None], [torch.ones(2, 3), None]),
        "inputs: expected a value": lambda: adam.step([None, torch.ones(2, 3)], [None, torch.ones(2, 3)]),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"copies_adam: {name}"):
            call()
    with pytest.raises(TypeError, match="copies_adam: gradients"):
        adam.step([None, torch.ones(2, 3).double()], [None, None])
    assert all(torch.equal(each, torch.ones_like(each)) for each in values)


@pytest.mark.parametrize("last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("kind", ["groups", "rows", "given"])
def test_norms_with_gains_of_the_samples_own(kind: str, last: bool) -> None:
    """Of two rows of x each."""
    torch.manual_seed(0)
    shape = (2 * SAMPLES, 6) if kind == "rows" else (2 * SAMPLES, 6, 3, 4)
    x = torch.randn(shape, dtype=F64)
    x = x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x
    x.requires_grad_()
    gain, bias = (torch.randn(SAMPLES, 6, dtype=F64, requires_grad=True) for _ in range(2))
    mean, s = torch.randn(6, dtype=F64), torch.rand(6, dtype=F64) + 0.5

    def plain(rows: Tensor, g: Tensor, b: Tensor) -> Tensor:
        if kind == "rows":
            return F.layer_norm(rows, (6,), g, b)
        if kind == "groups":
            return F.group_norm(rows, 2, g, b)
        return F.batch_norm(rows, mean, s**-2, g, b, eps=0.0)

    parts = zip(x.split(2), gain, bias, strict=True)
    expected = F.silu(torch.cat([plain(*part) for part in parts]))
    rules = _C.NormActivationRules(
        "given" if kind == "given" else "groups", 2 if kind == "groups" else 1, 1e-5, "silu"
    )
    given = (mean, s) if kind == "given" else (None, None)
    affine = gain.detach(), bias.detach()
    y, *statistics = rules.forward(x.detach(), *affine, *given)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, (x, gain, bias), dy)
    statistics = list(given) if kind == "given" else statistics
    found = rules.reverse(dy, x.detach(), *affine, *statistics, True)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="norm_activation: gain, bias: expected rows that divide"):
        rules.forward(x.detach()[:4], *affine, *given)

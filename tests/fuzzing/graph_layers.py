"""Random graphs of layers: sequences with skips, joins, gates, norms, shared weights, in up to three dimensions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.own_gradients import Swish

from .decoders import ACTIVATIONS

Shape = tuple[int, ...]
Step = tuple[Callable[..., Tensor], list[int], nn.Module | None, Shape]
Kind = Callable[[random.Random, int, list[Shape]], "Step | None"]

CONVOLUTIONS = {
    2: (nn.Conv1d, nn.ConvTranspose1d),
    3: (nn.Conv2d, nn.ConvTranspose2d),
    4: (nn.Conv3d, nn.ConvTranspose3d),
}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
INSTANCE_NORMS = {2: nn.InstanceNorm1d, 3: nn.InstanceNorm2d, 4: nn.InstanceNorm3d}
POOLS = {2: F.avg_pool1d, 3: F.avg_pool2d, 4: F.avg_pool3d}
INTERPOLATED = {2: "linear", 3: "bilinear", 4: "trilinear"}


class Graph(nn.Module):
    """Steps in order, each of some values before it; all values that nothing takes are returned, side by side."""

    def __init__(self, steps: list[Step], results: list[int]) -> None:
        super().__init__()
        self.steps = tuple((function, taken) for function, taken, _, _ in steps)
        self.inner = nn.ModuleList([nn.Identity() if module is None else module for _, _, module, _ in steps])
        self.results = results

    def forward(self, z: Tensor) -> Tensor:
        values = [z]
        for (function, taken), inner in zip(self.steps, self.inner, strict=True):
            given = [values[index] for index in taken]
            values.append(function(inner, *given))
        return torch.cat([values[index].flatten(1) for index in self.results], 1)


class Noted(nn.Module):
    """Keeps count, a history and its last value, as people's modules do for their logs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.history, self.last = 0, [], torch.zeros(0)

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(tuple(h.shape))
        self.last = h.detach()
        return h * 1.5


class Held(nn.Module):
    """A parameter."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.tensor = nn.Parameter(torch.randn(shape))


def drawn_graph(rng: random.Random, shape: Shape, more: Sequence[Kind] = ()) -> Graph:
    """From values of this shape.

    Args:
        more: kinds of steps besides those of below.
    """
    shapes: list[Shape] = [shape]
    steps: list[Step] = []
    unused = {0}
    shared: dict[tuple[Any, ...], nn.Module] = {}
    wanted = rng.randint(2, 12)
    for _ in range(60):
        if len(steps) == wanted:
            break
        # Mostly on from the last value: deep rather than wide.
        at = len(shapes) - 1 if rng.random() < 0.6 else rng.randrange(len(shapes))
        step = drawn_step(rng, at, shapes, shared, more)
        if step is None or torch.Size(step[3]).numel() > 48:
            continue
        steps.append(step)
        unused -= set(step[1])
        unused.add(len(shapes))
        shapes.append(step[3])
    return Graph(steps, sorted(unused))


def drawn_step(
    rng: random.Random,
    at: int,
    shapes: list[Shape],
    shared: dict[tuple[Any, ...], nn.Module],
    more: Sequence[Kind],
) -> Step | None:
    shape = shapes[at]
    kinds: list[Kind] = [
        *more,
        activation,
        changed,
        gate,
        join,
        join,
        passive,
        part,
        softmax,
        stop,
        left_over,
        noted,
    ]
    kinds += (
        [vector, vector, image, rows]
        if len(shape) == 1
        else [convolution, convolution, resized, padded, flat]
    )
    kinds += [norm, normed_rows]
    kind = rng.choice(kinds)
    found = kind(rng, at, shapes)
    if found is None:
        return None
    # A layer that fits is now and then one that was used before.
    function, taken, module, new = found
    if module is not None and shape == new:
        key = (shape, kind.__name__, type(module).__name__)
        if rng.random() < 0.4:
            module = shared.get(key, module)
        shared[key] = module
    return function, taken, module, new


def activation(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    module = rng.choice(ACTIVATIONS)()
    function = rng.choice(
        [lambda m, h: m(h)] * 3 + [lambda _, h: h.sin(), lambda _, h: h.square() / (2 + h.cos())]
    )
    return function, [at], module, shapes[at]


def changed(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    """What was computed is changed in place, as a whole, through a view of it, or between two uses."""

    def through_a_view(_: nn.Module, h: Tensor) -> Tensor:
        doubled = 2 * h
        doubled.flatten(1)[:, :1].mul_(3)
        return doubled + 1

    def between_uses(_: nn.Module, h: Tensor) -> Tensor:
        doubled = 2 * h
        before = doubled + 1
        doubled.neg_().sub_(h)
        return before - 3 * doubled

    functions: list[Callable[..., Tensor]] = [
        lambda _, h: (1.5 * h).mul_(2).add_(1, alpha=0.5),
        lambda _, h: F.relu_(h + 1),
        lambda _, h: F.leaky_relu_(h.sin().add_(h), 0.1),
        through_a_view,
        between_uses,
    ]
    return rng.choice(functions), [at], None, shapes[at]


def vector(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    out = shapes[at][0] if rng.random() < 0.5 else rng.randint(1, 9)
    module = nn.Linear(shapes[at][0], out, bias=rng.random() < 0.8)
    if rng.random() < 0.2:
        module = nn.utils.parametrizations.weight_norm(module)
    return (lambda m, h: m(h)), [at], module, (out,)


def image(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    new = tuple(rng.randint(1, 3) for _ in range(rng.randint(2, 4)))
    module = nn.Linear(shapes[at][0], torch.Size(new).numel())
    return (lambda m, h: m(h).view(h.shape[0], *new)), [at], module, new


def rows(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    """Attention over a vector's parts."""
    if shapes[at][0] % 2:
        return None
    scale = rng.random()

    def function(m: nn.Module, h: Tensor) -> Tensor:
        r = h.unflatten(1, (-1, 2))
        return (torch.softmax(m(r) @ r.mT * scale, -1) @ r).flatten(1)

    return function, [at], nn.Linear(2, 2), shapes[at]


def flat(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    order = list(range(1, len(shapes[at]) + 1))
    rng.shuffle(order)
    return (lambda _, h: h.permute(0, *order).flatten(1)), [at], None, (torch.Size(shapes[at]).numel(),)


def convolution(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    c, *sizes = shapes[at]
    k, s, d = rng.randint(1, 3), rng.randint(1, 2), rng.randint(1, 2)
    p, groups = rng.randint(0, k // 2), rng.choice([g for g in range(1, c + 1) if c % g == 0])
    out = groups * rng.randint(1, 2)
    plain, transposed = CONVOLUTIONS[len(shapes[at])]
    bias = rng.random() < 0.7
    if rng.random() < 0.5:
        new = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n in sizes]
        module = plain(c, out, k, s, p, d, groups, bias)
        if any(n + 2 * p < d * (k - 1) + 1 for n in sizes):
            return None
    else:
        extra = rng.randint(0, s - 1)
        new = [(n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n in sizes]
        module = transposed(c, out, k, s, p, extra, groups, bias, d)
    return None if min(new) < 1 else ((lambda m, h: m(h)), [at], module, (out, *new))


def resized(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    c, *sizes = shapes[at]
    if rng.random() < 0.4:
        if min(sizes) < 2:
            return None
        return (lambda _, h: POOLS[h.dim() - 1](h, 2)), [at], None, (c, *(n // 2 for n in sizes))
    mode = rng.choice(["nearest", INTERPOLATED[len(shapes[at])]])
    new = tuple(n + rng.randint(0, 2) for n in sizes)
    return (lambda _, h: F.interpolate(h, size=new, mode=mode)), [at], None, (c, *new)


def padded(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    c, *sizes = shapes[at]
    mode = rng.choice(["constant", "reflect", "replicate", "circular"])
    pads = [rng.randint(0, 2 if mode == "constant" else n - 1) for n in sizes[::-1] for _ in range(2)]
    value = rng.choice([0.0, 0.7]) if mode == "constant" else None
    new = [n + pads[-2 * i - 2] + pads[-2 * i - 1] for i, n in enumerate(sizes)]
    return (lambda _, h: F.pad(h, pads, mode, value)), [at], None, (c, *new)


def norm(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    shape = shapes[at]
    groups = rng.choice([g for g in range(1, shape[0] + 1) if shape[0] % g == 0])
    affine = rng.random() < 0.7
    kinds: list[Callable[[], nn.Module]] = [lambda: BATCH_NORMS[len(shape)](shape[0], affine=affine)]
    # Over one or two values a norm is constant, and what is left is rounding.
    if torch.Size(shape).numel() > 2 * groups:
        kinds.append(lambda: nn.GroupNorm(groups, shape[0], eps=0.1, affine=affine))
    if len(shape) > 1 and torch.Size(shape[1:]).numel() > 2:
        kinds.append(lambda: INSTANCE_NORMS[len(shape)](shape[0], eps=0.1, affine=affine))
    return (lambda m, h: m(h)), [at], rng.choice(kinds)(), shape


def normed_rows(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    over = shapes[at][rng.randrange(len(shapes[at])) :]
    if torch.Size(over).numel() < 3:
        return None
    kind = rng.choice([nn.LayerNorm, nn.RMSNorm])
    return (lambda m, h: m(h)), [at], kind(over, eps=0.1), shapes[at]


def gate(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    size = shapes[at][0]
    channels = (-1, *[1] * (len(shapes[at]) - 1))

    def function(m: nn.Module, h: Tensor) -> Tensor:
        whole = h if h.dim() == 2 else h.flatten(2).mean(2)
        return h * torch.sigmoid(m(whole)).unflatten(1, channels)

    return function, [at], nn.Linear(size, size), shapes[at]


def join(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    shape = shapes[at]
    alike = [index for index, other in enumerate(shapes) if other == shape]
    beside = [
        index for index, other in enumerate(shapes) if len(other) == len(shape) and other[1:] == shape[1:]
    ]
    other = rng.choice(alike)
    kind = rng.randrange(5)
    if kind == 0:
        return (lambda _, a, b: a + 0.5 * b), [at, other], None, shape
    if kind == 1:
        return (lambda _, a, b: a * b), [at, other], None, shape
    if kind == 2:
        return (lambda _, a, b: a / (2 + b.square())), [at, other], None, shape
    if kind == 3:
        # Of another rank: one number a sample.
        return (
            (lambda _, a, b: (a.flatten(1) * b.flatten(1).mean(1, keepdim=True)).view(a.shape)),
            [at, other],
            None,
            shape,
        )
    other = rng.choice(beside)
    return (
        (lambda _, a, b: torch.cat([a, b], 1)),
        [at, other],
        None,
        (shape[0] + shapes[other][0], *shape[1:]),
    )


def passive(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    shape = shapes[at]
    size = tuple(rng.choice([1, n]) for n in shape[rng.randrange(len(shape) + 1) :])
    functions = [
        lambda m, h: h * m.tensor,
        lambda m, h: h - m.tensor,
        lambda m, h: torch.cat([h, m.tensor.expand_as(h)], 1),
        lambda m, h: torch.where(m.tensor > 0, h, m.tensor),
        lambda m, h: h + (torch.ones(h.shape[0], 1).to(h) * m.tensor.sum()).view(-1, *[1] * (h.dim() - 1)),
    ]
    kind = rng.randrange(len(functions))
    new = (2 * shape[0], *shape[1:]) if kind == 2 else shape
    return functions[kind], [at], Held(*size), new


def part(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    dim = rng.randrange(len(shapes[at]))
    size = shapes[at][dim]
    if size < 2:
        return None
    cut = rng.randint(1, size - 1)
    sizes = [cut, size - cut]
    new = [*shapes[at]]
    dim_of_h = rng.choice([dim + 1, dim - len(shapes[at])])
    kind = rng.randrange(3)
    if kind == 0:
        new[dim] = cut
        return (lambda _, h: h.split(sizes, dim_of_h)[0]), [at], None, tuple(new)
    if kind == 1:
        new[dim] = size - cut
        return (lambda _, h: h.narrow(dim_of_h, cut, size - cut)), [at], None, tuple(new)
    if size % 2:
        return None
    new[dim] = size // 2
    return (lambda _, h: (lambda a, b: a * b.sigmoid())(*h.chunk(2, dim_of_h))), [at], None, tuple(new)


def softmax(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    dim = rng.choice([-1, 1])
    return rng.choice([lambda _, h: h.softmax(dim), lambda _, h: h.log_softmax(dim)]), [at], None, shapes[at]


def stop(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    return (
        rng.choice([lambda _, h: h.detach() * h, lambda _, h: h + h.sin().detach()]),
        [at],
        None,
        shapes[at],
    )


def noted(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    return (lambda m, h: m(h)), [at], Noted(), shapes[at]


def left_over(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    """What no rule knows, so that autograd takes it, what is seldom met, and sizes that become plain numbers."""

    def part_is_written(_: nn.Module, h: Tensor) -> Tensor:
        written = torch.zeros_like(h)
        written[:, :1] = h[:, :1].sin()
        return written + h

    functions: list[Callable[..., Tensor]] = [
        lambda _, h: h.cumsum(-1),
        lambda _, h: Swish.apply(h),
        lambda _, h: torch.fft.irfft(torch.fft.rfft(h, dim=-1) * 0.5j, n=h.shape[-1], dim=-1),
        lambda _, h: h / (1 + h.flatten(1).var(1, correction=0)).view(-1, *[1] * (h.dim() - 1)),
        part_is_written,
        lambda _, h: (2 + h.sin()) ** h.cos(),
        lambda _, h: h.roll(1, 1) * h.flip(-1),
        lambda _, h: h.reshape(len(h), -1).view(h.shape).sin(),
    ]
    return rng.choice(functions), [at], None, shapes[at]

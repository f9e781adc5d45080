"""Decoders from [B, 3] to [B, 4] whose forwards do more than call layers, for the tests of reading."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from layer_kinds import Wave
from torch import Tensor, nn
from torch.nn.utils import prune


class Plain(nn.Module):
    """Not lowered, because of the sine."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, z: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(z)).sin())


def of(function: Callable[..., Tensor], **attributes: object) -> Callable[[], nn.Module]:
    """Makes a Plain module whose forward is a function of it and z, with these attributes."""

    def make() -> nn.Module:
        kind = type("Decoder", (Plain,), {"forward": function})
        module = kind()
        for name, value in attributes.items():
            setattr(module, name, value() if callable(value) else value)
        return module

    return make


def in_no_grad(m: Plain, z: Tensor) -> Tensor:
    h = m.first(z)
    with torch.no_grad():
        g = h.sin() * m.first.weight.sum()
    return m.last(torch.tanh(h) * g)


def grad_in_no_grad(m: Plain, z: Tensor) -> Tensor:
    h = m.first(z)
    with torch.no_grad():
        g = h.sin()
        with torch.enable_grad():
            k = h.cos() * g
    return m.last(torch.tanh(h) * g + k)


def keeps_what_it_saw(m: nn.Module, z: Tensor) -> Tensor:
    m.seen = m.first(z)
    m.all.append(m.seen)
    return m.last(m.seen.sin())


def with_a_lock(m: nn.Module, z: Tensor) -> Tensor:
    with m.lock:
        return Plain.forward(m, z)


def makes_its_constant_once(m: nn.Module, z: Tensor) -> Tensor:
    if m.known is None:
        m.known = torch.linspace(0, 1, 4, dtype=z.dtype)
    return Plain.forward(m, z) * m.known


def of_two(m: Plain, z: Tensor, scale: float = 2.0, *others: Tensor, c: Tensor | None = None) -> Tensor:
    return Plain.forward(m, z) * scale if c is None else c


def through_a_list(m: nn.Module, z: Tensor) -> Tensor:
    h = Plain.forward(m, z)
    for layer in m.layers:
        h = torch.tanh(layer(h))
    return h


class Closure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.head = lambda z: self.first(z).sin()

    def forward(self, z: Tensor) -> Tensor:
        return self.head(z)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 4)
        self.c.weight = self.a.weight

    def forward(self, z: Tensor) -> Tensor:
        return self.c(self.b(self.a(z).sin()).sin() + F.linear(self.a(z), self.a.weight.t()))


class Through(nn.Module):
    """Another module, and a norm."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.LayerNorm(4)

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(self.inner(z))


def normed(function: Callable[..., object], *, training: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = Plain().train(training)
        function(module.first)
        return module

    return make


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        return h.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


rounded = Rounded.apply


def in_place_between_uses(m: Plain, z: Tensor) -> Tensor:
    h = m.first(z).sin()
    before = h * 2
    h.exp_()
    return m.last(before + h)


def seen_through(m: Plain, z: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
    """What is done in place to what ``look`` returns changes what it was given."""
    h = m.first(z).sin()
    look(h).mul_(3)
    return m.last(h)


P = nn.utils.parametrizations

# Read, and by the sweeps what the module is.
READ: dict[str, Callable[[], nn.Module]] = {
    "no_grad": of(in_no_grad),
    "enable_grad in no_grad": of(grad_in_no_grad),
    "detach": of(lambda m, z: m.last(m.first(z).detach().sin() * m.first(z) + m.first.weight.detach().sum())),
    "a function of one's own": of(lambda m, z: m.last(Wave.apply(m.first(z)))),
    "a function of one's own on a weight": of(
        lambda m, z: F.linear(m.first(z).sin(), Wave.apply(m.last.weight))
    ),
    "a function of one's own, kept": of(lambda m, z: m.last(rounded(m.first(z)) * m.first(z))),
    "a nested function of one's own": lambda: Through(of(lambda m, z: m.last(Wave.apply(m.first(z))))()),
    "a function of one's own under no_grad": of(
        lambda m, z: m.last(torch.no_grad()(Wave.apply)(m.first(z)) * m.first(z).tanh())
    ),
    "in place": of(lambda m, z: m.last(m.first(z).mul_(2).add_(1, alpha=0.5).relu_())),
    "in place between two uses": of(in_place_between_uses),
    "in place on a view": of(lambda m, z: seen_through(m, z, lambda h: h[:, :3])),
    "in place on what dropout handed on": of(
        lambda m, z: seen_through(m, z, lambda h: F.dropout(h, training=False))
    ),
    "in place before a view": of(
        lambda m, z: m.last(m.first(z).sin().mul_(2).view(-1, 2, 3).flatten(1).mul_(3))
    ),
    "in place on the code": of(lambda m, z: Plain.forward(m, z.clone().mul_(2))),
    "another way to the same from 90 samples on": of(
        lambda m, z: Plain.forward(m, z) if z.shape[0] < 90 else Plain.forward(m, z.contiguous().clone())
    ),
    "len(z)": of(lambda m, z: m.last(m.first(z).sin().view(len(z), 2, 3).flatten(1))),
    "int(z.shape[0])": of(lambda m, z: m.last(m.first(z).sin().reshape(int(z.shape[0]), -1))),
    "zeros of the batch": of(lambda m, z: m.last(torch.zeros(len(z), 6).to(z) + m.first(z).sin())),
    "item of a parameter": of(lambda m, z: Plain.forward(m, z) * m.first.weight[0, 0].item()),
    "keeps what it saw": of(keeps_what_it_saw, all=list, seen=None),
    "a lock": of(with_a_lock, lock=threading.Lock),
    "a constant made once": of(makes_its_constant_once, known=None),
    "further arguments": of(of_two),
    "constants": of(
        lambda m, z: (Plain.forward(m, z) * torch.tensor([1.0, 2, 3, 4]) + torch.arange(4)).sin()
    ),
    "modules in a plain list": of(
        through_a_list, layers=lambda: [nn.Linear(4, 4).double() for _ in range(2)]
    ),
    "a closure": Closure,
    "parameters in lists": of(
        lambda m, z: Plain.forward(m, z * m.scales[0] + m.shifts["z"]),
        scales=lambda: nn.ParameterList([torch.ones(3), torch.zeros(1)]),
        shifts=lambda: nn.ParameterDict({"z": torch.ones(3)}),
    ),
    "frequencies": of(
        lambda m, z: m.last(
            torch.fft.irfft(torch.fft.rfft(m.first(z)) * torch.exp(1j * m.last.bias), 6).sin()
        )
    ),
    "tied weights": Tied,
    "weight_norm": normed(lambda layer: P.weight_norm(layer)),
    "spectral_norm": normed(lambda layer: P.spectral_norm(layer).eval()),
    "orthogonal": normed(lambda layer: P.orthogonal(layer)),
    "weight_norm by a hook": normed(lambda layer: nn.utils.weight_norm(layer)),
    "weight_norm of all by a hook": normed(lambda layer: nn.utils.weight_norm(layer, dim=None)),
    "spectral_norm by a hook": normed(lambda layer: nn.utils.spectral_norm(layer).eval()),
    "pruned": normed(lambda layer: prune.l1_unstructured(layer, "weight", 0.4)),
    "compiled": lambda: torch.compile(Plain(), backend="eager"),
    "a compiled part": lambda: Through(torch.compile(Plain(), backend="eager")),
    "dropout in eval mode": lambda: nn.Sequential(Plain(), nn.Dropout(0.5), nn.LayerNorm(4)).eval(),
}


def hooked_twice(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


def branches(m: Plain, z: Tensor) -> Tensor:
    return Plain.forward(m, z) * (2 if z.detach().sum() > 0 else 1)


def of_the_parameters(m: Plain, z: Tensor) -> Tensor:
    return Plain.forward(m, z) * (2 if m.first.weight.sum() > 1e9 else 1)


def hooked(m: Plain, z: Tensor) -> Tensor:
    h = m.first(z)
    if h.requires_grad:
        h.register_hook(lambda gradient: 2 * gradient)
    return m.last(h.sin())


def alone(m: Plain, z: Tensor) -> Tensor:
    return Plain.forward(m, z) * (3 if z.shape[0] == 1 else 1)


def from_many_on(many: int) -> Callable[[], nn.Module]:
    return of(lambda m, z: Plain.forward(m, z) * (3 if z.shape[0] >= many else 1))


class Counts(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(4))

    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            self.count.add_(1)
        return super().forward(z)


# Not read, with a word of the reason; by autograd what the module is.
NOT_READ: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a branch on the code": (of(branches), "torch.export cannot run"),
    "a branch on a parameter": (of(of_the_parameters), "torch.export cannot run"),
    "data": (of(lambda m, z: m.last(m.first(z).data.sin() * m.first(z).tanh())), "torch.export cannot run"),
    "numpy": (
        of(lambda m, z: Plain.forward(m, z) * torch.as_tensor(m.last.bias.detach().numpy()).to(z)),
        "torch.export cannot run",
    ),
    "a hook on a value": (of(hooked), "not its own"),
    "a loop over samples": (
        of(lambda m, z: torch.stack([Plain.forward(m, row) for row in z])),
        "batches of another size",
    ),
    "one sample as no other": (of(alone), "batches of another size"),
    "90 samples as no others": (from_many_on(90), "batches of another size"),
    "2,000 samples as no others": (from_many_on(2000), "batches of another size"),
    "buffers that change": (Counts, "buffers"),
    "TorchScript": (
        lambda: Through(torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))),
        "TorchScript",
    ),
    "TorchScript, all of it": (
        lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh())),
        "TorchScript",
    ),
    "torch.func.grad": (
        of(lambda m, z: m.last(torch.func.grad(lambda h: h.sin().sum())(m.first(z)))),
        "a tensor of a transform",
    ),
    "DataParallel": (lambda: nn.DataParallel(Plain()), "scatters the batch"),
    "a hook that computes a weight, and another": (
        normed(lambda layer: hooked_twice(nn.utils.weight_norm(layer))),
        "computed by a hook",
    ),
}

COUPLED: dict[str, Callable[[], nn.Module]] = {
    "a mean over samples": of(lambda m, z: m.last((m.first(z) - m.first(z).mean(0)).sin())),
    "divided by their number": of(lambda m, z: Plain.forward(m, z) / z.shape[0]),
    "divided by their number as an int": of(lambda m, z: Plain.forward(m, z / len(z))),
    "softmax over samples": of(lambda m, z: m.last(m.first(z).softmax(0))),
    "the first sample": of(lambda m, z: Plain.forward(m, z) + m.last(m.first(z)[:1])),
    "a sum of the samples before": of(lambda m, z: m.last(m.first(z).cumsum(0))),
    "another order": of(lambda m, z: Plain.forward(m, z) * Plain.forward(m, z).flip(0)),
    "statistics of the batch": of(lambda m, z: F.batch_norm(Plain.forward(m, z), None, None, training=True)),
    "dropout as a function": of(lambda m, z: F.dropout(Plain.forward(m, z), 0.5, m.training)),
    "noise in training": of(lambda m, z: Plain.forward(m, z + torch.randn_like(z) if m.training else z)),
}

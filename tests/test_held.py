"""What a network's forward closes over: read once, followed when it changes, and given its gradient."""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvae
from fastvae.held import Held, UnknownValue
from fastvae.influence import TracIn
from fastvae.network import cache
from fastvae.ood import LikelihoodRegret
from fastvae.private import private_copy

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be lowered", "ignore:.*copies are trained")

SCALE = 0.7
TABLE = {"scale": 0.7}
LAYER = nn.Linear(6, 6).double()


def scaled(h: Tensor) -> Tensor:
    return SCALE * h


class Base(nn.Module):
    """Two layers, and between them what a subclass holds."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(inputs, 6), nn.Linear(6, outputs)
        self.act: Any = None

    def middle(self, h: Tensor) -> Tensor:
        return self.act(h)  # type: ignore[no-any-return]

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.middle(self.first(z).tanh()) * 1.5)  # type: ignore[no-any-return]


class Helper:
    def __init__(self) -> None:
        self.scale = 0.7
        self.layer = nn.Linear(6, 6).double()

    def go(self, h: Tensor) -> Tensor:
        return self.scale * F.softplus(self.layer(h))


class ByGlobals(Base):
    def middle(self, h: Tensor) -> Tensor:
        return scaled(h) * TABLE["scale"] + SCALE


class ByALayer(Base):
    def middle(self, h: Tensor) -> Tensor:
        return LAYER(h).sigmoid()  # type: ignore[no-any-return]


class Made(NamedTuple):
    """A network, a change of what it closes over, and the trained tensors among that."""

    module: Base
    change: Callable[[], object]
    tensors: list[Tensor]


def by_globals(inputs: int, outputs: int, patch: pytest.MonkeyPatch) -> Made:
    made = ByGlobals(inputs, outputs)
    return Made(made, lambda: patch.setitem(globals(), "SCALE", 0.2), [])


def by_a_table(inputs: int, outputs: int, patch: pytest.MonkeyPatch) -> Made:
    made = ByGlobals(inputs, outputs)
    return Made(made, lambda: patch.setitem(TABLE, "scale", 0.2), [])


def by_a_global_layer(inputs: int, outputs: int, patch: pytest.MonkeyPatch) -> Made:
    made = ByALayer(inputs, outputs)
    patch.setitem(globals(), "LAYER", copy.deepcopy(LAYER))
    return Made(
        made, lambda: patch.setitem(globals(), "LAYER", nn.Linear(6, 6).double()), list(LAYER.parameters())
    )


def with_act(make: Callable[[Base], tuple[Any, Callable[[], object], list[Tensor]]]) -> Any:
    def made(inputs: int, outputs: int, _: pytest.MonkeyPatch) -> Made:
        module = Base(inputs, outputs)
        module.act, change, tensors = make(module)
        return Made(module, change, tensors)

    return made


def number(module: Base) -> Any:
    slope = 0.3

    def change() -> None:
        nonlocal slope
        slope = 0.6

    return (lambda h: F.leaky_relu(h, slope)), change, []


def own_part(module: Base) -> Any:
    return (
        (lambda h: module.first.bias * h),
        lambda: setattr(module.first, "bias", nn.Parameter(torch.rand(6).double())),
        [],
    )


def foreign_layer(module: Base) -> Any:
    layer = nn.Linear(6, 6).double()

    def change() -> None:
        nonlocal layer
        layer = nn.Linear(6, 6).double()

    return (lambda h: layer(h)), change, list(layer.parameters())


def partial(module: Base) -> Any:
    weight = torch.rand(6, 6).double().requires_grad_()
    return (
        functools.partial(F.linear, weight=weight),
        lambda: module.act.keywords.update(weight=weight.detach() * 2),
        [weight],
    )


def partial_number(module: Base) -> Any:
    return (
        functools.partial(F.leaky_relu, negative_slope=0.3),
        lambda: module.act.keywords.update(negative_slope=0.5),
        [],
    )


def bound(module: Base) -> Any:
    helper = Helper()
    return helper.go, lambda: setattr(helper, "scale", 0.2), list(helper.layer.parameters())


def own_bound(module: Base) -> Any:
    return types.MethodType(lambda self, h: self.first.bias * h, module), lambda: None, []


def in_a_list(module: Base) -> Any:
    module.layers = [nn.Linear(6, 6).double(), nn.LeakyReLU(0.3)]  # type: ignore[assignment]
    first, second = module.layers  # type: ignore[misc]

    def act(self: Any, h: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](h))  # type: ignore[no-any-return]

    return (
        types.MethodType(act, module),
        lambda: setattr(second, "negative_slope", 0.6),
        list(first.parameters()),
    )


def functions_in_a_list(module: Base) -> Any:
    module.functions = [lambda h: module.first.bias * h]  # type: ignore[assignment]

    def act(self: Any, h: Tensor) -> Tensor:
        return self.functions[0](h)  # type: ignore[no-any-return]

    return types.MethodType(act, module), lambda: module.functions.__setitem__(0, lambda h: h.sin()), []  # type: ignore[operator]


def of_the_class(inputs: int, outputs: int, _: pytest.MonkeyPatch) -> Made:
    factor = 0.3
    layer = nn.Linear(6, 6).double()

    class Local(Base):
        def middle(self, h: Tensor) -> Tensor:
            return factor * layer(h)  # type: ignore[no-any-return]

    def change() -> None:
        nonlocal factor
        factor = 0.6

    return Made(Local(inputs, outputs), change, list(layer.parameters()))


KINDS: dict[str, Callable[[int, int, pytest.MonkeyPatch], Made]] = {
    **{
        make.__name__: with_act(make)
        for make in (number, own_part, foreign_layer, partial, partial_number, bound)
    },
    **{make.__name__: with_act(make) for make in (own_bound, in_a_list, functions_in_a_list)},
    **{make.__name__: make for make in (by_globals, by_a_table, by_a_global_layer, of_the_class)},
}


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of each reading of a network the name of its class."""
    found: list[str] = []

    class Counted(cache._Known):
        def __init__(self, module: nn.Module, *rest: Any) -> None:
            found.append(type(module).__name__)
            super().__init__(module, *rest)

    monkeypatch.setattr(cache, "_Known", Counted)
    return found


def force_and_gradients(made: Made, net: Any, x: Tensor) -> list[Tensor]:
    z = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    given = [z, *made.module.parameters(), *made.tensors]
    log_px, force = net.force(z, x)
    return [log_px, force, *torch.autograd.grad((log_px.sin() + force.square().sum(1)).sum(), given)]


def by_autograd(made: Made, x: Tensor) -> list[Tensor]:
    z = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    given = [z, *made.module.parameters(), *made.tensors]
    log_px = fastvae.likelihoods.Gaussian(1.0).log_prob(made.module(z), x)
    (force,) = torch.autograd.grad(log_px.sum(), z, create_graph=True)
    return [log_px, force, *torch.autograd.grad((log_px.sin() + force.square().sum(1)).sum(), given)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_decoder_closes_over(kind: str, readings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made = KINDS[kind](3, 5, monkeypatch)
    made.module.double()
    x, net = torch.rand(4, 5, dtype=torch.float64), fastvae.Network(made.module, "gaussian")
    for _ in range(2):
        torch.testing.assert_close(
            force_and_gradients(made, net, x), by_autograd(made, x), rtol=1e-10, atol=1e-10
        )
    assert len(readings) == 1
    with torch.no_grad():
        for tensor in made.tensors:
            tensor.mul_(1.5)
    torch.testing.assert_close(
        force_and_gradients(made, net, x), by_autograd(made, x), rtol=1e-10, atol=1e-10
    )
    assert len(readings) == 1
    made.change()
    after = made._replace(tensors=[])
    torch.testing.assert_close(
        force_and_gradients(after, net, x), by_autograd(after, x), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("kind", ["own_part", "partial", "bound"])
def test_scores_of_models_that_close_over_something(
    kind: str, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder, decoder = KINDS[kind](5, 6, monkeypatch), KINDS[kind](3, 5, monkeypatch)
    model = fastvae.VAE(encoder.module, decoder.module, "gaussian").double()
    x = torch.rand(4, 5, dtype=torch.float64)

    def scores(model: fastvae.VAE, regret: LikelihoodRegret, tracin: TracIn) -> list[Tensor]:
        return [regret.predict(x), tracin.self_influence(x)]

    def made() -> tuple[LikelihoodRegret, TracIn]:
        return LikelihoodRegret(model, num_steps=2, num_samples=2), TracIn(model, x, None, num_samples=1)

    detectors = made()
    before = scores(model, *detectors)
    read = len(readings)
    torch.testing.assert_close(scores(model, *detectors), before, rtol=0, atol=0)
    assert len(readings) == read
    with torch.no_grad():
        for tensor in encoder.tensors + decoder.tensors:
            tensor.mul_(1.5)
    encoder.change(), decoder.change()
    changed = scores(model, *detectors)
    torch.testing.assert_close(changed, scores(model, *made()), rtol=0, atol=0)
    assert kind == "own_bound" or not torch.equal(changed[0], before[0])
    cache._known.clear(), cache._of_copies.clear()
    torch.testing.assert_close(changed, scores(copy.deepcopy(model), *made()), rtol=0, atol=0)


def holds(module: Base, how: str) -> Any:
    function = lambda h: module.first.bias * h  # noqa: E731
    return {
        "function": lambda: function,
        "list": lambda: [function],
        "nested": lambda: {"a": (0, [function])},
        "partial": lambda: functools.partial(lambda f, h: f(h), function),
        "method": lambda: types.MethodType(lambda _, h: module.first.bias * h, module),
    }[how]()


@pytest.mark.parametrize("how", ["function", "list", "nested", "partial", "method"])
def test_functions_of_a_private_copy_read_its_own_parts(how: str) -> None:
    torch.manual_seed(0)
    module = Base(3, 5)
    module.act = holds(module, how)
    called: dict[str, Callable[[Any, Tensor], Any]] = {
        "list": lambda act, h: act[0](h),
        "nested": lambda act, h: act["a"][1][0](h),
    }
    copied, h = private_copy(module), torch.rand(2, 6)
    run = called.get(how, lambda act, h: act(h))
    torch.testing.assert_close(run(copied.act, h), run(module.act, h), rtol=0, atol=0)
    with torch.no_grad():
        copied.first.bias.zero_()
    assert not run(copied.act, h).any()
    assert run(module.act, h).all()


def test_a_copy_has_the_key_of_its_origin() -> None:
    for kind, make in KINDS.items():
        with pytest.MonkeyPatch.context() as patch:
            module = make(3, 5, patch).module
            copied = private_copy(module)
            keys = [(Held(each).key(each.act), Held(each).around(each)) for each in (module, copied)]
            assert keys[0] == keys[1], kind


def test_what_cannot_be_known() -> None:
    module = Base(3, 5)
    for value in (
        threading.Lock(),
        iter([]),
        torch.ones(2).to_sparse(),
        [object()],
        [()] * 2 + [[at] for at in range(5000)],
        [].append,
    ):
        with pytest.raises(UnknownValue):
            Held(module).key(value)
    loop: list[Any] = []
    loop.append(loop)
    assert Held(module).key(loop) == Held(module).key(loop)


def test_a_trained_tensor_that_a_module_does_not_hold_is_not_read() -> None:
    """Its gradient would be missing."""
    weights = iter([torch.rand(6).double().requires_grad_()] * 1000)

    class Drawn(Base):
        def middle(self, h: Tensor) -> Tensor:
            return next(weights) * h

    module = Drawn(3, 5).double()
    z, x = torch.randn(4, 3).double(), torch.rand(4, 5).double()
    with pytest.warns(UserWarning, match="requires a gradient and is not its own"):
        log_px, _ = fastvae.ops.log_px_and_force(module, z, x, "gaussian")
    (gradient,) = torch.autograd.grad(log_px.sum(), next(weights))
    assert gradient.abs().min() > 0

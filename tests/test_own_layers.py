"""Rules for an operator that the package does not know, registered by its user."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae.network.layers import Gradients, Layer, Point, Products, Values, base, layer_of, over_latents


class InverseSinh(Layer):
    """y = asinh(x), of which the package's own rule is taken out (``own_registry``)."""

    def slope(self, x: Tensor) -> Tensor:
        return (1 + x * x).rsqrt()

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        if grads.wants(self.x):
            grads.add(self.x, dy * self.slope(point.values[self.x]))

    def tangent(self, point: Point, dots: Values) -> Tensor:
        return dots[self.x] * self.slope(point.values[self.x])

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        if dots[self.x] is not None and grads.wants(self.x):
            x = point.values[self.x]
            grads.add(self.x, over_latents(dy * dots[self.x], x.dim()) * -x * self.slope(x) ** 3)


class Flattened(InverseSinh):
    """Whose slope is wrong."""

    def slope(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class Decoder(nn.Module):
    def __init__(self, function: Any = torch.asinh) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(3, 5), nn.Linear(5, 4), function

    def forward(self, z: Tensor) -> Tensor:
        return self.last(self.function(self.first(z)))


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package's rule of asinh; what a test registers is gone after it."""
    asinh = torch.ops.aten.asinh
    without = {key: maker for key, maker in base.MAKERS.items() if key not in ("asinh", asinh, asinh.default)}
    monkeypatch.setattr(base, "MAKERS", without)


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    with torch.library._scoped_library(f"fastvae_test_{uuid.uuid4().hex}", "DEF") as made:
        yield made


def decoder(function: Any = torch.asinh) -> Decoder:
    torch.manual_seed(0)
    return Decoder(function).double()


def check(module: nn.Module) -> None:
    """Values and gradients, with latents in front and without, in float64."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    x = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    leaves = [z, *module.parameters()]

    def run(ops: Any) -> list[Tensor]:
        z_K, rho_K, log_px = ops.hamiltonian_flow(
            module, z, torch.ones_like(z), x, 0.1, torch.full((2,), 0.9, dtype=torch.float64), "gaussian"
        )
        flow = (z_K * 0.3 + rho_K.square()).sum() + log_px.sum()
        jacobian = ops.jacobian_l1(module, z, "sum")
        found = [torch.autograd.grad(value, leaves, allow_unused=True) for value in (flow, jacobian)]
        gradients = [torch.zeros(()) if each is None else each for gradients in found for each in gradients]
        return [flow.detach(), jacobian.detach(), *gradients]

    for actual, expected in zip(run(fastvae.ops), run(fastvae.reference), strict=True):
        assert float((actual - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))


def opaque(module: nn.Module) -> tuple[str, ...]:
    return fastvae.Network(module, z=torch.zeros(2, 3, dtype=torch.float64)).opaque


def test_a_registered_layer_takes_its_operator_and_is_right() -> None:
    layer_of("asinh")(InverseSinh)
    module = decoder()
    assert opaque(module) == ()
    check(module)


def test_what_was_read_before_is_read_again() -> None:
    module = decoder()
    assert opaque(module) == ("asinh",)
    check(module)
    layer_of("asinh")(InverseSinh)
    assert opaque(module) == ()
    check(module)


@pytest.mark.parametrize("of", ["overload", "packet"])
def test_an_operator_by_itself(of: str) -> None:
    operator = torch.ops.aten.asinh
    layer_of(operator.default if of == "overload" else operator)(InverseSinh)
    assert opaque(decoder()) == ()


def test_an_operator_of_the_user(library: torch.library.Library) -> None:
    library.define("bell(Tensor x) -> Tensor")
    library.impl("bell", torch.asinh, "CompositeExplicitAutograd")
    library._register_fake("bell", torch.empty_like)
    operator = getattr(torch.ops, library.ns).bell
    torch.library.register_autograd(
        f"{library.ns}::bell",
        lambda ctx, dy: dy * (1 + ctx.saved_tensors[0].square()).rsqrt(),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        lib=library,
    )
    layer_of(operator)(InverseSinh)
    module = decoder(operator)
    assert opaque(module) == ()
    check(module)


def test_a_maker_may_refuse() -> None:
    layer_of("asinh")(lambda operation, active: None)
    module = decoder()
    assert opaque(module) == ("asinh",)
    check(module)


def test_a_wrong_rule_is_noticed_and_the_module_computed_through_autograd() -> None:
    layer_of("asinh")(Flattened)
    module = decoder()
    with pytest.raises(fastvae.lowering.UnsupportedLayer, match="of the network read from it is not its own"):
        fastvae.Network(module).verify(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.warns(UserWarning, match="autograd"):
        check(module)


@pytest.mark.parametrize("targets", [("errorfunction",), ()])
def test_names_of_no_operator_are_refused(targets: tuple[str, ...]) -> None:
    known = dict(base.MAKERS)
    with pytest.raises(ValueError, match=r"layer_of: targets: expected .* of this torch, got"):
        layer_of(*targets)
    assert known == base.MAKERS


@pytest.mark.parametrize("target", [torch.asinh, nn.ReLU, 3], ids=["function", "module", "number"])
def test_what_is_no_operator_is_refused(target: Any) -> None:
    with pytest.raises(TypeError, match=r"layer_of: targets: expected operators, .* got"):
        layer_of(target)


def test_names_that_this_torch_lacks_are_left_out() -> None:
    known = set(base.MAKERS)
    layer_of("asinh", "an_operator_of_the_future")(InverseSinh)
    assert set(base.MAKERS) - known == {torch.ops.aten.asinh}

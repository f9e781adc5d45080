"""The raw entries under forward-mode differentiation and torch.func: right, or refused in their own words."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzzing.raw_arguments import Arguments
from fuzzing.raw_entries import Entry, entries, mapped, tensors_in
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastvae
from fastvae.lowering import lower

below: Any = fastvae._C

TRANSFORMABLE = ("matrix_product",)
"""Those that leave what is transformed to PyTorch."""

RAW = {f"{each.place}.{each.name}": each for each in entries() if each.place in ("torch.ops", "_C")}


def real(values: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(values) if tensor.is_floating_point()]


def replaced(values: Any, place: int, by: Tensor) -> Any:
    """The same arguments with another tensor as one of the floating ones."""
    numbers = iter(range(10**6))
    return mapped(values, lambda t: by if t.is_floating_point() and next(numbers) == place else t)


def arguments_of(entry: Entry) -> list[Any]:
    for seed in range(20):
        random.seed(seed)
        torch.manual_seed(seed)
        drawn = Arguments()
        arguments = [drawn.of(entry.place, entry.name, name) for name in entry.arguments]
        if drawn.dtype == torch.float64:
            return arguments
    raise AssertionError


def by_dual(call: Callable[[Tensor], list[Tensor]], point: Tensor, along: Tensor) -> Any:
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(each).tangent for each in call(forward_ad.make_dual(point, along))]


def by_jvp(call: Callable[[Tensor], list[Tensor]], point: Tensor, along: Tensor) -> Any:
    return list(torch.func.jvp(lambda t: tuple(call(t)), (point,), (along,))[1])


def by_vjp(call: Callable[[Tensor], list[Tensor]], point: Tensor, along: Tensor) -> Any:
    return [torch.func.grad(lambda t: sum(each.sum() for each in call(t)))(point)]


WAYS = {"dual": by_dual, "jvp": by_jvp, "grad": by_vjp}


@pytest.mark.parametrize("name", RAW)
def test_every_tensor_of_every_entry(name: str) -> None:
    entry = RAW[name]
    arguments = arguments_of(entry)
    for place, point in enumerate(real(arguments)):
        along = torch.randn_like(point)

        def call(t: Tensor, place: int = place) -> list[Tensor]:
            return real([entry.function(*replaced(arguments, place, t))])

        for way, transform in WAYS.items():
            if entry.name not in TRANSFORMABLE:
                of = {"NetworkCopies": "network_copies"}.get(entry.name, entry.name).removeprefix(
                    "differentiable_"
                )
                with pytest.raises(
                    NotImplementedError, match=rf"fastvae(_internal)?::{of}: .*fastvae\.reference"
                ):
                    transform(call, point, along)
                continue
            found = transform(call, point, along)
            # Linear in each argument: differences are exact up to rounding.
            differences = [more - less for more, less in zip(call(point + along), call(point), strict=True)]
            if way == "grad":
                found, differences = [(found[0] * along).sum()], [sum(each.sum() for each in differences)]
            torch.testing.assert_close(found, differences, rtol=1e-11, atol=1e-11)


def test_entries_that_are_methods() -> None:
    x, ones = torch.randn(3, 4, 5), torch.ones(4)
    rules = below.NormActivationRules("groups", 2, 1e-5, "silu")
    y, mean, s = rules.forward(x, ones, ones, None, None)
    images, weight = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 3, 5)
    convolution = below.CopiedConvolutionRules([2, 2], [1, 1], [0, 0], [1, 1], 1)
    small = convolution.smaller(images, weight, None)
    adam = [0.1, 0.9, 0.99, 1e-8, 0.0]
    network = lower(nn.Linear(5, 3))
    copies = below.NetworkCopies(network.spec, network.tensors, torch.randn(4, 5), *adam, 2)
    copies.forward()
    calls: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "norm_activation forward": (rules.forward, [x, ones, ones, None, None]),
        "norm_activation reverse": (rules.reverse, [y, x, ones, ones, mean, s, True]),
        "norm_activation tangent": (rules.tangent, [x, x, ones, ones, mean, s]),
        "norm_activation adjoint": (rules.adjoint, [y, y, x, x, ones, ones, mean, s, True]),
        "copied_convolution smaller": (convolution.smaller, [images, weight, torch.randn(2, 5)]),
        "copied_convolution larger": (convolution.larger, [small, weight, torch.randn(2, 3), [6, 6]]),
        "copied_convolution weight": (convolution.weight, [images, small, 2]),
        "copies_adam init": (lambda *values: below.CopiesAdam(list(values), *adam), [torch.randn(2, 3)]),
        "copies_adam step": (
            lambda gradient, row: below.CopiesAdam([torch.zeros(2, 3, 4)], *adam).step([gradient], [row]),
            [torch.randn(2, 3), torch.randn(2, 4)],
        ),
        "network_copies update": (copies.update, [torch.randn(4, 3)]),
    }
    for name, (function, arguments) in calls.items():
        for place, point in enumerate(real(arguments)):

            def call(t: Tensor, of: Any = (function, arguments, place)) -> list[Tensor]:
                made = of[0](*replaced(of[1], of[2], t))
                return real([made])

            for transform in WAYS.values():
                with pytest.raises(NotImplementedError, match=f"fastvae::{name.split()[0]}: "):
                    transform(call, point, torch.ones_like(point))

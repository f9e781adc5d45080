"""Every layer of fastvae.network by its own rules: against autograd, and against the reference of both methods."""

from __future__ import annotations

import functools
from itertools import groupby

import pytest
from network_cases import FILES
from network_layer import Case, network_of
from network_problems import by_autograd, check_network, codes, kinds
from torch import nn

from fastvae.network.cache import read_network
from fastvae.network.layers.base import MAKERS

SINGLE = {f"{file}: {name}": case for file, cases in FILES.items() for name, case in cases.items()}
MOST = 10
"""Cases that share a network, because reading one takes half a second."""


def groups() -> list[list[str]]:
    """The names of cases of one file and sample's shape."""

    def kind(name: str) -> tuple[str, tuple[int, ...], bool]:
        return name.split(":")[0], SINGLE[name].shape, bool(SINGLE[name].by_autograd)

    found = []
    for _, names in groupby(sorted(SINGLE, key=kind), kind):
        each = list(names)
        found += [each[start : start + MOST] for start in range(0, len(each), MOST)]
    return found


@functools.cache
def network_around(*cases: Case) -> nn.Module:
    """One for all tests, so that it is read once."""
    return network_of(*cases)


def check(cases: list[Case], batch: int) -> None:
    """Forward, reverse, tangent and bend; with latents in front (the Jacobian); the flow and its gradients."""
    network = check_network(network_around(*cases), codes(batch))
    assert set(by_autograd(network)) == {name for case in cases for name in case.by_autograd}
    assert {name for case in cases for name in case.takes} <= set(kinds(network))


@pytest.mark.parametrize("names", groups(), ids=lambda names: f"{names[0]}, {len(names)}")
def test_together(names: list[str]) -> None:
    check([SINGLE[name] for name in names], 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_alone(name: str) -> None:
    """The last layer of a network; of one sample and several."""
    for batch in (1, 3):
        check([SINGLE[name]], batch)


# What torch.export writes down by another name, at least in the version at hand.
ALIASES = {
    "__xor__", "_reshape_alias", "_safe_softmax", "alias", "batch_norm", "bitwise_and", "bitwise_or", "chunk", "concat",
    "contiguous",
    "dropout", "flatten", "hardsigmoid", "lift_fresh", "lift_fresh_copy", "mT", "movedim", "narrow", "numpy_T",
    "reshape", "swapaxes", "to", "unflatten", "view_copy",
}  # fmt: skip


def test_no_layer_is_forgotten() -> None:
    seen: set[str] = set()
    for names in groups():
        network = read_network(network_around(*(SINGLE[name] for name in names)), codes())
        seen |= set(kinds(network)) - set(by_autograd(network))
    assert set(names_of_layers()) - seen <= ALIASES


def names_of_layers() -> list[str]:
    return [getattr(target, "__name__", str(target)) for target in MAKERS]

"""Forwards that count, or keep something of each call: read once where nothing depends on it, right at every call."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_modules import Plain, of
from torch import Tensor, nn

from fastvae import ops, reference
from fastvae.lowering import UnsupportedLayer, explain
from fastvae.network import cache
from fastvae.network.cache import read_network
from fastvae.network.pristine import copy_with_modes

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be lowered|.*is not read")

plain = Plain.forward
Forward = Callable[[Any, Tensor], Tensor]


def then(effect: Callable[[Any, Tensor], object]) -> Forward:
    def forward(m: Any, z: Tensor) -> Tensor:
        effect(m, z)
        return plain(m, z)

    return forward


def counts(m: Any, z: Tensor) -> None:
    m.calls += 1


def averages(m: Any, z: Tensor) -> None:
    m.calls = 0.9 * m.calls + 0.1 * z.detach().mean()


def counts_in_a_dictionary(m: Any, z: Tensor) -> None:
    m.known["calls"] = m.known.get("calls", 0) + 1
    m.known["shape"] = tuple(z.shape)


def counts_in_a_counter(m: Any, z: Tensor) -> None:
    m.known["calls"] += 1


def keeps_the_shape(m: Any, z: Tensor) -> None:
    m.known = tuple(z.shape)


def keeps_its_output(m: Any, z: Tensor) -> Tensor:
    y = plain(m, z)
    m.known.append(y.detach())
    m.last_seen = y
    return y


def counts_below(m: Any, z: Tensor) -> None:
    m.first.calls = getattr(m.first, "calls", 0) + 1


IDLE: dict[str, tuple[Forward, dict[str, Any]]] = {
    "a count": (then(counts), {"calls": 0}),
    "an average": (then(averages), {"calls": 0.0}),
    "a shape": (then(keeps_the_shape), {"known": (1,)}),
    "a list": (then(lambda m, z: m.known.append(z.shape[1])), {"known": list}),
    "a part of a list": (then(lambda m, z: setattr(m, "known", m.known[-3:])), {"known": lambda: [1] * 9}),
    "a queue": (then(lambda m, z: m.known.append(tuple(z.shape))), {"known": lambda: deque(maxlen=3)}),
    "a dictionary": (then(counts_in_a_dictionary), {"known": dict}),
    "a counter": (then(counts_in_a_counter), {"known": Counter}),
    "a default": (then(counts_in_a_counter), {"known": lambda: defaultdict(int)}),
    "its output": (keeps_its_output, {"known": list}),
}


def doubles(asked: Callable[[Any, Tensor], Any], effect: Any = counts) -> Forward:
    """What it computes changes with what it keeps."""

    def forward(m: Any, z: Tensor) -> Tensor:
        effect(m, z)
        return plain(m, z) * (2 if asked(m, z) else 1)

    return forward


def asked_in_a_helper(m: Any, z: Tensor) -> bool:
    return bool(m.calls > 3)


def catches(m: Any, z: Tensor) -> bool:
    try:
        return [0, 0, 0, 1, 0, 1, 1, 1, 0][m.calls % 9] == 1
    except Exception:
        return False


def adds_the_last(m: Any, z: Tensor) -> Tensor:
    y = plain(m, z)
    if m.known is not None and m.known.shape == y.shape:
        y = y + m.known
    m.known = y.detach()
    return y


def adds_any(m: Any, z: Tensor) -> Tensor:
    y = plain(m, z)
    y = y + m.known.mean() if isinstance(m.known, Tensor) else y
    m.known = y.detach()
    return y


def counts_up_to_none(m: Any, z: Tensor) -> None:
    m.calls = None if m.calls == 2 else (m.calls or 0) + 1


USED: dict[str, tuple[Forward, dict[str, Any]]] = {
    "a factor": (lambda m, z: (counts(m, z), plain(m, z) * m.calls)[1], {"calls": 0}),
    "an addend": (lambda m, z: (counts(m, z), m.calls + plain(m, z))[1], {"calls": 0}),
    "a branch": (doubles(lambda m, z: m.calls > 3), {"calls": 0}),
    "a branch elsewhere": (doubles(asked_in_a_helper), {"calls": 0}),
    "a branch on what is odd": (doubles(lambda m, z: m.calls % 2), {"calls": 0}),
    "a branch on text": (doubles(lambda m, z: f"{m.calls}" == "4"), {"calls": 0}),
    "a caught question": (doubles(catches), {"calls": 0}),
    "a type": (doubles(lambda m, z: isinstance(m.calls, int) and m.calls > 3), {"calls": 0}),
    "an identity": (doubles(lambda m, z: m.calls is None, counts_up_to_none), {"calls": 0}),
    "a length": (doubles(lambda m, z: len(m.known) > 3, lambda m, z: m.known.append(1)), {"known": list}),
    "an entry": (doubles(lambda m, z: m.known["calls"] > 3, counts_in_a_counter), {"known": Counter}),
    "a flag": (
        doubles(lambda m, z: m.known, lambda m, z: setattr(m, "known", not m.known)),
        {"known": False},
    ),
    "the last output": (adds_the_last, {"known": None}),
    "any last output": (adds_any, {"known": None}),
    "large batches alone": (doubles(lambda m, z: len(z) > 4 and m.calls > 3), {"calls": 0}),
    "small batches alone": (doubles(lambda m, z: z.shape[0] < 4 and m.calls > 3), {"calls": 0}),
}


def made(forward: Forward, attributes: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return of(forward, **attributes)().double()


def codes(rows: int) -> Tensor:
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def check_force(module: nn.Module, z: Tensor) -> None:
    x = z.new_zeros(len(z), 4)
    expected = reference.log_px_and_force(copy_with_modes(module), z, x, "gaussian")
    found = ops.log_px_and_force(module, z, x, "gaussian")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)  # rounding in float64


def known(module: nn.Module, z: Tensor) -> Any:
    """What is remembered of it now."""
    with contextlib.suppress(UnsupportedLayer):
        read_network(module, z)
    return next(iter(cache._known[module].values()))


@pytest.mark.parametrize("name", IDLE)
def test_what_nothing_depends_on_is_not_compared(name: str) -> None:
    module = made(*IDLE[name])
    module(codes(6))  # it may hold something of another kind from here on
    first = None
    for rows in (2, 5, 3, 3, 1, 4):
        z = codes(rows)
        check_force(module, z)
        first = first or known(module, z)
        assert known(module, z) is first
        module(z)
    # A value of another kind is seen all the same.
    setattr(module, next(iter(IDLE[name][1])), None)
    assert known(module, codes(2)) is not first


@pytest.mark.parametrize("name", USED)
def test_what_something_depends_on_is_right_at_every_call(name: str) -> None:
    module = made(*USED[name])
    z = codes(3)
    for rows in (2, 3, 3, 5, 2, 3, 5, 3, 3):
        check_force(module, codes(rows))
        module(codes(rows))
    # And is not read for ever.
    last = known(module, z)
    for _ in range(2):
        module(z)
        known(module, z)
    module(z)
    assert known(module, z) is last or name in ("large batches alone",)
    if "alone" not in name and "last" not in name:
        with pytest.raises(
            UnsupportedLayer, match=r"its forward changes (calls|known), and may depend on that"
        ):
            read_network(module, z)


def test_attributes_of_a_module_inside() -> None:
    module = made(then(counts_below), {})
    for _ in range(4):
        check_force(module, codes(3))
        module(codes(3))


def test_nothing_is_left_in_the_lists_of_a_module() -> None:
    """torch.fx ran the user's own forward, which kept its proxies."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.kept, self.by_name = nn.Linear(3, 4), [], {"all": [], "calls": 0}

        def forward(self, z: Tensor) -> Tensor:
            self.kept.append(z)
            self.by_name["calls"] += 1
            self.by_name["all"].append(z.mean())
            return self.layer(z)

    module = Keeps()
    text = explain(module)
    assert module.kept == [] and module.by_name == {"all": [], "calls": 0}
    assert "its forward assigns attributes (kept, by_name)" in text

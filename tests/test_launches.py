"""Launches of a call, counted and compared on the build that emulates CUDA (scripts/launches.py)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from emulation import EMULATED

from fastvae import ops
from scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
RECORDED_TORCH = "2.13"
"""With which the table in docs/kernels.md was counted; another release may take an operator apart differently."""

launches = load_script(ROOT / "scripts" / "launches.py") if EMULATED else None
floors = load_script(ROOT / "scripts" / "launch_floors.py") if EMULATED else None
CASES = launches.CASES if launches else {}
TABLE = launches.TABLE if launches else {}

pytestmark = pytest.mark.skipif(not EMULATED, reason="launches are seen on the build that emulates CUDA")
OPERATORS = list(launches.OPERATORS) if launches else ["operators"]


def rows_of_docs(heading: Sequence[str]) -> dict[str, str]:
    lines = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    first = lines.index(f"| {' | '.join(heading)} |")
    rows = lines[first + 2 :]
    end = next(at for at, line in enumerate(rows) if not line.startswith("|"))
    return {row.split("|")[1].strip(): row for row in rows[:end]}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_in_the_docs_is_true(name: str) -> None:
    both = launches.counts(CASES[name])
    assert all(one.moved_bytes > 0 for found in both for one in found if isinstance(one, launches.Launch))
    cells = [launches.row_of(name, both), rows_of_docs(launches.HEADING)[name]]
    if not torch.__version__.startswith(RECORDED_TORCH + "."):
        cells = [row.split("|")[2::2] for row in cells]  # of our kernels alone
    assert cells[0] == cells[1], "run: PYTHONPATH=build/emulated/lib python scripts/launches.py table"


def test_the_table_has_no_other_call_and_no_operator_is_left_out() -> None:
    assert list(rows_of_docs(launches.HEADING)) == list(TABLE)
    assert {name.split(":")[0] for name in OPERATORS} == set(ops.__all__)


def is_address(word: int) -> bool:
    """Of a process's memory: no count, no float64 and no pair of float32 that anybody would pass."""
    return 2**32 <= word < 2**47


def difference(first: Sequence[object], second: Sequence[object]) -> str:
    """Where two lists of launches differ in more than pointers, or nothing."""
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} launches"
    for at, (one, other) in enumerate(zip(first, second, strict=True)):
        if isinstance(one, launches.Launch) and isinstance(other, launches.Launch):
            if one[:-1] != other[:-1] or len(one.arguments) != len(other.arguments):
                return f"launch {at}: {one} and {other}"
            words = [
                struct.unpack(f"<{len(each) // 8}Q", each)
                for each in (launch.arguments + bytes(-len(launch.arguments) % 8) for launch in (one, other))
            ]
            for place, (a, b) in enumerate(zip(*words, strict=True)):
                if a != b and not (is_address(a) and is_address(b)):
                    return f"launch {at}, {one.kernel}, byte {8 * place} of its arguments: {a:#x} and {b:#x}"
        elif one != other:
            return f"launch {at}: {one} and {other}"
    return ""


def flat(case: str, times: int) -> list[list[object]]:
    """The launches of a call and its gradient, several times over, from other numbers at other places."""
    function, inputs = CASES[case](4)
    held, found = [function()], []
    for _ in range(times):
        with torch.no_grad():
            for tensor in inputs:
                tensor.mul_(0.99)
        result, forward = launches.launched(function)
        held.append(result)
        backward: list[object] = []
        if inputs:
            results = [
                one for one in (result if isinstance(result, tuple) else (result,)) if one.requires_grad
            ]
            ones = [torch.rand_like(one) for one in results]
            grads, backward = launches.launched(
                lambda results=results, ones=ones: torch.autograd.grad(
                    results, inputs, ones, allow_unused=True
                )
            )
            held.append(grads)
        found.append([*forward, *backward])
    return found


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_but_pointers_differs_from_call_to_call(name: str) -> None:
    """So that a CUDA graph of one call is one of all."""
    first, second = flat(name, 2)
    assert first
    assert difference(first, second) == ""
    waits = [one for one in first if one[0].startswith(("aten::_local_scalar_dense", "aten::nonzero"))]
    assert not waits, "the host waits for a number, which no capture allows"


@pytest.mark.parametrize("name", CASES)
def test_nothing_points_to_the_memory_of_the_host(name: str) -> None:
    """A device runs a kernel when the launch is long over, and what lived on the host's stack with it."""
    ours = [one for one in flat(name, 1)[0] if isinstance(one, launches.Launch)]
    assert [one for one in ours if one.strangers] == []


def test_memory_of_the_host_is_seen() -> None:
    on_the_host = torch.from_numpy(numpy.ones((3, 4, 5), dtype=numpy.float32))
    z, rho, force = torch.randn(3, 4, 5)
    step = torch.tensor(0.1)
    for given, strangers in ((z, 0), (on_the_host[0], 1)):
        _, (one,) = launches.launched(lambda z=given: ops.leapfrog_kick_drift(z, rho, force, step))
        assert one.strangers == strangers


def test_memory_is_poisoned_as_its_tensor_dies() -> None:
    tensor = torch.zeros(1000)
    begin = tensor.data_ptr()
    del tensor
    again = torch.empty(1000)
    # At its beginning the heap keeps places of its own.
    assert again.data_ptr() != begin or again[16:].isnan().all()


def test_a_number_that_differs_is_seen() -> None:
    z, rho, force = torch.randn(3, 4, 5)
    step = torch.tensor(0.1)
    ops.leapfrog_kick_drift(z, rho, force, step)
    _, found = launches.launched(lambda: ops.leapfrog_kick_drift(z, rho, force, step))
    _, wider = launches.launched(lambda: ops.leapfrog_kick_drift(z[:3], rho[:3], force[:3], step))
    assert difference(found, found) == ""
    assert "launch 0" in difference(found, wider)
    (one,) = found
    at = one.arguments.index(struct.pack("<Q", 4))  # samples
    changed = one._replace(arguments=one.arguments[:at] + struct.pack("<Q", 5) + one.arguments[at + 8 :])
    assert "byte" in difference(found, [changed])
    assert one.kernel == "kick_drift_kernel<float>" and one.moved_bytes == 5 * 20 * 4


@pytest.mark.skipif(
    not torch.__version__.startswith(RECORDED_TORCH + "."), reason="counted with another torch"
)
@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_floors_in_the_docs_is_true(name: str) -> None:
    found = floors.row(CASES[name])
    assert f"| {' | '.join([name, *found.cells()])} |" == rows_of_docs(floors.HEADING)[name]
    assert found.bound != "device" or found.ratio < floors.MOST


def product_flops(name: str) -> float:
    """Of a call and its gradient, by scripts/launch_floors.py."""
    return 1e9 * floors.row(CASES[name]).gigaflops


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        # Forward and back to z for each of K + 1 forces; then a tangent, its way back, and two products a weight.
        ("hamiltonian_flow: MLP 32-512-512-784, B 128, K = 10", 11 * (2 + 4)),
        ("trajectory: the same, K = 10", 11 * 2),
        ("log_px_and_force: MLP 32-512-512-784, B 128", 6),
    ],
)
def test_counted_products_are_those_of_the_formulas(name: str, passes: int) -> None:
    forward = 2 * 128 * (32 * 512 + 512 * 512 + 512 * 784)
    # The first layer's way back to what is no latent is not needed everywhere.
    assert product_flops(name) == pytest.approx(passes * forward, rel=0.03)


def test_convolutions_are_counted_by_their_positions() -> None:
    tensors = "Float[8, 32, 16, 16][8192, 256, 16, 1];Float[64, 32, 4, 4][512, 16, 4, 1];"
    form = tensors + ";2;,2;,;1;,1;,;1;,1;,;False;0;,0;,;1;"
    sizes = [size for _, size in floors.shapes_in(form)]
    assert floors.product_flops("convolution", sizes, form) == 2 * 8 * 64 * 32 * 4 * 4 * 8 * 8
    turned = form.replace("False", "True")
    assert floors.product_flops("convolution", sizes, turned) == 2 * 8 * 64 * 32 * 4 * 4 * 16 * 16
    # Of a gradient, once for the image and once for the weight.
    gradient = "Float[8, 64, 8, 8][4096, 64, 8, 1];" + tensors
    backward = gradient + ";2;,2;,;1;,1;,;1;,1;,;False;0;,0;,;1;False;,True;,False;,;"
    given = [size for _, size in floors.shapes_in(backward)]
    one = 2 * 8 * 64 * 32 * 4 * 4 * 8 * 8
    assert floors.product_flops("convolution_backward", given, backward) == one
    both = backward.replace("False;,True", "True;,True")
    assert floors.product_flops("convolution_backward", given, both) == 2 * one

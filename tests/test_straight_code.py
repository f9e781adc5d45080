"""What a recorder wrote down, as code: nothing that nobody uses, nothing twice, and the same result as at first."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae.network.tape import Held, Recorder, kernel


def written(function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[int, int]:
    """The calls that were made, and those of the code; whose results are compared."""
    x = torch.randn(3, 4, dtype=torch.float64)
    recorder = Recorder()
    inputs = [recorder.name(x)]
    with recorder:
        expected = function(x)
    assert not recorder.failure
    calls = 0
    run = recorder.program(slice(None), inputs, recorder.names_of(expected))
    x = torch.randn(3, 4, dtype=torch.float64)
    kept = x.clone()
    for mine, theirs in zip(run(x), function(x), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(x, kept)
    calls = sum(line.strip().startswith("v") for line in _text(run).splitlines())
    return len(recorder.lines), calls


def _text(run: Callable[..., object]) -> str:
    """One line for each instruction that stores a variable, which is what is counted."""
    code = inspect.unwrap(run).__code__
    return "\n".join(name for name in code.co_varnames[code.co_argcount :])


def test_what_nobody_uses_is_left_out() -> None:
    made, calls = written(lambda x: (x.sin(), x.cos(), x.tan())[:1])
    assert (made, calls) == (3, 1)


def test_nothing_is_done_twice() -> None:
    made, calls = written(lambda x: (x.flatten().sin() + x.flatten().sin(),))
    assert (made, calls) == (5, 3)


def test_results_that_are_the_same_stay_apart() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.sin()

    assert written(function) == (2, 2)
    recorder = Recorder()
    x = torch.randn(3)
    inputs = [recorder.name(x)]
    with recorder:
        both = function(x)
    first, second = recorder.program(slice(None), inputs, recorder.names_of(both))(x)
    assert first.data_ptr() != second.data_ptr()


def test_memory_that_is_written_to() -> None:
    def separate(x: Tensor) -> tuple[Tensor, ...]:
        a, b = x.new_zeros(3, 4), x.new_zeros(3, 4)
        a[:, 1:].copy_(x[:, 1:])
        b[1] = x[0]
        return a + b, a

    def copies(x: Tensor) -> tuple[Tensor, ...]:
        a, b = x.t().reshape(-1), x.t().reshape(-1)  # each a copy
        b.add_(1)
        return (a - 2 * b,)

    def through_a_view(x: Tensor) -> tuple[Tensor, ...]:
        a, b = x.t().reshape(-1), x.t().reshape(-1)
        b[2:].mul_(3)
        return (a - 2 * b,)

    def before_and_after(x: Tensor) -> tuple[Tensor, ...]:
        a = x.exp()
        first = a.sin()
        a.add_(1)
        return (first + a.sin(),)

    def of_a_view_before_and_after(x: Tensor) -> tuple[Tensor, ...]:
        a = x.exp()
        first = a[1].sum()
        torch.add(x, 1, out=a)
        return (first + a[1].sum(),)

    for function in (separate, copies, through_a_view, before_and_after, of_a_view_before_and_after):
        written(function)


def test_what_is_handed_on_besides_tensors() -> None:
    def begun(x: Tensor) -> tuple[Held, Tensor]:
        return Held(x + 1), x * 2

    def ended(held: Held, y: Tensor) -> Tensor:
        result: Tensor = held.value * y
        return result

    def function(x: Tensor) -> tuple[Tensor, ...]:
        held, y = kernel(begun, x)
        return (kernel(ended, held, y) + kernel(ended, held, y),)

    made, calls = written(function)
    assert made == 4 and calls == 4  # begun makes two variables


@pytest.mark.parametrize("empty", [(None,), (), [None, None]])
def test_a_call_of_which_nothing_comes(empty: object) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        kernel(lambda _: empty, x)
        return (x.sin(),)

    assert written(function) == (1, 1)

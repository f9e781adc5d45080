"""What a recorder wrote down, as code: nothing that nobody uses, nothing twice, and the same result as at first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvae._extension import raw
from fastvae.network.tape import Held, Recorder, kernel


def written(function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[int, int]:
    """The calls that were made, and those of the code; whose results are compared."""
    x = torch.randn(3, 4, dtype=torch.float64)
    recorder = Recorder()
    inputs = [recorder.name(x)]
    with recorder:
        expected = function(x)
    assert not recorder.failure, recorder.failure
    code = recorder.code(slice(None), inputs, recorder.numbers_of(expected))
    for _ in range(2):
        x = torch.randn(3, 4, dtype=torch.float64)
        kept = x.clone()
        for mine, theirs in zip(code([x])[0], function(x), strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(x, kept)
    return len(recorder.calls), len(code)


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
    first, second = recorder.code(slice(None), inputs, recorder.numbers_of(both))([x])[0]
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
    assert (made, calls) == (4, 3)


def test_numbers_of_python() -> None:
    """As tensors they are made anew in each run: they may be written to."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        number = torch.tensor([1.0, 2.0, 3.0, -0.0], dtype=x.dtype)
        number.mul_(2).add_(x[0])
        picked = x.new_zeros(2, 4)
        picked[range(2), [1, 3]] = 1
        return number * 0.0, number * -0.0, (x * 1).sum() + 1, picked, x.sum(dim=1, dtype=torch.float32)

    written(function)


def test_lists_of_tensors_with_gaps_and_results_that_nobody_uses() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        index = torch.arange(3)
        parts = x.split(1, dim=1)
        mean, *_ = torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
        of_x, *_ = torch.ops.aten.native_layer_norm_backward(
            x, x, [4], x[:, :1], x[:, 1:2], None, None, [True, False, False]
        )
        return torch.cat([parts[2], parts[0], x], 1), x[:, index], x[..., 1:, index[None, :]], mean, of_x

    written(function)


def test_what_cannot_be_written_down() -> None:
    elsewhere = torch.ones(4, dtype=torch.float64)
    leaf = elsewhere.clone().requires_grad_()

    def reason(function: Callable[[Tensor], object]) -> str:
        recorder, x = Recorder(), torch.randn(3, 4, dtype=torch.float64)
        recorder.name(x)
        expected = function(x)
        with recorder:
            found = function(x)
        if isinstance(expected, Tensor):
            assert torch.equal(found, expected)  # it has run as it was
        return recorder.failure

    assert "nowhere" in reason(lambda x: x * elsewhere)
    assert "graph" in reason(lambda x: leaf.mul(2)) or "nowhere" in reason(lambda x: leaf.mul(2))
    assert "gives no tensor" in reason(lambda x: float(x.sum()))
    assert "gives no tensor" in reason(lambda x: kernel(lambda y: 3.0, x))
    assert "depends on numbers" in reason(lambda x: x[x > 0])
    assert "depends on numbers" in reason(lambda x: x.nonzero())
    assert not reason(lambda x: x[torch.tensor([1, 0])])
    assert "Generator" in reason(lambda x: x.clone().normal_(generator=torch.Generator()) * 0)


def test_a_function_that_fails_says_so_itself() -> None:
    failing = [False]

    def look(x: Tensor) -> Tensor:
        if failing[0]:
            raise KeyError("mine")
        return x * 2

    recorder, x = Recorder(), torch.randn(3)
    inputs = [recorder.name(x)]
    with recorder:
        y = kernel(look, x)
    code = recorder.code(slice(None), inputs, recorder.numbers_of([y]))
    code([x])
    failing[0] = True
    with pytest.raises(KeyError, match="mine"):
        code([x])
    with pytest.raises(RuntimeError, match="1 inputs, got 2"):
        code([x, x])
    with pytest.raises(RuntimeError):
        recorder_of_sum = Recorder()
        numbers = [recorder_of_sum.name(x)]
        with recorder_of_sum:
            total = x.view(3, 1).expand(3, 3).matmul(x)
        recorder_of_sum.code(slice(None), numbers, recorder_of_sum.numbers_of([total]))([torch.ones(2)])


def test_code_that_was_written_wrongly() -> None:
    def made(argument: tuple[str, object], result: int = 1, outputs: tuple[int, ...] = (1,)) -> object:
        call = (("aten::sin", ""), [argument], [result], [])
        return raw.StraightCode([call], 2, [0], [], list(outputs), [], Held, True)

    x = torch.randn(3)
    assert torch.equal(made(("variable", 0))((), [x], None)[0][0], x.sin())  # type: ignore[operator]
    for wrong in (("variable", 2), ("variable", -2), ("list", [5])):
        with pytest.raises(ValueError, match="expected a variable below 2"):
            made(wrong)
    with pytest.raises(ValueError, match="expected a variable below 2"):
        made(("variable", 0), result=7)
    with pytest.raises(ValueError, match="expected a variable below 2"):
        made(("variable", 0), outputs=(9,))
    with pytest.raises(RuntimeError):
        made(("variable", 1))((), [x], None)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="gave fewer results"):
        raw.StraightCode(
            [(("aten::sin", ""), [("variable", 0)], [1, 1], [])], 2, [0], [], [1], [], Held, True
        )((), [x], None)
    with pytest.raises(RuntimeError, match="aten::sign_of"):
        raw.StraightCode([(("aten::sign_of", ""), [], [1], [])], 2, [0], [], [1], [], Held, True)


@pytest.mark.parametrize("empty", [(None,), (), [None, None]])
def test_a_call_of_which_nothing_comes(empty: object) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        kernel(lambda _: empty, x)
        return (x.sin(),)

    assert written(function) == (2, 1)


def test_an_output_that_is_kept_as_well_is_nobody_elses(device: torch.device) -> None:
    """A GPU replays the code from the fourth call on; what a way back has kept dies, the output is held."""
    code = raw.StraightCode(
        [(("aten::sin", ""), [("variable", 0)], [1], [])], 2, [0], [], [1], [1], Held, True
    )
    inputs = [torch.randn(5, device=device) for _ in range(8)]
    outputs = [code((), [x], None)[0][0] for x in inputs]
    for x, y in zip(inputs, outputs, strict=True):
        assert torch.equal(y, x.sin())

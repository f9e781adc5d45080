"""A function that autograd differentiates again and again: the same results once it is straight code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.network.vjp_tape import RepeatedVjp

CALLS = 6


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return 2 * dy


def compare(function: Callable[[list[Tensor], Tensor], Tensor], *, is_straight: bool = True) -> RepeatedVjp:
    """Six calls with numbers that change in place, each against autograd."""
    torch.manual_seed(0)
    trained = [torch.randn(4, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    x = torch.randn(5, 4, dtype=torch.float64)
    mine = RepeatedVjp(lambda: function(trained, x), trained, [x])
    for _ in range(CALLS):
        y = mine.forward()
        assert not y.requires_grad
        dy = torch.randn_like(y)
        found = mine.backward(dy)
        wanted = function(trained, x)
        expected = torch.autograd.grad(wanted, trained, dy, allow_unused=True)
        torch.testing.assert_close([y, *found], [wanted.detach(), *expected], rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            for parameter in (*trained, x):
                parameter.mul_(0.9).add_(0.01)
    assert mine.is_straight == is_straight, mine.failure
    return mine


FUNCTIONS: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "activations that save their results": lambda w, x: (x @ w[0]).sigmoid() @ w[1].tanh() @ w[2].exp(),
    "an input that is not used": lambda w, x: F.softmax(x @ w[0], -1) @ w[2],
    "a weight used twice": lambda w, x: F.elu(x @ w[0]) @ w[0] + w[1].sum() + w[2].logsumexp(0),
    "vmap": lambda w, x: torch.vmap(lambda a, b: F.layer_norm(a @ b, (4,)))(
        x[:4, None], torch.stack([w[0], w[1], w[2], w[0]])
    )[:, 0],
    "a function of one's own": lambda w, x: Doubling.apply(F.silu(x @ w[0])) @ w[1] * w[2][0],  # type: ignore[no-untyped-call]
    "an LSTM's cell": lambda w, x: torch._VF.lstm_cell(  # type: ignore[attr-defined]
        x, (x, x), w[0].repeat(4, 1), w[1].repeat(4, 1), w[2].flatten(), w[2].flatten()
    )[0],
    "changes in place": lambda w, x: F.relu_((x @ w[0]).mul_(w[1][0]).add_(1)) @ w[2],
    "numbers of Python's": lambda w, x: (
        x @ w[0] * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype) + w[1][0] + w[2][1]
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_straight_code_is_what_autograd_says(function: Callable[[list[Tensor], Tensor], Tensor]) -> None:
    compare(function)


def test_a_branch_on_numbers_stays_with_autograd() -> None:
    def function(w: list[Tensor], x: Tensor) -> Tensor:
        y = x @ w[0] @ w[1] @ w[2]
        return y if float(y.detach().sum()) > 0 else y.square()

    assert "gives no tensor" in compare(function, is_straight=False).failure


def test_what_no_operator_shows_stays_with_autograd() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return torch.from_numpy(x.detach().numpy() * 3)

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            return dy * 3

    def function(w: list[Tensor], x: Tensor) -> Tensor:
        return Hidden.apply(x @ w[0]) @ w[1] + w[2][0]  # type: ignore[no-untyped-call]

    assert "something else" in compare(function, is_straight=False).failure


def test_what_is_another_function_each_time_stays_with_autograd() -> None:
    calls = [0]

    def function(w: list[Tensor], x: Tensor) -> Tensor:
        calls[0] += 1
        return x @ w[0] * (1.0 + calls[0] % 2) + w[1][0] + w[2][1]

    torch.manual_seed(0)
    trained = [torch.randn(4, 4).requires_grad_() for _ in range(3)]
    mine = RepeatedVjp(lambda: function(trained, torch.ones(5, 4)), trained, [])
    for _ in range(CALLS):
        mine.backward(torch.ones_like(mine.forward()))
    assert not mine.is_straight and mine.failure


def test_the_same_tensor_twice_is_refused() -> None:
    weight = torch.randn(3, 3).requires_grad_()
    mine = RepeatedVjp(lambda: weight @ weight, [weight], [weight.detach()])
    for _ in range(CALLS):
        mine.backward(torch.ones_like(mine.forward()))
    assert "twice" in mine.failure


@pytest.mark.parametrize(
    "layer", [nn.LSTM(4, 4, batch_first=True), nn.GRU(4, 4, num_layers=2), nn.Conv1d(5, 3, 2)]
)
def test_layers_that_torch_has_in_one_piece(layer: nn.Module) -> None:
    x = torch.randn(2, 5, 4)
    parameters = list(layer.parameters())

    def function() -> Tensor:
        found = layer(x)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    mine = RepeatedVjp(function, parameters, [x])
    for _ in range(CALLS):
        y = mine.forward()
        dy = torch.randn_like(y)
        found = mine.backward(dy)
        expected = torch.autograd.grad(function(), parameters, dy)
        torch.testing.assert_close(found, list(expected))
        with torch.no_grad():
            x.mul_(0.9)
            for parameter in parameters:
                parameter.mul_(1.1)
    assert mine.is_straight, mine.failure

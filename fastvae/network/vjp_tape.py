"""A function that autograd differentiates again and again, and its way back, as straight code (tape.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.network.straight import Code
from fastvae.network.tape import MOST_NUMBERS, Recorder, Unrecordable, check_same, is_plain, tensors_in

__all__ = ["RepeatedVjp"]

_WARM_UP = 1
"""Runs before one is written down: the first ones may prepare what later ones use."""


class RepeatedVjp:
    """y = f(inputs), and the gradients of <dy, y> to some of them, for numbers that change from call to call.

    Each run goes through autograd at first. One is written down, the next one is made both ways, with other numbers,
    and compared; from then on the calls that matter alone are made. Where that cannot be, all go through autograd.

    Args:
        function: without arguments; of ``trained`` and ``others`` alone, whatever it calls.
        trained: leaves that require a gradient; they may be changed in place between calls.
        others: further tensors that it may read.
    """

    def __init__(
        self, function: Callable[[], Tensor], trained: Sequence[Tensor], others: Sequence[Tensor]
    ) -> None:
        self._function, self._trained, self._others = function, list(trained), list(others)
        self._runs = 0
        self._code: tuple[Code, Code] | None = None
        self._is_checked = False
        self._recorder: Recorder | None = None
        self._output: Tensor | None = None
        self._left: Any = None
        self.failure = ""
        """Why there is no straight code."""

    @property
    def is_straight(self) -> bool:
        """Whether calls are made without autograd by now."""
        return self._code is not None and self._is_checked

    def is_straight_on(self, device: torch.device) -> bool:
        """Whether that is so and no tensor of another device takes part."""
        if self._code is None or not self._is_checked:
            return False
        return all(tensor.device == device for code in self._code for tensor in code.constants)

    def forward(self) -> Tensor:
        """y, detached."""
        self._runs += 1
        if self._code is not None:
            try:
                (output,), self._left = self._code[0](self._given())
            except RuntimeError as error:  # what was written down does not fit these numbers
                self._give_up(str(error))
                return self._run()
            if self._is_checked:
                return output
            self._found = output
        elif self._runs > _WARM_UP and not self.failure:
            return self._record()
        return self._run()

    def backward(self, dy: Tensor, *, retain_graph: bool = False) -> list[Tensor | None]:
        """Gradients to ``trained`` of the last y; None for what it does not depend on."""
        recorder, self._recorder = self._recorder, None
        if self._code is not None and self._is_checked:
            found = self._code[1]([dy], self._left)[0]
            self._left = None
            return list(found)
        if self._code is not None:
            wanted = self._by_autograd(dy, retain_graph)
            assert self._output is not None
            try:
                again = self._code[1]([dy], self._left)[0]
                check_same((self._found, *again), (self._output.detach(), *wanted))
                self._is_checked = True
            except (Unrecordable, RuntimeError) as reason:
                self._give_up(str(reason))
            self._output = self._left = None
            return wanted
        if recorder is None:
            return self._by_autograd(dy, retain_graph)
        # A copy: what made dy may have made it of what was written down.
        dy = dy.clone()
        number = recorder.name(dy)
        middle = len(recorder.calls)
        with recorder:
            wanted = self._by_autograd(dy, retain_graph)
        try:
            self._code = self._made(recorder, middle, number, wanted)
        except Unrecordable as reason:
            self._give_up(str(reason))
        return wanted

    def _given(self) -> list[Tensor]:
        return [*(each.detach() for each in self._trained), *self._others]

    def _by_autograd(self, dy: Tensor, retain_graph: bool) -> list[Tensor | None]:
        assert self._output is not None
        return list(
            torch.autograd.grad(self._output, self._trained, dy, retain_graph=retain_graph, allow_unused=True)
        )

    def _record(self) -> Tensor:
        recorder = Recorder(with_graphs=True)
        try:
            if not is_plain(self._trained[0].detach()):
                raise Unrecordable("something else looks on")
            self._inputs = recorder.name_inputs([*self._trained, *self._others])
        except Unrecordable as reason:
            self._give_up(str(reason))
            return self._run()
        with recorder:
            output = self._run()
        try:
            if sum(tensor.numel() for tensor in tensors_in(recorder.alive)) > MOST_NUMBERS:
                raise Unrecordable("so much work that asking for it costs nothing")
            if recorder.failure:
                raise Unrecordable(recorder.failure)
            self._y = recorder.numbers_of([self._output])
            self._recorder = recorder
        except Unrecordable as reason:
            self._give_up(str(reason))
        return output

    def _run(self) -> Tensor:
        with torch.enable_grad():
            self._output = self._function()
        return self._output.detach()

    def _made(
        self, recorder: Recorder, middle: int, dy: int, found: Sequence[Tensor | None]
    ) -> tuple[Code, Code]:
        if recorder.failure:
            raise Unrecordable(recorder.failure)
        return recorder.there_and_back(middle, self._inputs, self._y, [dy], recorder.numbers_of(found))

    def _give_up(self, reason: str) -> None:
        self._code, self.failure = None, reason

"""A function that is evaluated and differentiated again and again, as straight code (tape.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.network.straight import Code
from fastvae.network.tape import Recorder, Unrecordable, check_same, is_plain, most_numbers, tensors_in

__all__ = ["RepeatedPass", "RepeatedVjp", "StraightPass"]

_WARM_UP = 1
"""Runs before one is written down: the first ones may prepare what later ones use."""


class StraightPass:
    """What is known of straight code, there and back: shared by passes that make the same calls of other tensors."""

    def __init__(self) -> None:
        self.known: tuple[tuple[Code, Code] | None, bool] = None, False
        """There and back, and whether it was compared: together, as other threads may look."""
        self.failure = ""
        """Why there is none."""

    def give_up(self, reason: str) -> None:
        """There is none, and will be none."""
        self.known, self.failure = (None, False), reason


class RepeatedPass(ABC):
    """y = f(inputs) and what its reverse makes of dy, for numbers that change from call to call.

    The first run is made as it is. One is written down, the next one is made both ways, with other numbers, and
    compared; from then on the calls that matter alone are made. Where that cannot be, all are made as they are.

    Args:
        inputs: all tensors that it depends on; they may be changed in place between calls.
        straight: None: of this one alone.
    """

    def __init__(self, inputs: Sequence[Tensor], straight: StraightPass | None = None) -> None:
        self._inputs = list(inputs)
        self._given = [each.detach() if each.requires_grad else each for each in inputs]
        self._straight = StraightPass() if straight is None else straight
        self._runs = 0
        self._recorder: Recorder | None = None
        self._left: Any = None
        self._comparing: tuple[tuple[Code, Code], Tensor] | None = None
        """Code, and what it gave, while a run is made both ways."""
        self._running: Code | None = None
        self._output: Tensor | None = None

    @abstractmethod
    def there(self) -> Tensor:
        """y, detached."""

    @abstractmethod
    def back(self, dy: Tensor, retain_graph: bool) -> list[Tensor | None]:
        """What is made of dy, after ``there``."""

    @property
    def failure(self) -> str:
        """Why there is no straight code."""
        return self._straight.failure

    @property
    def is_straight(self) -> bool:
        """Whether the calls that matter alone are made by now."""
        return self._straight.known[1]

    def is_straight_on(self, device: torch.device) -> bool:
        """Whether that is so and no tensor of another device takes part."""
        code, is_checked = self._straight.known
        if code is None or not is_checked:
            return False
        return all(tensor.device == device for part in code for tensor in part.constants)

    def forward(self) -> Tensor:
        """y, detached."""
        self._runs += 1
        self._running = self._comparing = None
        straight, (code, is_checked) = self._straight, self._straight.known
        if code is not None:
            try:
                (output,), self._left = code[0](self._given)
            except RuntimeError as error:  # what was written down does not fit these numbers
                straight.give_up(str(error))
                return self.there()
            if is_checked:
                self._running = code[1]
                return output
            self._comparing = code, output
            self._output = self.there()
            return self._output
        elif self._runs > _WARM_UP and not straight.failure:
            return self._record()
        return self.there()

    def backward(self, dy: Tensor, *, retain_graph: bool = False) -> list[Tensor | None]:
        """What is made of dy after the last ``forward``."""
        recorder, self._recorder = self._recorder, None
        if self._running is not None:
            found = self._running([dy], self._left)[0]
            self._left = None
            return list(found)
        if self._comparing is not None:
            code, output = self._comparing
            wanted = self.back(dy, retain_graph)
            try:
                again = code[1]([dy], self._left)[0]
                check_same((output, *again), (self._output, *wanted))
                self._straight.known = code, True
            except (Unrecordable, RuntimeError) as reason:
                self._straight.give_up(str(reason))
            self._left = self._comparing = None
            return wanted
        if recorder is None:
            return self.back(dy, retain_graph)
        # A copy: what made dy may have made it of what was written down.
        dy = dy.clone()
        number = recorder.name(dy)
        middle = len(recorder.calls)
        with recorder:
            wanted = self.back(dy, retain_graph)
        try:
            if recorder.failure:
                raise Unrecordable(recorder.failure)
            results = recorder.numbers_of(wanted)
            made = recorder.there_and_back(middle, self._named, self._y, [number], results)
            self._straight.known = made, False
        except Unrecordable as reason:
            self._straight.give_up(str(reason))
        return wanted

    def _record(self) -> Tensor:
        if not is_plain(self._given[0]):  # something else looks on
            return self.there()
        recorder = Recorder(with_graphs=True)
        try:
            self._named = recorder.name_inputs(self._inputs)
        except Unrecordable as reason:
            self._straight.give_up(str(reason))
            return self.there()
        with recorder:
            output = self.there()
        try:
            if sum(tensor.numel() for tensor in tensors_in(recorder.alive)) > most_numbers(
                output.device.type
            ):
                raise Unrecordable("so much work that asking for it costs nothing")
            if recorder.failure:
                raise Unrecordable(recorder.failure)
            self._y = recorder.numbers_of([output])
            self._recorder = recorder
        except Unrecordable as reason:
            self._straight.give_up(str(reason))
        return output


class RepeatedVjp(RepeatedPass):
    """y = f(inputs), and the gradients of <dy, y> to some of them, by autograd at first.

    Args:
        function: without arguments; of ``trained`` and ``others`` alone, whatever it calls.
        trained: leaves that require a gradient; they may be changed in place between calls.
        others: further tensors that it may read.
    """

    def __init__(
        self, function: Callable[[], Tensor], trained: Sequence[Tensor], others: Sequence[Tensor]
    ) -> None:
        super().__init__([*trained, *others])
        self._function, self._trained = function, list(trained)
        self._graph: Tensor | None = None

    def there(self) -> Tensor:
        """See ``RepeatedPass``."""
        with torch.enable_grad():
            self._graph = self._function()
        return self._graph.detach()

    def back(self, dy: Tensor, retain_graph: bool) -> list[Tensor | None]:
        """Gradients to ``trained``; None for what y does not depend on."""
        assert self._graph is not None
        return list(
            torch.autograd.grad(self._graph, self._trained, dy, retain_graph=retain_graph, allow_unused=True)
        )

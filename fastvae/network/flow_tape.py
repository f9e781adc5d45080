"""A flow there and back as straight code (tape.py), once its inputs have come in one form a few times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae.network.straight import Code
from fastvae.network.tape import Recorder, Tapes, Unrecordable, check_same, form_of, is_plain, tensors_in

if TYPE_CHECKING:
    from fastvae.network.heads import Head

__all__ = ["FlowTape", "FlowTapes", "Recording", "form_with_head"]

_MISSES = 3
"""Backward passes of another form after which a tape is given up."""


class FlowTape:
    """The code of one form of inputs.

    Args:
        forward: of the head and the inputs; what it keeps, ``backward`` takes.
        backward: of the head, the trajectory and the cotangents, of the form ``of``.
    """

    def __init__(self, forward: Code, backward: Code, of: tuple[Any, ...]) -> None:
        self._forward, self._backward, self._of = forward, backward, of
        self.misses = 0

    def forward(self, head: Head, given: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Any]:
        """The outputs, and what the way back needs."""
        return self._forward([head, *given])

    def backward(self, head: Head, kept: Any, given: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
        """The gradients; None: of cotangents of another form."""
        if form_of(given) != self._of:
            self.misses += 1
            return None
        return self._backward([head, *(each for each in given if each is not None)], kept)[0]


class Recording:
    """A flow that is written down while it runs."""

    def __init__(self, tapes: FlowTapes, form: Any, head: Head, given: Sequence[Tensor]) -> None:
        self.tapes, self.form, self.head, self.given = tapes, form, head, list(given)
        self.recorder = Recorder()
        self._head = self.recorder.name_object(head)
        self._inputs = [self.recorder.name(tensor) for tensor in given]
        self._outputs: list[Tensor] = []

    def ended_forward(self, outputs: Sequence[Tensor]) -> None:
        """Half way."""
        self._outputs = list(outputs)
        self._middle = len(self.recorder.calls)
        self._versions = [each._version for each in tensors_in(self.recorder.alive)]

    def begin_backward(self, given: Sequence[Tensor | None]) -> None:
        """What autograd hands over."""
        self._back = list(given)
        self._back_numbers = [self.recorder.name(tensor) for tensor in given if tensor is not None]

    def ended_backward(self, found: Sequence[Tensor | None]) -> None:
        """Make the code and compare it with what was computed; where it differs there is none."""
        try:
            self.tapes.keep(self.form, self._made(found))
        except Unrecordable as reason:
            self.tapes.give_up(self.form, str(reason))

    def _made(self, found: Sequence[Tensor | None]) -> FlowTape:
        recorder = self.recorder
        if recorder.failure:
            raise Unrecordable(recorder.failure)
        changed = zip(tensors_in(recorder.alive), self._versions, strict=False)
        if any(tensor._version != version for tensor, version in changed):
            raise Unrecordable("the way back changes what it needs")
        halves = recorder.there_and_back(
            self._middle,
            [self._head, *self._inputs],
            recorder.numbers_of(self._outputs),
            [self._head, *self._back_numbers],
            recorder.numbers_of(found),
        )
        tape = FlowTape(*halves, form_of(self._back))
        outputs, left = tape.forward(self.head, self.given)
        again = tape.backward(self.head, left, self._back)
        assert again is not None
        check_same((*outputs, *again), (*self._outputs, *found))
        return tape


class FlowTapes(Tapes):
    """The tapes of a network's flows."""

    def find(
        self, passive: Sequence[Any], head: Head, others: Sequence[Tensor], facts: Any
    ) -> tuple[FlowTape | None, Recording | None, list[Tensor]]:
        """The tape, or what writes one, or neither; and the inputs in their order."""
        form, given = form_with_head(passive, head, others, facts)
        try:
            tape, is_due = (None, False) if form is None else self.look_up(form)
        except TypeError:  # something that has no hash
            return None, None, []
        if tape is not None and tape.misses > _MISSES:
            self.give_up(form, "cotangents of several forms")
            tape = None
        return tape, Recording(self, form, head, given) if is_due else None, given


def form_with_head(
    passive: Sequence[Any], head: Head, others: Sequence[Tensor], facts: Any
) -> tuple[Any, list[Tensor]]:
    """All that sweeps with a head depend on besides numbers, or None; and their tensors in order."""
    if not is_plain(others[0]):
        return None, []
    of_head, of_its_own = head.form()
    given = [*tensors_in(passive), *others, *of_its_own]
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return (form_of(passive), form_of(given), of_head, facts, is_deterministic), given

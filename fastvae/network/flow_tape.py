"""A flow there and back as straight code (tape.py), once its inputs have come in one form a few times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae.network.straight import inputs_of
from fastvae.network.tape import Recorder, Tapes, Unrecordable, check_same, form_of, is_plain, tensors_in

if TYPE_CHECKING:
    from fastvae.network.heads import Head

__all__ = ["FlowTape", "FlowTapes", "Recording"]

_MISSES = 3
"""Backward passes of another form after which a tape is given up."""
_HEAD = "head"
"""The variable of a likelihood's head in the code."""


class FlowTape:
    """The code of one form of inputs.

    Args:
        forward: of the inputs; the outputs, then what ``backward`` reads.
        outputs: how many there are.
        backward: of that, the trajectory and the cotangents, of the form ``of``.
    """

    def __init__(
        self, forward: Callable[..., Any], outputs: int, backward: Callable[..., Any], of: tuple[Any, ...]
    ) -> None:
        self._forward, self._outputs, self._backward, self._of = forward, outputs, backward, of
        self.misses = 0

    def forward(self, head: Head, given: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The outputs, and what the way back needs."""
        found = self._forward(head, *given)
        return found[: self._outputs], found[self._outputs :]

    def backward(
        self, head: Head, held: Sequence[Tensor], given: Sequence[Tensor | None]
    ) -> tuple[Any, ...] | None:
        """The gradients; None: of cotangents of another form."""
        if form_of(given) != self._of:
            self.misses += 1
            return None
        found: tuple[Any, ...] = self._backward(head, *held, *(each for each in given if each is not None))
        return found


class Recording:
    """A flow that is written down while it runs."""

    def __init__(self, tapes: FlowTapes, form: Any, head: Head, given: Sequence[Tensor]) -> None:
        self.tapes, self.form, self.head, self.given = tapes, form, head, list(given)
        self.recorder = Recorder()
        self.recorder.objects[id(head)] = _HEAD
        self._inputs = [self.recorder.name(tensor) for tensor in given]
        self._outputs: list[Tensor] = []

    def ended_forward(self, outputs: Sequence[Tensor]) -> None:
        """Half way."""
        self._outputs = list(outputs)
        self._middle = len(self.recorder.lines)
        self._versions = [tensor._version for tensor in self.recorder.alive]

    def begin_backward(self, given: Sequence[Tensor | None]) -> None:
        """What autograd hands over."""
        self._back = list(given)
        self._back_names = [self.recorder.name(tensor) for tensor in given if tensor is not None]

    def ended_backward(self, found: Sequence[Tensor | None]) -> None:
        """Make the code and compare it with what was computed; where it differs there is none."""
        try:
            self.tapes.keep(self.form, self._made(found))
        except Unrecordable as reason:
            self.tapes.give_up(self.form, str(reason))

    def _made(self, found: Sequence[Tensor | None]) -> FlowTape:
        recorder, there, back = self.recorder, slice(0, self._middle), slice(self._middle, None)
        if recorder.failure:
            raise Unrecordable(recorder.failure)
        changed = zip(recorder.alive, self._versions, strict=False)
        if any(tensor._version != version for tensor, version in changed):
            raise Unrecordable("the way back changes what it needs")
        results = recorder.names_of(found)
        own = set(self._back_names)
        held = [name for name in inputs_of(recorder.lines[back], results) if name not in own]
        tape = FlowTape(
            recorder.program(there, [_HEAD, *self._inputs], [*recorder.names_of(self._outputs), *held]),
            len(self._outputs),
            recorder.program(back, [_HEAD, *held, *self._back_names], results),
            form_of(self._back),
        )
        outputs, kept = tape.forward(self.head, self.given)
        again = tape.backward(self.head, kept, self._back)
        assert again is not None
        check_same((*outputs, *again), (*self._outputs, *found))
        return tape


class FlowTapes(Tapes):
    """The tapes of a network's flows."""

    def find(
        self, passive: Sequence[Any], head: Head, others: Sequence[Tensor], facts: Any
    ) -> tuple[FlowTape | None, Recording | None, list[Tensor]]:
        """The tape, or what writes one, or neither; and the inputs in their order."""
        if not is_plain(others[0]):
            return None, None, []
        of_head, of_its_own = head.form()
        given = [*tensors_in(passive), *others, *of_its_own]
        try:
            form = (
                form_of(passive),
                form_of(given),
                of_head,
                facts,
                torch.are_deterministic_algorithms_enabled(),
            )
            tape, is_due = self.look_up(form)
        except TypeError:  # something that has no hash
            return None, None, []
        if tape is not None and tape.misses > _MISSES:
            self.give_up(form, "cotangents of several forms")
            tape = None
        return tape, Recording(self, form, head, given) if is_due else None, given

"""A flow there and back as straight code (tape.py), once its inputs have come in one form a few times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.network.heads import Head, is_elementwise
from fastvae.network.tape import Recorder, Unrecordable, form_of, tensors_in

__all__ = ["FlowTape", "FlowTapes", "Recording"]

_SEEN = 3
"""Calls of one form after which it is worth to write one down, which takes as long as ten."""
_FORMS = 8
"""Forms that are remembered: batches of many sizes are no use for that."""
_MISSES = 3
"""Backward passes of another form after which a tape is given up."""
_HEAD = "head"
"""The variable of a likelihood's head in the code."""
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}


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
        self._names = [self.recorder.names.get(id(output)) for output in outputs]
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
        results = [None if each is None else recorder.names.get(id(each), "") for each in found]
        if "" in results or None in self._names:
            raise Unrecordable("a result from nowhere")
        own = set(self._back_names)
        held = [name for name in recorder.read_before_written(back) if name not in own]
        tape = FlowTape(
            recorder.program(there, [_HEAD, *self._inputs], [*self._names, *held]),
            len(self._names),
            recorder.program(back, [_HEAD, *held, *self._back_names], results),
            form_of(self._back),
        )
        outputs, kept = tape.forward(self.head, self.given)
        again = tape.backward(self.head, kept, self._back)
        assert again is not None
        for mine, wanted in zip((*outputs, *again), (*self._outputs, *found), strict=True):
            if not _same(mine, wanted):
                raise Unrecordable("run again it gives something else")
        return tape


def _same(mine: Tensor | None, wanted: Tensor | None) -> bool:
    if mine is None or wanted is None:
        return mine is wanted
    if mine.shape != wanted.shape or mine.dtype != wanted.dtype:
        return False
    size = _ROUNDING[wanted.dtype]
    return torch.allclose(
        mine, wanted, size, size * float(wanted.abs().max()) if wanted.numel() else 0.0, True
    )


class FlowTapes:
    """The tapes of a network's sweeps, by the form of the inputs."""

    def __init__(self) -> None:
        self._seen: dict[Any, int] = {}
        self._tapes: dict[Any, FlowTape] = {}
        self.reasons: list[str] = []
        """Why forms were given up."""

    def find(
        self, passive: Sequence[Any], head: Head, others: Sequence[Tensor], facts: Any
    ) -> tuple[FlowTape | None, Recording | None, list[Tensor]]:
        """The tape, or what writes one, or neither; and the inputs in their order."""
        if not _is_plain(others[0]):
            return None, None, []
        given = [*tensors_in(passive), *others]
        of_head: tuple[Any, ...] = (type(head), head.of_x)
        if is_elementwise(head):
            # Its formulas become part of the code; any other head is called.
            given += [head.data, head.rows]
            of_head = (type(head.likelihood), *vars(head.likelihood).items())
        try:
            form = (
                form_of(passive),
                form_of(given),
                of_head,
                facts,
                torch.are_deterministic_algorithms_enabled(),
            )
            seen = self._seen.get(form, 0)
        except TypeError:  # something that has no hash
            return None, None, []
        tape = self._tapes.get(form)
        if tape is not None and tape.misses > _MISSES:
            self.give_up(form, "cotangents of several forms")
            tape = None
        if tape is not None or seen < 0:
            return tape, None, given
        if seen == 0 and len(self._seen) >= _FORMS:
            self._seen.pop(next(iter(self._seen)))
        self._seen[form] = seen + 1
        return None, Recording(self, form, head, given) if seen + 1 >= _SEEN else None, given

    def keep(self, form: Any, tape: FlowTape) -> None:
        """From now on."""
        if len(self._tapes) >= _FORMS:
            self._tapes.pop(next(iter(self._tapes)))
        self._tapes[form] = tape

    def give_up(self, form: Any, reason: str) -> None:
        """No tape of this form, ever."""
        self._tapes.pop(form, None)
        self._seen[form] = -1
        self.reasons.append(reason)


def _is_plain(z: Tensor) -> bool:
    """Nobody else looks on: no mode of torch, no compiler, no CUDA graph, whose capture allows no look at numbers."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or type(z) is not Tensor:
        return False
    if torch.compiler.is_compiling() or z.dtype not in _ROUNDING:
        return False
    return not (z.is_cuda and torch.cuda.is_current_stream_capturing())

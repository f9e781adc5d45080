"""Sweeps written down: the calls of PyTorch that they made for inputs of one form, as code that makes them again.

What a sweep calls depends on shapes and on what is wanted, and on no number: so for inputs of the same form the rules
need not be asked again. A small network's flow is a few hundred calls, and asking takes as long as they do.

While a :class:`Recorder` is active, every function of torch that this thread calls, and every kernel of ours that is
called through :func:`kernel`, is noted with its arguments. What cannot be noted (a number looked at, a tensor from
nowhere) leaves a reason in ``failure``; then there is no tape, and nothing else is different.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from fastvae.network.straight import Line, compiled

__all__ = [
    "Held",
    "Recorder",
    "Tapes",
    "Unrecordable",
    "check_same",
    "form_of",
    "is_plain",
    "kernel",
    "outside",
    "tensors_in",
]

# Functions that say something of a tensor's form and nothing of its numbers.
_OF_FORM = frozenset(
    {"__get__", "__len__", "dim", "size", "numel", "nelement", "ndimension", "stride", "get_device"}
)
_OF_FORM |= {
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "is_conj",
    "is_neg",
    "is_inference",
    "is_same_size",
    "sym_numel.default",
    "sym_size.int",
    "sym_stride.int",
}
# Names that functions begin with which make memory to be written to.
_MAKERS = ("new_", "zeros", "ones", "full", "empty", "clone", "contiguous", "rand")
_state = threading.local()


class Unrecordable(Exception):  # noqa: N818
    """Why a run cannot be written down."""


class Held:
    """What one call of :func:`kernel` leaves for later ones besides tensors, such as a graph of autograd's."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def kernel(function: Callable[..., Any], *args: Any) -> Any:
    """A call of a function of ours as a whole, such as a kernel, which no torch function mode sees.

    It changes nothing, and says of numbers nothing but tensors.
    """
    recorder: Recorder | None = getattr(_state, "recorder", None)
    if recorder is None:
        return function(*args)
    with _pop_mode_temporarily():
        return recorder.note(function, args, {})


def outside(function: Callable[..., Any], *args: Any) -> Any:
    """A call that is none of the run, but makes what later runs use as well."""
    if getattr(_state, "recorder", None) is None:
        return function(*args)
    with _pop_mode_temporarily():
        return function(*args)


def form_of(values: Sequence[Any]) -> tuple[Any, ...]:
    """All of some values that a sweep may depend on, besides tensors' numbers."""
    return tuple(
        (value.shape, value.stride(), value.dtype, value.device)
        if isinstance(value, Tensor)
        else (form_of(value) if isinstance(value, (list, tuple)) else value)
        for value in values
    )


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """Those of some values, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


class Recorder(TorchFunctionMode):
    """Notes calls as lines of code; a tensor is known by the variable that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        self.alive: list[Tensor] = []
        self._kept: list[Held] = []
        """The two are all that has a name: an id must not be given to another object."""
        self.lines: list[Line] = []
        self.constants: dict[str, Any] = {}
        self._of_constants: dict[int, str] = {}
        self.objects: dict[int, str] = {}
        """Variables of objects whose methods are called as kernels: another one each time."""
        self.failure = ""

    def __enter__(self) -> Recorder:
        _state.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _state.recorder = None
        super().__exit__(*error)

    def name(self, value: Tensor | Held) -> str:
        """The value's variable, from now on another one than before if it had any."""
        found = self.names[id(value)] = f"v{len(self.alive) + len(self._kept)}"
        if isinstance(value, Held):
            self._kept.append(value)
        else:
            self.alive.append(value)
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See ``TorchFunctionMode``."""
        return self.note(func, args, kwargs or {})

    def note(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call it, and note the call."""
        if self.failure:
            return function(*args, **kwargs)
        read: set[str] = set()
        try:
            given = [self._code(arg, read) for arg in args]
            given += [f"{key}={self._code(value, read)}" for key, value in kwargs.items()]
        except Unrecordable as reason:
            self.failure = f"{_title(function)}: {reason}"
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        owner = self.objects.get(id(getattr(function, "__self__", None)))
        called = (
            f"{owner}.{function.__name__}" if owner else self._constant(getattr(function, "_op", function))
        )
        call = f"{called}({', '.join(given)})"
        before = len(self.alive) + len(self._kept)
        try:
            target, written = self._target(result)
        except Unrecordable as reason:
            self.failure = f"{_title(function)}: {reason}"
            return result
        fresh = len(self.alive) + len(self._kept) - before
        makes = _title(function).startswith(_MAKERS)
        if written:
            # A result that had a name is a tensor that was changed, or handed on.
            changes = fresh < len(written)
            self.lines.append(Line(target, call, frozenset(read), frozenset(written), changes, makes))
        elif _title(function) == "__setitem__":
            self.lines.append(Line("", call, frozenset(read), frozenset(), True, False))
        elif not (_title(function) in _OF_FORM or _is_empty(result)):
            self.failure = f"{_title(function)} gives no tensor"
        return result

    def _target(self, result: Any) -> tuple[str, set[str]]:
        if isinstance(result, Tensor):
            if type(result) is not Tensor or result.requires_grad:
                raise Unrecordable("its result is of another kind")
            name = self.names.get(id(result)) or self.name(result)
            return name, {name}
        if isinstance(result, Held):
            name = self.name(result)
            return name, {name}
        if isinstance(result, (tuple, list)) and not _is_empty(result):
            parts = [self._target(each) for each in result]
            inside = "".join(f"{name}, " for name, _ in parts).strip()
            return f"({inside})", set().union(*(written for _, written in parts))
        return "_", set()

    def _code(self, value: Any, read: set[str]) -> str:
        if isinstance(value, (Tensor, Held)):
            name = self.names.get(id(value))
            if name is None:
                raise Unrecordable("a tensor from nowhere")
            read.add(name)
            return name
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple, torch.Size):
            inside = "".join(f"{self._code(each, read)}, " for each in value)
            return f"[{inside}]" if type(value) is list else f"({inside})"
        if isinstance(value, float) and not math.isfinite(value):
            return self._constant(value)
        return repr(value) if type(value) in (int, float, bool, type(None), str) else self._constant(value)

    def _constant(self, value: Any) -> str:
        known = self._of_constants.get(id(value))
        if known is not None:
            return known
        name = self._of_constants[id(value)] = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def names_of(self, results: Sequence[Tensor | None]) -> list[str | None]:
        """The variables of results."""
        names = [None if each is None else self.names.get(id(each), "") for each in results]
        if "" in names:
            raise Unrecordable("a result from nowhere")
        return names

    def program(
        self, lines: slice, inputs: Sequence[str], outputs: Sequence[str | None]
    ) -> Callable[..., Any]:
        """Some of the lines as a function of variables."""
        return compiled(self.lines[lines], inputs, outputs, self.constants)


SEEN = 3
"""Runs of one form after which it is worth to write one down, which takes as long as ten."""
_FORMS = 8
"""Forms that are remembered: batches of many sizes are no use for that."""
MOST_NUMBERS = 2**25
"""Numbers that a run keeps, beyond which asking the rules is nothing beside the work, and a recorder holds too much."""
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}


class Tapes:
    """What was written down, by the form of the inputs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[Any, int] = {}
        self._tapes: dict[Any, Any] = {}
        self.reasons: list[str] = []
        """Why forms were given up."""

    def look_up(self, form: Any) -> tuple[Any, bool]:
        """The tape or None; then whether the run is to be written down."""
        with self._lock:
            tape, seen = self._tapes.get(form), self._seen.get(form, 0)
            if tape is not None or seen < 0:
                return tape, False
            if seen == 0 and len(self._seen) >= _FORMS:
                self._seen.pop(next(iter(self._seen)))
            self._seen[form] = seen + 1
            # Of a run without a way back nothing comes: it is tried more and more seldom.
            times, rest = divmod(seen + 1, SEEN)
            return None, rest == 0 and times & (times - 1) == 0

    def keep(self, form: Any, tape: Any) -> None:
        """From now on."""
        with self._lock:
            if len(self._tapes) >= _FORMS:
                self._tapes.pop(next(iter(self._tapes)))
            self._tapes[form] = tape

    def give_up(self, form: Any, reason: str) -> None:
        """No tape of this form as long as it is remembered."""
        with self._lock:
            self._tapes.pop(form, None)
            self._seen[form] = -1
            self.reasons = [*self.reasons[-_FORMS:], reason]

    def run(
        self, form: Any, given: Sequence[Tensor], function: Callable[[], Sequence[Tensor | None]]
    ) -> Sequence[Tensor | None]:
        """What ``function`` returns, which it makes of the tensors ``given`` alone."""
        tape, is_due = self.look_up(form)
        if tape is not None:
            found: Sequence[Tensor | None] = tape(*given)
            return found
        if not is_due:
            return function()
        recorder = Recorder()
        inputs = [recorder.name(tensor) for tensor in given]
        with recorder:
            results = function()
        try:
            if recorder.failure:
                raise Unrecordable(recorder.failure)
            code = recorder.program(slice(None), inputs, recorder.names_of(results))
            check_same(code(*given), results)
        except Unrecordable as reason:
            self.give_up(form, str(reason))
        else:
            self.keep(form, code)
        return results


def check_same(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    """Unrecordable of results that are not those that were computed."""
    for mine, theirs in zip(found, wanted, strict=True):
        if mine is None or theirs is None:
            same = mine is theirs
        else:
            size = _ROUNDING[theirs.dtype]
            least = size * float(theirs.abs().max()) if theirs.numel() else 0.0
            same = mine.shape == theirs.shape and torch.allclose(mine, theirs, size, least, equal_nan=True)
        if not same:
            raise Unrecordable("run again it gives something else")


def is_plain(z: Tensor) -> bool:
    """Nobody else looks on: no mode of torch, no compiler, no CUDA graph, whose capture allows no look at numbers."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or type(z) is not Tensor:
        return False
    if torch.compiler.is_compiling() or z.dtype not in _ROUNDING:
        return False
    return not (z.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_empty(result: Any) -> bool:
    """Whether there is nothing in a tuple or list."""
    return isinstance(result, (tuple, list)) and all(each is None for each in result)


def _title(function: Any) -> str:
    return getattr(function, "__name__", str(function))

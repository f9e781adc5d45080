"""Sweeps written down: the calls of PyTorch that they made for inputs of one form, as code that makes them again.

What a sweep calls depends on shapes and on what is wanted, and on no number: so for inputs of the same form the rules
need not be asked again. A small network's flow is a few hundred calls, and asking takes as long as they do.

While a :class:`Recorder` is active, every operator of torch that this thread calls, and every kernel of ours that is
called through :func:`kernel`, is noted with its arguments. What cannot be noted (a number looked at, a tensor from
nowhere) leaves a reason in ``failure``; then there is no tape, and nothing else is different.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily

from fastvae._compiling import is_captured, is_compiling, is_watched
from fastvae._extension import raw
from fastvae.locks import Turns
from fastvae.network.straight import CONSTANTS, MISSING, Call, Code, Held, Method, Variable, inputs_of

__all__ = [
    "Held",
    "Recorder",
    "Tapes",
    "Unrecordable",
    "check_same",
    "fixed",
    "form_of",
    "is_plain",
    "kernel",
    "most_numbers",
    "outside",
    "tensors_in",
]

_state = threading.local()


class Unrecordable(Exception):  # noqa: N818
    """Why a run cannot be written down."""


def kernel(function: Callable[..., Any], *args: Any) -> Any:
    """A call of a function of ours as a whole, such as a kernel, which no dispatch mode sees.

    It changes nothing, and says of numbers nothing but tensors.
    """
    recorder: Recorder | None = getattr(_state, "recorder", None)
    if recorder is None:
        return function(*args)
    with _pop_mode_temporarily():
        return recorder.note(function, args)


def fixed(tensor: Tensor) -> None:
    """Say that a tensor from elsewhere is the same in every run."""
    recorder: Recorder | None = getattr(_state, "recorder", None)
    if recorder is not None:
        recorder.name_constant(tensor)


def outside(function: Callable[..., Any], *args: Any) -> Any:
    """A call that is none of the run, but makes what later runs use as well."""
    if getattr(_state, "recorder", None) is None:
        return function(*args)
    with _pop_mode_temporarily():
        return function(*args)


def form_of(values: Sequence[Any]) -> tuple[Any, ...]:
    """All of some values that a sweep may depend on, besides tensors' numbers."""
    found: tuple[Any, ...] = raw.form_of(values)
    return found


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """Those of some values, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


class Recorder(TorchDispatchMode):
    """Notes calls; a tensor is known by the variable that holds it.

    Args:
        with_graphs: whether autograd may build graphs; what it then does is noted with the rest.
    """

    def __init__(self, with_graphs: bool = False) -> None:
        super().__init__()
        self._with_graphs = with_graphs
        self.calls: list[Call] = []
        self.memory: dict[int, int] = {}
        """Of each variable, what its memory is called."""
        self.objects: dict[int, Variable] = {}
        """Variables of objects whose methods are called as kernels: another one each time."""
        self.alive: list[Any] = []
        """All that has a variable, in their order: an id must not be given to another object."""
        self.constants: dict[int, Tensor] = {}
        """Variables that are the same in every run."""
        self._names: dict[int, int] = {}
        self._places: dict[Any, int] = {}
        """By where a tensor lies: autograd hands on other objects for the same numbers."""
        self._memories: dict[int, int] = {}
        self.failure = ""

    def __enter__(self) -> Recorder:
        _state.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _state.recorder = None
        super().__exit__(*error)

    def name(self, value: Any) -> int:
        """The value's variable, from now on another one than before if it had any."""
        number = self._names[id(value)] = len(self.alive)
        self.alive.append(value)
        self.memory[number] = number
        if isinstance(value, Tensor):
            self.memory[number] = self._memories.setdefault(value.untyped_storage()._cdata, number)
            self._places[_place_of(value)] = number
        return number

    def name_inputs(self, values: Sequence[Tensor]) -> list[int]:
        """Their variables; Unrecordable where two are the same, as others may not be."""
        if len({_place_of(value) for value in values}) < len(values):
            raise Unrecordable("an input is given twice")
        return [self.name(value) for value in values]

    def name_constant(self, value: Tensor) -> None:
        """Give a variable to a tensor that is the same in every run, if it has none."""
        if id(value) not in self._names:
            self.constants[self.name(value)] = value

    def name_object(self, value: Any) -> int:
        """The variable of an object whose methods are called."""
        number = self.name(value)
        self.objects[id(value)] = Variable(number)
        return number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See ``TorchDispatchMode``."""
        return self.note(func, args, kwargs or {})

    def note(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Any:
        """Call it, and note the call."""
        kwargs = kwargs or {}
        call: Call | None = None
        if not self.failure:
            try:
                call = self._call(function, args, kwargs)
            except Unrecordable as reason:
                self.failure = f"{_title(function)}: {reason}"
        result = function(*args, **kwargs)
        # What is asked of numbers of Python's alone is the same in every run.
        is_fixed = isinstance(result, CONSTANTS) and not tensors_in([*args, *kwargs.values()])
        if call is not None and not (is_fixed and result is not None):
            try:
                self.calls.append(call._replace(results=tuple(self._taken(result, call.function))))
            except Unrecordable as reason:
                self.failure = f"{_title(function)}: {reason}"
        return result

    def _call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        if not isinstance(function, OpOverload):
            owner = self.objects.get(id(getattr(function, "__self__", None)))
            called = function if owner is None else Method(owner, function.__name__)
            return Call(called, tuple(self._written(each) for each in args), ())
        if function is _LIFT and id(args[0]) not in self._names:
            # Numbers of Python's as a tensor, which whoever has it may write to.
            self.constants[self.name(args[0])] = args[0].clone()
            function = _CLONE
        if torch.Tag.dynamic_output_shape in function.tags and not _is_index_of_places(function, args):
            raise Unrecordable("the shape of its result depends on numbers")
        schema = function._schema.arguments
        given = [*args, *(kwargs.get(each.name, MISSING) for each in schema[len(args) :])]
        changes: set[int] = set()
        for argument, value in zip(schema, given, strict=True):
            if not isinstance(value, (Tensor, list, tuple, *CONSTANTS)) and value is not MISSING:
                raise Unrecordable(f"given a {type(value).__name__}")
            no_graph = self._with_graphs or not torch.is_grad_enabled()
            if not no_graph and any(tensor.requires_grad for tensor in tensors_in([value])):
                raise Unrecordable("its result has a graph")
            if argument.alias_info is not None and argument.alias_info.is_write:
                changes.update(self.memory[self._number(tensor)] for tensor in tensors_in([value]))
        return Call(function, tuple(self._written(each) for each in given), (), frozenset(changes))

    def _number(self, value: Any) -> int:
        number = self._names.get(id(value))
        if number is None and isinstance(value, Tensor):
            number = self._places.get(_place_of(value))
        if number is None:
            raise Unrecordable("a tensor from nowhere")
        return number

    def _written(self, value: Any) -> Any:
        if isinstance(value, (Tensor, Held)):
            return Variable(self._number(value))
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple, torch.Size):
            parts = [self._written(each) for each in value]
            return parts if type(value) is list else tuple(parts)
        return value

    def _taken(self, result: Any, function: Any) -> list[int]:
        """The variables of results."""
        if isinstance(result, Tensor):
            if type(result) not in (Tensor, torch.nn.Parameter):
                raise Unrecordable("its result is of another kind")
            known = self._names.get(id(result))  # what was changed, or handed on
            return [self.name(result) if known is None else known]
        if isinstance(result, Held):
            return [self.name(result)]
        if isinstance(result, (tuple, list)):
            return [number for each in result for number in self._taken(each, function)]
        if isinstance(function, OpOverload) and result is None:
            return [self.name(_Nothing())]
        if result is not None:
            raise Unrecordable("gives no tensor")
        return []

    def numbers_of(self, results: Sequence[Tensor | None]) -> list[int | None]:
        """The variables of results."""
        return [None if each is None else self._number(each) for each in results]

    def code(self, calls: slice, inputs: Sequence[int], outputs: Sequence[int | None], **more: Any) -> Code:
        """Some of the calls as a function of variables; see ``Code``."""
        return Code(self.calls[calls], self.memory, inputs, outputs, constants=self.constants, **more)

    def there_and_back(
        self,
        middle: int,
        inputs: Sequence[int],
        outputs: Sequence[int | None],
        given: Sequence[int],
        found: Sequence[int | None],
    ) -> tuple[Code, Code]:
        """The calls as two functions, of which the second takes what the first one keeps.

        Args:
            middle: how many calls belong to the first one.
            inputs, outputs: variables of the first one.
            given, found: of the second one.
        """
        there, back = slice(0, middle), slice(middle, None)
        taken = inputs_of(self.calls[back], self.memory, found)
        kept = [each for each in taken if each not in {*given, *self.constants}]
        return self.code(there, inputs, outputs, kept=kept), self.code(back, given, found, taken=kept)


def _is_index_of_places(function: Any, args: Sequence[Any]) -> bool:
    """Whether it takes elements by their numbers, and by no mask."""
    masks = (torch.bool, torch.uint8)
    return function is _INDEX and not any(each is not None and each.dtype in masks for each in args[1])


def _place_of(tensor: Tensor) -> Any:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class _Nothing:
    """In place of a tensor that an operator did not give."""


_LIFT, _CLONE = torch.ops.aten.lift_fresh.default, torch.ops.aten.clone.default
_INDEX = torch.ops.aten.index.Tensor
SEEN = 3
"""Runs of one form after which it is worth to write one down, which takes as long as ten."""
_FORMS = 8
"""Forms that are remembered: batches of many sizes are no use for that."""
_MOST_NUMBERS, _MOST_ON_A_GPU, _PART_OF_A_GPU = 2**25, 2**28, 64
_ROUNDING = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float64: 1e-12, torch.complex128: 1e-12}


def most_numbers(device: str) -> int:
    """Numbers that a run keeps on a kind of device, beyond which asking the rules is nothing beside the work.

    A recorder holds all of them.
    """
    return _most_on_a_gpu() if device == "cuda" else _MOST_NUMBERS


@functools.cache
def _most_on_a_gpu() -> int:
    """It is done with them sooner than with being asked; where there is none, its tensors have no numbers."""
    if not torch.cuda.is_available():
        return _MOST_NUMBERS
    return min(_MOST_ON_A_GPU, torch.cuda.get_device_properties().total_memory // _PART_OF_A_GPU)


class Tapes:
    """What was written down, by the form of the inputs."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._seen: dict[Any, int] = {}
        self._tapes: dict[Any, Any] = {}
        self.reasons: list[str] = []
        """Why forms were given up."""

    def look_up(self, form: Any) -> tuple[Any, bool]:
        """The tape or None; then whether the run is to be written down."""
        with self._turns:
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
        with self._turns:
            if len(self._tapes) >= _FORMS:
                self._tapes.pop(next(iter(self._tapes)))
            self._tapes[form] = tape

    def give_up(self, form: Any, reason: str) -> None:
        """No tape of this form as long as it is remembered."""
        with self._turns:
            self._tapes.pop(form, None)
            self._seen[form] = -1
            self.reasons = [*self.reasons[-_FORMS:], reason]

    def run(
        self,
        form: Any,
        given: Sequence[Tensor],
        function: Callable[[], Sequence[Tensor | None]],
        *owner: Any,
    ) -> Sequence[Tensor | None]:
        """What ``function`` returns, which it makes of the tensors ``given`` and of methods of ``owner`` alone.

        Args:
            form: all that it depends on besides numbers; None, or without a hash: it is not written down.
            given: see above.
            function: see above.
            owner: an object, or none.
        """
        try:
            tape, is_due = (None, False) if form is None else self.look_up(form)
        except TypeError:  # something that has no hash
            tape, is_due = None, False
        if tape is not None:
            found: Sequence[Tensor | None] = tape([*owner, *given])[0]
            return found
        if not is_due:
            return function()
        recorder = Recorder()
        inputs = [*map(recorder.name_object, owner), *map(recorder.name, given)]
        with recorder:
            results = function()
        try:
            if recorder.failure:
                raise Unrecordable(recorder.failure)
            code = recorder.code(slice(None), inputs, recorder.numbers_of(results))
            check_same(code([*owner, *given])[0], results)
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
            finite = theirs.detach().abs().nan_to_num(0.0, 0.0, 0.0)
            least = size * float(finite.max()) if theirs.numel() else 0.0
            same = mine.shape == theirs.shape and torch.allclose(mine, theirs, size, least, equal_nan=True)
        if not same:
            raise Unrecordable("run again it gives something else")


def is_plain(z: Tensor) -> bool:
    """Nobody else looks on: no mode of torch, no compiler, no CUDA graph, whose capture allows no look at numbers."""
    if is_compiling() or torch._C._len_torch_dispatch_stack() or is_watched():
        return False
    if type(z) is not Tensor or z.dtype not in _ROUNDING:
        return False
    return not is_captured(z)


def _title(function: Any) -> str:
    return getattr(function, "__name__", str(function))

"""The program of every module that was read, kept as long as nothing that it depends on has changed."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastvae.held import follow
from fastvae.locks import READING
from fastvae.lowering.checks import check_module, check_readable, check_uncoupled, named
from fastvae.lowering.errors import CoupledSamples, ImpossibleLayer, UnsupportedLayer, join
from fastvae.lowering.snapshot import Node, compile_program, visit
from fastvae.lowering.traced import Facts, facts_of
from fastvae.network.coupling import check_apart
from fastvae.network.idle import idle_attributes
from fastvae.network.layers import registrations
from fastvae.network.pristine import Pristine
from fastvae.network.program import Program
from fastvae.network.reading import read_program
from fastvae.network.sweeps import Sweeps
from fastvae.network.verification import MANY, verify_output, verify_program
from fastvae.noise import own_noise
from fastvae.private import origin_of
from fastvae.randomness import global_generators_kept


class ReadNetwork(NamedTuple):
    """A network that sweeps can take, with its current tensors by source (None: a source that is not used)."""

    sweeps: Sweeps
    tensors: list[Tensor | None]


class _Known:
    """A module's program, or why there is none, and the facts that it was read from."""

    def __init__(
        self,
        module: nn.Module,
        z: Tensor,
        condition: Tensor | None,
        of_data: bool,
        before: _Known | None = None,
    ) -> None:
        # As text: a traceback would hold the module, and so keep its entry alive.
        self.failure = self.coupled = ""
        self.sweeps: dict[bool, Sweeps] = {}
        self.largest = sys.maxsize
        """The largest batch for which this is known to hold."""
        self.times = 1
        """How often the module was read one reading after the other, as long as each call of it changes it."""
        check_readable(module)
        pristine = None
        try:
            for path, inner in named(module):
                check_module(path, inner, hooked=True)
            pristine = Pristine(module, z, condition)
            program = read_program(pristine)
            try:
                self.sweeps[False] = _verified(pristine, program, z, condition, of_data)
            except CoupledSamples:
                raise
            except UnsupportedLayer as first:
                if program.is_aligned:
                    raise
                # Its forward may have taken the size of the batch for a constant.
                try:
                    program = read_program(pristine, apart=True)
                    self.sweeps[False] = _verified(pristine, program, z, condition, of_data)
                except CoupledSamples:
                    raise
                except UnsupportedLayer:
                    raise first from None
        except CoupledSamples as error:
            self.coupled = str(error)
        except (UnsupportedLayer, ImpossibleLayer) as error:
            self.failure = str(error)
            if pristine is not None and not of_data:
                try:
                    check_apart(pristine, z, condition)
                except CoupledSamples as coupled:
                    self.coupled = str(coupled)
        wanted = set()
        changing = {} if pristine is None else pristine.changing
        # Whatever they are, autograd does as the module.
        restless = {path: dict.fromkeys(names, False) for path, names in changing.items()}
        if self.sweeps and pristine is not None:
            program = self.sweeps[False].program
            if program.is_aligned:
                self.largest = MANY
            idle = idle_attributes(pristine, program) if changing else {}
            rest = sorted(join(path, name) for path in changing for name in changing[path] - idle[path])
            self.times += 0 if before is None or not rest else before.times
            if self.times > _MOST_TIMES:
                self.sweeps.clear()
                self.failure = f"its forward changes {', '.join(rest)}, and may depend on that"
            else:
                restless = {path: dict.fromkeys(names, True) for path, names in idle.items()}
                wanted = {(program.sources[at - 1].path, program.sources[at - 1].name) for at in program.used}
        root = Node("", module, wanted, restless=restless)
        self.root = root
        self.lines = compile_program(root)
        self.names = [name for node in root.walk() for name in node.tensor_names()]

    def admit(self, module: nn.Module | None, z: Tensor, condition: Tensor | None) -> None:
        """Raise where this does not hold for such codes, or not at all; None is a module that is no more."""
        if len(z) > self.largest:
            if module is None:
                raise UnsupportedLayer(
                    f"the module is no more, and was read for {self.largest} samples at most"
                )
            with READING, own_noise(), global_generators_kept():
                self.compare_larger(module, z, condition)
        if self.coupled:
            raise CoupledSamples(self.coupled)
        if self.failure:
            raise UnsupportedLayer(self.failure)

    def compare_larger(self, module: nn.Module, z: Tensor, condition: Tensor | None) -> None:
        """Of a forward that asked for the batch size as a number, nothing is known beyond what was compared."""
        if len(z) <= self.largest:
            return
        try:
            verify_output(Pristine(module, z, condition), self.sweeps[False], z, condition, batch=len(z))
        except CoupledSamples as error:
            self.coupled = str(error)
        except UnsupportedLayer as error:
            self.failure = str(error)
        self.largest = sys.maxsize if self.coupled or self.failure else len(z)

    def stripped(self) -> Sweeps | None:
        """The sweeps without the sigmoid that the network ends in; None if it does not."""
        if True not in self.sweeps:
            program = self.sweeps[False].program
            last = program.last()
            if last is None or not program.ends_in_sigmoid:
                return None
            self.sweeps[True] = self.sweeps[False].on(program.without(last))
        return self.sweeps[True]

    def tensors(
        self, module: nn.Module, found: Sequence[Tensor], condition: Tensor | None
    ) -> list[Tensor | None]:
        """By source."""
        by_name = dict(zip(self.names, found, strict=True))
        program = self.sweeps[False].program
        used = set(program.used)
        tensors: list[Tensor | None] = []
        for place, source in enumerate(program.sources, 1):
            if place not in used:
                tensors.append(None)
            elif source.is_condition:
                tensors.append(condition)
            elif source.constant is not None:
                tensors.append(source.constant)
            elif source.steps:
                tensors.append(follow(module, source.steps))
            else:
                tensors.append(by_name[join(source.path, source.name)])
        return tensors


def _verified(
    pristine: Pristine, program: Program, z: Tensor, condition: Tensor | None, of_data: bool
) -> Sweeps:
    sweeps = Sweeps(program, z.device.type)
    verify_program(pristine, sweeps, z, condition, of_data=of_data)
    return sweeps


_MOST_TIMES = 4
"""So often a module is read whose calls change what its result may depend on; then it runs through autograd."""

_GONE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""Something is gone, or does not compare with what is remembered: the module changed."""

_known: WeakKeyDictionary[nn.Module, dict[Any, _Known]] = WeakKeyDictionary()
_of_copies: WeakKeyDictionary[nn.Module, dict[Any, _Known]] = WeakKeyDictionary()
"""What was read of a module's private copies, for the next ones: each score works on some of its own."""

_MOST_FORMS = 16
"""Shapes, dtypes and the like of one module's inputs for which readings are kept: each holds code and constants."""


def _remember(
    store: WeakKeyDictionary[nn.Module, dict[Any, _Known]], module: nn.Module, key: Any, known: _Known
) -> None:
    """In place of the one that was read first, where there are many; under the lock."""
    forms = store.setdefault(module, {})
    if key not in forms and len(forms) >= _MOST_FORMS:
        forms.pop(next(iter(forms)))
    forms[key] = known


def read_network(
    module: nn.Module,
    z: Tensor,
    *,
    condition: Tensor | None = None,
    strip_sigmoid: bool = False,
    of_data: bool = False,
) -> ReadNetwork:
    """The sweeps of a module for codes like z, read at the first call and when it has changed.

    With ``of_data`` z are data, and the sweeps are good for one gradient to parameters: see ``verify_program``.

    Raises:
        UnsupportedLayer: the module cannot be read, or what was read is not what it does; ``strip_sigmoid`` and it
            does not end in a sigmoid.
        CoupledSamples: BatchNorm or Dropout in training mode, or a sample's output depends on its batch.
    """
    check_uncoupled(module)
    key = _key_of(z, condition, of_data)
    found = _current(module, key, condition)
    if found is None:
        with READING:
            found = _current(module, key, condition)
            if found is None:
                found = _of_origin(module, key, condition)
            if found is None:
                origin = origin_of(module)
                before = _known.get(module, {}).get(key)
                if before is None and origin is not None:
                    before = _of_copies.get(origin, {}).get(key)
                with own_noise(), global_generators_kept():
                    fresh = _Known(module, z, condition, of_data, before)
                _remember(_known, module, key, fresh)
                if origin is not None:
                    _remember(_of_copies, origin, key, fresh)
                found = fresh, [] if fresh.failure or fresh.coupled else _visited(module, fresh, condition)
    known, tensors = found
    known.admit(module, z, condition)
    sweeps = known.stripped() if strip_sigmoid else known.sweeps[False]
    if sweeps is None:
        raise UnsupportedLayer("the module does not end in a sigmoid")
    return ReadNetwork(sweeps, tensors)


class Reading(NamedTuple):
    """What a compiler may bake in of a network.

    constants: the network, whose tensors are there where they are constants.
    names, places: of the others in the module, and by source.
    of_condition: the place of the condition, which may not be used.
    facts: of the module.
    check: raises UnsupportedLayer or CoupledSamples for codes, and their condition, of which it does not hold.
    """

    constants: ReadNetwork
    names: tuple[str, ...]
    places: tuple[int, ...]
    of_condition: int | None
    facts: tuple[Facts, ...]
    check: Callable[[Tensor, Tensor | None], None]


def reading_of(
    module: nn.Module, z: Tensor, *, condition: Tensor | None = None, strip_sigmoid: bool = False
) -> tuple[ReadNetwork, Reading]:
    """:func:`read_network` for who compiles it.

    Raises:
        UnsupportedLayer: also where it reads tensors that have no name in the module.
        CoupledSamples: see :func:`read_network`.
    """
    network = read_network(module, z, condition=condition, strip_sigmoid=strip_sigmoid)
    known, program = _known[module][_key_of(z, condition)], network.sweeps.program
    named, of_condition = {}, None
    for place in program.used:
        source = program.sources[place - 1]
        if source.steps:
            raise UnsupportedLayer("a tensor of it is registered nowhere")
        if source.is_condition:
            of_condition = place - 1
        elif source.constant is None:
            named[place - 1] = join(source.path, source.name)
    held = weakref.ref(module)

    def check(codes: Tensor, beside: Tensor | None) -> None:
        if len(codes) > known.largest:
            known.admit(held(), codes, beside)

    given = {*named, of_condition}
    constants = [None if at in given else t for at, t in enumerate(network.tensors)]
    return network, Reading(
        network._replace(tensors=constants),
        tuple(named.values()),
        tuple(named),
        of_condition,
        tuple(facts_of(known.root, module, ())),
        check,
    )


def _key_of(z: Tensor, condition: Tensor | None, of_data: bool = False) -> Any:
    """What a reading depends on besides the module."""
    given = (z,) if condition is None else (z, condition)
    forms = tuple((tensor.dtype, tensor.device, tuple(tensor.shape[1:])) for tensor in given)
    return forms, torch.get_default_dtype(), registrations(), of_data


def _of_origin(
    module: nn.Module, key: Any, condition: Tensor | None
) -> tuple[_Known, list[Tensor | None]] | None:
    """For a private copy what is known of the module that it is a copy of, or of another copy, if that holds for it."""
    origin = origin_of(module)
    if origin is None:
        return None
    for store in (_known, _of_copies):
        known = store.get(origin, {}).get(key)
        if known is not None:
            _remember(_known, module, key, known)
            found = _current(module, key, condition)
            if found is not None:
                return found
    return None


def verify_network(module: nn.Module, z: Tensor, condition: Tensor | None = None) -> None:
    """Compare what was read of a module with the module as it is now; what differs is dropped and read again later.

    Raises:
        UnsupportedLayer: they differ, or the module cannot be read.
        CoupledSamples: BatchNorm or Dropout in training mode.
    """
    with torch.inference_mode(False):
        network = read_network(module, z, condition=condition)
        try:
            with own_noise(), global_generators_kept():
                verify_program(Pristine(module, z, condition), network.sweeps, z, condition)
        except UnsupportedLayer:
            _known.pop(module, None)
            raise


_seen_apart: WeakKeyDictionary[nn.Module, dict[Any, tuple[list[Any], str]]] = WeakKeyDictionary()
"""Of modules that were not read, as long as they are the same: why their samples are coupled, or nothing."""


def check_samples_apart(module: nn.Module, z: Tensor, condition: Tensor | None = None) -> None:
    """Raise CoupledSamples where :func:`read_network` would, for who runs the module itself; it is not read."""
    check_uncoupled(module)
    key = _key_of(z, condition)
    known = _current(module, key, condition)
    if known is not None:
        coupled = known[0].coupled
    else:
        with READING:
            coupled = _coupling_seen(module, key, z, condition)
    if coupled:
        raise CoupledSamples(coupled)


def _coupling_seen(module: nn.Module, key: Any, z: Tensor, condition: Tensor | None) -> str:
    for each in (module, origin_of(module)):
        lines, coupled = _seen_apart.get(each, {}).get(key, ([], "")) if each is not None else ([], "")
        with contextlib.suppress(*_GONE):
            if lines and visit(module, lines) is not None:
                return coupled
    changing: Mapping[str, frozenset[str]] = {}
    coupled, differs = "", False
    try:
        check_readable(module)
    except UnsupportedLayer:
        return ""
    # Nothing can be said of what is not to be copied.
    with contextlib.suppress(UnsupportedLayer, ImpossibleLayer, TypeError), torch.inference_mode(False):
        for path, inner in named(module):
            check_module(path, inner, hooked=True)
        with own_noise(), global_generators_kept():
            pristine = Pristine(module, z, condition)
            changing = pristine.changing
            try:
                differs = check_apart(pristine, z, condition)
            except CoupledSamples as error:
                coupled = str(error)
        if differs:
            # By their number, which counts, or by a branch, at which it is not read.
            try:
                read_network(module, z, condition=condition)
            except CoupledSamples as error:
                coupled = str(error)
    restless = {path: dict.fromkeys(names, False) for path, names in changing.items()}
    found = compile_program(Node("", module, set(), restless=restless)), coupled
    for each in (module, origin_of(module)):
        if each is not None:
            forms = _seen_apart.setdefault(each, {})
            if len(forms) >= _MOST_FORMS:
                forms.clear()
            forms[key] = found
    return coupled


def _visited(module: nn.Module, known: _Known, condition: Tensor | None) -> list[Tensor | None]:
    changes = f"the {type(module).__name__} changes when it is read"
    try:
        collected = visit(module, known.lines)
        if collected is not None:
            return known.tensors(module, collected.found, condition)
    except _GONE as error:
        raise UnsupportedLayer(changes) from error
    raise UnsupportedLayer(changes)


def _current(
    module: nn.Module, key: Any, condition: Tensor | None
) -> tuple[_Known, list[Tensor | None]] | None:
    """What is remembered of a module, if it has not changed since, and its tensors."""
    known = _known.get(module, {}).get(key)
    if known is None:
        return None
    try:
        collected = visit(module, known.lines)
        if collected is None:
            return None
        return known, [] if known.failure or known.coupled else known.tensors(
            module, collected.found, condition
        )
    except _GONE:
        return None

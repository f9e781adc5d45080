"""What the reading of a module depended on, and the cheap check that it still holds.

A node remembers the type of one module, its forward, training flag, hooks, attributes (numbers, strings and
containers of those as they are, what else ``fastvae.held`` knows by its key, anything else by identity), the names
of its parameters and children, and what its functions read in closures and globals. One walk compares all that and
picks up the current tensors. Children are compared by what they are and not by identity, so that the cache holds no
module alive; tensors are never cached.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae.held import INTERNAL, Held, UnknownValue

from .checks import HOOKS
from .errors import join
from .hooked import computed_weights

# What recurrent layers keep of their parameters once more.
_DERIVED = frozenset({"_flat_weights", "_flat_weight_refs"})
# By exact type: a NumPy scalar that is not a number would not equal its own copy.
_SCALARS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})


class Node:
    """The snapshot of one module.

    ``take_*`` name the tensors that the spec reads, in the order of their indices. ``evaluated`` names
    parametrisations whose result the spec reads: they hand their gradient on by themselves, so their inside
    does not matter. The others may hide unused parameters. ``restless`` names attributes, by path, of which
    no more than the kind is compared, where that is True, or nothing.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        wanted: set[tuple[str, str]],
        evaluated: tuple[str, ...] = (),
        facts: Held | None = None,
        restless: Mapping[str, Mapping[str, bool]] = MappingProxyType({}),
    ) -> None:
        facts = Held(module) if facts is None else facts
        state = vars(module)
        self.path = path
        self.type = type(module)
        self.forward = getattr(self.type, "forward", None)
        optimized = self.type.__name__ == "OptimizedModule"
        computed = computed_weights(module)
        ignored = INTERNAL | _DERIVED if isinstance(module, nn.RNNBase) else INTERNAL
        unsettled = restless.get(path, {})
        ignored = ignored | unsettled.keys()
        self.kinds = tuple((key, _kind_of(state[key])) for key, of_kind in unsettled.items() if of_kind)
        own = [] if optimized else [key for key in state if key not in ignored and key not in computed]
        plain = {key: copy.deepcopy(state[key]) for key in own if is_plain(state[key])}
        self.plain = tuple(plain.items())
        self.size = 0 if optimized else len(state)
        self.read: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(*HOOKS, *plain)
        # A module with hooks matches nothing: it is refused, and looked at again every time. But for those that compute
        # its weights: it matches as long as it has the same.
        hooks = (dict(state[key]) if computed or not state[key] else None for key in HOOKS)
        self.values = (*hooks, *plain.values())
        held = {key: state[key] for key in own if key not in plain}
        keys = {name: _key(facts, value) for name, value in held.items()}
        self.held = tuple((name, key) for name, key in keys.items() if key is not None)
        self.around = () if optimized or AROUND in unsettled else facts.around(module)
        self.opaque = tuple((name, _reference(held[name])) for name, key in keys.items() if key is None)
        self.configs = tuple((name, fields) for name, _ in self.opaque if (fields := _config(held[name])))

        parameters, buffers = module._parameters, module._buffers
        names = {name for at, name in wanted if at == path}
        takes = sorted(names, key=[*parameters, *buffers, *sorted(names)].index)
        direct = [name for name in takes if not hasattr(self.type, name)]
        self.count = len(parameters)
        self.take_parameters = tuple(name for name in direct if name in parameters)
        self.take_buffers = tuple(name for name in direct if name in buffers)
        stored = {*self.take_parameters, *self.take_buffers}
        self.take_computed = tuple(name for name in takes if name not in stored)
        self.absent = tuple(name for name, tensor in parameters.items() if tensor is None)
        self.unread = tuple(name for name in parameters if name not in self.take_parameters + self.absent)

        self.names = tuple(module._modules)
        self.empty = tuple(name for name, child in module._modules.items() if child is None)
        inside = self.take_computed if "parametrizations" in self.names else ()
        self.children = {
            name: Node(
                join(path, name), child, wanted, inside if name == "parametrizations" else (), facts, restless
            )
            for name, child in module._modules.items()
            if child is not None and name not in evaluated
        }
        self.buffers = _present(buffers)
        seldom = (
            buffers,
            self.take_buffers,
            self.take_computed,
            self.absent,
            self.unread,
            self.empty,
            self.opaque,
            self.held,
            self.around,
            self.kinds,
        )
        self.rare = any(seldom)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def tensor_names(self) -> list[str]:
        """Paths of this module's tensors in the order in which :func:`visit` collects them."""
        takes = (*self.take_parameters, *self.take_buffers, *self.take_computed)
        return [join(self.path, name) for name in takes]


def _present(tensors: dict[str, Tensor | None]) -> tuple[str, ...]:
    return tuple(name for name, tensor in tensors.items() if tensor is not None)


def is_plain(value: object, depth: int = 4) -> bool:
    """Whether it is a number, a text or a container of those."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return depth > 0 and all(is_plain(entry, depth - 1) for entry in value)
    if isinstance(value, dict):
        return depth > 0 and all(is_plain(entry, depth - 1) for pair in value.items() for entry in pair)
    return type(value) in _SCALARS


def _key(facts: Held, value: Any) -> Any:
    try:
        return facts.key(value)
    except UnknownValue:
        return None


def _reference(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _config(value: Any) -> dict[str, Any]:
    """The plain fields of a configuration object (a dataclass, a Namespace) that a module holds."""
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value) or not hasattr(value, "__dict__"):
        return {}
    return {key: copy.deepcopy(entry) for key, entry in vars(value).items() if is_plain(entry)}


AROUND = "(around)"
"""In place of an attribute: what a forward reads in closures and globals."""


def attributes_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """What a module and those in it hold, by path and name, for :func:`changed_between`."""
    facts, found = Held(module), {}
    for path, inner in module.named_modules(remove_duplicate=False):
        ignored = INTERNAL | _DERIVED if isinstance(inner, nn.RNNBase) else INTERNAL
        found[path] = {
            key: _state_of(facts, value) for key, value in vars(inner).items() if key not in ignored
        }
        found[path][AROUND] = facts.around(inner), None
    return found


def _state_of(facts: Held, value: Any) -> Any:
    if is_plain(value):
        return copy.deepcopy(value), None
    key = _key(facts, value)
    return key, value if key is None or isinstance(value, Tensor) else None


def changed_between(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> dict[str, frozenset[str]]:
    """The attributes, by path, that are others, are new or are gone."""

    changed = {}
    for path, state in after.items():
        old = before.get(path, {})
        changed[path] = frozenset(
            key
            for key in {**old, **state}
            if key not in old
            or key not in state
            or old[key][0] != state[key][0]
            or old[key][1] is not state[key][1]
        )
    return {path: names for path, names in changed.items() if names}


def _kind_of(value: Any) -> Any:
    """Its type, and for a dictionary what its keys are and their values' types."""
    if isinstance(value, dict):
        return type(value), {key: type(entry) for key, entry in value.items()}
    return type(value)


class Collected(NamedTuple):
    """What one walk picks up.

    found: the spec's tensors, None where a property is still to be evaluated.
    computed: those properties, as position in ``found``, module and name.
    unread: trainable parameters that the spec does not read, with their paths.
    """

    found: list[Any]
    computed: list[tuple[int, nn.Module, str]]
    unread: list[tuple[str, Tensor]]


# Of a node: its parent's place in the program and its name there, then what is compared, then the parameters
# that are picked up, then the node itself where more is to be done. Tuples in one flat loop, because this
# runs at every training step.
_Line = tuple[
    int, str, type[nn.Module], Any, int, Callable[..., Any], Any, tuple[str, ...], int, tuple[str, ...], Any
]


def compile_program(root: Node) -> list[_Line]:
    """The nodes as the lines that :func:`visit` goes through."""
    lines: list[_Line] = []

    def add(node: Node, parent: int, name: str) -> None:
        at = len(lines)
        facts = (node.type, node.forward, node.size, node.read, node.values, node.names, node.count)
        lines.append((parent, name, *facts, node.take_parameters, node if node.rare else None))
        for key, child in node.children.items():
            add(child, at + 1, key)

    add(root, 0, "")
    return lines


def visit(module: nn.Module, program: list[_Line]) -> Collected | None:
    """Collect the tensors of a module whose structure is still the program's; None as soon as it is not."""
    collected = Collected([], [], [])
    found, facts = collected.found, Held(module)
    # Entry 0 holds the root; the children of line i are in entry i + 1.
    tables: list[dict[str, Any]] = [{"": module}]
    for parent, key, kind, forward, size, pick, values, names, count, takes, rare in program:
        inner: Any = tables[parent][key]
        if type(inner) is not kind or kind.forward is not forward:
            return None
        state = inner.__dict__
        if pick(state) != values or (len(state) != size and size):
            return None
        parameters, modules = state["_parameters"], state["_modules"]
        if len(parameters) != count or (tuple(modules) if modules else ()) != names:
            return None
        tables.append(modules)
        for name in takes:
            tensor = parameters[name]
            if tensor is None:
                return None
            found.append(tensor)
        if rare is not None and not _visit_rare(inner, rare, collected, facts):
            return None
    return collected


def _visit_rare(module: nn.Module, node: Node, collected: Collected, facts: Held) -> bool:
    state, parameters, buffers = vars(module), module._parameters, module._buffers
    if _present(buffers) != node.buffers:
        return False
    for name in node.take_buffers:
        collected.found.append(buffers[name])
    for name in node.take_computed:
        collected.computed.append((len(collected.found), module, name))
        collected.found.append(None)
    for name in node.unread:
        tensor = parameters[name]
        if tensor is None:
            return False
        if tensor.requires_grad:
            collected.unread.append((join(node.path, name), tensor))
    return (
        all(_kind_of(state[name]) == kind for name, kind in node.kinds)
        and all(parameters[name] is None for name in node.absent)
        and all(module._modules[name] is None for name in node.empty)
        # An object that is no more is not the None in its place.
        and all(state[key] is not None and state[key] is reference() for key, reference in node.opaque)
        and all(fields.items() <= vars(state[key]).items() for key, fields in node.configs)
        and all(_key(facts, state[name]) == key for name, key in node.held)
        and (not node.around or facts.around(module) == node.around)
    )

"""``lower`` under Dynamo: the structure as a constant, its facts as guards, the tensors as inputs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_global_hooks
from .errors import CoupledSamples, ImpossibleLayer, UnsupportedLayer
from .snapshot import Node, is_plain
from .structure import FLAT, Form, current, verify

_Path = tuple[str, ...]
_FAILURES = {error.__name__: error for error in (CoupledSamples, ImpossibleLayer, UnsupportedLayer)}
Fact = tuple[tuple[Any, ...], bool, Any]
Facts = tuple[_Path, tuple[str, ...], tuple[Fact, ...], tuple[tuple[str, bool], ...]]


class _Constant(NamedTuple):
    """What a trace bakes in about a module. Of plain values: Dynamo keeps them as constants.

    failure: the name of the error that lowering raises, with its text in ``spec``; empty where it does not.
    spec, stripped, names: of the structure; names of tensors that are two on top of each other come last.
    stacked: places of those two.
    facts: of its modules.
    """

    failure: str
    spec: str
    stripped: str | None = None
    names: tuple[str, ...] = ()
    stacked: tuple[tuple[int, int], ...] = ()
    facts: tuple[Facts, ...] = ()


def _leaves(keys: tuple[Any, ...], value: Any) -> Iterator[Fact]:
    """Of a plain attribute, the keys that lead to a number or text and that, or to a container and its length."""
    if isinstance(value, (list, tuple, dict)):
        yield keys, True, len(value)
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in pairs:
            yield from _leaves((*keys, key), entry)
    else:
        yield keys, False, value


def facts_of_attributes(value: object) -> tuple[Fact, ...] | None:
    """What there is to be guarded of an object that is no module; None where it holds more than numbers and text."""
    if not all(map(is_plain, vars(value).values())):
        return None
    return tuple(fact for name, entry in vars(value).items() for fact in _leaves((name,), entry))


def facts_of(node: Node, module: nn.Module, path: _Path) -> list[Facts]:
    """Of each module its path, children's names, plain attributes, and unread parameters' requires_grad."""
    frozen = tuple((name, module.get_parameter(name).requires_grad) for name in node.unread)
    plain = tuple(fact for name, value in node.plain for fact in _leaves((name,), value))
    found = [] if "_orig_mod" in node.names else [(path, node.names, plain, frozen)]
    for name, child in node.children.items():
        found += facts_of(child, module.get_submodule(name), (*path, name))
    return found


def _constant(
    address: int, shape: tuple[int, ...] | None, two_heads: bool, without_effects: bool
) -> _Constant:
    """What a trace may bake in about the module with this ``id``, lowered in a form, as plain values."""
    # Of a module itself Dynamo makes an argument only from torch 2.13 on.
    module = ctypes.cast(address, ctypes.py_object).value
    try:
        check_global_hooks()
        known, collected = current(module, Form(shape, two_heads, without_effects))
        verify(known, collected)
    except (UnsupportedLayer, ImpossibleLayer) as failure:
        return _Constant(type(failure).__name__, str(failure))
    facts = tuple(facts_of(known.root, module, ()))
    return _Constant("", known.spec, known.stripped, known.names, tuple(known.stacked), facts)


# What torch.compiler.assume_constant_result sets; calling it would import all of Dynamo with this package.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refusal_traced(module: nn.Module) -> str:
    """Why a module that a trace meets is not lowered; empty where it is. CoupledSamples is raised."""
    found = _constant(id(module), *FLAT)
    if found.failure == "CoupledSamples":
        raise CoupledSamples(found.spec)
    return found.spec if found.failure else ""


def _descend(module: Any, path: _Path) -> Any:
    for name in path:
        # Dynamo itself looks through a compiled child.
        if name != "_orig_mod":
            module = getattr(module, name)
    return module


def holds(module: object, fact: Fact) -> Any:
    """Whether a fact of a module, or of another object, is one still."""
    keys, is_length, wanted = fact
    value = getattr(module, keys[0])
    for key in keys[1:]:
        value = value[key]
    return (len(value) if is_length else value) == wanted


def hold_traced(module: nn.Module, facts: tuple[Facts, ...]) -> None:
    """Compare each fact, which makes Dynamo guard it and trace a changed module again."""
    for path, children, plain, frozen in facts:
        inner = _descend(module, path)
        # Of != between tuples Dynamo makes an error before torch 2.13.
        same = tuple(inner._modules) == children
        for fact in plain:
            same = same and holds(inner, fact)
        for name, trainable in frozen:
            same = same and getattr(inner, name).requires_grad == trainable
        if not same:
            raise UnsupportedLayer("lower: the module changed while it was traced")


def tensors_traced(module: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    """The tensors with these names, as inputs of what is traced."""
    tensors = []
    for name in names:
        *owner, attribute = name.split(".")
        tensors.append(getattr(_descend(module, tuple(owner)), attribute))
    return tensors


def lower_traced(
    module: nn.Module, strip_sigmoid: bool, form: Form
) -> tuple[str, list[Tensor], tuple[str, ...]]:
    """Spec, tensors and names."""
    known = _constant(id(module), *form)
    if known.failure:
        raise _FAILURES[known.failure](known.spec)
    hold_traced(module, known.facts)
    spec = known.spec
    if strip_sigmoid:
        if known.stripped is None:
            raise ValueError("lower: strip_sigmoid=True expects a module that ends in a sigmoid")
        spec = known.stripped
    tensors = tensors_traced(module, known.names[: len(known.names) - len(known.stacked)])
    whole = [torch.cat([tensors[a], tensors[b]]) for a, b in known.stacked]
    for a, b in known.stacked:
        tensors[a], tensors[b] = tensors[a].new_empty(0), tensors[b].new_empty(0)
    return spec, [*tensors, *whole], known.names

"""``lower`` under Dynamo: the structure as a constant, its facts as guards, the tensors as inputs."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor, nn

from .checks import check_global_hooks
from .errors import CoupledSamples, ImpossibleLayer, UnsupportedLayer
from .snapshot import Node
from .structure import current, verify

_Path = tuple[str, ...]
_FAILURES = {error.__name__: error for error in (CoupledSamples, ImpossibleLayer, UnsupportedLayer)}
_Facts = tuple[_Path, tuple[str, ...], tuple[tuple[str, Any], ...], tuple[tuple[str, bool], ...]]


def _facts(node: Node, module: nn.Module, path: _Path) -> list[_Facts]:
    """Of each module its path, children's names, plain attributes, and unread parameters' requires_grad."""
    frozen = tuple((name, module.get_parameter(name).requires_grad) for name in node.unread)
    found = [] if "_orig_mod" in node.names else [(path, node.names, node.plain, frozen)]
    for name, child in node.children.items():
        found += _facts(child, module.get_submodule(name), (*path, name))
    return found


def _constant(address: int) -> tuple[str, str, str | None, tuple[str, ...], tuple[_Facts, ...]]:
    """What a trace may bake in about the module with this ``id``, as plain values, which Dynamo keeps as constants."""
    # Of a module itself Dynamo makes an argument only from torch 2.13 on.
    module = ctypes.cast(address, ctypes.py_object).value
    try:
        check_global_hooks()
        known, collected = current(module)
        verify(known, collected)
    except (UnsupportedLayer, ImpossibleLayer) as failure:
        return type(failure).__name__, str(failure), None, (), ()
    return "", known.spec, known.stripped, known.names, tuple(_facts(known.root, module, ()))


# What torch.compiler.assume_constant_result sets; calling it would import all of Dynamo with this package.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refusal_traced(module: nn.Module) -> str:
    """Why a module that a trace meets is not lowered; empty where it is. CoupledSamples is raised."""
    failure, reason, *_ = _constant(id(module))
    if failure == "CoupledSamples":
        raise CoupledSamples(reason)
    return reason if failure else ""


def _descend(module: Any, path: _Path) -> Any:
    for name in path:
        # Dynamo itself looks through a compiled child.
        if name != "_orig_mod":
            module = getattr(module, name)
    return module


def lower_traced(module: nn.Module, strip_sigmoid: bool) -> tuple[str, list[Tensor], tuple[str, ...]]:
    """Spec, tensors and names; comparing each fact makes Dynamo guard it and trace a changed module again."""
    failure, spec, stripped, names, facts = _constant(id(module))
    if failure:
        raise _FAILURES[failure](spec)
    for path, children, plain, frozen in facts:
        inner = _descend(module, path)
        # Of != between tuples Dynamo makes an error before torch 2.13.
        same = tuple(inner._modules) == children
        for name, value in plain:
            same = same and getattr(inner, name) == value
        for name, trainable in frozen:
            same = same and getattr(inner, name).requires_grad == trainable
        if not same:
            raise UnsupportedLayer("lower: the module changed while it was traced")
    if strip_sigmoid:
        if stripped is None:
            raise ValueError("lower: strip_sigmoid=True expects a module that ends in a sigmoid")
        spec = stripped
    tensors = []
    for name in names:
        *owner, attribute = name.split(".")
        tensors.append(getattr(_descend(module, tuple(owner)), attribute))
    return spec, tensors, names

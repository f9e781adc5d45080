"""Tracing a custom forward with torch.fx, without a trace left in the module."""

from __future__ import annotations

import contextlib
import copy
import inspect
import linecache
import operator
import os
import re
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Tracer

from fastvae.held import INTERNAL
from fastvae.locks import READING

from .errors import NotADecoder, UnsupportedLayer, join
from .reading import Reading, stock_base

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_NOT_THE_USERS = (
    os.path.dirname(torch.__file__) + os.sep,
    *(_PACKAGE + name for name in ("_", "decoding.py", "lowering" + os.sep, "network" + os.sep)),
)


def _quote(file: str, number: int) -> str:
    """A line of source, for messages."""
    text = linecache.getline(file, number).strip()
    return f"{os.path.basename(file)}, line {number}" + (f": {text}" if text else "")


def _line_that_runs() -> tuple[str, int] | None:
    """The innermost line that is neither torch's nor this package's."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def line_of(node: Node) -> str:
    """The line of the forward that made a node; empty if not known."""
    where = node.meta.get("fastvae_line")
    return _quote(*where) if where else ""


def line_that_raised(error: BaseException) -> str:
    """The innermost line that is neither torch's nor this package's; empty if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    return _innermost((frame.filename, frame.lineno or 0) for frame in frames)


def line_in(stack: str | None) -> str:
    """The same of a stack as torch.export notes it."""
    return _innermost((file, int(number)) for file, number in _FRAME.findall(stack or ""))


_FRAME = re.compile(r'^\s*File "(.+)", line (\d+), in ', re.MULTILINE)


def _innermost(frames: Iterable[tuple[str, int]]) -> str:
    lines = [frame for frame in frames if not frame[0].startswith(_NOT_THE_USERS)]
    return _quote(*lines[-1]) if lines else ""


def in_line(text: str, line: str) -> str:
    """A text with the line that it is about, if that is known."""
    return f"{text} ({line})" if line else text


class _Leaves(Tracer):
    """Keeps stock modules whole, subclasses that do not change their forward included.

    torch.fx patches ``nn.Module`` itself for as long as it traces; what other threads run meanwhile, they run as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return stock_base(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        node.meta["fastvae_line"] = _line_that_runs()
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        inner = m._modules.get("_orig_mod") if type(m).__name__ == "OptimizedModule" else None
        return super().call_module(m, forward, args, kwargs) if inner is None else inner(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


_GONE = object()


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Put back what a traced forward assigns to the module, or leaves in its lists, which would be a proxy.

    What that was, as paths of modules and names, is in the list afterwards.
    """
    assigned: list[tuple[str, str]] = []
    stores = [
        (path, store) for path, inner in module.named_modules() for store in (vars(inner), inner._buffers)
    ]
    before = [(path, store, dict(store)) for path, store in stores]
    kept = [
        ((path, name), container, copy.copy(container))
        for path, store in stores
        for name, value in store.items()
        if name not in INTERNAL
        for container in _containers(value)
    ]
    try:
        yield assigned
    finally:
        for path, store, old in before:
            changed = [key for key in {**old, **store} if store.get(key, _GONE) is not old.get(key, _GONE)]
            if changed:
                # torch.fx keeps constants that it meets under these names.
                assigned += [(path, key) for key in changed if not key.startswith("_tensor_constant")]
                store.clear()
                store.update(old)
        for place, container, content in kept:
            if not _is_same(container, content):
                assigned.append(place)
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _containers(value: Any, depth: int = 4) -> Iterator[Any]:
    """Lists, dictionaries and sets that a value is, or is made of."""
    if depth and isinstance(value, (list, tuple, dict, set, deque)):
        if not isinstance(value, tuple):
            yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _containers(entry, depth - 1)


def _is_same(container: Any, content: Any) -> bool:
    """Whether two hold the very same objects, in order."""
    if isinstance(container, set):
        return set(map(id, container)) == set(map(id, content))
    if isinstance(container, dict):
        container, content = ([*each, *each.values()] for each in (container, content))
    return len(container) == len(content) and all(map(operator.is_, container, content))


def trace(reading: Reading, module: nn.Module) -> Graph:
    """The graph of a custom forward, later arguments at their defaults, if it traces without effects."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in plain[1:] if p.default is p.empty]
    if required:
        # Inside another module, that one may hand it the rest.
        error = NotADecoder if reading.path == "" else UnsupportedLayer
        raise reading.refuse(f"its forward needs {', '.join(required)} beside the first argument", error)
    try:
        with READING, _unchanged(module) as assigned:
            graph = _Leaves().trace(module, {p.name: p.default for p in plain[1:]} or None)
    except Exception as error:
        text = str(error).strip().splitlines()
        reading.at(reading.path, reading.kind, line_that_raised(error))
        raise reading.refuse(
            "torch.fx cannot trace its forward, which does more than call layers: "
            f"{type(error).__name__}: {text[0] if text else ''}"
        ) from error
    if assigned:
        reading.assigned += [(join(reading.path, path), name) for path, name in assigned]
        names = ", ".join(dict.fromkeys(name for _, name in assigned))
        raise reading.refuse(f"its forward assigns attributes ({names}); keep them out of forward")
    return graph

"""Tracing a custom forward with torch.fx, without a trace left in the module."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import Graph, Tracer

from .reading import Reading, stock_base


class _Leaves(Tracer):
    """Keeps stock modules whole, subclasses that do not change their forward included.

    torch.fx patches ``nn.Module`` itself for as long as it traces; what other threads run meanwhile, they run as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return stock_base(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        inner = m._modules.get("_orig_mod") if type(m).__name__ == "OptimizedModule" else None
        return super().call_module(m, forward, args, kwargs) if inner is None else inner(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


# Tracing patches torch.nn.Module for the time it runs.
_lock = threading.RLock()
_GONE = object()


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[list[str]]:
    """Put back what a traced forward assigns to the module, which would be a proxy, and say what it was."""
    assigned: list[str] = []
    stores = [store for inner in module.modules() for store in (vars(inner), inner._buffers)]
    before = [dict(store) for store in stores]
    try:
        yield assigned
    finally:
        for store, old in zip(stores, before, strict=True):
            changed = [key for key in {**old, **store} if store.get(key, _GONE) is not old.get(key, _GONE)]
            if changed:
                # torch.fx keeps constants that it meets under these names.
                assigned += [key for key in changed if not key.startswith("_tensor_constant")]
                store.clear()
                store.update(old)


def trace(reading: Reading, module: nn.Module) -> Graph:
    """The graph of a custom forward, later arguments at their defaults, if it traces without effects."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in plain[1:] if p.default is p.empty]
    if required:
        raise reading.refuse(f"its forward needs {', '.join(required)} beside the first argument")
    try:
        with _lock, _unchanged(module) as assigned:
            graph = _Leaves().trace(module, {p.name: p.default for p in plain[1:]} or None)
    except Exception as error:
        text = str(error).strip().splitlines()
        raise reading.refuse(
            "torch.fx cannot trace its forward, which does more than call layers: "
            f"{type(error).__name__}: {text[0] if text else ''}"
        ) from error
    if assigned:
        raise reading.refuse(
            f"its forward assigns attributes ({', '.join(assigned)}); keep them out of forward"
        )
    return graph

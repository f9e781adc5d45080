"""Work counted and not timed: calls of ATen operators and their products, autograd nodes and the bytes they hold."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_UNKNOWN = (
    "linear",
    "matmul",
    "mv",
    "addmv",
    "dot",
    "vdot",
    "conv",
    "mkldnn",
    "thnn",
    "slow_conv",
    "scaled_dot",
)
_SUMMED = (aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_)


def products_of(func: Any, args: tuple[Any, ...], y: Any) -> dict[str, int]:
    """FLOPs of an ATen call by the kind of product: "weights" where a matrix is shared by rows, or "values"."""
    operator = func.overloadpacket
    if operator in (aten.bmm, aten.baddbmm, aten.baddbmm_):
        a, b = args[:2] if operator is aten.bmm else args[1:3]
        return {"values": 2 * a.numel() * b.shape[-1]}
    if operator is aten.mm or operator in _SUMMED:
        a, b = args[:2] if operator is aten.mm else args[1:3]
        return {"weights": 2 * a.numel() * b.shape[-1]}
    if operator is aten.convolution:
        x, weight, is_transposed = args[0], args[1], args[6]
        return {"weights": 2 * (x if is_transposed else y).numel() * weight[0].numel()}
    if operator is aten.convolution_backward:
        dy, x, weight, is_transposed, mask = *args[:3], args[7], args[10]
        # As many for the input as for the weight; the bias is a sum.
        return {"weights": 2 * (x if is_transposed else dy).numel() * weight[0].numel() * sum(mask[:2])}
    assert not operator.__name__.lstrip("_").startswith(_UNKNOWN), f"{func} has no formula"
    return {}


class Work(TorchDispatchMode):
    """Counts what is called inside, in this package's C++ operators too.

    Attributes:
        calls: of ATen operators.
        products: how many of those are products.
        flops: theirs, by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.products, self.flops = 0, 0, Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "fastvae":
            # The operator's kernel, so that what it calls comes by here.
            with self:
                return func.redispatch(_CPU, *args, **(kwargs or {}))
        y = func(*args, **(kwargs or {}))
        found = products_of(func, args, y)
        self.calls += 1
        self.products += bool(found)
        self.flops.update(found)
        return y

    @property
    def total(self) -> int:
        """FLOPs of all products."""
        return sum(self.flops.values())


def made_nodes(run: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, and how many autograd nodes it made in this thread, those that are gone again too."""
    before = _sequence_number()
    result = run()
    return result, _sequence_number() - before - 1


def _sequence_number() -> int:
    node = torch.zeros((), requires_grad=True).neg().grad_fn
    assert node is not None
    return node._sequence_nr()


def names_of_nodes(results: Iterable[Tensor]) -> set[str]:
    """Of the graph behind some results, but for the leaves."""
    waiting: list[Any] = [result.grad_fn for result in results]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {node.name() for node in seen} - {"torch::autograd::AccumulateGrad"}


class _Saved:
    """A tensor for as long as a graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def saved_tensors() -> Iterator[WeakSet[_Saved]]:
    """What graphs made inside save for their backward pass, those of them that are still there."""
    found: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        found.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield found


def held_bytes(saved: Iterable[_Saved], results: Iterable[Tensor]) -> int:
    """Of the storages of saved tensors, and of those that the results' own Functions hold in Python, each once."""
    sizes: dict[int, int] = {}
    waiting: list[Any] = [
        *(each.tensor for each in saved),
        *(vars(result.grad_fn) for result in results if _is_ours(result.grad_fn)),
    ]
    seen: set[int] = set()
    while waiting:
        entry = waiting.pop()
        if id(entry) in seen:
            continue
        seen.add(id(entry))
        if isinstance(entry, Tensor):
            if entry.device.type != "meta":
                sizes[entry.untyped_storage().data_ptr()] = entry.untyped_storage().nbytes()
        elif isinstance(entry, dict):
            waiting += entry.values()
        elif isinstance(entry, (list, tuple)):
            waiting += entry
        elif type(entry).__module__.startswith("fastvae."):
            waiting.append(getattr(entry, "__dict__", None))
    return sum(sizes.values())


def _is_ours(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)

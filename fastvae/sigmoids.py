"""Sigmoids at the end of a network: whether there is one, and what went into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

__all__ = ["Ending", "SigmoidInputs", "ending_of_module", "ending_of_output"]

Ending = Literal["sigmoid", "signed", "unknown"]
"""What a network does last, reshaping aside: "signed" (linear layer, convolution, tanh) is for no probabilities."""

# Functions and methods that hand on the values that they are given, by their names in torch.
_MOVES = frozenset(
    (
        *("__getitem__", "getitem", "clone", "contiguous", "double", "expand", "flatten", "float", "movedim"),
        *(
            "permute",
            "reshape",
            "squeeze",
            "swapaxes",
            "t",
            "to",
            "transpose",
            "unflatten",
            "unsqueeze",
            "view",
        ),
    )
)
_SIGMOIDS = frozenset(("sigmoid", "expit", "special_expit"))
_SIGNED = frozenset(
    ("linear", "tanh", *(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)))
)
_SIGNED_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Tanh,
)
_MOVING_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten)
_MOVING_NODES = frozenset(
    f"{name}Backward{overload}"
    for overload in (0, 1, 2)
    for name in (
        *(
            "Alias",
            "AsStrided",
            "Clone",
            "Expand",
            "Permute",
            "ReshapeAlias",
            "Slice",
            "Squeeze",
            "T",
            "ToCopy",
        ),
        *("Transpose", "UnsafeView", "Unsqueeze", "View"),
    )
)
_ENDING_OF_NODE: dict[str, Ending] = {
    "SigmoidBackward0": "sigmoid",
    "AddmmBackward0": "signed",
    "ConvolutionBackward0": "signed",
    "TanhBackward0": "signed",
}


def ending_of_output(output: Tensor) -> Ending:
    """What computed this output last, as far as its autograd graph tells; "unknown" without one."""
    node = output.grad_fn
    while node is not None and node.name() in _MOVING_NODES:
        node = node.next_functions[0][0]
    return "unknown" if node is None else _ENDING_OF_NODE.get(node.name(), "unknown")


def ending_of_module(module: nn.Module) -> Ending:
    """What the module does last, from its layers or a trace of its forward; "unknown" where neither tells."""
    if module._forward_hooks:
        return "unknown"
    if isinstance(module, torch.jit.ScriptModule):
        return "unknown"
    inner = module._modules.get("_orig_mod")
    if inner is not None:
        return ending_of_module(inner)
    if isinstance(module, nn.Sigmoid):
        return "sigmoid"
    if isinstance(module, _SIGNED_LAYERS):
        return "signed"
    if type(module).forward is nn.Sequential.forward:
        last = next((child for child in reversed(module._modules.values()) if not _moves(child)), None)
        return "unknown" if last is None else ending_of_module(last)
    if type(module).__module__.startswith("torch."):
        return "unknown"
    graph = _trace(module)
    return "unknown" if graph is None else _ending_of_graph(graph, module)


def _moves(module: nn.Module | None) -> bool:
    return isinstance(module, _MOVING_LAYERS) and not module._forward_hooks


def _trace(module: nn.Module) -> Graph | None:
    from fastvae.lowering import UnsupportedLayer
    from fastvae.lowering.reading import Reading
    from fastvae.lowering.tracing import trace

    try:
        return trace(Reading(), module)
    except UnsupportedLayer:
        return None


def _ending_of_graph(graph: Graph, module: nn.Module) -> Ending:
    node: Any = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    while isinstance(node, Node):
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if not _moves(layer):
                return ending_of_module(layer)
        else:
            name = str(getattr(node.target, "__name__", node.target))
            if name in _SIGMOIDS:
                return "sigmoid"
            if name in _SIGNED:
                return "signed"
            if name not in _MOVES:
                return "unknown"
        node = node.args[0] if node.args else None
    return "unknown"


class SigmoidInputs(TorchFunctionMode):
    """Sees the last sigmoid that is computed inside the block, and what went into it.

    A torch function mode: it holds for this thread alone and leaves the module and torch as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        # By the identity of a result, itself (so that the identity stays its own) and the logits that it stands for.
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, and follow what comes of a sigmoid as long as it is only moved about."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if _writes(name, kwargs):
            # What was found may have been overwritten, or be overwritten through another view of it.
            self._found.clear()
        elif name in _SIGMOIDS and isinstance(result, Tensor):
            logits = args[0] if args else kwargs["input"]
            self._found = {id(result): (result, logits)}
        elif name in _MOVES and args and id(args[0]) in self._found and isinstance(result, Tensor):
            _, logits = self._found[id(args[0])]
            self._found[id(result)] = (result, func(logits, *args[1:], **kwargs))
        return result

    def logits_of(self, output: object) -> Tensor | None:
        """The logits whose sigmoid ``output`` is, in its layout; None where it was not seen to be one."""
        return self._found[id(output)][1] if id(output) in self._found else None


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function of torch changes a tensor that it is given."""
    in_place = name.endswith("_") and not name.endswith("__")
    assigns = name in ("__setitem__", "__set__") or (
        name.startswith("__i") and name not in ("__invert__", "__index__")
    )
    return in_place or assigns or bool(kwargs.get("inplace")) or kwargs.get("out") is not None

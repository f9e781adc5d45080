"""The reading of a module as a table for people."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from .checks import QUANTISED, check_global_hooks, named
from .errors import CoupledSamples, ImpossibleLayer, NotADecoder, UnsupportedLayer
from .reading import TensorRef, render
from .structure import Structure, current, verify

_AS_A_GRAPH = (
    "hamiltonian_flow, jacobian_l1 and log_px_and_force read its forward as a graph of operations instead and sweep "
    "that in PyTorch (fastvae.Network(module, z=codes).explain() shows it); log_px and importance sampling run the "
    "module itself. What cannot be read goes through autograd, which takes more time, if it maps z alone to one "
    "tensor, each sample by itself, and PyTorch can differentiate it twice; if not, they say what is missing."
)
_WITHOUT_A_DERIVATIVE = (
    "A quantised network has no derivative: log_px runs it, the flow and the Jacobian raise."
)


def _is_quantised(module: nn.Module) -> bool:
    return any(type(inner).__module__.startswith(QUANTISED) for inner in module.modules())


def explain(module: nn.Module) -> str:
    """Say layer by layer what :func:`fastvae.lowering.lower` makes of a module.

    Args:
        module: any ``nn.Module``.

    Returns:
        A table of layer path, kind, parameters with their shapes, shape after the layer ([B, ...], ``?``
        where the module does not fix it) and whether it is lowered; below it, if the module is not lowered,
        which layer stops it, why, in which line of a custom forward, and what the operators then do.
    """
    problem = consequence = ""
    known: Structure | None = None
    try:
        known, collected = current(module)
        check_global_hooks()
        verify(known, collected)
    except CoupledSamples as error:
        problem, consequence = (
            str(error),
            "No sample has a gradient of its own then: the flow raises this error.",
        )
    except ImpossibleLayer as error:
        problem, consequence = str(error), "PyTorch raises as well when the layer runs."
    except NotADecoder as error:
        problem, consequence = str(error), "No operator takes it: a decoder maps z alone to one tensor."
    except UnsupportedLayer as error:
        problem = str(error)
        consequence = _WITHOUT_A_DERIVATIVE if _is_quantised(module) else _AS_A_GRAPH
    rows = [("layer", "kind", "parameters", "output", "lowered")]
    layers = known.layers if known else ()
    for layer in layers:
        tensors = ", ".join(
            f"{ref.name} {list(ref.shape)}" for ref in layer.tensors if isinstance(ref, TensorRef)
        )
        rows.append((layer.path or "(itself)", layer.kind, tensors or "-", render(layer.shape), "yes"))
    if problem:
        read = {layer.path for layer in layers}
        for path, inner in named(module):
            if not inner._modules and path not in read:
                shapes = ", ".join(
                    f"{name} {'?' if is_lazy(p) else list(p.shape)}"
                    for name, p in inner.named_parameters(recurse=False)
                )
                state = "no" if known and path == known.stopped_at else "not read"
                rows.append((path or "(itself)", type(inner).__name__, shapes or "-", "-", state))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    if problem:
        lines += ["", f"Not lowered. {problem}", consequence]
    else:
        count = sum(layer.kind != "identity" for layer in layers)
        lines += ["", f"Lowered: {count} layers."]
    return "\n".join(lines)

"""The cached structure of every module read so far; tensors are never cached."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastvae.locks import READING

from .checks import PLAIN, check_module, check_readable, check_tensor, named
from .effects import has_no_effects
from .errors import ImpossibleLayer, UnsupportedLayer, join
from .graph import read
from .reading import Layer, Reading, Stacked, TensorRef
from .snapshot import Collected, Node, compile_program, visit


class Form(NamedTuple):
    """As what a module is read; see ``lower``. ``shape`` None: of a flat vector of any size."""

    shape: tuple[int, ...] | None = None
    two_heads: bool = False
    without_effects: bool = False


FLAT = Form()


class Structure:
    """The layers of a module, or the reason why there are none, and the snapshot that they were read from.

    Args:
        module: see ``lower``.
        form: what is asked of it.
    """

    def __init__(self, module: nn.Module, form: Form) -> None:
        check_readable(module)
        self.form = form
        shape = form.shape
        reading = Reading((None,) if shape is None else shape, form.two_heads)
        # As text: an exception's traceback would hold the module, and so keep its cache entry alive.
        self.failure: tuple[type[ValueError], str] | None = None
        # Whether its output was found to be the module's own.
        self.checked = False
        try:
            for path, inner in named(module):
                reading.at(path, type(inner).__name__)
                check_module(path, inner)
            # Before it is traced, which would be one such effect.
            if form.without_effects and not all(has_no_effects(inner) for inner in module.modules()):
                raise UnsupportedLayer("lower: a forward of it may do more than compute its result")
            read(reading, "", module)
            if all(layer.kind == "identity" for layer in reading.layers):
                raise UnsupportedLayer("lower: the module has no layer that changes its input")
        except (UnsupportedLayer, ImpossibleLayer) as failure:
            self.failure = type(failure), str(failure)
        self.stopped_at = reading.path if self.failure else None
        self.layers = tuple(reading.layers)
        entries = [entry for layer in self.layers for entry in layer.tensors if entry is not None]
        pairs = [entry for entry in entries if not isinstance(entry, TensorRef)]
        refs = [ref for entry in entries for ref in ((entry,) if isinstance(entry, TensorRef) else entry)]
        wanted = {(ref.path, ref.name) for ref in refs}
        if pairs and len(wanted) < len(refs):
            self.failure = UnsupportedLayer, "lower: a head's parameter is used twice"
        # Whatever they are, it is refused.
        restless: dict[str, dict[str, bool]] = {}
        for path, name in reading.assigned:
            restless.setdefault(path, {})[name] = False
        self.root = Node("", module, wanted, restless=restless)
        self.program = compile_program(self.root)
        paths = [name for node in self.root.walk() for name in node.tensor_names()]
        index = {path: position for position, path in enumerate(paths)}
        self.stacked = [(index[_path(a)], index[_path(b)]) for a, b in pairs]
        index |= {_path(pair): len(paths) + at for at, pair in enumerate(pairs)}
        texts = [_text(layer, index) for layer in self.layers if layer.kind != "identity"]
        if shape is not None and len(shape) > 1:
            texts.insert(0, " ".join(map(str, ["reshape", *shape])))
        self.spec = ";".join(texts)
        self.names = tuple(path.removeprefix("_orig_mod.") for path in (*paths, *map(_path, pairs)))
        last = next((at for at in reversed(range(len(texts))) if not texts[at].startswith("reshape")), -1)
        self.stripped = (
            ";".join(texts[:last] + texts[last + 1 :]) if last >= 0 and texts[last] == "sigmoid" else None
        )

    def spec_for(self, strip_sigmoid: bool) -> str:
        """The spec, without its last sigmoid if asked for."""
        if not strip_sigmoid:
            return self.spec
        if self.stripped is None:
            kinds = [layer.kind for layer in self.layers if layer.kind != "identity"]
            raise ValueError(
                "lower: strip_sigmoid=True expects a module that ends in a sigmoid, got one ending in "
                f"{kinds[-1]}"
            )
        return self.stripped


def _path(entry: TensorRef | Stacked) -> str:
    return join(entry.path, entry.name) if isinstance(entry, TensorRef) else " and ".join(map(_path, entry))


def _text(layer: Layer, index: dict[str, int]) -> str:
    numbers = ["-1" if entry is None else str(index[_path(entry)]) for entry in layer.tensors]
    return " ".join([layer.kind, *numbers, *layer.args])


_MOST_FORMS = 8
_cache: WeakKeyDictionary[nn.Module, dict[Form, Structure]] = WeakKeyDictionary()


def current(module: nn.Module, form: Form = FLAT) -> tuple[Structure, Collected]:
    """The structure that holds now, read again if the module changed, and the tensors of the same walk."""
    found = _still_holds(module, form)
    if found is not None:
        return found
    with READING:
        found = _still_holds(module, form)
        if found is not None:  # another thread has read it meanwhile
            return found
        fresh = Structure(module, form)
        known = _cache.setdefault(module, {})
        if len(known) >= _MOST_FORMS:
            known.clear()
        known[form] = fresh
    collected = visit(module, fresh.program)
    if collected is None:
        if fresh.failure is None:
            raise UnsupportedLayer(f"lower: the {type(module).__name__} changed while it was read")
        collected = Collected([], [], [])
    return fresh, collected


def _still_holds(module: nn.Module, form: Form) -> tuple[Structure, Collected] | None:
    """What is remembered of a module, if it has not changed since."""
    known = _cache.get(module, {}).get(form)
    if known is None:
        return None
    try:
        collected = visit(module, known.program)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        # An attribute is gone, or does not compare with the remembered one: the module changed.
        return None
    return None if collected is None else (known, collected)


def forget(module: nn.Module, known: Structure) -> None:
    """Have the module read again when it is next used."""
    with READING:
        remembered = _cache.get(module, {})
        if remembered.get(known.form) is known:
            del remembered[known.form]


def verify(known: Structure, collected: Collected) -> None:
    """Raise why the module is not lowered: its structure, a tensor's type, or an unused parameter."""
    if known.failure is not None:
        error, message = known.failure
        raise error(message)
    for position, tensor in enumerate(collected.found):
        if type(tensor) not in PLAIN and tensor is not None:
            check_tensor(known.names[position], tensor)
    for path, parameter in collected.unread:
        # A parameter tied to one that is read is the same object.
        if not any(parameter is tensor for tensor in collected.found):
            raise UnsupportedLayer(
                f"lower: parameter '{path}' requires a gradient, but no layer of the forward uses it; "
                "remove it, or freeze it with requires_grad_(False)"
            )


def evaluate(known: Structure, collected: Collected) -> list[Tensor]:
    """The spec's tensors, each property evaluated once."""
    if known.failure is None:
        for position, module, name in collected.computed:
            collected.found[position] = getattr(module, name)
    verify(known, collected)
    found = collected.found
    if known.stacked:
        apart = {position for pair in known.stacked for position in pair}
        found += [torch.cat([found[a], found[b]]) for a, b in known.stacked]
        # Places stay; what is stacked is given once.
        for position in apart:
            found[position] = found[position].new_empty(0)
    return found

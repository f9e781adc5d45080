"""Private copies of a user's module: what scores work on, so that the module itself is never touched.

Another thread may train the module, score it or serve from it meanwhile. A copy is in eval mode, has weights of its
own (those at the moment of copying), and runs without the compiler and without data parallel wrappers.
"""

from __future__ import annotations

import copy
import functools
import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.parallel import DistributedDataParallel

from fastvae.held import INTERNAL, Held, UnknownValue

__all__ = [
    "PrivateCopies",
    "copy_has_origin",
    "for_scoring",
    "origin_of",
    "private_copy",
    "twin_of",
]

_Module = TypeVar("_Module", bound=nn.Module)

_TRIES = 10
"""How often a model is copied that changes meanwhile."""

_HOOKS = tuple(sorted(name for name in INTERNAL if name.endswith("_hooks")))
_CALLED_HOOKS = tuple(name for name in _HOOKS if "state_dict" not in name)
"""Those that a forward or a backward pass runs."""


def twin_of(model: _Module, **own: Any) -> _Module:
    """A second object around the same parts, parameters and submodules, with some methods and attributes of its own."""
    twin = copy.copy(model)
    vars(twin).update(own)
    return twin


@torch.inference_mode(False)
@torch.no_grad()
def private_copy(model: _Module) -> _Module:
    """A copy that shares nothing that scoring would change, in eval mode; ``requires_grad`` is as it was.

    Forward hooks come along as they are. Compiled and data parallel modules inside run as what they wrap, their
    parameters under the same names. What cannot be copied (a lock, an open file) is shared.

    Raises:
        TypeError: a module that cannot be copied: one that keeps its own parts where a copy cannot follow, or whose
            ``__deepcopy__`` returns parts of the module itself.
    """
    made = _copied_at_rest(model)
    if made is None:
        # Something inside does not copy. Found piece by piece, it is shared; of it, what is the module's own is not.
        memo = _first_memo(model) | _shared(model)
        try:
            made = _copied(model, memo)
        except Exception as error:
            raise TypeError(
                f"fastvae: model: expected a module that copy.deepcopy can copy, because scores work on a copy of "
                f"it; {type(model).__name__} raised {type(error).__name__}: {error}"
            ) from error
    own_ids = {id(part) for part in (*model.modules(), *_tensors(model).values())}
    for name, part in (*made.named_modules(), *_tensors(made).items()):
        if id(part) in own_ids:
            raise TypeError(
                f"fastvae: model: expected a module that copy.deepcopy can copy, because scores work on a copy of "
                f"it; the copy of {type(model).__name__} has the same {name or 'object'} as the module itself"
            )
    for part, own in zip(made.modules(), model.modules(), strict=True):
        origin = origin_of(own)
        _origins[part] = weakref.ref(own if origin is None else origin)
        if isinstance(own, torch.jit.ScriptModule):  # Its parameters' copies ask for no gradient.
            for copied, parameter in zip(part.parameters(False), own.parameters(False), strict=True):
                copied.requires_grad_(parameter.requires_grad)
    return for_scoring(made)


def for_scoring(copy_of: _Module) -> _Module:
    """A private copy in eval mode, of which gradients may be asked on every device.

    cuDNN has the backward pass of a recurrent layer in training mode alone, which without dropout is the same layer.
    """
    copy_of.eval()
    for part in copy_of.modules():
        if isinstance(part, nn.RNNBase) and any(parameter.is_cuda for parameter in part.parameters()):
            part.dropout, part.training = 0.0, True
    return copy_of


_origins: weakref.WeakKeyDictionary[nn.Module, Callable[[], nn.Module | None]] = weakref.WeakKeyDictionary()


def copy_has_origin(copy_of: nn.Module, origin: nn.Module) -> None:
    """Say of a module what :func:`origin_of` is to return."""
    _origins[copy_of] = weakref.ref(origin)


def origin_of(copy_of: nn.Module) -> nn.Module | None:
    """The module that a private copy, or a part of one, or a copy of it, was made from; None for any other."""
    return _origins.get(copy_of, lambda: None)()


class PrivateCopies:
    """Copies of one module, one for each call at a time; a copy that came back serves the next call.

    It does so as long as nothing of the module has changed but its tensors' values, which are copied anew. So
    ``fastvae.lowering`` reads a copy once, and warns of it once.
    """

    def __init__(self) -> None:
        self._idle: deque[tuple[Any, nn.Module]] = deque()

    def __reduce__(self) -> tuple[type[PrivateCopies], tuple[()]]:
        """Pickled and copied without the copies."""
        return PrivateCopies, ()

    @contextmanager
    def borrowed(self, model: _Module) -> Iterator[_Module]:
        """A copy of the module as it is now, for the caller alone."""
        facts, held = _facts(model)
        copied = self._kept(facts, model, held) or private_copy(model)
        yield copied
        # What a forward changed in the copy must not reach the next call.
        if facts is not None and _facts(copied)[0] == facts:
            self._idle.append((facts, copied))

    def _kept(self, facts: Any, model: _Module, held: Sequence[Tensor]) -> _Module | None:
        """A copy that is still right, with the tensors' values of now; those that are not are let go."""
        # Popping is atomic: no two threads get the same one.
        while self._idle:
            try:
                known, kept = self._idle.pop()
            except IndexError:
                break
            if facts is not None and known == facts:
                _refresh(kept, model, held)
                return cast(_Module, kept)
        return None


@torch.inference_mode(False)
@torch.no_grad()
def _refresh(made: nn.Module, model: nn.Module, held: Sequence[Tensor]) -> None:
    pairs = zip((*_tensors(made).values(), *_facts(made)[1]), (*_tensors(model).values(), *held), strict=True)
    for old, new in pairs:
        if old is not new:  # a copy shares what only a closure holds
            old.copy_(new)
            old.requires_grad_(new.requires_grad)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# ---- copying ----


class OptimizedModule(nn.Module):
    """Where a copy has torch.compile's wrapper of this name: the same names of parameters, without the compiler.

    ``fastvae.lowering`` looks through both alike.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module inside."""
        return self._modules["_orig_mod"](*args, **kwargs)  # type: ignore[misc]


class DataParallelModule(nn.Module):
    """Where a copy has a data parallel wrapper."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module inside, on the device where it is."""
        return self._modules["module"](*args, **kwargs)  # type: ignore[misc]


def _stand_in(module: nn.Module) -> nn.Module | None:
    if type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        return OptimizedModule()
    return DataParallelModule() if isinstance(module, (DistributedDataParallel, nn.DataParallel)) else None


def _first_memo(model: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` is told beforehand, by id: the tensors' copies, stand-ins, and hooks as they are."""
    own = {id(module) for module in model.modules()}
    memo: dict[int, Any] = {}
    for module in model.modules():
        stand_in = _stand_in(module)
        if stand_in is not None:
            memo[id(module)] = stand_in
            continue
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            # Others copy themselves: lazy parameters, or results of a graph, which hooks compute again.
            if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
                memo[id(value)] = _own_tensor(value)
        for hooks in _HOOKS:
            for hook in (getattr(module, hooks, None) or {}).values():
                whose = hook.__self__ if isinstance(hook, MethodType) else hook
                if id(whose) not in own and not isinstance(hook, _WrappedHook):
                    memo[id(hook)] = hook
    return memo


def _own_tensor(value: Tensor) -> Tensor:
    made = value.detach().clone()
    if isinstance(value, nn.Parameter):
        made = nn.Parameter(made, value.requires_grad)
    else:
        made.requires_grad_(value.requires_grad and value.is_leaf)
    vars(made).update(vars(value))
    return made


def _copied_at_rest(model: _Module) -> _Module | None:
    """None if something inside does not copy.

    Another thread's forward may compute weights anew meanwhile, as weight_norm's hooks do: then once more.
    """
    for _ in range(_TRIES):
        memo = _first_memo(model)
        before = frozenset(memo)
        try:
            return _copied(model, memo)
        except Exception:
            if frozenset(_first_memo(model)) == before:
                break
    return None


def _copied(model: _Module, memo: dict[int, Any]) -> _Module:
    for module in model.modules():
        if isinstance(stand_in := memo.get(id(module)), (OptimizedModule, DataParallelModule)):
            name = "module" if isinstance(stand_in, DataParallelModule) else "_orig_mod"
            stand_in.add_module(name, copy.deepcopy(module._modules[name], memo))
    made: _Module = copy.deepcopy(model, memo)
    for module in made.modules():
        for name, value in vars(module).items():
            if name not in INTERNAL and (own := _rebound(value, memo)) is not value:
                vars(module)[name] = own
    return made


def _rebound(value: Any, memo: Mapping[int, Any], depth: int = 4) -> Any:
    """What a copy holds, with functions such as ``self.head = lambda z: self.out(z)`` on the copy's own parts."""
    kind = type(value)
    if depth == 0:
        return value
    if kind is FunctionType:
        return _rebound_function(value, memo, depth) if value.__closure__ else value
    if kind is MethodType:
        function = _rebound(value.__func__, memo, depth - 1)
        return value if function is value.__func__ else MethodType(function, value.__self__)
    if kind in (list, dict):
        # The copy's own, in place: others may hold it, too.
        for place, entry in enumerate(value) if kind is list else value.items():
            value[place] = _rebound(entry, memo, depth - 1)
        return value
    if kind is tuple:
        entries = tuple(_rebound(entry, memo, depth - 1) for entry in value)
        return value if all(map(operator.is_, entries, value)) else entries
    if kind is functools.partial:
        function, arguments = (_rebound(each, memo, depth - 1) for each in (value.func, value.args))
        named = _rebound(value.keywords, memo, depth - 1)
        if function is value.func and arguments is value.args:
            return value
        return functools.partial(function, *arguments, **named)
    return value


def _rebound_function(function: FunctionType, memo: Mapping[int, Any], depth: int) -> FunctionType:
    cells, changed = [], False
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not yet assigned
            cells.append(cell)
            continue
        rebound = content
        if isinstance(content, FunctionType) and content is not function:
            rebound = _rebound(content, memo, depth - 1)
        elif isinstance(content, (nn.Module, Tensor, MethodType)):
            of = content.__self__ if isinstance(content, MethodType) else content
            if id(of) in memo:
                rebound = copy.deepcopy(content, dict(memo))
        changed = changed or rebound is not content
        cells.append(cell if rebound is content else CellType(rebound))
    if not changed:
        return function
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    vars(made).update(vars(function))
    return made


def _shared(model: nn.Module) -> dict[int, Any]:
    """Attributes that do not copy, by id, as themselves. TypeError for one that holds parts of the module."""
    own = {id(part) for part in (*model.modules(), *_tensors(model).values())}
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in INTERNAL:
                continue
            try:
                copy.deepcopy(value, _first_memo(model))
            except Exception as error:
                if _reaches(value, own):
                    raise TypeError(
                        f"fastvae: model: {path or type(model).__name__}: expected attributes that copy.deepcopy can "
                        f"copy, because scores work on a copy of the model; {name!r} ({type(value).__name__}) holds "
                        f"parts of it and raised {type(error).__name__}: {error}"
                    ) from error
                found[id(value)] = value
    return found


def _reaches(value: object, own: set[int], depth: int = 4) -> bool:
    if id(value) in own:
        return True
    if depth == 0:
        return False
    if isinstance(value, MethodType):
        inner: list[Any] = [value.__self__]
    elif isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    else:
        inner = (
            list(vars(value).values()) if hasattr(value, "__dict__") and not isinstance(value, type) else []
        )
    return any(_reaches(entry, own, depth - 1) for entry in inner)


# ---- what a copy depends on ----


def _facts(model: nn.Module) -> tuple[Any, list[Tensor]]:
    """All that a copy depends on besides the tensors' values, to be compared, None if that cannot be told; and tensors.

    These are those that it holds and has not registered.
    """
    held = Held(model)
    lines = []
    try:
        for module in model.modules():
            if _stand_in(module) is not None or any(getattr(module, hooks, None) for hooks in _CALLED_HOOKS):
                return None, []
            state = vars(module)
            tensors = []
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                form = None
                if tensor is not None:
                    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
                        return None, []
                    form = (held.place(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
                tensors.append((name, type(tensor), form))
            children = tuple(
                (name, None if m is None else held.place(m)) for name, m in module._modules.items()
            )
            # A recurrent layer's copy has its attributes in another order.
            others = tuple(
                (key, held.key(state[key]))
                for key in sorted(state)
                if key not in INTERNAL and key != "training"
            )
            lines.append((type(module), held.place(module), tuple(tensors), children, others))
    except UnknownValue:
        return None, []
    return tuple(lines), [tensor for _, tensor in held.tensors]

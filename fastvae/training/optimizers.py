"""Whether an optimiser can go on from a state that was loaded into it: tried on copies of its parameters."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

__all__ = ["check_loaded_state", "from_torch"]


def from_torch(optimizer: Optimizer) -> bool:
    """Whether it is one of ``torch.optim``: its steps touch its parameters and its state, and nothing else.

    A step of any other might, say, talk to other processes.
    """
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")


def check_loaded_state(
    path: Path,
    optimizer: Optimizer,
    saved: Mapping[int, Mapping[str, Any]],
    groups_before: Sequence[dict[str, Any]],
    state_before: Mapping[Any, Any],
    stepped: bool,
) -> None:
    """ValueError where an optimiser of torch cannot take a step, or its state is not as its own steps leave it.

    ``load_state_dict`` gives all state the parameter's dtype; what has another in ``saved`` and in the optimiser's own
    state gets it back.

    Args:
        optimizer: as it was loaded from the file ``path``.
        saved: the state in the file, by the parameters' numbers.
        groups_before, state_before: its ``param_groups`` and ``state`` as they were before.
        stepped: whether it has taken steps, after which one that keeps state has some.
    """
    if not from_torch(optimizer):
        return
    number, keeps = 0, False
    for group, group_before in zip(optimizer.param_groups, groups_before, strict=True):
        for parameters in _units(optimizer, group["params"]):
            try:
                own = _after_a_step(optimizer, group, parameters, state_before)
                after = _after_a_step(optimizer, group, parameters, optimizer.state)
            except Exception as error:
                if not _can_step(optimizer, group_before, parameters, state_before):
                    return  # whatever it was loaded with: training will say why
                raise _unfit(path, optimizer, f"{type(error).__name__}: {error}") from error
            # What LBFGS keeps differs from step to step.
            for parameter, expected in zip(
                parameters, after if isinstance(optimizer, LBFGS) else own, strict=True
            ):
                found = optimizer.state.get(parameter, {})
                keeps = keeps or bool(expected)
                for name, value in expected.items() if found else ():
                    if not _alike(found.get(name), value, numbers=isinstance(optimizer, LBFGS)):
                        raise _unfit(
                            path, optimizer, f"{_shown(found.get(name))} for {_shown(value)} in {name!r}"
                        )
                    kept = saved.get(number, {}).get(name)
                    if isinstance(kept, Tensor) and kept.dtype == value.dtype != found[name].dtype:
                        found[name] = kept.to(value.device, copy=True)
                number += 1
    if stepped and keeps and not any(optimizer.state.values()):
        raise _unfit(path, optimizer, "none at all")


def _units(optimizer: Optimizer, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """What is stepped together; all others one by one, because copies of a whole network need as much memory again."""
    if isinstance(optimizer, LBFGS):
        yield parameters
    else:
        yield from ([parameter] for parameter in parameters)


def _can_step(
    optimizer: Optimizer, group: dict[str, Any], parameters: list[Tensor], state: Mapping[Any, Any]
) -> bool:
    try:
        _after_a_step(optimizer, group, parameters, state)
    except Exception:
        return False
    return True


def _after_a_step(
    optimizer: Optimizer, group: dict[str, Any], parameters: list[Tensor], state: Mapping[Any, Any]
) -> list[dict[str, Any]]:
    """The state for each parameter once a copy of the optimiser has taken a step on copies of them."""
    if any(nn.parameter.is_lazy(parameter) for parameter in parameters):
        return [{} for _ in parameters]
    copies = [parameter.detach().clone() for parameter in parameters]
    twin: Any = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    # A scheduler's, bound to the original.
    vars(twin).pop("step", None)
    settings = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    twin.param_groups = [{**settings, "params": copies}]
    twin.state = defaultdict(dict)
    for parameter, twins_parameter in zip(parameters, copies, strict=True):
        if parameter in state:
            twin.state[twins_parameter] = copy.deepcopy(state[parameter])
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    if isinstance(optimizer, LBFGS):
        twin._params, twin._numel_cache = copies, None

    def closure() -> float:
        """Of a bowl around -1: its gradient is not zero where weights are, at which LBFGS would take no step."""
        with torch.no_grad():
            for entry in copies:
                gradient = entry + 1
                entry.grad = gradient.to_sparse() if isinstance(optimizer, SparseAdam) else gradient
            return sum(float((entry + 1).abs().square().sum()) / 2 for entry in copies)

    closure()
    step: Any = type(optimizer).step
    # Below the wrapper that calls hooks, those for all optimisers too.
    getattr(step, "__wrapped__", step)(twin, closure)
    return [dict(twin.state.get(entry, {})) for entry in copies]


def _alike(found: Any, expected: Any, numbers: bool) -> bool:
    """Of the same kind and shape: the values, and how many entries lists have, may differ.

    Args:
        numbers: Python's and those in tensors are one kind.
    """
    if numbers and isinstance(found, (int, float)) and isinstance(expected, Tensor):
        return expected.dim() == 0 and not isinstance(found, bool)
    if isinstance(expected, Tensor):
        return (
            isinstance(found, Tensor)
            and found.shape == expected.shape
            and found.is_floating_point() == expected.is_floating_point()
            and found.is_complex() == expected.is_complex()
        )
    if isinstance(expected, list):
        return isinstance(found, list)
    return expected is None or (isinstance(found, (int, float, Tensor)) and not isinstance(found, bool))


def _shown(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _unfit(path: Path, optimizer: Optimizer, found: str) -> ValueError:
    return ValueError(
        f"{path}: expected a state that {type(optimizer).__name__} can go on from, found another ({found})"
    )

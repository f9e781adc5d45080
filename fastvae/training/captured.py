"""Forward and backward passes of a training run in CUDA graphs: one launch for all of their kernels."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae.cuda_graphs import WARM_UP, capture
from fastvae.training.batches import Batch

__all__ = ["CapturedPasses", "Pass"]

_MANY = 32
"""Forms without a graph before somebody is told."""

_REMEMBERED = 4
"""Graphs, each of which keeps the memory of its passes."""


class Pass(NamedTuple):
    """What a forward and backward pass made, beside the gradients in place."""

    loss: Tensor
    """The (weighted) mean [] over the samples."""
    amount: float
    """Of the samples: their number, or the sum of their weights."""
    norm: Tensor
    """Of all gradients: []."""
    terms: dict[str, Tensor]
    """Of the loss, by name."""
    replayed: bool = False
    """From a graph, which overwrites all of it the next time."""

    def numbers(self) -> list[float]:
        """Loss and norm, by one transfer: on a GPU each would wait for the queue."""
        dtype = torch.promote_types(self.loss.dtype, torch.float32)
        found: list[float] = torch.stack(
            [self.loss.to(dtype), self.norm.to(self.loss.device, dtype)]
        ).tolist()
        return found


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: Batch
    made: Pass
    gradients: list[Tensor | None]


class CapturedPasses:
    """Passes by form: the first few as they are, those that follow from a CUDA graph.

    A form is all that decides which kernels run, besides numbers: the batch's shape, where the model's tensors lie, and
    the plain settings (numbers, flags, words) of all its modules. What else code looks at stays as it was captured.

    Args:
        model: on a GPU.
        parameters: whose gradients are wanted.
        run: a forward and backward pass of a batch from gradients that are None.
    """

    def __init__(self, model: nn.Module, parameters: list[Tensor], run: Callable[[Batch], Pass]) -> None:
        self._model, self._parameters, self._run = model, parameters, run
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._last: tuple[Any, ...] = ()
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()

    def __call__(self, batch: Batch) -> Pass:
        """Of one batch."""
        form = self._form(batch)
        found = self._graphs.get(form)
        if found is None:
            self._note(form)
            if self._seen[form] <= WARM_UP:
                return self._run(batch)
            found = self._capture(batch)
            if len(self._graphs) >= _REMEMBERED:
                self._graphs.popitem(last=False)
            self._graphs[form] = found
        for own, tensor in zip(found.batch.tensors, batch.tensors, strict=True):
            own.copy_(tensor)
        found.graph.replay()
        for parameter, gradient in zip(self._parameters, found.gradients, strict=True):
            parameter.grad = gradient
        return found.made

    def _note(self, form: tuple[Any, ...]) -> None:
        """Count a form, and warn where every batch has another."""
        self._seen[form] += 1
        if len(self._seen) > _MANY:
            new = next(
                (fact for fact, before in zip(form, self._last, strict=False) if fact != before), form[0]
            )
            warnings.warn(
                f"fit: cuda_graph: of the last {len(self._seen)} batches hardly two were of one form, so that no CUDA "
                f"graph serves them; this was not as before: {new}",
                stacklevel=2,
            )
            self._seen.clear()
        self._last = form

    def _capture(self, batch: Batch) -> _Graph:
        given = batch.each(Tensor.clone)
        try:
            graph, made = capture(lambda: self._run(given), batch.observation.x.device)
        except RuntimeError as error:
            raise RuntimeError(
                f"fit: cuda_graph: expected a training step of {type(self._model).__name__} that never waits for the "
                f"GPU, so that a CUDA graph can hold it; pass cuda_graph=False. PyTorch: {error}"
            ) from error
        gradients = [parameter.grad for parameter in self._parameters]
        return _Graph(graph, given, made._replace(replayed=True), gradients)

    def _form(self, batch: Batch) -> tuple[Any, ...]:
        facts: list[Any] = [(x.shape, x.stride(), x.dtype, x.device) for x in batch.tensors]
        facts += torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        for module in self._model.modules():
            facts += [
                (name, value)
                for name, value in vars(module).items()
                if value is None or isinstance(value, (bool, int, float, str))
            ]
            for tensors in (module._parameters, module._buffers):
                facts += [None if t is None else (t.data_ptr(), t.requires_grad) for t in tensors.values()]
        return tuple(facts)

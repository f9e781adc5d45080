"""Sweeps in a graph of torch.compile: one call in it, whose network is read while Dynamo traces, and run as ever.

``fastvae::swept`` takes every tensor that a call depends on, the network's among them. Its program is no value that
such a graph can hold: it stays here, under a name that no other process gives to anything, since compilers keep graphs
on disk. So does what a backward pass needs, by a number that is among the results.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae._compiling import is_in_compiled_graph
from fastvae.decoding import check_outputs
from fastvae.likelihoods import Likelihood, resolve
from fastvae.lowering import UnsupportedLayer
from fastvae.lowering.traced import Fact, Facts, facts_of_attributes, hold_traced, holds, tensors_traced
from fastvae.network.cache import Reading, reading_of
from fastvae.network.pristine import BATCH
from fastvae.ops._registration import empty_gradients

Options = tuple[Any, ...]
"""Plain values that an operator's call depends on besides tensors."""


class Sweep(NamedTuple):
    """How an operator sweeps a network.

    run: from a network, a likelihood, the options and the inputs to the results.
    shapes: from the options and the inputs to empty tensors like the results.
    """

    run: Callable[..., Sequence[Tensor]]
    shapes: Callable[..., Sequence[Tensor]]


SWEEPS: dict[str, Sweep] = {}
"""By the operator's name."""

WEIGHTS = "it is given weights of elements"
"""Why it breaks a graph."""


class _Call(NamedTuple):
    """All of a call but its tensors."""

    sweep: Sweep
    reading: Reading
    likelihood: Likelihood | None
    options: Options
    inputs: int

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results; the network's tensors come after the ``inputs``, then the condition if there is one."""
        reading, (inputs, own) = self.reading, (tensors[: self.inputs], list(tensors[self.inputs :]))
        condition = own.pop() if len(own) > len(reading.places) else None
        reading.check(inputs[0], condition)
        sources = list(reading.constants.tensors)
        for place, tensor in zip(reading.places, own, strict=True):
            sources[place] = tensor
        if reading.of_condition is not None:
            sources[reading.of_condition] = condition
        network = reading.constants._replace(tensors=sources)
        return self.sweep.run(network, self.likelihood, self.options, *inputs)


_calls: dict[str, _Call] = {}


def _call_named(name: str) -> _Call:
    if name not in _calls:
        raise ValueError(
            f"fastvae::swept: call: expected a name that torch.compile was given in this process, got {name!r}"
        )
    return _calls[name]


class _Constant(NamedTuple):
    """What a trace bakes in, as plain values; ``failure`` says why a call cannot be part of a graph."""

    failure: str
    call: str = ""
    names: tuple[str, ...] = ()
    facts: tuple[Facts, ...] = ()
    of_likelihood: tuple[Fact, ...] = ()


_Form = tuple[tuple[int, ...], torch.dtype, str]


def _like(form: _Form | None) -> Tensor | None:
    if form is None:
        return None
    shape, dtype, device = form
    return torch.zeros((BATCH, *shape), dtype=dtype, device=device)


def _constant(
    name: str,
    address: int,
    likelihood: int | str,
    options: Options,
    inputs: int,
    codes: _Form,
    condition: _Form | None,
) -> _Constant:
    """Read the module with this ``id``, for a likelihood with that one or of that name; 0: none."""
    module = ctypes.cast(address, ctypes.py_object).value
    like: Likelihood | None = None
    if isinstance(likelihood, str):
        try:
            like = resolve(likelihood)
        except ValueError as failure:
            return _Constant(str(failure))
    elif likelihood:
        like = ctypes.cast(likelihood, ctypes.py_object).value
    of_likelihood = () if like is None else facts_of_attributes(like)
    if of_likelihood is None or isinstance(like, nn.Module):
        return _Constant(f"{type(like).__name__} holds more than numbers")

    def read() -> _Constant:
        z, given = _like(codes), _like(condition)
        assert z is not None
        strip = like is not None and like.probs
        try:
            network, reading = reading_of(module, z, condition=given, strip_sigmoid=strip)
            if like is not None and given is None:
                check_outputs(module, z, like)
        except ValueError as failure:
            return _Constant(str(failure))
        own = [t for t in network.tensors if t is not None and t.is_floating_point()]
        if any(t.dtype != z.dtype for t in own):
            return _Constant(f"its parameters are not {z.dtype}")
        if like is not None and like.of_logits and not strip and network.sweeps.program.ends_in_sigmoid:
            return _Constant("it ends in a Sigmoid")
        call = uuid.uuid4().hex
        _calls[call] = _Call(SWEEPS[name], reading, like, options, inputs)
        return _Constant("", call, reading.names, reading.facts, of_likelihood)

    # In a thread of its own, which knows nothing of what this one traces.
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(read).result()


# What torch.compiler.assume_constant_result sets; calling it would import all of Dynamo with this package.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _form_of(tensor: Tensor) -> Any:
    # Symbolic sizes become numbers.
    return tuple(operator.index(size) for size in tensor.shape[1:]), tensor.dtype, str(tensor.device)


def swept_in_graph(
    name: str,
    decoder: nn.Module,
    likelihood: str | Likelihood | None,
    condition: Tensor | None,
    options: Options,
    *inputs: Tensor,
    refusal: str = "",
) -> list[Tensor]:
    """The results of an operator of ``SWEEPS`` as one call of the graph that Dynamo makes of its caller.

    Where it cannot be one, the graph breaks, and the list is empty. Codes are the first of the inputs.
    """
    z, reason = inputs[0], refusal
    if not is_in_compiled_graph():
        reason = "torch.export would save a call that no other process knows"
    elif torch.is_autocast_enabled(z.device.type):
        reason = "it is under autocast"
    elif not isinstance(decoder, nn.Module) or not isinstance(likelihood, (str, Likelihood, type(None))):
        reason = "decoder or likelihood are none"
    elif z.dim() < 2 or z.dtype not in (torch.float32, torch.float64):
        reason = "its codes are not [B, ...] in float32 or float64"
    if not reason:
        forms = _form_of(z), None if condition is None else _form_of(condition)
        is_object = isinstance(likelihood, Likelihood)
        like: Any = id(likelihood) if is_object else 0 if likelihood is None else likelihood
        found = _constant(name, id(decoder), like, options, len(inputs), *forms)
        reason = found.failure
        if not reason:
            hold_traced(decoder, found.facts)
            if not all([holds(likelihood, fact) for fact in found.of_likelihood if is_object]):
                raise UnsupportedLayer("the likelihood changed while it was traced")
            tensors = [*inputs, *tensors_traced(decoder, found.names)]
            if condition is not None:
                tensors.append(condition)
            differentiates = torch.is_grad_enabled()
            needs = [int(differentiates and tensor.requires_grad) for tensor in tensors]
            results: list[Tensor] = torch.ops.fastvae.swept(tensors, found.call, needs)
            return results[:-1]
    torch._dynamo.graph_break(msg=f"fastvae.ops.{name}: the decoder is swept outside of graphs: {reason}")
    return []


@contextmanager
def _with_autograd() -> Iterator[None]:
    """Below an operator of Python's autograd is asleep; here it builds graphs of its own."""
    keys = torch._C.DispatchKey
    asleep = torch._C.DispatchKeySet(keys.AutogradFunctionality)
    for key in (keys.AutogradOther, keys.AutogradNestedTensor):
        asleep = asleep | torch._C.DispatchKeySet(key)
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - asleep), torch.enable_grad():
        yield


class _Graph(NamedTuple):
    """Results with autograd's graph, and those of the tensors that they have a gradient to, some perhaps not."""

    results: Sequence[Tensor]
    wanted: list[Tensor]


def _evaluated(tensors: Sequence[Tensor], call: str, needs: Sequence[int]) -> _Graph:
    leaves = [t.detach().requires_grad_(bool(need)) for t, need in zip(tensors, needs, strict=True)]
    return _Graph(_call_named(call).run(leaves), [leaf for leaf in leaves if leaf.requires_grad])


def _copied(tensors: Sequence[Tensor], call: str) -> list[Tensor]:
    """All but the network's own copied: what a compiled graph has computed, it may overwrite after the call."""
    known = _call_named(call)
    own = range(known.inputs, known.inputs + len(known.reading.places))
    return [tensor if at in own else tensor.clone() for at, tensor in enumerate(tensors)]


def _apart(found: Sequence[Tensor], given: Sequence[Tensor | None]) -> list[Tensor]:
    """Dense, and in memory of their own: compilers take what an operator returns for new, and use the old again."""
    seen = {tensor.untyped_storage()._cdata for tensor in given if tensor is not None}
    results = []
    for tensor in found:
        result = tensor.contiguous()
        memory = result.untyped_storage()._cdata
        results.append(result.clone() if memory in seen else result)
        seen.add(memory)
    return results


_graphs: dict[int, _Graph] = {}
"""Of calls whose backward pass may come: by the number in their last result, and as long as that is held."""
_numbers = itertools.count()


# What is kept here, a replayed CUDA graph would not find. Older releases have no such mark.
_TAGS = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)


@torch.library.custom_op(
    "fastvae::swept",
    mutates_args=(),
    schema="(Tensor[] tensors, str call, int[] needs) -> Tensor[]",
    tags=_TAGS,
)
def _swept(tensors: Sequence[Tensor], call: str, needs: Sequence[int]) -> list[Tensor]:
    """The results, and a number."""
    number = next(_numbers)
    ticket = torch.tensor(number, device="cpu")
    if any(needs):
        with _with_autograd():
            graph = _graphs[number] = _evaluated(_copied(tensors, call), call, needs)
        weakref.finalize(ticket, _graphs.pop, number, None)
        # Results as well: autograd may have saved them.
        results = [found.detach().clone() for found in graph.results]
    else:
        with torch.no_grad():
            results = list(_call_named(call).run(tensors))
    return [*_apart(results, tensors), ticket]


@_swept.register_fake
def _(tensors: Sequence[Tensor], call: str, needs: Sequence[int]) -> list[Tensor]:
    known = _call_named(call)
    results = known.sweep.shapes(known.options, *tensors[: known.inputs])
    return [*results, torch.empty((), dtype=torch.int64, device="cpu")]


@torch.library.custom_op(
    "fastvae::swept_backward",
    mutates_args=(),
    schema="(Tensor?[] gradients, Tensor[] tensors, Tensor ticket, str call, int[] needs) -> Tensor[]",
    tags=_TAGS,
)
def _swept_backward(
    gradients: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    ticket: Tensor,
    call: str,
    needs: Sequence[int],
) -> list[Tensor]:
    """To each tensor, empty where none is needed. A second pass over one graph evaluates it again."""
    with _with_autograd():
        graph = _graphs.pop(int(ticket), None) or _evaluated(tensors, call, needs)
        pairs = [
            (found, gradient)
            for found, gradient in zip(graph.results, gradients, strict=True)
            if gradient is not None and found.requires_grad
        ]
        found: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in graph.wanted]
        if pairs:
            outputs, along = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outputs, graph.wanted, along, allow_unused=True, materialize_grads=True
            )
    rest = iter(_apart(found, [*gradients, *tensors]))
    return [next(rest) if need else t.new_empty(0) for t, need in zip(tensors, needs, strict=True)]


@_swept_backward.register_fake
def _(gradients: Sequence[Tensor | None], tensors: Sequence[Tensor], *others: Any) -> list[Tensor]:
    return empty_gradients("swept_backward", tensors[0], tensors, others[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.call, ctx.needs = inputs
    ctx.save_for_backward(output[-1], *tensors)


def _backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    ticket, *tensors = ctx.saved_tensors
    found = torch.ops.fastvae.swept_backward(list(gradients)[:-1], tensors, ticket, ctx.call, ctx.needs)
    wanted = [gradient if need else None for gradient, need in zip(found, ctx.needs, strict=True)]
    return wanted, None, None


_swept.register_autograd(_backward, setup_context=_keep)

"""Calls of every raw entry, generated from the registered schemas, with arguments that are good, nearly or not at all.

``torch.ops.fastvae.*`` on real and on meta tensors, what else ``fastvae._C`` binds, and ``fastvae.ops``. A call may be
refused with a documented error of ours or PyTorch's. One that is taken gives what the same call gives with dense copies
of its tensors, what the fake kernel announces and, of a network's text, what PyTorch gives.
"""

from __future__ import annotations

import functools
import inspect
import random
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lowered import run_spec
from torch import Tensor

import fastvae
from fastvae import ops
from fuzzing.raw_arguments import Arguments, likelihood_of
from fuzzing.spoiling import empty_one, spoil

CASES = 3000

DOCUMENTED = (ValueError, TypeError, RuntimeError, NotImplementedError, OverflowError, MemoryError)
"""NotImplementedError is also torch's for a device or layout without a kernel, OverflowError Python's for integers."""

ELSEWHERE = (
    *("Recycling", "Kept"),  # take nothing
    *("NormActivationRules", "StraightCode"),  # made for one network: test_raw_entries, test_straight_code
    *("CopiedConvolutionRules", "CopiesAdam"),  # the same: test_copied_kernels
    *("form_of", "first_without_memory"),  # say how tensors lie, which dense copies do not
)

OF_GRAPHS = ("swept", "swept_backward")
"""What torch.compile alone calls, with a name that a trace has made: test_swept_in_graphs."""

_MEMORY = 6 << 30


@functools.wraps(ops.iwae_bound)
def three_samples(*arguments: Any) -> Any:
    """The bound of the same draws each time."""
    torch.manual_seed(0)
    return ops.iwae_bound(*arguments, num_samples=3)


class Entry(NamedTuple):
    """A function that can be called, and the names of its arguments."""

    place: str
    name: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]


def copies(*arguments: Any) -> list[Any]:
    """NetworkCopies from its making to its parameters, as one call."""
    made = fastvae._C.NetworkCopies(*arguments)
    outputs = [made.forward()]
    made.update(outputs[0].cos())
    outputs.append(made.forward())
    return [*outputs, *made.parameters()]


@functools.cache
def entries() -> list[Entry]:
    """Every operator that is registered, everything else that is bound, and every public operator."""
    found = []
    registered = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if name in OF_GRAPHS:
            continue
        if space in ("fastvae", "fastvae_internal"):
            registered.add(name)
            function = getattr(getattr(torch.ops, space), name).default
            arguments = tuple(argument.name for argument in function._schema.arguments)
            if space == "fastvae":
                found += [Entry(place, name, function, arguments) for place in ("torch.ops", "meta")]
            else:
                found.append(Entry("_C", name, getattr(fastvae._C, name), arguments))
    assert all(callable(getattr(fastvae._C, name)) for name in registered)
    for name in sorted(dir(fastvae._C)):
        bound = getattr(fastvae._C, name)
        if name.startswith("__") or not callable(bound) or name in ELSEWHERE or name in registered:
            continue
        signature = (bound.__init__ if isinstance(bound, type) else bound).__doc__.split("\n")[0]
        arguments = tuple(re.findall(r"(?:\(|, )(\w+): ", signature.partition(") ->")[0]))
        if isinstance(bound, type):
            found.append(Entry("_C", name, {"NetworkCopies": copies}[name], arguments[1:]))
        else:
            found.append(Entry("_C", name, bound, arguments))
    for name in ops.__all__:
        function = {"iwae_bound": three_samples}.get(name, getattr(ops, name))
        parameters = inspect.signature(function).parameters.values()
        arguments = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        found.append(Entry("ops", name, function, arguments))
    return sorted(found, key=lambda entry: (entry.place, entry.name))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_in(entry)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(entry, change) for entry in value)
    return value


def dense(t: Tensor) -> Tensor:
    return t.detach().resolve_neg().resolve_conj().clone(memory_format=torch.contiguous_format)


def can_be_copied(t: Tensor) -> bool:
    """Not a sparse one, one expanded to terabytes, or one without its memory."""
    return t.numel() == 0 or (
        t.layout == torch.strided and t.numel() < 2**24 and t.untyped_storage().nbytes() > 0
    )


def same(a: Any, b: Any) -> bool:
    """Structure, numbers and tensors, NaN where NaN; to rounding, as a product's sums depend on where numbers lie."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and _close(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    tolerance = 1e-5 if a.dtype == torch.float32 else 1e-13
    largest = float(a.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(a, b, tolerance, tolerance * largest, equal_nan=True)


class RefusedError(Exception):
    """A documented error."""


def attempt(function: Callable[..., Any], arguments: list[Any]) -> Any:
    """The result. RefusedError for one that is documented; an internal assertion is not."""
    try:
        return function(*arguments)
    except IndexError as error:
        if "Dimension out of range" not in str(error):  # an encoder's own, which is given x as it comes
            raise
        raise RefusedError from error
    except DOCUMENTED as error:
        text = str(error)
        if "INTERNAL ASSERT" in text or "Expected all tensors" in text:
            raise AssertionError(f"not in our words: {type(error).__name__}: {text}") from error
        raise RefusedError from error


def run_case(seed: int) -> str:
    """One call, and what it is judged by."""
    _limit_memory()
    random.seed(seed)
    torch.manual_seed(seed)
    entry = entries()[seed % len(entries())]
    drawn = Arguments()
    arguments = [drawn.of(entry.place, entry.name, name) for name in entry.arguments]
    changes = random.choice((0, 1, 1, 1, 2, 3)) if arguments else 0
    if changes and random.random() < 0.03:
        at = random.randrange(len(arguments))
        arguments[at] = empty_one(arguments[at])
    else:
        for _ in range(changes):
            at = random.randrange(len(arguments))
            arguments[at] = spoil(arguments[at])
    call = ", ".join(
        f"{name}={_brief(value)}" for name, value in zip(entry.arguments, arguments, strict=True)
    )
    try:
        return _judge(entry, arguments, changes)
    except Exception as error:
        raise AssertionError(f"{entry.place} {entry.name}({call})") from error


def _judge(entry: Entry, arguments: list[Any], changes: int) -> str:
    if entry.place == "meta":
        return _judge_meta(entry, arguments)
    if entry.place in ("torch.ops", "ops") and random.random() < 0.3:
        return _judge_gradient(entry, arguments)
    try:
        result = attempt(entry.function, arguments)
    except RefusedError as refusal:
        if changes == 0:
            raise AssertionError("a good call was refused") from refusal
        return "refused"
    if entry.name == "build_info":
        return "taken"
    given = list(tensors_in(arguments))
    meta = [t.is_meta for t in given]  # with nothing but such tensors it is a fake kernel that was called
    assert not any(meta) or all(meta), "a tensor without numbers was taken"
    if all(map(can_be_copied, given)) and not any(t.is_meta for t in given):
        again = entry.function(*mapped(arguments, dense))
        assert same(result, again), "a tensor's layout changes the result"
    return _compare_network(entry, arguments, result) or "taken"


def _judge_meta(entry: Entry, arguments: list[Any]) -> str:
    """The fake kernel with all tensors or all but one on the meta device."""
    # A tensor in the place of a flag or a number stays: what it says is asked.
    moves = ["Tensor" in str(argument.type) for argument in entry.function._schema.arguments]
    given = list(tensors_in([value for value, may in zip(arguments, moves, strict=True) if may]))
    left = random.choice(given) if given and random.random() < 0.4 else None
    mixed = left is not None and len({id(t) for t in given}) > 1
    if not all(map(can_be_copied, given)):
        return "not moved"
    moved = [
        mapped(value, lambda t: t if mixed and t is left else t.to("meta")) if may else value
        for value, may in zip(arguments, moves, strict=True)
    ]
    try:
        fake = attempt(entry.function, moved)
    except RefusedError:
        fake = None
    except (IndexError, AttributeError) as error:
        raise AssertionError("the fake kernel fails in Python's words") from error
    devices = {
        t.device.type for t in tensors_in([value for value, may in zip(moved, moves, strict=True) if may])
    }
    if fake is not None and len(devices) > 1:
        raise AssertionError("tensors on two devices were taken")
    if len(devices) > 1:
        return "two devices refused"
    try:
        real = attempt(entry.function, arguments)
    except RefusedError:
        return "refused"
    assert fake is not None, "the fake kernel refuses what the kernel takes"
    assert same_shapes(fake, real), f"the fake kernel announces {_brief(fake)}, and {_brief(real)} comes"
    return "announced"


def same_shapes(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype
    return len(a) == len(b) and all(map(same_shapes, a, b))


def _judge_gradient(entry: Entry, arguments: list[Any]) -> str:
    """Some inputs require a gradient, which is then taken."""
    share = random.random()
    wanting = mapped(
        arguments,
        lambda t: t.detach().requires_grad_(random.random() < share) if t.is_floating_point() else t,
    )
    try:
        result = attempt(entry.function, wanting)
        outputs = [t for t in tensors_in(result) if t.requires_grad and t.is_floating_point()]
        if not outputs:
            return "taken"
        attempt(lambda: sum(t.sum() for t in outputs).backward(), [])
    except RefusedError:
        return "refused"
    for t in tensors_in(wanting):
        assert t.grad is None or t.grad.shape == t.shape
    return "differentiated"


def _compare_network(entry: Entry, arguments: list[Any], result: Any) -> str | None:
    """log p of what PyTorch makes of the network's text; where it raises, we should have raised."""
    if entry.place == "ops" or entry.name not in ("log_px", "decoder_gradient", "decoder_factors"):
        return None
    z, x, tensors, spec, text = arguments
    layers = ";".join(layer for layer in spec.split(";") if layer)
    likelihood = likelihood_of(text)
    outputs = run_spec(layers, tensors, z.flatten(0, -2)) if layers else z.flatten(0, -2)
    if not bool(x.isfinite().all()):  # which is no class
        return None
    rows = x.repeat(len(outputs) // len(x), 1) if len(x) else x
    wanted = likelihood.log_prob(outputs, rows)
    found = (result if entry.name == "log_px" else result[0]).flatten()
    tolerance = 1e-3 if found.dtype == torch.float32 else 1e-9
    # What becomes of numbers near the largest float is for tests of each activation to say.
    if all(bool((t.abs() < 1e6).all()) for t in (z, x, outputs, *tensors)) and bool(wanted.isfinite().all()):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        return "agreed"
    return None


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return (
            f"{value.dtype} {list(value.shape)} of strides {value.stride() if not value.is_sparse else '-'}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_brief, value)) + "]"
    return repr(value)[:300]


@functools.cache
def _limit_memory() -> None:
    """An allocation of terabytes fails everywhere; one of some gigabytes is to fail here, too."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))

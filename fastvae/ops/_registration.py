"""What every operator does in the same way: refusals, autocast, and reading the decoder."""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastvae._compiling import is_compiling
from fastvae._extension import raw
from fastvae.arguments import expect_numbers
from fastvae.decoding import check_outputs, contradiction
from fastvae.likelihoods import Bernoulli, Likelihood
from fastvae.lowering import CoupledSamples, LoweredNetwork, UnsupportedLayer, lower
from fastvae.lowering.checks import PLAIN, check_is_module, check_uncoupled, has_hooks
from fastvae.lowering.errors import NotADecoder
from fastvae.lowering.traced import refusal_traced
from fastvae.network.cache import ReadNetwork, read_network
from fastvae.network.chain import lowered_chain
from fastvae.network.heads import Head
from fastvae.network.sweeps import Sweeps
from fastvae.private import origin_of


def cast_under_autocast(name: str) -> None:
    """Under autocast, run ``fastvae::<name>`` in float32 whatever the dtypes of its inputs."""
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"fastvae::{name}", device, torch.float32)


def float32_under_autocast(tensor: Tensor) -> Tensor:
    """The tensor as autocast will hand it to an operator, so that what takes its dtype is not rounded."""
    if tensor.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(tensor.device.type):
        return tensor.float()
    return tensor


def check_tensors(name: str, **arguments: object) -> None:
    """Raise TypeError, by name, for an argument that is no tensor."""
    for argument, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"fastvae::{name}: {argument}: expected a tensor, got {type(value).__name__}")


def check_memory(name: str, **tensors: Tensor) -> None:
    """Raise ValueError, by name, for a tensor that is not dense or without the memory that it stands for.

    Its owner may have taken that away, as sharded training does; PyTorch's own operations read it all the same.
    """
    at = raw.first_without_memory(list(tensors.values()))
    if at < 0:
        return
    argument, tensor = list(tensors.items())[at]
    if tensor.layout != torch.strided:
        raise ValueError(f"fastvae::{name}: {argument}: expected a dense tensor, got one of {tensor.layout}")
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.element_size()
    raise ValueError(
        f"fastvae::{name}: {argument}: expected a storage of at least {needed} bytes, got "
        f"{tensor.untyped_storage().nbytes()} bytes behind {list(tensor.shape)} {tensor.dtype}"
    )


def check_one_device(name: str, like: Tensor, like_name: str, **tensors: Tensor | Sequence[Tensor]) -> None:
    """In a fake kernel: refuse what the kernels refuse.

    A meta tensor among CPU ones brings real tensors here, which would come back uninitialised; None for a tensor
    that is not optional passes the schema.
    """
    for argument, value in {like_name: like, **tensors}.items():
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if tensor is None:
                raise TypeError(f"fastvae::{name}: {argument}: expected a tensor, got None")
            if tensor.device != like.device:
                raise ValueError(
                    f"fastvae::{name}: {argument}: expected {like.device} as {like_name}, "
                    f"got {list(tensor.shape)} on {tensor.device}"
                )


def check_rank(name: str, argument: str, tensor: Tensor, shape: str) -> None:
    """In a fake kernel: refuse a tensor with another number of dimensions than ``shape``, "[B, d]" say, has."""
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"fastvae::{name}: {argument}: expected shape {shape}, got {list(tensor.shape)}")


def empty_gradients(name: str, like: Tensor, tensors: Sequence[Tensor], needs: Sequence[int]) -> list[Tensor]:
    """In a fake kernel: room for the gradient to each tensor, of size 0 where none is needed."""
    if len(needs) != len(tensors):
        raise ValueError(f"fastvae::{name}: needs: expected {len(tensors)} flags, got {len(needs)}")
    return [like.new_empty(tensor.shape if need else 0) for tensor, need in zip(tensors, needs, strict=True)]


def refuse_forward_mode(name: str, *tensors: Tensor) -> None:
    """Raise if a tensor carries a tangent, before autograd raises without naming an alternative."""
    if is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"fastvae::{name}: forward-mode differentiation is not supported; use fastvae.reference.{name}"
        )


def refuse_function_transforms(name: str, *tensors: Tensor) -> None:
    """Raise under torch.func transforms (vmap, grad, jvp, ...), which would give zeros or a slow loop."""
    if is_compiling():
        return
    if (
        torch._C._functorch.maybe_get_level(tensors[0]) != -1
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        raise NotImplementedError(
            f"fastvae::{name}: torch.func transforms (vmap, grad, vjp, jvp, ...) are not supported; use "
            f"fastvae.reference.{name} inside them"
        )


_warned: dict[str, weakref.WeakSet[nn.Module]] = {}
_looked_at: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_warned_of_likelihood: dict[str, weakref.WeakSet[type]] = {}
_settled: weakref.WeakKeyDictionary[Sweeps, set[tuple[bool, ...]]] = weakref.WeakKeyDictionary()
"""What was read, and what it was found to serve: kinds of likelihood, in :func:`lower_or_read` where kernels do not."""
_without_kernels: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Decoders that were read because kernels did not take them."""


def is_swept_in_trace(decoder: nn.Module, likelihood: object = None, *others: object) -> bool:
    """Whether a call that Dynamo traces has no kernels: it is swept in PyTorch, or goes through autograd."""
    if not torch.compiler.is_dynamo_compiling():
        return False
    if refusal_traced(decoder) or any(other is not None for other in others):
        return True
    return isinstance(likelihood, Likelihood) and not likelihood.has_kernel


def lower_or_read(
    name: str,
    decoder: nn.Module,
    z: Tensor,
    instead: str,
    likelihood: Likelihood | None = None,
    *,
    condition: Tensor | None = None,
    flat: bool = True,
    read: bool = True,
    forward_only: bool = False,
    stacklevel: int = 4,
) -> LoweredNetwork | ReadNetwork | None:
    """The decoder's layers, down to the likelihood's natural parameters where one is given, compared at z [..., d].

    Kernels take no condition, and no codes that are not vectors (``flat``); those that run forward only take
    likelihoods of independent elements that the others do not.

    Where there are no kernels for decoder or likelihood, the decoder read for the sweeps in PyTorch (unless ``read`` is
    False). None where that is impossible, too: ``fastvae.ops.<name>`` then runs PyTorch's ``instead``, and a warning
    at ``stacklevel`` says so and why, once for a decoder or likelihood. While compiling it raises instead, and always
    where autograd cannot take the decoder either. TypeError for a decoder in half precision whose codes are not,
    outside of autocast.
    """
    if not is_compiling():
        check_is_module(f"fastvae::{name}: decoder", decoder)
    strip = likelihood is not None and likelihood.probs
    without_kernel = likelihood is not None and not (
        likelihood.has_kernel or (forward_only and likelihood.has_element_kernel)
    )
    asked: tuple[bool, ...] = (flat, condition is None, without_kernel, likelihood is None)
    if likelihood is not None:
        asked += (isinstance(likelihood, Bernoulli), likelihood.of_logits, strip)
    if read and not is_compiling() and decoder in _without_kernels and z.dim() > 1 and len(z):
        known = _known_reading(name, decoder, z, strip, condition, asked)
        if known is not None:
            return _as_chain(known, z, without_kernel or condition is not None)
    if without_kernel and (not read or is_compiling()):
        _warn_of_likelihood(name, type(likelihood), instead, stacklevel)
    try:
        if condition is not None or not flat:
            raise UnsupportedLayer(
                "lower: " + ("it takes a condition" if flat else "its codes are no vectors")
            )
        network = lower(decoder, strip_sigmoid=strip, compare_at=z)
    except (CoupledSamples, NotADecoder):
        raise
    except UnsupportedLayer as error:
        if without_kernel and not read:
            return None
        if is_compiling():
            raise
        _refuse_half(name, z, [p for p in decoder.parameters() if p.is_floating_point()])
        check_uncoupled(decoder)
        found, reason = _read(name, decoder, z, likelihood, condition) if read else (None, "")
        if found is not None:
            _without_kernels.add(decoder)
            _settled.setdefault(found.sweeps, set()).add(asked)
            return _as_chain(found, z, without_kernel or condition is not None)
        _warn_of_decoder(
            name,
            decoder,
            f"cannot be lowered, so it runs by PyTorch's {instead} instead, slower. {error}{reason}",
            stacklevel,
        )
        return None
    if without_kernel:
        found, _ = _read(name, decoder, z, likelihood) if read else (None, "")
        if found is None and read:
            _warn_of_likelihood(name, type(likelihood), instead, stacklevel)
        return found
    _refuse_half(name, z, network.tensors)
    _refuse_sigmoid(name, network, likelihood)
    return network


def read_decoder(
    name: str,
    decoder: nn.Module,
    z: Tensor,
    instead: str,
    likelihood: Likelihood | None,
    condition: Tensor | None = None,
) -> ReadNetwork | None:
    """The decoder for an operator that has no kernel: read for the sweeps in PyTorch, whatever its layers.

    As :func:`lower_or_read` it refuses and, where it is None, warns once. Tensors come in the dtype of z.
    """
    check_is_module(f"fastvae::{name}: decoder", decoder)
    _check_first_memory(name, decoder)
    strip = likelihood is not None and likelihood.probs
    asked: tuple[bool, ...] = ()
    if likelihood is not None:
        asked = isinstance(likelihood, Bernoulli), likelihood.of_logits, strip
    known = _known_reading(name, decoder, z, strip, condition, asked)
    if known is not None:
        return known
    own = [p for p in decoder.parameters() if p.is_floating_point()]
    network, reason = None, ""
    try:
        if condition is None and z.dim() == 2:
            network = lower(decoder, strip_sigmoid=strip, compare_at=z)
    except (CoupledSamples, NotADecoder):
        raise
    except UnsupportedLayer as error:
        reason = f"cannot be lowered: {error}"
    check_uncoupled(decoder)
    _refuse_half(name, z, own)
    if network is not None:
        _refuse_sigmoid(name, network, likelihood)
    # A decoder in half precision that autocast is to compute in float32 is read as it is.
    half = bool(own) and own[0].dtype in (torch.float16, torch.bfloat16) and own[0].dtype != z.dtype
    codes, given = z, condition
    if half:
        codes = z.to(own[0].dtype)
        given = given.to(own[0].dtype) if given is not None and given.is_floating_point() else given
    if len(z):
        found, unread = _read(name, decoder, codes, likelihood, given)
    else:
        one = None if given is None else given.new_zeros(1, *given.shape[1:])
        found, unread = _read(name, decoder, codes.new_zeros(1, *z.shape[1:]), likelihood, one)
        if found is not None:
            found = read_network(decoder, codes, condition=given, strip_sigmoid=strip)
    if found is not None:
        if half:
            return _in_dtype(found, z.dtype)
        _settled.setdefault(found.sweeps, set()).add(asked)
        return found
    _refuse_half(name, z, own, even_under_autocast=True)
    if network is not None:
        _refuse_codes(name, network, z)
    _warn_of_decoder(
        name, decoder, f"is not read, so it runs by PyTorch's {instead} instead, slower. {reason}{unread}"
    )
    return None


def _as_chain(network: ReadNetwork, z: Tensor, to_be_swept: bool) -> LoweredNetwork | ReadNetwork:
    """What was read of a decoder, for the kernels where it is a chain of their layers."""
    chain = None if to_be_swept else lowered_chain(network, z)
    return network if chain is None else chain


def _in_dtype(network: ReadNetwork, dtype: torch.dtype) -> ReadNetwork:
    return network._replace(
        tensors=[
            tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor
            for tensor in network.tensors
        ]
    )


def _refuse_sigmoid(name: str, network: LoweredNetwork, likelihood: Likelihood | None) -> None:
    if isinstance(likelihood, Bernoulli) and network.ends_in_sigmoid:
        raise ValueError(
            f"fastvae::{name}: likelihood: 'bernoulli' expects a decoder that returns logits, and this one ends in a "
            "Sigmoid; pass Bernoulli(probs=True), or take the Sigmoid off"
        )


def _refuse_codes(name: str, network: LoweredNetwork, z: Tensor) -> None:
    """Raise, in the kernels' words, where a chain of layers does not take codes like these."""
    tensors = [tensor.detach() for tensor in network.tensors]
    try:
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            torch.ops.fastvae.jacobian_l1(z.detach(), tensors, network.spec, [], 1, "sum")
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("fastvae::jacobian_l1", f"fastvae::{name}")) from None


def _warn_of_decoder(name: str, decoder: nn.Module, text: str, stacklevel: int = 4) -> None:
    if _has_hooks_of_ours(decoder):
        return
    warned = _warned.setdefault(name, weakref.WeakSet())
    if decoder not in warned:
        warned.add(decoder)
        warnings.warn(f"fastvae.ops.{name}: this decoder {text}", UserWarning, stacklevel=stacklevel)


def _has_hooks_of_ours(decoder: nn.Module) -> bool:
    """Whether it, or what it is made of, is a private copy that is watched for TracIn, and nobody else watches."""
    watched = [
        part for part in decoder.modules() if has_hooks(part) and not any(map(has_hooks, part.children()))
    ]
    origins = [origin_of(part) for part in watched]
    return bool(origins) and all(origin is not None and not has_hooks(origin) for origin in origins)


def _known_reading(
    name: str,
    decoder: nn.Module,
    z: Tensor,
    strip: bool,
    condition: Tensor | None,
    asked: tuple[bool, ...],
) -> ReadNetwork | None:
    """What was read of a decoder and found to serve; None where it is to be found out first."""
    with contextlib.suppress(UnsupportedLayer), torch.inference_mode(False):
        known = read_network(decoder, z, condition=condition, strip_sigmoid=strip)
        same = all(t.dtype == z.dtype for t in known.tensors if t is not None and t.is_floating_point())
        if same and asked in _settled.get(known.sweeps, ()):
            _check_network_memory(name, known)
            return known
    return None


def _read(
    name: str,
    decoder: nn.Module,
    z: Tensor,
    likelihood: Likelihood | None,
    condition: Tensor | None = None,
) -> tuple[ReadNetwork | None, str]:
    """The decoder for the sweeps in PyTorch, or why there is none."""
    tensors = [*decoder.parameters(), *decoder.buffers()]
    if z.dim() < 2 or not len(z) or any(t.is_floating_point() and t.dtype != z.dtype for t in tensors):
        return None, ""
    strip = likelihood is not None and likelihood.probs
    _check_first_memory(name, decoder)
    try:
        with torch.inference_mode(False):
            found = read_network(decoder, z, condition=condition, strip_sigmoid=strip)
    except CoupledSamples:
        raise
    except UnsupportedLayer as error:
        return None, f"; nor read as a graph: {error}"
    _check_network_memory(name, found)
    if likelihood is not None and condition is None:
        check_outputs(decoder, z, likelihood)
    elif (
        likelihood is not None and likelihood.of_logits and not strip and found.sweeps.program.ends_in_sigmoid
    ):
        raise contradiction(likelihood)
    return found, ""


def check_bound(name: str, encoder: object, decoder: object, beta: object) -> None:
    """Raise, outside of compilers, for networks that are no modules and for a beta that is no finite number."""
    if is_compiling():
        return
    check_is_module(f"fastvae::{name}: encoder", encoder)
    check_is_module(f"fastvae::{name}: decoder", decoder)
    expect_numbers(f"fastvae::{name}", beta=beta)
    if not math.isfinite(beta):  # type: ignore[arg-type]
        raise ValueError(f"fastvae::{name}: beta: expected a finite number, got {beta}")


def check_condition(name: str, condition: Tensor | None, rows: int) -> None:
    """Raise unless a condition, where there is one, is a tensor with a row for each sample."""
    if condition is None:
        return
    check_tensors(name, condition=condition)
    if condition.dim() == 0 or len(condition) != rows:
        raise ValueError(
            f"fastvae::{name}: condition: expected {rows} samples as z has, got {list(condition.shape)}"
        )


def _check_first_memory(name: str, decoder: nn.Module) -> None:
    """Once, since reading a decoder runs it; later calls look at the tensors that were found."""
    if decoder not in _looked_at:
        tensors = [*decoder.named_parameters(), *decoder.named_buffers()]
        check_memory(name, **{at: t for at, t in tensors if type(t) in PLAIN and t.layout == torch.strided})
        _looked_at.add(decoder)


def _check_network_memory(name: str, network: ReadNetwork) -> None:
    # Their names are made where one is refused alone: this is asked at every call.
    if raw.first_without_memory([t for t in network.tensors if t is not None]) >= 0:
        check_memory(
            name, **{f"decoder's tensor {at}": t for at, t in enumerate(network.tensors) if t is not None}
        )


def warn_of_head(name: str, head: Head, stacklevel: int) -> None:
    """Say once that a user's density runs by autograd, behind whatever becomes of the decoder."""
    if head.is_by_autograd:
        _warn_of_likelihood(name, type(head.density), "autograd", stacklevel)


def _warn_of_likelihood(name: str, kind: type, instead: str, stacklevel: int) -> None:
    """Say once that a user's likelihood has no kernel, as the docstrings of ours do; while compiling, raise."""
    is_ours = kind.__module__.startswith("fastvae.likelihoods.")
    reason = f"{kind.__name__} is a likelihood {'' if is_ours else 'of its own, '}without a kernel"
    if is_compiling():
        raise UnsupportedLayer(f"fastvae.ops.{name}: {reason}")
    known = _warned_of_likelihood.setdefault(name, weakref.WeakSet())
    if kind not in known and not is_ours:
        known.add(kind)
        warnings.warn(
            f"fastvae.ops.{name}: {reason}, so it runs by PyTorch's {instead} instead (same result, slower)",
            UserWarning,
            stacklevel=stacklevel,
        )


def _refuse_half(
    name: str, z: Tensor, tensors: Sequence[Tensor], *, even_under_autocast: bool = False
) -> None:
    """Raise TypeError where codes or decoder are in half precision, which only autocast turns into float32."""
    half = (torch.float16, torch.bfloat16)
    if z.dtype in half and not torch.is_autocast_enabled(z.device.type):
        kind = "Half" if z.dtype == torch.float16 else "BFloat16"
        raise TypeError(
            f"fastvae::{name}: z: expected float32 or float64, got {list(z.shape)} {kind} on {z.device}; to mend it: "
            "z.float() and decoder.float(), with torch.autocast around it for speed"
        )
    if z.dtype not in half and tensors and all(tensor.dtype in half for tensor in tensors):
        if torch.is_autocast_enabled(z.device.type) and not even_under_autocast:
            return
        raise TypeError(
            f"fastvae::{name}: decoder: expected parameters in float32 or float64, got {tensors[0].dtype}; to mend it: "
            "decoder.float(), with torch.autocast around it for speed"
        )

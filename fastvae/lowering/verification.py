"""Comparing a lowered network with the module that it was read from."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastvae._extension  # noqa: F401  (defines torch.ops.fastvae)
from fastvae._compiling import is_captured, is_compiling
from fastvae.likelihoods import Gaussian

from .checks import check_global_hooks, check_is_module
from .errors import UnsupportedLayer
from .structure import Structure, current, evaluate, forget

# Relative to the outputs: far above rounding, also that of TF32 on a GPU, and below another slope or layer.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
TOLERANCE_ON_A_GPU = {torch.float64: 1e-6, torch.float32: 2e-2}
_ROWS_OF_THE_FIRST_USE = 2


def verify(module: nn.Module, z: Tensor) -> None:
    """Check that the network that was read from a module gives the module's own output and gradient to z.

    Reading runs the forward once, with a stand-in for z. Whatever else it depends on is then fixed: a global or another
    object's attribute that changes later, a random number, the time of day. The operators compare outputs when they
    first use what was read; call this whenever such a thing may have changed. If it has, the reading is dropped, and
    the next operator reads the module again.

    Args:
        module: what an operator takes as its decoder.
        z: codes [B, d] to compare at, of the parameters' dtype (float32 or float64) and device.

    Raises:
        UnsupportedLayer: the two differ, by more than 1e-3 in float32 (2e-2 on a GPU, where convolutions may round to
            TF32) or 1e-6 in float64, relative to the size of output or gradient; or the module cannot be lowered.
        CoupledSamples: BatchNorm or Dropout in training mode.
        ValueError: z empty, not [B, d], or of another dtype or device.
        TypeError: ``module`` is not an ``nn.Module``.
    """
    check_is_module("verify: module", module)
    check_global_hooks()
    known, collected = current(module)
    tensors = evaluate(known, collected)
    if not isinstance(z, Tensor) or z.dim() != 2 or not _can_compare(z, tensors):
        got = f"{z.dtype} {list(z.shape)} on {z.device}" if isinstance(z, Tensor) else type(z).__name__
        like = (
            f"{tensors[0].dtype} on {tensors[0].device} as the parameters"
            if tensors
            else "float32 or float64"
        )
        raise ValueError(f"verify: z: expected codes [B, d], {like}, got {got}")
    error, what = _output_error(known, tensors, module, z), "output"
    if error is not None and error <= 1:
        error, what = _gradient_error(known, tensors, module, z), "gradient to z"
    if error is not None and not error <= 1:
        forget(module, known)
        raise _refusal(module, what, error * _tolerance(z))


def checked(
    module: nn.Module, known: Structure, tensors: list[Tensor], z: Tensor
) -> tuple[Structure, list[Tensor]]:
    """What was read of a module, compared with the module once; read again where it has changed since."""
    if not _can_compare(z, tensors):
        return known, tensors
    z = z.reshape(-1, z.shape[-1])
    error = _output_error(known, tensors, module, z)
    if error is not None and not error <= 1:
        forget(module, known)
        known, collected = current(module, known.form)
        tensors = evaluate(known, collected)
        error = _output_error(known, tensors, module, z)
        if error is not None and not error <= 1:
            refusal = _refusal(module, "output", error * _tolerance(z))
            known.failure = type(refusal), str(refusal)
            raise refusal
    known.checked = error is not None
    return known, tensors


def _can_compare(z: Tensor, tensors: list[Tensor]) -> bool:
    """Whether numbers can be looked at: not while compiling, tracing or capturing a CUDA graph."""
    if is_compiling() or type(z) is not Tensor or z.numel() == 0 or z.is_meta:
        return False
    if any(tensor.dtype != z.dtype or tensor.device != z.device for tensor in tensors):
        return False
    return z.dtype in _TOLERANCE and not is_captured(z)


def _tolerance(z: Tensor) -> float:
    return (TOLERANCE_ON_A_GPU if z.is_cuda else _TOLERANCE)[z.dtype]


def _settled(module: nn.Module) -> nn.Module:
    """The module, or a copy where a parametrisation moves on at each evaluation (spectral_norm in training)."""

    def moves(inner: nn.Module) -> bool:
        held = inner._modules.get("parametrizations")
        return held is not None and any(part.training for part in held.modules())

    if not any(moves(inner) for inner in module.modules()):
        return module
    twin = copy.deepcopy(module)
    for inner in list(twin.modules()):
        held = inner._modules.get("parametrizations")
        if held is not None:
            held.eval()
    return twin


@contextlib.contextmanager
def _plain(z: Tensor) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        yield


def _output_error(known: Structure, tensors: list[Tensor], module: nn.Module, z: Tensor) -> float | None:
    """How far the lowered network's output is off at the first codes, in units of the tolerance.

    None where nothing can be said: the module's own output is not finite, or the code does not fit either of them. The
    outputs meet in a density under a Gaussian around the module's own, because that is what the kernels give out.
    """
    z = z[:_ROWS_OF_THE_FIRST_USE].detach().clone()
    tensors = [tensor.detach() for tensor in tensors]
    with _plain(z):
        try:
            own = _settled(module)(
                z.clone() if known.form.shape is None else z.reshape(-1, *known.form.shape)
            )
            if known.form.two_heads and isinstance(own, (tuple, list)):
                own = torch.cat(tuple(own), 1)
        except torch.OutOfMemoryError:
            return None
        except Exception:
            # If the lowered network does not take such a code either, the operator says so.
            try:
                torch.ops.fastvae.jacobian_l1(z, tensors, known.spec, [], 1, "sum")
            except (TypeError, ValueError):
                return None
            return math.inf
        if not isinstance(own, Tensor) or own.dim() == 0 or len(own) != len(z) or own.dtype != z.dtype:
            return math.inf
        if own.numel() == 0:
            return None
        own = own.detach().reshape(len(z), -1)
        size = float(own.square().mean().sqrt())
        if not math.isfinite(size):
            return None
        scale = _tolerance(z) * (size or 1.0)
        try:
            density = torch.ops.fastvae.log_px(z[None], own, tensors, known.spec, Gaussian(scale).spec)
        except ValueError:
            return math.inf
    constant = own.shape[1] * (math.log(scale) + 0.5 * math.log(2 * math.pi))
    squares = float((-2 * (density.double() + constant) / own.shape[1]).max())
    # The density rounds to some 1e-6 of an element's constant.
    return math.sqrt(max(squares, 0.0)) / (1 + 1e-3)


def _gradient_error(known: Structure, tensors: list[Tensor], module: nn.Module, z: Tensor) -> float | None:
    """How far the lowered network's vector-Jacobian product is off, in units of the tolerance.

    One leapfrog step of sqrt(2) from rest moves z to J^T (x - y), under a Gaussian of scale 1.
    """
    point = z.detach().clone().requires_grad_()
    tensors = [tensor.detach() for tensor in tensors]
    with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
        own = _settled(module)(point)
        pattern = torch.cos(torch.arange(own.numel(), device=z.device).to(z)).reshape(own.shape)
        cotangent = (own.detach().square().mean().sqrt() + 1) * pattern
        if not own.requires_grad:
            return math.inf
        (wanted,) = torch.autograd.grad(own, point, cotangent, allow_unused=True, materialize_grads=True)
    observed = (own.detach() + cotangent).reshape(len(z), -1)
    at_rest, step, alpha = torch.zeros_like(z), z.new_tensor(math.sqrt(2)), z.new_ones(1)
    with _plain(z):
        found = torch.ops.fastvae.hamiltonian_flow(
            point.detach(), at_rest, observed, step, alpha, tensors, known.spec, Gaussian().spec, False, False
        )[0]
        size = float(wanted.norm() + z.norm())
        error = float((found - wanted).norm())
    return error / (_tolerance(z) * size) if math.isfinite(size) else None


def _refusal(module: nn.Module, what: str, error: float) -> UnsupportedLayer:
    off = f"is off by {error:.0e}, relative to its size" if math.isfinite(error) else "cannot be its own"
    return UnsupportedLayer(
        f"lower: the module itself ({type(module).__name__}): the {what} of the network read from it {off}; its "
        "forward depends on something that reading it once does not see, such as a global that changes"
    )

"""The Jacobian L1 penalty of a decoder: sum of |dy/dz|, with the gradient in closed form."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import reference
from fastvae._compiling import is_compiling
from fastvae._jacobian_reference import check_jacobian_options, resolve_latents
from fastvae.arguments import given
from fastvae.decoding import conditioned, ends_in_sigmoid
from fastvae.lowering import LoweredNetwork
from fastvae.lowering.checks import check_uncoupled
from fastvae.network.cache import ReadNetwork
from fastvae.network.differences import Differences
from fastvae.network.jacobian import Plan
from fastvae.network.jacobian import jacobian_l1 as sweep_jacobian
from fastvae.network.sweeps import usual_tensor
from fastvae.ops._in_graphs import SWEEPS, Options, Sweep, swept_in_graph
from fastvae.ops._registration import (
    cast_under_autocast,
    check_condition,
    check_memory,
    check_one_device,
    check_rank,
    check_tensors,
    empty_gradients,
    float32_under_autocast,
    is_swept_in_trace,
    lower_or_read,
    read_decoder,
    refuse_forward_mode,
    refuse_function_transforms,
)


def jacobian_l1(
    decoder: nn.Module,
    z: Tensor,
    reduction: str = "mean",
    *,
    output: str = "identity",
    latents: Sequence[int] | Tensor | None = None,
    p: int = 1,
    condition: Tensor | None = None,
    estimator: str = "exact",
    step: float = 1e-2,
) -> Tensor:
    """Sum over latents i and outputs o of |d y_o / d z_i|^p, y = psi(decoder(z)), for each sample.

    Rhodes and Lee, Local Disentanglement in Variational Auto-Encoders Using Jacobian L1 Regularization,
    NeurIPS 2021, equation (5). The value is exact, and so is the gradient to z and the parameters where there is one.
    With smooth activations (Softplus, SiLU, GELU, Tanh) the mean gradient over random codes is that of the mean value.
    With ReLU and other kinks it is not: between kinks the Jacobian is constant, and how the mean changes as parameters
    move the kinks is in no sample's gradient. ``estimator="difference"`` takes forward differences as the authors do,
    (y(z + step e_i) - y(z)) / step, with their gradient, whose mean has most of that.

    Args:
        decoder: any module from codes to [B, ...] that treats each sample by itself. What
            :func:`fastvae.lowering.lower` can take runs in kernels; any other is read as a graph of operations and
            swept in PyTorch; what cannot be read runs through autograd, after one warning. Under ``torch.compile``
            the first two are part of a graph (the second as one call), and the last breaks it: with
            ``fullgraph=True`` an error.
        z: codes [B, d], or [B, ...] where the decoder takes such; float32 or float64, CPU or CUDA.
        reduction: "mean" or "sum" over the samples, or "none".
        output: psi, "identity" or "sigmoid" (for a decoder that returns logits).
        latents: the i to sum over, distinct integers in [0, d), counted through a code that is no vector; None for all.
        p: 1 for absolute values, 2 for squares (no root and no factor).
        condition: [B, ...], handed to the decoder after the codes.
        estimator: "exact", or "difference": the entries are forward differences, and the gradient is theirs. Every
            decoder that can be read then runs in sweeps, others through autograd, and under ``torch.compile`` all that
            the compiler takes. In TF32 or half precision differences are noise.
        step: of differences, in units of z; the authors' is 1e-3. A longer one sees more kinks and is further from the
            derivative.

    Returns:
        [] or, with "none", [B]; the gradient reaches z and every parameter of the decoder. "mean" and "sum" compute
        it together with the value when it will be wanted, and hold it until then; "none" computes the Jacobian again
        in the backward pass. A sample whose code is not finite is NaN.

    Raises:
        ValueError: shapes or devices that do not fit; an option that is not known; latents out of range or repeated; a
            step that is not positive; output="sigmoid" with a decoder that ends in a Sigmoid itself.
        TypeError: dtypes other than float32 and float64, or mixed; latents that are not integers.
        CoupledSamples: BatchNorm or Dropout in training mode, or another forward in which a sample's output depends on
            its batch.
        NotImplementedError: forward-mode differentiation, torch.func transforms, a second derivative.
    """
    if estimator != "difference" and is_swept_in_trace(decoder, None, condition):
        # What may be a symbol becomes a number; a tensor cannot.
        of = (
            latents if latents is None or isinstance(latents, Tensor) else tuple(map(operator.index, latents))
        )
        refusal = "its latents are a tensor" if isinstance(of, Tensor) else ""
        options = reduction, output, None if refusal else of, operator.index(p)
        swept = swept_in_graph("jacobian_l1", decoder, None, condition, options, z, refusal=refusal)
        if swept:
            return swept[0]
        found: Tensor = _outside_of_graphs(
            decoder, z, reduction, output=output, latents=latents, p=p, condition=condition
        )
        return found
    check_tensors("jacobian_l1", z=z)
    refuse_function_transforms("jacobian_l1", z)
    check_jacobian_options(reduction, output, p, estimator, step)
    if z.dim() < 2:
        raise ValueError(f"fastvae::jacobian_l1: z: expected shape [B, d], got {list(z.shape)}")
    check_condition("jacobian_l1", condition, z.shape[0])
    indices = resolve_latents(latents, math.prod(z.shape[1:]))
    z = float32_under_autocast(z)
    by_difference = estimator == "difference"
    network: LoweredNetwork | ReadNetwork | None
    if not by_difference:
        network = lower_or_read("jacobian_l1", decoder, z, "autograd", condition=condition, flat=z.dim() == 2)
    elif is_compiling():
        check_uncoupled(decoder)
        network = None
    else:
        network = read_decoder("jacobian_l1", decoder, z, "autograd", None, condition)
    if isinstance(network, ReadNetwork):
        with torch.autocast(z.device.type, enabled=False):
            return _jacobian_by_sweeps(
                network, z, reduction, output, indices, p, step if by_difference else None
            )
    if network is None:
        decode = conditioned(decoder, condition)

        def looked_at(point: Tensor) -> Tensor:
            y: Tensor = decode(point)
            # What a compiler traces says nothing of its graph.
            looks = output == "sigmoid" and not is_compiling()
            if looks and isinstance(y, Tensor) and ends_in_sigmoid(decoder, y):
                raise _sigmoid_of_a_sigmoid()
            return y

        with torch.autocast(z.device.type, enabled=False):
            return reference.jacobian_l1(
                looked_at, z, reduction, output=output, latents=indices, p=p, estimator=estimator, step=step
            )
    spec = network.spec
    if output == "sigmoid":
        if network.ends_in_sigmoid:
            raise _sigmoid_of_a_sigmoid()
        spec += ";sigmoid"
    refuse_forward_mode("jacobian_l1", z, *network.tensors)
    return torch.ops.fastvae.jacobian_l1(z, network.tensors, spec, indices, p, reduction)


# By this name, since Dynamo looks it up where the function is defined.
_outside_of_graphs: Any = torch.compiler.disable(jacobian_l1)


def _jacobian_by_sweeps(
    network: ReadNetwork,
    z: Tensor,
    reduction: str,
    output: str,
    latents: list[int],
    p: int,
    step: float | None,
) -> Tensor:
    sweeps = network.sweeps
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return _jacobian_by_sweeps(network, z.clone(), reduction, output, latents, p, step)
    check_memory("jacobian_l1", z=z)
    z = usual_tensor(z)
    refuse_forward_mode("jacobian_l1", z, *(tensor for tensor in network.tensors if tensor is not None))
    if output == "sigmoid":
        if sweeps.program.ends_in_sigmoid:
            raise _sigmoid_of_a_sigmoid()
        sweeps = sweeps.followed_by_sigmoid()
    plan = (
        Plan(sweeps, network.tensors, z, latents, p)
        if step is None
        else Differences(sweeps, network.tensors, z, latents, p, step)
    )
    return sweep_jacobian(plan, z, reduction)


def _run(network: ReadNetwork, likelihood: None, options: Options, z: Tensor) -> list[Tensor]:
    reduction, output, latents, p = options
    check_jacobian_options(reduction, output, p, "exact", 1.0)
    indices = resolve_latents(latents, math.prod(z.shape[1:]))
    return [_jacobian_by_sweeps(network, z, reduction, output, indices, p, None)]


def _shapes(options: Options, z: Tensor) -> list[Tensor]:
    return [z.new_empty(z.shape[:1] if options[0] == "none" else ())]


SWEEPS["jacobian_l1"] = Sweep(_run, _shapes)


def _sigmoid_of_a_sigmoid() -> ValueError:
    return ValueError(
        "fastvae::jacobian_l1: output: 'sigmoid' expects a decoder that returns logits, and this one ends in a "
        "Sigmoid; pass output='identity', or take the Sigmoid off"
    )


@torch.library.register_fake("fastvae::jacobian_l1")
def _(
    z: Tensor, parameters: Sequence[Tensor], network: str, latents: Sequence[int], p: int, reduction: str
) -> Tensor:
    check_one_device("jacobian_l1", z, "z", parameters=parameters)
    check_rank("jacobian_l1", "z", z, "[B, d]")
    return z.new_empty(z.shape[:1] if reduction == "none" else ())


@torch.library.register_fake("fastvae::jacobian_l1_with_gradient")
def _(
    cotangent: Tensor | None,
    z: Tensor,
    parameters: Sequence[Tensor],
    network: str,
    latents: Sequence[int],
    p: int,
    reduction: str,
    needs: Sequence[int],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    name = "jacobian_l1_with_gradient"
    check_one_device(name, z, "z", **given(cotangent=cotangent), parameters=parameters)
    check_rank(name, "z", z, "[B, d]")
    wanted = empty_gradients(name, z, (z, *parameters), needs)
    return z.new_empty(z.shape[:1] if reduction == "none" else ()), wanted[0], wanted[1:]


cast_under_autocast("jacobian_l1")

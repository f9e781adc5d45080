"""The Hamiltonian flow: K tempered leapfrog steps through a decoder, with the gradient in closed form."""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import reference
from fastvae._compiling import is_compiling
from fastvae._extension import raw
from fastvae.arguments import given
from fastvae.decoding import conditioned
from fastvae.likelihoods import Likelihood, resolve
from fastvae.likelihoods.learned import without_parameters
from fastvae.likelihoods.weighted import weighted
from fastvae.network.cache import ReadNetwork
from fastvae.network.flow import hamiltonian_flow as sweep_flow
from fastvae.network.heads import make_head
from fastvae.network.sweeps import Inputs, usual_tensor
from fastvae.ops._in_graphs import SWEEPS, WEIGHTS, Options, Sweep, swept_in_graph
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
    refuse_forward_mode,
    refuse_function_transforms,
    warn_of_head,
)
from fastvae.reference import Trajectory

STORE_LIMIT_BYTES = 2**30
"""memory="auto" keeps the activations of all steps up to this size, and recomputes them beyond it."""


def hamiltonian_flow(
    decoder: nn.Module,
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: Tensor | float | Sequence[float],
    alpha: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
    memory: str = "auto",
    return_trajectory: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """K tempered leapfrog steps through log p(x, z) = log p(x | decoder(z)) - |z|^2 / 2.

    With G(z) = grad_z log p(x, z), for k = 0 .. K - 1 (Caterini, Doucet, Sejdinovic, Hamiltonian Variational
    Auto-Encoder, NeurIPS 2018, algorithm 1):

        rho~ = rho_k + step_size_k / 2 G(z_k);   z_{k+1} = z_k + step_size_k rho~
        rho_{k+1} = alpha_k (rho~ + step_size_k / 2 G(z_{k+1}))

    K + 1 forces are evaluated, and the last one's decode gives log p(x | z_K). The gradient is exact (it passes
    through every force) and reaches z, rho, x, step_size, alpha and every parameter of the decoder.

    Args:
        decoder: any module from codes to natural parameters that treats each sample by itself. What
            :func:`fastvae.lowering.lower` can take runs in kernels; any other is read as a graph of operations and
            swept in PyTorch; what cannot be read runs through autograd, after one warning. Under ``torch.compile``
            the first two are part of a graph (the second as one call), and the last breaks it: with
            ``fullgraph=True`` an error. So do weights, and likelihoods with parameters.
        z: start [B, d], or [B, ...] where the decoder takes such codes; float32 or float64, CPU or CUDA.
        rho: momentum, of the shape of z.
        x: data, with as many elements a sample as the likelihood needs, in any shape; float, uint8 or bool.
        step_size: a number, [d], [K, 1] or [K, d], with d the numbers of a code; or of a code's shape, or K such, of
            which sizes of 1 are broadcast.
        alpha: [K], the factor on the momentum at the end of each step (1: no tempering).
        likelihood: "bernoulli", "gaussian", "categorical" or a :class:`fastvae.likelihoods.Likelihood`.
        condition: [B, ...], handed to the decoder after the codes: ``decoder(z, condition)``; constant along the
            trajectory, with a gradient where it is real.
        weight: [B, ...], at least 0, of x's elements, by which their parts of log p(x | z) are weighted: of the shape
            of x, or with sizes of 1 in its place. 0 leaves an element out, which may then be NaN. Such calls run the
            decoder in sweeps, not in kernels.
        memory: "store" keeps the activations of all steps for the backward pass, "recompute" only z_k
            and rho_k (peak memory then hardly grows with K; about a third more time), "auto" decides by size.
        return_trajectory: deprecated, see :func:`fastvae.ops.trajectory`: also return z, rho, log_px of every step.

    Returns:
        z_K and rho_K of the shape of z, log_px = log p(x | z_K) [B] in nats.

    Raises:
        ValueError: shapes, devices or a likelihood that do not fit; a Sigmoid at the decoder's end
            under "bernoulli".
        TypeError: dtypes other than float32 and float64, or mixed.
        CoupledSamples: BatchNorm or Dropout in training mode, or another forward in which a sample's output depends on
            its batch.
        NotImplementedError: forward-mode differentiation, torch.func transforms, a second derivative.
    """
    arguments = decoder, z, rho, x, step_size, alpha, likelihood, condition, weight, memory
    if not return_trajectory:
        return flow_and_points(*arguments)[0]
    warnings.warn(
        "fastvae.ops.hamiltonian_flow: return_trajectory goes with the next release; "
        "fastvae.ops.trajectory returns the trajectory",
        DeprecationWarning,
        stacklevel=2,
    )
    end, points = flow_and_points(*arguments, keep_points=True)
    return (*end, points)  # type: ignore[return-value]


def flow_and_points(
    decoder: nn.Module,
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: Tensor | float | Sequence[float],
    alpha: Tensor,
    likelihood: str | Likelihood,
    condition: Tensor | None,
    weight: Tensor | None,
    memory: str,
    *,
    keep_points: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], Trajectory | None]:
    """What ``hamiltonian_flow`` returns, and with ``keep_points`` every point, detached; the same arguments."""
    if memory not in ("auto", "store", "recompute"):
        raise ValueError(
            f"fastvae::hamiltonian_flow: memory: expected 'auto', 'store' or 'recompute', got {memory!r}"
        )
    if is_swept_in_trace(decoder, likelihood, condition, weight):
        steps = torch.as_tensor(step_size, dtype=z.dtype, device=z.device)
        swept = swept_in_graph(
            *("hamiltonian_flow", decoder, likelihood, condition, (memory,), z, rho, x, steps, alpha),
            refusal="" if weight is None else WEIGHTS,
        )
        if swept:
            return (swept[0], swept[1], swept[2]), Trajectory(*(points.detach() for points in swept[3:]))
        found: tuple[tuple[Tensor, Tensor, Tensor], Trajectory | None] = _outside_of_graphs(
            *(decoder, z, rho, x, step_size, alpha, likelihood, condition, weight, memory),
            keep_points=keep_points,
        )
        return found
    check_tensors("hamiltonian_flow", z=z, rho=rho, x=x, alpha=alpha)
    refuse_function_transforms("hamiltonian_flow", z)
    decoder, like = without_parameters(decoder, resolve(likelihood))
    if z.dim() < 2:
        raise ValueError(f"fastvae::hamiltonian_flow: z: expected shape [B, d], got {list(z.shape)}")
    check_condition("hamiltonian_flow", condition, z.shape[0])
    like = weighted("fastvae::hamiltonian_flow", like, weight, x)
    if alpha.dim() != 1:
        raise ValueError(f"fastvae::hamiltonian_flow: alpha: expected shape [K], got {list(alpha.shape)}")
    z, rho, alpha = (float32_under_autocast(tensor) for tensor in (z, rho, alpha))
    network = lower_or_read(
        *("hamiltonian_flow", decoder, z, "autograd", like),
        condition=condition,
        flat=z.dim() == 2,
        stacklevel=5,
    )
    if isinstance(network, ReadNetwork):
        with torch.autocast(z.device.type, enabled=False):
            return _flow_by_sweeps(network, z, rho, x, step_size, alpha, like, memory)
    if network is None:
        with torch.autocast(z.device.type, enabled=False):
            return reference.flow_and_points(
                conditioned(decoder, condition), z, rho, x, step_size, alpha, like, keep_points=keep_points
            )
    observed = observed_rows(x, z, like)
    step_sizes = torch.as_tensor(step_size, dtype=z.dtype, device=z.device)
    refuse_forward_mode("hamiltonian_flow", z, rho, observed, step_sizes, alpha, *network.tensors)
    store = memory == "store" or (
        memory == "auto"
        and _stash_numel(network.spec, like.spec, network.tensors, z, alpha.shape[0]) * z.element_size()
        <= STORE_LIMIT_BYTES
    )
    z_K, rho_K, log_px, z_steps, rho_steps, log_px_steps, _ = torch.ops.fastvae.hamiltonian_flow(
        z,
        rho,
        observed,
        step_sizes,
        alpha,
        network.tensors,
        network.spec,
        like.spec,
        store,
        keep_points,
    )
    if (base := like.base_measure(x, z.dtype)) is not None:
        log_px, log_px_steps = log_px + base, log_px_steps + base
    if not keep_points:
        return (z_K, rho_K, log_px), None
    return (z_K, rho_K, log_px), Trajectory(z_steps.detach(), rho_steps.detach(), log_px_steps.detach())


# By this name, since Dynamo looks it up where the function is defined.
_outside_of_graphs: Any = torch.compiler.disable(flow_and_points)


def _flow_by_sweeps(
    network: ReadNetwork,
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: Tensor | float | Sequence[float],
    alpha: Tensor,
    likelihood: Likelihood,
    memory: str,
) -> tuple[tuple[Tensor, Tensor, Tensor], Trajectory]:
    check_one_device("hamiltonian_flow", z, "z", rho=rho, x=x, alpha=alpha)
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            z, rho, x, alpha = (t.clone() for t in (z, rho, x, alpha))
            step_size = step_size.clone() if isinstance(step_size, Tensor) else step_size
            return _flow_by_sweeps(network, z, rho, x, step_size, alpha, likelihood, memory)
    z, rho, x, alpha = (usual_tensor(t) for t in (z, rho, x, alpha))
    step_size = usual_tensor(step_size) if isinstance(step_size, Tensor) else step_size
    reference.check_state(z, rho, alpha)
    check_memory("hamiltonian_flow", z=z, rho=rho, x=x, alpha=alpha)
    steps = reference.steps_of_codes(step_size, len(alpha), z)
    tensors = [tensor for tensor in network.tensors if tensor is not None]
    refuse_forward_mode("hamiltonian_flow", z, rho, x, steps, alpha, *tensors)
    kept = (len(alpha) + 1) * z.shape[0] * network.sweeps.kept_numbers * z.element_size()
    store = memory == "store" or (memory == "auto" and kept <= STORE_LIMIT_BYTES)
    inputs = Inputs(network.sweeps, z, network.tensors)
    head = make_head(likelihood, x, z)
    z_K, rho_K, log_px, *points = sweep_flow(network.sweeps, inputs, head, z, rho, steps, alpha, store)
    warn_of_head("hamiltonian_flow", head, stacklevel=6)
    return (z_K, rho_K, log_px), Trajectory(*points)


def _run(network: ReadNetwork, likelihood: Likelihood, options: Options, *inputs: Tensor) -> list[Tensor]:
    (memory,), (z, rho, x, steps, alpha) = options, inputs
    end, points = _flow_by_sweeps(network, z, rho, x, steps, alpha, likelihood, memory)
    return [*end, *points]


def _shapes(
    options: Options, z: Tensor, rho: Tensor, x: Tensor, steps: Tensor, alpha: Tensor
) -> list[Tensor]:
    rows, points = z.shape[:1], len(alpha) + 1
    ends = (z.shape, z.shape, rows)
    return [z.new_empty(shape) for shape in (*ends, *((points, *shape) for shape in ends))]


SWEEPS["hamiltonian_flow"] = Sweep(_run, _shapes)


def observed_rows(x: Tensor, z: Tensor, likelihood: Likelihood) -> Tensor:
    """x as [B, elements] in the dtype of z."""
    if x.dim() == 0 or x.shape[0] != z.shape[0]:
        raise ValueError(
            f"fastvae::hamiltonian_flow: x: expected {z.shape[0]} samples as z has, got {list(x.shape)}"
        )
    x = likelihood.as_float(x, z.dtype)
    return x if x.dim() == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:]))


_read_stash_shape = functools.lru_cache(maxsize=1024)(raw.hamiltonian_flow_stash)


@torch.compiler.assume_constant_result
def _stash_shape(
    spec: str,
    likelihood: str,
    shapes: tuple[tuple[int, ...], ...],
    latent_dim: int,
    element_size: int,
    cuda_index: int,
) -> tuple[int, int]:
    return _read_stash_shape(spec, likelihood, shapes, latent_dim, element_size, cuda_index)


def _stash_numel(spec: str, likelihood: str, tensors: Sequence[Tensor], z: Tensor, steps: int) -> int:
    """Numbers that the op keeps of the forward pass with memory="store"."""
    shapes: tuple[tuple[int, ...], ...] = tuple([tensor.shape for tensor in tensors])
    if type(z) is not Tensor or is_compiling():  # symbolic sizes become numbers
        shapes = tuple(tuple(operator.index(size) for size in shape) for shape in shapes)
    cuda_index = z.device.index or 0 if z.device.type == "cuda" else -1
    numel, multiple = _stash_shape(
        spec, likelihood, shapes, operator.index(z.shape[1]), z.element_size(), cuda_index
    )
    return (steps + 1) * ((z.shape[0] + multiple - 1) // multiple * multiple) * numel


@torch.library.register_fake("fastvae::hamiltonian_flow")
def _(
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: Tensor,
    alpha: Tensor,
    parameters: Sequence[Tensor],
    network: str,
    likelihood: str,
    store: bool,
    trajectory: bool,
) -> tuple[Tensor, ...]:
    check_one_device(
        "hamiltonian_flow", z, "z", rho=rho, x=x, step_size=step_size, alpha=alpha, parameters=parameters
    )
    check_rank("hamiltonian_flow", "z", z, "[B, d]")
    check_rank("hamiltonian_flow", "alpha", alpha, "[K]")
    B, d = z.shape
    points = alpha.shape[0] + 1
    return (
        z.new_empty(B, d),
        z.new_empty(B, d),
        z.new_empty(B),
        z.new_empty(points, B, d),
        z.new_empty(points, B, d),
        z.new_empty(points if trajectory else 0, B),
        z.new_empty(_stash_numel(network, likelihood, parameters, z, alpha.shape[0]) if store else 0),
    )


@torch.library.register_fake("fastvae::hamiltonian_flow_backward")
def _(
    grad_z: Tensor | None,
    grad_rho: Tensor | None,
    grad_log_px: Tensor | None,
    z: Tensor,
    rho: Tensor,
    x: Tensor,
    step_size: Tensor,
    alpha: Tensor,
    parameters: Sequence[Tensor],
    z_steps: Tensor,
    rho_steps: Tensor,
    stash: Tensor,
    network: str,
    likelihood: str,
    store: bool,
    needs: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    name = "hamiltonian_flow_backward"
    check_one_device(
        name,
        z,
        "z",
        **given(grad_z=grad_z, grad_rho=grad_rho, grad_log_px=grad_log_px),
        rho=rho,
        x=x,
        step_size=step_size,
        alpha=alpha,
        parameters=parameters,
        z_steps=z_steps,
        rho_steps=rho_steps,
        stash=stash,
    )
    wanted = empty_gradients(name, z, (z, rho, x, step_size, alpha, *parameters), needs)
    return wanted[0], wanted[1], wanted[2], wanted[3], wanted[4], wanted[5:]


cast_under_autocast("hamiltonian_flow")

"""log p(x | z) and its gradient to z, for any sampler: one forward and one reverse sweep of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import reference
from fastvae._compiling import is_compiling
from fastvae.decoding import conditioned
from fastvae.likelihoods import Likelihood, resolve
from fastvae.likelihoods.learned import without_parameters
from fastvae.likelihoods.weighted import weighted
from fastvae.lowering import UnsupportedLayer
from fastvae.network.cache import ReadNetwork
from fastvae.network.flow import log_px_and_force as sweep
from fastvae.network.heads import make_head
from fastvae.network.sweeps import Inputs
from fastvae.ops._in_graphs import SWEEPS, WEIGHTS, Options, Sweep, swept_in_graph
from fastvae.ops._registration import (
    check_condition,
    check_memory,
    check_tensors,
    float32_under_autocast,
    read_decoder,
    refuse_forward_mode,
    refuse_function_transforms,
    warn_of_head,
)

_NAME = "log_px_and_force"


def log_px_and_force(
    decoder: nn.Module,
    z: Tensor,
    x: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(x | z) and grad_z log p(x | z), what every sampler over a decoder's posterior is made of.

    The prior is not in it: for a standard normal one, grad_z log p(x, z) is the second result minus z. The gradient
    through both is exact, of second order where it passes through the force, and reaches z, x (where it is real and
    the likelihood has such a gradient) and every parameter of the decoder.

    Args:
        decoder: any module from codes to natural parameters that treats each sample by itself. Its forward is read
            once as a graph of operations and swept in PyTorch; one that cannot be read runs through autograd, after one
            warning. Under ``torch.compile`` the first is one call of the graph, and the second breaks it: with
            ``fullgraph=True`` an error. So do weights, and likelihoods with parameters.
        z: codes [B, d], or [B, ...] where the decoder takes such; float32 or float64.
        x: data, with as many elements a sample as the likelihood needs, in any shape; float, uint8 or bool.
        likelihood: "bernoulli", "gaussian", "categorical" or a :class:`fastvae.likelihoods.Likelihood`.
        condition: [B, ...], handed to the decoder after the codes: ``decoder(z, condition)``; with a gradient where it
            is real.
        weight: [B, ...], at least 0, of x's elements, by which their parts of log p(x | z) are weighted: of the shape
            of x, or with sizes of 1 in its place. 0 leaves an element out, which may then be NaN.

    Returns:
        log_px [B] in nats and force, of the shape of z, differentiable once; detached under ``no_grad`` and
        ``inference_mode``. Under autocast both are computed in float32. A sample with a NaN has NaN, and no other.

    Raises:
        ValueError: shapes, devices or a likelihood that do not fit; a Sigmoid at the decoder's end under "bernoulli".
        TypeError: dtypes other than float32 and float64, or mixed.
        CoupledSamples: BatchNorm or Dropout in training mode, or another forward in which a sample's output depends on
            its batch.
        UnsupportedLayer: inside ``torch.export``.
        NotImplementedError: forward-mode differentiation, torch.func transforms, a second derivative: use
            :func:`fastvae.reference.log_px_and_force`.
    """
    if torch.compiler.is_dynamo_compiling():
        refusal = "" if weight is None else WEIGHTS
        swept = swept_in_graph(_NAME, decoder, likelihood, condition, (), z, x, refusal=refusal)
        if swept:
            return swept[0], swept[1]
        return _outside_of_graphs(decoder, z, x, likelihood, condition=condition, weight=weight)
    if is_compiling():
        raise UnsupportedLayer(f"fastvae.ops.{_NAME}: it has no kernel, so it cannot be exported")
    decoder, like, z = _checked(decoder, z, x, likelihood, condition, weight)
    network = read_decoder(_NAME, decoder, z, "autograd", like, condition)
    return _evaluated(network, decoder, z, x, like, condition)


# By this name, since Dynamo looks it up where the function is defined.
_outside_of_graphs: Any = torch.compiler.disable(log_px_and_force)


def function_of_codes(
    decoder: nn.Module,
    z: Tensor,
    x: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """:func:`log_px_and_force` as a function of codes like z alone, checked and read once for many calls.

    Nobody may change the decoder meanwhile: it is for a private copy.
    """
    decoder, like, z = _checked(decoder, z, x, likelihood, condition, weight)
    network = read_decoder(_NAME, decoder, z, "autograd", like, condition)
    return lambda codes: _evaluated(network, decoder, codes, x, like, condition)


def _checked(
    decoder: nn.Module,
    z: Tensor,
    x: Tensor,
    likelihood: str | Likelihood,
    condition: Tensor | None,
    weight: Tensor | None,
) -> tuple[nn.Module, Likelihood, Tensor]:
    """The arguments, if they are fine, as :func:`_evaluated` takes them."""
    check_tensors(_NAME, z=z, x=x)
    refuse_function_transforms(_NAME, z)
    refuse_function_transforms(_NAME, x)
    decoder, like = without_parameters(decoder, resolve(likelihood))
    z = float32_under_autocast(z)
    _check(_NAME, z, x)
    like = weighted(f"fastvae::{_NAME}", like, weight, x)
    check_condition(_NAME, condition, len(z))
    if condition is not None:
        check_memory(_NAME, condition=condition)
    return decoder, like, z


def _evaluated(
    network: ReadNetwork | None,
    decoder: nn.Module,
    z: Tensor,
    x: Tensor,
    likelihood: Likelihood,
    condition: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(z.device.type, enabled=False):
        if network is None:
            return reference.log_px_and_force(conditioned(decoder, condition), z, x, likelihood)
        return _by_sweeps(_NAME, network, z, x, likelihood)


def _check(name: str, z: Tensor, x: Tensor) -> None:
    if z.dim() < 2:
        raise ValueError(f"fastvae::{name}: z: expected shape [B, d], got {list(z.shape)}")
    if z.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"fastvae::{name}: z: expected float32 or float64, got {z.dtype}")
    if z.is_meta:
        raise ValueError(f"fastvae::{name}: z: expected a tensor with numbers, got one on {z.device}")
    if x.dim() == 0 or len(x) != len(z):
        raise ValueError(f"fastvae::{name}: x: expected {len(z)} samples as z has, got {list(x.shape)}")
    if x.device != z.device:
        got = f"{list(x.shape)} on {x.device}"
        raise ValueError(f"fastvae::{name}: x: expected {z.device} as z, got {got}")
    check_memory(name, z=z, x=x)


def _by_sweeps(
    name: str, network: ReadNetwork, z: Tensor, x: Tensor, likelihood: Likelihood
) -> tuple[Tensor, Tensor]:
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return _by_sweeps(name, network, z.clone(), x.clone(), likelihood)
    refuse_forward_mode(name, z, x, *(tensor for tensor in network.tensors if tensor is not None))
    inputs = Inputs(network.sweeps, z, network.tensors)
    head = make_head(likelihood, x, z)
    found = sweep(network.sweeps, inputs, head, z)
    warn_of_head(name, head, stacklevel=6)
    return found


def _run(network: ReadNetwork, likelihood: Likelihood, options: Options, *inputs: Tensor) -> Sequence[Tensor]:
    z, x = inputs
    _check(_NAME, z, x)
    return _by_sweeps(_NAME, network, z, x, likelihood)


def _shapes(options: Options, z: Tensor, x: Tensor) -> list[Tensor]:
    return [z.new_empty(z.shape[:1]), z.new_empty(z.shape)]


SWEEPS[_NAME] = Sweep(_run, _shapes)

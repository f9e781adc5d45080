"""log p(x | z) of several codes for each x, without a gradient: the inside of importance sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvae import reference
from fastvae._compiling import is_compiling
from fastvae.likelihoods import Likelihood, resolve
from fastvae.likelihoods.fused import relative_log_prob
from fastvae.lowering import LoweredNetwork
from fastvae.lowering.checks import check_uncoupled
from fastvae.lowering.traced import refusal_traced
from fastvae.network.cache import check_samples_apart
from fastvae.network.tape import is_plain
from fastvae.ops._registration import (
    cast_under_autocast,
    check_condition,
    check_one_device,
    check_rank,
    check_tensors,
    float32_under_autocast,
    lower_or_read,
    refuse_forward_mode,
    refuse_function_transforms,
)


def log_px(
    decoder: nn.Module,
    z: Tensor,
    x: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    condition: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """log p(x_b | z_sb) in nats for every code z_sb of every x_b, forward only.

    The decoder runs in tiles that stay in a core's caches. On a CPU a last transposed convolution to 8 channels
    or more hands its outputs to the likelihood as they come, so that 256 logits a pixel are never stored; other
    last layers store those of one tile. x is not repeated.

    Args:
        decoder: a module that :func:`fastvae.lowering.lower` can read, from [B, d] to natural parameters.
            Any other module runs as it is, in parts of 2**20 outputs (on a GPU 2**22), after one warning; under
            ``torch.compile`` as a part of the graph.
        z: codes [S, B, d], or [S, B, ...] where the decoder takes such; float32 or float64, CPU or CUDA.
        x: data, B samples with as many elements as the likelihood needs, in any shape; float, uint8 or bool.
        likelihood: "bernoulli", "gaussian", "categorical" or a :class:`fastvae.likelihoods.Likelihood`.
        condition: [B, ...], handed to the decoder after the codes.
        weight: [B, ...], at least 0, of x's elements, by which their parts of log p(x | z) are weighted: of the shape
            of x, or with sizes of 1 in its place. 0 leaves an element out, which may then be NaN. Such calls run
            PyTorch's own operators.

    Returns:
        [S, B]; it has no gradient, and ``backward`` through it raises NotImplementedError.

    Raises:
        ValueError: shapes, devices or a likelihood that do not fit; a Sigmoid at the decoder's end under "bernoulli".
        TypeError: dtypes other than float32 and float64, or mixed.
        CoupledSamples: BatchNorm or Dropout in training mode, or another forward in which a sample's output depends on
            its batch. A model's ``log_px``, and the objectives, take such a decoder for training.
        NotImplementedError: forward-mode differentiation, torch.func transforms.
    """
    check_tensors("log_px", z=z, x=x)
    refuse_function_transforms("log_px", z)
    like = resolve(likelihood)
    if z.dim() < 3:
        raise ValueError(f"fastvae::log_px: z: expected shape [S, B, d], got {list(z.shape)}")
    if x.dim() == 0 or x.shape[0] != z.shape[1]:
        raise ValueError(f"fastvae::log_px: x: expected {z.shape[1]} samples as z has, got {list(x.shape)}")
    z = float32_under_autocast(z)
    check_condition("log_px", condition, z.shape[1])
    # Kernels know of no conditions, nor of weights.
    network = None
    if torch.compiler.is_dynamo_compiling() and refusal_traced(decoder):
        check_uncoupled(decoder)
    elif condition is None and weight is None:
        network = lower_or_read(
            *("log_px", decoder, z, "own operators", like), flat=z.dim() == 3, read=False, forward_only=True
        )
    if not isinstance(network, LoweredNetwork):
        if isinstance(decoder, nn.Module) and not is_compiling() and z.numel():
            check_samples_apart(decoder, z[0], condition)
        with torch.no_grad():
            fused = relative_log_prob if is_plain(z) and is_plain(x) else None
            return reference.log_px_in_parts(decoder, z, x, like, condition, weight, fused)
    observed = like._element_data(x, z.dtype).reshape(x.shape[0], math.prod(x.shape[1:]))
    refuse_forward_mode("log_px", z, observed, *network.tensors)
    text = like.spec if like.has_kernel else like.element_spec
    found = torch.ops.fastvae.log_px(z, observed, network.tensors, network.spec, text)
    base = like.base_measure(x, z.dtype)
    return found if base is None else found + base


@torch.library.register_fake("fastvae::log_px")
def _(z: Tensor, x: Tensor, parameters: Sequence[Tensor], network: str, likelihood: str) -> Tensor:
    check_one_device("log_px", z, "z", x=x, parameters=parameters)
    check_rank("log_px", "z", z, "[S, B, d]")
    return z.new_empty(z.shape[:2])


cast_under_autocast("log_px")

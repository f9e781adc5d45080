"""From an ``nn.Module`` to the layer list that csrc/network sweeps.

:func:`lower` reads the module's structure once (walking ``nn.Sequential``, tracing any other forward with
torch.fx), remembers it as long as the module does not change, and fetches the current tensors at every call.
It accepts only chains of stock layers without hooks and says by name what it cannot take; :func:`explain`
prints the same as a table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_global_hooks, check_is_module
from .errors import CoupledSamples, UnsupportedLayer
from .explain import explain
from .structure import Form, current, evaluate
from .traced import lower_traced
from .verification import checked, verify

__all__ = ["CoupledSamples", "LoweredNetwork", "UnsupportedLayer", "explain", "lower", "verify"]


class LoweredNetwork(NamedTuple):
    """A feed-forward network as csrc/network reads it.

    Each layer is one of these, with W, B, M, V indices into ``tensors``, -1 where there is no tensor (M, V: running
    mean and variance; a reshape is that of one sample and may have one -1):

        linear W B
        conv2d W B sh sw ph pw dh dw groups
        conv_transpose2d W B sh sw ph pw oph opw dh dw groups
        batch_norm W B M V eps
        reshape d1 d2 ...
        relu | leaky_relu slope | elu alpha | softplus beta threshold
        tanh | sigmoid | silu | gelu | gelu_tanh

    Attributes:
        spec: layers joined by ``;``, each its kind and arguments separated by blanks.
        tensors: the module's own parameters and buffers, and what its parametrisations compute from theirs;
            gradients flow to both.
        names: where in the module each tensor is, for example ``"2.weight"``.
    """

    spec: str
    tensors: list[Tensor]
    names: tuple[str, ...]

    @property
    def ends_in_sigmoid(self) -> bool:
        """Whether the output is a sigmoid's, reshaped or not: probabilities and not natural parameters."""
        layers = [layer for layer in self.spec.split(";") if not layer.startswith("reshape")]
        return len(layers) > 0 and layers[-1] == "sigmoid"


def lower(
    module: nn.Module,
    *,
    strip_sigmoid: bool = False,
    compare_at: Tensor | Callable[[], Tensor] | None = None,
    shape: Sequence[int] | None = None,
    two_heads: bool = False,
    without_effects: bool = False,
) -> LoweredNetwork:
    """Read a module as a chain of layers.

    The structure is cached weakly for each module, and read again when a training flag, a hook, a child, a
    parameter's name or an attribute changed. A parametrised tensor (spectral_norm, weight_norm) is evaluated
    once a call. Under ``torch.compile`` the structure is a constant guarded by the same facts (hooks
    and objects excepted, which Dynamo does not guard) and the tensors are inputs.

    What else a forward reads (a global, another object's attribute, a random number) is fixed as it was at the
    reading; :func:`verify` finds out whether that still holds.

    Args:
        module: the decoder, from z [B, d] to natural parameters; any floating dtype and device.
        strip_sigmoid: take off the sigmoid that the module ends in.
        compare_at: codes [..., d], or a function that gives some. When what was read is first used with some, its
            output at the first two of them is compared with the module's own, and another output refused. Not while
            compiling or capturing a CUDA graph, and with codes of another dtype, device or size than the module's left
            to the caller.
        shape: of a sample that the module takes, such as an encoder's image; the layers then begin with rows of as many
            elements.
        two_heads: take a module that returns two tensors, of two Linear layers on one trunk or the halves of one, as
            one that returns both side by side. The tensors of two layers come one below the other as one, whose name is
            both of theirs; in their own places are empty ones.
        without_effects: refuse a forward that may do more than compute its result, such as keep or count something:
            for who runs the layers in place of the module.

    Returns:
        The layers with the current tensors. A tensor may occur twice if two layers share it.

    Raises:
        CoupledSamples: BatchNorm or Dropout in training mode.
        UnsupportedLayer: a layer, hook, tensor type, branch or unused parameter that cannot be taken; names
            it and the reason. Under ``torch.compile(fullgraph=True)`` it arrives inside Dynamo's own error.
        ValueError: a convolution with numbers that PyTorch refuses as well, such as a stride of 0;
            ``strip_sigmoid=True`` and the module does not end in a sigmoid.
        TypeError: ``module`` is not an ``nn.Module``.
    """
    # Symbolic sizes become numbers.
    sizes = None if shape is None else tuple([operator.index(size) for size in shape])
    form = Form(sizes, two_heads, without_effects)
    if torch.compiler.is_dynamo_compiling():
        return LoweredNetwork(*lower_traced(module, strip_sigmoid, form))
    check_is_module("lower: module", module)
    check_global_hooks()
    known, collected = current(module, form)
    tensors = evaluate(known, collected)
    if compare_at is not None and not known.checked:
        codes = compare_at if isinstance(compare_at, Tensor) else compare_at()
        known, tensors = checked(module, known, tensors, codes)
    return LoweredNetwork(known.spec_for(strip_sigmoid), tensors, known.names)

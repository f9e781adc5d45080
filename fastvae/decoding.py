"""From codes to the natural parameters of a likelihood, and whether a decoder and a likelihood fit each other."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastvae._compiling import is_captured, is_compiling, is_watched
from fastvae.modes import modes_kept
from fastvae.sigmoids import SigmoidInputs, ending_of_module, ending_of_output

if TYPE_CHECKING:
    from fastvae.likelihoods import Likelihood
    from fastvae.lowering import LoweredNetwork

__all__ = [
    "called_on_copies",
    "check_decoder",
    "conditioned",
    "ends_in_sigmoid",
    "is_unobserved",
    "natural_parameters",
    "transformed",
]

# As much as rounding puts a probability beyond 0 or 1.
_SLACK = 1e-3

# Decoders that fit, or of which a warning said that they may not: under likelihoods that take logits, and others.
_settled: tuple[weakref.WeakSet[nn.Module], weakref.WeakSet[nn.Module]] = (
    weakref.WeakSet(),
    weakref.WeakSet(),
)

# Decoders whose layers do not end in a Sigmoid, as far as they tell.
_without_sigmoid: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_decoder(decoder: nn.Module, likelihood: Likelihood) -> LoweredNetwork | None:
    """Raise ValueError if the decoder's last layer contradicts the likelihood.

    A decoder that ends in a Sigmoid returns probabilities, which ``Bernoulli()`` would read as logits; one
    that does not is no decoder for ``Bernoulli(probs=True)``. Returns the decoder's layers as they are in
    eval mode, or None if it cannot be lowered; its first outputs are then looked at (``natural_parameters``).
    """
    from fastvae.lowering import UnsupportedLayer, lower

    network = None
    with modes_kept(decoder), contextlib.suppress(UnsupportedLayer):
        # Not eval(), which a user's module may have a version of its own of.
        for module in decoder.modules():
            module.training = False
        network = lower(decoder)
    if not likelihood.of_logits:
        return network
    if network is None:
        if not likelihood.probs and ending_of_module(decoder) == "sigmoid":
            raise contradiction(likelihood)
    elif network.ends_in_sigmoid != likelihood.probs:
        raise contradiction(likelihood)
    else:
        _settled[likelihood.probs].add(decoder)
    return network


def called_on_copies(network: Callable[..., Any], *given: Tensor) -> Any:
    """What a network makes of copies of tensors, which it may change in place (``x -= 0.5``, ``ReLU(inplace=True)``).

    What was given is still needed: codes for a divergence, x for the likelihood, both by whoever holds them.
    """
    return network(*(_copied(tensor) for tensor in given))


def _copied(tensor: Tensor) -> Tensor:
    """ValueError where its owner has emptied its storage, of which PyTorch's copy ends the process."""
    if not is_compiling() and type(tensor) is Tensor and not transformed() and tensor.numel():
        with contextlib.suppress(RuntimeError):  # without memory of its own, such as a meta tensor
            if tensor.untyped_storage().nbytes() == 0:
                raise ValueError(
                    f"a network's input: expected a tensor with its numbers, got {tensor.dtype} "
                    f"{list(tensor.shape)} with an empty storage"
                )
    return tensor.clone()


def natural_parameters(
    decoder: Callable[..., Tensor], z: Tensor, likelihood: Likelihood, condition: Tensor | None = None
) -> Tensor:
    """Natural parameters [B, ...] of p(x | z), from the decoder itself, in its layout.

    Of a decoder that ends in a Sigmoid, as ``Bernoulli(probs=True)`` wants it, they are what went into that
    Sigmoid: its output has lost what is beyond its rounding.

    Raises:
        TypeError: the decoder returned no tensor.
        ValueError: a decoder of logits that ends in a Sigmoid, or one of probabilities whose first outputs
            are none. Where neither its layers nor autograd tell, a warning if the first outputs are all in [0, 1].
    """
    given = (z,) if condition is None else (z, condition)
    if is_compiling():
        return likelihood.params_of_output(called_on_copies(decoder, *given))
    if not likelihood.probs or _is_compiled(decoder):
        output = called_on_copies(decoder, *given)
        _look_at(output, decoder, likelihood)
        return likelihood.params_of_output(output)
    with SigmoidInputs() as inputs:
        output = called_on_copies(decoder, *given)
    logits = inputs.logits_of(output)
    if logits is not None:
        return logits
    _look_at(output, decoder, likelihood)
    return likelihood.params_of_output(output)


def conditioned(decoder: Callable[..., Tensor], condition: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The decoder as a function of codes alone; of several times as many, repeated one after the other."""
    if condition is None:
        return decoder

    def decode(z: Tensor) -> Tensor:
        times = len(z) // max(len(condition), 1)
        found: Tensor = decoder(z, condition.repeat(times, *[1] * (condition.dim() - 1)))
        return found

    return decode


def check_outputs(decoder: nn.Module, z: Tensor, likelihood: Likelihood) -> None:
    """Raise once for a decoder whose first outputs cannot be what the likelihood takes them for; ValueError."""
    if likelihood.of_logits and decoder not in _settled[likelihood.probs]:
        with torch.inference_mode(False), torch.enable_grad():
            natural_parameters(decoder, z[:2].detach().clone(), likelihood)


def _is_compiled(decoder: object) -> bool:
    """Whether torch.compile has a hand in the decoder, which a mode would cut into pieces."""
    return isinstance(decoder, nn.Module) and any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in decoder.modules()
    )


def ends_in_sigmoid(decoder: nn.Module, output: Tensor) -> bool:
    """Whether a decoder that is not lowered computed this output by a sigmoid; its layers are looked through once."""
    ending = ending_of_output(output)
    if ending == "unknown" and decoder not in _without_sigmoid:
        ending = ending_of_module(decoder)
        if ending != "sigmoid":
            _without_sigmoid.add(decoder)
    return ending == "sigmoid"


def transformed() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, ...) is at work, under which no value can be looked at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_unobserved(tensor: object) -> bool:
    """Whether nobody looks on who has to see PyTorch's own operators: a compiler, a mode, a transform, forward mode."""
    if is_compiling() or type(tensor) not in (Tensor, nn.Parameter) or transformed():
        return False
    return not (torch._C._len_torch_dispatch_stack() or is_watched() or forward_ad._current_level >= 0)


def _look_at(output: Any, decoder: Any, likelihood: Likelihood) -> None:
    """Once for a decoder: whether its outputs can be what the likelihood takes them for."""
    if not likelihood.of_logits or not isinstance(output, Tensor) or not isinstance(decoder, nn.Module):
        return
    settled = _settled[likelihood.probs]
    if decoder in settled or transformed() or not output.numel():
        return
    if is_captured(output):
        return
    if not likelihood.probs:
        ending = ending_of_output(output)
        ending = ending_of_module(decoder) if ending == "unknown" else ending
        if ending == "sigmoid":
            raise contradiction(likelihood)
        if ending == "signed":
            settled.add(decoder)
            return
    low, high = torch.stack(output.detach().aminmax()).tolist()
    if likelihood.probs and (low < -_SLACK or high > 1 + _SLACK):
        raise ValueError(
            f"likelihood: {likelihood} expects a decoder that returns probabilities, and this "
            f"{type(decoder).__name__} returned values from {low:.6g} to {high:.6g}; for logits pass 'bernoulli'"
        )
    # All the same is what a last layer gives that starts at zero.
    if not likelihood.probs and 0 <= low < high <= 1:
        warnings.warn(
            f"likelihood: {likelihood} takes the decoder's outputs for logits, and the first ones of this "
            f"{type(decoder).__name__} are all in [0, 1]; if they are probabilities, pass Bernoulli(probs=True)",
            UserWarning,
            stacklevel=3,
        )
    settled.add(decoder)


def contradiction(likelihood: Likelihood) -> ValueError:
    """The error for a decoder that ends otherwise than its likelihood expects."""
    wanted = "ends in a Sigmoid" if likelihood.probs else "returns logits, and this one ends in a Sigmoid"
    remedy = "for probabilities pass Bernoulli(probs=True), for logits 'bernoulli'"
    return ValueError(f"likelihood: {likelihood} expects a decoder that {wanted}; {remedy}")

"""What a model is given and what its networks return: read, or refused in words that say what to do."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvae.likelihoods.weights import check_weights
from fastvae.models.outputs import SelectOutputs, names_in

__all__ = [
    "JoinedEncoder",
    "bounded",
    "check_condition",
    "check_is_tensor",
    "check_observed",
    "explained",
    "half_dtype_of",
    "needs_condition",
    "split_posterior",
    "takes_condition",
]


def check_is_tensor(owner: object, x: object) -> None:
    """TypeError, with the way to one, for an x that is no tensor."""
    if isinstance(x, Tensor):
        return
    name, kind = type(owner).__name__, type(x).__name__
    batch = isinstance(x, (tuple, list, dict))
    remedy = (
        "of a loader's batch pass the images, fastvae.data.images_of(batch)"
        if batch
        else "torch.as_tensor(x)"
    )
    raise TypeError(f"{name}: x: expected a tensor [B, ...], got {kind}; to mend it: {remedy}")


def takes_condition(module: nn.Module) -> bool:
    """Whether a network is called with a condition: its second argument has no default, or None."""
    inner: Any = module
    while inner is not None:
        module = inner
        # What is wrapped says what it takes: by SelectOutputs, torch.compile or data parallel wrappers.
        places: tuple[str, ...] = ("network",) if isinstance(module, SelectOutputs) else ("_orig_mod",)
        places += ("module",) if isinstance(module, (nn.DataParallel, DistributedDataParallel)) else ()
        inner = next((module._modules[name] for name in places if name in module._modules), None)
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind == p.KEYWORD_ONLY and p.name == "condition" for p in parameters):
        raise ValueError(
            f"condition: expected networks that take it as their second argument, got {type(module).__name__}, whose "
            "forward takes it by name alone"
        )
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) > 1:
        return positional[1].default in (inspect.Parameter.empty, None)
    return any(p.kind == p.VAR_POSITIONAL for p in parameters)


def needs_condition(module: nn.Module) -> bool:
    """Whether a network cannot be called without a second argument."""
    # TorchScript's modules have none of a class of theirs.
    forward = getattr(type(module), "forward", None)
    code = getattr(forward, "__code__", None)
    # Cheap, as it is asked at each call: two arguments besides self, without defaults.
    if code is None or code.co_argcount != 3:
        return False
    return not getattr(forward, "__defaults__", None)


def check_condition(owner: object, condition: object, rows: int) -> None:
    """TypeError or ValueError for a condition that is no tensor with a row for each sample."""
    name = type(owner).__name__
    if not isinstance(condition, Tensor):
        raise TypeError(f"{name}: condition: expected a tensor [B, ...], got {type(condition).__name__}")
    if condition.dim() == 0 or len(condition) != rows:
        raise ValueError(f"{name}: condition: expected {rows} rows as x has, got {list(condition.shape)}")


def check_observed(model: Any, x: Tensor, weight: Tensor | None) -> None:
    """ValueError for what is no data of a model's likelihood where its weight is not 0, or for unfit weights."""
    if weight is not None:
        check_weights(type(model).__name__, weight)
        x = x[weight.expand(x.shape) != 0]
    model.likelihood.check(x)


def half_dtype_of(module: nn.Module) -> torch.dtype | None:
    """bfloat16 or float16, where the module's first floating parameter is of it."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


def explained(error: Exception, model: nn.Module, role: str, given: Tensor) -> Exception | None:
    """An error in place of a network's own that says what to do, or None."""
    name, text = type(model).__name__, str(error)
    if isinstance(error, TypeError) and "missing 1 required positional argument" in text:
        return TypeError(
            f"{name}: the {role} takes a condition, and none was given; pass condition= ({text})"
        )
    # GroupNorm says the same of one image whose groups are single values, in eval mode too.
    coupled = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
    per_channel = isinstance(error, ValueError) and "more than 1 value per channel" in text
    if per_channel and coupled:
        return ValueError(
            f"{name}: {role}: BatchNorm in training mode expects more than one value a channel, got a batch of "
            f"{given.shape[0]}; leave such a batch out (DataLoader(drop_last=True)), make batches larger or call "
            "model.eval()"
        )
    if per_channel or (isinstance(error, ValueError) and "more than 1 spatial element" in text):
        kind = "GroupNorm" if per_channel else "InstanceNorm"
        return ValueError(
            f"{name}: {role}: {kind} expects more than one value to take the mean of, in eval mode too, and got one: a "
            "single position of a single channel; leave the layer out there, or put it where images are larger"
        )
    if "(while checking arguments for embedding)" in text:
        return TypeError(
            f"{name}: {role}: an Embedding expects class indices, and x reaches the {role} as floats in [0, 1]; round "
            "them back first, (x * (num_classes - 1)).round().long()"
        )
    return None


def split_posterior(model: nn.Module, output: object, batch: int) -> tuple[Tensor, Tensor]:
    """The encoder's output as (mu, logvar), [batch, d] each; ValueError if it is neither of what it may be."""

    def refuse(found: str) -> ValueError:
        return ValueError(
            f"{type(model).__name__}: encoder: expected [B, 2d] or (mu [B, d], logvar [B, d]) with B = {batch}, "
            f"got {found}"
        )

    if isinstance(output, Tensor):
        if output.dim() != 2 or output.shape[1] % 2 or output.shape[0] != batch:
            raise refuse(f"a tensor {list(output.shape)}")
        mu, logvar = output.chunk(2, dim=1)
        return mu, logvar
    if isinstance(output, torch.distributions.Distribution):
        raise refuse(
            f"a distribution, {type(output).__name__}; to mend it: return (q.mean, 2 * q.stddev.log()), of a normal "
            "one with independent elements"
        )
    if not (
        isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(o, Tensor) for o in output)
    ):
        raise refuse(
            f"{type(output).__name__}; to choose among its parts ({names_in(output)}): "
            "fastvae.models.SelectOutputs(encoder, mu, logvar) with the names or places of the two"
        )
    mu, logvar = output
    if mu.dim() != 2 or mu.shape != logvar.shape or mu.shape[0] != batch:
        raise refuse(f"({list(mu.shape)}, {list(logvar.shape)})")
    return mu, logvar


class JoinedEncoder(nn.Module):
    """An encoder of one or two tensors, whose mean and log variance are one tensor [B, 2 d].

    Args:
        encoder: see ``BaseVAE``.
        max_logvar: see ``BaseVAE``.
    """

    def __init__(self, encoder: nn.Module, max_logvar: float | None = None) -> None:
        super().__init__()
        self.encoder, self.max_logvar = encoder, max_logvar

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Mean before log variance."""
        output = self.encoder(x) if condition is None else self.encoder(x, condition)
        if self.max_logvar is None:
            return output if isinstance(output, Tensor) else torch.cat(tuple(output), 1)
        mu, logvar = output.chunk(2, 1) if isinstance(output, Tensor) else output
        return torch.cat((mu, bounded(logvar, self.max_logvar)), 1)


def bounded(logvar: Tensor, most: float) -> Tensor:
    """Log variances below ``most``; see ``BaseVAE``."""
    return most - nn.functional.softplus(most - logvar)

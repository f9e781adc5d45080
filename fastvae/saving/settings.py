"""What a model was made from, as plain values, and back: networks by name, settings by their arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastvae import likelihoods
from fastvae.architectures import BY_NAME
from fastvae.data import augmentation
from fastvae.likelihoods import LearnedLikelihood
from fastvae.models import HVAE, IWAE, VAE
from fastvae.models.adaptation import AdaptedStepSize
from fastvae.models.base import BaseVAE
from fastvae.penalties import BetaAnnealing, Consistency, ConsistencyVAE, FreeBits, JacobianL1, JacobianL1VAE

__all__ = [
    "OwnPartError",
    "build_model",
    "build_network",
    "build_part",
    "network_settings",
    "part_settings",
    "settings_of",
]


class OwnPartError(ValueError):
    """A part that is no class of ours, and that whoever loads the model must give."""


def _fields(part: Any) -> dict[str, Any]:
    return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}


def _attributes(*names: str, **renamed: str) -> Callable[[Any], dict[str, Any]]:
    """Of arguments that are attributes of the same name, or of another."""
    pairs = {**{name: name for name in names}, **renamed}
    return lambda part: {argument: getattr(part, attribute) for argument, attribute in pairs.items()}


_PARTS: dict[str, tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]] = {
    kind.__name__: (kind, _fields)
    for module in (likelihoods, augmentation)
    for kind in vars(module).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
} | {
    "BetaAnnealing": (BetaAnnealing, _attributes("anneal_steps", "cycle_steps", "num_cycles")),
    "Compose": (lambda augments: augmentation.Compose(*augments), _attributes("augments")),
    "Consistency": (
        Consistency,
        lambda part: {
            "augment": part.augment,
            "weight": part.weight,
            "noise": "common" if part.common_noise else "independent",
        },
    ),
    "FreeBits": (FreeBits, _attributes("nats", "per")),
    "JacobianL1": (JacobianL1, _attributes("gamma", "anneal_steps", "estimator", step="difference_step")),
    "LearnedLikelihood": (
        lambda head, name, shape, is_trained: LearnedLikelihood(head, name, shape, 1.0, is_trained),
        lambda part: {
            "head": part.head,
            "name": part.name,
            "shape": list(part.logarithm.shape),
            "is_trained": isinstance(part.logarithm, nn.Parameter),
        },
    ),
}
"""How each part of ours is made, and what it was made from; an entry that is a part itself is written as one."""

_OF_ALL = ("beta", "latent_dim", "check_finite", "max_logvar")
_MODELS: dict[str, tuple[type[BaseVAE], type[BaseVAE], Callable[[Any], dict[str, Any]]]] = {
    # The last two are a VAE with penalties, which are kept like all others.
    "VAE": (VAE, VAE, _attributes(*_OF_ALL)),
    "JacobianL1VAE": (JacobianL1VAE, VAE, _attributes(*_OF_ALL)),
    "ConsistencyVAE": (ConsistencyVAE, VAE, _attributes(*_OF_ALL)),
    "IWAE": (IWAE, IWAE, _attributes(*_OF_ALL, "num_samples", "estimator")),
    "HVAE": (
        HVAE,
        HVAE,
        lambda model: {
            **_attributes(*_OF_ALL, "num_steps", "on_divergence")(model),
            "tempering": model.tempering.kind,
            "max_step_size": model.leapfrog_step.maximum,
            **_of_step_size(model.leapfrog_step),
        },
    ),
}
"""The class, the constructor that makes it, and its settings; of a step size that was given its shape."""


def _of_step_size(step: Any) -> dict[str, Any]:
    if isinstance(step, AdaptedStepSize):
        return {"step_size": "adapted", "target_acceptance": step.target}
    return {"step_size": list(step.logit.shape)}


def settings_of(model: BaseVAE) -> dict[str, Any]:
    """Class and settings of a model; OwnPartError for a subclass."""
    name = type(model).__name__
    if name not in _MODELS or type(model) is not _MODELS[name][0]:
        raise OwnPartError(_qualified(model))
    return {"class": name, "settings": _plain(_MODELS[name][2](model))}


def part_settings(part: object) -> dict[str, Any]:
    """Class and settings of a likelihood, a penalty or an augmentation; OwnPartError for one that is not ours."""
    name = type(part).__name__
    kind = _PARTS.get(name, (None, None))[0]
    stock = kind if isinstance(kind, type) else {"Compose": augmentation.Compose}.get(name, LearnedLikelihood)
    if name not in _PARTS or type(part) is not stock:
        raise OwnPartError(_qualified(part))
    return {"class": name, "settings": _plain(_PARTS[name][1](part))}


def network_settings(network: nn.Module) -> dict[str, Any]:
    """Name and arguments of a network of ``fastvae.architectures``; OwnPartError for others, or one changed since."""
    made_by = getattr(network, "made_by", None)
    if isinstance(made_by, dict) and made_by.get("name") in BY_NAME:
        settings = {"name": made_by["name"], "arguments": _plain(made_by["arguments"])}
        # Layers may have been exchanged, or hooks and parametrisations put on, since it was made.
        unchanged = str(build_network(settings)) == str(network)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        if unchanged and not hooked:
            return settings
    raise OwnPartError(_qualified(network))


def build_network(settings: Any) -> nn.Module:
    """The network without memory, on the device "meta". ValueError for settings that make none."""
    name, arguments = settings["name"], settings["arguments"]
    if name not in BY_NAME:
        raise ValueError(f"an architecture {name!r}, which this version does not have")
    with torch.device("meta"):
        return BY_NAME[name](**arguments)


def build_part(settings: Any) -> Any:
    """What ``part_settings`` described. ValueError or TypeError for settings that make none."""
    name = settings["class"]
    if name not in _PARTS:
        raise ValueError(f"a part {name!r}, which this version does not have")
    return _PARTS[name][0](**{key: _revived(value) for key, value in settings["settings"].items()})


def build_model(
    settings: Any, encoder: nn.Module, decoder: nn.Module, likelihood: Any, penalties: Any
) -> BaseVAE:
    """What ``settings_of`` described, of these parts, in default weights."""
    name = settings["class"]
    if name not in _MODELS:
        raise ValueError(f"a model {name!r}, which this version does not have")
    kind, constructor, _ = _MODELS[name]
    options = {key: _revived(value) for key, value in settings["settings"].items()}
    if options.get("step_size", "adapted") != "adapted":
        options["step_size"] = _step_size(options)
    model = kind.__new__(kind)
    constructor.__init__(model, encoder, decoder, likelihood, penalties=penalties, **options)
    return model


def _step_size(options: Mapping[str, Any]) -> torch.Tensor:
    """Any of the right shape."""
    shape = tuple(options["step_size"])
    # One a dimension, which might be taken for one a step.
    return torch.full((1, *shape) if len(shape) == 1 else shape, options["max_step_size"] / 2, device="cpu")


def _plain(value: Any) -> Any:
    """The value as JSON has it. TypeError for what it does not have."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if type(value).__module__.startswith("numpy") or isinstance(value, torch.Tensor):
        return value.item()
    return part_settings(value)


def _revived(value: Any) -> Any:
    if isinstance(value, dict):
        return build_part(value)
    return tuple(_revived(entry) for entry in value) if isinstance(value, list) else value


def _qualified(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"

"""A tensor where a number is meant is refused by name everywhere; Python's and numpy's numbers are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from model_problems import data, make
from peers import peer
from torch import Tensor, nn

import fastvae
from fastvae import HVAE, IWAE, VAE, ConsistencyVAE, JacobianL1VAE, metrics, noise, ood
from fastvae import data as fastvae_data
from fastvae.influence import TracIn
from fastvae.likelihoods import Categorical, Gaussian, Laplace, NegativeBinomial, StudentT
from fastvae.models.tempering import BoundedStepSize, Tempering
from fastvae.penalties import BetaAnnealing, Consistency, JacobianL1


def _same(x: Tensor) -> Tensor:
    return x


def _tempering(beta_0: Any = 0.3, num_steps: Any = 3) -> Tempering:
    return Tempering("fixed", num_steps, beta_0, True)


def _step_size(maximum: Any = 0.5, initial: Any = 0.1) -> BoundedStepSize:
    return BoundedStepSize(initial, maximum, 3, 2, True)


def _fit(**options: Any) -> Any:
    return fastvae.fit(make(VAE), [data()], **({"epochs": 1, "progress": False} | options))


def _validated(**options: Any) -> Any:
    return _fit(val_loader=[data()], **options)


def _likelihood(**options: Any) -> Tensor:
    return make(VAE).log_likelihood(data(), **({"num_samples": 2} | options))


def _objective(**options: Any) -> Any:
    return make(VAE).objective(data(), **options)


def _score(kind: Any, **fixed: Any) -> Callable[..., Any]:
    return lambda **options: kind(make(VAE), **fixed, **options)


def _tracin(**options: Any) -> TracIn:
    return TracIn(make(VAE), data(), [None], lambda model, checkpoint: 1.0, **options)


def _model(kind: Any, **fixed: Any) -> Callable[..., Any]:
    return lambda **options: make(kind, **fixed, **options)


def _local(**options: Any) -> Any:
    options = {"num_points": 8, "num_clusters": 2, "rho": 0.5} | options
    return metrics.local_mig(
        lambda x: x.flatten(1)[:, :2], fastvae_data.three_dots(2, size=8).space, **options
    )


def _scores(**options: Any) -> Any:
    return metrics.ood_metrics(torch.rand(5), torch.rand(5), **options)


# Of each callable, the arguments that are numbers, with values that it takes.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Laplace": (Laplace, {"scale": 0.5}),
    "StudentT": (StudentT, {"df": 3.0, "scale": 0.5}),
    "NegativeBinomial": (NegativeBinomial, {"dispersion": 2.0}),
    "Categorical": (Categorical, {"num_classes": 5}),
    "VAE": (_model(VAE), {"beta": 2.0, "latent_dim": 2}),
    "IWAE": (_model(IWAE), {"beta": 2.0, "num_samples": 3, "latent_dim": 2}),
    "HVAE": (_model(HVAE), {"beta": 2.0, "num_steps": 3, "beta_0": 0.4, "max_step_size": 0.5}),
    "ConsistencyVAE": (_model(ConsistencyVAE, augment=_same), {"beta": 2.0, "consistency": 0.5}),
    "JacobianL1VAE": (_model(JacobianL1VAE), {"beta": 2.0, "gamma": 0.5, "anneal_steps": 3}),
    "Tempering": (_tempering, {"beta_0": 0.4, "num_steps": 4}),
    "BoundedStepSize": (_step_size, {"maximum": 0.5}),
    "Consistency": (lambda **options: Consistency(_same, **options), {"weight": 0.5}),
    "JacobianL1": (JacobianL1, {"gamma": 0.5, "anneal_steps": 3}),
    "BetaAnnealing": (BetaAnnealing, {"anneal_steps": 3}),
    "objective": (_objective, {"beta": 0.5}),
    "log_likelihood": (_likelihood, {"num_samples": 2, "chunk_size": 5}),
    "sample": (make(VAE).sample, {"num_samples": 2}),
    "fit": (
        _fit,
        {"epochs": 1, "max_steps": 1, "seed": 3, "clip_grad_norm": 1.0, "checkpoint_every": 2},
    ),
    "fit with patience": (_validated, {"patience": 1}),
    "NegativeLogLikelihood": (_score(ood.NegativeLogLikelihood), {"num_samples": 2, "seed": 3}),
    "LikelihoodRegret": (
        _score(ood.LikelihoodRegret),
        {"num_steps": 2, "lr": 0.1, "num_samples": 2, "seed": 3, "weight_decay": 0.0, "memory_budget": 9999},
    ),
    "LikelihoodRatio": (
        _score(ood.LikelihoodRatio),
        {"mutation": 0.5, "levels": 3, "num_samples": 2, "epochs": 1, "seed": 3},
    ),
    "SelfInfluence": (_score(ood.SelfInfluence), {"num_samples": 2, "seed": 3}),
    "TracIn": (_tracin, {"batch_size": 2, "num_samples": 2, "seed": 3, "query_seed": 3}),
    "SampleNoise": (
        lambda **options: noise.SampleNoise(noise.keys_of(data()), **({"seed": 0} | options)),
        {"seed": 3, "draws": 2, "start": 1},
    ),
    "local_mig": (
        _local,
        {"rho": 0.5, "num_points": 8, "num_clusters": 2, "bins": 2, "seed": 3, "continuity_cutoff": 2},
    ),
    "ood_metrics": (_scores, {"confidence": 0.9, "resamples": 10, "seed": 3}),
    "negative_log_likelihood": (
        lambda **options: metrics.negative_log_likelihood(
            make(VAE), data(), **({"num_samples": 2} | options)
        ),
        {"num_samples": 2, "seed": 3},
    ),
    "mutual_information": (
        lambda **options: metrics.mutual_information(make(VAE), data(), **options),
        {"num_samples": 2, "chunk_size": 3, "seed": 3},
    ),
    "active_units": (
        lambda **options: metrics.active_units(make(VAE), data(), **options),
        {"threshold": 0.1},
    ),
    "RandomAffine": (fastvae_data.RandomAffine, {"degrees": 3.0, "translate": 0.1}),
    "RandomFlip": (fastvae_data.RandomFlip, {"horizontal": 0.5, "vertical": 0.5}),
    "ColorJitter": (fastvae_data.ColorJitter, {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}),
}
ARGUMENTS = [(name, argument) for name, (_, arguments) in CALLS.items() for argument in arguments]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_tensor_is_no_number(name: str, argument: str) -> None:
    call, arguments = CALLS[name]
    value = arguments[argument]
    tensors: list[Tensor] = [torch.tensor(value), torch.tensor([value])]
    if isinstance(value, float):
        tensors.append(nn.Parameter(torch.tensor(value)))
    for tensor in tensors:
        with pytest.raises(TypeError, match=r"\w+: \w+: expected a number, got (Tensor|Parameter); "):
            call(**{argument: tensor})


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_numbers_of_python_and_numpy_are_taken(name: str, argument: str) -> None:
    call, arguments = CALLS[name]
    value = arguments[argument]
    numbers: list[Any] = [value, np.float32(value), np.float64(value)]
    for number in numbers if isinstance(value, float) else [value, np.int64(value), np.int32(value)]:
        call(**{argument: number})


def test_a_parameter_is_no_scale_and_the_error_says_what_is() -> None:
    with pytest.raises(
        TypeError, match=r"Gaussian: scale: .* got Parameter; for a learned scale pass scale='learned'"
    ):
        Gaussian(nn.Parameter(torch.tensor(0.5)))  # type: ignore[arg-type]


def test_a_step_size_that_requires_a_gradient_is_refused() -> None:
    # Its values are only where the model's own parameter starts.
    with pytest.raises(TypeError, match=r"step_size: expected values, got a Parameter .*learn_step_size"):
        make(HVAE, step_size=nn.Parameter(torch.tensor([0.1, 0.2])))
    with pytest.raises(TypeError, match=r"step_size: expected values, got a Parameter"):
        make(HVAE, step_size=[nn.Parameter(torch.tensor(0.1)), 0.2])
    assert torch.allclose(make(HVAE, step_size=torch.tensor([0.1, 0.2])).step_size, torch.tensor([0.1, 0.2]))


def test_each_of_adams_betas_is_a_number() -> None:
    with pytest.raises(TypeError, match=r"LikelihoodRegret: betas: expected a number, got Tensor"):
        ood.LikelihoodRegret(make(VAE), betas=(torch.tensor(0.9), 0.999))  # type: ignore[arg-type]


def test_the_rate_of_lightning_is_a_number() -> None:
    peer("lightning")
    from fastvae.integrations.lightning import LitVAE

    with pytest.raises(TypeError, match=r"LitVAE: lr: expected a number, got Tensor"):
        LitVAE(make(VAE), lr=torch.tensor(0.1))  # type: ignore[arg-type]


def test_counts_are_python_integers_afterwards() -> None:
    assert type(Categorical(np.int64(5)).num_classes) is int  # type: ignore[arg-type]
    assert type(Gaussian(np.float32(0.5)).scale) is float  # type: ignore[arg-type]
    assert Gaussian(np.float32(0.5)) == Gaussian(0.5)  # type: ignore[arg-type]
    assert type(JacobianL1(anneal_steps=np.int64(3)).anneal_steps) is int  # type: ignore[arg-type]

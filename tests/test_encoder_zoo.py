"""Likelihood regret and TracIn on the encoders of the zoo, against Adam by hand and one sample's gradient at a time."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from influence_problems import mlp, tracin, vae_gradients
from torch import Tensor, nn
from zoo.encoders import ENCODERS, EncoderEntry, encoder_of

from fastvae.models import VAE
from fastvae.models.observation import Observation
from fastvae.network.copied.layers import BatchedLayer
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.copies import LoweredCopies
from fastvae.ood.read_copies import ReadCopies
from fastvae.ood.sequential import refit_one

QUICK = {
    "two-heads-mlp", "unbound", "two-heads-batchnorm", "convolutional-heads", "resnet-groupnorm", "clamped-logvar",
    "bag-of-tokens", "weights-used-thrice", "spectral-norm", "time-series", "flattened-volume",
    "disent-linear",
}  # fmt: skip
"""The others are trained by the slow tests alone."""

BY_KERNELS = {
    "mlp", "two-heads-mlp", "chunked", "split-to-a-list", "unbound", "sliced", "two-heads-convolutional",
    "two-heads-batchnorm", "convolutional-heads", "flattened-volume", "pythae-mlp", "pythae-mnist-convnet",
    "disent-linear", "disent-conv64", "disent-conv64-batchnorm",
}  # fmt: skip
"""Encoders whose copies the kernels train from data to output."""

IN_PART_BATCHED = {
    "lstm", "gru-both-ways", "tokens-gru", "transformer", "weight-norm",
}  # fmt: skip
"""Encoders with operations on parameters other than linear layers, convolutions, norms, embeddings and PReLU: those go
by PyTorch's batched operators."""

IN_PART_BY_AUTOGRAD = {"spectral-norm"}
"""Encoders that compute weights of parameters by operations without rules, which a warning names; of all others every
operation with parameters has a rule."""

MODULES_BY_VMAP = {"lstm", "gru-both-ways", "tokens-gru", "transformer"}
"""Encoders with modules that TracIn has no rule for."""

STEPS = 20


def each_encoder(*, quick: set[str]) -> Any:
    """Parametrise over the zoo; slow but for those that are quick."""
    return pytest.mark.parametrize(
        "entry",
        [
            pytest.param(
                entry,
                id=entry.name,
                marks=[
                    *([] if entry.name in quick else [pytest.mark.slow]),
                    pytest.mark.skipif(not entry.is_installed, reason=f"{entry.package} is not installed"),
                ],
            )
            for entry in ENCODERS.values()
        ],
    )


def model_of(entry: EncoderEntry) -> VAE:
    """The encoder in front of a small decoder, in float64."""
    encoder = encoder_of(entry)
    torch.manual_seed(1)
    decoder = nn.Sequential(mlp(entry.latents, 8, math.prod(entry.shape)), nn.Unflatten(1, entry.shape))
    return VAE(encoder, decoder, "gaussian", latent_dim=entry.latents).double().eval()


def way_of_copies(model: VAE, x: Tensor) -> str:
    """How likelihood regret trains the copies of an encoder."""
    detector = LikelihoodRegret(model)
    with detector._borrowed() as private, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copies = detector._encoders(private, Observation(x), *private.encode(x))
    if isinstance(copies, LoweredCopies):
        return "kernels"
    assert isinstance(copies, ReadCopies)
    if copies.by_autograd:
        return "in part by autograd"
    batched = any(isinstance(layer, BatchedLayer) for layer in copies._network.layers)
    return "in part batched" if batched else "layer by layer"


WAYS = (
    dict.fromkeys(BY_KERNELS, "kernels")
    | dict.fromkeys(IN_PART_BATCHED, "in part batched")
    | dict.fromkeys(IN_PART_BY_AUTOGRAD, "in part by autograd")
)
"""Of all others "layer by layer": linear layers by batched products, convolutions, norms, embeddings and PReLU
by kernels or rules of their own."""


def test_docs_say_how_many_go_which_way() -> None:
    assert WAYS.keys() | MODULES_BY_VMAP <= ENCODERS.keys()
    counts = Counter(WAYS.get(name, "layer by layer") for name in ENCODERS)
    text = " ".join((Path(__file__).parents[1] / "docs" / "results.md").read_text().split())
    kernels, layers, batched = (counts[way] for way in ("kernels", "layer by layer", "in part batched"))
    total = len(ENCODERS)
    share = round(100 * (kernels + layers) / total)
    assert f"Of the {total}, kernels train {kernels} from data to output" in text
    assert f"Of {layers} more every operation on parameters is" in text
    assert f"together {kernels + layers} ({share}%)" in text
    assert f"{batched} have others" in text
    assert f"rules for every parameter of {total - len(MODULES_BY_VMAP)} of the {total}" in text


def data(entry: EncoderEntry, count: int, seed: int = 0) -> Tensor:
    """float32 under models of both precisions, because noise is keyed by the bytes."""
    return torch.rand(count, *entry.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_encoder(quick=QUICK)
def test_regret_is_that_of_adam_by_hand(entry: EncoderEntry) -> None:
    model, x = model_of(entry), data(entry, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = LikelihoodRegret(model, num_steps=STEPS, num_samples=2, lr=1e-3).refit(x, parameters=True)
    warned = [str(warning.message) for warning in caught if "copies are trained" in str(warning.message)]
    assert all("in part by torch.vmap" in text for text in warned)
    assert bool(warned) == (entry.name in IN_PART_BY_AUTOGRAD)
    assert way_of_copies(model, x) == WAYS.get(entry.name, "layer by layer")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed"
    for i, image in enumerate(x.split(1)):
        own, losses = refit_one(model, image, SampleNoise(keys_of(image), 0, 1), num_steps=STEPS, lr=1e-3)
        with torch.no_grad():
            mu, logvar = own.encode(image)
        for name, parameter in own.encoder.named_parameters():
            torch.testing.assert_close(found.parameters[name][i], parameter.detach(), rtol=1e-8, atol=1e-8)
        for mine, theirs in ((found.mu[i], mu[0]), (found.logvar[i], logvar[0]), (found.losses[i], losses)):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:TracIn", "ignore:.*materialise")
@each_encoder(quick=QUICK | {"lstm", "transformer", "volume", "glu", "prelu", "monai-2d"})
def test_influence_is_that_of_single_gradients(entry: EncoderEntry) -> None:
    model, train, queries = model_of(entry), data(entry, 4), data(entry, 2, seed=1)
    of_train, of_queries = (vae_gradients(model, x, 2).mean(1) for x in (train, queries))
    found = tracin(model, train, num_samples=2, uncovered="materialise")
    expected = of_queries @ of_train.T
    size = float(expected.abs().max())
    torch.testing.assert_close(found.influence(queries), expected, rtol=0, atol=1e-10 * size)
    squares = of_train.square().sum(1)
    torch.testing.assert_close(found.self_influence(), squares, rtol=1e-10, atol=0)
    ways = [row.rule for row in found.coverage().rows if row.name.startswith("encoder.")]
    assert any("torch.vmap" in way for way in ways) == (entry.name in MODULES_BY_VMAP)
    assert not any("sample by sample" in way for way in ways)

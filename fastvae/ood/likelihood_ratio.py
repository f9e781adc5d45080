"""The likelihood ratio of a model and a background model as an outlier score."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.arguments import expect, expect_at_least, expect_numbers
from fastvae.data import images_of
from fastvae.likelihoods import Categorical
from fastvae.models.base import BaseVAE
from fastvae.models.observation import Observation
from fastvae.ood.negative_log_likelihood import LikelihoodScore
from fastvae.private import PrivateCopies
from fastvae.training import fit

__all__ = ["LikelihoodRatio", "MutatedImages", "mutate"]


def mutate(
    x: Tensor, probability: float = 0.2, *, levels: int = 256, generator: torch.Generator | None = None
) -> Tensor:
    """Each element of x replaced, with the given probability, by a uniform draw from all its values.

    Ren et al., Likelihood Ratios for Out-of-Distribution Detection, NeurIPS 2019, section 3.2.

    Args:
        x: uint8 (values 0 .. levels - 1) or floating (multiples of 1 / (levels - 1) in [0, 1]), any shape.
        probability: mu of the paper; 0.2 is what Xiao, Yan, Amit, NeurIPS 2020 use.
        levels: values that an element can take; 2 for binary images.
        generator: of x's device; None draws from torch's global one.

    Raises:
        ValueError: another dtype, or a probability or levels out of range.
    """
    expect_numbers("mutate", probability=probability, levels=levels)
    expect(
        x.dtype == torch.uint8 or x.is_floating_point(),
        "mutate: x: expected uint8 or a floating dtype",
        x.dtype,
    )
    expect(0 <= probability <= 1, "mutate: probability: expected a number in [0, 1]", probability)
    expect(2 <= levels <= 256, "mutate: levels: expected 2 to 256", levels)
    values = torch.randint(levels, x.shape, device=x.device, generator=generator)
    drawn = values.to(x.dtype) if x.dtype == torch.uint8 else values.to(x.dtype) / (levels - 1)
    chosen = torch.rand(x.shape, device=x.device, generator=generator) < probability
    return torch.where(chosen, drawn, x)


class MutatedImages:
    """A loader's batches, the images mutated anew in each epoch: what a background model is trained on.

    The noise comes from torch's global generator, which ``fastvae.fit`` seeds at each epoch.

    Args:
        loader: an iterable that can be iterated once an epoch; see ``fastvae.fit``.
        probability, levels: as for :func:`mutate`.
    """

    def __init__(self, loader: Iterable[Any], probability: float = 0.2, levels: int = 256) -> None:
        self.loader, self.probability, self.levels = loader, probability, levels
        # Where fit looks for what must be stored to resume, and for set_epoch.
        for name in ("sampler", "batch_sampler", "generator"):
            setattr(self, name, getattr(loader, name, None))

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            mutated = mutate(images_of(batch), self.probability, levels=self.levels)
            if isinstance(batch, Mapping):
                yield {**batch, "data": mutated}
            else:
                rest = () if isinstance(batch, Tensor) else tuple(batch[1:])
                yield (mutated, *rest) if rest else mutated

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


class LikelihoodRatio(LikelihoodScore):
    """log p_background(x) - log p(x) in nats: how little of an image the model explains beyond its background.

    Ren et al., Likelihood Ratios for Out-of-Distribution Detection, NeurIPS 2019, equation (3), with the
    sign that makes higher more foreign. The background model learns what is left of the images when a share
    of their pixels is drawn at random.

    Args:
        model: a trained fastvae model.
        background: a trained background model; None: ``fit`` trains a new one, a copy of the model with
            fresh weights.
        mutation: probability that a pixel is drawn at random.
        levels: values that a pixel can take; None: the classes of a categorical likelihood, else 256. Pass 2
            for binary images.
        num_samples: importance samples of each model's likelihood.
        epochs: of training the background model.
        seed: of all noise; importance samples are keyed by (seed, the image).

    Raises:
        ValueError: mutation out of range; num_samples or epochs below 1.
        TypeError: a model or background that is not a fastvae model.
    """

    def __init__(
        self,
        model: BaseVAE,
        background: BaseVAE | None = None,
        *,
        mutation: float = 0.2,
        levels: int | None = None,
        num_samples: int = 1000,
        epochs: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(model, num_samples=num_samples, seed=seed)
        if background is not None:
            background = self._checked_model("background", background)
        expect_numbers("LikelihoodRatio", mutation=mutation, levels=levels, epochs=epochs)
        expect(0 <= mutation <= 1, "LikelihoodRatio: mutation: expected a number in [0, 1]", mutation)
        expect_at_least("LikelihoodRatio", 1, epochs=epochs)
        self.background, self.mutation, self.epochs = background, mutation, epochs
        self._background_copies = PrivateCopies()
        likelihood = self.model.likelihood
        of_model = likelihood.num_classes if isinstance(likelihood, Categorical) else 256
        self.levels = of_model if levels is None else levels
        self.requires_fit = background is None

    def fit(self, loader: Iterable[Any], **options: Any) -> LikelihoodRatio:
        """Train the background model on mutated images of the loader; a given one is left as it is.

        Args:
            loader: of the training images; see ``fastvae.fit``.
            options: further arguments of ``fastvae.fit``: ``optimizer``, ``run_dir``, ``condition``, ``weight``, ...

        Returns:
            self
        """
        if not self.requires_fit:
            return self
        if self.background is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.background = fresh_copy(self.model)
        options = {"epochs": self.epochs, "seed": self.seed, "progress": False} | options
        fit(self.background, MutatedImages(loader, self.mutation, self.levels), **options)
        return self

    def predict(self, x: Tensor, *, condition: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Scores [B] in nats of images x [B, ...], higher = more foreign; detached.

        Args:
            x: [B, ...].
            condition: [B, ...] of conditional models, the same for both.
            weight: [B, ...] of x's elements, in both log-likelihoods.

        RuntimeError before ``fit``, if no background model was given.
        """
        if self.background is None:
            raise RuntimeError("LikelihoodRatio: predict: expected fit(loader) before, or background=")
        observation = Observation(x, condition, weight)
        of_background = self._log_likelihood(self.background, self._background_copies, observation)
        return of_background - self._log_likelihood(self.model, self._copies, observation)

    def to(self, device: torch.device | str) -> LikelihoodRatio:
        """Move both models; returns self."""
        if self.background is not None:
            self.background.to(device)
        return super().to(device)


def fresh_copy(model: BaseVAE) -> BaseVAE:
    """A copy of the model with newly drawn weights; a flow's step sizes and temperatures are copied.

    TypeError for a module with parameters of its own that has no ``reset_parameters``.
    """
    fresh = copy.deepcopy(model)
    for name, module in fresh.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None and not _is_ours(module):
            raise TypeError(
                f"LikelihoodRatio: background: {name} ({type(module).__name__}) has no reset_parameters; "
                "pass a background model, trained on fastvae.ood.MutatedImages(loader)"
            )
    return fresh


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fastvae.")

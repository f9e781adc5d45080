"""How foreign images score under the demonstration's VAE: four outlier scores, several sets of images."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvae.data import binarize
from fastvae.demo.experiment import Demo
from fastvae.demo.figures import image_rows, score_panels
from fastvae.demo.problem import Batches, Problem
from fastvae.demo.report import Picture, Section, Table
from fastvae.metrics import ood_metrics
from fastvae.models import BaseVAE
from fastvae.ood import Detector, InputComplexity, LikelihoodRatio, LikelihoodRegret, NegativeLogLikelihood
from fastvae.training import History

__all__ = ["Outliers", "foreign_images", "outliers", "outliers_of"]

HELD_OUT = "held out"
IMAGES = 100
CONVOLUTIONAL_REGRETS = 20
BACKGROUND_SECONDS = 8.0


@dataclass
class Outliers:
    """Scores of held-out and foreign images, higher = more foreign."""

    images: dict[str, Tensor]
    """[n, C, H, W] zeros and ones by set; the held-out images come first."""
    scores: dict[str, dict[str, Tensor]]
    """[n] by score and set."""
    background_epochs: int
    """That the background model of the likelihood ratio was trained for."""
    seconds: float


def outliers(demo: Demo) -> Section:
    """Foreign images told from held-out ones by several scores."""
    found = outliers_of(demo.vae.model, demo.problem, demo.vae.history, demo.seed)
    foreign = [name for name in found.images if name != HELD_OUT]
    rows = []
    for score, by_set in found.scores.items():
        measured = [ood_metrics(by_set[HELD_OUT], by_set[name]) for name in foreign]
        rows.append(
            [
                score,
                *(
                    f"{m.auroc:.2f} ({m.auroc_interval[0]:.2f} to {m.auroc_interval[1]:.2f})"
                    for m in measured
                ),
            ]
        )
    columns = min(10, *(len(images) for images in found.images.values()))
    return Section(
        "Foreign images",
        [
            f"""How well scores of the VAE tell foreign images from {len(found.images[HELD_OUT])} held-out ones:
            AUROC, the probability that a foreign image scores higher (chance: 0.5), with a 95% bootstrap
            interval over the choice of images. Below 0.5 the foreign images look more familiar than the real
            ones. All images are binarised.""",
            f"""NLL: negative log-likelihood. Complexity: NLL minus the length of the image as PNG, in nats
            (Serra et al., ICLR 2020). Ratio: less the NLL of a background model that was trained for
            {found.background_epochs} epochs on images with a fifth of their pixels drawn at random (Ren et
            al., NeurIPS 2019). Regret: what an image's likelihood gains from an encoder that is optimised for it
            alone (Xiao et al., NeurIPS 2020), of {len(found.scores["regret"][HELD_OUT])} images of each set.
            Photographs: patches of the two that come with scikit-learn. Training and
            scores took {found.seconds:.1f} s.""",
        ],
        Table(["AUROC", *foreign], rows),
        [
            Picture(
                image_rows([(name[:14], images[:columns]) for name, images in found.images.items()], columns),
                "Held-out images and foreign ones, as the model sees them.",
            ),
            Picture(
                score_panels(found.scores),
                "Histograms of each score by set of images, and ROC curves of the foreign sets.",
            ),
        ],
        printed=True,
    )


def outliers_of(model: BaseVAE, problem: Problem, history: History, seed: int) -> Outliers:
    """Scores of ``IMAGES`` images of each set.

    Args:
        model: trained on binary images.
        problem: what it was trained on, and foreign images.
        history: of that training: the background model takes as many epochs, or what fits into
            ``BACKGROUND_SECONDS`` at that pace.
        seed: of binarisation, the background model and importance samples.
    """
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    images = {HELD_OUT: problem.held_out[:IMAGES]}
    for name, grey in foreign_images(problem, generator).items():
        images[name] = binarize(grey, generator)
    samples = problem.importance_samples
    pace = sum(history.seconds) / len(history.seconds)
    epochs = max(1, min(len(history.seconds), int(BACKGROUND_SECONDS / pace)))
    ratio = LikelihoodRatio(model, levels=2, num_samples=samples, epochs=epochs, seed=seed).fit(
        Batches(problem.train, problem.batch_size, problem.epoch_limit),
        optimizer=functools.partial(torch.optim.Adam, lr=problem.learning_rate),
        binarize=True,
    )
    detectors: dict[str, Detector] = {
        "NLL": NegativeLogLikelihood(model, num_samples=samples, seed=seed),
        "complexity": InputComplexity(model, num_samples=samples, seed=seed),
        "ratio": ratio,
        "regret": LikelihoodRegret(model, num_samples=samples, seed=seed),
    }
    # Each image trains an encoder of its own, and a convolutional one is large.
    count = {"regret": CONVOLUTIONAL_REGRETS} if problem.convolutional else {}
    scores = {
        name: {key: detector(x[: count.get(name)]).cpu() for key, x in images.items()}
        for name, detector in detectors.items()
    }
    return Outliers(images, scores, epochs, time.perf_counter() - started)


def foreign_images(problem: Problem, generator: torch.Generator) -> dict[str, Tensor]:
    """Grey images [n, C, H, W] in [0, 1] like the problem's, by name, at most ``IMAGES`` of each.

    Patches of the two photographs that come with scikit-learn, the held-out images inverted, uniform noise, and
    the problem's own foreign images, resized.
    """
    shape = problem.held_out.shape[1:]
    found = {
        "photographs": _photographs(shape, generator),
        "inverted": 1 - problem.held_out_grey[:IMAGES],
        "noise": torch.rand(IMAGES, *shape, generator=generator),
    }
    for foreign in problem.foreign:
        chosen = foreign.subset(torch.randperm(len(foreign), generator=generator)[:IMAGES]).tensors()[0]
        found[Path(foreign.name).name] = _like(chosen, shape)
    return found


def _photographs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    from sklearn.datasets import load_sample_images

    # A photograph's own pixels are too smooth to be told from nothing: each stands for 4x4 of them.
    height, width = (4 * size for size in shape[1:])
    photographs = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    patches = []
    for index in range(IMAGES):
        photograph = photographs[index % len(photographs)]
        room = (photograph.shape[1] - height + 1, photograph.shape[2] - width + 1)
        top, left = (int(torch.randint(max(1, size), (), generator=generator)) for size in room)
        patches.append(_like(photograph[None, :, top : top + height, left : left + width], shape))
    return torch.cat(patches)


def _like(images: Tensor, shape: torch.Size) -> Tensor:
    """[N, C, H, W] in [0, 1] at that shape; another number of channels becomes their mean, repeated."""
    if images.shape[1] != shape[0]:
        images = images.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)
    return F.interpolate(images, size=tuple(shape[1:]), mode="bilinear", antialias=True).clamp(0, 1)

"""From images to the page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvae.data import ImageDataset, binarize
from fastvae.demo.comparisons import Budget, consistency, hamiltonian, jacobian, train_hamiltonian
from fastvae.report import Section, Subject, sections_of, write_page
from fastvae.report.choosing import resized

__all__ = ["foreign_to", "mislabelled", "run_demo"]

_WRONG = 0.03
"""Share of training labels that are made wrong, to see whether they are found."""
_SHARES = {"flow": 0.4, "jacobian": 0.45, "consistency": 0.15}
"""Of the training time."""


def run_demo(
    train: ImageDataset,
    test: ImageDataset,
    folder: Path,
    *,
    foreign: Sequence[ImageDataset] = (),
    steps: int,
    seconds: float,
    seed: int,
    effort: float = 1.0,
    command: str = "",
    progress: bool = True,
) -> tuple[Path, list[Section]]:
    """Train the pairs of models, report on the HVAE, write the page.

    Args:
        train, test: images.
        folder: of the page, which is there.
        foreign: further images of other kinds.
        steps: of each model, at most.
        seconds: wall-clock time of all training, approximately at most.
        seed: of everything.
        effort: of the report, see :func:`fastvae.report.write_report`.
        command: for the page.
        progress: show bars.

    Returns:
        The path of the page, and its sections.
    """
    began = time.perf_counter()
    images, held_out = train.tensors()[0], test.tensors()[0]
    drawn = binarize(held_out, torch.Generator().manual_seed(seed))

    def budget(name: str) -> Budget:
        measured = max(10, int(500 * min(1.0, effort)))
        return Budget(steps, _SHARES[name] * seconds, seed, measured, progress)

    models, histories = train_hamiltonian(images, drawn, budget("flow"))
    timed = []

    def note(section: Section, before: float) -> None:
        section.seconds = time.perf_counter() - before
        timed.append(section)

    note(hamiltonian(models, histories, drawn, budget("flow")), began)
    before = time.perf_counter()
    few = effort < 0.5
    note(jacobian(budget("jacobian"), count=200 if few else 5000, clusters=2 if few else 20), before)
    before = time.perf_counter()
    note(consistency(images, drawn, budget("consistency")), before)
    labelled, wrong = mislabelled(train, seed)
    others = foreign_to(test, seed) | {Path(each.name).name: each for each in foreign}
    subject = Subject.of(
        models["HVAE"],
        labelled,
        test,
        foreign=others,
        binarised=True,
        seed=seed,
        effort=effort,
        histories=histories,
        command=command,
    )
    sections = [*timed, *sections_of(subject, wrong=wrong, progress=progress)]
    path = folder / "index.html"
    lead = f"""Models trained side by side on {train.name} ({len(train):,} images) and on drawn ones, then a report on
        the Hamiltonian VAE among them, as fastvae.report.write_report writes it of any model;
        {time.perf_counter() - began:.0f} s in all, training
        included. First one sentence on each question, from its numbers."""
    write_page(path, f"fastvae on {Path(train.name).name}", lead, sections)
    return path, sections


def mislabelled(train: ImageDataset, seed: int) -> tuple[ImageDataset, Tensor | None]:
    """The images with a few labels made wrong, and which: bool [N]; None where there are no labels to confuse."""
    if train.labels is None or len(kinds := train.labels.unique()) < 2:
        return train, None
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.zeros(len(train), dtype=torch.bool, device="cpu")
    wrong[
        torch.randperm(len(train), generator=generator, device="cpu")[: max(1, round(_WRONG * len(train)))]
    ] = True
    # Another label: so many places further among all.
    shift = torch.randint(1, len(kinds), (len(train),), generator=generator, device="cpu")
    other = kinds[(torch.searchsorted(kinds, train.labels) + shift) % len(kinds)]
    labels = torch.where(wrong, other, train.labels)
    return ImageDataset(train.images, labels, train.name, classes=train.classes, files=train.files), wrong


def foreign_to(test: ImageDataset, seed: int) -> dict[str, ImageDataset]:
    """Other kinds of images of the test images' shape: photographs, themselves inverted, their pixels shuffled."""
    generator = torch.Generator().manual_seed(seed)
    few = test.images[:200]
    shuffled = few.flatten()[torch.randperm(few.numel(), generator=generator, device="cpu")].reshape(
        few.shape
    )
    found = {"inverted": ImageDataset(255 - few), "shuffled": ImageDataset(shuffled)}
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError:
        return found
    # A photograph's own pixels are too smooth to be told from nothing: each of the patch stands for 4x4 of them.
    height, width = (4 * size for size in test.images.shape[2:])
    photographs = [
        torch.tensor(image, device="cpu").permute(2, 0, 1) for image in load_sample_images().images
    ]
    patches = []
    for index in range(200):
        photograph = photographs[index % len(photographs)]
        room = (photograph.shape[1] - height + 1, photograph.shape[2] - width + 1)
        top, left = (int(torch.randint(max(1, size), (), generator=generator, device="cpu")) for size in room)
        patch = photograph[None, :, top : top + height, left : left + width] / 255
        patches.append((255 * resized(patch, test.images.shape[1:])).round().to(torch.uint8))
    return {"photographs": ImageDataset(torch.cat(patches)), **found}

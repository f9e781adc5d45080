"""``write_report``: a page on a model of the user's and its data, images or rows."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from fastvae.models import BaseVAE
from fastvae.progress import bar_of
from fastvae.report.choosing import Condition, Data, Foreign
from fastvae.report.evidence import evidence
from fastvae.report.foreign import foreign_images
from fastvae.report.influence import Influences, influence, influences_of
from fastvae.report.labels import suspicious_labels
from fastvae.report.latents import latents
from fastvae.report.page import Section, write_page
from fastvae.report.pictures import reconstructions, samples
from fastvae.report.setting import setting, training
from fastvae.report.speed import speed
from fastvae.report.subject import Subject
from fastvae.report.trajectory import trajectory
from fastvae.report.wording import article
from fastvae.training import History

__all__ = ["sections_of", "write_report"]


def write_report(
    model: BaseVAE,
    train: Data,
    test: Data,
    folder: str | os.PathLike[str],
    *,
    foreign: Foreign = None,
    condition: Condition = None,
    history: History | Mapping[str, History] | None = None,
    binarised: bool | None = None,
    title: str | None = None,
    command: str = "",
    seed: int = 0,
    effort: float = 1.0,
    progress: bool = True,
) -> Path:
    """Write ``folder/index.html``: one page, without scripts or other files, on a trained model and its data.

    Samples, reconstructions, traversals, active units, bound and likelihood with standard errors, the most foreign
    images, the most influential training images and those whose labels look wrong, what runs in kernels and how fast.
    Of a table its rows, in words where images are shown, and plots of its columns.
    Each section opens with a sentence that its numbers decide, and those that worked come first. A section that cannot
    be computed for this model says why, and a RuntimeWarning too.

    Args:
        model: a fastvae model; what is looked at is a private copy, in eval mode.
        train: what it was trained on, as :func:`fastvae.data.load` or :func:`fastvae.data.load_table` returns it; of
            large data sets a part is looked at.
        test: images or rows of the same kind that took no part in training.
        folder: made where it is not there.
        foreign: data sets of other kinds of images, by name or one after the other, to be told from ``test``; they are
            resized to its shape. Tables have the same columns.
        condition: of a conditional model: "labels", which it is given as integers [B]; or two tensors, of all training
            and of all test samples, a row each. None: what a table has as its ``condition``.
        history: of :func:`fastvae.fit`, one, or several by name: adds training curves.
        binarised: whether the model sees pixels drawn from their grey values, as by ``fit(binarize=True)``. None: where
            its likelihood is Bernoulli and images have other values than 0 and 1.
        title: of the page.
        command: what was typed, to be named on the page.
        seed: of all choices and noise.
        effort: 1 takes a minute for small images; less looks at fewer images with fewer samples.
        progress: show a bar over the sections, on a terminal.

    Returns:
        The path of the page.

    Raises:
        ValueError: images of different shapes, or that the model does not take, a conditional model without a
            condition, parameters that are not finite, an effort of 0. All before anything is computed or written.
        TypeError: not a fastvae model, an ImageDataset, a TableDataset or a History.
        ImportError: matplotlib or Jinja2 is not installed.
    """
    named = (
        {} if history is None else dict(history) if isinstance(history, Mapping) else {"training": history}
    )
    for each in named.values():
        if not isinstance(each, History):
            raise TypeError(
                f"write_report: history: expected a History, or several by name, got {type(each).__name__}"
            )
    named = {name: each for name, each in named.items() if each.steps}
    subject = Subject.of(
        model,
        train,
        test,
        foreign=foreign,
        condition=condition,
        binarised=binarised,
        seed=seed,
        effort=effort,
        histories=named,
        command=command,
    )
    path = Path(folder) / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = sections_of(subject, progress=progress)
    kind = type(subject.model).__name__
    lead = f"""What {article(kind)} makes of {subject.names[0]}: {len(subject.train):,} training and
        {len(subject.test):,} test {subject.noun}s were looked at. First one sentence on each question, from its
        numbers."""
    write_page(path, f"{kind} on {Path(subject.names[0]).name}" if title is None else title, lead, sections)
    return path


def sections_of(subject: Subject, *, wrong: Tensor | None = None, progress: bool = False) -> list[Section]:
    """All sections on one subject, those of their turn that say something.

    Args:
        subject: the model and its images or rows.
        wrong: bool [all training samples] whose labels were made wrong on purpose; says whether they are found.
        progress: show a bar.
    """
    known: list[Influences] = []

    def influences() -> Section:
        known.append(influences_of(subject))
        return influence(subject, known[0])

    def labels() -> Section | None:
        return suspicious_labels(subject, known[0], wrong=wrong) if known else None

    parts: dict[str, Callable[[], Section | None]] = {
        "Samples": partial(samples, subject),
        "Reconstructions": partial(reconstructions, subject),
        "Bound and likelihood": partial(evidence, subject),
        "Latents": partial(latents, subject),
        "Trajectories": partial(trajectory, subject),
        f"Influence of training {subject.noun}s": influences,
        "Suspicious labels": labels,
        f"Foreign {subject.noun}s": partial(foreign_images, subject),
        "Speed": partial(speed, subject),
        "Training": partial(training, subject),
    }
    began, found = time.perf_counter(), []
    with bar_of(len(parts), "report", "section", progress) as bar:
        for title, part in parts.items():
            before = time.perf_counter()
            section = _attempted(title, part)
            if section is not None:
                section.seconds = time.perf_counter() - before
                found.append(section)
            bar.update(1)
    return [*found, setting(subject, time.perf_counter() - began)]


def _attempted(title: str, part: Callable[[], Section | None]) -> Section | None:
    """What a user's own networks cannot do, or a package that is missing, costs one section and not the page."""
    try:
        return part()
    except (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"write_report: {title} could not be computed: {reason}", RuntimeWarning, stacklevel=2)
        return Section(title, "This could not be computed for this model.", False, [reason])

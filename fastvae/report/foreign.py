"""Which images or rows are foreign to the model: those of the test set that are most so, and other sets against it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae import plot
from fastvae.likelihoods import Bernoulli, Categorical
from fastvae.metrics import OODMetrics, ood_metrics
from fastvae.ood import Detector, InputComplexity, LikelihoodRegret, NegativeLogLikelihood
from fastvae.report.evidence import importance_samples
from fastvae.report.page import Picture, Section, Table
from fastvae.report.rows import strange_rows
from fastvae.report.subject import Subject
from fastvae.report.wording import nats

__all__ = ["foreign_images"]

_SHOWN = 8
_REGRETS, _STEPS = 100, 100
_UPDATE = 20.0
"""What Adam's update of a parameter costs, in floating-point operations that take as long."""
_TEST = "test"


def foreign_images(subject: Subject) -> Section:
    """Outlier scores of test samples, and of foreign sets if there are any."""
    noun = subject.noun
    title = f"Foreign {noun}s"
    sets = {_TEST: subject.test, **subject.foreign}
    scores = outlier_scores(subject, sets)
    regret, nll = scores["regret"][_TEST], scores["NLL"][_TEST]
    pictures, listings = [], []
    if subject.table is None:
        pictures.append(_most_foreign(subject, scores))
    else:
        listings = [_most_foreign_rows(subject, name, by_set[_TEST]) for name, by_set in scores.items()]
    rows: list[list[str]] = []
    text = [
        f"""NLL: −log p(x). Regret: what the likelihood of one {noun} gains from an encoder trained for it alone,
        {_STEPS} steps (Xiao, Yan, Amit, NeurIPS 2020), of {len(regret)} {noun}s a set."""
        + (
            " Complexity: NLL minus the length of the image as PNG, both in nats (Serra et al., ICLR 2020)."
            if "complexity" in scores
            else ""
        )
    ]
    if not subject.foreign:
        first = int(regret.argmax())
        label = "" if subject.test_labels is None else f" (label {subject.label(subject.test_labels[first])})"
        verdict = (
            f"The most foreign of {len(regret)} test {noun}s{label} has a likelihood regret of "
            f"{nats(float(regret.max()))} nats, the median one {nats(float(regret.median()))}; by NLL it is "
            f"{nats(float(nll.max()))} and {nats(float(nll.median()))}."
        )
        return Section(title, verdict, None, text, pictures=pictures, listings=listings)
    found = {
        name: {key: ood_metrics(by_set[_TEST], by_set[key]) for key in subject.foreign}
        for name, by_set in scores.items()
    }
    for name, by_set in found.items():
        for key, measured in by_set.items():
            low, high = measured.auroc_interval
            rows.append([name, key, f"{measured.auroc:.2f}", f"{low:.2f} to {high:.2f}"])
    if subject.table is None:
        pictures.append(
            Picture(
                plot.png(plot.image_blocks({name: images[:_SHOWN] for name, images in sets.items()})),
                "Images of each set as the model sees them.",
            )
        )
    histograms = plot.score_histograms(scores, noun=f"{noun}s")
    pictures.append(Picture(plot.png(histograms), f"Each score by set of {noun}s, with the ROC curves."))
    text.append(
        f"""AUROC: the probability that a foreign {noun} scores higher than a test {noun} (chance 0.5), with a 95%
        bootstrap interval over the choice of at most {len(nll)} {noun}s of each set. Below 0.5 the foreign {noun}s look
        more familiar than the model's own."""
    )
    verdict, worked = _judged(found)
    return Section(
        title,
        verdict,
        worked,
        text,
        Table(["score", f"{noun}s", "AUROC", "95% interval"], rows, 2),
        pictures,
        listings,
    )


def outlier_scores(subject: Subject, sets: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Of every set by every score that the likelihood allows, higher = more foreign."""
    model, seed = subject.model, subject.seed
    count = subject.afford(200, len(sets) * 100 * subject.flops_of_weight, least=min(20, len(subject.test)))
    samples = min(200, importance_samples(subject, count * len(sets)))
    detectors: dict[str, Detector] = {
        "regret": LikelihoodRegret(model, num_steps=_STEPS, num_samples=samples, seed=seed),
        "NLL": NegativeLogLikelihood(model, num_samples=samples, seed=seed),
    }
    counts_values = isinstance(model.likelihood, Categorical) or (
        isinstance(model.likelihood, Bernoulli) and subject.is_binary
    )
    if counts_values and subject.table is None and subject.shape[0] in (1, 3):
        detectors["complexity"] = InputComplexity(model, num_samples=samples, seed=seed)
    of_step = 3 * (subject.flops[0] + subject.flops_of_weight) + _UPDATE * subject.encoder_size
    regrets = subject.afford(
        _REGRETS, len(sets) * (_STEPS * of_step + 2 * samples * subject.flops_of_weight), least=8
    )
    conditions = {_TEST: subject.test_condition, **subject.foreign_conditions}
    found: dict[str, dict[str, Tensor]] = {}
    for name, detector in detectors.items():
        most = regrets if name == "regret" else count
        found[name] = {
            key: detector(x[:most], **subject.given(conditions.get(key), most)).cpu()
            for key, x in sets.items()
        }
    return found


def _most_foreign_rows(subject: Subject, name: str, scores: Tensor) -> Table:
    order = scores.argsort(descending=True)[:_SHOWN]
    return strange_rows(
        subject, "test", order, [nats(value) for value in scores[order].tolist()], f"{name}, nats"
    )


def _most_foreign(subject: Subject, scores: dict[str, dict[str, Tensor]]) -> Picture:
    blocks, captions = {}, {}
    for name, by_set in scores.items():
        order = by_set[_TEST].argsort(descending=True)[:_SHOWN]
        block = f"highest {name}, nats"
        blocks[block] = subject.test[order]
        captions[block] = [nats(value) for value in by_set[_TEST][order].tolist()]
    return Picture(
        plot.png(plot.image_blocks(blocks, columns=_SHOWN, captions=captions)),
        "The test images that each score finds most foreign.",
    )


def _judged(found: dict[str, dict[str, OODMetrics]]) -> tuple[str, bool | None]:
    """The score whose worst set is best, what it does, and where others fail."""
    worst = {name: min(each.auroc for each in by_set.values()) for name, by_set in found.items()}
    best = max(worst, key=lambda name: worst[name])
    reached = [f"{key} {each.auroc:.2f}" for key, each in found[best].items()]
    verdict = f"{best[0].upper()}{best[1:]} does best: AUROC {', '.join(reached)}"
    fooled = [
        f"{name} of {key} ({each.auroc:.2f})"
        for name, by_set in found.items()
        for key, each in by_set.items()
        if each.auroc_interval[1] < 0.5
    ]
    if fooled:
        verdict += f". Fooled, below 0.5: {', '.join(fooled)}"
    lowest = min(each.auroc_interval[0] for each in found[best].values())
    worked = True if worst[best] >= 0.8 else None if lowest > 0.5 else False
    return verdict + ".", worked


def foreign_to(images: Tensor) -> dict[str, Tensor]:
    """Sets that any images have: themselves inverted, and noise with as many bright pixels."""
    generator = torch.Generator().manual_seed(0)
    shuffled = images.flatten()[torch.randperm(images.numel(), generator=generator, device="cpu")].reshape(
        images.shape
    )
    return {"inverted": 1 - images, "shuffled pixels": shuffled}

"""How the model was trained, what the page looked at, and with which versions."""

from __future__ import annotations

from fastvae import info, plot
from fastvae.report.page import Picture, Section, Table
from fastvae.report.subject import Subject
from fastvae.report.wording import article
from fastvae.training import History

__all__ = ["setting", "training"]


def training(subject: Subject) -> Section | None:
    """Curves of the histories that were given; None without any."""
    if not subject.histories:
        return None
    rows = [
        [
            name,
            f"{len(history.steps)}",
            f"{history.steps[-1]:,}",
            f"{sum(history.seconds):.0f} s",
            "-" if history.val_loss[-1] is None else f"{history.val_loss[-1]:.2f}",
        ]
        for name, history in subject.histories.items()
    ]
    changes = {name: _late_change(history) for name, history in subject.histories.items()}
    said = ", ".join(
        f"{name + ': ' if len(changes) > 1 else ''}{change:+.2f}".replace("-", "−")
        for name, change in changes.items()
    )
    return Section(
        "Training",
        f"Over the last quarter of the epochs the loss changed by {said} nats"
        + (": longer training would help." if min(changes.values()) < -0.5 else "."),
        None,
        ["The loss is that of the objective, penalties and β included."],
        Table(["", "epochs", "steps", "time", "last loss"], rows),
        [Picture(plot.png(plot.training_curves(subject.histories)), "Thick: held out; thin: training.")],
    )


def _late_change(history: History) -> float:
    """Of the loss, held out if it was measured, over the last quarter of the epochs."""
    losses = [value for value in history.val_loss if value is not None] or history.train_loss
    quarter = max(1, len(losses) // 4)
    return losses[-1] - losses[-quarter - 1] if len(losses) > quarter else 0.0


def _prepared(subject: Subject) -> str:
    prepared = (
        "less their means, over their standard deviations" if subject.is_standardised else "as they are"
    )
    if subject.is_binarised:
        prepared = "drawn from their grey values, once"
    condition = subject.train_condition
    if condition is None:
        return prepared
    size = "x".join(map(str, condition.shape[1:])) or "a number"
    return f"{prepared}; given a condition, {size} for each {subject.noun}"


def setting(subject: Subject, seconds: float) -> Section:
    """Data, model and versions."""
    shape, kind = "x".join(map(str, subject.shape)), article(type(subject.model).__name__)
    rows = [
        [
            f"training {subject.noun}s",
            f"{subject.names[0]}, {len(subject.train):,} of {subject.sizes[0]:,} looked at, {shape}",
        ],
        [
            f"test {subject.noun}s",
            f"{subject.names[1]}, {len(subject.test):,} of {subject.sizes[1]:,} looked at",
        ],
        *(
            [f"foreign {subject.noun}s", f"{name}, {len(images):,} looked at"]
            for name, images in subject.foreign.items()
        ),
        [f"{subject.element}s", _prepared(subject)],
        ["likelihood", str(subject.model.likelihood)],
        ["parameters", f"{subject.size:,}, {subject.encoder_size:,} of them in the encoder"],
        ["seed, effort", f"{subject.seed}, {subject.effort:g}"],
        *([["command", subject.command]] if subject.command else []),
        *([name, value] for name, value in info.describe()),
    ]
    return Section(
        "What was looked at",
        f"A{kind[1:]} of {subject.size:,} parameters; the report on it took {seconds:.0f} s.",
        None,
        table=Table(["", ""], rows, numbers=2),
        details=[("The model", str(subject.model))],
        is_appendix=True,
    )

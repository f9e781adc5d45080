"""The model and the images or rows that a page looks at, and how many each section can afford."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastvae.arguments import expect, expect_positive, given, is_integer
from fastvae.data import binarize
from fastvae.likelihoods import Bernoulli, LearnedLikelihood
from fastvae.likelihoods.counts import Counts
from fastvae.metrics.posteriors import private_model
from fastvae.models import HVAE, BaseVAE, DivergenceError
from fastvae.models.inputs import needs_condition
from fastvae.report.choosing import (
    Condition,
    Data,
    Foreign,
    TableFacts,
    chosen_of,
    conditions_of,
    facts_of,
    foreign_of,
    named_sets,
)
from fastvae.training import History

__all__ = ["Subject"]

_BUDGET = 3e11
"""Floating-point operations of a section, about: ten seconds of a laptop."""


@dataclass(frozen=True)
class Subject:
    """What a page is about. Images or rows are float32 on the CPU, as the model takes them."""

    model: BaseVAE
    """A private copy in eval mode, without what training adds to a step."""
    train: Tensor
    """[N, C, H, W] or [N, F], chosen at random."""
    train_indices: Tensor
    """int64 [N] which they are of all training images or rows."""
    train_labels: Tensor | None
    test: Tensor
    """[M, C, H, W] or [M, F], chosen at random."""
    test_indices: Tensor
    test_labels: Tensor | None
    foreign: Mapping[str, Tensor]
    """[n, C, H, W] or [n, F] by name."""
    names: tuple[str, str]
    """Where training and test data come from."""
    sizes: tuple[int, int]
    """How many there are in all."""
    is_binarised: bool
    """Whether pixels were drawn from their grey values, once."""
    seed: int = 0
    effort: float = 1.0
    histories: Mapping[str, History] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    """Names of the labels."""
    command: str = ""
    train_condition: Tensor | None = None
    """[N, ...] of a conditional model."""
    test_condition: Tensor | None = None
    foreign_conditions: Mapping[str, Tensor | None] = field(default_factory=dict)
    table: TableFacts | None = None
    """Of rows; None of images."""

    @classmethod
    def of(
        cls,
        model: BaseVAE,
        train: Data,
        test: Data,
        *,
        foreign: Foreign = None,
        condition: Condition = None,
        binarised: bool | None = None,
        seed: int = 0,
        effort: float = 1.0,
        **rest: Any,
    ) -> Subject:
        """Choose the images or rows; see :func:`fastvae.report.write_report`."""
        expect_positive("write_report", effort=effort)
        expect(is_integer(seed), "write_report: seed: expected an int", repr(seed))
        private = private_model("write_report", model)
        expect(
            all(bool(torch.isfinite(parameter).all()) for parameter in private.parameters()),
            "write_report: model: expected finite parameters",
            "NaN or infinite ones",
        )
        generator = torch.Generator().manual_seed(seed)
        own = dict(zip(("train", "test"), conditions_of(condition, train, test), strict=True))
        parts = {
            name: chosen_of(name, part, own[name], generator)
            for name, part in (("train", train), ("test", test))
        }
        shapes = [part.x.shape[1:] for part in parts.values()]
        noun = "rows" if len(shapes[0]) == 1 else "images"
        expect(
            shapes[0] == shapes[1],
            f"write_report: test: expected {noun} of {list(shapes[0])} as in train",
            list(shapes[1]),
        )
        others = {
            name: foreign_of(part, condition, shapes[0], generator)
            for name, part in named_sets(foreign).items()
        }
        images = [*(part.x for part in parts.values()), *(part.x for part in others.values())]
        table = facts_of(train, test)
        is_grey = table is None and not all(bool(((each == 0) | (each == 1)).all()) for each in images)
        drawn = isinstance(private.likelihood, Bernoulli) and is_grey if binarised is None else binarised
        if drawn:
            images = [binarize(each, generator) for each in images]
        of_train, of_test = parts.values()
        _check_model_takes(
            private, images[0][:2], None if of_train.condition is None else of_train.condition[:2]
        )
        return cls(
            private,
            images[0],
            of_train.indices,
            of_train.labels,
            images[1],
            of_test.indices,
            of_test.labels,
            dict(zip(others, images[2:], strict=True)),
            (train.name, test.name),
            (len(train), len(test)),
            drawn,
            seed,
            effort,
            classes=train.classes,
            train_condition=of_train.condition,
            test_condition=of_test.condition,
            foreign_conditions={name: part.condition for name, part in others.items()},
            table=table,
            **rest,
        )

    @property
    def noun(self) -> str:
        """What a sample is."""
        return "image" if self.table is None else "row"

    @property
    def element(self) -> str:
        """What one of its numbers is."""
        return "pixel" if self.table is None else "column"

    @property
    def is_standardised(self) -> bool:
        """Whether the model sees other numbers than the table has."""
        return self.table is not None and not bool(
            (self.table.mean == 0).all() and (self.table.scale == 1).all()
        )

    def given(self, condition: Tensor | None, count: int | None = None) -> dict[str, Any]:
        """A condition's first rows as an argument of the model's methods, on its device; nothing without one."""
        return {} if condition is None else {"condition": self.here(condition[:count])}

    def batches(self, x: Tensor, condition: Tensor | None) -> tuple[Any, dict[str, Any]]:
        """Samples for functions that take batches, and the arguments that say where the condition is in them."""
        return (x, {}) if condition is None else ([(x, condition)], {"condition": 1})

    def comparable(self, x: Tensor) -> Tensor:
        """Values between which distances mean something: of counts the logarithm of one more."""
        likelihood = self.model.likelihood
        head = likelihood.head if isinstance(likelihood, LearnedLikelihood) else likelihood
        return torch.log1p(x.clamp_min(0)) if isinstance(head, Counts) else x

    @torch.no_grad()
    def reconstructed(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """The mean of p(x | z) for one code of each sample's posterior, on the CPU."""
        made = self.model.reconstruct(self.here(x), generator=self.generator(), **self.given(condition))
        return made.cpu()

    @property
    def shape(self) -> torch.Size:
        """[C, H, W] of an image, [F] of a row."""
        return self.test.shape[1:]

    @property
    def is_binary(self) -> bool:
        """Whether all values are 0 or 1."""
        return bool(((self.test == 0) | (self.test == 1)).all())

    def label(self, number: int | Tensor) -> str:
        """The name of a label, in a few characters, or its number."""
        index = int(number)
        if self.classes is None or not 0 <= index < len(self.classes):
            return str(index)
        name = self.classes[index]
        most = 6 if self.table is None else 24  # below a picture there is less room
        return name if len(name) <= most else f"{name[: most - 1]}…"

    def generator(self) -> torch.Generator:
        """A new one, always of the same numbers."""
        return torch.Generator().manual_seed(self.seed)

    def here(self, x: Tensor) -> Tensor:
        """On the model's device."""
        return x.to(next(self.model.parameters()).device)

    def afford(self, wanted: int, each: float, *, least: int = 1) -> int:
        """How many of what takes ``each`` floating-point operations: ``wanted`` unless the budget ends before."""
        budget, wanted = _BUDGET * self.effort, max(least, math.ceil(wanted * min(1.0, self.effort)))
        return max(least, min(wanted, int(budget / max(each, 1.0))))

    @cached_property
    def flops(self) -> tuple[float, float]:
        """Floating-point operations of encoding one sample and of decoding one code."""
        found = []
        with torch.no_grad():
            x, besides = self.here(self.test[:1]), self.given(self.test_condition, 1)

            def code() -> Tensor:
                return self.model.encode(x, **besides)[0]

            for run in (code, lambda: self.model.decode(code(), **besides)):
                with FlopCounterMode(display=False) as counter:
                    run()
                found.append(float(counter.get_total_flops()))
        return max(1.0, found[0]), max(1.0, found[1] - found[0])

    @property
    def flops_of_weight(self) -> float:
        """Of one importance weight: a decoder's forward, or a Hamiltonian trajectory, by their passes."""
        steps = self.model.num_steps + 1 if isinstance(self.model, HVAE) else 0
        return self.flops[1] * (1 + 3 * steps)

    @property
    def encoder_size(self) -> int:
        """Parameters of the encoder."""
        return _size(self.model.encoder)

    @property
    def size(self) -> int:
        """Parameters of the model."""
        return _size(self.model)


def _check_model_takes(model: BaseVAE, x: Tensor, condition: Tensor | None) -> None:
    """ValueError unless there is a bound of samples x: nothing on the page would be left."""
    if condition is None and any(needs_condition(part) for part in (model.encoder, model.decoder)):
        raise ValueError(
            'write_report: condition: expected one for a conditional model, "labels" or the tensors of training and '
            "test samples, got none"
        )
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            here = given(condition=None if condition is None else condition.to(device))
            model.elbo(x.to(device), generator=torch.Generator().manual_seed(0), **here)
    except DivergenceError:
        pass  # of these samples, or of this noise
    except (RuntimeError, ValueError, TypeError) as error:
        noun = "rows" if x.dim() == 2 else "images"
        raise ValueError(
            f"write_report: train: expected {noun} that the model takes, got {list(x.shape[1:])}: {error}"
        ) from error


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

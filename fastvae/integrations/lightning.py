"""A fastvae model in Lightning's Trainer.

A fastvae model is an ordinary module whose forward is the loss of each sample, so that it also goes into a
LightningModule of your own; what that one has to do is what :class:`LitVAE` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastvae.arguments import expect, expect_numbers
from fastvae.integrations import TORCHVISION
from fastvae.models import BaseVAE
from fastvae.models.observation import Observation
from fastvae.training import step_penalties
from fastvae.training.batches import Place, batch_of
from fastvae.training.fitting import build_scheduler

try:
    import lightning
except RuntimeError as error:
    if "torchvision" not in str(error):
        raise
    raise ImportError(
        f"fastvae.integrations.lightning: lightning {TORCHVISION.format(error=error)}"
    ) from error

__all__ = ["LitVAE"]


class LitVAE(lightning.LightningModule):
    """Trains a fastvae model in ``lightning.Trainer``.

    Logs ``train_loss`` (with penalties and beta) a step, ``val_loss`` and ``val_elbo`` an epoch, and ``test_loss`` and
    ``test_elbo`` in ``Trainer.test``, all in nats a sample. Batches are those of :func:`fastvae.fit`: a tensor, the
    first of a tuple, or ["data"]. Penalties are stepped once an optimisation step, however many batches are accumulated
    for it. The hyperparameters are not saved in checkpoints, since a model is none:
    ``LitVAE.load_from_checkpoint(path, model=...)`` takes one built as before.

    Args:
        model: any of fastvae's models; ``lit.model`` is it, trained.
        optimizer: callable from (parameters, lr=...) to an optimiser.
        lr: learning rate.
        scheduler: callable from the optimiser to a learning rate scheduler; ``ReduceLROnPlateau`` reads ``val_loss``.
        schedule_by: call the scheduler after each "epoch" or each "step".
        condition, weight, sample_weight: where in a batch is what; see :func:`fastvae.fit`. With sample weights both
            losses are weighted means of a batch; Lightning's mean over batches counts their samples.

    Raises:
        TypeError: ``model`` is not one of fastvae's.
        ValueError: another ``schedule_by``; later, a scheduler that is none of the optimiser's.
    """

    def __init__(
        self,
        model: BaseVAE,
        *,
        optimizer: Callable[..., Optimizer] = torch.optim.Adam,
        lr: float = 1e-3,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        schedule_by: Literal["epoch", "step"] = "epoch",
        condition: Place | None = None,
        weight: Place | None = None,
        sample_weight: Place | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, BaseVAE):
            raise TypeError(f"LitVAE: model: expected a fastvae model, got {type(model).__name__}")
        expect_numbers("LitVAE", lr=lr)
        self.model = model
        self._optimizer = optimizer
        self.lr = lr
        expect(
            schedule_by in ("epoch", "step"),
            "LitVAE: schedule_by: expected 'epoch' or 'step'",
            repr(schedule_by),
        )
        self._scheduler, self._schedule_by = scheduler, schedule_by
        self._places = {"condition": condition, "weight": weight, "sample_weight": sample_weight}

    def forward(self, x: Tensor, condition: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """The training loss of each sample: [B], in nats."""
        losses: Tensor = self.model(x, **Observation(x, condition, weight).given)
        return losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss of a batch: []."""
        given = batch_of(batch, self._places, binarize=False)
        loss = given.mean(self(*given.observation))
        self.log("train_loss", loss, batch_size=len(given.observation.x))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``val_loss`` and ``val_elbo``."""
        self._log_batch("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``test_loss`` and ``test_elbo``."""
        self._log_batch("test", batch)

    def _log_batch(self, name: str, batch: Any) -> None:
        given = batch_of(batch, self._places, binarize=False)
        x = given.observation.x
        self.log(f"{name}_loss", given.mean(self(*given.observation)), batch_size=len(x))
        self.log(f"{name}_elbo", given.mean(self.model.elbo(x, **given.observation.given)), batch_size=len(x))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's own, then the penalties' step; not called for batches that are only accumulated."""
        super().optimizer_step(*args, **kwargs)
        step_penalties(self.model)

    def configure_optimizers(self) -> Any:
        """The optimiser over the trainable parameters, with its scheduler if there is one."""
        parameters: list[nn.Parameter] = [p for p in self.parameters() if p.requires_grad]
        optimizer = self._optimizer(parameters, lr=self.lr)
        if self._scheduler is None:
            return optimizer
        scheduler = build_scheduler("LitVAE", optimizer, self._scheduler)
        schedule: dict[str, Any] = {"scheduler": scheduler, "interval": self._schedule_by}
        if isinstance(scheduler, ReduceLROnPlateau):
            schedule["monitor"] = "val_loss"
        return {"optimizer": optimizer, "lr_scheduler": schedule}

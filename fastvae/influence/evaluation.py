"""The losses of a batch over several draws of noise, with gradients on their way to the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastvae.influence.noise import KeyedNoise, draws_noise
from fastvae.influence.read_sweeps import ReadSweep
from fastvae.influence.snapshots import Snapshot
from fastvae.influence.sweeps import Call, Sweep, calls_of_vae, is_swept
from fastvae.models import BaseVAE
from fastvae.models.base import encoded_already
from fastvae.models.observation import Observation
from fastvae.noise import Stream, draws_of

__all__ = ["Batch", "Evaluation"]

Batch = tuple[Tensor, ...]


class Evaluation:
    """Per-sample losses of a model.

    Args:
        model: a private copy in eval mode; ``bind`` exchanges it for that of another checkpoint.
        loss_fn: None: the losses are ``model(batch[0])``; else ``loss_fn(model(*batch[:-1]), batch[-1])``, or
            ``loss_fn(model(x), x)`` for a batch of one tensor.
        draws: S, of the noise of a model that draws any.
        seed: of the noise.
        besides: what ``batch[1:]`` are of one of our models: its "condition", its "weight" or both.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor] | None,
        draws: int,
        seed: int,
        besides: Sequence[str] = (),
    ) -> None:
        self.loss_fn, self.seed, self.besides = loss_fn, seed, tuple(besides)
        self.draws = draws
        self.reads = False
        """Whether the decoder is read and swept in PyTorch."""
        self._random: bool | None = None
        self.bind(Snapshot(1.0, model))

    def bind(self, snapshot: Snapshot) -> None:
        """Work on the model of this checkpoint."""
        self.snapshot, self.model = snapshot, snapshot.model

    def sweep(self) -> Sweep | None:
        """A new sweep through the decoder, where the model has one that can be swept."""
        if self.reads:
            return ReadSweep(self.model)
        if self.loss_fn is not None or self.besides or not is_swept(self.model):
            return None
        return Sweep(self.model)

    def calls(self, batch: Batch, fold: bool) -> dict[str, list[Call]] | None:
        """The calls of every layer, of the mean loss over the draws; without ``fold``, of each draw alone.

        None where autograd and hooks have to find them.
        """
        if self.loss_fn is not None or not isinstance(self.model, BaseVAE) or self.besides:
            return None
        x = batch[0]
        return calls_of_vae(
            self.model,
            x if fold else x.repeat_interleave(self.draws, 0),
            lambda latent_dim: self._stream(Observation(x)).normal((latent_dim,)),
        )

    def losses(self, batch: Batch, fold: bool = True, sweep: Sweep | None = None) -> Tensor:
        """The loss of each draw of each sample, [B * S], the draws of a sample side by side.

        With ``fold`` the encoder of our models sees each sample once.
        """
        if isinstance(self.model, BaseVAE) and self.loss_fn is None and not self.model.penalties:
            model = self.model if sweep is None else sweep.installed()
            return self._of_vae(model, self._seen(batch), fold)
        if not self.is_random(batch):
            return self._of_rows(batch)
        rows = tuple(part.repeat_interleave(self.draws, 0) for part in batch)
        with KeyedNoise(self._stream(self._seen(batch))):
            return self._of_rows(rows)

    def draws_of(self, batch: Batch) -> int:
        """S, or 1 where the loss is a function of the sample alone."""
        return self.draws if self.is_random(batch) else 1

    def is_random(self, batch: Batch) -> bool:
        """Whether the model draws noise; found out by watching it once."""
        if self._random is None:
            if isinstance(self.model, BaseVAE) and self.loss_fn is None:
                self._random = True
            else:
                self._random = draws_noise(self._of_rows, tuple(part[:1] for part in batch))
        return self._random

    def _seen(self, batch: Batch) -> Observation:
        return Observation(batch[0], **dict(zip(self.besides, batch[1:], strict=False)))

    def _stream(self, observation: Observation) -> Stream:
        """The noise of every draw of every sample under this checkpoint.

        Keyed by the checkpoint's weights: scores of several checkpoints are the sum of those of each, in any order,
        and their errors are independent.
        """
        return Stream(draws_of(observation.keys ^ self.snapshot.noise_key(), self.seed, self.draws))

    def _of_vae(self, model: BaseVAE, observation: Observation, fold: bool) -> Tensor:
        each = observation.interleaved(self.draws)
        own = observation if fold else each
        encoded = model.encode(own.x, **own.given)
        if fold and self.draws > 1:
            encoded = (
                encoded[0].repeat_interleave(self.draws, 0),
                encoded[1].repeat_interleave(self.draws, 0),
            )
        drawn = self._stream(observation).normal((model.noise_draws, *encoded[0].shape[1:]))
        noise = drawn.to(encoded[0]).transpose(0, 1)
        losses: Tensor = encoded_already(model, each.x, encoded)(each.x, noise=noise, **each.given)
        return losses

    def _of_rows(self, rows: Batch) -> Tensor:
        rows = tuple(
            part.clone() for part in rows
        )  # A forward may write into them, x -= 0.5, and they come again.
        if self.loss_fn is None:
            losses = self.model(rows[0], **self._seen(rows).given)
            wanted = "model(x), with loss_fn=None,"
        else:
            output = self.model(*rows[:-1]) if len(rows) > 1 else self.model(rows[0])
            losses = self.loss_fn(output, rows[-1])
            wanted = "loss_fn"
        if not isinstance(losses, Tensor):
            raise TypeError(f"TracIn: {wanted} expected to return a tensor, got {type(losses).__name__}")
        count = len(rows[0])
        if losses.dim() == 0:
            reduction = getattr(self.loss_fn, "reduction", None)
            if reduction not in ("sum", "mean"):
                raise ValueError(
                    f"TracIn: {wanted} expected to return one loss a sample, [{count}], got a scalar; use "
                    "reduction='none', or a loss with an attribute reduction, 'sum' or 'mean'"
                )
            # Gradients are taken of the sum over all rows: each gets its own loss's.
            return (losses if reduction == "sum" else losses * count).expand(count) / count
        if losses.shape != (count,):
            raise ValueError(
                f"TracIn: {wanted} expected to return one loss a sample, [{count}], got {list(losses.shape)}"
            )
        return losses

"""The negative log-likelihood as an outlier score."""

from __future__ import annotations

from torch import Tensor, nn

from fastvae.arguments import expect_at_least, expect_numbers
from fastvae.likelihoods.weights import expanded
from fastvae.models.base import BaseVAE
from fastvae.models.inputs import check_condition, check_is_tensor
from fastvae.models.observation import Observation
from fastvae.noise import SampleNoise
from fastvae.ood.base import Detector
from fastvae.private import PrivateCopies
from fastvae.wrappers import unwrap

__all__ = ["LikelihoodScore", "NegativeLogLikelihood"]


class LikelihoodScore(Detector):
    """What the scores share that importance-sample log p(x).

    Args:
        model: a trained fastvae model; a copy of it is scored, in eval mode.
        num_samples: importance samples.
        seed: of the noise, which is keyed by (seed, the image): a score does not depend on the batch.

    Raises:
        ValueError: num_samples below 1.
        TypeError: not a fastvae model.
    """

    model: BaseVAE

    def __init__(self, model: BaseVAE, *, num_samples: int = 1000, seed: int = 0) -> None:
        model = self._checked_model("model", model)
        expect_numbers(type(self).__name__, seed=seed)
        expect_at_least(type(self).__name__, 1, num_samples=num_samples)
        super().__init__(model)
        self.num_samples, self.seed = num_samples, seed
        self._copies = PrivateCopies()

    def _checked_model(self, argument: str, model: nn.Module) -> BaseVAE:
        """The fastvae model, inside of what torch.compile and data parallel wrap around it."""
        inner = unwrap(model) if isinstance(model, nn.Module) else model
        if not isinstance(inner, BaseVAE):
            found = type(inner).__name__
            raise TypeError(f"{type(self).__name__}: {argument}: expected a fastvae model, got {found}")
        return inner

    def _log_likelihood(self, model: BaseVAE, copies: PrivateCopies, observation: Observation) -> Tensor:
        """log p(x) [B] in nats, on the model's device, by one of its ``copies``."""
        name, (x, condition, weight) = type(self).__name__, observation
        check_is_tensor(self, x)
        if condition is not None:
            check_condition(self, condition, len(x))
        if weight is not None:
            observation = observation._replace(weight=expanded(name, weight, x))
        device = next(model.parameters()).device
        own = observation.each(lambda tensor: tensor.to(device))
        with copies.borrowed(model) as private:
            noise = SampleNoise(own.keys, self.seed, private.weight_draws)
            return private.log_likelihood(own.x, self.num_samples, noise=noise, **own.given)


class NegativeLogLikelihood(LikelihoodScore):
    """-log p(x) by importance sampling.

    The plain score, and known to mislead: images simpler than the training data often score as more likely
    than these (Nalisnick et al., Do Deep Generative Models Know What They Don't Know?, ICLR 2019).

    Args:
        model: a trained fastvae model; a copy of it is scored, in eval mode.
        num_samples: importance samples.
        seed: of the noise, which is keyed by (seed, the image): a score does not depend on the batch.

    Raises:
        ValueError: num_samples below 1.
        TypeError: not a fastvae model.
    """

    def predict(self, x: Tensor, *, condition: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Scores [B] in nats of images x [B, ...], higher = more foreign; detached, on the model's device.

        Args:
            x: [B, ...].
            condition: [B, ...] of a conditional model: -log p(x | condition).
            weight: [B, ...] of x's elements: with zeros and ones -log p of those that are observed.
        """
        return -self._log_likelihood(self.model, self._copies, Observation(x, condition, weight))

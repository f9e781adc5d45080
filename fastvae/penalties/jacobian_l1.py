"""The Jacobian L1 penalty."""

from __future__ import annotations

from torch import Tensor

from fastvae._jacobian_reference import check_estimator
from fastvae.arguments import expect_not_negative, expect_numbers
from fastvae.likelihoods import Bernoulli
from fastvae.models.base import TrainingStep
from fastvae.ops.jacobian_l1 import jacobian_l1
from fastvae.penalties.annealing import AnnealedPenalty

__all__ = ["JacobianL1"]


class JacobianL1(AnnealedPenalty):
    """gamma sum_i sum_p |d y_p / d z_i|: each code may move few outputs y of the decoder.

    Rhodes and Lee, "Local Disentanglement in Variational Auto-Encoders Using Jacobian L1 Regularization",
    NeurIPS 2021, equation (5). y is the decoder's output, after the sigmoid for a Bernoulli likelihood: the mean of
    p(x | z), but for the categorical likelihood, where y are the logits. z is the code that was decoded (for an HVAE
    the end of the trajectory), taken as given: the penalty has a gradient to the decoder alone.

    The value is exact. Its gradient trains smooth decoders (Softplus, SiLU, GELU, Tanh) without bias; of one with ReLU
    it leaves out what moving the kinks does, and differences, as the authors take them, have most of that
    (:func:`fastvae.ops.jacobian_l1`).

    Args:
        gamma: weight, in nats per unit of |dy / dz|.
        anneal_steps: the weight grows linearly from 0 to gamma over so many optimisation steps.
        estimator: "exact", or "difference": forward differences of length ``step``.
        step: of differences, in units of z.

    Raises:
        ValueError: gamma negative or not finite, anneal_steps below 0, an estimator that is not known, a step that is
            not positive; in training, a decoder that the operator refuses (BatchNorm or Dropout in train mode couple
            samples).
    """

    differentiates_decoder = True

    def __init__(
        self, gamma: float = 0.1, anneal_steps: int = 0, *, estimator: str = "exact", step: float = 1e-2
    ) -> None:
        super().__init__(anneal_steps)
        expect_numbers("JacobianL1", gamma=gamma)
        check_estimator("JacobianL1", estimator, step)
        expect_not_negative("JacobianL1", gamma=gamma)
        self.gamma = float(gamma)
        self.estimator, self.difference_step = estimator, float(step)

    def forward(self, step: TrainingStep) -> Tensor:
        """The weighted penalty of each sample: [B]."""
        likelihood = step.model.likelihood
        # With probs=True the decoder ends in the sigmoid itself.
        sigmoid = isinstance(likelihood, Bernoulli) and not likelihood.probs
        output = "sigmoid" if sigmoid else "identity"
        value = jacobian_l1(
            step.model.decoder,
            step.z.detach(),
            "none",
            output=output,
            condition=step.condition,
            estimator=self.estimator,
            step=self.difference_step,
        )
        return self.gamma * self.ramp() * value

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        how = "" if self.estimator == "exact" else f", estimator='difference', step={self.difference_step}"
        return f"gamma={self.gamma}, {super().extra_repr()}{how}"

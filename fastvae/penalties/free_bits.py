"""Free bits: as much information a latent variable may carry at no cost."""

from __future__ import annotations

from torch import Tensor

from fastvae.arguments import expect_choice, expect_not_negative
from fastvae.models.base import Penalty, TrainingStep
from fastvae.penalties.annealing import BetaAnnealing

__all__ = ["FreeBits"]

PER = ("batch", "sample")


class FreeBits(Penalty):
    """Where the KL of a latent variable is below ``nats`` it costs so many nats, and nothing pushes it to zero.

    Kingma et al. ("Improving variational inference with inverse autoregressive flow", NeurIPS 2016, equation 15), with
    a group for each latent variable: in place of beta KL_j the loss has beta max(nats, KL_j), KL_j the mean over the
    batch of KL(q(z_j | x) || N(0, 1)). It keeps latent variables alive that the KL would switch off early in training.
    Where beta is annealed (``BetaAnnealing``) it is the beta of the moment.

    Args:
        nats: for each latent variable, at least 0.
        per: "batch", as published; or "sample": the KL of each sample is compared by itself, so that a sample's loss
            does not depend on the others.

    Raises:
        ValueError: nats negative or not finite, another ``per``; in training, a model whose loss has no KL in closed
            form (HVAE, IWAE).
    """

    on_views = True

    def __init__(self, nats: float, *, per: str = "batch") -> None:
        super().__init__()
        expect_not_negative("FreeBits", nats=nats)
        expect_choice("FreeBits", PER, per=per)
        self.nats, self.per = float(nats), per

    @property
    def couples_samples(self) -> bool:  # type: ignore[override]
        """Whether the mean over the batch counts."""
        return self.per == "batch"

    def forward(self, step: TrainingStep) -> Tensor:
        """beta sum_j (nats - KL_j) over the latent variables with less than that: [B]."""
        model = step.model
        if not model.has_closed_kl:
            raise ValueError(
                "FreeBits: expected a model whose loss has the KL of q(z | x) in closed form (a VAE, say), got "
                f"{type(model).__name__}"
            )
        kl = 0.5 * (step.mu.square() + step.logvar.exp() - 1 - step.logvar)
        compared = kl if self.per == "sample" else kl.mean(0, keepdim=True)
        is_free = compared.detach() < self.nats
        found = model.beta * ((self.nats - kl) * is_free).sum(1)
        for penalty in model.penalties:
            if isinstance(penalty, BetaAnnealing):
                found = penalty.ramp().to(found.dtype) * found
        return found

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        return f"nats={self.nats}, per={self.per!r}"

"""What the flow of a Hamiltonian VAE does."""

from __future__ import annotations

import torch

from fastvae import plot
from fastvae.models import HVAE, VAE
from fastvae.plot.trajectories import energy
from fastvae.report.page import Picture, Section, Table
from fastvae.report.subject import Subject
from fastvae.report.wording import estimated, mean_with_error

__all__ = ["trajectory"]

_DRAWS = 20


@torch.no_grad()
def trajectory(subject: Subject) -> Section | None:
    """Energies along trajectories, and the bound with and without the flow; None for other models."""
    model = subject.model
    if not isinstance(model, HVAE):
        return None
    count = subject.afford(
        len(subject.test), _DRAWS * subject.flops_of_weight, least=min(50, len(subject.test))
    )
    x, given = subject.here(subject.test[:count]), subject.given(subject.test_condition, count)
    without = VAE(model.encoder, model.decoder, model.likelihood, latent_dim=model.latent_dim).eval()
    generators = subject.generator(), subject.generator()
    differences = torch.stack(
        [
            model.elbo(x, generator=generators[0], **given)
            - without.elbo(x, generator=generators[1], **given)
            for _ in range(_DRAWS)
        ]
    )
    gain = mean_with_error(differences.mean(0).cpu())
    few, of_few = x[:50], subject.given(subject.test_condition, min(50, count))
    kept = energy(model, few, subject.seed, tempered=False, **of_few)
    error = (kept - kept[0]).abs().max(0).values
    step, (alpha, beta_0) = model.step_size, model.tempering()
    helps = gain.mean > 2 * gain.standard_error
    steps = f"{model.num_steps} leapfrog steps"
    return Section(
        "Trajectories",
        f"{steps} add {estimated(gain)} nats to the bound of the same networks without them."
        if helps
        else f"{steps} gain nothing: {estimated(gain)} nats against the same networks without them.",
        helps,
        [
            f"""H = −log p(x | z) + |z|²/2 + |ρ|²/2 at every step of {len(few)} test {subject.noun}s' trajectories. Each
            step multiplies the momentum ρ by its α, which changes H; with all α = 1 exact dynamics would keep it, and
            what is left is the integrator's error. The encoder was trained with the flow: alone it may do worse than
            one that was trained alone."""
        ],
        Table(
            ["", ""],
            [
                ["step size", _span(step)],
                ["α", _span(alpha)],
                ["β₀, inverse temperature at the start", f"{float(beta_0):.3f}"],
                ["largest error of H without tempering, median", f"{float(error.median()):.4f} nats"],
            ],
        ),
        [
            Picture(
                plot.png(plot.energies(model, few, seed=subject.seed, **of_few)),
                "Change of H over the leapfrog steps.",
            )
        ],
    )


def _span(values: torch.Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.4f}" if f"{low:.4f}" == f"{high:.4f}" else f"{low:.4f} to {high:.4f}"

"""One method against the same model without it: a section each, with the verdict that its numbers give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae import plot
from fastvae.data import Compose, FactorSpace, RandomAffine, binarize, three_dots
from fastvae.demo.training import alike, train_alike
from fastvae.metrics import Estimate, active_units, local_codes, mig, mutual_information
from fastvae.models import HVAE, VAE, BaseVAE
from fastvae.ood import NegativeLogLikelihood
from fastvae.ops import gaussian_kl, jacobian_l1
from fastvae.penalties import BetaAnnealing, ConsistencyVAE, JacobianL1VAE
from fastvae.report import Picture, Section, Table
from fastvae.report.wording import estimated, mean_with_error
from fastvae.training import History

__all__ = ["Budget", "consistency", "hamiltonian", "jacobian", "train_hamiltonian"]

LATENTS = 10
# Three times the paper's: a hundredth of its steps have to show what the penalty does.
GAMMA = 0.3


@dataclass(frozen=True)
class Budget:
    """Of one comparison."""

    steps: int
    """Of each model, at most."""
    seconds: float
    """Of all training, about."""
    seed: int = 0
    images: int = 500
    """Over which measures are taken, at most."""
    progress: bool = True


def train_hamiltonian(
    images: Tensor, held_out: Tensor, budget: Budget
) -> tuple[dict[str, BaseVAE], dict[str, History]]:
    """An HVAE and a VAE that start alike."""
    # "drop": one trajectory that diverges early in training should not end the demonstration.
    flow = functools.partial(HVAE, num_steps=5, step_size=0.05, beta_0=0.5, on_divergence="drop")
    models = alike({"HVAE": flow, "VAE": VAE}, images.shape[1:], 16, budget.seed)
    return models, _train(models, images, held_out, budget)


def hamiltonian(
    models: dict[str, BaseVAE], histories: dict[str, History], held_out: Tensor, budget: Budget
) -> Section:
    """ELBO and log p(x) of an HVAE and of a VAE, and their paired differences."""
    x = held_out[: budget.images]
    values: dict[str, dict[str, Tensor]] = {}
    for name, model in models.items():
        score = NegativeLogLikelihood(model, num_samples=200, seed=budget.seed)
        values[name] = {"bound (ELBO)": _bound(model, x, budget.seed), "log p(x)": -score(x).double()}
    rows, gains = [], {}
    for of in ("bound (ELBO)", "log p(x)"):
        gains[of] = mean_with_error(values["HVAE"][of] - values["VAE"][of])
        each = [estimated(mean_with_error(values[name][of])) for name in ("VAE", "HVAE")]
        rows.append([of, *each, estimated(gains[of])])
    rows.append(["training", *(f"{sum(histories[name].seconds):.0f} s" for name in ("VAE", "HVAE")), ""])
    helps = _is_gain(gains["log p(x)"])
    return Section(
        "Hamiltonian VAE against VAE",
        f"At as many steps the HVAE's log p(x) is {_said(gains['log p(x)'], 'higher', 'lower')} nats than the VAE's.",
        helps,
        [
            f"""Both have the same networks, start from the same weights and take {histories["HVAE"].steps[-1]:,} steps;
            the HVAE adds 5 leapfrog steps (Caterini et al., NeurIPS 2018). Means over {len(x)} held-out images ±
            their standard errors, and of the paired differences; one training run, and other seeds give others."""
        ],
        Table(["nats", "VAE", "HVAE", "difference"], rows),
    )


def jacobian(budget: Budget, *, count: int = 5000, clusters: int = 20) -> Section:
    """A VAE with and without the Jacobian penalty on three dots, whose factors are known."""
    dots = three_dots(count + 100, size=16, radius=0.15, seed=budget.seed)
    images, held_out = (part.tensors()[0] for part in dots.split(count, 100, seed=budget.seed))
    x = binarize(held_out, torch.Generator().manual_seed(budget.seed))
    anneal = max(1, budget.steps // 4)
    kinds: dict[str, Callable[..., BaseVAE]] = {
        "JL1-VAE": functools.partial(JacobianL1VAE, gamma=GAMMA, anneal_steps=anneal),
        "VAE": lambda *networks: VAE(*networks, penalties=[BetaAnnealing(anneal)]),
    }
    models = alike(kinds, images.shape[1:], LATENTS, budget.seed)
    histories = _train(models, images, x, budget, batch_size=64)
    measures = {
        name: _separation(model, x, dots.space, clusters, budget.seed) for name, model in models.items()
    }
    rows = [[of, *(f"{measures[name][of]:.3g}" for name in ("VAE", "JL1-VAE"))] for of in measures["VAE"]]
    rows.append(["training step", *(_step(histories[name]) for name in ("VAE", "JL1-VAE"))])
    with_penalty, without = measures["JL1-VAE"], measures["VAE"]
    smaller = without["J1"] / with_penalty["J1"]
    gained = with_penalty["local MIG, ρ = 0.1"] - without["local MIG, ρ = 0.1"]
    verdict = (
        f"The penalty makes the decoder's Jacobian {smaller:.1f} times as small and local MIG "
        f"{with_penalty['local MIG, ρ = 0.1']:.2f} from {without['local MIG, ρ = 0.1']:.2f}, for "
        f"{without['ELBO'] - with_penalty['ELBO']:.1f} nats of the bound."
    )
    figures = {name: plot.jacobian_columns(model, x[:3], latents=8) for name, model in models.items()}
    return Section(
        "Jacobian penalty",
        verdict,
        smaller > 1.1 and gained > 0.02,
        [
            f"""A JL1-VAE (Rhodes and Lee, NeurIPS 2021) also pays γ = {GAMMA:g} for every unit of J1, the sum of
            |∂y/∂z| over latents and pixels: each latent may then change few pixels. Three dots of 16x16 pixels have 6
            known factors; local MIG (0 to 1) says how far each has a latent of its own among neighbours within ρ of the
            factors' range (ρ = 1: everywhere). Both models took {histories["VAE"].steps[-1]:,} steps, the penalty grew
            over the first {anneal:,}; the paper's took 300,000."""
        ],
        Table(["", "VAE", "JL1-VAE"], rows),
        [
            Picture(
                plot.png(figures[name]),
                f"{name}: what a step along each latent adds to each pixel (red) or takes from it (blue).",
            )
            for name in ("VAE", "JL1-VAE")
        ],
    )


@torch.no_grad()
def _separation(model: BaseVAE, x: Tensor, space: FactorSpace, clusters: int, seed: int) -> dict[str, float]:
    step = model.objective(x, beta=1.0, generator=torch.Generator().manual_seed(seed))
    found = {
        "ELBO": -float(step.loss.mean()),
        "J1": float(jacobian_l1(model.decoder, step.z, output="sigmoid")),
    }
    for rho in (0.1, 1.0):
        codes = local_codes(model, space, rho, num_points=2000, num_clusters=clusters, seed=seed)
        scores = [mig(each, factors, bins=5) for each, factors in codes]
        found[f"local MIG, ρ = {rho:g}"] = sum(scores) / len(scores)
    return found


def consistency(images: Tensor, held_out: Tensor, budget: Budget) -> Section:
    """A VAE with and without consistency between an image and a view of it."""
    augment = Compose(RandomAffine(), binarize)
    kinds: dict[str, Callable[..., BaseVAE]] = {
        "CR-VAE": functools.partial(ConsistencyVAE, augment=augment, consistency=0.1),
        "VAE": VAE,
    }
    models = alike(kinds, images.shape[1:], LATENTS, budget.seed)
    histories = _train(models, images, held_out, budget)
    generator = torch.Generator().manual_seed(budget.seed)
    x = held_out[: budget.images]
    views = augment(x, generator)
    measures = {name: _steadiness(model, x, views, budget.seed) for name, model in models.items()}
    rows = [[of, *(f"{measures[name][of]:.3g}" for name in ("VAE", "CR-VAE"))] for of in measures["VAE"]]
    apart = "KL between view and image, nats"
    closer = measures["VAE"][apart] / measures["CR-VAE"][apart]
    price = measures["VAE"]["ELBO"] - measures["CR-VAE"]["ELBO"]
    return Section(
        "Consistency between views",
        f"Codes of a view and of its image lie {closer:.1f} times as near, for {price:.1f} nats of the bound."
        if closer > 1
        else f"Nothing gained: codes of a view and of its image lie {1 / closer:.1f} times as far apart.",
        closer > 1.1,
        [
            f"""A CR-VAE (Sinha and Dieng, NeurIPS 2021) also sees a random view of each image (rotated by up to 15
            degrees, shifted by up to 5%, scaled by 0.9 to 1.1) and pays 0.1 for every nat of KL between the codes of
            the two. Both took {histories["VAE"].steps[-1]:,} steps, the CR-VAE with twice as many images. Measures are
            of {len(x)} held-out images and one view of each; mutual information is at most log of that number."""
        ],
        Table(["", "VAE", "CR-VAE"], rows),
    )


@torch.no_grad()
def _steadiness(model: BaseVAE, x: Tensor, views: Tensor, seed: int) -> dict[str, float]:
    return {
        "ELBO": float(_bound(model, x, seed).mean()),
        "KL between view and image, nats": float(gaussian_kl(*model.encode(views), *model.encode(x)).mean()),
        "mutual information, nats": mutual_information(model, x, seed=seed),
        f"active units of {LATENTS}": active_units(model, x),
    }


def _train(
    models: dict[str, BaseVAE], images: Tensor, held_out: Tensor, budget: Budget, batch_size: int = 100
) -> dict[str, History]:
    return train_alike(
        models,
        images,
        held_out[: budget.images],
        steps=budget.steps,
        seconds=budget.seconds,
        seed=budget.seed,
        batch_size=batch_size,
        progress=budget.progress,
    )


@torch.no_grad()
def _bound(model: BaseVAE, x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([model.elbo(x, generator=generator).double() for _ in range(20)]).mean(0)


def _is_gain(difference: Estimate) -> bool:
    return difference.mean > 2 * difference.standard_error


def _said(difference: Estimate, above: str, below: str) -> str:
    if abs(difference.mean) <= 2 * difference.standard_error:
        return f"neither {above} nor {below} beyond error ({estimated(difference)})"
    size = Estimate(abs(difference.mean), difference.standard_error)
    return f"{above if difference.mean > 0 else below} by {estimated(size)}"


def _step(history: History) -> str:
    return f"{1e3 * sum(history.seconds) / history.steps[-1]:.1f} ms"

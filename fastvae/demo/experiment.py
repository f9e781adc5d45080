"""What the report is made from: trained models, their scores on held-out images, and timings."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fastvae.demo.penalty import Pair, train_pairs
from fastvae.demo.problem import Problem
from fastvae.demo.timing import Timings, measure
from fastvae.demo.training import train_in_turns
from fastvae.demo.views import Twins, train_twins
from fastvae.models import HVAE, VAE, BaseVAE
from fastvae.training import History
from fastvae.training.randomness import global_generators_kept

__all__ = ["Demo", "Trained", "run_demo"]

FLOW: dict[str, object] = {"num_steps": 10, "tempering": "free", "step_size": 0.05, "beta_0": 0.5}
ELBO_DRAWS = 20

# Of the training time, what is not for the VAE and the HVAE.
_PAIRS_SHARE = 1 / 3
_TWINS_SHARE = 1 / 18


@dataclass
class Trained:
    """A trained model and its scores."""

    name: str
    model: BaseVAE
    history: History
    elbo: Tensor
    """[M] mean of ``ELBO_DRAWS`` one-sample estimates for each held-out image, in nats."""
    log_likelihood: Tensor
    """[M] by importance sampling, in nats."""


@dataclass
class Demo:
    """A finished run: what sections read."""

    problem: Problem
    vae: Trained
    hvae: Trained
    timings: Timings
    pairs: list[Pair]
    """VAEs with and without the Jacobian penalty: on three dots, and on the images."""
    twins: Twins
    """VAEs with and without consistency regularisation."""
    stopped: str
    """What ended the training of VAE and HVAE: "epochs" or "time"."""
    seed: int
    seconds: float
    """Wall-clock time of everything so far."""
    command: str

    @property
    def models(self) -> tuple[Trained, Trained]:
        """VAE and HVAE."""
        return self.vae, self.hvae

    @property
    def hamiltonian(self) -> HVAE:
        """The Hamiltonian VAE itself."""
        assert isinstance(self.hvae.model, HVAE)
        return self.hvae.model


def run_demo(problem: Problem, *, epochs: int, seconds: float, seed: int, command: str) -> Demo:
    """Train a VAE and an HVAE side by side, score and time them; then VAEs with and without penalties.

    Args:
        problem: images and networks.
        epochs: at most.
        seconds: wall-clock time of all training, approximately at most.
        seed: of weights, shuffling and noise.
        command: for the report.
    """
    started = time.perf_counter()
    vae = problem.build(VAE, seed)
    # "drop": one trajectory that diverges early in training should not end the demonstration; it is counted.
    hvae = problem.build(HVAE, seed, **FLOW, on_divergence="drop")
    models = {"VAE": vae, "HVAE": hvae}
    own_seconds = (1 - _PAIRS_SHARE - _TWINS_SHARE) * seconds
    histories, stopped = train_in_turns(models, problem, epochs, own_seconds, seed, "training")
    trained = [
        _score(name, model, histories[name], problem, seed)
        for name, model in tqdm(models.items(), desc="scoring", unit="model")
    ]
    assert isinstance(vae, VAE) and isinstance(hvae, HVAE)
    with global_generators_kept():
        timings = measure(vae, hvae, problem.train[: problem.batch_size].round(), problem.learning_rate, seed)
    pairs = train_pairs(problem, epochs, _PAIRS_SHARE * seconds, seed)
    twins = train_twins(problem, epochs, _TWINS_SHARE * seconds, seed)
    elapsed = time.perf_counter() - started
    return Demo(problem, trained[0], trained[1], timings, pairs, twins, stopped, seed, elapsed, command)


@torch.no_grad()
def _score(name: str, model: BaseVAE, history: History, problem: Problem, seed: int) -> Trained:
    generator = torch.Generator().manual_seed(seed)
    x = problem.held_out
    elbo = torch.stack([model.elbo(x, generator=generator) for _ in range(ELBO_DRAWS)]).mean(0)
    log_likelihood = model.log_likelihood(x, problem.importance_samples, generator=generator)
    return Trained(name, model, history, elbo.double(), log_likelihood.double())

"""What the report is made from: two trained models, their scores on held-out images, and timings."""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastvae.demo.problem import Batches, Problem
from fastvae.demo.timing import Timings, measure
from fastvae.models import HVAE, VAE, BaseVAE
from fastvae.training import History, fit
from fastvae.training.randomness import global_generators_kept

__all__ = ["Demo", "Trained", "run_demo"]

FLOW: dict[str, object] = {"num_steps": 10, "tempering": "free", "step_size": 0.05, "beta_0": 0.5}
ELBO_DRAWS = 20

# A slice of training of one model before it is the other's turn: both then meet the same disturbances.
_SLICE_SECONDS = 1.0


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
    stopped: str
    """What ended training: "epochs" or "time"."""
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
    """Train a VAE and an HVAE side by side, score and time them.

    Args:
        problem: images and networks.
        epochs: at most.
        seconds: wall-clock time of the training of both, approximately at most.
        seed: of weights, shuffling and noise.
        command: for the report.
    """
    started = time.perf_counter()
    vae = problem.build(VAE, seed)
    # "drop": one trajectory that diverges early in training should not end the demonstration; it is counted.
    hvae = problem.build(HVAE, seed, **FLOW, on_divergence="drop")
    models = {"VAE": vae, "HVAE": hvae}
    histories, stopped = _train(models, problem, epochs, seconds, seed)
    trained = [
        _score(name, model, histories[name], problem, seed)
        for name, model in tqdm(models.items(), desc="scoring", unit="model")
    ]
    assert isinstance(vae, VAE) and isinstance(hvae, HVAE)
    with global_generators_kept():
        timings = measure(vae, hvae, problem.train[: problem.batch_size].round(), problem.learning_rate, seed)
    return Demo(
        problem, trained[0], trained[1], timings, stopped, seed, time.perf_counter() - started, command
    )


def _train(
    models: dict[str, BaseVAE], problem: Problem, epochs: int, seconds: float, seed: int
) -> tuple[dict[str, History], str]:
    """Train all models for the same number of epochs, in turns, until ``epochs`` or ``seconds``."""
    batches = Batches(problem.train, problem.batch_size, problem.epoch_limit)
    held_out = problem.held_out.repeat(problem.curve_draws, 1, 1, 1).split(problem.batch_size)
    histories: dict[str, History] = {}
    started = time.perf_counter()
    done, turn, stopped = 0, 1, "epochs"
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=epochs, desc="training", unit="epoch", dynamic_ncols=True, mininterval=0.5) as bar,
    ):
        while done < epochs:
            turn_started = time.perf_counter()
            turn = min(turn, epochs - done)
            for name, model in models.items():
                # Resumed from its own checkpoint, which gives what one uninterrupted run gives, bit for bit.
                histories[name] = fit(
                    model,
                    batches,
                    epochs=done + turn,
                    optimizer=functools.partial(torch.optim.Adam, lr=problem.learning_rate),
                    val_loader=held_out,
                    run_dir=Path(folder) / name,
                    checkpoint_every=epochs,
                    seed=seed,
                    binarize=True,
                    progress=False,
                )
            done += turn
            bar.update(turn)
            bar.set_postfix({f"{name} ELBO": f"{-h.val_loss[-1]:.2f}" for name, h in histories.items()})  # type: ignore[operator]
            now = time.perf_counter()
            each = (now - turn_started) / turn
            if done < epochs and now - started + each > seconds:
                stopped = "time"
                break
            left = seconds - (now - started)
            turn = max(1, int(min(len(models) * _SLICE_SECONDS, left) / each))
    for model in models.values():
        model.eval()
    return histories, stopped


@torch.no_grad()
def _score(name: str, model: BaseVAE, history: History, problem: Problem, seed: int) -> Trained:
    generator = torch.Generator().manual_seed(seed)
    x = problem.held_out
    elbo = torch.stack([model.elbo(x, generator=generator) for _ in range(ELBO_DRAWS)]).mean(0)
    log_likelihood = model.log_likelihood(x, problem.importance_samples, generator=generator)
    return Trained(name, model, history, elbo.double(), log_likelihood.double())

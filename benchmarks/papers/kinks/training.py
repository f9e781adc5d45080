"""What training reaches with each estimator, measured by the exact value for all."""

from __future__ import annotations

import argparse
import functools
import re

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.data import load
from fastvae.ops import gaussian_kl, jacobian_l1

from ...networks import mlp
from ..shared import Row, stored
from .gradients import ACTIVATIONS, ESTIMATORS, WIDTHS

TOLD = ("network", "activation", "gamma", "seed", "estimator")
TRAINED = ("exact", "difference, step 0.01")


def small_data(count: int, seed: int) -> Tensor:
    """Numbers in (0, 1) of four factors through a smooth network: [N, 20]."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(WIDTHS[0], 32, generator=generator)
    last = torch.randn(32, WIDTHS[-1], generator=generator)
    factors = torch.randn(count, WIDTHS[0], generator=generator)
    return torch.sigmoid(torch.tanh(factors @ first) @ last)


def reached(
    train: Tensor,
    test: Tensor,
    widths: tuple[int, ...],
    activation: str,
    estimator: str,
    gamma: float,
    steps: int,
    seed: int,
    arguments: argparse.Namespace,
) -> Row:
    """The objective of test data [N, ...] and its parts."""
    torch.manual_seed(seed)
    latents, *hidden, outputs = widths
    act = ACTIVATIONS[activation]
    encoder = torch.nn.Sequential(
        torch.nn.Flatten(), *mlp(outputs, *reversed(hidden), 2 * latents, activation=act)
    )
    model = fastvae.JacobianL1VAE(encoder, mlp(*widths, activation=act), gamma=gamma, **ESTIMATORS[estimator])
    loader = DataLoader(TensorDataset(train.flatten(1)), arguments.batch_size, shuffle=True, drop_last=True)
    fastvae.fit(
        model,
        loader,
        epochs=-(-steps // len(loader)),
        max_steps=steps,
        optimizer=functools.partial(torch.optim.Adam, lr=arguments.lr),
        seed=seed,
        progress=False,
    )
    with torch.no_grad():
        x = test.flatten(1)
        mu, logvar = model.encode(x)
        noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(seed))
        z = mu + torch.exp(logvar / 2) * noise
        reconstruction = -model.likelihood.log_prob(model.decoder(z), x).mean()
        parts = {
            "reconstruction": float(reconstruction),
            "kl": float(gaussian_kl(mu, logvar).mean()),
            "penalty": float(jacobian_l1(model.decoder, z, output="sigmoid")),
        }
    objective = parts["reconstruction"] + parts["kl"] + gamma * parts["penalty"]
    return {**parts, "objective": objective}


def compared(arguments: argparse.Namespace) -> list[Row]:
    """Every network, activation, gamma and estimator, the seeds in common."""
    data = load(arguments.data, split="train")
    images, unseen = data.tensors()[0], load(arguments.data, split="test").tensors()[0][:1000]
    small = small_data(3000, arguments.seed)
    dense = (arguments.latent_dim, arguments.width, arguments.width, images[0].numel())
    cases = [
        ("small", small[:2000], small[2000:], WIDTHS, arguments.small_gamma, arguments.small_steps),
        ("dense", images, unseen, dense, arguments.gamma, arguments.steps),
    ]
    rows: list[Row] = []
    for network, train, test, widths, gammas, steps in cases:
        for activation in ACTIVATIONS:
            for gamma in gammas:
                for seed in range(arguments.seeds):
                    for estimator in TRAINED:
                        case = (train, test, widths, activation, estimator, gamma, steps, seed, arguments)
                        unit = dict(zip(TOLD, (network, activation, gamma, seed, estimator), strict=True))
                        name = re.sub(r"[^\w.]+", "-", "-".join(map(str, unit.values())))
                        found = stored(
                            arguments.checkpoint / f"{name}.json", unit, functools.partial(reached, *case)
                        )
                        rows.append(
                            {
                                "network": network,
                                "widths": "-".join(map(str, widths)),
                                "activation": activation,
                                "gamma": gamma,
                                "seed": seed,
                                "estimator": estimator,
                                **found,
                            }
                        )
                        told = [rows[-1][key] for key in TOLD]
                        print(*told, f"{found['objective']:.2f}", flush=True)
    return rows

"""A training step of every model, beside pythae's and beside the same loss in plain PyTorch, eager and compiled.

    python -m benchmarks.speed models             about five minutes on 2 cores
    python -m benchmarks.speed models --quick     tiny sizes, no torch.compile: does everything run?

A step draws its noise, evaluates the mean loss of a batch and its gradient to all parameters, float32; all contestants
share one pair of networks. "eager" is what a careful user writes: the likelihood on logits, and K + 1 forces for the
Hamiltonian flow. "pythae" is the published library's model around the same networks. Before they are timed, all
gradients are compared with those of the eager loss in float64 at the same noise, but for pythae's HVAE, which computes
another objective (see the note in the results). Written are models-<device>.json, .md and .png.
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastvae
from fastvae import reference
from fastvae.architectures import hvae_decoder, hvae_encoder
from fastvae.models import BaseVAE

from . import command, common, flow_rivals, networks, report

Pair = tuple[nn.Module, nn.Module]

OURS, EAGER, PYTHAE = "ours", "eager", "pythae"
COMPILED = ", torch.compile"
TOLERANCE = 2e-4
"""of gradients in float32, relative to those in float64; that of the steps of a trajectory add up"""

Loss = Callable[[BaseVAE, Tensor, Tensor], Tensor]

HVAE_NOTE = (
    "pythae's HVAE evaluates 2 K forces and decodes twice, and takes the forces for constants, so that its gradient is "
    "not that of its loss. Ours and the other two differentiate the whole trajectory."
)


def objective(model: BaseVAE, x: Tensor, noise: Tensor) -> Tensor:
    """Ours at a given noise: what a user compiles."""
    return model.objective(x, noise=noise).loss.mean()


def log_px(model: BaseVAE, z: Tensor, x: Tensor) -> Tensor:
    logits = model.decoder(z).flatten(1)
    return -F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(1)


def vae_loss(model: BaseVAE, x: Tensor, noise: Tensor) -> Tensor:
    mu, logvar = model.encoder(x).chunk(2, 1)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
    return (kl - log_px(model, mu + torch.exp(logvar / 2) * noise[0], x)).mean()


def iwae_loss(model: BaseVAE, x: Tensor, noise: Tensor) -> Tensor:
    mu, logvar = model.encoder(x).chunk(2, 1)
    z = mu + torch.exp(logvar / 2) * noise
    log_w = 0.5 * (noise.square() + logvar - z.square()).sum(2)
    log_w = log_w + log_px(model, z.flatten(0, 1), x.repeat(len(noise), 1, 1, 1)).reshape(log_w.shape)
    return (math.log(len(noise)) - log_w.logsumexp(0)).mean()


def hvae_loss(flow: Callable[..., Sequence[Tensor]]) -> Loss:
    def loss(model: BaseVAE, x: Tensor, noise: Tensor) -> Tensor:
        assert isinstance(model, fastvae.HVAE)
        mu, logvar = model.encoder(x).chunk(2, 1)
        z_0 = mu + torch.exp(logvar / 2) * noise[0]
        rho_0 = noise[1] / model.beta_0.sqrt()
        alpha = model.alpha.to(x.dtype)
        step_size = model.step_size.expand(len(alpha), 1)
        z, rho, log_likelihood = flow(model.decoder, z_0, rho_0, x.flatten(1), step_size, alpha)
        log_ratio = 0.5 * (logvar + noise.square().sum(0) - z.square() - rho.square()).sum(1)
        return -(log_likelihood + log_ratio).mean()

    return loss


@dataclass(frozen=True)
class Case:
    key: str
    title: str
    networks: Callable[[], Pair]
    model: Callable[..., BaseVAE]
    options: dict[str, Any]
    loss: Loss
    compiled_loss: Loss
    pythae: str
    """the name of pythae's model"""
    pythae_options: dict[str, Any]
    batch: int
    size: int
    """of the images, in pixels either way"""
    seconds: float
    channels: int = 1


def cases(quick: bool) -> list[Case]:
    size, hidden, latents, batch = (4, 8, 4, 3) if quick else (28, 512, 32, 100)
    draws, steps, width = (2, 2, 2) if quick else (5, 10, 16)
    seconds, colours = (0.1, 2) if quick else (15, 32)
    shape = f"{size**2}-{hidden}-{hidden}-{2 * latents}, {latents}-{hidden}-{hidden}-{size**2}, B = {batch}"

    def mlp() -> Pair:
        return networks.dense(size, hidden, latents)

    def convolutional() -> Pair:
        return hvae_encoder(width), hvae_decoder(width)

    def colour() -> Pair:
        return networks.colour(colours, latents)

    def vae(key: str, title: str, pair: Callable[[], Pair], pixels: int) -> Case:
        return Case(
            key, title, pair, fastvae.VAE, {}, vae_loss, vae_loss, "VAE", {}, batch, pixels, seconds
        )  # fmt: skip

    def hvae(key: str, title: str, pair: Callable[[], Pair], num_steps: int, pixels: int) -> Case:
        theirs = {"n_lf": num_steps, "eps_lf": 0.01, "learn_eps_lf": True, "learn_beta_zero": True}
        ours = {"num_steps": num_steps, "step_size": 0.01, "on_divergence": "ignore"}
        losses = hvae_loss(reference.hamiltonian_flow), hvae_loss(flow_rivals.functional_flow)
        return Case(
            key,
            f"HVAE, K = {num_steps}, {title}",
            pair,
            fastvae.HVAE,
            ours,
            *losses,
            "HVAE",
            theirs,
            batch,
            pixels,
            seconds,
        )

    return [
        vae("vae-mlp", f"VAE, {shape}", mlp, size),
        vae("vae-conv", f"VAE, the paper's convolutional, B = {batch}", convolutional, 28),
        replace(
            vae("vae-colour", f"VAE, 3x32x32, {colours} to {4 * colours} channels, B = 64", colour, 32),
            channels=3,
            batch=3 if quick else 64,
        ),
        Case(
            "iwae-mlp",
            f"IWAE, K = {draws}, {shape}",
            mlp,
            fastvae.IWAE,
            {"num_samples": draws},
            iwae_loss,
            iwae_loss,
            "IWAE",
            {"number_samples": draws},
            batch,
            size,
            seconds,
        ),
        hvae("hvae-mlp", shape, mlp, steps, size),
        hvae("hvae-conv", f"the paper's convolutional, B = {batch}", convolutional, min(3, steps), 28),
    ]


def pythae_model(case: Case, pair: Pair) -> nn.Module:
    """pythae's model around the same networks; its VAE and IWAE want probabilities, its HVAE logits.

    Raises:
        ImportError: pythae is not installed.
    """
    from pythae import models
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = pair[0]

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.network(x).chunk(2, 1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = pair[1]

        def forward(self, z: Tensor) -> Any:
            logits = self.network(z)
            return ModelOutput(reconstruction=logits if case.pythae == "HVAE" else logits.sigmoid())

    latents = next(pair[1].parameters()).shape[1]
    config = getattr(models, case.pythae + "Config")(
        input_dim=(case.channels, case.size, case.size),
        latent_dim=latents,
        reconstruction_loss="bce",
        **case.pythae_options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the logits that it gets
        model: nn.Module = getattr(models, case.pythae)(config, Encoder(), Decoder())
    return model


class Problem:
    """The data, the networks and the contestants of a case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case = case
        pair = case.networks()
        self.model = case.model(*pair, **case.options).to(device)
        # pythae's HVAE takes no pixels between 0 and 1.
        self.x = torch.rand(case.batch, case.channels, case.size, case.size, device=device).round()
        self.shared = [parameter for network in pair for parameter in network.parameters()]
        self._pair = pair

    def draw(self) -> Tensor:
        """Standard normal [draws, B, d]; from one seed the numbers that our models and pythae's draw."""
        return self.model.draw_noise(self.x.new_empty(self.case.batch, self.model.latent_dim or 0))

    def ours(self) -> Callable[[], Tensor]:
        return lambda: self.model.loss(self.x)

    def plain(self, loss: Loss) -> Callable[[], Tensor]:
        return lambda: loss(self.model, self.x, self.draw())

    def step(self, loss: Callable[[], Tensor], own: Sequence[nn.Parameter]) -> common.Contestant:
        parameters = [*self.shared, *own]
        return lambda: torch.autograd.grad(loss(), parameters, allow_unused=True)

    def own(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters of a model that are not its networks'."""
        return [p for p in model.parameters() if not any(p is q for q in self.shared)]

    def contestants(self, compile_too: bool) -> tuple[dict[str, common.Contestant], dict[str, str]]:
        """Everybody who can run, and why the others cannot."""
        case, notes = self.case, {}
        found = {
            OURS: self.step(self.ours(), self.own(self.model)),
            EAGER: self.step(self.plain(case.loss), self.own(self.model)),
        }
        for name, loss in ((OURS, objective), (EAGER, case.compiled_loss)) if compile_too else ():
            compiled = self.step(self.plain(torch.compile(loss)), self.own(self.model))
            try:
                compiled()
                found[name + COMPILED] = compiled
            except Exception as error:  # whatever Dynamo, AOTAutograd or a C++ compiler raises
                notes[name + COMPILED] = f"not timed: {common.why(error)}"
        try:
            theirs = pythae_model(case, self._pair).to(self.x.device)
            # The learnt numbers of its trajectory are its own.
            found[PYTHAE] = self.step(lambda: theirs({"data": self.x}).loss, self.own(theirs))
        except ImportError as error:
            notes[PYTHAE] = f"not timed: {common.why(error)}"
        return found, notes

    def errors(self, contestants: dict[str, common.Contestant]) -> dict[str, float]:
        """Of the gradients to the networks' parameters, relative to the eager loss in float64 at the same noise."""
        torch.manual_seed(1)
        noise = self.draw().double()
        exact = copy.deepcopy(self.model).double()
        parameters = [*exact.encoder.parameters(), *exact.decoder.parameters()]
        expected = torch.autograd.grad(self.case.loss(exact, self.x.double(), noise), parameters)
        errors = {}
        for name, contestant in contestants.items():
            if (name, self.case.pythae) == (PYTHAE, "HVAE"):
                continue
            torch.manual_seed(1)
            result: Any = contestant()
            errors[name] = common.relative_error(result[: len(expected)], expected)
        return errors


def run_case(case: Case, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    command.progress(case.title)
    problem = Problem(case, device)
    contestants, notes = problem.contestants(options.compile)
    errors = problem.errors(contestants)
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise ArithmeticError(f"{case.title}: {name} is off by {error:.1e}")
    if case.pythae == "HVAE" and PYTHAE in contestants:
        notes[PYTHAE] = HVAE_NOTE
    with FlopCounterMode(display=False) as counter:
        contestants[EAGER]()
    operations = counter.get_total_flops()
    timings, gflops = common.interleave_with_gemm(
        contestants, device, seconds=case.seconds, quick=options.quick
    )
    floor_ms = {report.FLOPS: operations / gflops / 1e6}
    return report.case_record(
        case, OURS, timings, floor_ms, operations=operations, gflops=gflops, errors=errors, notes=notes
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return command.parse_with_compilers(__doc__, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device, path = command.begin(options, "models")
    environment = common.environment(device)
    records = [run_case(case, device, options) for case in cases(options.quick)]
    settings = {
        "threads": options.threads,
        "precision": "float32, TF32 off",
        "pythae": common.version_of("pythae"),
    }
    sections = ["# A training step"]
    for record in records:
        sections += [
            report.case_section(record, OURS),
            report.error_table(record, "gradient's error against float64"),
        ]
    sections.append(report.environment_table(environment, settings))
    panels = report.panels(records, OURS)
    command.draw(path, panels, "time / ours, medians")
    record = {"benchmark": "models", "environment": environment, "settings": settings, "cases": records}
    common.publish(path, record, sections)

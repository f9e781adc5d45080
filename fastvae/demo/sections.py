"""The sections of the report. To add one, write a function of a finished ``Demo`` and append it to SECTIONS.

A section may compute from the trained models; it says nothing that was not measured in this run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from fastvae import info
from fastvae.demo.experiment import ELBO_DRAWS, FLOW, Demo
from fastvae.demo.figures import COLOURS, canvas, image_rows, png, signed
from fastvae.demo.influence import DRAWS, influences_of
from fastvae.demo.latents import informative, jacobian_columns, traversals
from fastvae.demo.outliers import outliers
from fastvae.demo.penalty import ANNEAL_STEPS, GAMMA, LATENTS, RHOS, Member, Pair
from fastvae.demo.report import Picture, Section, Table
from fastvae.demo.timing import Timing
from fastvae.demo.trajectory import energy
from fastvae.demo.views import LATENTS as TWIN_LATENTS
from fastvae.demo.views import WEIGHT

__all__ = ["SECTIONS"]


def scores(demo: Demo) -> Section:
    """ELBO and NLL of both models, and their paired differences."""
    rows = []
    for name, of in (
        ("ELBO", lambda trained: trained.elbo),
        ("negative log-likelihood (NLL)", lambda trained: -trained.log_likelihood),
    ):
        first, second = of(demo.vae), of(demo.hvae)
        rows.append([name, *(_mean_and_error(value) for value in (first, second, second - first))])
    difference = demo.vae.log_likelihood - demo.hvae.log_likelihood
    mean, error = float(difference.mean()), _standard_error(difference)
    verdict = "lower" if mean < 0 else "higher"
    problem = demo.problem
    return Section(
        "Scores on held-out images",
        [
            f"""In nats per image, on {len(problem.held_out)} images that took no part in training: mean over
            the images ± its standard error. The last column is the mean of the paired differences.""",
            f"""The HVAE's NLL is {verdict} by {abs(mean):.3f} ± {error:.3f} nats. The standard errors are
            those of the choice of images; this is one training run of each model, and other seeds give other
            numbers.""",
            f"""ELBO: mean of {ELBO_DRAWS} one-sample estimates for each image. NLL: importance sampling with
            {problem.importance_samples:,} samples for each image, an upper bound in expectation. Images are
            binarised: a pixel is 1 with probability its grey value (held-out images: drawn once).""",
        ],
        Table(["", "VAE", "HVAE", "HVAE − VAE"], rows),
        printed=True,
    )


def samples(demo: Demo) -> Section:
    """Images that the models make up."""
    generator = torch.Generator().manual_seed(demo.seed)
    shape, columns = demo.problem.train.shape[1:], 16
    noisy = demo.problem.train[torch.randperm(len(demo.problem.train), generator=generator)[: 2 * columns]]
    rows = [("data", noisy.repeat(math.ceil(2 * columns / len(noisy)), 1, 1, 1)[: 2 * columns])]
    for trained in demo.models:
        made = trained.model.sample(4 * columns, generator=generator)
        rows.append((trained.name, made.reshape(-1, *shape)))
    return Section(
        "Samples",
        ["Codes drawn from the standard normal prior, decoded: the mean of each pixel. Not selected."],
        pictures=[Picture(image_rows(rows, columns), "Training images (grey), and samples of both models.")],
    )


def reconstructions(demo: Demo) -> Section:
    """Held-out images beside what the models make of their codes."""
    generator = torch.Generator().manual_seed(demo.seed)
    columns = min(16, len(demo.problem.held_out))
    x = demo.problem.held_out[:columns]
    rows = [("held out", demo.problem.held_out_grey[:columns]), ("binarised", x)]
    rows += [(trained.name, trained.model.reconstruct(x, generator=generator)) for trained in demo.models]
    return Section(
        "Reconstructions",
        [
            f"""Held-out images, and the decoded mean of one code of each: the VAE's from its encoder, the
            HVAE's at the end of a trajectory of {demo.hamiltonian.num_steps} leapfrog steps from there."""
        ],
        pictures=[
            Picture(
                image_rows(rows, columns),
                "Held-out images as they are, as the models see them, and reconstructed.",
            )
        ],
    )


def trajectories(demo: Demo) -> Section:
    """Energy along the trajectories of held-out images."""
    model = demo.hamiltonian
    x = demo.problem.held_out[:50]
    tempered, plain = energy(model, x, demo.seed, tempered=True), energy(model, x, demo.seed, tempered=False)
    figure, axes = canvas(7.2, 2.7, 2)
    for axis, title, values in zip(
        axes, ("as trained, tempered", "tempering off"), (tempered, plain), strict=True
    ):
        change = values - values[0]
        steps = range(len(change))
        axis.plot(steps, change.numpy(), color=COLOURS["HVAE"], linewidth=0.6, alpha=0.25)
        axis.plot(
            steps, change.median(1).values, color=COLOURS["HVAE"], linewidth=2, marker="o", markersize=3
        )
        axis.set(title=title, xlabel="leapfrog step", ylabel="H − H at the start, nats")
    error = (plain - plain[0]).abs().max(0).values
    eps, (alpha, beta_0) = model.step_size.detach(), (value.detach() for value in model.tempering())
    return Section(
        "Energy along the trajectory",
        [
            f"""H = −log p(x | z) + |z|²/2 + |ρ|²/2 at every leapfrog step, for {len(x)} held-out images; the
            thick line is the median. Left, the flow as it was trained: each step multiplies the momentum ρ by
            its α, which changes the energy. Right, the same start and the same step size with all α = 1,
            where exact dynamics would keep H constant: what is left is the error of the leapfrog
            integrator."""
        ],
        Table(
            ["after training", ""],
            [
                ["step size", _span(eps, 4)],
                ["α of each step", ", ".join(f"{value:.3f}" for value in alpha.tolist())],
                ["β₀, the inverse temperature at the start", f"{float(beta_0):.4f}"],
                [
                    "largest |H − H at the start| without tempering, median over images",
                    f"{error.median():.3f} nats",
                ],
                ["trajectories given up because they diverged", f"{model.divergences}"],
            ],
        ),
        [Picture(png(figure), "Change of the energy H in nats over the steps of the trajectory.")],
    )


def influences(demo: Demo) -> Section:
    """Training images that shaped held-out ones."""
    found = influences_of(demo.vae.model, demo.problem, demo.seed)
    rows = [
        (f"{number}", torch.cat((query[None], best, worst)))
        for number, (query, best, worst) in enumerate(
            zip(found.queries, found.proponents, found.opponents, strict=True), 1
        )
    ]
    columns, each = len(rows[0][1]), found.proponents.shape[1]
    return Section(
        "Influence of training images",
        [
            f"""TracIn of the VAE at its final weights, over all parameters: the dot product of the loss
            gradients of a training image and a held-out one, each averaged over {DRAWS} codes. A proponent's
            gradient points the same way: a step on it lowers the loss of the held-out image; a step on an
            opponent raises it. Scores of {found.count:,} training images, with their self-influence (the squared
            norm of an image's own gradient), took {found.seconds:.1f} s."""
        ],
        pictures=[
            Picture(
                image_rows(rows, columns),
                f"In each row: a held-out image, its {each} strongest proponents, its {each} strongest opponents.",
            ),
            Picture(
                image_rows([("highest", found.own), ("median", found.median)], len(found.own)),
                "Training images of highest self-influence, which the model found hardest, and of median.",
            ),
        ],
    )


def curves(demo: Demo) -> Section:
    """ELBO against steps and time."""
    figure, axes = canvas(7.2, 2.9, 2)
    lowest, highest = math.inf, -math.inf
    for trained in demo.models:
        history, colour = trained.history, COLOURS[trained.name]
        held_out = -torch.tensor(history.val_loss, dtype=torch.float64)
        train = -torch.tensor(history.train_loss, dtype=torch.float64)
        seconds = torch.tensor(history.seconds, dtype=torch.float64).cumsum(0)
        for axis, time in zip(axes, (torch.tensor(history.steps), seconds), strict=True):
            axis.plot(time, train, color=colour, linewidth=0.8, alpha=0.45)
            axis.plot(time, held_out, color=colour, linewidth=1.8, label=trained.name)
        # The first epochs would flatten everything after them.
        lowest = min(lowest, float(held_out[len(held_out) // 20]))
        highest = max(highest, float(held_out.max()), float(train.max()))
    for axis, label in zip(axes, ("optimisation steps", "seconds of training"), strict=True):
        axis.set(xlabel=label, ylabel="ELBO, nats per image")
        axis.set_ylim(lowest, highest + 0.05 * (highest - lowest) + 1e-3)
    axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    return Section(
        "Training",
        [
            f"""ELBO per image after every epoch: on held-out images (thick; samples of each:
            {demo.problem.curve_draws}, with the same noise every time) and in training (thin; one sample of
            each). The models take the same number of steps, in turns; the time of an epoch includes its
            pass over the held-out images."""
        ],
        pictures=[Picture(png(figure), "ELBO against optimisation steps and against seconds of training.")],
    )


def penalty(demo: Demo) -> Section:
    """VAEs with and without the Jacobian penalty: scores, traversals, columns of the Jacobian."""
    rows: list[list[str]] = []
    pictures: list[Picture] = []
    for pair in demo.pairs:
        rows += _pair_rows(pair)
        pictures += _pair_pictures(pair)
    dots, images = demo.pairs
    assert dots.factors is not None
    steps = " and ".join(f"{pair.plain.history.steps[-1]:,} on {pair.name}" for pair in demo.pairs)
    unfinished = [pair.name for pair in demo.pairs if pair.plain.history.steps[-1] < ANNEAL_STEPS]
    return Section(
        "Jacobian penalty",
        [
            f"""A VAE, and a JL1-VAE (Rhodes and Lee, NeurIPS 2021) that also pays γ = {GAMMA:g} for every unit
            of J1, the sum of |∂y/∂z| over the {LATENTS} latents and all pixels y of an image: each latent may
            then change few pixels. Both start from the same small networks and see the same images; steps:
            {steps}. The weights of the KL term (to 1) and of the penalty grow over the first {ANNEAL_STEPS}
            steps{", which were not reached on " + " and ".join(unfinished) if unfinished else ""}.""",
            f"""Three dots are drawn images of {dots.held_out.shape[2]}x{dots.held_out.shape[3]} pixels with
            {len(dots.factors)} known factors, the places of the dots (larger ones than the paper's, which
            so short a training would not find). Local MIG and modularity (0 to 1) say
            how far each factor has a latent of its own among neighbours within ρ of the factors' range; ρ = 1
            is global. {len(images.held_out)} held-out images each; one training run, and other seeds give
            other numbers.""",
        ],
        Table(["", "VAE", "JL1-VAE"], rows),
        pictures,
        printed=True,
    )


def _pair_rows(pair: Pair) -> list[list[str]]:
    measures: list[tuple[str, Callable[[Member], str]]] = [
        ("ELBO, nats per image", lambda member: f"{member.elbo:.2f}"),
        ("J1 per image", lambda member: f"{member.jacobian:.2f}"),
        ("training step", lambda member: f"{member.milliseconds:.1f} ms"),
    ]
    for rho in RHOS if pair.factors is not None else ():
        for index, score in enumerate(("local MIG", "local modularity")):
            measures.append(
                (f"{score}, ρ = {rho:g}", lambda member, r=rho, i=index: f"{member.local[r][i]:.3f}")  # type: ignore[misc]
            )
    return [[f"{pair.name}: {name}", *(show(member) for member in pair.members)] for name, show in measures]


def _pair_pictures(pair: Pair) -> list[Picture]:
    lines, columns = 5, LATENTS
    x = pair.held_out
    moved = [(member.name, traversals(member.model, x, lines, columns)) for member in pair.members]
    slopes = [(member.name, jacobian_columns(member.model, x[:3], columns)) for member in pair.members]
    largest = max(float(images.abs().max()) for _, images in slopes)
    coloured = [(name, signed(images, max(largest, 1e-12))) for name, images in slopes]
    return [
        Picture(
            image_rows(moved, columns),
            f"{pair.name}, traversals: one image, whose code moves from -2.5 to 2.5 along one latent; a line "
            f"for each of the {lines} latents that say most.",
        ),
        Picture(
            image_rows(coloured, columns),
            f"{pair.name}, columns of the Jacobian: what a small step along each latent adds to each pixel "
            f"(red) or takes from it (blue), for three held-out images; latents that say most first, one "
            "scale for all.",
        ),
    ]


def consistency(demo: Demo) -> Section:
    """VAEs with and without consistency regularisation: scores, and where the codes of two views lie."""
    twins = demo.twins
    columns = min(16, len(twins.held_out))
    x, views = twins.held_out[:columns], twins.views[:columns]
    figure, axes = canvas(7.2, 3.2, 2)
    for axis, twin in zip(axes, twins.members, strict=True):
        first, second = informative(twin.model, twins.held_out)[:2].tolist()
        at = twin.means[:, :, [first, second]]
        axis.plot(*at.permute(2, 0, 1), color="0.6", linewidth=0.8)
        for label, points in zip(("image", "view"), at, strict=True):
            axis.scatter(points[:, 0], points[:, 1], s=12, label=label)
        axis.set(title=twin.name, xlabel=f"latent {first}", ylabel=f"latent {second}")
    axes[0].legend(frameon=False, fontsize=8)
    rows = [
        [name, *(show(twin) for twin in twins.members)]
        for name, show in (
            ("ELBO, nats per image", lambda twin: f"{twin.elbo:.2f}"),
            ("KL between the codes of a view and of its image, nats", lambda twin: f"{twin.divergence:.3f}"),
            ("mutual information of image and code, nats", lambda twin: f"{twin.information:.3f}"),
            (f"active units of {TWIN_LATENTS}", lambda twin: f"{twin.active}"),
        )
    ]
    return Section(
        "Consistency between views",
        [
            f"""A VAE, and a CR-VAE (Sinha and Dieng, NeurIPS 2021) that also sees a random view of each image
            (rotated by up to 15 degrees, shifted by up to 5 %, scaled by 0.9 to 1.1) and pays λ = {WEIGHT:g} for
            every nat of KL between the codes of the two. Both start from the same small networks and take
            {twins.plain.history.steps[-1]:,} steps, the CR-VAE's with twice as many images.""",
            f"""ELBO and KL: means over {len(twins.held_out)} held-out images and one view of each. Mutual
            information (at most log {twins.images:,} = {math.log(twins.images):.2f}) and active units (latents
            whose mean varies by more than 0.01): over {twins.images:,} training images. One training run, and
            other seeds give other numbers.""",
        ],
        Table(["", *(twin.name for twin in twins.members)], rows),
        [
            Picture(
                image_rows([("held out", x), ("views", views)], columns),
                "Held-out images and a view of each.",
            ),
            Picture(
                png(figure),
                "Means of the codes of held-out images and of their views, joined by a line, in the two latents "
                "that say most.",
            ),
        ],
        printed=True,
    )


def timings(demo: Demo) -> Section:
    """Our operator beside eager autograd, and whole training steps."""
    measured = demo.timings
    fused, eager = (1e3 * timing.quantile(0.5) for timing in (measured.fused, measured.eager))
    return Section(
        "Time per training step",
        [
            f"""Milliseconds for a batch of {measured.batch_size} images on the CPU
            (threads: {torch.get_num_threads()}); all four were timed in turn, {len(measured.fused.seconds)}
            rounds. Flow: forward and
            backward through {measured.num_steps} leapfrog steps of the trained model, with the gradient to
            start, momentum, step size, α and the decoder. Eager autograd evaluates as few forces (K + 1) as
            our operator.""",
            f"""Our operator takes {fused:.2f} ms where eager autograd takes {eager:.2f} ms (ratio of medians
            {eager / fused:.2f}). Their gradients differ by at most {measured.difference:.1e} of the largest
            entry of each gradient.""",
            *_disturbances(measured.load),
        ],
        Table(
            ["", "median", "quartiles"],
            [
                _times("flow, fastvae.ops.hamiltonian_flow", measured.fused),
                _times("flow, eager autograd (fastvae.reference)", measured.eager),
                _times("whole training step, VAE", measured.vae),
                _times("whole training step, HVAE", measured.hvae),
            ],
        ),
        printed=True,
    )


def setting(demo: Demo) -> Section:
    """Data, networks and how they were trained."""
    problem, history = demo.problem, demo.hvae.history
    shape = "x".join(str(size) for size in problem.train.shape[1:])
    epoch = min(problem.epoch_limit, len(problem.train))
    end = "the number of epochs asked for" if demo.stopped == "epochs" else "the time limit"
    held_out = f"{len(problem.held_out):,}"
    if problem.held_out_in_all > len(problem.held_out):
        held_out += f", chosen at random from {problem.held_out_in_all:,}"
    return Section(
        "What was run",
        ["Both models have the same networks and start from the same weights."],
        Table(
            ["", ""],
            [
                ["data", problem.name],
                ["training images", f"{len(problem.train):,} of {shape}, an epoch sees {epoch:,}"],
                ["held-out images", held_out],
                ["networks", problem.networks],
                ["likelihood", "Bernoulli, dynamic binarisation"],
                ["HVAE at the start", ", ".join(f"{name}={value!r}" for name, value in FLOW.items())],
                [
                    "optimiser",
                    f"Adam, learning rate {problem.learning_rate:g}, batches of {problem.batch_size}",
                ],
                ["epochs, steps", f"{len(history.steps)}, {history.steps[-1]:,}; ended by {end}"],
                ["training time, VAE", f"{sum(demo.vae.history.seconds):.1f} s"],
                ["training time, HVAE", f"{sum(history.seconds):.1f} s"],
                ["the whole run", f"{demo.seconds:.0f} s before this report was drawn"],
                ["seed", str(demo.seed)],
            ],
            numbers=2,
        ),
    )


def versions(demo: Demo) -> Section:
    """The command, and what ``python -m fastvae info`` says."""
    rows = [["command", demo.command], *([name, value] for name, value in info.describe())]
    return Section("Command and versions", table=Table(["", ""], rows, numbers=2))


SECTIONS: list[Callable[[Demo], Section]] = [
    scores,
    samples,
    reconstructions,
    trajectories,
    influences,
    outliers,
    curves,
    timings,
    penalty,
    consistency,
    setting,
    versions,
]


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def _mean_and_error(values: Tensor) -> str:
    return f"{float(values.mean()):.3f} ± {_standard_error(values):.3f}"


def _times(name: str, timing: Timing) -> list[str]:
    low, median, high = (1e3 * timing.quantile(q) for q in (0.25, 0.5, 0.75))
    return [name, f"{median:.2f} ms", f"{low:.2f} to {high:.2f}"]


def _disturbances(load: float | None) -> list[str]:
    cpus = os.cpu_count() or 1
    if load is None or load < 1.5 * cpus:
        return []
    return [
        f"""The machine was busy with other things: {load:.1f} processes wanted its {cpus} CPUs. These times
        are then unreliable, those of many threads most of all."""
    ]


def _span(values: Tensor, digits: int) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.{digits}f}" if low == high else f"{low:.{digits}f} to {high:.{digits}f}"

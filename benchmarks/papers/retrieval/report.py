"""The table and the figure."""

from __future__ import annotations

from pathlib import Path

from scipy import stats

from ..shared import Row, measured_on, table, write_results

PUBLISHED = {"own_strongest": "over 99%", "same_label": "about 80%"}
"""Of the paper, on MNIST."""


def share(value: float, count: int) -> str:
    """A proportion with Wilson's 95% interval."""
    low, high = stats.binomtest(round(value * count), count).proportion_ci(method="wilson")
    return f"{value:.1%} of {count} ({low:.1%} to {high:.1%})"


def as_text(results: Row, settings: Row) -> str:
    """What was found beside what the paper reports, in Markdown."""
    retrieval = results["retrieval"]
    count = retrieval["queries"]
    rows: list[Row] = [
        {
            "what": "training images that are their own strongest proponent",
            "found": share(retrieval["own_strongest"], count),
            "paper": PUBLISHED["own_strongest"],
        },
        {
            "what": "the same after 1, 2, ... checkpoints",
            "found": " ".join(f"{value:.0%}" for value in retrieval["own_strongest_by_checkpoints"]),
        },
    ]
    if "own_strongest_common_noise" in retrieval:
        found = share(retrieval["own_strongest_common_noise"], count)
        rows.append({"what": "own strongest with common noise on both sides", "found": found})
    if "same_label" in retrieval:
        rows += [
            {
                "what": "strongest proponents with the test image's label",
                "found": share(retrieval["same_label"], count),
                "paper": PUBLISHED["same_label"],
            },
            {
                "what": "ten strongest proponents with the test image's label, s.e. over images",
                "found": f"{retrieval['same_label_of_ten']:.1%} +- {retrieval['same_label_of_ten_error']:.1%}",
            },
        ]
    if foreign := results.get("foreign"):
        hidden = foreign["hidden"]

        def auroc(of: str) -> str:
            low, high = foreign[f"{of}_interval"]
            return f"{foreign[of]:.4f} ({low:.4f} to {high:.4f})"

        rows += [
            {
                "what": f"{hidden} foreign images of {foreign['of']} by self-influence, AUROC",
                "found": auroc("auroc"),
            },
            *(
                {"what": f"the same {what}, AUROC", "found": auroc(name)}
                for name, what in (
                    ("auroc_unbiased", "without the variance of S draws"),
                    ("auroc_of_loss", "by the loss"),
                )
                if name in foreign
            ),
            {
                "what": "area under the curve of those found (the paper's measure)",
                "found": f"{foreign['area']:.4f}; at most {foreign['largest_area']:.4f}",
                "paper": "at most 0.992",
            },
            {
                "what": f"foreign among the {hidden} of highest self-influence",
                "found": f"{foreign['found'][hidden - 1]}",
            },
            {
                "what": "rank correlation of self-influence and loss",
                "found": f"{foreign['rank_correlation_with_loss']:.3f}",
            },
        ]
    return (
        f"VAE-TracIn on {settings['data']}: {settings['train_images']} training images, width {settings['width']}, "
        f"{settings['latent_dim']} latents, beta {settings['beta']:g}, {settings['epochs']} epochs of "
        f"{settings['optimizer']} {settings['lr']:g}, {settings['checkpoints']} checkpoints, S = "
        f"{settings['num_samples']}, independent noise on both sides unless said (a self-influence is a squared norm), "
        f"fresh at each checkpoint; seed {settings['seed']}, one run, 95% intervals over the choice of images. "
        "Paper: Kong, Chaudhuri, NeurIPS 2021: 60,000 images, 30 checkpoints of 1,600 epochs of SGD 1e-4; "
        "the gradients of theirs are of squared error + 4 KL, although training minimises BCE; ours are of the loss of "
        "training.\n\n"
        + table(
            [{"paper": None, **row} for row in rows],
            [("what", "", ""), ("found", "found", ""), ("paper", "paper", "")],
        )
        + f"\n\n{measured_on(settings)}"
    )


def write_all(results: Row, settings: Row, path: Path) -> None:
    """What there is so far, at ``path`` with .json, .md and .png behind it."""
    write_results(path.parent, path.name, {"settings": settings, **results}, as_text(results, settings))
    draw(results, path.with_name(f"{path.name}.png"))


def draw(results: Row, path: Path) -> None:
    """Foreign images found against images looked at, in order of self-influence."""
    if "foreign" not in results:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    foreign = results["foreign"]
    found, hidden = foreign["found"], foreign["hidden"]
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    looked = range(1, len(found) + 1)
    axes.plot(
        looked, [count / hidden for count in found], label=f"self-influence, AUROC {foreign['auroc']:.3f}"
    )
    axes.plot(
        looked, [min(1, count / hidden) for count in looked], color="gray", linestyle="--", label="ideal"
    )
    axes.plot(looked, [count / len(found) for count in looked], color="gray", linestyle=":", label="chance")
    axes.set(
        xscale="log", xlabel="training images looked at", ylabel=f"share of {hidden} foreign images found"
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)

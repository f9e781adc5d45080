"""The table and the figure."""

from __future__ import annotations

from pathlib import Path

from ..shared import Row, table, write_results

PUBLISHED = {"own_strongest": "over 99%", "same_label": "about 80%"}
"""Of the paper, on MNIST."""


def as_text(results: Row, settings: Row) -> str:
    """What was found beside what the paper reports, in Markdown."""
    retrieval = results["retrieval"]
    rows: list[Row] = [
        {
            "what": "training images that are their own strongest proponent",
            "found": f"{retrieval['own_strongest']:.1%} of {retrieval['queries']}",
            "paper": PUBLISHED["own_strongest"],
        },
    ]
    if "own_strongest_common_noise" in retrieval:
        rows.append(
            {
                "what": "the same with common noise on both sides",
                "found": f"{retrieval['own_strongest_common_noise']:.1%}",
            }
        )
    if "same_label" in retrieval:
        rows += [
            {
                "what": "strongest proponents with the test image's label",
                "found": f"{retrieval['same_label']:.1%}",
                "paper": PUBLISHED["same_label"],
            },
            {
                "what": "ten strongest proponents with the test image's label",
                "found": f"{retrieval['same_label_of_ten']:.1%}",
                "paper": None,
            },
        ]
    if foreign := results.get("foreign"):
        count = foreign["hidden"]
        rows += [
            {"what": f"{count} foreign images by self-influence, AUROC", "found": f"{foreign['auroc']:.4f}"},
            {"what": "the same by the loss, AUROC", "found": f"{foreign['auroc_of_loss']:.4f}"},
            {
                "what": f"foreign among the {count} of highest self-influence",
                "found": f"{foreign['found'][count - 1]}",
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
        f"{settings['num_samples']}, independent noise on both sides unless said, fresh at each checkpoint. "
        "Paper: Kong, Chaudhuri, NeurIPS 2021: 60,000 images, 30 checkpoints of 1,600 epochs of SGD 1e-4; "
        "the gradients of theirs are of squared error + 4 KL, although training minimises BCE; ours are of the loss of "
        "training.\n\n"
        + table(
            [{"paper": None, **row} for row in rows],
            [("what", "", ""), ("found", "found", ""), ("paper", "paper", "")],
        )
        + "\n"
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

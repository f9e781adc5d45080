"""fastvae.plot: what is drawn is there, in full, large enough to be read on a phone, and the model stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fastvae

pytest.importorskip("matplotlib")

from drawn import check_readable, shown_images, shown_words
from matplotlib.figure import Figure

from fastvae import plot
from fastvae.plot.latents import signed_colours
from fastvae.plot.trajectories import energy

X = torch.rand(20, 1, 6, 5, generator=torch.Generator().manual_seed(0)).round()
ROWS = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [1.0, 2.0, 5.0, 0.1, 30.0]
)
COUNTS = torch.poisson(torch.tensor([[0.1, 5.0, 1.0, 4e4]]).expand(40, -1), torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 3


def networks(outputs: int = 30) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8))
        return encoder, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def vae() -> fastvae.VAE:
    return fastvae.VAE(*networks())


def hvae() -> fastvae.HVAE:
    return fastvae.HVAE(*networks(), num_steps=3)


def history(epochs: int, held_out: bool) -> fastvae.History:
    losses = [1000.0, *(30 + math.exp(-epoch) for epoch in range(epochs - 1))]
    return fastvae.History(
        train_loss=losses,
        val_loss=[loss + 1 for loss in losses] if held_out else [None] * epochs,
        seconds=[0.1] * epochs,
        steps=[10 * (epoch + 1) for epoch in range(epochs)],
    )


def influenced(rows: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows * k).reshape(rows, k) % 20, torch.randn(rows, k, generator=torch.Generator())


def scores(names: list[str], sets: list[str]) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {name: {of: torch.randn(30, generator=generator) * 1e4 for of in sets} for name in names}


FIGURES: dict[str, tuple[Callable[[], Figure], int, list[str]]] = {
    "samples": (lambda: plot.samples(vae(), X, count=10), 20, ["data", "samples"]),
    "samples alone": (lambda: plot.samples(vae(), shape=(1, 6, 5)), 32, ["samples"]),
    "samples given": (lambda: plot.samples(torch.rand(3, 3, 4, 4)), 3, ["samples"]),
    "reconstructions": (lambda: plot.reconstructions(vae(), X[:5], columns=4), 16, ["reconstruction"]),
    "one reconstruction": (lambda: plot.reconstructions(vae(), X[:1]), 2, ["reconstruction"]),
    "reconstructions given": (lambda: plot.reconstructions(X, X, columns=10), 40, ["reconstruction"]),
    "traversals": (lambda: plot.traversals(vae(), X), 32, ["z0", "z1", "z2", "z3", "-2.5", "value of the latent"]),
    "chosen traversals": (lambda: plot.traversals(vae(), X, latents=[2], columns=3), 3, ["z2", "0.0"]),
    "wide traversals": (lambda: plot.traversals(vae(), X, span=12.5), 32, ["-12.5", "12.5"]),
    "jacobian": (lambda: plot.jacobian_columns(vae(), X[:3], latents=3), 9, ["image 1", "image 3", "latent"]),
    "moments": (lambda: plot.column_moments(ROWS, ROWS[:9] + 1), 0, ["data", "samples", "means"]),
    "moments of counts": (lambda: plot.column_moments(COUNTS, COUNTS[:20]), 0, ["standard deviations"]),
    "values": (lambda: plot.reconstructed_values(ROWS, ROWS + 1), 0, ["value", "reconstruction"]),
    "values of counts": (lambda: plot.reconstructed_values(COUNTS, COUNTS + 3.5), 0, ["value"]),
    "effects": (
        lambda: plot.column_effects(vae(), X.flatten(1), [f"a long name of {i}" for i in range(30)], latents=3), 1,
        ["z0", "z2", "a long name o…", "standard deviations"],
    ),
    "effects on few columns": (lambda: plot.column_effects(vae(), X.flatten(1), columns=2, latents=[1]), 1, ["z1"]),
    "scatter": (lambda: plot.latent_scatter(vae(), X, LABELS), 0, ["label", "0", "1", "2"]),
    "scatter of codes": (lambda: plot.latent_scatter(torch.randn(9, 2)), 0, ["z0", "z1"]),
    "scatter of one latent": (lambda: plot.latent_scatter(torch.randn(9, 1)), 0, ["z0", "rank"]),
    "scatter of ten labels": (
        lambda: plot.latent_scatter(1e4 * torch.randn(50, 2), labels=torch.arange(50) % 10 + 1990), 0, ["1999"],
    ),
    "scatter of many labels": (
        lambda: plot.latent_scatter(torch.randn(90, 3), labels=torch.arange(90), latents=[2, 0]), 0, ["z2", "label"],
    ),
    "energies": (lambda: plot.energies(hvae(), X), 0, ["as trained", "without tempering", "change of H, nats"]),
    "scores": (
        lambda: plot.score_histograms(scores(["NLL", "likelihood regret"], ["held out", "photographs", "noise"])),
        0, ["NLL", "likelihood regret", "ROC", "photographs", "true positives", "false positives"],
    ),
    "many sets": (
        lambda: plot.score_histograms(scores(["NLL"], ["a folder of images", *(f"foreign {n}" for n in range(6))])),
        0, ["foreign 5"],
    ),
    "more sets than colours": (
        lambda: plot.score_histograms(scores(["NLL"], [f"set {n}" for n in range(12)])), 0, ["set 11"],
    ),
    "curves of many": (lambda: plot.training_curves({f"m{n}": history(3, True) for n in range(12)}), 0, ["m11"]),
    "arrays and lists": (
        lambda: plot.score_histograms({"NLL": {"test": X[:, 0, 0, 0].numpy(), "other": [1.0, 2.0]}}), 0, ["other"],
    ),
    "labels in an array": (lambda: plot.latent_scatter(vae(), X, LABELS.numpy()), 0, ["label", "2"]),
    "one set": (lambda: plot.score_histograms({"NLL": {"test": torch.ones(3)}}), 0, ["test"]),
    "influences": (
        lambda: plot.influences(X[:2], X, influenced(2, 4), influenced(2, 3), query_captions=["label 3", "label 4"]),
        16, ["image", "proponents", "opponents", "label 3"],
    ),
    "proponents alone": (lambda: plot.influences(X[:1], X, influenced(1, 3)), 4, ["proponents"]),
    "curves": (
        lambda: plot.training_curves({"VAE": history(40, True), "HVAE": history(30, False)}),
        0, ["VAE", "HVAE", "loss, nats", "optimisation steps", "seconds of training"],
    ),
    "one epoch": (lambda: plot.training_curves(history(1, False)), 0, ["loss, nats"]),
    "captions": (
        lambda: plot.image_blocks({"a": X[:8], "b": torch.rand(2, 4, 3, 50)}, captions={"a": ["1234.5 nats"[:8]] * 8}),
        10, ["a", "b", "1234.5 n"],
    ),
    "tall images": (lambda: plot.image_blocks({"tall": torch.rand(2, 1, 400, 2)}), 2, ["tall"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_readable(name: str) -> None:
    draw, images, words = FIGURES[name]
    before = torch.get_rng_state()
    figure = draw()
    check_readable(figure)
    assert shown_images(figure) == images
    text = shown_words(figure)
    for word in words:
        assert any(word in said for said in text), (word, text)
    if name in ("samples", "energies", "traversals"):
        assert torch.equal(torch.get_rng_state(), before)


def test_bytes_are_shares_of_255() -> None:
    """As fastvae.data holds images; their values lie beyond 1 and would all be white."""
    found = plot.image_blocks({"a": (X[:1] * 200).to(torch.uint8)}).axes[0].images[0].get_array()
    assert found is not None
    assert torch.allclose(torch.as_tensor(found), X[0, 0] * 200 / 255)


def test_pngs_are_960_pixels_wide() -> None:
    data = plot.png(plot.samples(X[:4]))
    assert data[:4] == b"\x89PNG" and int.from_bytes(data[16:20], "big") == 960


def test_notebooks_show_a_figure_by_itself() -> None:
    """Also where nothing has imported pyplot, whose figures alone they would know."""
    picture, size = plot.image_blocks({"noise": torch.rand(3, 1, 4, 4)})._repr_png_()
    assert picture.startswith(b"\x89PNG") and size == {"width": 480}


def test_the_model_stays_as_it_was() -> None:
    for model in (vae(), hvae()):
        model.train()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        plot.samples(model, X)
        plot.reconstructions(model, X)
        plot.traversals(model, X)
        plot.jacobian_columns(model, X[:2])
        plot.latent_scatter(model, X)
        assert all(part.training for part in model.modules())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_traversals_follow_the_latents_that_say_most() -> None:
    decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
    nn.init.zeros_(encoder[1].weight)
    with torch.no_grad():
        encoder[1].bias.copy_(torch.tensor([0.1, 3.0, -1.0, 0.0, 0.0, 0.0]))
    model, x = fastvae.VAE(encoder, decoder), torch.rand(2, 1, 4, 4)
    # KL of a unit Gaussian around m is m^2 / 2.
    torch.testing.assert_close(
        fastvae.metrics.divergence_by_latent(model, x), torch.tensor([0.005, 4.5, 0.5], dtype=torch.float64)
    )
    figure = plot.traversals(model, x, latents=2, columns=5)
    assert [word for word in shown_words(figure) if word.startswith("z")] == ["z1", "z2"]
    for line, latent in enumerate((1, 2)):
        z = torch.tensor([0.1, 3.0, -1.0])
        z[latent] = 2.5
        expected = torch.sigmoid(decoder(z[None]))[0, 0].detach()
        shown = torch.as_tensor(figure.axes[0].images[5 * line + 4].get_array())
        torch.testing.assert_close(shown, expected)


def test_columns_of_the_jacobian_against_a_formula() -> None:
    decoder = nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4)))
    model = fastvae.VAE(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), decoder)
    x = torch.rand(1, 1, 4, 4)
    figure = plot.jacobian_columns(model, x, latents=[1, 0], largest=0.25)
    y = torch.sigmoid(decoder(model.encode(x)[0])).flatten()
    columns = (y * (1 - y) * decoder[0].weight.T[[1, 0]]).detach().reshape(2, 1, 4, 4)
    for shown, expected in zip(figure.axes[0].images, signed_colours(columns, 0.25), strict=True):
        torch.testing.assert_close(
            torch.as_tensor(shown.get_array()), expected.permute(1, 2, 0), atol=1e-6, rtol=1e-5
        )
    colours = signed_colours(torch.tensor([2.0, 0.0, -1.0, -9.0]).reshape(4, 1, 1, 1), 2.0).flatten(1)
    assert colours.tolist() == [[1, 0, 0], [1, 1, 1], [0.5, 0.5, 1], [0, 0, 1]]


def test_energy_is_kept_without_tempering() -> None:
    model = fastvae.HVAE(*networks(), num_steps=8, step_size=0.001)
    kept, tempered = (energy(model, X, 0, tempered=tempered) for tempered in (False, True))
    assert kept.shape == (9, 20) and torch.equal(kept[0], tempered[0])
    # A second-order integrator of step 1e-3.
    assert float((kept - kept[0]).abs().max()) < 1e-3 < float((tempered - tempered[0]).abs().max())
    with pytest.raises(TypeError, match=r"plot\.energies: model: expected an HVAE, got VAE"):
        plot.energies(vae(), X)  # type: ignore[arg-type]


def test_roc_is_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    inside, foreign = torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 0.5])
    figure = plot.score_histograms({"NLL": {"test": inside, "foreign": foreign}})
    false, true = figure.axes[1].lines[0].get_data()
    area = sum((b - a) * (c + d) / 2 for a, b, c, d in zip(false, false[1:], true, true[1:], strict=False))
    expected = sklearn.roc_auc_score([0] * 4 + [1] * 3, torch.cat((inside, foreign)))
    assert area == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plot.samples(vae()),
            r"plot\.samples: expected images \[N, C, H, W\].*got \[32, 30\]; shape=",
        ),
        (
            lambda: plot.samples(vae(), shape=(1, 6, 6)),
            r"shape: expected \[C, H, W\] of 30 values, got \[1, 6, 6\]",
        ),
        (lambda: plot.samples(nn.Linear(1, 1)), "expected a fastvae model, got Linear"),  # type: ignore[arg-type]
        (lambda: plot.image_blocks({}), "blocks: expected at least one"),
        (lambda: plot.image_blocks({"a": X}, columns=0), "columns: expected an int of at least 1, got 0"),
        (lambda: plot.image_blocks({"a": X[:0]}), "not empty"),
        (lambda: plot.image_blocks({"a": X}, captions={"a": ["b"]}), "expected 20 for 'a', got 1"),
        (lambda: plot.image_blocks({"a": X}, captions={"c": []}), r"names of blocks, got \['c'\]"),
        (lambda: plot.traversals(vae(), X, latents=[4]), r"latents: expected numbers from 0 to 3, got \[4\]"),
        (lambda: plot.latent_scatter(vae()), "x: expected samples"),
        (
            lambda: plot.latent_scatter(vae(), X, ["a"] * 20),
            "labels: expected a tensor or an array of numbers",
        ),  # type: ignore[arg-type]
        (lambda: plot.latent_scatter(X.flatten(1) * math.nan), "expected finite codes, got 20 of 20"),
        *(
            (partial(draw, X[:0]), message)
            for draw, message in (
                (partial(plot.reconstructions, vae()), "not empty"),
                (partial(plot.samples, vae()), "not empty"),
                (
                    partial(plot.traversals, vae()),
                    r"plot\.traversals: x: expected at least one image, got none",
                ),
                (
                    partial(plot.jacobian_columns, vae()),
                    r"plot\.jacobian_columns: x: expected at least one image",
                ),
                (
                    partial(plot.latent_scatter, vae()),
                    r"plot\.latent_scatter: x: expected at least one image",
                ),
                (
                    partial(plot.energies, hvae()),
                    r"plot\.energies: x: expected at least one sample, got none",
                ),
            )
        ),
        (lambda: plot.samples(vae(), X, count=0), "count: expected an int of at least 1, got 0"),
        (lambda: plot.reconstructions(vae(), X, columns=0), "columns: expected an int of at least 1, got 0"),
        (lambda: plot.reconstructions(X[:3], X), "a reconstruction of each image, 20, got 3"),
        (lambda: plot.traversals(vae(), X, latents=0), "latents: expected an int of at least 1, got 0"),
        (lambda: plot.traversals(vae(), X, columns=0), "columns: expected an int of at least 1, got 0"),
        (lambda: plot.traversals(vae(), X, span=math.nan), "span: expected a finite number above 0, got nan"),
        (lambda: plot.jacobian_columns(vae(), X, largest=0.0), "largest: expected a finite number above 0"),
        (lambda: plot.influences(X[:2], X, influenced(2, 0)), r"indices and scores \[2, k\], got \[2, 0\]"),
        (lambda: plot.influences(X[:2], X[:3], influenced(2, 4)), "expected indices from 0 to 2, .* to 7"),
        (
            lambda: plot.influences(X[:2], X, influenced(2, 4), query_captions=["a"]),
            "query_captions: expected 2, one an image, got 1",
        ),
        (
            lambda: plot.latent_scatter(torch.rand(3, 2), labels=torch.arange(4)),
            r"labels \[N\], got \[3, 2\]",
        ),
        (lambda: plot.score_histograms({}), "scores: expected at least one"),
        (
            lambda: plot.score_histograms({"NLL": {"a": torch.tensor([math.nan])}}),
            "finite values .* of 'NLL' for 'a'",
        ),
        (lambda: plot.influences(X[:3], X, influenced(2, 4)), r"indices and scores \[3, k\], got \[2, 4\]"),
        (lambda: plot.training_curves(fastvae.History()), "at least one epoch"),
    ],
)
def test_what_cannot_be_drawn_is_said(call: Callable[[], Figure], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()

"""python -m fastvae: a demonstration of seconds with every section, info, and clear refusals."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastvae
from fastvae.__main__ import main
from fastvae.models import HVAE, VAE

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from fastvae.demo import experiment, outliers, penalty, timing, training, views
from fastvae.demo.experiment import run_demo
from fastvae.demo.figures import image_rows, signed
from fastvae.demo.latents import informative, jacobian_columns, traversals
from fastvae.demo.outliers import foreign_images, outliers_of
from fastvae.demo.problem import Batches, Problem, load_problem
from fastvae.demo.report import Picture, Section, Table, as_html, as_text
from fastvae.demo.sections import SECTIONS, _disturbances
from fastvae.demo.trajectory import energy

TITLES = [
    "Scores on held-out images",
    "Samples",
    "Reconstructions",
    "Energy along the trajectory",
    "Influence of training images",
    "Foreign images",
    "Training",
    "Time per training step",
    "Jacobian penalty",
    "Consistency between views",
    "What was run",
    "Command and versions",
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two rounds of timing, few dots, and one thread: other tests may be running beside this one."""
    monkeypatch.setattr(timing, "_ROUNDS", 2)
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    monkeypatch.setattr(penalty, "_DOTS", 30)
    monkeypatch.setattr(outliers, "IMAGES", 10)
    monkeypatch.setattr(outliers, "CONVOLUTIONAL_REGRETS", 2)
    monkeypatch.setattr(outliers, "BACKGROUND_SECONDS", 0.0)
    monkeypatch.setattr(penalty, "_CLUSTER_POINTS", 50)
    monkeypatch.setattr(penalty, "_CLUSTERS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_problem(count: int = 40, shape: tuple[int, ...] = (1, 8, 8)) -> Problem:
    grey = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    return Problem(
        name="noise",
        train=grey,
        held_out=grey[:12].round(),
        held_out_grey=grey[:12],
        held_out_in_all=12,
        convolutional=shape == (1, 28, 28),
        importance_samples=5,
        curve_draws=2,
        learning_rate=2e-3,
        epoch_limit=100,
        batch_size=10,
    )


class Page(HTMLParser):
    """What a reader without JavaScript sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.images: list[bytes] = []
        self.tags: set[str] = set()
        self.words = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "img":
            values = dict(attributes)
            source = values["src"] or ""
            assert values["alt"] and source.startswith("data:image/png;base64,")
            self.images.append(base64.b64decode(source.partition(",")[2]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "every element is closed, in order"

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def test_demo_writes_a_report_with_every_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    digits = fastvae.data.load("digits", split="all").images[:200]
    np.savez(tmp_path / "few.npz", images=digits.numpy())
    out = tmp_path / "deep" / "report"
    arguments = ["demo", "--data", str(tmp_path / "few.npz"), "--epochs", "2", "--out", str(out)]
    assert main([*arguments, "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.titles == TITLES and page.open == []
    assert page.tags.isdisjoint({"script", "link", "iframe"}) and "http" not in text
    assert len(page.images) == 14 and all(image.startswith(b"\x89PNG") for image in page.images)
    for word in ("--epochs 2", "--seed 3", fastvae.__version__, torch.__version__, "180 of 1x8x8", "2, 4;"):
        assert word in page.words
    number = r"-?\d+\.\d{3} ± \d+\.\d{3}"
    assert re.search(rf"ELBO\s+{number}\s+{number}\s+{number}", printed)
    assert re.search(rf"\(NLL\)\s+{number}\s+{number}\s+{number}", printed)
    assert re.search(r"hamiltonian_flow +\d+\.\d\d ms", printed) and "index.html" in printed
    row = re.search(rf"ELBO\s+({number})", printed)
    assert row is not None and row[1] in page.words, "the terminal and the page show the same figures"


def test_figures_are_those_of_the_models(quick: None) -> None:
    """Scores, differences and trajectories against the same computed here."""
    before = torch.get_rng_state()
    demo = run_demo(tiny_problem(), epochs=2, seconds=60, seed=0, command="")
    assert torch.equal(torch.get_rng_state(), before)
    assert demo.stopped == "epochs" and demo.vae.history.steps == demo.hvae.history.steps == [4, 8]
    generator = torch.Generator().manual_seed(0)
    x = demo.problem.held_out
    draws = [demo.hamiltonian.elbo(x, generator=generator) for _ in range(experiment.ELBO_DRAWS)]
    torch.testing.assert_close(demo.hvae.elbo, torch.stack(draws).mean(0).double().detach())
    table = SECTIONS[0](demo).table
    assert table is not None
    difference = demo.vae.log_likelihood - demo.hvae.log_likelihood
    error = float(difference.std()) / len(x) ** 0.5
    assert table.rows[1][3] == f"{float(difference.mean()):.3f} ± {error:.3f}"
    # float32 against float32, the sums in another order: 1e-4 as the operator's own tests have it.
    assert demo.timings.difference < 1e-4
    still = energy(demo.hamiltonian, x, 0, tempered=False)
    assert still.shape == (11, 12) and float((still - still[0]).abs().max()) < float(still[0].abs().mean())


def test_pairs_differ_by_the_penalty_alone(quick: None) -> None:
    problem = tiny_problem(40, (1, 6, 10))
    dots, images = penalty.train_pairs(problem, epochs=2, seconds=60, seed=3)
    assert dots.factors == (64,) * 6 and images.factors is None and images.name == "noise"
    assert dots.held_out.shape == (100, 1, 16, 16) and torch.equal(images.held_out, problem.held_out)
    for pair in (dots, images):
        plain, penalised = pair.members
        assert plain.history.steps == penalised.history.steps
        assert isinstance(penalised.model, fastvae.JacobianL1VAE) and plain.model.beta == penalised.model.beta
        # One step under weights of zero; the ramp has hardly begun after that.
        assert plain.history.train_loss[0] == pytest.approx(penalised.history.train_loss[0], rel=1e-3)
        for member in pair.members:
            step = member.model.objective(pair.held_out, generator=torch.Generator().manual_seed(3))
            columns = torch.autograd.functional.jacobian(
                lambda z, m=member.model: torch.sigmoid(m.decoder(z)).sum(0), step.z
            )
            assert member.jacobian == pytest.approx(float(columns.abs().sum()) / len(step.z), rel=1e-4)
            assert member.elbo == pytest.approx(-float(step.loss.detach().mean()), rel=1e-5)
            assert set(member.local) == ({0.1, 1.0} if pair is dots else set())


def test_twins_differ_by_consistency_alone() -> None:
    problem = tiny_problem(40, (1, 6, 10))
    twins = views.train_twins(problem, epochs=2, seconds=60, seed=3)
    plain, consistent = twins.members
    assert plain.history.steps == consistent.history.steps and twins.images == 40
    assert isinstance(consistent.model, fastvae.ConsistencyVAE) and twins.views.shape == twins.held_out.shape
    for twin in twins.members:
        q, q_view = twin.model.encode(twins.held_out), twin.model.encode(twins.views)
        expected = fastvae.reference.gaussian_kl(*q_view, *q).mean()
        assert twin.divergence == pytest.approx(float(expected.detach()), rel=1e-4)
        torch.testing.assert_close(twin.means, torch.stack([q[0], q_view[0]]).detach())


def test_foreign_images_are_like_the_others(tmp_path: Path, quick: None) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 7), dtype=np.uint8)
    np.savez(tmp_path / "other.npz", images=images)
    for shape in ((1, 8, 8), (3, 6, 10)):
        problem = tiny_problem(40, shape)
        problem.foreign = [fastvae.data.load(tmp_path / "other.npz", split="all")]
        found = foreign_images(problem, torch.Generator().manual_seed(0))
        assert list(found) == ["photographs", "inverted", "noise", "other.npz"]
        for x in found.values():
            assert x.shape == (10, *shape) and bool(((x >= 0) & (x <= 1)).all())
        assert torch.equal(found["inverted"], 1 - problem.held_out_grey[:10])
        assert len(found["photographs"].unique(dim=0)) == 10
    problem = tiny_problem()
    history = fastvae.History(seconds=[1.0, 1.0])
    scores = outliers_of(problem.build(VAE, 0), problem, history, 0)
    assert scores.background_epochs == 1 and list(scores.scores) == ["NLL", "complexity", "ratio", "regret"]
    assert all(by_set["held out"].shape == (10,) for by_set in scores.scores.values())


def test_traversals_and_columns_follow_the_latents_that_say_most() -> None:
    decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
    nn.init.zeros_(encoder[1].weight)
    with torch.no_grad():
        encoder[1].bias.copy_(torch.tensor([0.1, 3.0, -1.0, 0.0, 0.0, 0.0]))
    model, x = VAE(encoder, decoder), torch.rand(2, 1, 4, 4)
    assert informative(model, x).tolist() == [1, 2, 0]
    moved = traversals(model, x, 2, 5).reshape(2, 5, 1, 4, 4)
    for line, latent in enumerate((1, 2)):
        z = torch.tensor([0.1, 3.0, -1.0])
        z[latent] = 2.5
        torch.testing.assert_close(moved[line, -1], torch.sigmoid(decoder(z[None]))[0])
    columns = jacobian_columns(model, x, 2).reshape(2, 2, 16)
    y = torch.sigmoid(decoder(torch.tensor([[0.1, 3.0, -1.0]]))).flatten()
    torch.testing.assert_close(columns[0], (y * (1 - y) * decoder[0].weight.T[[1, 2]]).detach())
    colours = signed(torch.tensor([2.0, 0.0, -1.0, -9.0]).reshape(4, 1, 1, 1), 2.0).flatten(1)
    assert colours.tolist() == [[1, 0, 0], [1, 1, 1], [0.5, 0.5, 1], [0, 0, 1]]


def test_models_start_alike_and_turns_change_nothing(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in turns, by resuming, gives what one run gives, bit for bit."""
    problem = tiny_problem()
    vae, hvae = problem.build(VAE, 5), problem.build(HVAE, 5)
    for first, second in zip(vae.parameters(), hvae.encoder.parameters(), strict=False):
        assert torch.equal(first, second)
    monkeypatch.setattr(training, "_SLICE_SECONDS", 0.0)
    epoch_by_epoch = run_demo(problem, epochs=3, seconds=60, seed=5, command="")
    monkeypatch.setattr(training, "_SLICE_SECONDS", 1e9)
    at_once = run_demo(problem, epochs=3, seconds=1e9, seed=5, command="")
    assert epoch_by_epoch.hvae.history.val_loss == at_once.hvae.history.val_loss
    assert torch.equal(epoch_by_epoch.hvae.log_likelihood, at_once.hvae.log_likelihood)


def test_time_limit(quick: None) -> None:
    demo = run_demo(tiny_problem(), epochs=10_000, seconds=0.5, seed=0, command="")
    assert demo.stopped == "time" and 1 <= len(demo.vae.history.steps) < 10_000
    assert demo.vae.history.steps == demo.hvae.history.steps


@pytest.mark.slow
def test_convolutional_problem(quick: None) -> None:
    problem = tiny_problem(20, (1, 28, 28))
    model = problem.build(HVAE, 0)
    assert model.latent_dim == 64 and bool(torch.isfinite(model(problem.held_out)).all())
    assert model.reconstruct(problem.held_out).shape == problem.held_out.shape
    demo = run_demo(problem, epochs=1, seconds=60, seed=0, command="")
    assert [section(demo).title for section in SECTIONS] == TITLES


def test_data_of_other_shapes(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 6, 10), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", images=images)
    problem = load_problem(str(tmp_path / "colour.npz"), 0)
    assert not problem.convolutional and problem.held_out.shape == (3, 3, 6, 10)
    assert problem.build(VAE, 0).reconstruct(problem.held_out).shape == (3, 3, 6, 10)
    assert image_rows([("a", problem.train[:4]), ("b", problem.train[:2])], 2).startswith(b"\x89PNG")


def test_batches_cover_the_images_or_the_limit() -> None:
    images = torch.arange(25.0).reshape(25, 1, 1, 1)
    batches = Batches(images, 10, 100)
    assert [len(batch) for batch in batches] == [10, 10, 5] and len(batches) == 3
    assert sorted(torch.cat(list(batches)).flatten().tolist()) == list(range(25))
    limited = torch.cat(list(Batches(images, 10, 20))).flatten().tolist()
    assert len(set(limited)) == 20


@pytest.mark.parametrize(("load", "busy"), [(None, False), (0.5, False), (1e4, True)])
def test_a_busy_machine_is_mentioned(load: float | None, busy: bool) -> None:
    assert bool(_disturbances(load)) == busy


def test_report_escapes_and_aligns() -> None:
    section = Section(
        "a < b", ["x &\n   y"], Table(["", "n"], [["<i>", "1"], ["longer", "22"]]), [Picture(b"png", 'a "b"')]
    )
    html = as_html("t", [section])
    assert "a &lt; b" in html and "x &amp; y" in html and "&lt;i&gt;" in html and "<i>" not in html
    assert 'alt="a &quot;b&quot;"' in html and '<td class="number">22</td>' in html
    assert as_text(section).splitlines()[2:] == ["         n", "<i>      1", "longer  22", "x & y"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no-such-place"], "load: source: expected .*got 'no-such-place'"),
        (["--data", "{tmp}/bad.npz"], r"bad\.npz"),
        (["--data", "{tmp}"], "IDX files or one .npz file"),
        (["--out", "{tmp}/file"], "file"),
        (["--epochs", "0"], "--epochs: expected a finite number above 0, got 0"),
        (["--minutes", "nan"], "--minutes: expected a finite number above 0, got nan"),
        (["--minutes", "soon"], "--minutes: invalid float value: 'soon'"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """One message, exit status 2."""
    (tmp_path / "file").write_text("in the way")
    if any("bad" in word for word in arguments):
        (tmp_path / "bad.npz").write_bytes(b"not a zip file")
    words = [word.format(tmp=tmp_path) for word in arguments]
    try:
        status = main(["demo", "--out", str(tmp_path / "out"), *words])
    except SystemExit as stopped:  # argparse's
        status = stopped.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2 and len(error.splitlines()) == 1
    assert re.search(f"fastvae demo: error: .*{message}", error)


def test_info_prints_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(re.split(" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["fastvae"] == fastvae.__version__ and lines["torch, running"].startswith(torch.__version__)
    assert lines["torch, built against"].split(".")[:2] == torch.__version__.split(".")[:2]
    for name in ("CUDA kernels", "GPUs visible", "CPU instruction set", "threads", "compiler", "Python"):
        assert lines[name]
    assert {"optional: tqdm", "optional: matplotlib", "optional: scikit-learn"} <= set(lines)


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2 and "required: command" in capsys.readouterr().err

"""python -m fastvae: a demonstration of seconds with every section, info, and clear refusals."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvae
from fastvae.__main__ import main
from fastvae.models import HVAE, VAE

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from browser import check_page

from fastvae.demo.comparisons import Budget, consistency, hamiltonian, jacobian, train_hamiltonian
from fastvae.demo.running import foreign_to, mislabelled
from fastvae.demo.training import Batches, alike, train_alike

TITLES = [
    "Hamiltonian VAE against VAE",
    "Jacobian penalty",
    "Consistency between views",
    "Samples",
    "Reconstructions",
    "Bound and likelihood",
    "Latents",
    "Trajectories",
    "Influence of training images",
    "Suspicious labels",
    "Foreign images",
    "Speed",
    "Training",
    "What was looked at",
]


# Other tests may be running beside these.
pytestmark = pytest.mark.usefixtures("one_thread_for_a_module")


def noise(count: int, shape: tuple[int, ...] = (1, 8, 8)) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


def test_demo_writes_a_report_with_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = fastvae.data.load("digits", split="all")
    np.savez(tmp_path / "few.npz", images=digits.images[:200].numpy(), labels=digits.labels[:200].numpy())  # type: ignore[index]
    out = tmp_path / "deep" / "report"
    arguments = [
        "demo",
        "--data",
        str(tmp_path / "few.npz"),
        "--steps",
        "4",
        "--out",
        str(out),
        "--effort",
        "0.02",
    ]
    assert main([*arguments, "--foreign", str(tmp_path / "few.npz"), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    text = (out / "index.html").read_text(encoding="utf-8")
    for word in ("--steps 4", "--seed 3", fastvae.__version__, torch.__version__, "180 of 180", "few.npz"):
        assert word in text
    assert "could not" not in text
    for title in TITLES:
        assert f"\n{title}\n{'-' * len(title)}\n" in printed and f"<h2>{title}</h2>" in text
    row = re.search(r"log p\(x\) +(−\d+\.\d+ ± \d+\.\d+)", printed)
    assert row is not None and row[1] in text, "the terminal and the page show the same figures"
    check_page(out / "index.html", tmp_path, TITLES)


def test_models_start_alike_and_take_the_same_steps() -> None:
    images, before = noise(40), torch.get_rng_state()
    models = alike({"HVAE": HVAE, "VAE": VAE}, images.shape[1:], 4, 5)
    for first, second in zip(*(model.encoder.parameters() for model in models.values()), strict=True):
        assert torch.equal(first, second) and first is not second
    histories = train_alike(
        models, images, images[:9].round(), steps=7, seconds=60, seed=5, batch_size=10, progress=False
    )
    assert torch.equal(torch.get_rng_state(), before) and not any(model.training for model in models.values())
    assert [history.steps[-1] for history in histories.values()] == [7, 7]
    assert all(history.val_loss[-1] is not None for history in histories.values())


def test_the_time_that_the_first_takes_decides_for_all() -> None:
    models = alike({"a": VAE, "b": VAE}, torch.Size((1, 8, 8)), 2, 0)
    histories = train_alike(
        models, noise(20), noise(5).round(), steps=10**6, seconds=0.3, seed=0, progress=False
    )
    first, second = (history.steps[-1] for history in histories.values())
    assert first == second and 1 <= first < 10**6


def test_figures_of_the_flow_are_those_of_the_models() -> None:
    budget = Budget(4, 60, seed=2, images=12, progress=False)
    held_out = noise(30).round()
    models, histories = train_hamiltonian(noise(40), held_out, budget)
    section = hamiltonian(models, histories, held_out, budget)
    x, values = held_out[:12], {}
    for name, model in models.items():
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            draws = [model.elbo(x, generator=generator).double() for _ in range(20)]
        values[name] = torch.stack(draws).mean(0)
    difference = values["HVAE"] - values["VAE"]
    mean, error = float(difference.mean()), float(difference.std()) / 12**0.5
    assert section.table is not None
    shown = section.table.rows[0][3].replace("−", "-").split(" ± ")
    digits = 10.0 ** -len(shown[1].partition(".")[2])
    assert float(shown[0]) == pytest.approx(mean, abs=digits) and float(shown[1]) == pytest.approx(
        error, abs=digits
    )


def test_penalties_are_measured() -> None:
    """Every measure is there, and the untrained models, which start alike, differ by little."""
    budget = Budget(2, 60, images=20, progress=False)
    for section, measure in (
        (jacobian(budget, count=100, clusters=2), "J1"),
        (consistency(noise(40), noise(30).round(), budget), "KL between view and image, nats"),
    ):
        assert section.table is not None and (
            section.worked is False or "nats of the bound" in section.verdict
        )
        rows = {row[0]: row[1:] for row in section.table.rows}  # type: ignore[union-attr]
        plain, with_method = (float(cell) for cell in rows[measure])
        assert plain > 0 and with_method == pytest.approx(plain, rel=0.5)


def test_labels_are_made_wrong() -> None:
    images = torch.zeros(100, 1, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([3, 5, 9]).repeat(34)[:100]
    data = fastvae.data.ImageDataset(images, labels)
    changed, wrong = mislabelled(data, 0)
    assert wrong is not None and int(wrong.sum()) == 3
    assert torch.equal(changed.labels != labels, wrong) and set(changed.labels.tolist()) == {3, 5, 9}  # type: ignore[union-attr]
    for alone in (
        fastvae.data.ImageDataset(images),
        fastvae.data.ImageDataset(images, torch.zeros(100).long()),
    ):
        assert mislabelled(alone, 0) == (alone, None)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
def test_foreign_images_are_like_the_others(shape: tuple[int, ...]) -> None:
    images = (255 * noise(20, shape)).to(torch.uint8)
    found = foreign_to(fastvae.data.ImageDataset(images), 0)
    assert list(found) == ["photographs", "inverted", "shuffled"]
    assert all(tuple(each.images.shape[1:]) == shape for each in found.values())
    assert torch.equal(found["inverted"].images, 255 - images)
    assert torch.equal(found["shuffled"].images.flatten().sort().values, images.flatten().sort().values)
    assert len(found["photographs"].images.unique(dim=0)) == 200


def test_batches_cover_the_images_or_the_limit() -> None:
    images = torch.arange(25.0).reshape(25, 1, 1, 1)
    batches = Batches(images, 10, 100)
    assert [len(batch) for batch in batches] == [10, 10, 5] and len(batches) == 3
    assert sorted(torch.cat(list(batches)).flatten().tolist()) == list(range(25))
    limited = torch.cat(list(Batches(images, 10, 20))).flatten().tolist()
    assert len(set(limited)) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no-such-place"], "load: source: expected .*got 'no-such-place'"),
        (["--data", "{tmp}/bad.npz"], r"bad\.npz"),
        (["--out", "{tmp}/file"], "file"),
        (["--steps", "0"], "--steps: expected a finite number above 0, got 0"),
        (["--minutes", "nan"], "--minutes: expected a finite number above 0, got nan"),
        (["--minutes", "soon"], "--minutes: invalid float value: 'soon'"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """One message, exit status 2."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "bad.npz").write_bytes(b"not a zip file")
    words = [word.format(tmp=tmp_path) for word in arguments]
    try:
        status = main(["demo", "--out", str(tmp_path / "out"), *words])
    except SystemExit as stopped:  # argparse's
        status = stopped.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2 and len(error.splitlines()) == 1
    assert re.search(f"fastvae demo: error: .*{message}", error)


def test_too_few_images_are_said_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "few.npz", images=np.zeros((6, 8, 8), np.uint8))
    assert main(["demo", "--data", str(tmp_path / "few.npz"), "--out", str(tmp_path / "out")]) == 2
    assert "expected at least 2 images to test on, found 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_info_prints_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(re.split(" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["fastvae"] == fastvae.__version__ and lines["torch, running"].startswith(torch.__version__)
    assert lines["torch, built against"].split(".")[:2] == torch.__version__.split(".")[:2]
    for name in ("CUDA kernels", "GPUs visible", "CPU instruction set", "threads", "compiler", "Python"):
        assert lines[name]
    assert {"optional: matplotlib", "optional: scikit-learn"} <= set(lines)


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2 and "required: command" in capsys.readouterr().err

"""The command line: a folder of pictures to a trained model, scores and exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastvae
from fastvae.__main__ import main
from fastvae.commands.models import LIKELIHOODS, MODELS, build_model
from fastvae.commands.runs import RunSettings
from fastvae.commands.score import SCORES
from fastvae.commands.score import _drawn as drawn_pixels

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

SMALL = ["--width", "2", "--latent-dim", "3", "--batch-size", "16", "--epochs", "2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty colour pictures 8x8 of three labels."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    drawn = fastvae.data.shapes(60, size=8)
    generator = np.random.default_rng(0)
    for index, (image, factors) in enumerate(zip(drawn.images, drawn.factors, strict=True)):
        colours = generator.integers(0, 256, 3)
        path = folder / str(int(factors[0])) / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0, :, :, None].numpy() // 255 * colours).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "of" / "pictures"
    assert main(["train", str(pictures), "--out", str(folder), *SMALL]) == 0
    return folder


def test_train_says_what_it_does(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(pictures), "--out", str(tmp_path / "run"), *SMALL]) == 0
    out, err = capsys.readouterr()
    assert "images: 54 to train on and 6 to test on, 3x8x8, 3 labels" in out
    assert "VAE, 3 latent variables, gaussian likelihood" in out and "100% of its work in fused sweeps" in out
    assert "trained: 2 epochs, 8 steps" in out and "fastvae score" in out and err == ""


def test_a_run_is_a_model_and_its_checkpoints(run: Path, pictures: Path) -> None:
    model = fastvae.load(run)
    assert type(model) is fastvae.VAE and model.latent_dim == 3
    history = fastvae.History.load(run / "checkpoints" / "history.json")
    assert len(history.train_loss) == 2 and history.checkpoints[-1].name == "epoch-0002.pt"
    other = build_model(RunSettings.load(run), (3, 8, 8))
    fastvae.training.load_checkpoint(other, history.checkpoints[-1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert json.loads((run / "run.json").read_text())["settings"]["data"] == str(pictures)


@pytest.mark.parametrize("model", MODELS)
def test_every_model(model: str, pictures: Path, tmp_path: Path) -> None:
    words = ["train", str(pictures), "--out", str(tmp_path), *SMALL, "--model", model, "--epochs", "1"]
    assert main(words) == 0
    assert type(fastvae.load(tmp_path)) is MODELS[model][0]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood(likelihood: str, pictures: Path, tmp_path: Path) -> None:
    words = [
        "train",
        str(pictures),
        "--out",
        str(tmp_path),
        *SMALL,
        "--likelihood",
        likelihood,
        "--epochs",
        "1",
    ]
    assert main([*words, "--size", "8x8"]) == 0
    assert fastvae.load(tmp_path).likelihood == LIKELIHOODS[likelihood]() or likelihood == "gaussian"


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(text.splitlines()))


@pytest.mark.parametrize("score", [name for name in SCORES if name != "complexity"])
def test_every_score(score: str, run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    words = ["score", str(run), str(pictures), "--score", score, "--split", "test", "--out", str(out)]
    assert main([*words, "--samples", "4"]) == 0
    header, *found = rows(out.read_text())
    assert header == ["file", "score"] and len(found) == 6
    images = fastvae.data.load(pictures, split="test")
    assert [name for name, _ in found] == list(images.files or ())
    detector = SCORES[score][2](fastvae.load(run), 4, 0)
    expected = detector.predict(images.tensors()[0]).tolist()
    # Printed with nine digits; float32 sums in another order where images are batched otherwise.
    assert [float(value) for _, value in found] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_scores_of_other_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A grey picture of another size becomes one as the model takes it; an array has numbers."""
    path = tmp_path / "a, b.png"
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(path)
    assert main(["score", str(run), str(path), "--samples", "2"]) == 0
    header, (name, value) = rows(capsys.readouterr().out)
    assert header == ["file", "score"] and name == "a, b.png" and np.isfinite(float(value))
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8))
    assert main(["score", str(run), str(tmp_path / "a.npz"), "--samples", "2"]) == 0
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["index", "0", "1", "2"]


def test_a_binarised_run_scores_binary_images(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each image is drawn by its own noise, whatever stands beside it; black and white ones stay as they are."""
    grey = fastvae.data.load(pictures, channels=1, split="all").images
    np.savez(tmp_path / "grey.npz", images=grey[:, 0].numpy())
    np.savez(tmp_path / "binary.npz", images=(grey[:, 0] > 60).numpy())
    folder = tmp_path / "run"
    assert main(["train", str(tmp_path / "grey.npz"), "--out", str(folder), *SMALL, "--binarize"]) == 0
    capsys.readouterr()

    def scores(name: str, *words: str) -> list[float]:
        assert main(["score", str(folder), str(tmp_path / name), "--samples", "2", *words]) == 0
        return [float(value) for _, value in rows(capsys.readouterr().out)[1:]]

    first = scores("grey.npz")
    assert scores("grey.npz", "--batch-size", "7") == pytest.approx(first, rel=1e-5)
    assert scores("grey.npz", "--seed", "1") != first
    model = fastvae.load(folder)
    detector = SCORES["nll"][2](model, 2, 0)
    binary = fastvae.data.load(tmp_path / "binary.npz", split="all").tensors()[0]
    assert scores("binary.npz") == pytest.approx(detector.predict(binary).tolist(), rel=1e-5)
    assert scores("grey.npz", "--score", "complexity") != first, "which refuses grey values"


def test_binary_images_have_the_means_of_their_pixels() -> None:
    values = torch.tensor([0, 1, 64, 200, 254, 255], dtype=torch.uint8)
    images = values.repeat(40_000, 1)[:, None, None]
    # No two alike, which would have the same noise.
    numbers = torch.arange(40_000)[:, None].bitwise_right_shift(torch.tensor([0, 8])).to(torch.uint8)
    images = torch.cat([images, numbers[:, None, None]], dim=3)
    drawn = drawn_pixels(images, 0)[:, 0, 0, :6]
    assert drawn.unique().tolist() == [0, 1] and drawn[:, 0].sum() == 0 and drawn[:, 5].min() == 1
    # Five standard errors of 40,000 draws, at most 0.0125.
    assert (drawn.mean(0) - values / 255).abs().max() < 0.0125


def test_scores_go_through_pipes_and_links(run: Path, pictures: Path, tmp_path: Path) -> None:
    """As /dev/stdout is: what stands there stays there."""
    target, link, pipe = tmp_path / "scores.csv", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    os.mkfifo(pipe)
    words = ["score", str(run), str(pictures), "--split", "test", "--samples", "2", "--out"]
    assert main([*words, str(link)]) == 0
    assert link.is_symlink() and target.read_text().startswith("file,score")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        assert main([*words, str(pipe)]) == 0
        assert read.result() == target.read_text() and pipe.is_fifo()


def test_scores_ask_nothing_of_subfolders(run: Path, pictures: Path, tmp_path: Path) -> None:
    """A picture beside them, which has no label."""
    shutil.copytree(pictures, tmp_path / "pictures")
    shutil.copy(next(pictures.rglob("*.png")), tmp_path / "pictures")
    words = [
        "score",
        str(run),
        str(tmp_path / "pictures"),
        "--samples",
        "2",
        "--out",
        str(tmp_path / "a.csv"),
    ]
    assert main(words) == 0


def test_names_that_are_no_text(run: Path, pictures: Path, tmp_path: Path) -> None:
    """Bytes of any kind, letters that the terminal does not have, a line break: each name as the file system has it."""
    folder = tmp_path / os.fsdecode(b"pi\xff")
    folder.mkdir()
    names = [b"\xff\xfe.png", "猫.PNG".encode(), b'a\nb,"c".png', b"d.png"]
    for name in names:
        shutil.copy(next(pictures.rglob("*.png")), folder / os.fsdecode(name))
    environment = {**os.environ, "PYTHONPATH": str(Path(fastvae.__file__).parents[1])}
    environment |= {"PYTHONIOENCODING": "latin-1:strict", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        command("score", str(run), str(folder), "--samples", "2"),
        env=environment,
        capture_output=True,
        check=True,
    ).stdout
    found = list(csv.reader(io.StringIO(out.decode("utf-8", "surrogateescape"), newline="")))
    assert {os.fsencode(name) for name, _ in found[1:]} == set(names)
    words = [*SMALL, "--epochs", "1", "--out", str(tmp_path / os.fsdecode(b"run \xff"))]
    done = subprocess.run(command("train", str(folder), *words), env=environment, capture_output=True)
    assert done.returncode == 0 and b"saved in" in done.stdout, done.stderr


def test_memory_that_is_not_there(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(pictures), "--out", str(tmp_path / "run"), *SMALL, "--latent-dim", "100000000000"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "error: expected enough memory, got less" in error and len(error.splitlines()) == 1


def test_complexity_asks_for_discrete_values(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--score", "complexity", "--samples", "2", "--split", "test"]
    assert main(["score", str(run), str(pictures), *words]) == 2
    assert "expected a likelihood of discrete values" in capsys.readouterr().err
    assert main(["train", str(pictures), "--out", str(tmp_path), *SMALL, "--likelihood", "categorical"]) == 0
    assert main(["score", str(tmp_path), str(pictures), *words]) == 0


@pytest.mark.slow
def test_report(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    np.savez(tmp_path / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (20, 9, 9), np.uint8))
    words = ["--foreign", str(tmp_path / "noise.npz"), "--effort", "0.05", "--out", str(tmp_path / "report")]
    assert main(["report", str(run), str(pictures), *words]) == 0
    path = tmp_path / "report" / "index.html"
    assert f"report: {path}" in capsys.readouterr().out
    page = path.read_text()
    assert "noise.npz" in page and "fastvae report" in page


def test_going_on(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer than first thought; the same as at once, bit for bit."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main(["train", str(pictures), "--out", str(once), *SMALL, "--epochs", "4"]) == 0
    assert main(["train", str(pictures), "--out", str(twice), *SMALL]) == 0
    capsys.readouterr()
    assert main(["train", str(pictures), "--out", str(twice)]) == 2
    assert "holds a run already; --resume goes on with it" in capsys.readouterr().err
    assert main(["train", "--out", str(twice), "--resume", "--epochs", "4"]) == 0
    first, second = fastvae.load(once), fastvae.load(twice)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    capsys.readouterr()
    assert main(["train", "--out", str(twice), "--resume", "--learning-rate", "1"]) == 2
    assert (
        "expected a run with the same optimizer.lr (1.0), found 0.001; --out FOLDER begins another"
        in capsys.readouterr().err
    )
    assert RunSettings.load(twice).learning_rate == 1e-3, "a change that was refused is not kept"
    assert main(["train", "--out", str(twice), "--resume", "--size", "16"]) == 2
    assert "--size: the run in" in capsys.readouterr().err
    # Complete already.
    assert main(["train", "--out", str(twice), "--resume"]) == 0


def test_minutes_end_an_epoch(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its middle, from where the run goes on."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main(["train", str(pictures), "--out", str(twice), *SMALL, "--minutes", "1e-9"]) == 0
    out = capsys.readouterr().out
    assert "trained: 1 epochs, the last in part, 1 steps" in out and "ended by time" in out
    assert main(["train", "--out", str(twice), "--resume"]) == 0
    assert "trained: 2 epochs, 8 steps" in capsys.readouterr().out
    assert main(["train", str(pictures), "--out", str(once), *SMALL]) == 0
    first, second = fastvae.load(once), fastvae.load(twice)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fastvae", *words]


def test_ctrl_c(pictures: Path, tmp_path: Path) -> None:
    """130, a message without a traceback, and a run that goes on as if nothing had been."""
    folder = tmp_path / "run"
    words = ["train", str(pictures), "--out", str(folder), *SMALL, "--epochs", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastvae.__file__).parents[1])}
    process = subprocess.Popen(
        command(*words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "epoch-0003.pt").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "to go on from there: fastvae train --out" in err
    newest = max((folder / "checkpoints").glob("step-*.pt"))
    assert f"{newest} holds step" in err and f"and {folder} the model" in err
    known, other = fastvae.load(folder), build_model(RunSettings.load(folder), (3, 8, 8))
    fastvae.training.load_checkpoint(other, newest)
    assert all(torch.equal(a, b) for a, b in zip(known.parameters(), other.parameters(), strict=True))
    epoch = max(int(path.stem[6:]) for path in (folder / "checkpoints").glob("epoch-*.pt"))
    names = sorted(path.name for path in folder.rglob("*") if path.name.startswith("."))
    assert names in ([], [".lock"]), "no half-written files"

    once, end = tmp_path / "once", str(epoch + 2)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(["train", "--out", str(folder), "--resume", "--epochs", end]) == 0
        assert main(["train", str(pictures), "--out", str(once), *SMALL, "--epochs", end]) == 0
    finally:
        torch.set_num_threads(torch_threads)
    first, second = fastvae.load(once), fastvae.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], r"DATA: expected a folder of pictures, .* got nothing"),
        (["train", ""], "DATA: expected a folder of pictures"),
        (["train", "nowhere"], "load: source: expected .* got 'nowhere'"),
        (["train", "{tmp}/empty"], "empty: expected pictures .* found nothing"),
        (["train", "{tmp}/bad"], r"bad/a\.png: expected a picture that Pillow can read"),
        (
            ["train", "{tmp}/odd"],
            "shape: expected sides that can be halved .* got 9x9; --size 32 scales images",
        ),
        (["train", "{data}", "--resume"], "--resume: expected a run in"),
        (["train", "{data}", "--epochs", "0"], "--epochs: expected a finite number above 0, got 0"),
        (["train", "{data}", "--size", "2x3x4"], "--size: expected a side such as 64"),
        (["train", "{data}", "--model", "gan"], "--model: invalid choice: 'gan'"),
        (["train", "{data}", "--device", "tpu"], "--device tpu: "),
        (
            ["train", "{data}", "--seed", str(2**64)],
            "--seed: expected a number of 64 bits, got 18446744073709551616",
        ),
        (["train", "{data}", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["train", "{tmp}/bad/one.bmp"], r"one\.bmp: a single image cannot be split, got split='train'$"),
        (["train", "{tmp}/sizes"], r"found 16x16: 1, .*; pass --size 64, say, to scale"),
        (["train", "{data}", "--label", "a"], "--label: expected a table with columns, got images"),
        (
            ["train", "{data}", "--likelihood", "poisson"],
            "expected bernoulli, gaussian, categorical of images",
        ),
        (["train", "{data}", "--binarize"], "--binarize: expected --likelihood bernoulli, got gaussian"),
        (["train", "{data}", "--test-fraction", "2"], "test_fraction: expected a number between 0 and 1"),
        (["train", "{data}", "--out", "{tmp}/file/run"], r"file/run.*: Not a directory"),
        (
            ["score", "nowhere", "{data}"],
            r"nowhere: expected a folder that fastvae train wrote, found no run\.json",
        ),
        (["score", "{run}", "nowhere"], "got 'nowhere'"),
        (
            ["score", "{run}", "{data}", "--out", "{tmp}/no/where.csv"],
            "expected a file in a folder that is there",
        ),
        (["score", "{run}", "{data}", "--score", "beauty"], "--score: invalid choice: 'beauty'"),
        (["score", "{run}"], "the following arguments are required: data"),
        (["report", "nowhere", "{data}"], "nowhere: expected a folder"),
        (["sing"], "invalid choice: 'sing'"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[str],
    message: str,
    run: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one line or two, with exit status 2; and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("<html>404</html>")
    (tmp_path / "odd").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "bad" / "one.bmp")
    (tmp_path / "sizes").mkdir()
    for side in (8, 16):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / "sizes" / f"{side}.png")
    for name in "ab":
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "odd" / f"{name}.png")
    (tmp_path / "file").write_text("in the way")
    before = sorted(tmp_path.iterdir())
    places = {"tmp": tmp_path, "data": pictures, "run": run}
    try:
        status = main([word.format(**places) for word in words])
    except SystemExit as stopped:  # argparse's
        status = stopped.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2 and len(error.splitlines()) <= 2 and error.startswith("fastvae")
    assert re.search(message, error), error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3, "fastvae": "9.0"}, r"expected version 2, found 3, written by fastvae 9\.0"),
        ({"format": "x"}, "expected what fastvae train wrote"),
        ({"settings": {}}, "other settings than this version has"),
        ({"settings": None}, "expected what fastvae train wrote"),
    ],
)
def test_damaged_runs_are_refused(
    change: dict[str, Any], message: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunSettings(data=str(pictures), shape=[3, 8, 8]).save(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**content, **change}))
    assert main(["score", str(tmp_path), str(pictures)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["--help"], ["train", "--help"], ["score", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"fastvae {fastvae.__version__}\n")


@pytest.mark.slow
def test_head_ends_the_scores(run: Path, pictures: Path) -> None:
    """A reader that has seen enough is no error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastvae.__file__).parents[1])}
    process = subprocess.Popen(
        command("score", str(run), str(pictures), "--samples", "1"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 0 and process.stderr.read() == ""

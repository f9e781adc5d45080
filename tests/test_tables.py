"""Tables: what is read, what is refused, and from a file of counts to a model, scores and a page."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastvae
from fastvae.__main__ import main
from fastvae.architectures import table_networks
from fastvae.commands.models import TABLE_LIKELIHOODS
from fastvae.commands.runs import RunSettings
from fastvae.data import TableDataset, load_table

pytest.importorskip("safetensors")

pytestmark = pytest.mark.usefixtures("one_thread_for_a_module")

GENES = 6
SMALL = ["--width", "8", "--latent-dim", "3", "--batch-size", "20", "--epochs", "2"]


def counts_of(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [rows, GENES], kind and batch of each row: kinds differ in which genes are high, batches in depth."""
    generator = torch.Generator().manual_seed(seed)
    kind, batch = (torch.randint(2, (rows,), generator=generator) for _ in range(2))
    rate = torch.full((rows, GENES), 3.0)
    rate[kind == 1, : GENES // 2] = 30.0
    return torch.poisson(rate * (1 + batch[:, None]), generator=generator), kind, batch


def written(path: Path, lines: Sequence[Sequence[Any]], separator: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    return path


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty cells with names, kinds and batches."""
    counts, kind, batch = counts_of(80)
    lines: list[list[Any]] = [["", "label", "batch", "age", *(f"gene{i}" for i in range(GENES))]]
    for index, row in enumerate(counts.int().tolist()):
        lines.append([f"cell{index}", "AB"[kind[index]], "xy"[batch[index]], 20 + index % 7, *row])
    return written(tmp_path_factory.mktemp("table") / "cells.csv", lines)


def test_a_file(cells: Path) -> None:
    table = load_table(cells, split="all", condition=["batch", "age"])
    counts, kind, batch = counts_of(80)
    assert table.columns == tuple(f"gene{i}" for i in range(GENES)) and table.classes == ("A", "B")
    assert table.labels is not None and table.condition is not None and table.rows is not None
    assert torch.equal(table.values, counts) and torch.equal(table.labels, kind)
    assert table.rows[:2] == ("cell0", "cell1")
    assert torch.equal(table.condition[:, :2], torch.nn.functional.one_hot(batch, 2).float())
    age = 20 + torch.arange(80) % 7
    # float32 of sums in float64
    assert torch.allclose(
        table.condition[:, 2], (age - age.double().mean()).float() / age.double().std(correction=0)
    )
    x, condition, label = table[3]
    assert torch.equal(x, counts[3]) and torch.equal(condition, table.condition[3]) and label == int(kind[3])
    assert repr(table) == f"TableDataset({str(cells)!r}, 80 rows of {GENES} columns, 2 labels)"
    without = load_table(cells, split="all", label=None, ignore=["batch", "label"], columns=["gene2", "age"])
    assert without.labels is None and torch.equal(without.values[:, 0], counts[:, 2]) and len(without[0]) == 1


def test_parts_are_disjoint_and_whole(cells: Path) -> None:
    parts = [load_table(cells, split=split, ignore=["batch"], seed=3) for split in ("train", "test")]  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [72, 8]
    names = [name for part in parts for name in part.rows or ()]
    assert sorted(names) == sorted(f"cell{i}" for i in range(80))
    whole = load_table(cells, split="all", ignore=["batch"])
    for part in parts:
        places = [int(name.removeprefix("cell")) for name in part.rows or ()]
        assert torch.equal(part.values, whole.values[places])


def test_other_separators_and_numbers_alone(tmp_path: Path) -> None:
    rows = [[1.5, 2], [3, -4e2]]
    for name, separator in (("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t")):
        for header in ([], [["p", "q"]]):
            path = written(tmp_path / name, [*header, *rows], separator)
            if separator == ";" and not header:
                continue  # nothing tells from 1,5
            table = load_table(path, split="all")
            assert torch.equal(table.values, torch.tensor(rows)), (name, header)
            assert table.columns == (("p", "q") if header else ("0", "1"))
    path = tmp_path / "lines.csv"
    path.write_text("p,q\n\n1,2\n\n3,4\n")
    assert load_table(path, split="all").rows == ("line 3", "line 5")


def test_arrays(tmp_path: Path) -> None:
    counts, kind, batch = counts_of(20)
    np.save(tmp_path / "a.npy", counts.numpy().astype(np.uint16))
    columns = np.array([f"g{i}" for i in range(GENES)])
    given = batch[:, None].numpy().astype(float)
    np.savez(tmp_path / "a.npz", values=counts.numpy(), labels=kind.numpy(), condition=given, columns=columns)
    assert torch.equal(load_table(tmp_path / "a.npy", split="all").values, counts)
    table = load_table(tmp_path / "a.npz", split="all")
    assert table.columns[1] == "g1" and table.labels is not None and torch.equal(table.labels, kind)
    assert table.condition is not None and torch.equal(table.condition[:, 0], batch.float())
    other = load_table(
        counts.bfloat16(), split="all", label=["ab"[i] for i in kind.tolist()], condition=given
    )
    assert torch.equal(other.values, counts.bfloat16().float()) and other.classes == ("a", "b")
    with pytest.raises(
        ValueError, match=r"expected images .* found float32 \[20, 6\]; fastvae.data.load_table takes tables"
    ):
        fastvae.data.load(counts)


def test_standardised() -> None:
    generator = torch.Generator().manual_seed(0)
    table = TableDataset(
        torch.cat((torch.randn(30, 2, generator=generator) * 50 + 7, torch.full((30, 1), 0.1)), 1)
    )
    seen = table.standardized().tensors()[0]
    # float32 of values around 50
    assert torch.allclose(seen.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(seen.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5)
    train, test = table.split(20, 10)
    other = test.standardized(train.standardized().mean, train.standardized().scale)
    assert torch.equal(other.subset([4, 2])[0][0], (test.values[4] - other.mean) / other.scale)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "a,b\n1,2\n3,x\n",
            {},
            r"line 3: column 'b': expected a finite number, got 'x'; a column of text can be",
        ),
        ("a,b\n1,2\n3,\n", {}, "line 3: column 'b': expected a finite number, got ''"),
        ("a,b\n1,nan\n", {}, "line 2: column 'b': expected a finite number, got 'nan'"),
        ("a,b\n1,2\n3\n", {}, "line 3: expected 2 cells, got 1"),
        ("a,a\n1,2\n", {}, "expected columns of different names, got 'a' twice"),
        ("", {}, "expected a table, got an empty file"),
        ("a,b\n", {}, "expected rows below the names, got none"),
        ("a,b\n1,2\n", {"label": "c"}, "expected a column 'c', got a, b"),
        ("a,b\n1,2.5\n", {"label": "b"}, "column 'b': expected labels as integers or text"),
        (
            "label,b\n1,2\n",
            {"condition": ["b"]},
            "expected columns of numbers besides those of label and condition",
        ),
        (
            "a,b\nx,1\ny,2\n",
            {"condition": ["a"], "levels": {"a": ["x"]}},
            "column 'a': expected one of x, got y",
        ),
        ("a,b\nx,1\nx,2\n", {}, "column 'a': expected a finite number, got 'x'"),
    ],
)
def test_what_is_no_table_is_said(text: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_table(path, split="all", **options)
    assert "t.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (torch.rand(3), {}, r"array: expected numbers \[N, F\], not empty, got torch.float64 \[3\]"),
        (torch.rand(0, 3), {}, r"not empty, got torch.float64 \[0, 3\]"),
        ("text", {}, "expected a file, got 'text'"),
        (["a"], {}, "array: expected an array of numbers"),
        (torch.tensor([[0.0, torch.nan]]), {}, "all finite, got nan in row 0, column 1 .and 0 more."),
        (torch.rand(3, 2), {"label": torch.rand(3)}, "expected labels as integers or strings"),
        (
            torch.rand(3, 2),
            {"condition": torch.rand(2, 1)},
            r"condition: expected numbers \[3, C\], got \[2, 1\]",
        ),
        (torch.rand(3, 2), {"condition": ["a"]}, r"condition: expected numbers \[N, C\]"),
        (torch.rand(3, 2), {"columns": ["a"]}, "columns: expected 2 names, got 1"),
        (torch.rand(3, 2), {"test_fraction": 1}, "test_fraction: expected a number between 0 and 1, got 1"),
        (torch.rand(3, 2), {"split": "val"}, "split: expected one of"),
        (torch.rand(1, 2), {"split": "train"}, "expected at least two rows to split"),
    ],
)
def test_what_does_not_fit_is_said(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_table(source, **{"split": "all", **options})


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("condition", [0, 2])
def test_networks(counts: bool, condition: int, tmp_path: Path) -> None:
    """Their shapes; a model of them is saved by name; the decoder runs in sweeps."""
    torch.manual_seed(0)
    networks = table_networks(GENES, 3, width=8, values_per_element=2, condition=condition, counts=counts)
    likelihood = fastvae.likelihoods.ZeroInflatedNegativeBinomial(2.0)
    model = fastvae.VAE(*networks, likelihood, latent_dim=3)
    x, _, batch = counts_of(9)
    given = {"condition": torch.nn.functional.one_hot(batch, 2).float()} if condition else {}
    assert model(x, **given).shape == (9,)
    model.save(tmp_path)
    loaded = fastvae.load(tmp_path)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    values = [
        each.eval().elbo(x, generator=g, **given) for each, g in zip((model, loaded), generators, strict=True)
    ]
    assert torch.equal(*values)
    network = fastvae.network.Network(model.decoder, model.likelihood, z=torch.zeros(9, 3), **given)
    assert network.lowered == 1


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(text.splitlines()))


@pytest.fixture(scope="module")
def run(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "of-cells"
    words = ["train", str(cells), "--condition", "batch", "age", "--out", str(folder), *SMALL]
    assert main(words) == 0
    return folder


def test_train(cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(cells), "--out", str(tmp_path / "run"), *SMALL, "--ignore", "batch", "age"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "rows: 72 to train on and 8 to test on, 6 columns, 2 labels" in out
    assert (
        "VAE, 3 latent variables, negative-binomial likelihood" in out
        and "100% of its work in fused sweeps" in out
    )
    assert "lowest loss of test rows" in out and "nats a row" in out and err == ""
    settings = RunSettings.load(tmp_path / "run")
    assert settings.columns == [f"gene{i}" for i in range(GENES)] and settings.shape == [GENES]


def test_counts_begin_at_their_means(cells: Path, tmp_path: Path) -> None:
    """Before its first step a model of counts is near one of independent columns, not at a mean of 1."""
    words = ["train", str(cells), "--out", str(tmp_path), "--ignore", "batch", "age", "--epochs", "1"]
    assert main([*words, "--learning-rate", "1e-9"]) == 0
    table = load_table(cells, ignore=["batch", "age"])
    made = fastvae.load(tmp_path).reconstruct(table.values)
    # The rest of the last layer still adds noise, of its initial weights.
    assert torch.allclose(made.log().mean(0), table.values.mean(0).log(), atol=0.3)


@pytest.mark.parametrize("likelihood", TABLE_LIKELIHOODS)
def test_every_likelihood(likelihood: str, cells: Path, tmp_path: Path) -> None:
    words = ["train", str(cells), "--out", str(tmp_path / "run"), *SMALL, "--likelihood", likelihood]
    if likelihood == "bernoulli":
        counts = counts_of(40)[0]
        words[1] = str(written(tmp_path / "binary.csv", (counts > 4).int().tolist()))
    else:
        words += ["--ignore", "batch", "age"]
    assert main(words) == 0
    assert (
        main(["score", str(tmp_path / "run"), words[1], "--samples", "3", "--out", str(tmp_path / "s.csv")])
        == 0
    )
    values = [float(value) for _, value in rows_of((tmp_path / "s.csv").read_text())[1:]]
    assert len(values) == (40 if likelihood == "bernoulli" else 80) and np.isfinite(values).all()


def test_what_suits_the_values(cells: Path, tmp_path: Path) -> None:
    binary = written(tmp_path / "b.csv", (counts_of(30)[0] > 4).int().tolist())
    reals = written(tmp_path / "r.csv", (counts_of(30)[0] * 1e3 + 0.5).tolist())
    for path, expected in ((binary, "bernoulli"), (reals, "gaussian")):
        out = tmp_path / expected
        assert main(["train", str(path), "--out", str(out), *SMALL]) == 0
        settings = RunSettings.load(out)
        assert settings.likelihood == expected and (settings.mean is not None) == (expected == "gaussian")


@pytest.mark.parametrize("score", ["nll", "regret", "posterior-regret", "self-influence"])
def test_scores_are_given_the_condition(score: str, run: Path, cells: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    words = ["score", str(run), str(cells), "--score", score, "--split", "test", "--out", str(out)]
    assert main([*words, "--samples", "4"]) == 0
    header, *found = rows_of(out.read_text())
    table = load_table(cells, split="test", condition=["batch", "age"], levels=RunSettings.load(run).levels)
    assert header == ["row", "score"] and [name for name, _ in found] == list(table.rows or ())
    from fastvae.commands.score import SCORES

    detector = SCORES[score][2](fastvae.load(run), 4, 0)
    expected = detector.predict(table.tensors()[0], condition=table.condition).tolist()
    # Printed with nine digits; float32 sums in another order where rows are batched otherwise.
    assert [float(value) for _, value in found] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_scores_of_another_table(
    run: Path, cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns in another order, one more, no label, one batch alone: the same numbers as in the first table."""
    head, *lines = rows_of(cells.read_text())
    kept = [line for line in lines if line[2] == "y"][:4]
    order = [0, 9, 8, 7, 6, 5, 4, 3, 2]
    other = written(
        tmp_path / "o.csv",
        [[*(row[i] for i in order), extra] for row, extra in ((head, "more"), *((row, "1") for row in kept))],
    )
    found = []
    for path in (cells, other):
        assert main(["score", str(run), str(path), "--samples", "3"]) == 0
        found.append(dict(rows_of(capsys.readouterr().out)[1:]))
    assert len(found[1]) == 4
    for name, value in found[1].items():
        # float32 sums in another order, of batches of another size
        assert float(value) == pytest.approx(float(found[0][name]), rel=1e-4)


def test_going_on(run: Path, cells: Path, tmp_path: Path) -> None:
    words = ["train", str(cells), "--condition", "batch", "age", "--out", str(tmp_path), *SMALL[:-1]]
    assert main([*words, "1"]) == 0
    assert main(["train", "--out", str(tmp_path), "--resume", "--epochs", "2"]) == 0
    pairs = zip(fastvae.load(run).parameters(), fastvae.load(tmp_path).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_of_the_first_version(cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What knew no tables is read; what it lacks has its default."""
    RunSettings(data="d", shape=[1, 8, 8], latent_dim=3, width=2).save(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    for name in ("columns", "label", "condition", "condition_dim", "ignore", "levels", "mean", "scale"):
        del content["settings"][name]
    (tmp_path / "run.json").write_text(json.dumps({**content, "version": 1}))
    assert RunSettings.load(tmp_path) == RunSettings(data="d", shape=[1, 8, 8], latent_dim=3, width=2)


def test_report(run: Path, cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("matplotlib", "jinja2", "sklearn"):
        pytest.importorskip(name)
    from browser import check_page

    head, *lines = rows_of(cells.read_text())
    strange = written(tmp_path / "strange.csv", [head, *([*row[:4], *row[:3:-1]] for row in lines)])
    words = ["report", str(run), str(cells), "--foreign", str(strange), "--effort", "0.02"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert main([*words, "--out", str(tmp_path / "page")]) == 0
    page = tmp_path / "page" / "index.html"
    text = page.read_text(encoding="utf-8")
    assert "could not" not in text and not re.search(
        r"\bimages?\b", re.sub("<[^>]*>", "", text[text.index("<main") :])
    )
    for words_there in (
        "cell",
        "gene0",
        "strange.csv",
        "farthest from its reconstruction",
        "proponents",
        "given a condition, 3 for each row",
    ):
        assert words_there in text
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert {"Samples", "Foreign rows", "Influence of training rows", "Suspicious labels", "Latents"} <= set(
        titles
    )
    check_page(page, tmp_path, titles)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "{cells}"],
            "column 'batch': expected a finite number, got '[xy]'; --label, --condition and --ignore",
        ),
        (["train", "{cells}", "--size", "8"], "--size: expected images, got a table"),
        (["train", "{cells}", "--ignore", "batch", "--binarize"], "--binarize: expected images, got a table"),
        (
            ["train", "{cells}", "--ignore", "batch", "--model", "consistency"],
            "--model consistency: expected images",
        ),
        (
            ["train", "{cells}", "--ignore", "batch", "--likelihood", "categorical"],
            "zero-inflated of a table, got categ",
        ),
        (["train", "{cells}", "--label", "kind"], "expected a column 'kind', got "),
        (
            ["score", "{run}", "{cells}", "--score", "complexity"],
            "--score complexity: expected images, got a table",
        ),
        (["score", "{run}", "{tmp}/few.csv"], "few.csv: expected a column '"),
        (["score", "{run}", "{tmp}/few.npy"], r"few.npy: .*got .npy|expected a file with named columns"),
        (["score", "{run}", "digits"], "digits: expected a table of 6 columns"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[str], message: str, run: Path, cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "few.csv", [["gene0"], [1]])
    np.save(tmp_path / "few.npy", np.ones((3, 2)))
    before = sorted(tmp_path.iterdir())
    places = {"tmp": tmp_path, "cells": cells, "run": run}
    assert main([word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 2 and re.search(message, error), error
    assert sorted(tmp_path.iterdir()) == before

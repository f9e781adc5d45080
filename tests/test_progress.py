"""Bars where somebody watches: terminals, and notebooks in a kernel of their own."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

import fastvae
from fastvae.progress import bar_of

pytest.importorskip("tqdm")


def count(stream: io.StringIO | None = None, **options: object) -> str:
    stream = io.StringIO() if stream is None else stream
    with bar_of(3, "counting", "sheep", file=stream, **options) as bar:
        for _ in range(3):
            bar.update(1)
    return stream.getvalue()


def test_on_a_terminal_alone() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert count() == ""
    assert "counting: 100%" in count(Terminal()) and "3/3" in count(Terminal())
    assert count(Terminal(), wanted=False) == ""


def test_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "tqdm.auto", raising=False)
    assert count() == ""


@pytest.mark.slow
def test_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """With widgets or, where there are none, as text."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    code = """
from fastvae.progress import bar_of
with bar_of(3, "counting", "sheep") as bar:
    bar.update(3)
"""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(fastvae.__file__).parents[1]), *sys.path]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert any("counting: 100%" in str(output) or "widget" in str(output) for output in outputs), outputs

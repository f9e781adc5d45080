"""What the README and docs/ show runs as it stands, names what exists, and links to what is there."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from peers import peer

import fastvae

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Lightning advises on workers, and on compose.md a decoder runs through autograd, which its text says.
WARN = ("bring-your-model.md", "compose.md")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the page's code blocks."""
    return re.findall(r"^```(python|sh)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run_shell(text: str, folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastvae.__file__).parents[1])}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        ["bash", "-euc", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


def starts_with_a_name(text: str) -> str | None:
    """The name of the file that a block is to be saved as."""
    found = re.match(r"# (\w+\.py)\n", text)
    return found and found[1]


@pytest.mark.parametrize(
    "page",
    # Two runs of torchrun.
    [
        pytest.param(page, marks=pytest.mark.slow) if page.stem == "several-processes" else page
        for page in PAGES
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace, in an empty folder; a block that begins with a file's name is that file."""
    blocks = blocks_of(page)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        if page.name in WARN:
            warnings.simplefilter("ignore")
        if "import lightning" in page.read_text():
            peer("lightning")
        for language, text in blocks:
            if language == "sh":
                run_shell(text, tmp_path)
            elif name := starts_with_a_name(text):
                (tmp_path / name).write_text(text)
            else:
                with contextlib.redirect_stdout(None):
                    exec(compile(text, str(page), "exec"), names)
    if page.name == "README.md" and page.parent == ROOT:
        decoder = names["decoder"]
        assert all(parameter.grad is not None for parameter in decoder.parameters())  # type: ignore[attr-defined]


@each_page
def test_public_names_exist(page: Path) -> None:
    for name in re.findall(r"`(?:fastvae\.)((?:\w+\.)*\w+)[`(]", page.read_text()):
        found: object = fastvae
        for part in name.split("."):
            if not hasattr(found, part):
                __import__(f"{found.__name__}.{part}")  # type: ignore[attr-defined]
            found = getattr(found, part)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [ROOT / "docs" / "kernels.md"], ids=["kernels.md"])
def test_the_files_and_names_of_the_extension_authors_page_exist(page: Path) -> None:
    """The sources that the page walks through hold the names it gives."""
    sources = {
        path: path.read_text(errors="ignore")
        for folder in ("csrc", "tests", "fastvae")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py")
    }
    for name in re.findall(r"`([\w/]+\.(?:cpp|cuh|cu|h|py))`", page.read_text()):
        assert any(str(path).endswith(f"/{name}") for path in sources), name
    everything = "\n".join(sources.values())
    for name in re.findall(r"`((?:FASTVAE|Kick|Entry|Network|Parser)\w*)", page.read_text()):
        assert name in everything, name

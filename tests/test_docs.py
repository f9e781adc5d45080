"""What the README, docs/ and notebooks show runs as it stands, names what exists, and links to what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from environments import Environment, install

import fastvae
from scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *NOTEBOOKS,
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
pages = load_script(ROOT / "scripts" / "pages.py")
WITH_BLOCKS = [page for page in PAGES if pages.blocks_of(page)]
# What plain `pip install .` brings.
PLAIN = ("torch", "numpy", "pillow", "safetensors", "tqdm")


@pytest.mark.parametrize(
    "page",
    # An environment each, in which Python starts anew.
    [
        page if page.name == "README.md" else pytest.param(page, marks=pytest.mark.slow)
        for page in WITH_BLOCKS
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    """Installed, with the packages that the page tells its reader to install and no others, in an empty folder."""
    environment = Environment(tmp_path / "env", only=[*PLAIN, *pages.needs_of(page)])
    install(environment.packages)
    (tmp_path / "empty").mkdir()
    after = "assert all(parameter.grad is not None for parameter in decoder.parameters())"
    then = ("--then", after) if page == ROOT / "README.md" else ()
    result = environment.run(
        str(ROOT / "scripts" / "pages.py"), "run", str(page), *then, cwd=tmp_path / "empty"
    )
    assert result.returncode == 0, result.stderr[-3000:]


@each_page
def test_public_names_exist(page: Path) -> None:
    for name in re.findall(r"`(?:fastvae\.)((?:\w+\.)*\w+)[`(]", pages.text_of(page)):
        found: object = fastvae
        for part in name.split("."):
            if not hasattr(found, part):
                __import__(f"{found.__name__}.{part}")  # type: ignore[attr-defined]
            found = getattr(found, part)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", pages.text_of(page)):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_are_committed_as_they_ran(notebook: Path) -> None:
    """`make notebooks` wrote them: figures and text, no errors, nothing of the machine that it ran on."""
    assert notebook.stat().st_size < load_script(ROOT / "scripts" / "notebooks.py").LIMIT_BYTES
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    shown = [cell for cell in cells if re.search(r"\b(print\(|plot\.\w+\()", str(cell["source"]))]
    assert shown and all(cell["outputs"] for cell in shown)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not re.search(r"/(home|root|tmp|work)/", str(outputs))


def test_the_folders_that_contributors_are_shown_are_there() -> None:
    """The first column of CONTRIBUTING's list."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("## ")[0]
    for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
        first, *others = re.split(r"\s{2,}", line)[0].split(", ")
        parent = first.rsplit("/", 1)[0]
        for path in (first, *(other if "/" in other else f"{parent}/{other}" for other in others)):
            assert (ROOT / path).exists(), path


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

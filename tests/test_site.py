"""What the documentation's site makes of docstrings, and that it has a page for every public module (`make docs`)."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import fastvae
from scripts import load_script

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    return load_script(ROOT / "docs" / "site" / "docstrings.py")


def rendered(docstrings: ModuleType, text: str) -> str:
    docutils = pytest.importorskip("docutils.core")
    lines = docstrings.as_restructured_text(text.splitlines())
    document = docutils.publish_doctree(
        "\n".join(lines), settings_overrides={"report_level": 2, "halt_level": 2}
    )
    return str(document).replace("\0", "")  # docutils keeps a mark where it took a backslash away


def test_formulas_are_text(docstrings: ModuleType) -> None:
    """Bars, stars and trailing underscores are no markup; code is."""
    shown = rendered(docstrings, "KL(q || p) of |z|^2 and 2 * x * y, rho_ and `a` of ``|z| * w_`` and z_K.")
    assert "KL(q || p) of |z|^2 and 2 * x * y, rho_ and `a` of " in shown
    assert "<literal>|z| * w_</literal> and z_K." in shown
    assert "reference" not in shown and "emphasis" not in shown


def test_set_in_blocks_stand_as_they_are(docstrings: ModuleType) -> None:
    text = "With G(z):\n\n    z' = z + eps * rho_\n        two | lines\n\nand on, for |z|."
    shown = rendered(docstrings, text)
    assert "z' = z + eps * rho_\n    two | lines</literal_block>" in shown
    assert "<paragraph>and on, for |z|.</paragraph>" in shown


def test_columns_stay_columns(docstrings: ModuleType) -> None:
    lines = docstrings.with_tables_set_in(
        ["What it is.", "", "one.py  a file, and", "        more", "two.py  b", "", "On."]
    )
    shown = rendered(docstrings, "\n".join(lines))
    assert "one.py  a file, and\n        more\ntwo.py  b</literal_block><paragraph>On.</paragraph>" in shown


def test_sections_stay_for_napoleon(docstrings: ModuleType) -> None:
    lines = [
        "First.",
        "",
        "Args:",
        "    z: start [B, d], |z| small;",
        "        more of it.",
        "",
        "Returns:",
        "    [B]",
    ]
    expected = [*lines]
    expected[3] = r"    z: start [B, d], \|z\| small;"
    assert docstrings.as_restructured_text(lines) == expected


# Packages whose names nobody is told to import.
INTERNAL = {
    "arguments",
    "atomic",
    "commands",
    "cuda_graphs",
    "decoding",
    "demo",
    "held",
    "info",
    "modes",
    "private",
    "progress",
}
INTERNAL |= {"locks", "randomness", "sigmoids", "wrappers"}


def test_every_public_module_has_a_page() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.rst"))
    described = set(re.findall(r"\.\. automodule:: fastvae\.(\w+)$", pages, re.MULTILINE))
    modules = {info.name for info in pkgutil.iter_modules(fastvae.__path__) if not info.name.startswith("_")}
    assert modules - described == INTERNAL
    listed = set(re.findall(r":doc:`fastvae\.(\w+) <\1>`", pages))
    assert described == listed
    summarised = set(re.findall(r"^   \w+\.(\w+)$", pages, re.MULTILINE))
    names = {name for name in fastvae.__all__ if not isinstance(getattr(fastvae, name), ModuleType)}
    assert names - {"__version__"} <= summarised

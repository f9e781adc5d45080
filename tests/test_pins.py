"""What the tests run with is pinned: packages by their release, the workflow's actions by their commit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from environments import closure
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastvae
from scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
# The Makefile names torch, and torch bounds the others.
FREE = {"torch", "torchvision", "setuptools"}


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_every_package_of_make_has_one_release(python: str, capsys: pytest.CaptureFixture[str]) -> None:
    load_script(ROOT / "scripts" / "requirements.py").main(["demo", "test", "lint", "docs"])
    asked = capsys.readouterr().out.split()
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    here = [pin for pin in pins() if pin.marker is None or pin.marker.evaluate(environment)]
    names = [canonicalize_name(pin.name) for pin in here]
    assert len(set(names)) == len(names) and all(
        re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in here
    )
    assert not FREE & set(names)
    assert set(closure(asked)) - FREE <= set(names)


def test_the_zoo_pins_every_package_and_none_differently() -> None:
    lines = (ROOT / "tests" / "zoo-requirements.txt").read_text().splitlines()
    zoo = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in zoo)
    assert not FREE & {canonicalize_name(pin.name) for pin in zoo}
    others = {canonicalize_name(pin.name): pin.specifier for pin in pins()}
    for pin in zoo:
        assert others.get(canonicalize_name(pin.name), pin.specifier) == pin.specifier, pin.name


def test_hooks_and_citation_name_the_same_releases() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    hooks = re.findall(r"additional_dependencies: \[(.*)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 3 and all(f'"{hook}"' in pyproject for hook in hooks)
    version = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version is not None and version[1] == fastvae.__version__


def test_every_action_is_a_commit() -> None:
    used = re.findall(r"uses: (.*)", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line) for line in used), used

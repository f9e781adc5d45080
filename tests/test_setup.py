"""What setup.py says where something is missing: one paragraph that names it, and never another thing."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from environments import Environment

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "setup.py"
Run = subprocess.CompletedProcess[str]


def paragraph(result: Run) -> str:
    """The one paragraph that a build ends with, without a traceback."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-3000:]
    paragraphs = [line for line in result.stderr.splitlines() if line.startswith("fastvae: ")]
    assert len(paragraphs) == 1, result.stderr
    return paragraphs[0]


def setup(
    *arguments: str,
    before: str = "",
    python: Path | str = sys.executable,
    **variables: str,
) -> Run:
    """setup.py, after some lines that make the interpreter look like another one's."""
    code = f"{before}\nimport runpy, sys\nsys.argv = {['setup.py', *arguments]!r}\nrunpy.run_path({str(SETUP)!r})"
    return subprocess.run(
        [python, "-c", code],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_an_older_python_parses_it_and_is_named() -> None:
    ast.parse(SETUP.read_text(), feature_version=(3, 6))
    said = paragraph(setup("--version", before="import sys\nsys.version_info = (3, 9, 18)"))
    assert "Python 3.10 or later is needed" in said and "torch is" not in said


def test_windows() -> None:
    said = paragraph(setup("--version", before="import os\ndel os.uname"))
    assert "Windows Subsystem for Linux" in said


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment without torch."""
    return Environment(tmp_path_factory.mktemp("bare") / "env", "torch")


def test_no_torch(bare: Environment) -> None:
    said = paragraph(setup("--version", python=bare.python))
    assert "none is installed here" in said and "pip install ." in said and "--no-build-isolation" not in said


def test_isolation_is_not_absence(bare: Environment, tmp_path: Path) -> None:
    """uv and `python -m build` make an environment of their own."""
    said = paragraph(setup("--version", python=bare.python, UV_INTERNAL__BUILD_DIR=str(ROOT)))
    assert "uv pip install --no-build-isolation ." in said and "none is installed" not in said
    build = Environment(tmp_path / "build-env-x", "torch")
    assert "isolated" in paragraph(setup("--version", python=build.python))


def test_pips_isolation_finds_the_torch_of_the_target(tmp_path: Path) -> None:
    """pip runs the target's Python and hides its packages."""
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(Path(importlib.import_module(name).__file__ or "").parent)
    hide = "import sys\nsys.path = [entry for entry in sys.path if 'site-packages' not in entry]"
    result = setup("--version", before=hide, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"+torch{'.'.join(torch.__version__.split('.')[:2])}." in result.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("__version__ = '2.9.1+cpu'", ["torch 2.10 or later is needed", "torch 2.9.1+cpu is installed"]),
        (
            "import what_torch_needs",
            ["cannot be imported", "ModuleNotFoundError: No module named 'what_torch_needs'"],
        ),
        ("raise OSError('libcudart.so.13: cannot open')", ["cannot be imported", "libcudart.so.13"]),
    ],
)
def test_a_torch_that_does_not_do(content: str, words: list[str], bare: Environment, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(content)
    said = paragraph(setup("--version", python=bare.python, PYTHONPATH=str(tmp_path)))
    assert all(word in said for word in words) and "none is installed" not in said


def test_an_old_setuptools(bare: Environment, tmp_path: Path) -> None:
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text("__version__ = '59.6.0'")
    said = paragraph(setup("--version", python=bare.python, PYTHONPATH=str(tmp_path)))
    assert "setuptools 77 or later is needed to build, and 59.6.0 is installed" in said


Compile = Callable[..., Run]


@pytest.fixture
def build(tmp_path: Path) -> Compile:
    """A build with a compiler that writes its arguments down and compiles nothing, but refuses some flags."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/usr/bin/env bash\nfor word in "$@"; do for flag in $REFUSED; do\n'
        '  if [ "$word" = "$flag" ]; then echo "error: unsupported option $flag"; exit 1; fi\ndone; done\n'
        f'echo "$@" >>"{tmp_path}/log"\n'
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then touch "$2"; fi; shift; done\n'
    )
    compiler.chmod(0o755)

    def run(refused: str = "", before: str = "", **variables: str) -> Run:
        places = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
        variables = {"CXX": str(compiler), "REFUSED": refused, "FASTVAE_CUDA": "0", **variables}
        return setup("build_ext", *places, before=before, **variables)

    return run


def test_a_compiler_without_openmp(build: Compile, tmp_path: Path) -> None:
    """clang on macOS: the build goes without, and says so."""
    result = build("-fopenmp -mprefer-vector-width=512")
    assert (
        "does not take -fopenmp, so the build goes without it; kernels will run on one thread"
        in result.stderr
    )
    compiled = [line for line in (tmp_path / "log").read_text().splitlines() if "operator.cpp" in line]
    assert compiled and all("-std=c++20" in line and "-fopenmp" not in line for line in compiled)


def test_no_compiler_and_one_without_cpp20(build: Compile, tmp_path: Path) -> None:
    said = paragraph(build(CXX="no-such-compiler"))
    assert (
        "a C++20 compiler is needed, and no-such-compiler is not on the PATH" in said and "torch" not in said
    )
    said = paragraph(build(CXX="", PATH=str(tmp_path)))
    assert "c++ is not on the PATH. Install g++" in said
    said = paragraph(build("-std=c++20"))
    assert "does not compile a small C++20 program (error: unsupported option -std=c++20)" in said


def test_no_python_headers(build: Compile) -> None:
    said = paragraph(build(before="import sysconfig\nsysconfig.get_path = lambda *_, **__: '/nowhere'"))
    assert "/nowhere holds no Python.h" in said and "python3-dev" in said

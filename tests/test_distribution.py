"""Where the package is found, and what it says of another project's files; each in an environment of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from environments import Environment, copy_sources, digest, install, write_metadata

import fastvae
from fastvae import _distribution
from scripts import load_script

CALL = "import fastvae"


@pytest.fixture
def installed(tmp_path: Path) -> Environment:
    """Everything that is installed here, and this package."""
    environment = Environment(tmp_path / "env")
    install(environment.packages)
    return environment


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that is not built."""
    folder = tmp_path / "checkout"
    copy_sources(folder / "fastvae")
    return folder


def test_an_unbuilt_checkout_takes_the_installed_build(installed: Environment, checkout: Path) -> None:
    """`pip install .` and Python in the same folder: the sources there hide the installed package."""
    result = installed.run("-m", "fastvae", "info", cwd=checkout)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert lines["installed in"].strip() == str(installed.packages / "fastvae")


def test_an_unbuilt_checkout_with_other_sources(installed: Environment, checkout: Path) -> None:
    with (checkout / "fastvae" / "noise.py").open("a") as file:
        file.write("# edited\n")
    result = installed.run("-c", CALL, cwd=checkout)
    assert result.returncode == 1
    assert (
        f"fastvae is installed in {installed.packages / 'fastvae'}, but Python runs in a checkout"
        in result.stderr
    )
    assert "pip install ." in result.stderr and "_C" not in result.stderr.splitlines()[-1]


def test_an_unbuilt_checkout_alone(tmp_path: Path, checkout: Path) -> None:
    result = Environment(tmp_path / "env").run("-c", CALL, cwd=checkout)
    assert "fastvae is not built" in result.stderr and "pip install ." in result.stderr


def test_a_build_for_another_python(tmp_path: Path, checkout: Path) -> None:
    built = Path(fastvae._build.__file__).read_text()  # type: ignore[attr-defined]
    (checkout / "fastvae" / "_build.py").write_text(built)
    (checkout / "fastvae" / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    result = Environment(tmp_path / "env").run("-c", CALL, cwd=checkout)
    assert "fastvae was not compiled for this Python" in result.stderr
    assert "got _C.cpython-39-x86_64-linux-gnu.so" in result.stderr


def test_without_torch_and_with_a_torch_that_does_not_import(tmp_path: Path, checkout: Path) -> None:
    empty = Environment(tmp_path / "env", "torch")
    (tmp_path / "torch.py").write_text("import a_package_that_torch_needs\n")
    broken = empty.run("-c", "import fastvae", path=tmp_path, cwd=checkout)
    assert "none is installed" not in broken.stderr and "a_package_that_torch_needs" in broken.stderr
    missing = empty.run("-c", "import fastvae", cwd=checkout)
    assert "fastvae needs PyTorch, and none is installed" in missing.stderr
    assert "in a checkout of fastvae: pip install ." in missing.stderr


def test_the_other_project_beside_this_one(installed: Environment, tmp_path: Path) -> None:
    """Its files went into our folder before ours did."""
    theirs = installed.packages / "fastvae" / "decoder.py"
    theirs.write_text("")
    record = [f"fastvae/decoder.py,{digest(theirs)},0"]
    write_metadata(installed.packages, "fastvae", "fastvae", "Somebody Else", record)
    result = installed.run("-m", "fastvae", "info", cwd=tmp_path)
    assert result.returncode == 0 and "UserWarning: fastvae: another project" in result.stderr
    assert "pip uninstall fastvae fastvae-ops" in result.stderr
    assert "another project that is imported under this name is installed too (fastvae 0.1.0" in result.stdout
    assert "are not this package's: decoder.py" in result.stdout


def faults_in(folder: Path) -> list[str]:
    """What the package there finds wrong with itself."""
    found: list[str] = load_script(folder / "fastvae" / "_distribution.py").faults([str(folder)])
    return found


def test_installations_in_order_and_not(tmp_path: Path) -> None:
    """The other project's files came last, over two of ours and beside the others."""
    package = install(tmp_path)
    assert faults_in(tmp_path) == []
    for name in ("__init__.py", "ops/__init__.py", "video.py"):
        (package / name).write_text('"""A video decoder."""\n')
    (package / "noise.py").unlink()
    altered, strange = faults_in(tmp_path)
    assert "are not as they were installed: __init__.py, noise.py, ops/__init__.py. To mend it" in altered
    assert "are not this package's: video.py. To mend it: pip uninstall fastvae fastvae-ops" in strange


def test_this_package_under_its_old_name_is_not_the_other_project(tmp_path: Path) -> None:
    write_metadata(tmp_path, "fastvae", "fastvae", "The fastvae authors", [])
    assert _distribution.other_project([str(tmp_path)]) is None

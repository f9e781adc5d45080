"""scripts/check_wheel.py accepts a wheel as ``make wheel`` gives it, and names what is wrong with any other."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from scripts import load_script

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "check_wheel.py"
TAG = "cp311-cp311-linux_x86_64"
VERSION = "0.1.0+torch2.13.cpu"


@pytest.fixture(scope="module")
def check_wheel() -> ModuleType:
    return load_script(SCRIPT)


def content() -> dict[str, str]:
    folder = f"fastvae_ops-{VERSION}.dist-info"
    return {
        "fastvae/__init__.py": "",
        "fastvae/_build.py": "",
        "fastvae/py.typed": "",
        "fastvae/_C.cpython-311-x86_64-linux-gnu.so": "",
        f"{folder}/WHEEL": f"Wheel-Version: 1.0\nTag: {TAG}\n",
        f"{folder}/METADATA": "Metadata-Version: 2.4\nRequires-Dist: torch==2.13.*\nRequires-Dist: numpy>=1.24\n",
        f"{folder}/licenses/LICENSE": "",
        f"{folder}/RECORD": "",
    }


def wheel(folder: Path, files: dict[str, str], version: str = VERSION, tag: str = TAG) -> Path:
    path = folder / f"fastvae_ops-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_wheel_in_order(
    check_wheel: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = wheel(tmp_path, content())
    assert check_wheel.faults_of(path) == []
    assert check_wheel.main([str(path)]) == 0
    assert "in order" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"fastvae/libtorch_cpu.so": ""}, "shared objects: expected fastvae/_C.* alone"),
        ({"fastvae/libcudart.so.13": ""}, "libcudart.so.13 is another package's"),
        ({"fastvae/py.typed": None}, "py.typed is missing"),
        ({"tests/test_it.py": ""}, "folders: expected fastvae and its dist-info, got also"),
        ({f"fastvae_ops-{VERSION}.dist-info/WHEEL": "Tag: py3-none-any\n"}, "the metadata py3-none-any"),
        (
            {f"fastvae_ops-{VERSION}.dist-info/METADATA": "Requires-Dist: torch>=2.10\n"},
            "expected torch==2.13.*",
        ),
        ({f"fastvae_ops-{VERSION}.dist-info/licenses/LICENSE": None}, "LICENSE is missing"),
    ],
)
def test_faults_inside(
    check_wheel: ModuleType, tmp_path: Path, change: dict[str, str | None], fault: str
) -> None:
    files = {name: text for name, text in (content() | change).items() if text is not None}
    path = wheel(tmp_path, files)
    assert any(fault in found for found in check_wheel.faults_of(path)), check_wheel.faults_of(path)
    assert check_wheel.main([str(path)]) == 1


def test_faults_of_the_file(check_wheel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = wheel(tmp_path, content(), version="0.1.0")
    assert check_wheel.faults_of(named) == ["version: expected X.Y.Z+torchA.B.cpu or .cuNNN, got 0.1.0"]
    anywhere = wheel(tmp_path, content(), tag="cp311-cp311-any")
    assert "tag: expected a platform, got any" in check_wheel.faults_of(anywhere)
    cut = tmp_path / f"fastvae_ops-{VERSION}-{TAG}.whl"
    cut.write_bytes(wheel(tmp_path, content()).read_bytes()[:100])
    assert check_wheel.faults_of(cut) == ["file: File is not a zip file"]
    monkeypatch.setitem(check_wheel.BUDGET, "cpu", 0)
    assert any(
        "size: expected at most 0 MiB" in fault for fault in check_wheel.faults_of(wheel(tmp_path, content()))
    )

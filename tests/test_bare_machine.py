"""scripts/gpu_check.sh, every stage of its calls, on this machine: the CPU build and stand-ins for CUDA's tools."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from environments import PACKAGE, copy_sources

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., "Result"]
TOOLS = {
    "nvidia-smi": "echo a stand-in for a GPU",
    "nvcc": "echo '#$ TOP=/opt/a-toolkit' >&2",
    # Both end their options with the command.
    "compute-sanitizer": 'echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"; shift 4; exec "$@"',
    "ncu": 'shift 6; exec "$@"',
}


class Result:
    """What a call printed, and what it left in $OUT."""

    def __init__(self, done: subprocess.CompletedProcess[str], out: Path, call: str) -> None:
        self.status, self.printed = done.returncode, done.stdout + done.stderr
        self.left = sorted(path.name for path in out.iterdir())
        self.files: dict[str, str] = {}
        if (out / f"{call}.tar.gz").exists():
            with tarfile.open(out / f"{call}.tar.gz") as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    if file is not None:
                        name = member.name.removeprefix(f"{call}/")
                        self.files[name] = file.read().decode(errors="replace")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A call in a checkout that is not built, with a build that was carried along."""
    checkout, tools, carried = (tmp_path / name for name in ("checkout", "tools", "carried"))
    copy_sources(checkout / "fastvae")
    for name in ("scripts", "benchmarks", "tests", "pyproject.toml"):
        (checkout / name).symlink_to(ROOT / name)
    carried.mkdir()
    for path in (PACKAGE / "_build.py", *PACKAGE.glob("_C.*.so")):
        (carried / path.name).symlink_to(path)
    tools.mkdir()

    def call(name: str, stages: str = "", change: dict[str, str] | None = None, **variables: str) -> Result:
        for tool, text in (TOOLS | (change or {})).items():
            (tools / tool).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (tools / tool).chmod(0o755)
        out = tmp_path / "out"
        environment = {
            # A bare machine runs no pytest-xdist.
            **{
                name: value
                for name, value in os.environ.items()
                if name not in ("CUDA_HOME", "PYTHONPATH") and not name.startswith("PYTEST_")
            },
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            **{"PYTHON": sys.executable, "OUT": str(out), "PREBUILT": str(carried), "STAGES": stages},
            **{"OMP_NUM_THREADS": "1", "WORKERS": "1", **variables},
        }
        done = subprocess.run(
            ["bash", str(checkout / "scripts" / "gpu_check.sh"), "--dry-run", name],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        return Result(done, out, name)

    return call


@pytest.mark.slow
def test_the_carried_build_is_taken_and_memory_is_checked_uncached(run: Run) -> None:
    result = run("first", "machine extension memcheck")
    assert result.status == 0, result.printed
    assert "imported from" in result.files["extension.txt"]
    assert "CUDA_HOME /opt/a-toolkit" in result.files["machine.txt"]
    assert "setuptools" in result.files["machine.txt"] and "Python.h" in result.files["machine.txt"]
    assert "caching off: 1" in result.files["memcheck.txt"]
    assert "every case agrees" in result.files["memcheck.txt"]
    assert result.left == ["first.tar.gz", "first.txt"]
    assert "everything passed" in result.files["summary.txt"]


@pytest.mark.slow
def test_a_stage_that_fails_is_recorded_and_the_next_one_runs(run: Run) -> None:
    fault = {"compute-sanitizer": "case $2 in memcheck) echo an error; exit 9;; esac", "nvidia-smi": "exit 6"}
    result = run("first", "machine extension memcheck racecheck", fault)
    assert result.status == 1
    # What the machine says of itself is no fault.
    assert "machine: exit status 0" in result.files["summary.txt"]
    assert "nvidia-smi: exit status 6" in result.files["machine.txt"]
    assert "memcheck: exit status 9" in result.files["summary.txt"]
    assert "racecheck: exit status 0" in result.files["summary.txt"]
    assert result.files["summary.txt"].splitlines()[-1].startswith("gpu-check: failed: memcheck (see")


def test_what_was_done_before_the_time_was_over_is_kept(run: Run) -> None:
    slow = {"nvidia-smi": "echo before; sleep 60; echo after"}
    result = run("third", "machine ncu", slow, SECONDS_IN_ALL="7")
    assert result.status == 1
    assert "before" in result.files["machine.txt"] and "after" not in result.files["machine.txt"]
    assert "machine: exit status 124" in result.files["summary.txt"]
    assert "no time left for ncu" in result.files["summary.txt"]


def test_without_an_extension_nothing_else_runs(run: Run, tmp_path: Path) -> None:
    result = run("first", "extension smoke", PREBUILT=str(tmp_path / "nothing"))
    assert result.status == 1 and "no extension" in result.printed and "smoke.txt" not in result.files


def test_an_unknown_call(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run("fourth")
    assert result.status == 2 and "expected first, second or third, got 'fourth'" in result.printed


@pytest.mark.slow
@pytest.mark.parametrize("call", ["first", "second", "third"])
def test_every_stage(call: str, run: Run) -> None:
    tests = {"third": "tests/test_flow_compile.py"}.get(call, "tests/test_leapfrog.py")
    result = run(call, SECONDS_IN_ALL="1800", TESTS=tests)
    assert result.status == 0, result.printed
    if call == "first":
        assert {"smoke.txt", "tests.txt", "tests-default-device.txt", "memcheck.txt", "racecheck.txt"} <= set(
            result.files
        )
    elif call == "second":
        written = {name for name in result.files if name.endswith(".md")}
        expected = {
            "log_likelihood",
            "tracin",
            "jacobian",
            "jacobian-memory",
            "regret",
            "flow",
            "zoo-mlp",
            "operators",
        }
        assert {"profile.txt", "profile-large.txt"} <= set(result.files)
        assert {f"results/{name}-cpu-quick.md" for name in expected} <= written
        assert "results-compile/flow-cpu-quick.md" in written
    else:
        assert {"ncu.txt", "flow-jax.txt", "tests-compile.txt"} <= set(result.files)

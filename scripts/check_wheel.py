"""Check wheels of fastvae: what they are called, what they ask for, what they hold, how large they are.

    python scripts/check_wheel.py dist/*.whl

Each must be for one Python and one platform, name the torch that it was built for in its version and pin that minor
version, hold one shared object and no library of PyTorch or CUDA, and keep its size budget.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

BUDGET = {"cpu": 8, "cuda": 64}
"""MiB of a wheel"""
FOREIGN = re.compile(r"lib(torch|c10|caffe2|cudart|cublas|cudnn|nvrtc|gomp|mkl)\b", re.IGNORECASE)
VERSION = re.compile(r"[\d.]+(?:(?:a|b|rc|\.dev)\d+)?\+torch(?P<torch>\d+\.\d+)\.(?P<kind>cpu|cu\d+)")
NAME = re.compile(r"fastvae_ops-(?P<version>[^-]+)-(?P<python>cp3\d+)-(?P<abi>cp3\d+)-(?P<platform>\w+)\.whl")


def faults_of(path: Path) -> list[str]:
    """What is wrong with a wheel, a line each."""
    named = NAME.fullmatch(path.name)
    if named is None:
        return ["name: expected fastvae_ops-VERSION-cp3X-cp3X-PLATFORM.whl"]
    version = VERSION.fullmatch(named["version"])
    if version is None:
        return [f"version: expected X.Y.Z+torchA.B.cpu or .cuNNN, got {named['version']}"]
    faults = []
    if named["python"] != named["abi"]:
        faults.append(f"tag: the shared object is for one Python, got {named['python']}-{named['abi']}")
    if named["platform"] == "any":
        faults.append("tag: expected a platform, got any")
    limit = BUDGET["cpu" if version["kind"] == "cpu" else "cuda"]
    if path.stat().st_size > limit * 2**20:
        faults.append(f"size: expected at most {limit} MiB, got {path.stat().st_size / 2**20:.1f} MiB")
    try:
        with zipfile.ZipFile(path) as wheel:
            faults += _faults_inside(wheel, named, version)
    except zipfile.BadZipFile as error:
        faults.append(f"file: {error}")
    return faults


def _faults_inside(wheel: zipfile.ZipFile, named: re.Match[str], version: re.Match[str]) -> list[str]:
    faults = []
    names = wheel.namelist()
    shared = [name for name in names if re.search(r"\.(so|dylib|pyd)(\.|$)", name)]
    if len(shared) != 1 or not shared[0].startswith("fastvae/_C."):
        faults.append(f"shared objects: expected fastvae/_C.* alone, got {', '.join(shared) or 'none'}")
    faults += [f"file: {name} is another package's" for name in names if FOREIGN.search(Path(name).name)]
    for name in ("fastvae/__init__.py", "fastvae/_build.py", "fastvae/py.typed"):
        if name not in names:
            faults.append(f"file: {name} is missing")
    outside = {name.split("/")[0] for name in names} - {"fastvae"}
    if outside != {f"fastvae_ops-{named['version']}.dist-info"}:
        faults.append(f"folders: expected fastvae and its dist-info, got also {', '.join(sorted(outside))}")
        return faults
    folder = outside.pop()
    tags = _read(wheel, f"{folder}/WHEEL").get_all("Tag", [])
    tag = f"{named['python']}-{named['abi']}-{named['platform']}"
    if tags != [tag]:
        faults.append(f"tag: the name says {tag}, the metadata {', '.join(tags)}")
    needs = _read(wheel, f"{folder}/METADATA").get_all("Requires-Dist", [])
    pin = f"torch=={version['torch']}.*"
    if pin not in [need.replace(" ", "") for need in needs]:
        faults.append(
            f"requirement: expected {pin}, got {', '.join(n for n in needs if 'torch' in n) or 'none'}"
        )
    if not any(name.startswith(f"{folder}/") and name.endswith("LICENSE") for name in names):
        faults.append("file: LICENSE is missing")
    return faults


def _read(wheel: zipfile.ZipFile, name: str) -> Message:
    return Parser().parsestr(wheel.read(name).decode())


def main(arguments: Sequence[str]) -> int:
    """Print a line for each wheel; 1 if one is not in order."""
    if not arguments:
        print("check_wheel: expected wheels, got none")
        return 2
    bad = 0
    for path in map(Path, arguments):
        faults = faults_of(path)
        bad += bool(faults)
        print(
            f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB, {'in order' if not faults else 'NOT in order'}"
        )
        for fault in faults:
            print(f"  {fault}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

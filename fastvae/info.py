"""What this installation is made of: the lines of ``python -m fastvae info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from fastvae import _build
from fastvae._distribution import faults, to_mend
from fastvae._extension import raw
from fastvae._version import __version__

__all__ = ["describe"]

_OPTIONAL = {"matplotlib": "demo", "scikit-learn": "demo"}


def describe() -> list[tuple[str, str]]:
    """(name, value) of everything that a report of a fault or of a speed should state."""
    build = raw.build_info()
    architectures = build["cuda_architectures"] or "none named"
    cuda = f"CUDA {_build.TORCH_CUDA}, architectures {architectures}" if build["cuda"] else "no (CPU build)"
    if build["cuda_emulated"]:
        cuda = "emulated on the CPU, for tests"
    running_cuda = "a CPU build" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    openmp = "with OpenMP" if build["openmp"] else "without OpenMP"
    return [
        ("fastvae", __version__),
        ("installed in", str(Path(_build.__file__).parent)),
        ("installed files", " ".join(faults()) or "in order"),
        ("torch, built against", _build.TORCH_VERSION),
        ("torch, running", f"{torch.__version__} ({running_cuda})"),
        ("CUDA kernels", cuda),
        ("GPUs visible", _gpus()),
        ("CPU instruction set", build["cpu_instruction_set"]),
        ("CPU matrix products", _PRODUCTS[build["cpu_products"], build["cpu_bfloat16"]]),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} logical CPUs, kernels {openmp}"),
        ("compiler", build["compiler"]),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        *((f"optional: {name}", _version(name, extra)) for name, extra in _OPTIONAL.items()),
    ]


_PRODUCTS = {
    ("kernel", True): "fastvae's kernels, bfloat16 at precision medium",
    ("kernel", False): "fastvae's kernel",
    ("library", False): "torch's BLAS",
}


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in devices)


def _version(name: str, extra: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed; {to_mend(name, extra)}"

"""Fixtures of all tests: the devices, and float32 that is float32, the same each time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# For the benchmarks of this checkout; never its fastvae in place of an installed one.
sys.path.append(str(Path(__file__).resolve().parents[1]))


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every test that asks for it runs on the CPU and on a GPU (``-k cuda`` selects the latter)."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _steady_cudnn() -> Iterator[None]:
    """cuDNN convolves in TF32 by default, whose 10 bits would hide errors below 1e-3, and may add in any order."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    yield
    cudnn.allow_tf32, cudnn.deterministic = before


def _on_one_thread() -> Iterator[None]:
    """For what must repeat to the bit, or is too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


one_thread = pytest.fixture(_on_one_thread)
one_thread_for_a_module = pytest.fixture(_on_one_thread, scope="module")

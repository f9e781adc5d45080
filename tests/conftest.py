"""Fixtures of all tests: the devices, and float32 that is float32, the same each time.

``--default-device cuda`` runs tests that name no device on a GPU: as under ``torch.set_default_device``, what they make
lies there, and so does what they draw with a generator of the CPU.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import DeviceContext

_HERE = str(Path(__file__).resolve().parent)
# For the benchmarks of this checkout; never its fastvae in place of an installed one.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# A shell starts what it runs in the background deaf to Ctrl-C, and so would be every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _DefaultDevice(DeviceContext):
    """``torch.set_default_device`` under which a test may draw with a generator of the CPU, as it does without one.

    What the package draws is none of its business, and fails as it would for a user.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator))
        generator = next(given, None)
        elsewhere = generator is not None and generator.device.type != self.device.type
        if not elsewhere or "device" in kwargs or not sys._getframe(1).f_code.co_filename.startswith(_HERE):
            return super().__torch_function__(func, types, args, kwargs)
        in_place = func.__name__.endswith("_")
        there = [arg.to(generator.device) if isinstance(arg, Tensor) else arg for arg in args]
        drawn = (
            func(*there, **kwargs)
            if there and isinstance(there[0], Tensor)
            else func(*there, **kwargs, device=generator.device)
        )
        return (
            args[0].copy_(drawn)
            if in_place
            else drawn.detach().to(self.device).requires_grad_(drawn.requires_grad)
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this suite."""
    parser.addoption("--default-device", help="where tests make what they give no device (cpu, cuda)")


def pytest_configure(config: pytest.Config) -> None:
    """From before the first test file is imported: what it makes then is used in its tests."""
    device = config.getoption("--default-device")
    if device is not None:
        mode = _DefaultDevice(device)
        mode.__enter__()
        config.add_cleanup(lambda: mode.__exit__(None, None, None))


def pytest_sessionfinish() -> None:
    """Leave what this process launched on a build that emulates CUDA (scripts/emulated_launches.py)."""
    folder = os.environ.get("FASTVAE_LAUNCHES")
    if folder:
        from fastvae._extension import raw

        path = Path(folder) / f"{os.getpid()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(raw.emulated_launches()), encoding="utf-8")


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

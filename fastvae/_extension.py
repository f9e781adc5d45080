"""Opens the shared object, after checking that it fits the torch that is running.

A shared object built against another minor version of torch crashes or misbehaves when it is opened, so
the version written down by setup.py is compared first.
"""

from __future__ import annotations

import importlib
from types import ModuleType

try:
    import torch
except ImportError as error:
    raise ImportError(
        "fastvae needs PyTorch, and none is installed in this environment. Install the build that fits your "
        "machine (the selector on PyTorch's home page gives the command), then reinstall fastvae so that it is "
        "compiled against it: pip install --force-reinstall --no-deps fastvae"
    ) from error

_REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir --no-binary fastvae fastvae"


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def check_torch(built: str, built_cuda: str | None, running: str, running_cuda: str | None) -> None:
    """Raise ImportError unless the running torch can open a shared object built against the other one.

    Args:
        built, running: ``torch.__version__`` then and now.
        built_cuda, running_cuda: ``torch.version.cuda`` then and now (None: a CPU build).
    """
    if _minor(built) != _minor(running):
        raise ImportError(
            f"fastvae was compiled against torch {built}, but torch {running} is running. Compile it again "
            f"against this torch: {_REBUILD} (in a source checkout: pip install .), or install the torch it was "
            f"built for: pip install 'torch=={'.'.join(_minor(built))}.*'"
        )
    if built_cuda is not None and running_cuda is None:
        raise ImportError(
            f"fastvae was compiled with CUDA kernels (torch {built}), but the torch that is running ({running}) "
            f"is a CPU build. Compile fastvae again: {_REBUILD} (in a source checkout: pip install .)"
        )


def _open() -> ModuleType:
    try:
        from fastvae._build import TORCH_CUDA, TORCH_VERSION
    except ImportError as error:
        raise ImportError(
            "fastvae is not built here: this looks like a source checkout. Build it with: pip install . (or, to "
            "work on it: python setup.py build_ext --inplace), and do not run Python inside the checkout otherwise"
        ) from error
    check_torch(TORCH_VERSION, TORCH_CUDA, torch.__version__, torch.version.cuda)
    return importlib.import_module("fastvae._C")


raw = _open()
"""The extension module ``fastvae._C``."""

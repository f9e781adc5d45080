"""Opens the shared object, after checking that it fits the torch that is running.

A shared object built against another minor version of torch crashes or misbehaves when it is opened, so
the version written down by setup.py is compared first.
"""

from __future__ import annotations

import importlib
import platform
import sys
import warnings
from pathlib import Path
from types import ModuleType

from fastvae._distribution import installed_elsewhere, other_project

if _sentence := other_project():
    warnings.warn(_sentence, stacklevel=2)

try:
    import torch
    import torch.compiler.config as compiling
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise  # torch is there, and what it needs is not: its own message says what
    raise ImportError(
        "fastvae needs PyTorch, and none is installed in this environment. Install the build that fits your "
        "machine (the selector on PyTorch's home page gives the command), then compile fastvae against it, in a "
        "checkout of fastvae: pip install ."
    ) from error

_REBUILD = "in a checkout of fastvae: pip install ."


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
            f"against this torch, {_REBUILD}; or install the torch it was built for: "
            f"pip install 'torch=={'.'.join(_minor(built))}.*'"
        )
    if built_cuda is not None and running_cuda is None:
        raise ImportError(
            f"fastvae was compiled with CUDA kernels (torch {built}), but the torch that is running ({running}) "
            f"is a CPU build. Compile fastvae again, {_REBUILD}"
        )


def _find_build() -> None:
    """Make ``fastvae._build`` and ``fastvae._C`` be found, also from a checkout that is not built itself.

    Python looks into the folder it runs in first, so inside a checkout the installed package is hidden by its own
    sources. Where both have the same, the build of the installed one serves them.
    """
    here = Path(__file__).resolve().parent
    if (here / "_build.py").is_file():
        return
    others = list(installed_elsewhere())
    for folder, same in others:
        if same:
            sys.modules["fastvae"].__path__.append(str(folder))
            return
    if others:
        raise ImportError(
            f"fastvae is installed in {others[0][0]}, but Python runs in a checkout ({here.parent}) whose files "
            "differ from the installed ones. Install it again, in the checkout: pip install . (or run Python in "
            "another folder)"
        )
    raise ImportError(
        f"fastvae is not built: {here.parent} is a checkout, and nothing is installed in this environment "
        f"({sys.prefix}). Install it, in the checkout: pip install . (or, to work on it: "
        "python setup.py build_ext --inplace)"
    )


def _open() -> ModuleType:
    _find_build()
    from fastvae._build import TORCH_CUDA, TORCH_VERSION

    check_torch(TORCH_VERSION, TORCH_CUDA, torch.__version__, torch.version.cuda)
    try:
        return importlib.import_module("fastvae._C")
    except ModuleNotFoundError as error:
        if error.name != "fastvae._C":
            raise
        found = sorted(path.name for path in Path(__file__).resolve().parent.glob("_C.*"))
        raise ImportError(
            f"fastvae was not compiled for this Python ({platform.python_version()}): expected a shared object "
            f"_C for {sys.implementation.cache_tag}, got {', '.join(found) or 'none'}. Compile it again, {_REBUILD}"
        ) from error


raw = _open()
"""The extension module ``fastvae._C``."""


def _mark_compiled_graphs() -> None:
    """Keep this build's graphs in PyTorch's caches on disk apart from those of others.

    A compiled graph holds the sizes of our operators' results, such as what the flow keeps for its gradient, which
    another build may give otherwise; what PyTorch looks a graph up by says nothing of the build.
    """
    library = Path(str(raw.__file__)).stat()
    mark = f"fastvae {library.st_size} {library.st_mtime_ns}"
    if mark not in compiling.cache_key_tag:
        compiling.cache_key_tag = f"{compiling.cache_key_tag} {mark}".lstrip()


_mark_compiled_graphs()


def has_kernels_for(tensor: torch.Tensor) -> bool:
    """Whether this build has kernels for tensors of that device and dtype."""
    device = tensor.device.type
    known = device == "cpu" or (device == "cuda" and raw.build_info()["cuda"])
    return known and tensor.dtype in (torch.float32, torch.float64)

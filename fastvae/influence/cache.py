"""Factors of training tiles on disk, one safetensors file each, found again by what they were computed from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastvae._distribution import to_mend
from fastvae.influence.factors import Factors
from fastvae.training.checkpoints import write_atomically

__all__ = ["FactorCache", "fingerprint"]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FactorCache:
    """A folder of factors; None keeps nothing.

    Args:
        folder: made if it is not there. One folder for each model class and loss: what they compute is not part of
            a file's key.

    Raises:
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            try:
                import safetensors.torch  # noqa: F401
            except ImportError as error:
                raise ImportError(
                    f"TracIn: cache_dir needs safetensors; {to_mend('safetensors', 'influence')}"
                ) from error
            self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def enabled(self) -> bool:
        """Whether anything is kept."""
        return self._folder is not None

    def get(self, key: str, compute: Callable[[], Factors]) -> Factors:
        """The factors under this key, computed if they are not there."""
        if self._folder is None:
            return compute()
        from safetensors import safe_open
        from safetensors.torch import save

        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                flags = file.metadata()["bias"]
                named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Factors(
                [named[f"inputs.{i}"] for i in range(len(flags))],
                [named[f"output_grads.{i}"] for i in range(len(flags))],
                [flag == "1" for flag in flags],
                [named[f"dense.{i}"] for i in range(len(named) - 2 * len(flags))],
            )
        factors = compute()
        metadata = {"bias": "".join(str(int(flag)) for flag in factors.bias)}
        named = {name: tensor.cpu().contiguous().clone() for name, tensor in factors.tensors().items()}
        write_atomically(path, lambda file: file.write(save(named, metadata)))
        return factors

"""Factors of training tiles on disk, one safetensors file each, found again by what they were computed from."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastvae._distribution import to_mend
from fastvae.atomic import write_atomically
from fastvae.influence.factors import Factors

__all__ = ["FactorCache", "fingerprint"]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FactorCache:
    """A folder of factors; None keeps nothing.

    Args:
        folder: made if it is not there. One folder for each model class and loss: what they compute is not part of
            a file's key. A file is used if its checksum holds.

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
        """The factors under this key, computed if they are not there, or not as they were kept (with a warning)."""
        if self._folder is None:
            return compute()
        from safetensors.torch import save

        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        if path.exists():
            try:
                return _read(path, key)
            except Exception as error:  # a damaged file can raise anything
                warnings.warn(
                    f"TracIn: cache_dir: {path}: expected factors as they were kept, found a damaged file or one of "
                    f"another version ({error}); computing them anew",
                    stacklevel=2,
                )
        factors = compute()
        named = {name: tensor.cpu().contiguous().clone() for name, tensor in factors.tensors().items()}
        flags = "".join(str(int(flag)) for flag in factors.bias)
        metadata = {"bias": flags, "sha256": _checksum(key, flags, named)}
        write_atomically(path, lambda file: file.write(save(named, metadata)))
        return factors


def _checksum(key: str, flags: str, named: Mapping[str, Tensor]) -> str:
    """Over all that a file holds, and over what it was computed from: a file under another's name does not pass."""
    return hashlib.sha256(f"{key}\n{flags}\n{fingerprint(named)}".encode()).hexdigest()


def _read(path: Path, key: str) -> Factors:
    """The factors in a file. ValueError and others unless they are those that were kept under this key."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        named = {name: file.get_tensor(name) for name in sorted(file.keys())}
    flags, found = metadata.get("bias", ""), metadata.get("sha256")
    if found is None:
        raise ValueError("no checksum")
    order = [f"{kind}.{i}" for kind in ("inputs", "output_grads") for i in range(len(flags))]
    order += [f"dense.{i}" for i in range(len(named) - len(order))]
    if set(order) != set(named) or set(flags) - {"0", "1"}:
        raise ValueError(f"tensors {', '.join(named)}")
    named = {name: named[name] for name in order}
    if found != _checksum(key, flags, named):
        raise ValueError("wrong checksum")
    count = len(flags)
    values = list(named.values())
    inputs, output_grads, dense = values[:count], values[count : 2 * count], values[2 * count :]
    if any(tensor.dim() != 3 for tensor in inputs + output_grads) or any(
        tensor.dim() != 2 for tensor in dense
    ):
        raise ValueError("tensors of another rank")
    if any(h.shape[:2] != delta.shape[:2] for h, delta in zip(inputs, output_grads, strict=True)):
        raise ValueError("inputs and gradients of other sizes")
    if len({len(tensor) for tensor in values}) > 1 or not all(
        tensor.is_floating_point() for tensor in values
    ):
        raise ValueError("tensors of different numbers of samples, or of whole numbers")
    return Factors(inputs, output_grads, [flag == "1" for flag in flags], dense)

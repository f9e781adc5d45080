"""A run's folder: ``run.json`` with its settings, the model that ``model.save`` writes, and ``checkpoints``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

import fastvae
from fastvae._extension import raw
from fastvae._version import __version__
from fastvae.atomic import write_atomically
from fastvae.commands.errors import CommandError, mendable
from fastvae.data import ImageDataset
from fastvae.models import BaseVAE

__all__ = ["RunSettings", "device_of", "load_images", "load_run"]

_FORMAT, _VERSION = "fastvae run", 1


@dataclass
class RunSettings:
    """What ``fastvae train`` was told, and what it chose by itself where it was told nothing."""

    data: str = ""
    shape: list[int] | None = None
    """(C, H, W) of the images."""
    test_fraction: float = 0.1
    model: str = "vae"
    likelihood: str = "auto"
    latent_dim: int = 32
    width: int = 16
    beta: float = 1.0
    epochs: int | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    patience: int | None = None
    binarize: bool = False
    seed: int = 0
    checkpoint_every: int | None = None

    def save(self, run: Path) -> None:
        """To the run's folder, which is made if need be."""
        content = {"format": _FORMAT, "version": _VERSION, "fastvae": __version__, "settings": asdict(self)}
        with mendable():
            run.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=1) + "\n"
            write_atomically(run / "run.json", lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, run: Path) -> RunSettings:
        """From a run's folder. CommandError if there are none, or other ones."""
        path = run / "run.json"
        if not path.is_file():
            raise CommandError(f"{run}: expected a folder that fastvae train wrote, found no run.json in it")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != _FORMAT:
                raise ValueError(f"no {_FORMAT!r}")
            version = content.get("version")
            if isinstance(version, int) and version > _VERSION:
                raise CommandError(
                    f"{path}: expected version {_VERSION}, found {version}, written by fastvae "
                    f"{content.get('fastvae')}; this is {__version__}: install that or a later one"
                )
            settings = content["settings"]
            if set(settings) != {field.name for field in fields(cls)}:
                raise ValueError("other settings than this version has")
            for field in fields(cls):
                # Strings, since annotations are not evaluated.
                kind = type(settings[field.name]).__name__.replace("NoneType", "None")
                if kind not in str(field.type).replace("[int]", "").split(" | "):
                    raise ValueError(f"{field.name}: {settings[field.name]!r}")
            return cls(**settings)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CommandError(
                f"{path}: expected what fastvae train wrote, found something else ({error})"
            ) from error


def load_run(run: Path, device: str | None) -> tuple[BaseVAE, RunSettings]:
    """The model of a run, on its device and in eval mode, and the run's settings."""
    settings = RunSettings.load(run)
    with mendable():
        return fastvae.load(run, device=device_of(device)), settings


def load_images(
    source: str,
    settings: RunSettings,
    split: Literal["train", "test", "all"],
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    labelled: bool = True,
) -> ImageDataset:
    """Images as a run's model takes them; where it has not been made yet, of this size and with so many channels.

    Without labels nothing is asked of subfolders.
    """
    shape = settings.shape
    if shape is not None:
        size, channels = (shape[1], shape[2]), shape[0] if shape[0] in (1, 3) else None
    with mendable():
        found = fastvae.data.load(
            source,
            split=split,
            test_fraction=settings.test_fraction,
            seed=settings.seed,
            size=size,
            channels=channels,  # type: ignore[arg-type]
            labels="auto" if labelled else None,
        )
    if shape not in (None, list(found.images.shape[1:])):
        raise CommandError(
            f"{source}: expected images of {shape} as in the run, found {list(found.images.shape[1:])}"
        )
    return found


def device_of(name: str | None) -> torch.device:
    """The device of that name; None: the GPU, if there is one and kernels for it were built."""
    if name is None:
        has_gpu = torch.cuda.is_available() and bool(raw.build_info()["cuda"])
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        raise CommandError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device

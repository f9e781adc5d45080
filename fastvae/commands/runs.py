"""A run's folder: ``run.json`` with its settings, the model that ``model.save`` writes, and ``checkpoints``."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

import fastvae
from fastvae._extension import raw
from fastvae._version import __version__
from fastvae.atomic import write_atomically
from fastvae.commands.errors import CommandError, mendable
from fastvae.data import ImageDataset, TableDataset
from fastvae.data.tables import is_named, is_table
from fastvae.models import BaseVAE

__all__ = ["RunData", "RunSettings", "device_of", "load_data", "load_run"]

_FORMAT, _VERSION = "fastvae run", 2

RunData = ImageDataset | TableDataset


_OF_TABLES = {"columns", "label", "condition", "condition_dim", "ignore", "levels", "mean", "scale"}


@dataclass
class RunSettings:
    """What ``fastvae train`` was told, and what it chose by itself where it was told nothing."""

    data: str = ""
    shape: list[int] | None = None
    """(C, H, W) of the images, or (F,) of a table's rows."""
    test_fraction: float = 0.1
    model: str = "vae"
    likelihood: str = "auto"
    latent_dim: int | None = None
    width: int | None = None
    beta: float = 1.0
    epochs: int | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    patience: int | None = None
    binarize: bool = False
    seed: int = 0
    checkpoint_every: int | None = None
    columns: list[str] | None = None
    """Of a table with names, those that are modelled."""
    label: str | None = None
    condition: list[str] | None = None
    condition_dim: int = 0
    """Numbers that the networks are given besides a row."""
    ignore: list[str] | None = None
    levels: dict[str, Any] | None = None
    """How columns become the condition; see ``fastvae.data.load_table``."""
    mean: list[float] | None = None
    scale: list[float] | None = None
    """Of the columns, where the model sees them standardised."""

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
            names = {field.name for field in fields(cls)}
            # Version 1 knew no tables.
            known = names - (_OF_TABLES if version == 1 else set())
            if set(settings) != known:
                raise ValueError("other settings than this version has")
            for field in fields(cls):
                # Strings, since annotations are not evaluated.
                value = settings.get(field.name, field.default)
                kind = type(value).__name__.replace("NoneType", "None")
                if kind not in re.sub(r"\[.*?\]", "", str(field.type)).split(" | "):
                    raise ValueError(f"{field.name}: {value!r}")
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


def load_data(
    source: str,
    settings: RunSettings,
    split: Literal["train", "test", "all"],
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    labelled: bool = True,
) -> RunData:
    """Images or rows as a run's model takes them; images, where it has not been made yet, of this size and channels.

    Without labels nothing is asked of subfolders.
    """
    shape = settings.shape
    if is_table(source):
        return _load_table(source, settings, split, labelled)
    if shape is not None and len(shape) == 1:
        raise CommandError(
            f"{source}: expected a table of {shape[0]} columns, a .csv, .tsv, .npy or .npz file, as in the run"
        )
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


def _load_table(
    source: str, settings: RunSettings, split: Literal["train", "test", "all"], labelled: bool
) -> TableDataset:
    named = is_named(source)
    with mendable():
        found = fastvae.data.load_table(
            source,
            split=split,
            test_fraction=settings.test_fraction,
            seed=settings.seed,
            columns=settings.columns if named else None,
            label=None if not labelled else settings.label or "auto",
            condition=settings.condition or (),
            ignore=(settings.ignore or ()) if settings.columns is None else (),
            levels=settings.levels,
        )
        wanted = settings.shape
        columns, given = found.values.shape[1], 0 if found.condition is None else found.condition.shape[1]
        if wanted is not None and (wanted, settings.condition_dim) != ([columns], given):
            of_condition = (
                f" and a condition of {settings.condition_dim}" if settings.condition_dim or given else ""
            )
            raise CommandError(
                f"{source}: expected rows of {wanted}{of_condition} as in the run, found [{columns}]"
                + (f" and {given}" if of_condition else "")
            )
        if settings.mean is not None and settings.scale is not None:
            mean, scale = (torch.tensor(each, device="cpu") for each in (settings.mean, settings.scale))
            found = found.standardized(mean, scale)
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

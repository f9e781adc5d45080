"""Damaged files: checkpoints of a run, kept factors, a history, IDX and ``.npz`` images.

What a checksum covers is either refused or read as it was written; what was edited with the checksums put right may
read as something else, but is used or refused in our words. A refusal changes neither the model nor the other files.
"""

from __future__ import annotations

import copy
import functools
import gzip
import io
import json
import os
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.influence.cache import FactorCache
from fastvae.influence.factors import Factors
from fastvae.training import History, load_checkpoint

CASES = 150

_FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None
_EPOCHS = 3


def run_case(seed: int) -> str:
    draw = random.Random(seed)
    kinds = [damaged_run, damaged_run, edited_run, edited_run, repacked_run, factors, history, idx, npz]
    kind = draw.choice(kinds)
    with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
        return f"{kind.__name__}: {kind(draw, Path(folder))}"


# --- a run -------------------------------------------------------------------------------------


class Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, step: Any) -> Tensor:
        return step.loss * (self.count / 100)

    def step(self) -> None:
        self.count += 1

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = int(state)


def make(seed: int) -> fastvae.VAE:
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))
    return fastvae.VAE(encoder, nn.Linear(2, 4), penalties=[Annealed(), fastvae.penalties.BetaAnnealing(9)])


def train(folder: Path, seed: int, epochs: int = _EPOCHS) -> tuple[fastvae.VAE, History]:
    model = make(seed)
    return model, resume(model, folder, epochs)


def resume(model: fastvae.VAE, folder: Path, epochs: int) -> History:
    data = torch.rand(12, 4, generator=torch.Generator().manual_seed(1))
    loader = functools.partial(DataLoader, TensorDataset(data), batch_size=6)
    return fastvae.fit(
        model,
        loader(shuffle=True, generator=torch.Generator().manual_seed(2)),
        epochs=epochs,
        val_loader=loader(),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
        patience=9,
        run_dir=folder,
        progress=False,
    )


def state_of(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(model.state_dict())


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)

    return a.keys() == b.keys() and all(equal(value, b[name]) for name, value in a.items())


@functools.cache
def whole_run() -> tuple[dict[str, bytes], dict[str, Any], History]:
    """The files of a run, and its end."""
    with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
        model, history = train(Path(folder), 0)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}, state_of(model), history


@functools.cache
def loaded(name: str) -> tuple[float, dict[str, Any]]:
    """What a checkpoint of that run loads as."""
    files = whole_run()[0]
    with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
        path = Path(folder) / name
        path.write_bytes(files[name])
        model = make(1)
        return load_checkpoint(model, path), state_of(model)


def put_files(folder: Path) -> dict[str, bytes]:
    files = whole_run()[0]
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


def damage(draw: random.Random, data: bytes) -> bytes:
    """Other bytes, but for a stroke of luck."""
    kind = draw.choice(["flip", "flip", "flip", "cut", "append", "zeros", "noise", "insert", "remove"])
    at = draw.randrange(max(1, len(data)))
    some = bytes(draw.randrange(256) for _ in range(draw.choice([1, 2, 30])))
    changed = bytearray(data)
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 1, 3])):
            if data:
                changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "append":
        changed += draw.choice([some, data])
    elif kind == "zeros":
        changed[at : at + 50] = bytes(len(changed[at : at + 50]))
    elif kind == "noise":
        changed[at : at + len(some)] = some
    elif kind == "insert":
        changed[at:at] = some
    else:
        del changed[at : at + len(some)]
    return bytes(changed)


def damaged_run(draw: random.Random, folder: Path) -> str:
    """Damage of any kind but to ``epoch-0000.pt``: the run ends as it did."""
    files = put_files(folder)
    _, end, history = whole_run()
    names = [f"epoch-{number:04d}.pt" for number in draw.sample([1, 2, 3], draw.choice([1, 1, 2, 3]))]
    if len(names) > 1 and draw.random() < 0.3:
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            (folder / name).write_bytes(files[other])
    else:
        for name in names:
            path = folder / name
            path.write_bytes(damage(draw, files[name]))
            model = make(1)
            before = state_of(model)
            try:
                weight = load_checkpoint(model, path)
            except ValueError as error:
                assert str(path) in str(error), error
                assert same(state_of(model), before), "a refused checkpoint changed the model"
            else:
                assert (weight, True) == (loaded(name)[0], same(state_of(model), loaded(name)[1])), name
    if draw.random() < 0.1:
        (folder / names[0]).unlink()
        os.symlink("nowhere", folder / names[0])
    model, again = train(folder, 1)
    assert again.train_loss == history.train_loss and same(state_of(model), end), "another end"
    return "the same end"


# --- edits with the checksums put right --------------------------------------------------------


def tried(folder: Path, name: str) -> str:
    """Load it and train on from it; anything but our own errors is raised."""
    model = make(1)
    before = state_of(model)
    try:
        load_checkpoint(model, folder / name)
    except ValueError as error:
        assert str(folder / name) in str(error), error
        assert same(state_of(model), before), "a refused checkpoint changed the model"
    model = make(1)
    try:
        history = resume(model, folder, _EPOCHS + 1)
    except (ValueError, FloatingPointError) as error:
        if isinstance(error, ValueError):
            assert "fit: " in str(error) or str(folder) in str(error), error
            assert same(state_of(model), before), "a refused run changed the model"
        return f"refused, {type(error).__name__}"
    assert len(history.train_loss) == _EPOCHS + 1
    return "trained on"


def edited_run(draw: random.Random, folder: Path) -> str:
    """One value of the newest checkpoint is another."""
    put_files(folder)
    path = folder / f"epoch-{_EPOCHS:04d}.pt"
    content = torch.load(path, weights_only=True)
    for _ in range(draw.choice([1, 1, 2])):
        edit(draw, content)
    torch.save(content, path)
    return tried(folder, path.name)


def edit(draw: random.Random, tree: Any) -> None:
    """Go down at random and change an entry."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = draw.choice(keys)
        below = tree[key]
        if isinstance(below, (dict, list)) and below and draw.random() < 0.85:
            tree = below
            continue
        if draw.random() < 0.2:
            del tree[key]
        elif draw.random() < 0.1 and isinstance(tree, dict):
            tree[draw.choice(["more", 3, ""])] = below
        else:
            tree[key] = another(draw, below)
        return


def another(draw: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor) and draw.random() < 0.7:
        return draw.choice(
            [
                torch.cat([value, value]) if value.dim() else value.view(1),
                value[:0] if value.dim() else value.view(1, 1),
                value.to(torch.float64 if value.dtype == torch.float32 else torch.float32),
                torch.full_like(value, 3) if value.dtype == torch.uint8 else value * float("nan"),
                value.reshape(-1),
            ]
        )
    plain = [
        None,
        True,
        0,
        -1,
        7,
        2**70,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "text",
        "../x.pt",
        "/etc/passwd",
    ]
    return draw.choice([*plain, [], [None], {}, {"a": 1}, torch.zeros(2), torch.tensor(3), b"x", (1, 2)])


def repacked_run(draw: random.Random, folder: Path) -> str:
    """Bytes of one entry are others, and its checksum is right; or entries are missing, twice there, compressed."""
    put_files(folder)
    path = folder / f"epoch-{_EPOCHS:04d}.pt"
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    chosen = draw.choice(
        [index for index, (name, _) in enumerate(entries) if "data.pkl" in name] * 9 + [*range(9)]
    )
    name, data = entries[chosen]
    kind = draw.choice(["damage"] * 8 + ["missing", "twice", "compressed", "renamed"])
    if kind == "damage":
        entries[chosen] = name, damage(draw, data)
    elif kind == "missing":
        del entries[chosen]
    elif kind == "twice":
        entries.append((name, damage(draw, data)))
    elif kind == "renamed":
        entries[chosen] = draw.choice([name + "x", "data.pkl", "/", "../" + name]), data
    method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return tried(folder, path.name)


# --- other files -------------------------------------------------------------------------------


@functools.cache
def some_factors() -> Factors:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 1, 2), (3, 2, 4), (3, 1, 3), (3, 2, 2), (3, 5)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return Factors(drawn[:2], drawn[2:4], [True, False], drawn[4:])


def factors(draw: random.Random, folder: Path) -> str:
    """Kept factors come back as they were, or are computed anew."""
    cache, expected, computed = FactorCache(folder), some_factors(), 0

    def compute() -> Factors:
        nonlocal computed
        computed += 1
        return expected

    cache.get("key", compute)
    (path,) = folder.iterdir()
    path.write_bytes(damage(draw, path.read_bytes()))
    for _ in range(2):
        found = cache.get("key", compute)
        assert found.bias == expected.bias and same(found.tensors(), expected.tensors()), "other factors"
    assert computed <= 2, "computed again and again"
    return "computed anew" if computed == 2 else "read"


def history(draw: random.Random, folder: Path) -> str:
    """Whatever a history says, its checkpoints are in its folder."""
    path = folder / "history.json"
    data = whole_run()[0]["history.json"]
    if draw.random() < 0.5:
        path.write_bytes(damage(draw, data))
    else:
        values = json.loads(data)
        edit(draw, values)
        path.write_text(json.dumps(values, default=str))
    try:
        found = History.load(path)
        str(found)
    except ValueError as error:
        assert str(path) in str(error), error
        return "refused"
    assert all(checkpoint.resolve().is_relative_to(folder.resolve()) for checkpoint in found.checkpoints)
    return "read"


def read_images(folder: Path, expected: tuple[Tensor, Tensor | None] | None) -> str:
    """``expected``: of what has a checksum."""
    try:
        found = fastvae.data.load(folder, split="all")
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), error
        return "refused"
    if expected is not None:
        images, labels = expected
        assert torch.equal(found.images, images), "other images"
        assert labels is None or (found.labels is not None and torch.equal(found.labels, labels)), (
            "other labels"
        )
    return "read"


def pixels(draw: random.Random) -> np.ndarray[Any, Any]:
    shape = draw.choice([(6, 3, 4), (6, 1, 3, 4), (40, 28, 28)])
    return np.random.default_rng(draw.randrange(2**32)).integers(0, 256, shape, dtype=np.uint8)


def idx(draw: random.Random, folder: Path) -> str:
    images = pixels(draw)
    header = bytes((0, 0, 8, images.ndim)) + struct.pack(f">{images.ndim}I", *images.shape)
    data, packed = header + images.tobytes(), draw.random() < 0.6
    if draw.random() < 0.3:
        header = header[:4] + damage(draw, header[4:])
        data = header + images.tobytes()
        packed_data = gzip.compress(data, mtime=0) if packed else data
        expected = None
    else:
        packed_data = damage(draw, gzip.compress(data, mtime=0) if packed else data)
        tensor = torch.from_numpy(images)
        expected = (tensor if images.ndim == 4 else tensor[:, None], None) if packed else None
        if packed and packed_data[:2] != b"\x1f\x8b":
            expected = None
    (folder / f"images-idx{images.ndim}-ubyte{'.gz' if packed else ''}").write_bytes(packed_data)
    return read_images(folder, expected)


def npz(draw: random.Random, folder: Path) -> str:
    images = pixels(draw)
    labels = np.arange(len(images))
    tensor = torch.from_numpy(images)
    expected = (tensor if images.ndim == 4 else tensor[:, None], torch.from_numpy(labels))
    buffer = io.BytesIO()
    save: Callable[..., None] = draw.choice([np.savez, np.savez_compressed])
    save(buffer, images=images, labels=labels)
    path = folder / "set.npz"
    if draw.random() < 0.5:
        path.write_bytes(damage(draw, buffer.getvalue()))
        return read_images(folder, expected)
    with zipfile.ZipFile(buffer) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, damage(draw, data[:128]) + data[128:])
    return read_images(folder, None)

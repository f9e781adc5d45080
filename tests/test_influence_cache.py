"""The cache of TracIn's factors: what is read is what was kept, or it is computed anew."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvae.influence.cache import FactorCache
from fastvae.influence.factors import Factors

safetensors = pytest.importorskip("safetensors.torch")


def factors(seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Factors(
        [draw(4, 1, 3), draw(4, 5, 2)],
        [draw(4, 1, 2), draw(4, 5, 3)],
        [True, False],
        [draw(4, 7), draw(4, 2)],
    )


def equal(a: Factors, b: Factors) -> bool:
    of_a, of_b = a.tensors(), b.tensors()
    same = all(torch.equal(value, of_b[name]) for name, value in of_a.items())
    return of_a.keys() == of_b.keys() and a.bias == b.bias and same


def never() -> Factors:
    raise AssertionError("computed, though it is there")


@pytest.fixture
def cache(tmp_path: Path) -> FactorCache:
    found = FactorCache(tmp_path)
    found.get("key", factors)
    return found


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_what_was_kept_is_found(cache: FactorCache) -> None:
    assert equal(cache.get("key", never), factors())
    assert equal(cache.get("another key", lambda: factors(1)), factors(1))
    few = Factors([], [], [], [torch.ones(3, 2, dtype=torch.float64)])
    cache.get("few", lambda: few)
    assert equal(cache.get("few", never), few)


def test_damage_is_seen_and_mended(cache: FactorCache, tmp_path: Path) -> None:
    """A flipped bit anywhere, a file cut short, one appended to: never other factors."""
    path = only_file(tmp_path)
    good, expected = path.read_bytes(), factors()
    draw = random.Random(0)
    damages = [good[:cut] for cut in (0, 1, 7, 8, 100, len(good) - 1)] + [good + b"x", good + good]
    for _ in range(200):
        flipped = bytearray(good)
        flipped[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        damages.append(bytes(flipped))
    for damage in damages:
        path.write_bytes(damage)
        with pytest.warns(UserWarning, match="computing them anew"):
            assert equal(cache.get("key", factors), expected)
        assert equal(cache.get("key", never), expected)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """With another header and the same data: damage that is well-formed."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another bias": (lambda h: h["__metadata__"].update(bias="11"), "wrong checksum"),
    "fewer flags": (lambda h: h["__metadata__"].update(bias="1"), "tensors "),
    "other flags": (lambda h: h["__metadata__"].update(bias="1x"), "tensors "),
    "no checksum": (lambda h: h["__metadata__"].pop("sha256"), "no checksum"),
    "no metadata": (lambda h: h.pop("__metadata__"), "no checksum"),
    "another shape": (lambda h: h["inputs.0"].update(shape=[4, 3, 1]), "wrong checksum"),
    "another dtype": (lambda h: h["dense.0"].update(dtype="I32"), "wrong checksum"),
    "exchanged": (
        lambda h: h.update({"inputs.1": h["output_grads.1"], "output_grads.1": h["inputs.1"]}),
        "wrong checksum",
    ),
    "announces more": (lambda h: h["dense.1"].update(shape=[4, 2**40]), ""),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_header_is_seen(cache: FactorCache, tmp_path: Path, case: str) -> None:
    change, message = CHANGES[case]
    path = only_file(tmp_path)
    rewritten(path, change)
    with pytest.warns(UserWarning, match=rf"TracIn: cache_dir: .*{path.name}: expected factors .*{message}"):
        assert equal(cache.get("key", factors), factors())
    assert equal(cache.get("key", never), factors())


def test_a_file_under_the_name_of_another_is_seen(cache: FactorCache, tmp_path: Path) -> None:
    first = only_file(tmp_path)
    cache.get("another key", lambda: factors(1))
    (second,) = set(tmp_path.glob("*.safetensors")) - {first}
    shutil.copy(first, second)
    with pytest.warns(UserWarning, match="wrong checksum"):
        assert equal(cache.get("another key", lambda: factors(1)), factors(1))

"""TracIn over several processes, with a cache of factors, and as an outlier score."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from influence_problems import build, dense_vae, hamiltonian_vae, images, scaled, tracin, vae_gradients
from torch.utils.data import TensorDataset

import fastvae
from fastvae.influence import TracIn, engine
from fastvae.ood import SelfInfluence

SHARED = """
import dataclasses
import sys
sys.path[:0] = PATHS
import torch
import torch.distributed as dist
import fastvae.influence.tracin as module
from influence_problems import build, dense_vae, images, scaled, tracin

module._ON_CPU = dataclasses.replace(module._ON_CPU, rows=6)
rank, file, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if rank >= 0:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
group = dist.group.WORLD if rank >= 0 else None
model = build(dense_vae)
found = module.TracIn(model, images(9, 20), [0.5, 1.5], scaled, num_samples=3, process_group=group)
queries = images(4, 20, seed=2)
top = found.influence(queries, k=3)
results = [found.influence(queries), *top, found.self_influence(), *found.influence_with_error(queries)]
torch.save(results, f"{out}/{rank}.pt")
if rank >= 0:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    here, package = Path(__file__).parent, Path(fastvae.__file__).parents[1]
    code = SHARED.replace("PATHS", repr([str(here), str(package)]))
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(tmp_path)], env=environment)
        for rank in (0, 1, -1)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    alone = torch.load(tmp_path / "-1.pt")
    for rank in (0, 1):
        for found, expected in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            assert torch.equal(found, expected)


def test_a_destroyed_process_group_is_let_go(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = tracin(build(dense_vae), images(9, 20), process_group=dist.group.WORLD)
        assert found.influence(images(4, 20, seed=2)).shape == (4, 9)
        group = weakref.ref(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert group() is None  # its threads would else live until the interpreter is closed, and abort it then
    with pytest.raises(RuntimeError, match="TracIn: its process_group has been destroyed"):
        found.influence(images(4, 20, seed=2))


@pytest.mark.parametrize("make", [dense_vae, hamiltonian_vae], ids=lambda make: make.__name__)
def test_cached_factors_give_the_same_bits(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    x, queries = TensorDataset(images(9, 20)), images(4, 20, seed=2)

    def made(**options: Any) -> TracIn:
        return TracIn(build(make), x, [0.5, 2.0], scaled, num_samples=3, **options)

    expected = made().influence(queries)
    first = made(cache_dir=tmp_path)
    assert torch.equal(first.influence(queries), expected)
    files = sorted(tmp_path.iterdir())
    assert files and all(file.suffix == ".safetensors" for file in files)
    passes = []
    factors = engine.Engine.factors
    monkeypatch.setattr(
        engine.Engine, "factors", lambda *args, **kw: passes.append(len(args[2][0])) or factors(*args, **kw)
    )
    again = made(cache_dir=tmp_path)
    assert torch.equal(again.influence(queries), expected)
    assert sorted(tmp_path.iterdir()) == files and set(passes) == {4}, "only the queries were swept"
    other = made(cache_dir=tmp_path, seed=1)
    assert not torch.equal(other.influence(queries), expected)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    tracin(build(dense_vae), images(9, 20)).influence(images(2, 20), show_progress=True)
    assert "TracIn" in capsys.readouterr().err


def test_self_influence_as_an_outlier_score() -> None:
    model, x = build(dense_vae), images(5, 20)
    detector = SelfInfluence(model, num_samples=4)
    assert not detector.requires_fit and detector.fit([x]) is detector and detector.to("cpu") is detector
    g = vae_gradients(model, x, 4)
    expected = (g.sum(1).square().sum(1) - g.square().sum((1, 2))) / 12
    torch.testing.assert_close(detector(x), expected, rtol=1e-10, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    biased = SelfInfluence(model, num_samples=4, unbiased=False).predict(x)
    torch.testing.assert_close(biased, vae_gradients(model, x, 4).mean(1).square().sum(1), rtol=1e-10, atol=0)
    assert not torch.allclose(detector.predict(x), expected), "the weights of now"
    assert not biased.requires_grad


def test_foreign_images_have_higher_self_influence() -> None:
    torch.manual_seed(0)
    digits = fastvae.data.load("digits").tensors()[0].flatten(1)[:600]
    model = fastvae.VAE(
        torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)),
        torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 64)),
    )
    loader = torch.utils.data.DataLoader(digits, batch_size=50, shuffle=True)
    fastvae.fit(model, loader, epochs=10, progress=False)
    inside = SelfInfluence(model)(digits[:50])
    outside = SelfInfluence(model)(digits[:50].flip(1) * 0.5 + 0.5 * torch.rand(50, 64).round())
    assert float((outside[:, None] > inside).float().mean()) > 0.9

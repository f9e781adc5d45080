"""What torch and its neighbours do with a model: processes, compilers, formats, precisions."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interoperability_models import BUILDERS, build, data, gradients, noise_for
from torch import Tensor

import fastvae

each_model = pytest.mark.parametrize("name", BUILDERS)


# --- several processes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What tests/two_processes.py found in each of two processes under gloo."""
    folder = tmp_path_factory.mktemp("two")
    here, package = Path(__file__).parent, Path(fastvae.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}{os.pathsep}{package}"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(here / "two_processes.py"), str(rank), str(folder)], env=environment
        )
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@each_model
def test_data_parallel_gradients_are_those_of_one_process(two: list[dict[str, Any]], name: str) -> None:
    model = build(name)
    x = data(6)
    expected = gradients(model, model(x, noise=noise_for(model, x)))
    for process in two:
        # float32: the sums over six samples are two of three.
        torch.testing.assert_close(process["gradients"][name], expected, rtol=1e-5, atol=1e-6)


def test_what_stops_one_process_stops_both(two: list[dict[str, Any]]) -> None:
    for process in two:
        assert (
            "epoch-0001.pt: expected a run with the same clip_grad_norm (1.0), found None"
            in process["another run"]
        )
        assert process["held"].startswith("BlockingIOError") and "found it held by process" in process["held"]
        assert process["taken"].startswith("FileExistsError: fit: run_dir: expected no other file at")


def test_data_parallel_fit_resumes_exactly(two: list[dict[str, Any]]) -> None:
    whole = two[0]["whole"]
    for process in two:
        for history, weights in (process["whole"], process["parts"]):
            for key in ("train_loss", "val_loss", "learning_rate", "steps"):
                assert history[key] == whole[0][key]
            assert all(torch.equal(weights[key], value) for key, value in whole[1].items())
    history = whole[0]
    assert history["steps"] == [3, 6, 9]
    assert [Path(path).name for path in history["checkpoints"]] == [f"epoch-000{n}.pt" for n in (1, 2, 3)]


def test_what_is_not_finite_in_one_process_is_refused_in_all(two: list[dict[str, Any]]) -> None:
    skipped, weight, losses = two[0]["skipped"]
    assert skipped == [1, 1]
    assert two[1]["skipped"][0] == skipped and two[1]["skipped"][2] == losses
    assert torch.equal(two[1]["skipped"][1], weight) and bool(torch.isfinite(weight).all())
    assert "epoch 1, step 2 (step 2 of the run): on purpose" in two[1]["failure"]
    assert (
        "epoch 1, step 2 (step 2 of the run): trajectories of another process diverged" in two[0]["failure"]
    )


# --- compilers ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("VAE", "aot_eager"),
        ("HVAE with penalties", "aot_eager"),
        pytest.param("HVAE with penalties", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_training_step(name: str, backend: str) -> None:
    """One graph, compiled once for every batch size, with the gradients of the eager model."""
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for batch in (5, 3):
        x = data(batch)
        noise = noise_for(model, x)
        expected = model(x, noise=noise)
        with torch._dynamo.config.patch(error_on_recompile=batch != 5):
            actual = compiled(x, noise=noise)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradients(model, actual), gradients(model, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in BUILDERS), ("HVAE with penalties", True)]
)
def test_exported_training_forward(name: str, strict: bool) -> None:
    """torch.export with the noise as an input and any batch size; saved, loaded, and differentiated."""
    model = build(name)
    x = data(4)
    batch = torch.export.Dim("batch", min=2, max=100)
    exported = torch.export.export(
        model,
        (x,),
        {"noise": noise_for(model, x)},
        strict=strict,
        dynamic_shapes={"x": {0: batch}, "noise": {1: batch}},
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    other = data(7)
    noise = noise_for(model, other)
    for program in (exported, torch.export.load(file)):
        module: Any = program.module()
        actual, expected = module(other, noise=noise), model(other, noise=noise)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            gradients(module, actual), gradients(model, expected), rtol=1e-4, atol=1e-5
        )


# --- formats and precisions --------------------------------------------------------------------


def trained(name: str) -> fastvae.models.BaseVAE:
    """A model whose every parameter and buffer has moved from where it starts."""
    model = build(name)
    x = data(8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, noise=noise_for(model, x)).mean().backward()
        optimizer.step()
        fastvae.training.step_penalties(model)
    return model


@each_model
def test_every_way_to_save_and_copy(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = trained(name)
    x = data()
    noise = noise_for(model, x)
    expected = model(x, noise=noise)
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    torch.save(model, tmp_path / "whole.pt")
    copies = {
        "safetensors, state": build(name),
        "safetensors, model": build(name),
        "pickle": pickle.loads(pickle.dumps(model)),
        "deepcopy": copy.deepcopy(model),
        "torch.save": torch.load(tmp_path / "whole.pt", weights_only=False),
    }
    copies["safetensors, state"].load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    safetensors.load_model(copies["safetensors, model"], str(tmp_path / "model.safetensors"))
    for way, other in copies.items():
        assert torch.equal(other(x, noise=noise), expected), way
        assert other.elbo(x, generator=torch.Generator().manual_seed(3)).shape == (5,), way


@each_model
def test_autocast_trains(name: str) -> None:
    """The encoder runs in bfloat16 (8 bits), what fastvae computes in float32."""
    model = build(name)
    x = data()
    noise = noise_for(model, x)
    expected = gradients(model, model(x, noise=noise))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(x, noise=noise)
    assert losses.dtype == torch.float32
    got = gradients(model, losses)
    for key, gradient in got.items():
        assert gradient.dtype == torch.float32
        scale = max(float(expected[key].abs().max()), 1e-2)
        torch.testing.assert_close(
            gradient, expected[key], rtol=0, atol=0.1 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


@each_model
def test_double_precision(name: str) -> None:
    model = build(name).double()
    x: Tensor = data(dtype=torch.float64)
    losses = model(x, noise=noise_for(model, x))
    assert losses.dtype == torch.float64
    assert all(g.dtype == torch.float64 for g in gradients(model, losses).values())

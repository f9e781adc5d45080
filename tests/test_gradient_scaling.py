"""fit under autocast in float16: losses are scaled, overflows are skipped, and a scaler goes on with its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import ExponentialLR
from training_problems import TinyVAE, batches, make, quiet_fit, weights

import fastvae
from fastvae.training.checkpoints import read_checkpoint


class Loud(TinyVAE):
    """Of gradients so large that a scale of 2^127 has no room in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0**20 * super().forward(x)


def loud(seed: int = 0) -> Loud:
    torch.manual_seed(seed)
    return Loud()


def scaler(init_scale: float = 2.0**10, **options: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=init_scale, **{"growth_interval": 10**6, **options})


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_power_of_two_changes_nothing(clip: float | None) -> None:
    """In float32 such a scale is exact; clipping is by the norm of the gradients without it."""
    found = []
    for given in (None, scaler()):
        model = make()
        history = quiet_fit(model, batches(), epochs=2, clip_grad_norm=clip, grad_scaler=given)
        found.append((weights(model), history.train_loss))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_overflows_are_skipped_and_counted() -> None:
    """Until the scale is one at which float32 holds the gradients; then on as without one."""
    seen: list[tuple[int, Tensor]] = []

    class Steps(fastvae.training.Callback):
        def on_step(self, training: fastvae.training.Training) -> None:
            seen.append((training.steps, weights(training.model)))

    model, before = loud(), weights(loud())
    own = scaler(2.0**127, backoff_factor=2.0**-10)
    history = quiet_fit(
        model, batches(), epochs=2, grad_scaler=own, callbacks=[Steps()],
        scheduler=lambda optimizer: ExponentialLR(optimizer, 0.5), schedule_by="step",
    )  # fmt: skip
    skipped = history.skipped[0]
    assert 1 <= skipped < 6 and history.skipped[1] == 0 and own.get_scale() == 2.0 ** (127 - 10 * skipped)
    assert history.steps == [6 - skipped, 12 - skipped]
    # Rates are those of the steps that were taken.
    rates = [1e-3 * 0.5**step for step in range(6 - skipped)]
    assert history.learning_rate[0] == pytest.approx(sum(rates) / len(rates))
    assert seen[0][0] == 1 and not torch.equal(seen[0][1], before)
    assert "steps skipped" in str(history) and all(map(torch.isfinite, map(torch.tensor, history.train_loss)))


def test_an_epoch_of_overflows_alone() -> None:
    """As the first may be, with few batches: the weights stay, and the run goes on."""
    model, own = loud(), scaler(2.0**127, backoff_factor=0.25)
    loader = [next(iter(batches()))]
    history = quiet_fit(model, loader, epochs=1, grad_scaler=own)
    kept, start = (dict(each.named_parameters()) for each in (model, loud()))
    assert history.skipped == [1] and history.steps == [0]
    assert all(torch.equal(kept[name], start[name]) for name in start)


def test_killed_runs_go_on_with_their_scale(tmp_path: Path) -> None:
    """Scale and the steps since it last changed, at the end of an epoch and in its middle."""
    options: dict[str, Any] = {"init_scale": 2.0**127, "backoff_factor": 2.0**-10, "growth_interval": 4}
    whole, own = loud(), scaler(**options)
    expected = quiet_fit(whole, batches(), epochs=3, run_dir=tmp_path / "whole", grad_scaler=own)
    assert sum(expected.skipped) > 0
    for limits in ({"epochs": 1}, {"epochs": 3, "max_steps": 8}):
        folder = tmp_path / "-".join(limits)
        quiet_fit(loud(), batches(), run_dir=folder, grad_scaler=scaler(**options), **limits)
        model, again = loud(1), scaler(**{**options, "init_scale": 8.0})
        history = quiet_fit(model, batches(), epochs=3, run_dir=folder, grad_scaler=again)
        assert torch.equal(weights(model), weights(whole))
        assert again.state_dict() == own.state_dict()
        assert (history.steps, history.skipped) == (expected.steps, expected.skipped)


def test_float16_on_a_cpu(tmp_path: Path) -> None:
    """By itself, under autocast in float16 alone; the model learns."""
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            history = quiet_fit(make(), batches(), epochs=8, run_dir=tmp_path / str(dtype))
        state = read_checkpoint(history.checkpoints[-1])["state"]
        assert (state["grad_scaler"] is not None) == (dtype == torch.float16)
        assert history.train_loss[-1] < history.train_loss[0]
    with torch.autocast("cpu", torch.float16):
        history = quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path / "none", grad_scaler=None)
    assert read_checkpoint(history.checkpoints[-1])["state"]["grad_scaler"] is None


def test_small_gradients_survive_in_float16() -> None:
    """Of 1e-9 a product in float16 keeps nothing; scaled, what float32 has, to the digits of float16."""

    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1, bias=False)
            nn.init.ones_(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return 1e-9 * self.layer(x).float().square().sum(1)

    x = torch.linspace(0.5, 1.0, 16).reshape(4, 4)
    moved = {}
    for name, given in (("plain", None), ("scaled", scaler(2.0**24))):
        model = Faint()
        sgd = torch.optim.SGD(model.parameters(), 1e8)
        with torch.autocast("cpu", torch.float16):
            quiet_fit(model, [x], epochs=1, optimizer=sgd, grad_scaler=given)
        moved[name] = model.layer.weight.detach() - 1
    exact = Faint()
    quiet_fit(exact, [x], epochs=1, optimizer=torch.optim.SGD(exact.parameters(), 1e8))
    expected = exact.layer.weight.detach() - 1
    assert not moved["plain"].any() and expected.abs().min() > 0.1
    # eps of float16 is 1e-3; a few roundings.
    assert torch.allclose(moved["scaled"], expected, rtol=5e-3)


class Broken(nn.Module):
    """A finite loss whose gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1) * 0 + self.weight.square().sum().sqrt()


def test_what_no_scale_helps() -> None:
    own = scaler(4.0)
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 3 .*gradients of weight"):
        quiet_fit(Broken(), batches(), epochs=1, grad_scaler=own)
    own = scaler(4.0)
    history = quiet_fit(Broken(), batches(), epochs=1, grad_scaler=own, on_nonfinite="skip")
    assert history.skipped == [6] and history.steps == [0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"grad_scaler": True},
            TypeError,
            "grad_scaler: expected a torch.amp.GradScaler, .auto. or None, got bool",
        ),
        ({"grad_scaler": scaler(), "model": make().half()}, ValueError, "got float16 in encoder.0.weight"),
        (
            {"grad_scaler": scaler(), "cuda_graph": True},
            ValueError,
            "cuda_graph: expected gradients without a scale",
        ),
        (
            {"grad_scaler": scaler(), "optimizer": torch.optim.LBFGS},
            ValueError,
            "needs no closure, got LBFGS",
        ),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quiet_fit(**{"model": make(), "loader": batches(), "epochs": 1, **options})


def test_another_run(tmp_path: Path) -> None:
    quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path, grad_scaler=scaler())
    with pytest.raises(ValueError, match=r"expected a run with the same grad_scaler \(False\), found True"):
        quiet_fit(make(), batches(), epochs=2, run_dir=tmp_path)
    quiet_fit(make(), batches(), epochs=2, run_dir=tmp_path, grad_scaler=GradScaler("cpu", init_scale=8.0))

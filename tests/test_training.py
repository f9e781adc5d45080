"""fastvae.fit: training, early stopping, schedules, and what it refuses."""

from __future__ import annotations

import functools
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from training_problems import TinyVAE, batches, images, make, quiet_fit, weights

from fastvae.models import DivergenceError
from fastvae.training import History, fit, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_training_lowers_the_loss_and_fills_the_history(tmp_path: Path) -> None:
    model = make()
    history = quiet_fit(
        model,
        batches(),
        epochs=12,
        val_loader=batches(images(16, 1)),
        optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        run_dir=tmp_path,
    )
    assert history.train_loss[-1] < history.train_loss[0] - 0.5
    assert history.steps == list(range(6, 73, 6)) and history.skipped == [0] * 12
    assert history.learning_rate == pytest.approx([1e-2] * 12) and min(history.seconds) > 0
    assert history.stopped == "epochs" and history.best_epoch is not None
    assert history.val_loss[history.best_epoch - 1] == min(v for v in history.val_loss if v is not None)
    assert [path.name for path in history.checkpoints] == [f"epoch-{i:04d}.pt" for i in range(1, 13)]
    table = str(history)
    assert len(table.splitlines()) == 13 and "best" in table and f"{history.train_loss[0]:.4f}" in table
    assert History.load(tmp_path / "history.json") == history
    assert model.training


def test_global_generators_are_given_back() -> None:
    def states() -> tuple[Any, ...]:
        numpy_state: Any = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist()

    model, loader = make(), batches()
    before = states()
    quiet_fit(model, loader, epochs=2, val_loader=loader, binarize=True)
    assert states() == before


def test_seed_decides_order_and_noise() -> None:
    first, second, third = (quiet_fit(make(), batches(), epochs=2, seed=seed) for seed in (1, 1, 2))
    assert first.train_loss == second.train_loss != third.train_loss


def test_set_epoch_of_a_sampler_is_called() -> None:
    class Sampler:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.seen.append(epoch)

        def __iter__(self) -> Any:
            return iter(range(44))

        def __len__(self) -> int:
            return 44

    sampler = Sampler()
    quiet_fit(make(), batches(shuffle=False, sampler=sampler), epochs=3)
    assert sampler.seen == [1, 2, 3]


def test_validation_uses_eval_mode_and_fixed_noise() -> None:
    model = make()
    frozen = quiet_fit(
        model, batches(), epochs=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), val_loader=batches()
    )
    # The weights stand still, but BatchNorm's statistics move: without them the losses agree exactly.
    plain = make()
    plain.encoder = nn.Sequential(nn.Linear(6, 4))
    still = quiet_fit(
        plain, batches(), epochs=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), val_loader=batches()
    )
    assert still.val_loss[0] == still.val_loss[1] == still.val_loss[2]
    assert len(set(frozen.val_loss)) == 3


def test_early_stopping_restores_the_best(tmp_path: Path) -> None:
    data, other = images(16), 1 - images(16).round()

    def run(epochs: int, seed: int = 0) -> tuple[History, nn.Module]:
        model = make(seed)
        history = quiet_fit(
            model,
            batches(data.round(), batch_size=16),
            epochs=epochs,
            val_loader=batches(other, batch_size=16),
            optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
            patience=3,
            run_dir=tmp_path,
            checkpoint_every=4,
        )
        return history, model

    history, model = run(60)
    assert history.stopped == "patience" and history.best_epoch is not None
    assert len(history.train_loss) == history.best_epoch + 3 < 60
    assert [path.name for path in history.checkpoints][-1] == f"epoch-{len(history.train_loss):04d}.pt"
    best = quiet_fit(
        make(),
        batches(data.round(), batch_size=16),
        epochs=history.best_epoch,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
    )
    assert best.train_loss == history.train_loss[: history.best_epoch]
    reloaded, again = run(60, seed=1)
    assert reloaded == history and torch.equal(weights(again), weights(model))


def test_max_steps(tmp_path: Path) -> None:
    """6 steps an epoch: 9 steps end within the second, and a longer run is the uninterrupted one."""
    cut = quiet_fit(make(), batches(), epochs=9, max_steps=9, run_dir=tmp_path)
    assert cut.steps == [6, 9] and cut.stopped == "max_steps"
    assert [path.name for path in cut.checkpoints] == ["epoch-0001.pt", "step-00000009.pt"]
    assert load_checkpoint(make(), cut.checkpoints[1]) == pytest.approx(1e-3 * 3 / 6)
    further = quiet_fit(make(1), batches(), epochs=9, max_steps=12, resume=cut.checkpoints[1])
    assert further.train_loss == quiet_fit(make(), batches(), epochs=2).train_loss
    longer = quiet_fit(make(1), batches(), epochs=9, max_steps=12, run_dir=tmp_path)
    assert longer.train_loss == quiet_fit(make(), batches(), epochs=2).train_loss
    assert [path.name for path in longer.checkpoints] == ["epoch-0001.pt", "epoch-0002.pt"]
    shorter = quiet_fit(make(1), batches(), epochs=9, max_steps=6, run_dir=tmp_path)
    assert shorter.steps == [6]


def test_step_scheduler_and_plateau() -> None:
    def cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
        return OneCycleLR(optimizer, max_lr=0.1, total_steps=12)

    history = quiet_fit(
        make(),
        batches(),
        epochs=2,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        scheduler=cycle,
        schedule_by="step",
    )
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule, rates = cycle(optimizer), []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 12:
            schedule.step()
    assert history.learning_rate == pytest.approx([sum(rates[:6]) / 6, sum(rates[6:]) / 6])
    still = quiet_fit(
        make(),
        batches(),
        epochs=4,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-12),
        val_loader=batches(),
        scheduler=lambda o: ReduceLROnPlateau(o, patience=0, factor=0.1, threshold=10, threshold_mode="abs"),
    )
    assert still.learning_rate == pytest.approx([1e-12, 1e-12, 1e-13, 1e-14])


def test_optimizer_instance_and_clipping() -> None:
    model = make()
    before = weights(model.decoder)
    optimizer = torch.optim.SGD(model.decoder.parameters(), lr=1.0)
    quiet_fit(model, batches(batch_size=44), epochs=1, optimizer=optimizer, clip_grad_norm=1e-3)
    # One plain SGD step moves by lr times the clipped norm; torch divides by norm + 1e-6.
    assert float((weights(model.decoder) - before).norm()) == pytest.approx(1e-3, rel=1e-3)
    assert torch.equal(weights(model.encoder[0]), weights(make().encoder[0]))


class Exploding(TinyVAE):
    """The loss (or only its gradient) of chosen calls is not finite."""

    def __init__(self, calls: set[int], gradient_only: bool = False) -> None:
        super().__init__()
        self.calls, self.gradient_only, self.count = calls, gradient_only, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.count not in self.calls:
            return super().forward(x)
        if self.gradient_only:
            return super().forward(x) + (self.decoder.weight * 0).sum().sqrt()
        return super().forward(x * math.nan)


@pytest.mark.parametrize("gradient_only", [False, True])
def test_nonfinite_raises_before_it_reaches_the_weights(tmp_path: Path, gradient_only: bool) -> None:
    torch.manual_seed(0)
    model = Exploding({9}, gradient_only)
    which = "not finite: the gradients of decoder.weight; " if gradient_only else ""
    message = (
        rf"epoch 2, step 3 \(step 9 of the run\): loss .*, gradient norm nan; {which}last good .*-0001\.pt"
    )
    with pytest.raises(FloatingPointError, match=message):
        quiet_fit(model, batches(), epochs=3, run_dir=tmp_path)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    with pytest.warns(UserWarning, match=r"not with the same model \(TinyVAE\), found Exploding"):
        resumed = quiet_fit(make(1), batches(), epochs=3, run_dir=tmp_path, on_difference="warn")
    assert resumed.train_loss == quiet_fit(make(), batches(), epochs=3).train_loss


def test_nonfinite_skip_counts_and_goes_on() -> None:
    torch.manual_seed(0)
    model = Exploding({2, 9})
    history = quiet_fit(model, batches(), epochs=2, on_nonfinite="skip")
    assert history.skipped == [1, 1] and history.steps == [5, 10]
    assert bool(torch.isfinite(weights(model)).all()), "BatchNorm's statistics took part in a skipped step"
    assert "2 steps skipped" in str(history)
    with pytest.raises(FloatingPointError, match="all 6 steps of epoch 1 were skipped"):
        quiet_fit(Exploding(set(range(99))), batches(), epochs=1, on_nonfinite="skip")


@pytest.mark.parametrize("when", [True, False], ids=["training", "validation"])
def test_diverged_trajectories(when: bool) -> None:
    def diverge(module: nn.Module, arguments: Any) -> None:
        if module.training == when:
            raise DivergenceError("2 trajectories left the finite range")

    model = make()
    model.register_forward_pre_hook(diverge)
    run = functools.partial(quiet_fit, model, batches(), epochs=2, val_loader=batches())
    where = r"epoch 1, step 1 .*" if when else "epoch 1, validation"
    with pytest.raises(FloatingPointError, match=f"{where}: 2 trajectories left the finite range; last good"):
        run()
    if when:
        with pytest.raises(FloatingPointError, match="all 6 steps of epoch 1 were skipped"):
            run(on_nonfinite="skip")
    else:
        assert run(on_nonfinite="skip").val_loss == [math.inf, math.inf]


def test_weights_that_overflow_are_not_checkpointed(tmp_path: Path) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    # Finite loss and gradient, and yet the update overflows: as a far too large step does.
    def overflow(*_: Any) -> None:
        model.decoder.bias.data.fill_(math.inf)

    optimizer.register_step_post_hook(overflow)
    with pytest.raises(FloatingPointError, match=r"epoch 1: after its last step decoder\.bias is not finite"):
        quiet_fit(model, batches(batch_size=44), epochs=2, optimizer=optimizer, run_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["epoch-0000.pt"]


def test_nonfinite_validation() -> None:
    bad = [images(4) * math.nan]
    with pytest.raises(FloatingPointError, match="epoch 1, validation: loss nan"):
        quiet_fit(make(), batches(), epochs=2, val_loader=bad)
    history = quiet_fit(make(), batches(), epochs=2, val_loader=bad, on_nonfinite="skip")
    assert history.best_epoch is None and all(v is not None and math.isnan(v) for v in history.val_loss)


def test_batches_of_every_kind() -> None:
    x = images(8)
    for batch in (x, (x, 0), [x], {"data": x}):
        assert quiet_fit(make(), [batch], epochs=1).steps == [1]
    with pytest.raises(TypeError, match="images_of: batch"):
        quiet_fit(make(), [{"pixels": x}], epochs=1)


def test_empty_loaders() -> None:
    with pytest.raises(ValueError, match="loader: expected at least one batch, got none in epoch 1"):
        quiet_fit(make(), [], epochs=1)
    with pytest.raises(ValueError, match=r"got none in epoch 2 .*read only once"):
        quiet_fit(make(), iter([images(8)]), epochs=2)
    with pytest.raises(ValueError, match="val_loader: expected at least one batch"):
        quiet_fit(make(), batches(), epochs=1, val_loader=[])


def test_losses_must_be_one_a_sample() -> None:
    for wrong, found in ((lambda x: x.sum(), r"\[\]"), (lambda x: x, r"\[8, 6\]"), (lambda x: (x,), "tuple")):
        model = make()
        model.forward = wrong  # type: ignore[method-assign,assignment]
        with pytest.raises(
            ValueError, match=rf"model\(x\): expected the loss of each sample, \[8\], got {found}"
        ):
            quiet_fit(model, batches(), epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs: expected an int of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs: expected an int"),
        ({"patience": 2}, "patience: expected a val_loader"),
        ({"cuda_graph": True}, "cuda_graph: expected a model on a GPU, got one on cpu"),
        ({"max_steps": 0}, "max_steps"),
        ({"checkpoint_every": "batch"}, "checkpoint_every: expected .*'batch'"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"schedule_by": "batch"}, "schedule_by"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite"),
        ({"optimizer": lambda p: p}, "optimizer: expected a torch.optim.Optimizer, got list"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "holds none of them"),
        ({"scheduler": lambda o: o}, "scheduler: expected an LRScheduler .*got Adam"),
        (
            {"scheduler": StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 1)},
            "scheduler: expected an LRScheduler of the optimizer that fit uses",
        ),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"fit: .*{message}"):
        quiet_fit(make(), batches(), **{"epochs": 1, **arguments})


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="expected trainable parameters, got none"):
        quiet_fit(make().requires_grad_(False), batches(), epochs=1)


def test_progress_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fit(make(), batches(), epochs=1)
    assert capsys.readouterr().err == "", "no bar where nobody watches"
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit(make(), batches(), epochs=1)
    assert "6/6" in capsys.readouterr().err


def test_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert fit(make(), batches(), epochs=1).steps == [6]

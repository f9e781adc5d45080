"""A run that stops in the middle of an epoch goes on from there, and ends like one that went through."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable as Function
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, Dataset
from training_problems import Annealed, TinyVAE, batches, images, make, quiet_fit, weights

import fastvae
from fastvae.training import Callback, Training, load_checkpoint, save_checkpoint
from fastvae.training.checkpoints import read_checkpoint


class At(Callback):
    """Does something after a step, and counts the steps that it saw, in all and in this call of fit."""

    def __init__(self, step: int = 0, action: Function[[Training], object] | None = None) -> None:
        self.step, self.action, self.seen, self.here = step, action, 0, 0

    def on_step(self, training: Training) -> None:
        self.seen += 1
        self.here += 1
        if training.steps == self.step and self.action is not None:
            self.action(training)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def press(training: Training | None = None) -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def stop(training: Training) -> None:
    training.stop()


class Noisy(Dataset[Tensor]):
    """Transforms that draw from every global generator."""

    def __init__(self) -> None:
        self.x = images()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        noise = 0.01 * (random.random() + np.random.random() + float(torch.rand(())))
        return (self.x[index] * 0.9 + noise).clamp(0, 1)


def noisy() -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))


def run(folder: Path, callback: Callback | None = None, seed: int = 0, **options: Any) -> Any:
    model = make(seed, penalties=(Annealed(),))
    options = {"epochs": 4, "patience": 10, "binarize": True, **options}
    history = quiet_fit(
        model,
        noisy(),
        val_loader=batches(images(16, 1)),
        run_dir=folder,
        callbacks=[callback or At()],
        scheduler=lambda optimizer: ExponentialLR(optimizer, 0.97),
        schedule_by="step",
        **options,
    )
    return history, model


def weight_in_all(paths: list[Path]) -> float:
    return sum(load_checkpoint(make(penalties=(Annealed(),)), path) for path in paths)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("whole"))


def is_the_whole(found: Any, whole: Any, seen: int) -> None:
    (history, model), (expected, expected_model) = found, whole
    for name in ("train_loss", "val_loss", "learning_rate", "steps", "skipped", "best_epoch", "stopped"):
        assert getattr(history, name) == getattr(expected, name), name
    assert torch.equal(weights(model), weights(expected_model)) and seen == 24
    assert model.penalties[0].count == 24
    assert [path.name for path in history.checkpoints] == [path.name for path in expected.checkpoints]
    assert weight_in_all(history.checkpoints) == pytest.approx(weight_in_all(expected.checkpoints))
    assert not list(history.checkpoints[0].parent.glob("step-*"))


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 3, "keep_latest": True}], ids=["each", "third"])
@pytest.mark.parametrize("step", [1, 6, 9, 23])
def test_ctrl_c_costs_no_step(step: int, options: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    """In the first step, the last of an epoch, the middle of one, and the last but one."""
    with pytest.raises(KeyboardInterrupt, match=f"step-{step:08d}.pt holds the run"):
        run(tmp_path, At(step, press), **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    known = fastvae.History.load(tmp_path / "history.json")
    # Whole epochs; the checkpoint counts for TracIn by what it stands for.
    assert len(known.steps) == (step - 1) // 6 and known.checkpoints[-1].name == f"step-{step:08d}.pt"
    taken = At()
    found = run(tmp_path, taken, seed=1, **options)
    assert taken.here == 24 - step
    if not options:
        is_the_whole(found, whole, taken.seen)
    else:
        assert [path.name for path in found[0].checkpoints] == ["epoch-0003.pt", "epoch-0004.pt"]
        assert found[0].train_loss == whole[0].train_loss and taken.seen == 24
        assert weight_in_all(found[0].checkpoints) == pytest.approx(weight_in_all(whole[0].checkpoints))


def test_again_and_again(whole: Any, tmp_path: Path) -> None:
    for step in (2, 3, 8, 9, 19):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, At(step, press), seed=step - 2)
    taken = At()
    is_the_whole(run(tmp_path, taken, seed=1), whole, taken.seen)
    assert taken.here == 5


@pytest.mark.parametrize("training", [True, False])
def test_ctrl_c_anywhere(training: bool, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step, and of a validation."""
    calls = 0
    forward = TinyVAE.forward

    def interrupted(model: TinyVAE, x: Tensor) -> Tensor:
        nonlocal calls
        calls += model.training is training
        if calls == 4:
            press()
        return forward(model, x)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TinyVAE, "forward", interrupted)
        run(tmp_path)
    assert (tmp_path / f"step-{4 if training else 12:08d}.pt").exists()
    taken = At()
    is_the_whole(run(tmp_path, taken, seed=1), whole, taken.seen)


@pytest.mark.parametrize("options", [{"max_steps": 9}, {}])
def test_what_stops_on_purpose_goes_on(options: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    history, _ = run(tmp_path, At(9, None if options else stop), **options)
    assert history.steps == [6, 9] and history.val_loss[1] is not None
    again, _ = run(tmp_path, At(), seed=1, **options)
    if options:  # the same call again: the same end
        assert again.steps == [6, 9] and again.train_loss == history.train_loss
    run(tmp_path / "other", At(9, None if options else stop), **options)
    taken = At()
    is_the_whole(run(tmp_path / "other", taken, seed=1), whole, taken.seen)
    assert taken.here == 15


def test_the_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def twice(module: nn.Module, arguments: Any) -> None:
        if module.training:
            press()
            press()
            pytest.fail("went on")

    model = make()
    model.register_forward_pre_hook(twice)
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(model, batches(), epochs=1, run_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["epoch-0000.pt"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_after_the_last_step_is_heard(tmp_path: Path) -> None:
    class Last(Callback):
        def on_end(self, training: Training) -> None:
            press()

    with pytest.raises(KeyboardInterrupt, match="had come to its end"):
        quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path, callbacks=[Last()])
    assert (tmp_path / "epoch-0001.pt").exists()


def test_whoever_handles_ctrl_c_goes_on_to(tmp_path: Path) -> None:
    """Handlers of others, other threads, and runs without checkpoints."""
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path / "a", callbacks=[At(2, press)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
    errors: list[BaseException] = []

    def train() -> None:
        try:
            quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path / "b")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors
    for options in ({}, {"run_dir": tmp_path / "c", "checkpoint_every": "never"}):
        taken = At(2, press)
        with pytest.raises(KeyboardInterrupt):
            quiet_fit(make(), batches(), epochs=1, callbacks=[taken], **options)
        assert taken.seen == 2
    assert not list((tmp_path / "c").glob("*.pt"))


def test_workers_that_end_on_ctrl_c(tmp_path: Path) -> None:
    """They get it from a terminal, too; a loader without its workers raises."""

    class Workers:
        def __init__(self, good: int) -> None:
            self.good = good

        def __iter__(self) -> Iterator[Tensor]:
            for number, batch in enumerate(images().split(8)):
                if number == self.good:
                    press()
                    raise RuntimeError("DataLoader worker exited unexpectedly")
                yield batch

    with pytest.raises(KeyboardInterrupt, match="step-00000002"):
        quiet_fit(make(), Workers(2), epochs=1, run_dir=tmp_path)
    found = quiet_fit(make(1), Workers(9), epochs=1, run_dir=tmp_path)
    assert found.train_loss == quiet_fit(make(), Workers(9), epochs=1).train_loss
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(make(), Workers(4), epochs=1, run_dir=tmp_path / "b")
    with pytest.raises(ValueError, match=r"expected the 4 batches that epoch 1 had .* got 1"):
        quiet_fit(make(), images()[:8].split(8), epochs=1, run_dir=tmp_path / "b", on_difference="warn")


def change(path: Path, **entries: Any) -> None:
    content = read_checkpoint(path)
    content["state"]["part"] |= entries
    torch.save(content, path)


@pytest.mark.parametrize(
    "entries",
    [
        {"batches": -1},
        {"batches": 2.0},
        {"rates": [1]},
        {"rates": []},
        {"random": []},
        {"random": [[torch.zeros(3), None, [3, [1], None], ["MT19937", torch.zeros(2), 1, 0, 0.0]]]},
        {"random": [["x"]]},
        {"more": 1},
    ],
)
def test_damaged_ones_are_passed_over(entries: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(make(), batches(), epochs=2, run_dir=tmp_path, callbacks=[At(8, press)])
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    change(tmp_path / "step-00000008.pt", **entries)
    with pytest.warns(UserWarning, match=r"step-00000008\.pt: .* going back to the checkpoint before it"):
        found = quiet_fit(make(1), batches(), epochs=2, run_dir=tmp_path, callbacks=[At()])
    assert found.train_loss == quiet_fit(make(), batches(), epochs=2).train_loss
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[1]


def test_weights_alone_are_passed_over(tmp_path: Path) -> None:
    """As earlier versions left them, or anybody else."""
    whole = quiet_fit(make(), batches(), epochs=2)
    quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path)
    save_checkpoint(make(5), tmp_path / "step-00000009.pt")
    assert quiet_fit(make(1), batches(), epochs=2, run_dir=tmp_path).train_loss == whole.train_loss
    assert (tmp_path / "step-00000009.pt").exists()

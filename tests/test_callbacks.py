"""Callbacks of fit, early stopping as one of them, data sets in place of loaders, and checkpoints that are replaced."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from training_problems import batches, images, make, quiet_fit, weights

import fastvae
from fastvae.training import Callback, EarlyStopping, History, Training, load_checkpoint


class Recorder(Callback):
    """What is called when, with what it sees."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_start(self, training: Training) -> None:
        self.calls.append(("start", training.epoch, training.steps))

    def on_step(self, training: Training) -> None:
        assert math.isfinite(training.loss) and training.is_first_process
        self.calls.append(("step", training.epoch, training.steps))

    def on_epoch(self, training: Training) -> None:
        assert len(training.history.train_loss) == training.epoch
        self.calls.append(("epoch", training.epoch, training.steps))

    def on_end(self, training: Training) -> None:
        self.calls.append(("end", training.epoch, training.steps))


class Counter(Callback):
    """With a state."""

    def __init__(self) -> None:
        self.steps = 0
        self.sum = torch.zeros(())

    def on_step(self, training: Training) -> None:
        self.steps += 1
        self.sum = self.sum + training.loss

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sum": self.sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.sum = state["steps"], state["sum"]


class StopAt(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step(self, training: Training) -> None:
        if training.steps == self.steps:
            training.stop()


class KilledError(Exception):
    pass


class KillAt(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step(self, training: Training) -> None:
        if training.steps == self.steps:
            raise KilledError


def test_when_callbacks_are_called() -> None:
    recorder = Recorder()
    quiet_fit(make(), [images(4), images(4)], epochs=2, callbacks=[recorder])
    assert recorder.calls == [
        ("start", 0, 0),
        ("step", 0, 1),
        ("step", 0, 2),
        ("epoch", 1, 2),
        ("step", 1, 3),
        ("step", 1, 4),
        ("epoch", 2, 4),
        ("end", 2, 4),
    ]


def test_callbacks_change_nothing_by_themselves() -> None:
    plain, watched = make(), make()
    quiet_fit(plain, batches(), epochs=2)
    quiet_fit(watched, batches(), epochs=2, callbacks=[Recorder(), Counter()])
    assert torch.equal(weights(plain), weights(watched))


def test_a_callback_stops_the_run(tmp_path: Path) -> None:
    history = quiet_fit(make(), batches(), epochs=5, run_dir=tmp_path, callbacks=[StopAt(8)])
    assert history.stopped == "callback" and history.steps == [6, 8]
    assert history.checkpoints[-1].name == "step-00000008.pt"
    # At the end of an epoch, which is then whole.
    history = quiet_fit(make(), batches(), epochs=5, callbacks=[StopAt(6)])
    assert history.stopped == "callback" and history.steps == [6]
    with pytest.raises(ValueError, match="reason: expected"):
        quiet_fit(make(), batches(), epochs=1, callbacks=[BadReason()])


class BadReason(Callback):
    def on_start(self, training: Training) -> None:
        training.stop("bored")


def test_their_states_go_on_where_they_were(tmp_path: Path) -> None:
    whole = Counter()
    model = make()
    quiet_fit(model, batches(), epochs=4, callbacks=[whole])
    with pytest.raises(KilledError):
        quiet_fit(make(), batches(), epochs=4, run_dir=tmp_path, callbacks=[Counter(), KillAt(15)])
    again, resumed = Counter(), make()
    quiet_fit(resumed, batches(), epochs=4, run_dir=tmp_path, callbacks=[Recorder(), again])
    assert again.steps == whole.steps and torch.equal(again.sum, whole.sum)
    assert torch.equal(weights(model), weights(resumed))
    with pytest.raises(ValueError, match=r"epoch-0004\.pt: expected a run with a callback Counter"):
        quiet_fit(make(), batches(), epochs=5, run_dir=tmp_path)


def test_a_state_that_no_checkpoint_holds(tmp_path: Path) -> None:
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"path": tmp_path}

    with pytest.raises(TypeError, match="expected states of tensors, numbers"):
        quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path, callbacks=[Odd()])


def test_early_stopping_is_patience(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 60, "val_loader": [images(8, seed=5)], "optimizer": sgd}
    by_patience, by_callback = make(), make()
    first = quiet_fit(by_patience, batches(), patience=3, **options)
    second = quiet_fit(by_callback, batches(), callbacks=[EarlyStopping(3)], **options)
    assert first.stopped == second.stopped == "patience"
    assert first.train_loss == second.train_loss
    assert torch.equal(weights(by_patience), weights(by_callback))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3)


def test_early_stopping_resumes_and_does_not_train_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 60, "val_loader": [images(8, seed=5)], "optimizer": sgd}
    whole, resumed = make(), make()
    first = quiet_fit(whole, batches(), callbacks=[EarlyStopping(3)], **options)
    with pytest.raises(KilledError):
        stop = [EarlyStopping(3), KillAt(first.steps[-1] - 2)]
        quiet_fit(make(), batches(), run_dir=tmp_path, callbacks=stop, **options)
    second = quiet_fit(resumed, batches(), run_dir=tmp_path, callbacks=[EarlyStopping(3)], **options)
    assert second.stopped == "patience" and second.train_loss == first.train_loss
    assert torch.equal(weights(whole), weights(resumed))
    third = quiet_fit(make(), batches(), run_dir=tmp_path, callbacks=[EarlyStopping(3)], **options)
    assert third.trained_epochs == 0 and third.stopped == "patience"


def test_min_delta_and_weights_that_stay() -> None:
    history = History(val_loss=[3.0, 2.0, 1.95, 1.8, 1.75])
    assert EarlyStopping(1).best_epoch(history) == 5
    assert EarlyStopping(1, min_delta=0.1).best_epoch(history) == 4
    assert EarlyStopping(1, min_delta=0.5).best_epoch(history) == 2
    assert EarlyStopping(1).best_epoch(History(val_loss=[math.nan])) == 0
    options: dict[str, Any] = {"val_loader": [images(8, seed=5)], "optimizer": sgd}
    best, last, plain = make(), make(), make()
    stopped = quiet_fit(best, batches(), epochs=60, patience=3, **options)
    keep = EarlyStopping(3, restore_best=False)
    quiet_fit(last, batches(), epochs=60, callbacks=[keep], **options)
    quiet_fit(plain, batches(), epochs=len(stopped.steps), **options)
    assert torch.equal(weights(last), weights(plain))
    assert not torch.equal(weights(last), weights(best))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EarlyStopping(0), "patience: expected an int of at least 1, got 0"),
        (lambda: EarlyStopping(1, min_delta=-1), "min_delta"),
        (lambda: quiet_fit(make(), batches(), epochs=1, callbacks=[EarlyStopping(1)]), "val_loader"),
        (
            lambda: quiet_fit(
                make(), batches(), epochs=1, patience=1, val_loader=batches(), callbacks=[EarlyStopping(1)]
            ),
            "expected one EarlyStopping",
        ),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_callbacks_are_of_their_class() -> None:
    with pytest.raises(
        TypeError, match=r"callbacks: expected fastvae\.training\.Callback objects, got function"
    ):
        quiet_fit(make(), batches(), epochs=1, callbacks=[lambda training: None])


class Odd(Callback):
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (images(), {"batch_size": 4}, r"the samples themselves \(Tensor\); pass torch"),
        ("pictures", {"batch_size": 4}, r"got a path; pass fastvae\.data\.load\('pictures'\)"),
        (Path("pictures"), {}, "got a path"),
        (None, {}, "loader: expected a data set or an iterable of batches, got NoneType"),
        (batches(), {"callbacks": Callback()}, "callbacks: expected a list .* got Callback by itself"),
        (batches(), {"callbacks": None}, "callbacks: expected a list .* got NoneType"),
        (batches(), {"optimizer": "adam"}, r"optimizer: expected .* such as torch\.optim\.Adam, got str"),
        (batches(), {"callbacks": [Odd(3)]}, r"callbacks: Odd\.state_dict: expected a dict, got int"),
        (
            batches(),
            {"callbacks": [Odd({"f": lambda: 0})]},
            r"epoch-0000\.pt: expected states of tensors, .* got others",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(
    given: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make()
    before = weights(model)
    with pytest.raises(TypeError, match=message):
        quiet_fit(model, given, epochs=1, run_dir=tmp_path / "run", **options)
    assert torch.equal(weights(model), before) and not list(tmp_path.rglob("*.pt"))
    with pytest.raises(TypeError, match="model: expected a torch module, got str"):
        quiet_fit("model", batches(), epochs=1)


def test_latest_checkpoints_replace_each_other(tmp_path: Path) -> None:
    """Weights of TracIn, files and weights are those of a run that was never killed."""
    options: dict[str, Any] = {"checkpoint_every": 3, "keep_latest": True}
    model = make()
    history = quiet_fit(model, batches(), epochs=7, run_dir=tmp_path / "whole", **options)
    names = ["epoch-0000.pt", "epoch-0003.pt", "epoch-0006.pt", "epoch-0007.pt"]
    assert sorted(path.name for path in (tmp_path / "whole").glob("*.pt")) == names
    assert [path.name for path in history.checkpoints] == names[1:]
    for kill, newest in ((31, "epoch-0005.pt"), (39, "epoch-0006.pt")):
        folder = tmp_path / f"killed at {kill}"
        with pytest.raises(KilledError):
            quiet_fit(make(), batches(), epochs=7, run_dir=folder, callbacks=[KillAt(kill)], **options)
        assert max(path.name for path in folder.glob("*.pt")) == newest
        resumed = make()
        again = quiet_fit(resumed, batches(), epochs=7, run_dir=folder, **options)
        assert sorted(path.name for path in folder.glob("*.pt")) == names
        assert torch.equal(weights(model), weights(resumed))
        parts = [[load_checkpoint(make(), path) for path in h.checkpoints] for h in (history, again)]
        # 1e-3 an epoch, with what rounding leaves of a sum of three.
        assert parts[0] == pytest.approx([3e-3, 3e-3, 1e-3]) and parts[1] == pytest.approx(parts[0])


def test_data_sets() -> None:
    data = TensorDataset(images(40), torch.arange(40))
    by_loader, by_data = make(), make()
    quiet_fit(by_loader, DataLoader(data, 8, shuffle=True), epochs=2, val_loader=DataLoader(data, 8))
    history = quiet_fit(by_data, data, batch_size=8, epochs=2, val_loader=data)
    assert history.steps == [5, 10]
    assert torch.equal(weights(by_loader), weights(by_data))
    assert quiet_fit(make(), data, epochs=1).steps == [1], "128 unless told otherwise"
    with pytest.raises(ValueError, match="batch_size: expected a Dataset to make batches of, got list"):
        quiet_fit(make(), [images(4)], batch_size=8, epochs=1)
    with pytest.raises(ValueError, match="batch_size: expected an int of at least 1, got 0"):
        quiet_fit(make(), data, batch_size=0, epochs=1)
    with pytest.raises(ValueError, match="loader: expected at least one sample, got an empty TensorDataset"):
        quiet_fit(make(), TensorDataset(images(40)[:0]), epochs=1)
    for samples in (images(4), images(4).numpy()):
        with pytest.raises(TypeError, match=r"loader: expected a data set .* fastvae\.data\.load\(x\)"):
            quiet_fit(make(), samples, epochs=1)


def test_autocast_around_fit(tmp_path: Path) -> None:
    """The encoder runs in bfloat16; weights and losses stay float32, and a run that goes on does so likewise."""
    torch.manual_seed(0)
    model = fastvae.VAE(*fastvae.architectures.image_networks((1, 8, 8), 2, width=2))
    seen: list[torch.dtype] = []
    model.encoder[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    x = torch.rand(8, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        history = quiet_fit(model, [x], epochs=3, val_loader=[x], run_dir=tmp_path)
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.train_loss[-1] < history.train_loss[0]
    with pytest.raises(ValueError, match=r"the same autocast \('off'\), found 'torch.bfloat16'"):
        quiet_fit(model, [x], epochs=4, val_loader=[x], run_dir=tmp_path)

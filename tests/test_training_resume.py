"""fastvae.fit: checkpoints, and exact resume from them (SIGKILL included)."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR, StepLR
from torch.utils.data import DataLoader
from training_problems import Annealed, batches, images, make, quiet_fit, weights

from fastvae.training import History, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_history_moves_with_its_folder(tmp_path: Path) -> None:
    history = quiet_fit(make(), batches(), epochs=2, run_dir=tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = History.load(tmp_path / "b" / "history.json")
    assert moved.checkpoints == [tmp_path / "b" / path.name for path in history.checkpoints]
    (tmp_path / "bad.json").write_text(json.dumps({"train_loss": []}))
    with pytest.raises(ValueError, match=r"bad\.json: expected a History"):
        History.load(tmp_path / "bad.json")


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "lbfgs": functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_run_equals_uninterrupted_one(tmp_path: Path, name: str) -> None:
    """Bit for bit: the same operations on the same numbers, so the tolerance is zero."""

    def run(folder: str, epochs: int) -> tuple[History, nn.Module]:
        # A different start each time: what counts must come from the checkpoint.
        model = make(seed=run_seeds.pop(), penalties=(Annealed(),))
        generator = torch.Generator().manual_seed(11)
        history = quiet_fit(
            model,
            batches(generator=generator),
            epochs=epochs,
            optimizer=OPTIMIZERS[name],
            scheduler=lambda optimizer: MultiStepLR(optimizer, [2, 3], gamma=0.5),
            val_loader=batches(images(16, 1)),
            run_dir=tmp_path / folder,
            binarize=True,
            clip_grad_norm=1.0,
            patience=10,
        )
        return history, model

    run_seeds = [9, 8, 0, 0]
    whole, whole_model = run("whole", 5)
    run("parts", 2)
    run("parts", 4)
    parts, parts_model = run("parts", 5)
    assert parts.train_loss == whole.train_loss and parts.val_loss == whole.val_loss
    assert parts.learning_rate == whole.learning_rate and parts.steps == whole.steps
    assert torch.equal(weights(parts_model), weights(whole_model))
    assert parts_model.penalties[0].count == whole_model.penalties[0].count == 30  # type: ignore[index,union-attr]
    loaded = [load_checkpoint(make(penalties=(Annealed(),)), run.checkpoints[2]) for run in (parts, whole)]
    assert loaded[0] == loaded[1]


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from training_problems import batches, images, make, quiet_fit
    model = make()
    count = 0
    def count_and_die(module, arguments):
        global count
        count += module.training
        if count == {fatal_step}:
            os.kill(os.getpid(), signal.SIGKILL)
    model.register_forward_pre_hook(count_and_die)
    quiet_fit(model, batches(), epochs=4, run_dir={folder!r}, val_loader=batches(images(16, 1)))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("fatal_step", [3, 15, 24])
def test_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path, fatal_step: int) -> None:
    """SIGKILL in the first epoch, in the third, and in the last step; the second start has other weights."""
    here, folder = str(Path(__file__).parent), str(tmp_path / "run")
    script = textwrap.dedent(KILLED.format(tests=here, folder=folder, fatal_step=fatal_step))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    last_whole_epoch = (fatal_step - 1) // 6
    assert {path.name for path in Path(folder).glob("*.pt")} == {
        f"epoch-{number:04d}.pt" for number in range(last_whole_epoch + 1)
    }
    run = functools.partial(quiet_fit, epochs=4, val_loader=batches(images(16, 1)))
    resumed_model, whole_model = make(1), make()
    resumed = run(resumed_model, batches(), run_dir=folder)
    whole = run(whole_model, batches())
    assert resumed.train_loss == whole.train_loss and resumed.val_loss == whole.val_loss
    assert torch.equal(weights(resumed_model), weights(whole_model))


def test_kill_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path)

    def die(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        quiet_fit(make(), batches(), epochs=2, run_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-0000.pt",
        "epoch-0001.pt",
        "history.json",
    ]
    # What a SIGKILL at that moment leaves behind is not taken for a checkpoint.
    (tmp_path / ".epoch-0002.pt.tmp").write_bytes(b"half")
    resumed = quiet_fit(make(1), batches(), epochs=2, run_dir=tmp_path)
    assert resumed.train_loss == quiet_fit(make(), batches(), epochs=2).train_loss


def test_keyboard_interrupt_leaves_a_checkpoint(tmp_path: Path) -> None:
    model = make()
    calls = 0

    def interrupt(module: nn.Module, arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    model.decoder.eval()
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(model, batches(), epochs=4, run_dir=tmp_path)
    assert model.training and not model.decoder.training
    hook.remove()
    assert len(History.load(tmp_path / "history.json").train_loss) == 2
    resumed = quiet_fit(model, batches(), epochs=4, run_dir=tmp_path)
    assert resumed.train_loss == quiet_fit(make(), batches(), epochs=4).train_loss


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit flip", "foreign"])
def test_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    history = quiet_fit(make(), batches(), epochs=3, run_dir=tmp_path)
    newest = tmp_path / "epoch-0003.pt"
    data = bytearray(newest.read_bytes())
    if damage == "bit flip":
        weight = make()
        load_checkpoint(weight, newest)
        data[data.find(weight.decoder.weight.detach().numpy().tobytes())] ^= 1
    cut = len(data) * 2 // 3
    contents = {
        "truncated": bytes(data[:cut]),
        "empty": b"",
        "bit flip": bytes(data),
        "foreign": b"text" * 99,
    }
    newest.write_bytes(contents[damage])
    with pytest.raises(
        ValueError, match=r"epoch-0003\.pt: expected a checkpoint, found a damaged or foreign"
    ):
        load_checkpoint(make(), newest)
    with pytest.warns(UserWarning, match=r"epoch-0003\.pt.*going back to the checkpoint before it"):
        resumed = quiet_fit(make(1), batches(), epochs=3, run_dir=tmp_path)
    assert resumed.train_loss == history.train_loss
    assert load_checkpoint(make(), newest) == pytest.approx(1e-3)


def test_all_checkpoints_damaged(tmp_path: Path) -> None:
    (tmp_path / "epoch-0001.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="going back"), pytest.raises(ValueError, match="found none in"):
        quiet_fit(make(), batches(), epochs=3, run_dir=tmp_path)


def test_resume_choices(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="resume=True"):
        quiet_fit(make(), batches(), epochs=2, run_dir=tmp_path / "run", resume=True)
    with pytest.raises(FileNotFoundError, match=r"resume=True.*None"):
        quiet_fit(make(), batches(), epochs=2, resume=True)
    quiet_fit(make(), batches(), epochs=3, run_dir=tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"expected no checkpoints in .*epoch-0000.pt"):
        quiet_fit(make(), batches(), epochs=2, run_dir=tmp_path / "run", resume=False)
    straight = quiet_fit(make(), batches(), epochs=4)
    second = tmp_path / "run" / "epoch-0002.pt"
    with pytest.raises(FileExistsError, match=r"no checkpoints after epoch 2 .*epoch-0003.pt"):
        quiet_fit(make(1), batches(), epochs=4, run_dir=tmp_path / "run", resume=second)
    branch = quiet_fit(make(1), batches(), epochs=4, run_dir=tmp_path / "branch", resume=second)
    assert branch.train_loss == straight.train_loss
    # The run takes its checkpoints along: what a history names is in its folder.
    assert [path.name for path in branch.checkpoints] == [f"epoch-000{n}.pt" for n in (1, 2, 3, 4)]
    assert all(path.is_file() and path.parent == tmp_path / "branch" for path in branch.checkpoints)
    assert branch.checkpoints[1].read_bytes() == second.read_bytes()
    assert History.load(tmp_path / "branch" / "history.json") == branch
    unsaved = quiet_fit(make(1), batches(), epochs=4, resume=tmp_path / "run" / "epoch-0000.pt")
    assert unsaved.train_loss == straight.train_loss and unsaved.checkpoints == []
    # A finished run started again does nothing but load; a shorter one stops where it was asked to.
    again = make(1)
    assert quiet_fit(again, batches(), epochs=4, run_dir=tmp_path / "branch", resume=True) == branch
    shorter = quiet_fit(make(1), batches(), epochs=3, run_dir=tmp_path / "branch")
    assert shorter.train_loss == straight.train_loss[:3]


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path)
    again = functools.partial(quiet_fit, make(), batches(), epochs=2, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"epoch-0001\.pt: expected a run with the same seed \(5\), found 0"):
        again(seed=5)
    with pytest.raises(ValueError, match=r"same optimizer \(RMSprop\), found Adam"):
        again(optimizer=torch.optim.RMSprop)
    with pytest.raises(ValueError, match="same use of a scheduler"):
        again(scheduler=lambda optimizer: StepLR(optimizer, 1))
    with pytest.raises(ValueError, match="same number of loader generators"):
        quiet_fit(make(), batches(generator=torch.Generator()), epochs=2, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"epoch-0001\.pt: .* the same optimizer.params \(2\), found 8"):
        again(optimizer=torch.optim.Adam(list(again.args[0].parameters())[:2]))
    other = nn.Linear(6, 1)
    with pytest.raises(ValueError, match=r"epoch-0001\.pt: expected the weights of this model"):
        load_checkpoint(other, tmp_path / "epoch-0001.pt")
    save_checkpoint(make(), tmp_path / "epoch-0002.pt")
    with pytest.raises(ValueError, match=r"epoch-0002\.pt: expected a checkpoint that fit goes on from"):
        again()
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: expected a file of format"):
        load_checkpoint(other, tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(other, tmp_path / "missing.pt")


def test_noise_from_numpy_python_and_workers_is_resumed(tmp_path: Path) -> None:
    run = functools.partial(quiet_fit, run_dir=tmp_path / "parts")

    def loader() -> DataLoader[Any]:
        return batches(num_workers=2, collate_fn=noisy_collate)

    run(make(), loader(), epochs=1)
    parts = run(make(1), loader(), epochs=2)
    assert parts.train_loss == quiet_fit(make(), loader(), epochs=2).train_loss


def noisy_collate(samples: list[tuple[Tensor]]) -> Tensor:
    x = torch.stack([sample[0] for sample in samples])
    return (x + 0.01 * torch.rand_like(x) + 0.01 * random.random() + 0.01 * float(np.random.rand())).clamp(
        0, 1
    )


def test_patience_cannot_start_in_the_middle(tmp_path: Path) -> None:
    run = functools.partial(quiet_fit, make(), batches(), val_loader=batches(), run_dir=tmp_path)
    run(epochs=1)
    with pytest.raises(ValueError, match="expected a run with patience"):
        run(epochs=2, patience=2)


@pytest.mark.parametrize(
    ("every", "names"), [("epoch", [1, 2, 3, 4, 5]), (2, [2, 4, 5]), ("never", []), (None, [])]
)
def test_checkpoint_interval_and_weights(tmp_path: Path, every: Any, names: list[int]) -> None:
    history = quiet_fit(
        make(),
        batches(),
        epochs=5,
        run_dir=tmp_path,
        checkpoint_every=every,
        scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.5),
    )
    assert [path.name for path in history.checkpoints] == [f"epoch-{n:04d}.pt" for n in names]
    assert (tmp_path / "history.json").is_file() and (tmp_path / "epoch-0000.pt").is_file() == bool(names)
    rates = [1e-3 * 0.5**n for n in range(5)]
    assert history.learning_rate == pytest.approx(rates)
    previous = 0
    for number, path in zip(names, history.checkpoints, strict=True):
        assert load_checkpoint(make(), path) == pytest.approx(sum(rates[previous:number]))
        previous = number


def test_checkpoint_holds_plain_data_and_loads_strictly(tmp_path: Path) -> None:
    model = make(penalties=(Annealed(),))
    history = quiet_fit(model, batches(), epochs=1, run_dir=tmp_path)
    content = torch.load(history.checkpoints[0], weights_only=True)
    assert content["state"]["steps"] == 6 and content["optimizer"]["state"]
    fresh = make(1, penalties=(Annealed(),))
    assert load_checkpoint(fresh, history.checkpoints[0]) == pytest.approx(1e-3)
    assert torch.equal(weights(fresh), weights(model)) and fresh.penalties[0].count == 6
    compiled = torch.compile(make(2, penalties=(Annealed(),)), backend="eager")
    load_checkpoint(compiled, history.checkpoints[0])  # type: ignore[arg-type]
    assert torch.equal(compiled.decoder.weight, model.decoder.weight)  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"epoch-0001\.pt: expected a model with 0 annealed penalties, found 1"
    ):
        load_checkpoint(make(), history.checkpoints[0])
    with pytest.raises(TypeError, match=r"expected states of tensors.*Annealed"):
        save_checkpoint(model, tmp_path / "odd.pt", state={"odd": Annealed()})
    assert not list(tmp_path.glob("*odd*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_resume_on_cuda(tmp_path: Path) -> None:
    whole = quiet_fit(make(), batches(), epochs=3, device="cuda")
    quiet_fit(make(), batches(), epochs=1, device="cuda", run_dir=tmp_path)
    parts = quiet_fit(make(1), batches(), epochs=3, device="cuda", run_dir=tmp_path)
    assert parts.train_loss == whole.train_loss

"""fastvae.fit: exact resume (SIGKILL included), checkpoints, early stopping, and what it refuses."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from fastvae.models import DivergenceError
from fastvae.training import History, fit, load_checkpoint, save_checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TinyVAE(nn.Module):
    """The model contract in twenty lines: noise from the global generator, BatchNorm, annealed penalty."""

    def __init__(self, penalties: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
        self.decoder = nn.Linear(2, 6)
        self.penalties = penalties

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        fit_term = functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(1)
        loss = fit_term + 0.5 * (mu**2 + logvar.exp() - logvar - 1).sum(1)
        for penalty in self.penalties:
            loss = loss + penalty.weight() * mu.abs().sum(1)
        result: Tensor = loss
        return result


class Annealed:
    def __init__(self) -> None:
        self.count = 0

    def weight(self) -> float:
        return min(self.count / 10, 1.0)

    def step(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def images(count: int = 44, seed: int = 0) -> Tensor:
    return torch.rand(count, 6, generator=torch.Generator().manual_seed(seed))


def make(seed: int = 0, **kwargs: Any) -> TinyVAE:
    torch.manual_seed(seed)
    return TinyVAE(**kwargs)


def batches(data: Tensor | None = None, **kwargs: Any) -> DataLoader[Any]:
    kwargs = {"batch_size": 8, "shuffle": True, **kwargs}
    return DataLoader(TensorDataset(images() if data is None else data), **kwargs)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


quiet_fit = functools.partial(fit, progress=False)


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
    from test_training import batches, images, make, quiet_fit
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
    assert branch.checkpoints[:3] == [
        tmp_path / "run/epoch-0001.pt",
        second,
        tmp_path / "branch/epoch-0003.pt",
    ]
    assert all(path.is_file() for path in branch.checkpoints)
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
    with pytest.raises(ValueError, match=r"epoch-0001\.pt: expected this optimizer's state"):
        again(optimizer=torch.optim.Adam(list(again.args[0].parameters())[:2]))
    other = nn.Linear(6, 1)
    with pytest.raises(ValueError, match=r"epoch-0001\.pt: expected the weights of this model"):
        load_checkpoint(other, tmp_path / "epoch-0001.pt")
    save_checkpoint(make(), tmp_path / "epoch-0002.pt")
    with pytest.raises(ValueError, match=r"epoch-0002\.pt: expected the checkpoint of an epoch's end"):
        again()
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: expected a file of format"):
        load_checkpoint(other, tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(other, tmp_path / "missing.pt")


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


def test_patience_cannot_start_in_the_middle(tmp_path: Path) -> None:
    run = functools.partial(quiet_fit, make(), batches(), val_loader=batches(), run_dir=tmp_path)
    run(epochs=1)
    with pytest.raises(ValueError, match="expected a run with patience"):
        run(epochs=2, patience=2)


def test_max_steps(tmp_path: Path) -> None:
    """6 steps an epoch: 9 steps end within the second, and a longer run is the uninterrupted one."""
    cut = quiet_fit(make(), batches(), epochs=9, max_steps=9, run_dir=tmp_path)
    assert cut.steps == [6, 9] and cut.stopped == "max_steps"
    assert [path.name for path in cut.checkpoints] == ["epoch-0001.pt", "step-00000009.pt"]
    assert load_checkpoint(make(), cut.checkpoints[1]) == pytest.approx(1e-3 * 3 / 6)
    with pytest.raises(ValueError, match="expected the checkpoint of an epoch's end"):
        quiet_fit(make(), batches(), epochs=9, resume=cut.checkpoints[1])
    longer = quiet_fit(make(1), batches(), epochs=9, max_steps=12, run_dir=tmp_path)
    assert longer.train_loss == quiet_fit(make(), batches(), epochs=2).train_loss
    assert [path.name for path in longer.checkpoints] == ["epoch-0001.pt", "epoch-0002.pt"]
    shorter = quiet_fit(make(1), batches(), epochs=9, max_steps=6, run_dir=tmp_path)
    assert shorter.steps == [6]


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
    message = r"epoch 2, step 3 \(step 9 of the run\): loss .*, gradient norm nan; last good .*epoch-0001\.pt"
    with pytest.raises(FloatingPointError, match=message):
        quiet_fit(model, batches(), epochs=3, run_dir=tmp_path)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    resumed = quiet_fit(make(1), batches(), epochs=3, run_dir=tmp_path)
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
    tqdm = pytest.importorskip("tqdm")
    forced = functools.partial(tqdm.tqdm)
    monkeypatch.setattr(tqdm, "tqdm", lambda **kwargs: forced(**{**kwargs, "disable": False}))
    fit(make(), batches(), epochs=1)
    assert "6/6" in capsys.readouterr().err


def test_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *arguments: Any) -> Any:
        if name == "tqdm":
            raise ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    assert fit(make(), batches(), epochs=1).steps == [6]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_resume_on_cuda(tmp_path: Path) -> None:
    whole = quiet_fit(make(), batches(), epochs=3, device="cuda")
    quiet_fit(make(), batches(), epochs=1, device="cuda", run_dir=tmp_path)
    parts = quiet_fit(make(1), batches(), epochs=3, device="cuda", run_dir=tmp_path)
    assert parts.train_loss == whole.train_loss

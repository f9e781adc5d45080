"""fastvae.fit: a run that is started again is the same run, or the difference is named."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Subset, TensorDataset
from training_problems import batches, images, make, quiet_fit, weights

import fastvae
from fastvae.penalties import JacobianL1
from fastvae.training import load_checkpoint
from fastvae.training.definition import fingerprint_of_data

pytestmark = pytest.mark.usefixtures("one_thread")


def vae(activation: nn.Module | None = None, width: int = 8, **options: Any) -> fastvae.VAE:
    torch.manual_seed(0)
    activation = nn.LeakyReLU(0.1) if activation is None else activation
    encoder = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4))
    decoder = nn.Sequential(nn.Linear(2, width), activation, nn.Linear(width, 6))
    return fastvae.VAE(encoder, decoder, **options)


class Plain(nn.Module):
    """The activation is a function, and the count changes."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.activation = activation
        self.slope = 0.5
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.activation(self.layer(x)) * self.slope - x).square().sum(1)


SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "beta": ({"model": vae(beta=4.0)}, "model.beta (4.0), found 1.0"),
    "activation": ({"model": vae(nn.Tanh())}, "model.decoder.1 (Tanh), found LeakyReLU"),
    "slope": ({"model": vae(nn.LeakyReLU(0.2))}, "model.decoder.1.negative_slope (0.2), found 0.1"),
    "width": (
        {"model": vae(width=9)},
        "model.encoder.0.weight ([9, 6] torch.float32), found [8, 6] torch.float32",
    ),
    "dtype": (
        {"model": vae().double()},
        "model.encoder.0.weight ([8, 6] torch.float64), found [8, 6] torch.float32",
    ),
    "likelihood": (
        {"model": vae(likelihood="gaussian")},
        "model.likelihood (Gaussian(scale=1.0)), found Bernoulli(probs=False)",
    ),
    "kind": ({"model": fastvae.IWAE(vae().encoder, vae().decoder)}, "model (IWAE), found VAE"),
    "penalty": ({"model": vae(penalties=[JacobianL1()])}, "model.penalties.0 (JacobianL1), found nothing"),
    "learning rate": (
        {"optimizer": functools.partial(SGD, lr=0.02)},
        "optimizer.lr (0.02), found 0.01",
    ),
    "momentum": ({"optimizer": functools.partial(SGD, momentum=0.5)}, "optimizer.momentum (0.5), found 0.9"),
    "data": ({"loader": batches(images(44, 1))}, "loader.data ("),
    "less data": ({"loader": batches(images(36))}, "loader.length (5), found 6; the same loader.data ("),
    "batch size": ({"loader": batches(batch_size=11)}, "loader.batch_size (11), found 8"),
    "order": (
        {"loader": batches(shuffle=False)},
        "loader.sampler ('SequentialSampler'), found 'RandomSampler'",
    ),
    "held-out data": ({"val_loader": batches(images(16, 2))}, "val_loader.data ("),
    "seed": ({"seed": 5}, "seed (5), found 0"),
    "clipping": ({"clip_grad_norm": 1.0}, "clip_grad_norm (1.0), found None"),
    "binarize": ({"binarize": True}, "binarize (True), found False"),
}


def start(folder: Path, **changes: Any) -> fastvae.training.History:
    arguments = {"model": vae(), "loader": batches(), "val_loader": batches(images(16, 1)), "optimizer": SGD}
    return quiet_fit(run_dir=folder, **{"epochs": 1, **arguments, **changes})


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("epochs", [1, 2], ids=["complete", "goes on"])
def test_a_difference_is_named(tmp_path: Path, case: str, epochs: int) -> None:
    changes, message = DIFFERENT[case]
    first = start(tmp_path)
    model = changes.get("model", vae())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"epoch-0001\.pt: expected a run with the same ") as caught:
        start(tmp_path, **{"model": model, **changes, "epochs": epochs})
    assert f"the same {message}" in str(caught.value) and 'on_difference="warn"' in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # The run that it was goes on as if nothing had happened.
    assert start(tmp_path).train_loss == first.train_loss


def test_going_on_all_the_same(tmp_path: Path) -> None:
    start(tmp_path / "run")
    model = vae(beta=0.0)
    with pytest.warns(
        UserWarning, match=r"model\.beta \(0\.0\), found 1\.0; the same optimizer\.lr \(0\.1\)"
    ):
        history = start(
            tmp_path / "run",
            model=model,
            optimizer=functools.partial(SGD, lr=0.1),
            epochs=3,
            on_difference="warn",
        )
    assert history.learning_rate == pytest.approx([0.01, 0.1, 0.1])

    # By hand: an epoch at one beta and rate, then two at the others, momentum kept.
    other, parts = vae(), [batches(), batches(images(16, 1))]
    optimizer = SGD(list(other.parameters()))
    quiet_fit(
        other, parts[0], epochs=1, optimizer=optimizer, val_loader=parts[1], run_dir=tmp_path / "by hand"
    )
    other.beta, optimizer.param_groups[0]["lr"] = 0.0, 0.1
    with pytest.warns(UserWarning, match=r"optimizer\.lr"):
        by_hand = quiet_fit(
            other, parts[0], epochs=3, optimizer=optimizer, val_loader=parts[1], run_dir=tmp_path / "by hand",
            on_difference="warn",
        )  # fmt: skip
    assert history.train_loss == by_hand.train_loss and torch.equal(weights(model), weights(other))
    # From then on this is the run.
    assert start(
        tmp_path / "run", model=vae(beta=0.0), optimizer=functools.partial(SGD, lr=0.1), epochs=3
    ).train_loss == history.train_loss  # fmt: skip
    with pytest.raises(ValueError, match="on_difference: expected one of"):
        start(tmp_path, on_difference="ignore")


def test_a_scheduler_that_differs(tmp_path: Path) -> None:
    def run(gamma: float, lr: float = 0.1, epochs: int = 2, **options: Any) -> fastvae.training.History:
        scheduler = functools.partial(StepLR, step_size=1, gamma=gamma)
        optimizer = functools.partial(torch.optim.SGD, lr=lr)
        return quiet_fit(
            make(),
            batches(),
            epochs=epochs,
            optimizer=optimizer,
            scheduler=scheduler,
            run_dir=tmp_path,
            **options,
        )

    run(0.5)
    with pytest.raises(ValueError, match=r"the same scheduler\.gamma \(0\.25\), found 0\.5"):
        run(0.25)
    with pytest.raises(ValueError, match=r"the same optimizer\.lr \(0\.2\), found 0\.1"):
        run(0.5, lr=0.2)
    with pytest.warns(UserWarning, match=r"scheduler\.gamma"):
        history = run(0.25, lr=0.2, epochs=4, on_difference="warn")
    assert history.learning_rate == pytest.approx([0.1, 0.05, 0.025, 0.0125])


@pytest.mark.parametrize(
    "scheduler", [functools.partial(StepLR, step_size=1), functools.partial(ReduceLROnPlateau, patience=0)]
)
def test_the_same_objects_go_on(tmp_path: Path, scheduler: Any) -> None:
    """In a notebook: model, optimiser and scheduler are those that have been trained already, counters moved on."""
    model = Plain()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    made, loader = scheduler(optimizer), batches()
    for epochs in (1, 2, 3):
        history = quiet_fit(
            model, loader, epochs=epochs, optimizer=optimizer, scheduler=made, run_dir=tmp_path
        )
        model(images())
    fresh = functools.partial(torch.optim.Adam, lr=0.5)
    again = quiet_fit(Plain(), batches(), epochs=3, optimizer=fresh, scheduler=scheduler, run_dir=tmp_path)
    assert again == history
    with pytest.raises(ValueError, match=r"the same optimizer\.lr \(0\.25\), found 0\.5"):
        fresh = functools.partial(torch.optim.Adam, lr=0.25)
        quiet_fit(Plain(), batches(), epochs=3, optimizer=fresh, scheduler=scheduler, run_dir=tmp_path)


def test_a_lazy_model_and_a_run_cut_short_in_its_first_epoch(tmp_path: Path) -> None:
    """The latent dimension is found at the first batch; nothing but the start was written."""
    model = vae()
    stop = model.register_forward_pre_hook(stop_at(3))
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, model=model)
    stop.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0000.pt"]
    assert start(tmp_path, model=model).steps == [6]


def stop_at(count: int) -> Callable[..., None]:
    calls = iter(range(1, count + 1))

    def hook(module: nn.Module, arguments: Any) -> None:
        if next(calls) == count:
            raise KeyboardInterrupt

    return hook


def test_functions_and_attributes_of_own_modules(tmp_path: Path) -> None:
    quiet_fit(Plain(), batches(), epochs=1, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"the same model\.activation \(\S*relu\), found \S*tanh"):
        quiet_fit(Plain(functional.relu), batches(), epochs=1, run_dir=tmp_path)
    model = Plain()
    model.slope = 0.25
    with pytest.raises(ValueError, match=r"the same model\.slope \(0\.25\), found 0\.5"):
        quiet_fit(model, batches(), epochs=1, run_dir=tmp_path)
    model = Plain()
    model.layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"the same optimizer\.params \(1\), found 2"):
        quiet_fit(model, batches(), epochs=1, run_dir=tmp_path)


def test_a_run_that_was_complete_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = functools.partial(start, tmp_path, progress=True)
    first = run(epochs=2)
    assert first.trained_epochs == 2 and "complete before" not in str(first) + capsys.readouterr().err
    again = run(epochs=2)
    assert again == first and again.trained_epochs == 0
    assert "complete before this call, which trained nothing" in str(again)
    assert re.search(
        r"fit: complete before, after 2 epochs and 12 steps \(.*epoch-0002\.pt\): nothing was trained",
        capsys.readouterr().err,
    )
    assert run(epochs=3).trained_epochs == 1
    loaded = fastvae.training.History.load(tmp_path / "history.json")
    assert loaded.trained_epochs is None and "complete before" not in str(loaded)


def test_a_checkpoint_without_a_definition_is_taken(tmp_path: Path) -> None:
    """As versions wrote it that did not keep one."""
    history = start(tmp_path)
    content = torch.load(tmp_path / "epoch-0001.pt", weights_only=True)
    del content["state"]["definition"]
    torch.save(content, tmp_path / "epoch-0001.pt")
    assert start(tmp_path, model=vae(beta=2.0)) == history
    assert load_checkpoint(vae(), tmp_path / "epoch-0001.pt") == 0.01
    with pytest.raises(ValueError, match=r"the same seed \(3\), found 0"):
        start(tmp_path, seed=3)
    # What goes on is kept with a definition again.
    start(tmp_path, epochs=2)
    with pytest.raises(ValueError, match=r"the same model\.beta \(2\.0\), found 1\.0"):
        start(tmp_path, model=vae(beta=2.0), epochs=3)


def test_data_are_looked_at_and_not_drawn_from() -> None:
    class Counting(TensorDataset):
        drawn = 0

        def __getitem__(self, index: int) -> Any:
            Counting.drawn += 1
            return super().__getitem__(index)

    x = images(50)
    changed = x.clone()
    changed[17, 3] += 1
    labels = torch.arange(50)
    kinds: dict[str, Callable[[Tensor], Any]] = {
        "data set": lambda x: DataLoader(Counting(x, labels)),
        "tensor": lambda x: DataLoader(x),  # type: ignore[arg-type]
        "list of batches": lambda x: list(x.split(8)),
        "batches of pairs": lambda x: [(part, part) for part in x.split(8)],
        "mappings": lambda x: [{"data": part} for part in x.split(8)],
        "part": lambda x: DataLoader(Subset(TensorDataset(x), range(3, 30))),
        "array": lambda x: DataLoader(TensorDatasetOf(x.numpy())),
        "half": lambda x: list(x.bfloat16().split(8)),
        "byte": lambda x: DataLoader(fastvae.data.ImageDataset((x * 255).byte().view(-1, 1, 2, 3))),
    }
    for name, kind in kinds.items():
        found = fingerprint_of_data(kind(x))
        assert found is not None and found == fingerprint_of_data(kind(x.clone())), name
        assert found != fingerprint_of_data(kind(changed)), name
    part = fingerprint_of_data(DataLoader(Subset(TensorDataset(x), range(3, 30))))
    assert part != fingerprint_of_data(DataLoader(Subset(TensorDataset(x), range(4, 31))))
    assert Counting.drawn == 0
    assert fingerprint_of_data(iter([x])) is None and fingerprint_of_data(range(3)) is None
    assert fingerprint_of_data([torch.zeros(0, 3), torch.tensor(1.0)]) is not None


class TensorDatasetOf(torch.utils.data.Dataset[Any]):
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)


def test_large_data_are_looked_at_in_rows() -> None:
    x = torch.zeros(3_000, 6_000)
    found = fingerprint_of_data([x])
    x[0, 0] = 1
    assert found != fingerprint_of_data([x])

"""fastvae.fit: the optimiser's state in a checkpoint is one to go on from, or the file is passed over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_problems import batches, make, quiet_fit, weights

from fastvae.training import History

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIM: Any = torch.optim
EVERY: dict[str, Make] = {
    name: getattr(OPTIM, name)
    for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam")
}
EVERY |= {
    "AMSGrad": functools.partial(OPTIM.Adam, amsgrad=True, foreach=True),
    "a rate in a tensor": functools.partial(OPTIM.Adam, lr=torch.tensor(0.25), foreach=False),
    "fused": functools.partial(OPTIM.Adam, fused=True),
    "LBFGS": functools.partial(OPTIM.LBFGS, lr=0.1, max_iter=3, history_size=2),
    "strong Wolfe": functools.partial(OPTIM.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
    "RMSprop": functools.partial(OPTIM.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "Rprop": functools.partial(OPTIM.Rprop, lr=1e-3),
    "SGD": functools.partial(OPTIM.SGD, lr=0.01),
    "Nesterov": functools.partial(OPTIM.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "Muon": lambda parameters: OPTIM.Muon([p for p in parameters if p.dim() == 2]),
    "two groups": lambda parameters: OPTIM.SGD(
        [{"params": parameters[:2], "momentum": 0.5}, {"params": parameters[2:], "dampening": 0.1}], lr=0.01
    ),
}


def run(folder: Path, epochs: int, seed: int = 0, **options: Any) -> tuple[History, Tensor]:
    model = make(seed).double()
    history = quiet_fit(model, double_batches(), epochs=epochs, run_dir=folder, **options)
    return history, weights(model)


def double_batches() -> Any:
    return batches(torch.rand(44, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_goes_on_from_its_state(tmp_path: Path, name: str, recwarn: Any) -> None:
    """Bit for bit, and no whole checkpoint is taken for damaged."""
    whole, end = run(tmp_path / "whole", 3, optimizer=EVERY[name])
    run(tmp_path / "parts", 2, optimizer=EVERY[name])
    parts, same_end = run(tmp_path / "parts", 3, seed=1, optimizer=EVERY[name])
    assert parts.trained_epochs == 1 and parts.train_loss == whole.train_loss and torch.equal(end, same_end)
    assert not [warning for warning in recwarn if "going back" in str(warning.message)]


SCHEDULERS: dict[str, Callable[[Any], LRScheduler]] = {
    "momentum too": lambda o: OneCycleLR(o, 0.1, total_steps=9),
    "cyclic momentum": lambda o: CyclicLR(o, 1e-4, 1e-2, step_size_up=2, cycle_momentum=True),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5),
    "in turn": lambda o: SequentialLR(o, [StepLR(o, 1), ExponentialLR(o, 0.5)], milestones=[1]),
    "a function": lambda o: LambdaLR(o, lambda epoch: 1.0 / (1 + epoch)),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 1, 2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("optimizer", [OPTIM.Adam, EVERY["Nesterov"]], ids=["betas", "momentum"])
def test_what_schedulers_change_is_no_damage(
    tmp_path: Path, name: str, optimizer: Make, recwarn: Any
) -> None:
    options = {"optimizer": optimizer, "scheduler": SCHEDULERS[name]}
    whole, end = run(tmp_path / "whole", 4, **options)
    run(tmp_path / "parts", 3, **options)
    parts, same_end = run(tmp_path / "parts", 4, seed=1, **options)
    assert parts.trained_epochs == 1 and parts.train_loss == whole.train_loss and torch.equal(end, same_end)
    assert not [warning for warning in recwarn if "going back" in str(warning.message)]


class Own(torch.optim.Optimizer):
    """Keeps what it likes: state of no parameter, hyperparameters that become None or appear later."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01, "warm": 1.0, "waiting": False})
        self.state["all"] = {"steps": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["all"]["steps"] += 1
        for values in self.param_groups:
            values.update(warm=None, waiting=self.state["all"]["steps"], later="text")
            for parameter in values["params"]:
                rate = values["lr"] / self.state["all"]["steps"]
                parameter.sub_(rate * parameter.grad)


class OwnAdam(OPTIM.Adam):
    pass


@pytest.mark.parametrize("kind", [Own, OwnAdam])
def test_an_optimizer_of_ones_own_goes_on_from_whatever_it_keeps(
    tmp_path: Path, kind: Make, recwarn: Any
) -> None:
    whole, end = run(tmp_path / "whole", 3, optimizer=kind)
    run(tmp_path / "parts", 2, optimizer=kind)
    parts, same_end = run(tmp_path / "parts", 3, seed=1, optimizer=kind)
    assert parts.trained_epochs == 1 and parts.train_loss == whole.train_loss and torch.equal(end, same_end)
    assert not [warning for warning in recwarn if "going back" in str(warning.message)]


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def group(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["optimizer"]["param_groups"][0].update(values)


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["optimizer"]["param_groups"][0].pop(key)


def state(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["optimizer"]["state"][0].update(values)


def of_all(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: [values.pop(key) for values in content["optimizer"]["state"].values()]


def schedule(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["state"]["scheduler"].update(values)


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a flag for GPUs": group(capturable=True),
    "another flag": group(maximize=True),
    "a tensor for a flag": group(amsgrad=torch.tensor(3)),
    "a tensor of two for a flag": group(amsgrad=torch.zeros(2)),
    "no betas": group(betas=None),
    "one beta": group(betas=(0.9,)),
    "three betas": group(betas=(0.9, 0.9, 0.9)),
    "betas of text": group(betas=("a", "b")),
    "another eps": group(eps=7),
    "no eps": without("eps"),
    "no rate": without("lr"),
    "a rate that is a flag": group(lr=True),
    "no first rate": without("initial_lr"),
    "a name that is a number": lambda content: content["optimizer"]["param_groups"][0].update({3: 0}),
    "a parameter's number in tensors": group(params=[torch.zeros(2)] * 8),
    "another parameter's state": lambda content: content["optimizer"]["state"].update(more={}),
    "no second moment": of_all("exp_avg_sq"),
    "a step of bytes": state(step=torch.tensor(6, dtype=torch.uint8)),
    "a step in a list": state(step=torch.tensor([6.0])),
    "a complex moment": state(step=torch.tensor(6j)),
    "no decay": schedule(gamma=None),
    "another decay": schedule(gamma=0.5),
    "no epoch": schedule(last_epoch=None),
    "no count": schedule(_step_count=None),
    "a missing epoch": lambda content: content["state"]["scheduler"].pop("last_epoch"),
    "a missing decay": lambda content: content["state"]["scheduler"].pop("gamma"),
    "complete in two": lambda content: content["state"].update(complete=torch.zeros(2)),
    "complete in text": lambda content: content["state"].update(complete="yes"),
    "a seed in tensors": lambda content: content["state"].update(seed=torch.zeros(2)),
    "a definition of another run": lambda content: content["state"]["definition"]["settings"].update(
        {"optimizer.eps": "7"}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_edited_state_is_passed_over(tmp_path: Path, damage: str) -> None:
    options = {"scheduler": lambda optimizer: StepLR(optimizer, 1, gamma=0.25)}
    whole, end = run(tmp_path / "whole", 3, **options)
    run(tmp_path / "parts", 2, **options)
    changed(tmp_path / "parts" / "epoch-0002.pt", DAMAGES[damage])
    with pytest.warns(UserWarning, match=r"epoch-0002\.pt: expected .* found a damaged .*going back to the"):
        parts, same_end = run(tmp_path / "parts", 3, seed=1, **options)
    assert parts.train_loss == whole.train_loss and torch.equal(end, same_end)


OF_OTHERS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no sums": ("Adagrad", lambda content: content["optimizer"]["state"].clear()),
    "a row too many": ("Adafactor", state(row_var=torch.zeros(9, 1))),
    "no history": ("LBFGS", state(old_dirs=None)),
    "an iteration of text": ("LBFGS", state(n_iter="text")),
    "a direction cut short": ("LBFGS", state(d=torch.zeros(3))),
    "a history cut short": ("LBFGS", state(old_stps=[])),
    "a rate that is no number": ("a rate in a tensor", group(lr=torch.zeros(2))),
    "no average": ("ASGD", of_all("ax")),
    "no momentum": ("Nesterov", state(momentum_buffer=None)),
    "a momentum of text": ("two groups", state(momentum_buffer="text")),
}


@pytest.mark.parametrize("damage", OF_OTHERS)
def test_an_edited_state_of_other_optimizers_is_passed_over(tmp_path: Path, damage: str) -> None:
    name, change = OF_OTHERS[damage]
    whole, end = run(tmp_path / "whole", 3, optimizer=EVERY[name])
    run(tmp_path / "parts", 2, optimizer=EVERY[name])
    changed(tmp_path / "parts" / "epoch-0002.pt", change)
    with pytest.warns(UserWarning, match=r"epoch-0002\.pt: expected .* found a damaged .*going back to the"):
        parts, same_end = run(tmp_path / "parts", 3, seed=1, optimizer=EVERY[name])
    assert parts.train_loss == whole.train_loss and torch.equal(end, same_end)


def test_an_old_state_without_a_definition_is_refused_too(tmp_path: Path) -> None:
    run(tmp_path, 1)
    changed(tmp_path / "epoch-0001.pt", lambda content: content["state"].pop("definition"))
    run(tmp_path, 1, seed=1)
    changed(tmp_path / "epoch-0001.pt", group(capturable=True))
    with pytest.raises(ValueError, match=r"epoch-0001\.pt: expected a state that Adam can go on from, found"):
        run(tmp_path, 2, seed=1)


def test_a_step_that_needs_more_than_was_kept_is_refused(tmp_path: Path) -> None:
    """``on_difference="warn"`` goes on with the hyperparameters given now, where the state allows it."""
    run(tmp_path, 1)
    with pytest.raises(ValueError, match=r"epoch-0001\.pt: expected a state that Adam can go on from, found"):
        run(tmp_path, 2, optimizer=EVERY["AMSGrad"], on_difference="warn")
    with pytest.warns(UserWarning, match=r"not with the same optimizer\.eps \(0\.1\), found 1e-08"):
        run(tmp_path, 2, optimizer=functools.partial(OPTIM.Adam, eps=0.1), on_difference="warn")


def test_an_optimizer_that_cannot_step_is_not_the_checkpoints_fault(tmp_path: Path) -> None:
    """The optimiser's own error, as in a run that begins anew."""
    for _ in range(2):
        with pytest.raises(AssertionError, match="capturable"):
            run(tmp_path, 1, optimizer=functools.partial(OPTIM.Adam, capturable=True))


def test_the_trial_touches_nothing(tmp_path: Path) -> None:
    """Hooks are not called, and the first step after going on is the run's first step."""
    run(tmp_path, 1)
    model = make(1).double()
    optimizer = OPTIM.Adam(model.parameters(), lr=1e-3)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda *_: called.append("global"))
    try:
        quiet_fit(model, double_batches(), epochs=1, run_dir=tmp_path, optimizer=optimizer)
    finally:
        everywhere.remove()
    assert called == [] and [int(values["step"]) for values in optimizer.state.values()] == [6] * 8

"""Scores leave the user's model alone, also while they run: any number of threads may score, train and serve it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from influence_problems import images, mlp
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastvae
from fastvae import metrics
from fastvae.data import FactorSpace
from fastvae.influence import TracIn
from fastvae.likelihoods import Categorical
from fastvae.lowering import lower
from fastvae.models import HVAE, IWAE, VAE, BaseVAE
from fastvae.ood import (
    InputComplexity,
    LikelihoodRatio,
    LikelihoodRegret,
    NegativeLogLikelihood,
    SelfInfluence,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Score = Callable[[BaseVAE, Tensor], Any]


class Watched(nn.Module):
    """A network whose every run calls ``watch``, and which no reader of modules can take."""

    watch: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers, self.norm = mlp(*widths), nn.BatchNorm1d(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        type(self).watch()
        if len(x.shape) > 2:
            x = x.flatten(1)
        return self.norm(self.layers(x)) if int(x.shape[-1]) else x


def load(model: nn.Module, scale: float) -> float:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return scale


def codes_of(model: BaseVAE, x: Tensor) -> Tensor:
    space = FactorSpace(("row",), (len(x),), lambda factors: (x[factors[:, 0]] * 255).to(torch.uint8))
    return metrics.codes_of(model, space, torch.arange(len(x))[:, None])


SCORES: dict[str, Score] = {
    "regret": lambda m, x: LikelihoodRegret(m, num_steps=3, num_samples=4).predict(x),
    "regret_posterior": lambda m, x: LikelihoodRegret(
        m, num_steps=3, num_samples=4, target="posterior"
    ).predict(x),
    "nll": lambda m, x: NegativeLogLikelihood(m, num_samples=8).predict(x),
    "complexity": lambda m, x: InputComplexity(m, num_samples=8).predict(x.round().reshape(-1, 1, 4, 5)),
    "ratio": lambda m, x: LikelihoodRatio(m, copy.deepcopy(m).eval(), num_samples=8).predict(x),
    "self_influence": lambda m, x: SelfInfluence(m, num_samples=3, uncovered="materialise").predict(x),
    "tracin": lambda m, x: TracIn(
        m, x, [0.5, 1.25], load, num_samples=2, uncovered="materialise"
    ).influence(x[:3]),
    "tracin_error": lambda m, x: TracIn(
        m, TensorDataset(x), None, num_samples=2, uncovered="materialise"
    ).influence_with_error(x[:3])[1],
    "posteriors": lambda m, x: torch.stack(metrics.posteriors(m, x)),
    "evidence": lambda m, x: torch.tensor(metrics.negative_log_likelihood(m, x, 8)),
    "information": lambda m, x: torch.tensor(metrics.mutual_information(m, x)),
    "active": lambda m, x: torch.tensor(metrics.active_units(m, x)),
}  # fmt: skip


def lowered() -> BaseVAE:
    return VAE(
        nn.Sequential(nn.Flatten(), nn.Linear(20, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 8)),
        nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 20)),
    )


def unlowered() -> BaseVAE:
    return VAE(Watched(20, 9, 8), Watched(4, 9, 20), latent_dim=4)


def unsized() -> BaseVAE:
    return IWAE(Watched(20, 9, 8), Watched(4, 9, 20), num_samples=3)


def hamiltonian() -> BaseVAE:
    return HVAE(lowered().encoder, lowered().decoder, num_steps=2)


MODELS: list[Callable[[], BaseVAE]] = [lowered, unlowered, unsized, hamiltonian]


def facts(model: BaseVAE) -> list[Any]:
    """All that a score might leave behind."""
    found: list[Any] = []
    for module in model.modules():
        plain = {
            key: (value if isinstance(value, (bool, int, float, str, type(None))) else id(value))
            for key, value in vars(module).items()
        }
        found += [plain, [len(vars(module)[key]) for key in vars(module) if key.endswith("_hooks")]]
    for tensor in (*model.parameters(), *model.buffers()):
        found += [id(tensor), tensor.requires_grad, tensor._version, tensor.grad is None, tensor.sum().item()]
    return found


def build(make: Callable[[], BaseVAE]) -> BaseVAE:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    model.encoder.train()
    next(model.decoder.parameters()).requires_grad_(False)
    return model.train()


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", SCORES)
def test_a_model_is_as_it_was_at_every_moment(
    name: str, make: Callable[[], BaseVAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build(make), images(5, 20).float()
    before, generator = facts(model), torch.get_rng_state()
    moments = []

    def watch() -> None:
        moments.append(facts(model) == before)

    monkeypatch.setattr(Watched, "watch", staticmethod(watch))
    first = SCORES[name](model, x)
    assert facts(model) == before and torch.equal(torch.get_rng_state(), generator)
    assert all(moments) and (moments or make in (lowered, hamiltonian))
    assert torch.equal(SCORES[name](model, x), first)


@pytest.mark.parametrize("make", [lowered, unlowered], ids=lambda make: make.__name__)
def test_eight_threads_give_the_scores_of_one_beside_a_ninth_that_trains(
    make: Callable[[], BaseVAE], one_thread: None
) -> None:
    model, x = build(make), images(5, 20).float()
    if make is unlowered:
        # The running statistics are the trainer's to change; here they stay, so that scores can be compared.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 0.0
    else:
        model.eval().requires_grad_(True)
        model.training = True  # the trainer's mark, which no score may take away
    start = copy.deepcopy(model.state_dict())
    names = [name for name in SCORES if name not in ("ratio", "complexity")]
    expected = {name: SCORES[name](model, x) for name in names}
    wrong: list[Any] = []
    stop, steps = threading.Event(), 0

    def score(offset: int) -> None:
        try:
            for i in range(len(names)):
                name = names[(offset + i) % len(names)]
                if not torch.equal(SCORES[name](model, x), expected[name]):
                    wrong.append(name)
        except Exception as error:  # a thread's exception would be lost
            wrong.append(error)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.0)

    def train() -> None:
        nonlocal steps
        try:
            while not stop.is_set():
                optimizer.zero_grad()
                model(x).sum().backward()
                if not model.training or any(parameter.grad is None for parameter in trainable):
                    wrong.append("a training step without a gradient")
                optimizer.step()
                steps += 1
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=score, args=(i,)) for i in range(8)]
    trainer = threading.Thread(target=train)
    for thread in (trainer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    trainer.join()
    assert not wrong and steps > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) or name.endswith("num_batches_tracked")
    assert all(parameter.requires_grad for parameter in trainable)


def test_threads_share_one_detector_and_one_tracin(one_thread: None) -> None:
    model, x = build(lowered), images(24, 20).float()
    detectors: list[Any] = [
        NegativeLogLikelihood(model, num_samples=8).predict,
        LikelihoodRegret(model, num_steps=3, num_samples=4).predict,
        SelfInfluence(model, num_samples=3).predict,
        TracIn(model, x, [0.5, 1.25], load, num_samples=2).influence,
    ]
    parts = x.split(3)
    expected = [[call(part) for part in parts] for call in detectors]
    found: dict[tuple[int, int], Any] = {}

    def score(number: int) -> None:
        for i, call in enumerate(detectors):
            try:
                found[i, number] = call(parts[number])
            except Exception as error:
                found[i, number] = error

    threads = [threading.Thread(target=score, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (i, number), scores in found.items():
        assert torch.equal(scores, expected[i][number]), (i, number, scores)
    assert len(found) == 32


def test_a_run_of_fit_beside_scores_loses_nothing(tmp_path: Path, one_thread: None) -> None:
    x = images(16, 20).round().float()

    def trained(busy: bool) -> dict[str, Tensor]:
        model, stop = build(lowered), threading.Event()
        model.requires_grad_(True)

        def score() -> None:
            while not stop.is_set():
                LikelihoodRegret(model, num_steps=2, num_samples=2).predict(x[:2])
                TracIn(model, x, [1.0], load, num_samples=1).influence(x[:2])
                metrics.posteriors(model, x)

        threads = [threading.Thread(target=score) for _ in range(2 * busy)]
        for thread in threads:
            thread.start()
        fastvae.fit(model, torch.utils.data.DataLoader(x, 4), epochs=6, progress=False)
        stop.set()
        for thread in threads:
            thread.join()
        return model.state_dict()

    alone, beside = trained(False), trained(True)
    assert all(torch.equal(value, beside[name]) for name, value in alone.items())


def test_categorical_models_too() -> None:
    model = VAE(
        nn.Sequential(nn.Flatten(), nn.Linear(20, 8)),
        nn.Sequential(nn.Linear(4, 80), nn.BatchNorm1d(80), nn.Unflatten(1, (4, 20))),
        Categorical(4),
    )
    before, x = facts(model), images(4, 20).float().mul(3).round().div(3)
    for name in ("regret", "nll", "self_influence", "tracin"):
        SCORES[name](model, x)
    assert facts(model) == before


def test_reading_a_module_does_not_disturb_what_other_threads_do() -> None:
    """torch.fx replaces methods of nn.Module while it traces: others run, and are read, as if it did not."""
    inside, go = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            go.wait(60)
            return torch.tanh(self.layer(x))

    found: dict[str, Any] = {}
    plain, x = mlp(4, 5, 4), torch.rand(3, 4)
    expected = plain(x)
    reader = threading.Thread(target=lambda: found.update(slow=lower(Slow())))
    other = threading.Thread(target=lambda: found.update(plain=lower(plain)))
    reader.start()
    assert inside.wait(60)
    try:
        assert torch.equal(plain(x), expected)
        other.start()
        other.join(0.5)
    finally:
        go.set()
    reader.join()
    other.join()
    assert found["slow"].spec == "linear 0 1;tanh" and found["plain"].spec == "linear 0 1;relu;linear 2 3"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda detector: pickle.loads(pickle.dumps(detector))])
def test_detectors_can_be_copied_and_pickled(copied: Callable[[Any], Any]) -> None:
    model, x = build(lowered), images(4, 20).float()
    for detector in (
        NegativeLogLikelihood(model, num_samples=4),
        LikelihoodRegret(model, num_steps=2, num_samples=4),
        LikelihoodRatio(model, build(lowered), num_samples=4),
        SelfInfluence(model, num_samples=2),
        SelfInfluence(model, [0.5, 2.0], load, num_samples=2),
    ):
        expected = detector.predict(x)
        assert torch.equal(copied(detector).predict(x), expected)


def test_reading_a_decoder_leaves_other_threads_modules_alone() -> None:
    """torch.export would replace methods of nn.Module for as long as it runs."""
    inner = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    methods = nn.Module.__call__, nn.Module.__getattr__
    seen: list[Any] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Linear(2, 3)

        def forward(self, z: Tensor) -> Tensor:
            assert z.ndim == 2
            called = threading.Thread(target=lambda: seen.append((type(inner[0]), inner(torch.rand(1, 2)))))
            called.start()
            called.join()
            seen.append((nn.Module.__call__, nn.Module.__getattr__))
            return self.layers(z)

    network = fastvae.Network(Watching(), "gaussian", z=torch.rand(3, 2))
    assert network.lowered == 1
    assert len(seen) >= 4
    assert all(pair == methods or pair[0] is nn.Linear for pair in seen)
    assert all(vars(method).get("__fx_already_patched") is None for method in methods)


def test_networks_are_swept_while_another_thread_reads() -> None:
    """torch.export says to all threads that they compile."""
    net = fastvae.Network(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), "gaussian")
    z, x = torch.rand(4, 2), torch.rand(4, 3)
    expected = net.force(z, x)
    found: list[Any] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Linear(2, 3)

        def forward(self, z: Tensor) -> Tensor:
            def sweep() -> None:
                try:
                    found.append(net.force(*(part.clone() for part in (torch.ones(4, 2), torch.ones(4, 3)))))
                except Exception as error:
                    found.append(error)

            called = threading.Thread(target=sweep)
            called.start()
            called.join()
            return self.layers(z)

    assert fastvae.Network(Watching(), "gaussian", z=torch.rand(3, 2)).lowered == 1
    wanted = net.force(torch.ones(4, 2), torch.ones(4, 3))
    assert len(found) >= 2
    for each in found:
        torch.testing.assert_close(each, wanted)
    torch.testing.assert_close(net.force(z, x), expected)


def test_readings_of_many_shapes_and_models_are_let_go() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fastvae.network import cache

    encoder = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    entries = len(FakeTensorMode.cache)
    for size in range(3, 3 + cache._MOST_FORMS + 2):
        x = torch.rand(2, 1, size, size)
        network = cache.read_network(encoder, x, of_data=True)
        assert cache.read_network(encoder, x, of_data=True).sweeps is network.sweeps
    assert len(cache._known[encoder]) == cache._MOST_FORMS
    assert len(FakeTensorMode.cache) == entries

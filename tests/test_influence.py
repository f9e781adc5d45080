"""TracIn against materialised gradients in float64: every kind of layer, route, loss and argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from influence_problems import (
    SHAPES,
    build,
    convolutional_vae,
    dense_vae,
    images,
    mlp,
    normalised_vae,
    scaled,
    tracin,
    vae_gradients,
)
from peers import peer
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import fastvae
from fastvae.influence import TracIn, UncoveredParameter, engine, evaluation, noise
from fastvae.influence.factors import GRAM, TILES
from fastvae.influence.topk import TopK
from fastvae.models import HVAE, VAE, BaseVAE
from fastvae.noise import Stream, draws_of, key_of_weights, keys_of

each_model = pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
Make = Callable[[], nn.Module]


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    found, expected = found.cpu(), expected.cpu()
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@each_model
def test_equals_materialised_gradients(make: Make) -> None:
    model = build(make)
    # float32 numbers under both models: noise is keyed by the bytes.
    train, queries = images(7, *SHAPES[make]).float(), images(4, *SHAPES[make], seed=2).float()
    g_train, g_queries = (vae_gradients(model, x, 3).mean(1) for x in (train, queries))
    expected = g_queries @ g_train.T
    found = tracin(model, train)
    assert close(found.influence(queries), expected, 1e-10)
    assert close(found.self_influence(queries), g_queries.square().sum(1), 1e-10)
    single = tracin(model.float(), train).influence(queries)
    assert single.dtype == torch.float32 and close(single.double(), expected, 1e-4)


@each_model
@pytest.mark.parametrize("route", [GRAM, TILES])
def test_both_routes_give_the_same(make: Make, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(make)
    train, queries = images(6, *SHAPES[make]), images(3, *SHAPES[make], seed=2)
    expected = tracin(model, train).influence(queries)
    norms = tracin(model, train).self_influence()
    monkeypatch.setattr(engine, "cheaper_route", lambda *_: route)
    monkeypatch.setattr(engine, "self_route", lambda *_: route)
    forced = tracin(model, train)
    assert route in str(forced.coverage())
    assert close(forced.influence(queries), expected, 1e-12)
    assert close(forced.self_influence(), norms, 1e-12)


def test_influence_of_a_sample_on_itself_is_its_self_influence() -> None:
    for make in (dense_vae, normalised_vae):
        x = images(6, *SHAPES[make])
        found = tracin(build(make), x)
        assert close(found.influence(x).diagonal(), found.self_influence(), 1e-12)
        assert close(found.self_influence(x[[4, 1]]), found.self_influence()[[4, 1]], 1e-12)


def take_at_once(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Tiles of another size."""
    module = fastvae.influence.tracin
    monkeypatch.setattr(module, "_ON_CPU", replace(module._ON_CPU, **sizes))


def test_scores_do_not_depend_on_place_batch_or_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    x, queries = images(9, 20), images(4, 20, seed=2)
    expected = tracin(build(dense_vae), x).influence(queries)
    take_at_once(monkeypatch, rows=6)
    order = torch.tensor([3, 1, 8, 0, 2, 7, 5, 4, 6], device="cpu")
    for data in (x[order], TensorDataset(x[order]), DataLoader(TensorDataset(x[order]), batch_size=5)):
        found = tracin(build(dense_vae), data, batch_size=2).influence(queries.flip(0))
        assert close(found, expected[:, order].flip(0), 1e-12)


def test_seeds() -> None:
    x, model = images(5, 20), build(dense_vae)
    same, other = tracin(model, x, seed=1), tracin(model, x, seed=1, query_seed=2)
    assert not torch.equal(same.influence(x), tracin(model, x).influence(x))
    g, h = vae_gradients(model, x, 3, seed=1).mean(1), vae_gradients(model, x, 3, seed=2).mean(1)
    assert close(same.influence(x), g @ g.T, 1e-10)
    assert close(other.influence(x), h @ g.T, 1e-10)


def test_unbiased_self_influence_and_standard_errors() -> None:
    x, queries, model = images(5, 20), images(3, 20, seed=2), build(dense_vae)
    g, h = vae_gradients(model, x, 4), vae_gradients(model, queries, 4)
    found = tracin(model, x, num_samples=4)
    statistic = (g.sum(1).square().sum(1) - g.square().sum((1, 2))) / (4 * 3)
    assert close(found.self_influence(unbiased=True), statistic, 1e-10)
    scores, errors = found.influence_with_error(queries)
    assert close(scores, h.mean(1) @ g.mean(1).T, 1e-10)
    by_query = torch.einsum("msp,np->msn", h, g.mean(1)).var(1) / 4
    by_sample = torch.einsum("mp,nsp->msn", h.mean(1), g).var(1) / 4
    assert close(errors, (by_query + by_sample).sqrt(), 1e-10)


def test_scores_of_checkpoints_are_the_sum_of_those_of_each() -> None:
    """In any order and however often one comes: noise is keyed by weights, not by their place in the list."""
    x, queries, model = images(5, 20), images(3, 20, seed=2), build(dense_vae)

    def of(*scales: float) -> tuple[Tensor, ...]:
        found = TracIn(model, x, scales, scaled, num_samples=3, seed=1, query_seed=2)
        with_error = found.influence_with_error(queries)
        norms = found.self_influence(), found.self_influence(queries, unbiased=True)
        return (found.influence(queries), *norms, *with_error)

    each = {scale: of(scale) for scale in (0.5, 1.5)}
    for scales in ((0.5, 1.5), (1.5, 0.5), (0.5, 0.5, 1.5)):
        *scores, errors = of(*scales)
        for i, score in enumerate(scores):
            assert close(score, sum(each[scale][i] for scale in scales), 1e-12)
        # Independent errors of different weights, the same ones of equal weights.
        twice = len(scales) - 1
        assert close(errors.square(), (twice * each[0.5][-1]).square() + each[1.5][-1].square(), 1e-12)


def test_errors_average_out_over_checkpoints() -> None:
    """The spread over seeds of the mean over 16 checkpoints of almost the same weights is a quarter of one's."""
    x, queries, model = images(4, 20), images(3, 20, seed=2), build(dense_vae)
    near = [1 + 1e-7 * i for i in range(16)]

    def spread(scales: list[float]) -> float:
        seeds = range(0, 48, 2)
        found = [
            TracIn(model, x, scales, scaled, num_samples=2, seed=i, query_seed=i + 1).influence(queries)
            for i in seeds
        ]
        return float((torch.stack(found) / len(scales)).var(0).mean().sqrt())

    # Of 24 seeds and 12 pairs; with common noise the ratio is 1.
    assert 0.15 < spread(near) / spread(near[:1]) < 0.4


def test_errors_shrink_with_the_root_of_the_draws() -> None:
    """The truth, from many draws, lies within a few standard errors, and four times the draws halve them."""
    x, queries, model = images(6, 20), images(4, 20, seed=2), build(dense_vae)
    truth = tracin(model, x, num_samples=2000, seed=9, query_seed=10).influence(queries)
    few = tracin(model, x, num_samples=16, query_seed=1).influence_with_error(queries)
    many = tracin(model, x, num_samples=64, query_seed=1).influence_with_error(queries)
    for scores, errors in (few, many):
        assert float(((scores - truth) / errors).square().mean()) < 4
    assert 0.4 < float(many.standard_errors.mean() / few.standard_errors.mean()) < 0.6


@pytest.mark.parametrize("proponents", [True, False])
def test_top_k_is_the_top_of_the_matrix(proponents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, queries = images(9, 20), images(4, 20, seed=2)
    take_at_once(monkeypatch, rows=6, query_bytes=1)  # one query at a time
    found = tracin(build(dense_vae), x)
    scores, indices = found.influence(queries).sort(1, descending=proponents)
    top = found.influence(queries, k=3, proponents=proponents)
    assert torch.equal(top.indices, indices[:, :3]) and close(top.influence_scores, scores[:, :3], 1e-12)
    assert found.influence(queries, k=20)[0].shape == (4, 9)
    summed = found.influence(queries, aggregate=True)
    assert close(summed, found.influence(queries).sum(0, keepdim=True), 1e-12)
    best = found.influence(queries, k=2, proponents=proponents, aggregate=True)
    assert torch.equal(best.indices, summed.sort(1, descending=proponents).indices[:, :2])


def test_equal_scores_go_to_the_lower_index() -> None:
    for largest in (True, False):
        best = TopK(2, largest)
        best.add(torch.tensor([5, 6]), torch.zeros(1, 2))
        best.add(torch.tensor([1, 2, 3]), torch.zeros(1, 3))
        assert best.result().indices.tolist() == [[1, 2]]


def test_checkpoints_are_weighted_and_loaded_once() -> None:
    model, x, queries = build(dense_vae), images(5, 20), images(3, 20, seed=2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    loads = []

    def load(network: nn.Module, scale: float) -> float:
        loads.append(scale)
        network.load_state_dict({name: scale * value for name, value in start.items()})
        return 10 * scale

    found = TracIn(model, x, [0.5, 1.5], load, num_samples=3)
    score, norms = found.influence(queries), found.self_influence()
    top = found.influence(queries, k=1)
    assert loads == [0.5, 1.5]
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    expected, squares = (torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in ((3, 5), 5))
    for scale in (0.5, 1.5):
        load(model, scale)
        g, h = vae_gradients(model, x, 3).mean(1), vae_gradients(model, queries, 3).mean(1)
        expected += 10 * scale * h @ g.T
        squares += 10 * scale * g.square().sum(1)
    assert close(score, expected, 1e-10) and close(norms, squares, 1e-10)
    assert close(top.influence_scores[:, 0], expected.max(1).values, 1e-10)


def test_a_checkpoint_is_put_in_place_at_every_call() -> None:
    model, x = build(dense_vae), images(5, 20)

    def load(network: nn.Module, value: float) -> float:
        with torch.no_grad():
            network.encoder[0].weight.fill_(value)
        return 1.0

    found = TracIn(model, x, [0.1], load, num_samples=3)
    first = found.influence(x)
    assert not torch.equal(model.encoder[0].weight, torch.full_like(model.encoder[0].weight, 0.1))
    assert torch.equal(found.influence(x), first)
    load(model, 0.1)
    assert torch.equal(found.influence(x), first)


def test_the_model_is_given_back_as_it_was() -> None:
    model = build(normalised_vae).train()
    model.decoder[1].eval()
    model.encoder[0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    with torch.inference_mode():
        found = tracin(model, images(3, 2, 6, 5))
        found.influence(images(2, 2, 6, 5, seed=2))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before) and "encode" not in vars(model)
    assert "frozen" in str(found.coverage()).splitlines()[1]


def test_trained_by_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fastvae.VAE(mlp(20, 12, 8), mlp(4, 12, 20))
    x = images(8, 20).float()
    history = fastvae.fit(
        model, DataLoader(x, batch_size=4), epochs=2, run_dir=tmp_path, binarize=True, progress=False
    )
    scores = TracIn(model, x, history.checkpoints).influence(x[:3], k=2)
    assert scores.indices.shape == (3, 2)


# ---- other models and losses ----


class Classifier(nn.Module):
    """An embedding read several times, a layer called twice, a shape in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=0)
        self.hidden = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.hidden(torch.tanh(self.hidden(self.embedding(tokens))))
        return self.out(h.mean(1))


def classifier_gradients(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    rows = []
    for token, label in zip(tokens.split(1), labels.split(1), strict=True):
        # cuDNN has no gradients of recurrent layers in eval mode.
        with torch.backends.cudnn.flags(enabled=False):
            loss = nn.functional.cross_entropy(model(token), label)
            grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows).cpu()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_classifier_with_a_loss_function(reduction: str) -> None:
    torch.manual_seed(0)
    model = Classifier().double()
    tokens, labels = torch.randint(7, (8, 5)), torch.randint(3, (8,))
    found = tracin(
        model, TensorDataset(tokens, labels), loss_fn=nn.CrossEntropyLoss(reduction=reduction), layers=None
    )
    g = classifier_gradients(model, tokens, labels)
    assert close(found.influence((tokens[:3], labels[:3])), g[:3] @ g.T, 1e-10)
    assert close(found.self_influence(), g.square().sum(1), 1e-10)
    with pytest.raises(ValueError, match="model that draws noise"):
        found.influence_with_error((tokens[:3], labels[:3]))


def test_layers_choose_parameters_and_test_loss_is_another() -> None:
    torch.manual_seed(0)
    model = mlp(6, 5, 4).double()
    x, y = images(5, 6), images(5, 4, seed=2)

    def squared(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(1)

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum(1)

    found = tracin(model, (x, y), loss_fn=squared, test_loss_fn=summed, layers=["2"]).influence((x, y))

    def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        rows = []
        for a, b in zip(x.split(1), y.split(1), strict=True):
            grads = torch.autograd.grad(loss(model(a), b).sum(), [model[2].weight, model[2].bias])
            rows.append(torch.cat([grad.flatten() for grad in grads]))
        return torch.stack(rows)

    assert close(found, gradients(summed) @ gradients(squared).T, 1e-10)
    with pytest.raises(ValueError, match="layers: expected names of modules of the model, got 7"):
        tracin(model, (x, y), loss_fn=squared, layers=["7"])


class ForeignVAE(nn.Module):
    """Draws its own noise and knows nothing of fastvae: the loss comes with the output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        return kl + 0.5 * (self.decoder(z) - x).square().sum(1)


def test_a_foreign_vae_gets_noise_keyed_by_sample() -> None:
    torch.manual_seed(0)
    model, x = ForeignVAE().double(), images(6, 6)
    found = tracin(model, x)
    rows = []
    for sample in x.split(1):
        grads = []
        for key in draws_of(keys_of(sample) ^ key_of_weights(model), 0, 3):
            mu, logvar = model.encoder(sample).chunk(2, 1)
            z = mu + torch.exp(logvar / 2) * Stream(key[None]).normal((2,))
            loss = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum()
            loss = loss + 0.5 * (model.decoder(z) - sample).square().sum()
            grads.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
            )
        rows.append(torch.stack(grads).mean(0))
    g = torch.stack(rows)
    assert close(found.influence(x), g @ g.T, 1e-10)
    assert close(found.influence(x[[2]]), found.influence(x)[[2]], 1e-12)


class Attending(nn.Module):
    """Attention and a recurrent layer in front of one that a rule covers, marked as random for their dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.rows, self.out = nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rows(self.layer(x.reshape(len(x), 5, 4)))[0].flatten(1))


def test_attention_and_recurrent_layers() -> None:
    torch.manual_seed(0)
    model, x, labels = Attending().double(), images(6, 20), torch.randint(3, (6,))
    loss = nn.CrossEntropyLoss(reduction="none")
    found = tracin(model, (x, labels), loss_fn=loss)
    g = classifier_gradients(model.eval(), x, labels)
    assert close(found.influence((x[:3], labels[:3])), g[:3] @ g.T, 1e-10)
    with pytest.raises(ValueError, match="model that draws noise"):
        found.influence_with_error((x[:3], labels[:3]))


def test_noise_is_not_drawn_from_torchs_generators() -> None:
    """In every form that is covered: the numbers are the stream's, and the generator stays where it is."""
    keys = draws_of(keys_of(images(3, 4)), 0, 2)
    mean, std = torch.full((6, 4), 2.0), torch.full((6, 4), 3.0)
    draws: dict[str, Callable[[], Tensor]] = {
        "randn": lambda: torch.randn(6, 4, dtype=torch.float64),
        "randn generator": lambda: torch.randn(6, 4, generator=torch.Generator()),
        "randn_like": lambda: torch.randn_like(mean),
        "normal_": lambda: torch.empty(6, 4).normal_(2, 3),
        "normal tensors": lambda: torch.normal(mean, std),
        "normal mean": lambda: torch.normal(mean, 3.0),
        "normal std": lambda: torch.normal(2.0, std),
        "normal numbers": lambda: torch.normal(2.0, 3.0, (6, 4)),
        "rand": lambda: torch.rand(6, 4),
        "rand_like": lambda: torch.rand_like(mean, dtype=torch.float64),
        "uniform_": lambda: torch.empty(6, 4).uniform_(-1, 1),
    }
    state = torch.get_rng_state()
    for name, draw in draws.items():
        with noise.KeyedNoise(Stream(keys)):
            found = draw()
        normal, uniform = Stream(keys).normal((4,)), Stream(keys).uniform((4,))
        expected = normal if name.startswith(("randn", "normal")) else uniform
        expected = 2 + 3 * expected if name.startswith("normal") else expected
        expected = 2 * expected - 1 if name == "uniform_" else expected
        assert found.dtype == (torch.float64 if name in ("randn", "rand_like") else torch.float32)
        assert close(found.double(), expected, 1e-6), name
        assert noise.draws_noise(draw), name
    with noise.KeyedNoise(Stream(keys)), pytest.raises(NotImplementedError, match="noise by bernoulli"):
        torch.bernoulli(torch.full((6, 4), 0.5))
    assert noise.draws_noise(lambda: nn.functional.dropout(mean)) and not noise.draws_noise(lambda: mean + 1)
    assert not noise.draws_noise(lambda: nn.functional.dropout(mean, training=False))
    assert torch.equal(torch.get_rng_state(), state)
    found = tracin(ForeignVAE().double(), images(6, 6))
    state = torch.get_rng_state()
    found.influence(images(2, 6))
    assert torch.equal(torch.get_rng_state(), state)


# ---- what is not covered ----


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.scale).square().sum(1)


class Functional(nn.Module):
    """Uses a weight outside its layer's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) @ self.layer.weight).square().sum(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).square().sum(1)


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) - self.layer(x).mean(0)).square().sum(1)


class Custom(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).square().sum(1)


REFUSED = {
    Scaled: (r"TracIn: scale: no rule for scale of Scaled|TracIn: scale: no rule for Scaled", True),
    Functional: (
        r"TracIn: layer\.weight: its gradient .* is off by .* used outside its layer's forward",
        True,
    ),
    Tied: (r"TracIn: first\.weight: shared by first, second", True),
    Custom: (r"no rule for Custom", True),
    Coupled: (r"samples of a batch depend on each other", False),
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_uncovered_parameters_raise_or_are_materialised(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = (kind(4, 4) if kind is Custom else kind()).double()
    x = images(5, 4)
    message, exact = REFUSED[kind]
    with pytest.raises(UncoveredParameter, match=message):
        tracin(model, x).influence(x)
    if not exact:
        return
    found = tracin(model, x, uncovered="materialise")
    rows = []
    for sample in x.split(1):
        grads = torch.autograd.grad(model(sample).sum(), list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    g = torch.stack(rows)
    assert close(found.influence(x), g @ g.T, 1e-10)
    assert "autograd, sample by sample" in str(found.coverage())


@pytest.mark.parametrize("kind", [VAE, HVAE], ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_penalty_on_the_decoder_is_refused_or_materialised(kind: type[BaseVAE]) -> None:
    torch.manual_seed(0)
    penalties = [fastvae.penalties.JacobianL1(0.1)]
    model = kind(mlp(20, 12, 8), mlp(4, 12, 20), penalties=penalties).double()
    x, queries = images(4, 20), images(2, 20, seed=2)
    with pytest.raises(
        UncoveredParameter, match=r"decoder\.0\.weight: JacobianL1 differentiates|no rule for Tempering"
    ):
        tracin(model, x)
    found = tracin(model, x, uncovered="materialise")
    g, h = vae_gradients(model, x, 3).mean(1), vae_gradients(model, queries, 3).mean(1)
    assert close(found.influence(queries), h @ g.T, 1e-10)
    plain = tracin(kind(model.encoder, model.decoder).double(), x).influence(queries)
    assert not close(found.influence(queries), plain, 1e-3)


class Heads(nn.Module):
    """Mean and log variance by layers of their own: no chain, so that only the decoder is swept."""

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.logvar = nn.Linear(20, 4), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu(x), self.logvar(x)


@pytest.mark.parametrize("draws", [1, 3])
def test_encoders_swept_or_not_give_the_same(draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for model, shape in (
        (build(dense_vae), (20,)),
        (build(convolutional_vae), (1, 8, 8)),
        (VAE(Heads(), mlp(4, 12, 20)).double(), (20,)),
    ):
        x, queries = images(5, *shape), images(3, *shape, seed=2)
        found = tracin(model, x, num_samples=draws).influence(queries)
        g, h = vae_gradients(model, x, draws).mean(1), vae_gradients(model, queries, draws).mean(1)
        assert close(found, h @ g.T, 1e-10)
        with monkeypatch.context() as patch:
            patch.setattr(evaluation.Evaluation, "calls", lambda *_: None)
            assert close(tracin(model, x, num_samples=draws).influence(queries), found, 1e-12)


def test_a_batch_norm_without_running_statistics_couples_samples() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(UncoveredParameter, match=r"1\.weight: .*couples the samples"):
        tracin(model, images(5, 4).float(), loss_fn=lambda a, b: a.square().sum(1))


def cancelling() -> nn.Module:
    """Biases whose true gradient is zero: what comes after them takes the mean away, of channels or of all there is."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 5)),
        nn.Conv2d(1, 3, 3),
        nn.InstanceNorm2d(3),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2),
        nn.GroupNorm(4, 4),
        nn.Flatten(),
        nn.Linear(8, 3),
        nn.LogSoftmax(1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_that_cancels_to_zero_is_compared_absolutely(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x, labels = cancelling().to(dtype), images(9, 20).to(dtype), torch.randint(3, (9,))
    found = tracin(model, (x, labels), loss_fn=nn.NLLLoss(reduction="none")).influence((x[:4], labels[:4]))
    rows = []
    for image, label in zip(x.split(1), labels.split(1), strict=True):
        loss = nn.functional.nll_loss(model(image), label)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g = torch.stack(rows)
    assert close(found, g[:4] @ g.T, 1e-12 if dtype == torch.float64 else 1e-5)


def test_more_than_two_samples_are_compared() -> None:
    """Each sample depends on the one two places before it: any two that follow each other do not."""

    class Distant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return (h + torch.cat((torch.zeros_like(h[:2]), h[:-2]))).square().sum(1)

    with pytest.raises(UncoveredParameter, match="samples of a batch depend on each other"):
        tracin(Distant().double(), images(5, 4)).influence(images(2, 4))


def test_loaders_that_do_not_keep_the_order_are_refused() -> None:
    x, model = images(6, 20), build(dense_vae)
    data = TensorDataset(x)
    orders = {
        "RandomSampler": DataLoader(data, 2, shuffle=True),
        "SubsetRandomSampler": DataLoader(data, 2, sampler=SubsetRandomSampler(range(6))),
        "WeightedRandomSampler": DataLoader(data, 2, sampler=WeightedRandomSampler([1.0] * 6, 6)),
        "list": DataLoader(data, 2, sampler=[5, 4, 3, 2, 1, 0]),
        "DistributedSampler": DataLoader(data, 2, sampler=DistributedSampler(data, 2, 0, shuffle=False)),
        "Batches": DataLoader(data, batch_sampler=type("Batches", (BatchSampler,), {})(range(6), 2, False)),
    }
    orders["a RandomSampler"] = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 2, False))
    orders["with a RandomSampler"] = DataLoader(data, batch_size=None, sampler=RandomSampler(data))
    for name, loader in orders.items():
        with pytest.raises(
            ValueError, match=f"TracIn: train_dataset: expected a DataLoader in the order.*{name}"
        ):
            tracin(model, loader)
        for call in (tracin(model, data).influence, tracin(model, data).self_influence):
            with pytest.raises(
                ValueError, match=f"TracIn: inputs: expected a DataLoader in the order.*{name}"
            ):
                call(loader)
    expected = tracin(model, x).influence(x)
    sequential = BatchSampler(SequentialSampler(data), 4, False)
    for loader in (
        DataLoader(data, 4),
        DataLoader(data, batch_sampler=sequential),
        DataLoader(Subset(data, range(6)), 2),
    ):
        assert close(tracin(model, loader).influence(loader), expected, 1e-12)


ERRORS = {
    "scalar": (lambda a, b: a.square().sum(), ValueError, "one loss a sample, .*got a scalar"),
    "elements": (lambda a, b: a.square(), ValueError, r"one loss a sample, \[\d\], got \[\d, 4\]"),
    "number": (lambda a, b: 3.0, TypeError, "loss_fn expected to return a tensor, got float"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_losses_that_do_not_fit(case: str) -> None:
    loss, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        tracin(nn.Linear(4, 4).double(), images(5, 4), loss_fn=loss).influence(images(2, 4))


def test_arguments_out_of_range() -> None:
    model, x = build(dense_vae), images(3, 20)
    for options, message in (
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"uncovered": "skip"}, "uncovered: expected 'error' or 'materialise', got 'skip'"),
        ({"checkpoints": []}, "checkpoints: expected at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            tracin(model, x, **options)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        tracin(model, x).influence(x, k=0)
    with pytest.raises(ValueError, match="num_samples of at least 2"):
        tracin(model, x, num_samples=1).self_influence(unbiased=True)
    frozen = build(dense_vae).requires_grad_(False)
    with pytest.raises(ValueError, match="no trained parameter"):
        tracin(frozen, x)


# ---- captum's scripts ----

CAPTUM_SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
LINE

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
x, y = torch.randn(10, 1, 6, 6), torch.randint(3, (10,))
paths = []
for epoch in range(2):
    paths.append(f"FOLDER/checkpoint-{epoch}.pt")
    torch.save({"model_state_dict": net.state_dict(), "learning_rate": 0.1}, paths[-1])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.9)

def checkpoints_load_func(net, path):
    weights = torch.load(path)
    net.load_state_dict(weights["model_state_dict"])
    return weights["learning_rate"]

tracin = TracInCP(
    net,
    TensorDataset(x, y),
    paths,
    checkpoints_load_func,
    ["0", "3"],
    nn.CrossEntropyLoss(reduction="sum"),
    4,
    None,
    True,
)
matrix = tracin.influence((x[:3], y[:3]))
indices, scores = tracin.influence((x[:3], y[:3]), k=4, proponents=True, show_progress=False)
opponents = tracin.influence((x[:3], y[:3]), 4, False)
loader = tracin.influence(DataLoader(TensorDataset(x[:3], y[:3]), batch_size=2))
own = tracin.self_influence(show_progress=False, outer_loop_by_checkpoints=True)
"""


def test_a_script_for_captum_runs_with_its_import_changed(tmp_path: Path) -> None:
    names: dict[str, object] = {}
    script = CAPTUM_SCRIPT.replace("FOLDER", str(tmp_path))
    exec(script.replace("LINE", "from fastvae.influence import TracIn as TracInCP"), names)
    matrix, own = names["matrix"], names["own"]
    assert isinstance(matrix, Tensor) and matrix.shape == (3, 10) and isinstance(own, Tensor)
    assert torch.equal(names["loader"], matrix) and close(own[:3], matrix[:, :3].diagonal(), 1e-5)
    assert torch.equal(names["indices"], matrix.argsort(1, descending=True)[:, :4])
    assert names["opponents"].influence_scores.shape == (3, 4)
    peer("captum.influence")
    exec(script.replace("LINE", "from captum.influence import TracInCP"), theirs := {})
    for name in ("matrix", "scores", "own"):
        assert close(names[name], theirs[name].detach(), 1e-5)

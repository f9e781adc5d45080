"""TracIn of layers without factors of their own: by further rules, by what computes a weight, by whole modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from influence_problems import images, tracin, vae_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset

from fastvae import HVAE, VAE
from fastvae.influence import TracIn, UncoveredParameter


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """[B, P] gradients of losses, one sample after the other; on the CPU, as scores are."""
    rows = []
    for sample in x.split(1):
        # cuDNN has no gradients of recurrent layers in eval mode.
        with torch.backends.cudnn.flags(enabled=False):
            grads = torch.autograd.grad(model(sample).sum(), list(model.parameters()), materialize_grads=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows).cpu()


def check(name: str, model: nn.Module, x: Tensor, queries: Tensor) -> TracIn:
    """Scores and self-influence without anything materialised; the coverage is left to the caller."""
    # PyTorch's kernel of weight_norm on a GPU takes the root of a norm in float32 (6e-8), of float64 weights too.
    near = 1e-6 if x.is_cuda and "weight_norm" in name else 1e-10
    model = model.double().eval()
    found = tracin(model, x, num_samples=1)
    g, h = by_hand(model, x), by_hand(model, queries)
    torch.testing.assert_close(found.influence(queries), h @ g.T, rtol=near, atol=near)
    torch.testing.assert_close(found.self_influence(), g.square().sum(1), rtol=near, atol=near)
    assert "sample by sample" not in str(found.coverage())
    return found


class Loss(nn.Module):
    """A layer and a loss that treats no two outputs alike."""

    def __init__(self, layer: nn.Module, before: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.before = layer, nn.Identity() if before is None else before

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.before(x)).flatten(1)
        return (y.square() * torch.linspace(0.5, 2, y.shape[1], dtype=y.dtype)).sum(1)


def normalised(layer: nn.Module) -> nn.Module:
    """With running statistics that are not those of new layers."""
    layer.running_mean.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, operator]
    layer.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))  # type: ignore[union-attr, operator]
    return layer


RULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "Conv1d, dilated": (lambda: nn.Conv1d(4, 4, 2, padding=2, dilation=3, groups=2), (4, 9)),
    "Conv1d, same": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 9)),
    "Conv1d, circular": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 9)),
    "Conv1d, reflected": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), (2, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, (3, 2, 1), stride=(2, 1, 1), padding=(1, 0, 1)), (2, 5, 4, 3)),
    "Conv3d, dilated": (lambda: nn.Conv3d(2, 4, 2, padding=1, dilation=(1, 2, 1), groups=2), (2, 3, 4, 3)),
    "Conv3d, replicated": (lambda: nn.Conv3d(1, 2, 3, padding=1, padding_mode="replicate"), (1, 3, 4, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 2, 4, stride=3, padding=1, output_padding=2), (3, 5)),
    "ConvTranspose1d, wide": (lambda: nn.ConvTranspose1d(2, 2, 2, dilation=3, output_padding=2), (2, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 3, stride=2, output_padding=1), (2, 2, 3, 2)),
    "ConvTranspose3d, grouped": (lambda: nn.ConvTranspose3d(4, 4, (2, 1, 3), padding=1, groups=2), (4, 2, 3, 2)),
    "PReLU": (lambda: nn.PReLU(), (3, 4)),
    "PReLU, by channel": (lambda: nn.PReLU(3, init=0.1), (3, 4, 2)),
    "PReLU of vectors": (lambda: nn.PReLU(3), (3,)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "InstanceNorm2d": (lambda: normalised(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)), (3, 4, 2)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 3, 2, 2)),
    "RMSNorm": (lambda: nn.RMSNorm((3, 4)), (2, 3, 4)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), (2, 5, 5)),
    "weight_norm of everything": (lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=None), (4,)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(2, 3, 3)), (2, 3, 3)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), (4,)),
    "low rank": (lambda: low_rank(nn.Linear(4, 5)), (4,)),
}  # fmt: skip


def low_rank(layer: nn.Linear) -> nn.Module:
    """A weight that has a sum of two factors added, which are parameters, too."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(5, 2))
            self.b = nn.Parameter(torch.randn(2, 4))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.a @ self.b

    return parametrize.register_parametrization(layer, "weight", Added())


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    make, shape = RULES[name]
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = check(name, Loss(layer, nn.Tanh()), images(6, *shape) - 0.5, images(3, *shape, seed=2) - 0.5)
    assert "torch.vmap" not in str(found.coverage())


class SequenceFirst(nn.Module):
    """Samples along the second dimension, states of its own along the second as well."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **options: object) -> None:
        super().__init__()
        self.rows = kind(3, 4, 2, **options)  # type: ignore[arg-type]
        self.start = nn.Parameter(torch.randn(2 * (1 + self.rows.bidirectional), 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        start = self.start.expand(-1, len(x), -1).contiguous()
        return self.rows(h, (start, start) if isinstance(self.rows, nn.LSTM) else start)[0].transpose(0, 1)


class Cells(nn.Module):
    """A cell that is called many times, the first time without a state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for row in x.unbind(1):
            state = self.cell(row, state)
        return state  # type: ignore[return-value]


class Masked(nn.Module):
    """Attention under a mask of as many rows as there are queries later."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=self.mask)[0]


class Shared(nn.Module):
    """One weight under two names and used a third time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) @ self.first.weight


class Positions(nn.Module):
    """A parameter of its own, added to all."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layer = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.positions)


class Pair(nn.Module):
    """Returns a dict, of which one entry has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x=x)
        return found["mu"] + found["both"][0] + found["count"]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, *, x: Tensor) -> dict[str, object]:
        return {"mu": x * self.scale, "both": (x.exp() * self.scale.exp(),), "count": (x > 0).to(x.dtype)}


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (SequenceFirst, (5, 3)),
    "GRU, both ways": (lambda: SequenceFirst(nn.GRU, bidirectional=True), (5, 3)),
    "RNN": (lambda: SequenceFirst(nn.RNN, bias=False), (5, 3)),
    "GRUCell": (Cells, (5, 3)),
    "attention": (Masked, (3, 4)),
    "transformer": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), (3, 4)),
    "transformer, sequence first": (
        lambda: Turned(nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2)), (3, 4),
    ),
    "Bilinear": (lambda: Twice(nn.Bilinear(4, 4, 3)), (4,)),
    "shared": (Shared, (4,)),
    "positions": (Positions, (3, 4)),
    "dict": (Pair, (4,)),
    "weight_norm of a GRUCell": (lambda: parametrizations.weight_norm(nn.GRUCell(4, 3), "weight_hh"), (4,)),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), (4,)),
}  # fmt: skip


class Turned(nn.Module):
    """Samples along the second dimension of what is inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x.transpose(0, 1))
        return (found if isinstance(found, Tensor) else found[0]).transpose(0, 1)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.exp())


@pytest.mark.filterwarnings("ignore:.*weight_norm", "error:There is a performance drop")
@pytest.mark.parametrize("name", MODULES)
def test_whole_modules(name: str) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    model, x = Loss(make()), images(8, *shape) - 0.5
    if x.is_cuda and name == "old weight_norm":
        # The kernel that it calls on a GPU has no rule for torch.vmap.
        warnings.filterwarnings("ignore", "There is a performance drop")
    found = check(name, model, x, images(3, *shape, seed=2) - 0.5)
    assert "by torch.vmap" in str(found.coverage())
    # The same in tiles of one sample, and of samples with draws of their own.
    scores = tracin(model, x, num_samples=1).influence(x)
    again = torch.cat([tracin(model, each, num_samples=1).influence(x) for each in x.split(2)], 1)
    torch.testing.assert_close(scores, again, rtol=1e-12, atol=1e-12)


class Noisy(nn.Module):
    """A recurrent VAE of nobody's: noise of its own between two modules without rules."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.GRU(3, 4, batch_first=True), Positions()

    def forward(self, x: Tensor) -> Tensor:
        mu = self.encoder(x)[1][0]
        z = mu + 0.1 * torch.randn_like(mu)
        return self.decoder(z[:, None].expand(-1, 3, -1)).flatten(1).square().sum(1)


def test_modules_under_noise_keyed_by_sample() -> None:
    torch.manual_seed(0)
    model, x = Noisy().double(), images(6, 5, 3)
    found = tracin(model, x, num_samples=4)
    one_by_one = tracin(model, x, num_samples=4, uncovered="materialise")
    with_error = found.influence_with_error(x[:2])
    scores = torch.cat([one_by_one.influence(each) for each in x[:2].split(1)])
    torch.testing.assert_close(with_error.influence_scores, scores, rtol=1e-10, atol=1e-10)
    assert (with_error.standard_errors > 0).all()
    assert "GRU, by torch.vmap" in str(found.coverage())


class TimeFirst(nn.Module):
    """Takes [B, T, D] and returns [T, B, D']."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight).transpose(0, 1)


class LastStates(nn.Module):
    """Two layers' states come along the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.GRU(4, 5, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x)[1][-1]


class Placed(nn.Module):
    """A constant of as many rows as are audited is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.places = Scaled(), nn.Buffer(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.places)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return x * self.scale + places


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(TimeFirst(), Turn()),
        LastStates,
        Placed,
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    ],
    ids=["time first", "states", "constant", "transformer"],
)
def test_any_number_of_samples(make: Callable[[], nn.Module]) -> None:
    """As many as there are steps, layers or audited samples, or one: where samples lie is no matter of chance."""
    torch.manual_seed(0)
    model = Loss(make()).double().eval()
    for count in (1, 2, 8, 11):
        x = images(count, 8, 4) - 0.5
        g = by_hand(model, x)
        found = tracin(model, x, num_samples=1)
        for queries in (1, 2, 8):
            some = x.repeat(8, 1, 1)[:queries]
            h = by_hand(model, some)
            torch.testing.assert_close(found.influence(some), h @ g.T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.self_influence(), g.square().sum(1), rtol=1e-9, atol=1e-9)


class Chosen(nn.Module):
    """A layer that sees only the rows that a mask names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[..., 0] > 0
        h = x.new_zeros(*x.shape[:2], 3)
        h[rows] = self.layer(x[rows])
        return h.square().sum((1, 2))


def test_chosen_rows_are_materialised_or_refused() -> None:
    torch.manual_seed(0)
    model = Chosen().double()
    ragged, full = images(9, 5, 4) - 0.5, images(9, 5, 4) + 0.1
    g = by_hand(model, ragged)
    found = tracin(model, ragged, num_samples=1, uncovered="materialise")
    torch.testing.assert_close(found.influence(ragged), g @ g.T, rtol=1e-9, atol=1e-9)
    with pytest.raises(UncoveredParameter, match="cannot be told apart"):
        tracin(model, ragged, num_samples=1).influence(ragged)
    # Whole where they are audited, and not later.
    late = tracin(model, full, num_samples=1)
    torch.testing.assert_close(late.influence(full), by_hand(model, full) @ by_hand(model, full).T)
    with pytest.raises(ValueError, match=r"layer: expected \[5.0\] rows a sample .* of rows that are chosen"):
        late.influence(ragged[:4])


class Running(nn.Module):
    """Keeps a mean of its own, and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.mean, self.calls = nn.Parameter(torch.randn(4, 3)), nn.Buffer(torch.zeros(3)), 0

    def forward(self, x: Tensor) -> Tensor:
        output = torch.tanh(x @ self.weight)
        self.mean = 0.9 * self.mean + 0.1 * output.detach().mean(0)
        self.calls += 1
        return output


class TwoNames(nn.Module):
    """One layer under two names, whose weight is also used by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))
        self.same = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * self.scale + nn.functional.linear(x, self.same.weight)


def test_modules_that_change_themselves_and_layers_of_two_names() -> None:
    torch.manual_seed(0)
    for module in (Running(), TwoNames()):
        model, x = Loss(module).double(), images(12, 4) - 0.5
        g = by_hand(model, x)
        found = tracin(model, x, num_samples=1, uncovered="materialise")
        for _ in range(2):
            torch.testing.assert_close(found.influence(x[:3]), g[:3] @ g.T, rtol=1e-9, atol=1e-9)
    sparse = Loss(nn.Embedding(5, 3, sparse=True), Rounded()).double()
    tokens = images(9, 4)
    h = by_hand_dense(sparse, tokens)
    torch.testing.assert_close(tracin(sparse, tokens, num_samples=1).influence(tokens), h @ h.T)


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (4 * x).long()


def by_hand_dense(model: nn.Module, x: Tensor) -> Tensor:
    grads = [torch.autograd.grad(model(each).sum(), list(model.parameters()))[0] for each in x.split(1)]
    return torch.stack([grad.to_dense().flatten() for grad in grads]).cpu()


@pytest.mark.parametrize("dtype", [torch.cfloat, torch.bfloat16])
def test_other_precisions_are_refused(dtype: torch.dtype) -> None:
    model = Loss(nn.Linear(4, 3, dtype=dtype))
    with pytest.raises(
        TypeError, match=r"TracIn: model: expected parameters in float32 or float64, .* 'layer.weight'"
    ):
        tracin(model, images(4, 4).to(dtype))


class Routed(nn.Module):
    """A layer without a rule for the samples of one class alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.special = nn.Linear(4, 4), Scale()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        rows = (x[:, 0] > 0).nonzero()[:, 0]
        return h.index_put((rows,), self.special(h[rows])).square().sum(1)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale)


def test_rows_that_are_chosen_for_a_module_without_a_rule() -> None:
    torch.manual_seed(0)
    model = Routed().double()
    every, some = images(9, 4), images(12, 4) - 0.5
    found = tracin(model, every, num_samples=2, layers=["special"])
    assert found.influence(every).isfinite().all()
    with pytest.raises(ValueError, match=r"special: expected 1 rows a sample, .* of rows that are chosen"):
        found.influence(some)
    g = by_hand(model, some)
    exact = tracin(model, some, num_samples=1, uncovered="materialise").influence(some)
    torch.testing.assert_close(exact, g @ g.T, rtol=1e-9, atol=1e-9)


class Sorted(nn.Module):
    """Rows in another order, which the first samples, being equal, do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(stable=True)
        return self.layer(x[order])[order.argsort()].square().sum(1)


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: TensorDataset(x), lambda x: DataLoader(TensorDataset(x), 3)],
    ids=["tensor", "dataset", "loader"],
)
def test_samples_of_all_parts_are_compared(wrap: Callable[[Tensor], object]) -> None:
    torch.manual_seed(0)
    model, x = Sorted().double(), images(20, 4)
    x[:10, 0] = 0
    g = by_hand(model, x)
    found = tracin(model, wrap(x), num_samples=1, uncovered="materialise").influence(x)
    torch.testing.assert_close(found, g @ g.T, rtol=1e-9, atol=1e-9)


class StepsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        return self.layer(x.transpose(0, 1).reshape(t * b, 4)).view(t, b, 2).sum(0).square().sum(1)


def test_one_sample_does_not_decide_where_samples_are() -> None:
    torch.manual_seed(0)
    model, x = StepsFirst().double(), images(4, 5, 4)
    squares = by_hand(model, x).square().sum(1)
    found = tracin(model, None, num_samples=1, uncovered="materialise")
    torch.testing.assert_close(found.self_influence(x[:1]), squares[:1])
    torch.testing.assert_close(found.self_influence(x), squares)
    model = nn.Sequential(Scale(), StepsFirst()).double()
    alone = tracin(model, x[:1], num_samples=1).self_influence()
    torch.testing.assert_close(alone, by_hand(model, x[:1]).square().sum(1))


class MaskedByParent(nn.Module):
    """Its child is told by attribute what a whole batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Masking()

    def forward(self, x: Tensor) -> Tensor:
        positive = x[:, :1] > 0
        self.inner.mask = None if bool(positive.all()) else positive.double()
        return self.inner(x).square().sum(1)


class Masking(nn.Module):
    mask: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x * self.scale)
        return h if self.mask is None else h * self.mask


def test_what_a_whole_batch_leaves_in_a_module_is_noticed() -> None:
    torch.manual_seed(0)
    model, x = MaskedByParent().double(), images(20, 4) - 0.5
    g = by_hand(model, x)
    found = tracin(model, x, num_samples=1, uncovered="materialise").influence(x)
    torch.testing.assert_close(found, g @ g.T, rtol=1e-9, atol=1e-9)
    late = tracin(model, x.abs(), num_samples=1)
    assert late.influence(x.abs()).isfinite().all()
    with pytest.raises(ValueError, match="one sample alone gives a result of another shape"):
        late.influence(x)


class TwoPrecisions(nn.Module):
    """A layer in float64 in front of one in float32, or in another type; the first one's output may be off a little."""

    def __init__(self, of_last: torch.dtype = torch.float32, off: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 3).to(of_last)
        self.of_last, self.off = of_last, off

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.double())) * (1 + self.off * len(x))
        return self.last(h.to(self.of_last))


def test_parameters_of_two_dtypes() -> None:
    torch.manual_seed(0)
    model, x, y = TwoPrecisions(), torch.randn(5, 4), torch.randn(5, 3)
    rows = []
    for sample, target in zip(x.split(1), y.split(1), strict=True):
        gradients = torch.autograd.grad((model(sample) - target).square().sum(), list(model.parameters()))
        rows.append(torch.cat([gradient.flatten().double() for gradient in gradients]))
    expected = (torch.stack(rows) @ torch.stack(rows).T).cpu()
    found = TracIn(model, (x, y), None, loss_fn=lambda output, y: (output - y).square().sum(1))
    # Of float32, in which half of the network is.
    torch.testing.assert_close(found.influence((x, y)).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.self_influence().double(), expected.diag(), rtol=1e-5, atol=1e-5)


def test_what_rounds_in_one_layer_is_no_error_of_another() -> None:
    """Kernels may round a batch otherwise than its samples, as coarsely as the coarsest parameters do."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 4), torch.randn(5, 3)

    def influence(of_last: torch.dtype, off: float) -> Tensor:
        model = TwoPrecisions(of_last, off)
        found = TracIn(model, (x, y), None, loss_fn=lambda output, y: (output - y).square().sum(1))
        return found.influence((x, y))

    assert influence(torch.float32, 1e-6).isfinite().all()
    for of_last, off in ((torch.float64, 1e-6), (torch.float32, 1e-2)):
        with pytest.raises(UncoveredParameter, match="is off by"):
            influence(of_last, off)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_compiled_network_of_ours_is_swept_like_the_module_inside(part: str) -> None:
    """A swept network names its tensors without torch.compile's part of their path."""
    torch.manual_seed(0)
    model = VAE(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
        nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 6)),
    )
    x = images(7, 6)
    plain = tracin(model, x, num_samples=2)
    expected, coverage = plain.influence(x[:3]), str(plain.coverage())
    setattr(model, part, torch.compile(getattr(model, part), backend="eager"))
    compiled = tracin(model, x, num_samples=2)
    torch.testing.assert_close(compiled.influence(x[:3]), expected)
    assert str(compiled.coverage()).replace("_orig_mod.", "").split() == coverage.split()


class Outside(nn.Module):
    """Holds its encoder, and reaches for the one in a closure; in a set nobody finds that for a copy."""

    def __init__(self, holder: type) -> None:
        super().__init__()
        self.encoder = inner = nn.Linear(6, 2)
        self.loss = holder([lambda x: inner(x)])

    def forward(self, x: Tensor) -> Tensor:
        return next(iter(self.loss))(x).square().sum(1)


@pytest.mark.parametrize("uncovered", ["error", "materialise"])
def test_a_loss_of_other_weights_than_the_models_is_refused(uncovered: str) -> None:
    """It was an IndexError, and scores of zero where everything was materialised."""
    x = images(7, 6)
    check("held", Outside(list), x, x[:2])
    with pytest.raises(ValueError, match="depends on none of them: scores work on a copy"):
        tracin(Outside(frozenset).double(), x, uncovered=uncovered).influence(x[:2])


@pytest.mark.parametrize("uncovered", ["error", "materialise"])
@pytest.mark.parametrize("kind", [VAE, HVAE])
def test_a_layer_that_encoder_and_decoder_share(kind: type[VAE], uncovered: str) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 5)
    encoder = nn.Sequential(shared, nn.Tanh(), nn.Linear(5, 4))
    decoder = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), shared, nn.Tanh(), nn.Linear(5, 6))
    model = kind(encoder, decoder, **({"num_steps": 2} if kind is HVAE else {})).double()
    x = images(7, 6)
    found = tracin(model, x, uncovered=uncovered, num_samples=2)
    if kind is HVAE and uncovered == "error":
        with pytest.raises(UncoveredParameter):
            found.influence(x[:2])
        return
    gradients = vae_gradients(model, x, 2).mean(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.testing.assert_close(
            found.influence(x[:2]), gradients[:2] @ gradients.T, rtol=1e-10, atol=1e-10
        )

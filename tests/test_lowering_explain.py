"""What explain and the refusals say: the line that stopped the reading, and what the operators then do."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae import Network, ops
from fastvae.lowering import CoupledSamples, UnsupportedLayer, explain, lower


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)


class Residual(Base):
    def forward(self, z: Tensor) -> Tensor:
        h = self.first(z)
        h = h + torch.tanh(h)  # the line that stops it
        return self.second(h)


class Conditional(Base):
    def forward(self, z: Tensor) -> Tensor:
        h = self.first(z)
        if h.sum() > 0:  # the line that stops it
            h = torch.tanh(h)
        return self.second(h)


class Attending(Base):
    def forward(self, z: Tensor) -> Tensor:
        h = self.first(z)[:, None]
        return self.second(
            F.scaled_dot_product_attention(h, h, h)[:, 0]  # the line that stops it
        )


class Normalised(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.first(z))
        return self.second(self.norm(h))  # the line that stops it


class Pair(Base):
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(z)
        return self.second(h), h


class Named(Base):
    def forward(self, z: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": self.second(self.first(z))}


class TwoInputs(Base):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.second(self.first(z) + y)


@pytest.mark.filterwarnings("ignore:.*cannot be lowered")
@pytest.mark.parametrize("kind", [Residual, Conditional, Attending, Normalised])
def test_the_line_that_stops_the_reading_is_named(kind: type[nn.Module]) -> None:
    lines, start = inspect.getsourcelines(kind)
    offset = next(at for at, line in enumerate(lines) if "stops it" in line)
    where = f"test_lowering_explain.py, line {start + offset}: {lines[offset].strip()}"
    table = explain(kind())
    assert where in table
    assert "through autograd" in table and "if not, they say what is missing" in table
    with pytest.raises(UnsupportedLayer) as caught:
        lower(kind())
    assert where in str(caught.value)
    assert ops.jacobian_l1(kind(), torch.randn(2, 3)).isfinite()


@pytest.mark.parametrize("kind", [Pair, Named, TwoInputs])
def test_what_no_operator_takes_is_refused_at_once(
    kind: type[nn.Module], recwarn: pytest.WarningsRecorder
) -> None:
    table = explain(kind())
    assert "No operator takes it" in table and "through autograd" not in table
    z = torch.zeros(2, 3)
    for call in (
        lambda m: ops.jacobian_l1(m, z),
        lambda m: ops.log_px(m, z[None], torch.zeros(2, 4), "gaussian"),
        lambda m: ops.hamiltonian_flow(m, z, z, torch.zeros(2, 4), 0.1, torch.ones(1), "gaussian"),
    ):
        with pytest.raises(
            UnsupportedLayer, match=r"returns a (tuple|dict), expected one tensor|needs y beside"
        ):
            call(kind())
    assert not [warning for warning in recwarn if "lowered" in str(warning.message)]


def test_a_tuple_that_the_next_module_takes_works() -> None:
    class Second(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return torch.sin(pair[0])

    module = nn.Sequential(Pair(), Second())
    assert "through autograd" in explain(module)
    assert ops.jacobian_l1(module, torch.randn(2, 3)).isfinite()


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_network() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    table = explain(torch.ao.quantization.quantize_dynamic(network, {nn.Linear}))
    assert "has no derivative: log_px runs it" in table


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6, track_running_stats=False).eval(),
        nn.Dropout(0.5),
        nn.Sequential(nn.Unflatten(1, (1, 6)), nn.LSTM(6, 6, 2, dropout=0.5, batch_first=True)),
        nn.Sequential(nn.Unflatten(1, (1, 6)), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
    ],
    ids=["batch norm", "batch norm without statistics", "dropout", "lstm", "transformer"],
)
def test_coupled_samples_raise_behind_a_layer_that_is_not_lowered(layer: nn.Module) -> None:
    """The reading stops at the LayerNorm; autograd then gave the gradient of coupled samples without a word."""
    module = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), layer)
    z = torch.zeros(2, 3)
    with pytest.raises(CoupledSamples, match=r"switch the module to eval\(\)"):
        ops.jacobian_l1(module, z)
    with pytest.raises(CoupledSamples):
        ops.hamiltonian_flow(module, z, z, torch.zeros(2, 6), 0.1, torch.ones(1), "gaussian")
    with pytest.raises(CoupledSamples):
        ops.log_px(module, z[None], torch.zeros(2, 6), "gaussian")


class Branches(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * 2 if z.sum() > 0 else z


class OfFour(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.view(4, 3).sin()


class Averages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, z: Tensor) -> Tensor:
        self.mean.lerp_(z.detach().mean(0), 0.1)
        return z.sin()


class Draws(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z + torch.randn_like(z)


class Ranks(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z - z.kthvalue(2, dim=1, keepdim=True).values


UNREAD: dict[type[nn.Module], str] = {
    Branches: r"asks for a number that is computed from its input.*explain\.py, line \d+: return z \* 2 if",
    OfFour: r"raised RuntimeError of a batch of 2.*invalid for input of size 6 \(.*: return z\.view\(4, 3\)",
    Averages: r"changes buffers of the module \(1\.mean\)",
    Draws: r"draws random numbers.*\(.*explain\.py, line \d+: return z \+ torch\.randn_like",
    Ranks: r"Opaque.*kthvalue\.\n  kthvalue: .*explain\.py, line \d+: return z - z\.kthvalue",
}


@pytest.mark.parametrize("kind", UNREAD)
def test_the_line_that_stops_a_graph_is_named(kind: type[nn.Module]) -> None:
    module = nn.Sequential(nn.Linear(3, 3), kind(), nn.Linear(3, 4))
    torch.manual_seed(0)
    text = Network(module, z=torch.randn(4, 3)).explain()
    assert re.search(UNREAD[kind], text), text


def test_a_module_without_shapes_is_explained() -> None:
    assert "is lazy" in explain(nn.Sequential(nn.LazyLinear(4)))

"""fastvae.Network: what it says of a module, what it computes, and that it sees when a reading no longer holds."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flow_problems import Residual, mlp, seeded
from layer_kinds import Around, Call, Wave
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastvae
from fastvae import Network, ops
from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood
from fastvae.lowering import CoupledSamples, UnsupportedLayer
from fastvae.network import cache
from fastvae.network.cache import read_network
from fastvae.network.table import lines_of
from fastvae.private import private_copy

Z = torch.zeros(1, 3, dtype=torch.float64)


def unreadable() -> nn.Module:
    """What it does depends on numbers, which no graph of operations has."""
    return Around(Call(lambda h: torch.sin(h) if h.sum() < 1e9 else h), (6,)).double()


class OwnDensity(Likelihood):
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -(params - x).abs().pow(3).sum(1)


# --- what it says


def test_a_lowered_network() -> None:
    network = Network(seeded(mlp(4)), "gaussian", z=Z)
    table = network.explain()
    assert network.lowered == 1.0 and network.opaque == ()
    assert (
        "Run by kernels in hamiltonian_flow" in table and "by sweeps in PyTorch in log_px_and_force" in table
    )
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["operation", "kind", "rule", "sample"]
    assert lines[1] == ["linear", "linear", "LinearLayer", "[11]"]
    assert lines[2][:2] == ["tanh", "tanh"] and lines[2][-1] == "[11]"
    assert "100.0% of a sample's" in table and "Opaque" not in table


def test_a_network_in_sweeps() -> None:
    network = Network(seeded(Residual(3, 4)), z=Z)
    table = network.explain()
    assert network.lowered == 1.0 and network.opaque == ()
    assert (
        "Run by sweeps in PyTorch. lower: " in table
        and "h + torch.sin(h)" in table
        and "kernels in" not in table
    )
    assert [line.split()[1] for line in table.splitlines()[1:6]] == ["linear", "tanh", "sin", "add", "linear"]


def test_a_likelihood_without_a_kernel() -> None:
    table = Network(seeded(mlp(4)), OwnDensity(), z=Z).explain()
    assert "Run by sweeps in PyTorch. OwnDensity is a likelihood without a kernel" in table


def test_what_is_opaque() -> None:
    network = Network(Around(Call(torch.special.erfcx), (6,)).double(), z=Z)
    assert network.opaque == ("special_erfcx",)
    # Multiplications and additions, and tanh; and as many values of what no rule knows.
    assert network.lowered == pytest.approx((2 * 3 * 6 + 6) / (2 * 3 * 6 + 6 + 6))
    table = network.explain()
    assert "Opaque, each through autograd by itself: special_erfcx." in table
    (line,) = [line for line in table.splitlines() if line.startswith("special_erfcx")]
    assert line.split() == ["special_erfcx", "special_erfcx", "autograd", "[6]"]


@pytest.mark.parametrize("step", [Wave.apply, lambda h: Wave.apply(h)], ids=["kept", "looked up"])
def test_a_function_of_ones_own_is_opaque_by_its_name(step: Callable[[Tensor], Tensor]) -> None:
    network = Network(Around(Call(step), (6,)).double(), z=Z)
    assert network.opaque == ("Wave",)


def test_computed_weights_are_told_apart() -> None:
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)), nn.LayerNorm(8), nn.GELU())
    table = Network(module, z=Z.float()).explain()
    assert any("PyTorch, once a call" in line and line.endswith("[8, 3]") for line in table.splitlines())
    fused = [line.split()[0] for line in table.splitlines() if ", fused" in line]
    assert fused == ["layer_norm", "gelu"]


def test_what_cannot_be_read() -> None:
    network = Network(unreadable(), z=Z)
    assert network.lowered == 0.0 and network.opaque == ("(itself)",)
    assert "Not read as a graph: torch.export cannot run its forward" in network.explain()


def test_questions_before_there_are_codes() -> None:
    network = Network(seeded(mlp(4)), "gaussian")
    for ask in (lambda: network.lowered, lambda: network.opaque, network.verify):
        with pytest.raises(ValueError, match=r"fastvae\.Network: z: expected codes first"):
            ask()
    assert "Not read as a graph yet" in network.explain()
    network.force(Z, torch.zeros(1, 4, dtype=torch.float64))
    assert network.lowered == 1.0 and "LinearLayer" in network.explain()


def test_explain_of_lowering_says_what_happens_then() -> None:
    table = fastvae.lowering.explain(Residual(3, 4))
    assert "read its forward as a graph of operations instead and sweep that in PyTorch" in table
    assert "What cannot be read goes through autograd" in table


def attended(h: Tensor) -> Tensor:
    rows = h.reshape(-1, 3, 4)
    return F.scaled_dot_product_attention(rows, rows, rows).flatten(1)


COUNTED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 7),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 1, 1)),
        nn.Upsample(9),
        nn.Conv2d(3, 6, (3, 2), 2, 1, (2, 1), groups=3, bias=False),
    ),
    "transposed": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 1)), nn.Upsample(5), nn.ConvTranspose1d(3, 6, 4, 3, 1, 1, groups=3)
    ),
    "product": lambda: nn.Sequential(
        nn.Linear(3, 12), nn.Unflatten(1, (4, 3)), Call(lambda h: h @ h.transpose(1, 2)), nn.Flatten()
    ),
    "attention": lambda: nn.Sequential(nn.Linear(3, 12), Call(attended)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_of_products_as_torch_counts_them(name: str) -> None:
    module = COUNTED[name]()
    counted = FlopCounterMode(display=False)
    with counted, torch.no_grad():
        module(torch.zeros(1, 3))
    lines = lines_of(read_network(module, torch.zeros(2, 3)), torch.zeros(2, 3))
    ours = [
        line
        for line in lines
        if line.kind in ("linear", "matmul", "mm", "bmm") or line.kind.startswith("conv")
    ]
    ours += [line for line in lines if "attention" in line.kind]
    assert sum(line.flops for line in ours) == counted.get_total_flops() > 0


# --- what it computes


@pytest.mark.parametrize("likelihood", [Bernoulli(), Bernoulli(probs=True), Gaussian(0.7), OwnDensity()])
@pytest.mark.parametrize("decoder", [mlp, lambda outputs: Residual(3, outputs)], ids=["mlp", "residual"])
def test_log_px_and_force(decoder: Callable[[int], nn.Module], likelihood: Likelihood) -> None:
    module = decoder(4)
    module = seeded(nn.Sequential(module, nn.Sigmoid()) if likelihood.probs else module)
    z = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    x = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    network = Network(module, likelihood)
    log_px, (same, force) = network.log_px(z, x), network.force(z, x)
    wanted = likelihood.log_prob_of_output(module(z), x)
    torch.testing.assert_close(log_px, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same, wanted, rtol=1e-12, atol=1e-12)
    for value in (log_px, wanted):
        (gradient,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
        torch.testing.assert_close(force, gradient, rtol=1e-11, atol=1e-12)


def test_without_a_likelihood() -> None:
    network = Network(seeded(mlp(4)), z=Z)
    for method in ("log_px", "force"):
        with pytest.raises(ValueError, match=rf"fastvae\.Network\.{method}: likelihood: expected one"):
            getattr(network, method)(Z, Z)


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"fastvae\.Network: module must be an nn\.Module"):
        Network(lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="likelihood: expected one of"):
        Network(mlp(4), "poisson")
    for z, words in ((Z[0], "codes"), (Z.long(), "codes")):
        with pytest.raises(ValueError, match=words):
            Network(mlp(4), z=z)
    with pytest.raises(TypeError, match="z: expected a tensor, got list"):
        Network(mlp(4), z=[[0.0]])  # type: ignore[arg-type]
    with pytest.raises(CoupledSamples):
        Network(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "gaussian").log_px(
            Z.float(), torch.zeros(1, 4)
        )


def test_it_follows_its_module_and_copies_nothing() -> None:
    module = seeded(mlp(4))
    network = Network(module, "gaussian", z=Z)
    x = torch.zeros(1, 4, dtype=torch.float64)
    before = {name: (id(p), p.clone()) for name, p in module.named_parameters()}
    with torch.no_grad():
        module[0].bias.add_(1)
    torch.testing.assert_close(network.force(Z, x)[0], Gaussian().log_prob(module(Z), x))
    module[1] = nn.Softplus()
    torch.testing.assert_close(network.force(Z, x)[0], Gaussian().log_prob(module(Z), x))
    assert "softplus" in network.explain()
    assert all(before[name][0] == id(p) and p.grad is None for name, p in module.named_parameters())
    gone = weakref.ref(module[0].weight)
    del module, network, before
    gc.collect()
    assert gone() is None


def test_copies_and_pickles() -> None:
    network = Network(nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), "gaussian", z=Z)
    x = torch.zeros(1, 4, dtype=torch.float64)
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(again.force(Z, x), network.force(Z, x))
        assert again.lowered == 1.0 and again.module is not network.module


class Labelled(nn.Module):
    """Spatial codes, and a label for each."""

    def __init__(self) -> None:
        super().__init__()
        self.label, self.last = nn.Embedding(5, 3), nn.ConvTranspose2d(3, 2, 2)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.last(torch.tanh(z + self.label(label)[:, :, None, None]))


def test_a_condition_and_codes_that_are_no_vectors() -> None:
    module = Labelled().double()
    z, label = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 4, 1, 2])
    x = torch.rand(4, 2, 3, 3, dtype=torch.float64)
    network = Network(module, "gaussian", z=z, condition=label)
    z.requires_grad_()
    log_px, (same, force) = network.log_px(z, x, condition=label), network.force(z, x, condition=label)
    wanted = Gaussian().log_prob(module(z, label), x)
    torch.testing.assert_close(log_px, wanted)
    torch.testing.assert_close(same, wanted)
    torch.testing.assert_close(force, torch.autograd.grad(wanted.sum(), z)[0])
    assert network.lowered == 1.0 and "It takes a condition" in network.explain()
    network.verify()
    network.verify(z, condition=label)


# --- verify

_slope = np.array([1.0])


class Global(nn.Module):
    """It reads what no module holds."""

    def __init__(self, lowered: bool) -> None:
        super().__init__()
        self.inner, self.is_lowered = nn.Linear(3, 4), lowered

    def forward(self, z: Tensor) -> Tensor:
        h = F.leaky_relu(self.inner(z), float(_slope[0]))
        return h if self.is_lowered else torch.sin(h)


@pytest.mark.parametrize("lowered", [True, False])
def test_verify_finds_a_global_that_has_changed(lowered: bool) -> None:
    _slope[:] = 0.2
    torch.manual_seed(
        144
    )  # at two codes drawn without their opposites, all units were on one side of the kink
    module = Global(lowered).double()
    network, x = Network(module, "gaussian", z=Z), torch.zeros(3, 4, dtype=torch.float64)
    z = torch.randn(3, 3, dtype=torch.float64)
    network.force(z, x)
    fastvae.ops.jacobian_l1(module, z)
    network.verify()
    network.verify(z)
    _slope[:] = 0.7  # another number in the same array, at which nobody looks
    with pytest.raises(UnsupportedLayer, match="network read from it"):
        network.verify()
    torch.testing.assert_close(network.force(z, x)[0], Gaussian().log_prob(module(z), x))
    jacobian = torch.func.vmap(torch.func.jacrev(module))(z).abs().sum((1, 2)).mean()
    torch.testing.assert_close(fastvae.ops.jacobian_l1(module, z), jacobian)
    network.verify()


def test_verify_of_what_cannot_be_read() -> None:
    with pytest.raises(UnsupportedLayer, match=r"torch\.export cannot run"):
        Network(unreadable(), z=Z).verify()
    with pytest.raises(CoupledSamples):
        Network(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), z=Z.float()).verify()


def test_in_inference_mode() -> None:
    module, z = Residual(3, 4).double(), torch.randn(2, 3, dtype=torch.float64)
    with torch.inference_mode():
        network = Network(module, "gaussian", z=z * 1)
        network.verify(z * 1)
        assert network.lowered == 1.0 and "sin" in network.explain()
        found = network.log_px(z * 1, torch.zeros(2, 4, dtype=torch.float64))
    torch.testing.assert_close(found, Gaussian().log_prob(module(z), torch.zeros(2, 4)).detach())


def test_private_copies_share_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each score works on copies of its own; reading every one of them would take a second each."""
    read: list[nn.Module] = []
    own = cache.read_program

    def counted(module: nn.Module, *args: Any, **options: Any) -> Any:
        read.append(module)
        return own(module, *args, **options)

    monkeypatch.setattr(cache, "read_program", counted)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5)))
    z = torch.randn(2, 3)
    model.train()
    found = [ops.jacobian_l1(private_copy(model)[0], z) for _ in range(3)]
    assert len(read) == 1 and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with torch.no_grad():
        model[0][0].weight.mul_(2)
    again = private_copy(model)[0]
    assert torch.equal(ops.jacobian_l1(again, z), ops.jacobian_l1(model[0].eval(), z))
    assert not torch.equal(ops.jacobian_l1(again, z), found[0]) and len(read) == 2

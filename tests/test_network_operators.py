"""hamiltonian_flow and jacobian_l1 of a decoder that is read as a graph: edges, and errors that say what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_problems import check_against_reference
from flow_problems import problem as flow_problem
from jacobian_problems import gradients
from network_problems import codes
from torch import Tensor, nn

from fastvae import ops, reference
from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood
from fastvae.network.cache import ReadNetwork, read_network

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be lowered")


class Sine(nn.Module):
    """Read as a graph and not lowered, because of the sine."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, outputs)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.first(z))
        return self.last(self.norm(h + h.sin()))


def sine() -> nn.Module:
    torch.manual_seed(0)
    module = Sine().double()
    assert isinstance(read_network(module, codes()), ReadNetwork)
    return module


def flow(module: nn.Module, z: Tensor, **changed: Any) -> tuple[Tensor, ...]:
    return ops.hamiltonian_flow(module, z, **arguments_of(z, **changed))


def arguments_of(z: Tensor, **changed: Any) -> dict[str, Any]:
    return {
        "rho": torch.ones_like(z),
        "x": torch.zeros(len(z), 4).to(z),
        "step_size": 0.1,
        "alpha": z.new_ones(2),
        "likelihood": "gaussian",
        **changed,
    }


@pytest.mark.parametrize("memory", ["store", "recompute", "auto"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_gradients_to_everything(likelihood: str, memory: str) -> None:
    check_against_reference(flow_problem(Sine(), likelihood), torch.device("cpu"), memory=memory)


@pytest.mark.parametrize(
    "names",
    [["z"], ["rho"], ["x"], ["alpha"], ["step_size"], ["first.weight"], ["norm.bias", "last.weight"], []],
)
def test_gradients_to_some(names: list[str]) -> None:
    for memory in ("store", "recompute"):
        check_against_reference(flow_problem(Sine()), torch.device("cpu"), names=names, memory=memory)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3), (1, 1), (1, 3)])
def test_step_sizes_of_all_shapes(shape: tuple[int, ...]) -> None:
    module, z = sine(), codes()
    results = []
    for function in (ops.hamiltonian_flow, reference.hamiltonian_flow):
        step = (
            torch.linspace(0.05, 0.2, torch.Size(shape).numel(), dtype=z.dtype)
            .reshape(shape)
            .requires_grad_()
        )
        outputs = function(module, z, 0.5 * z, torch.zeros(3, 4).to(z), step, z.new_ones(2), "gaussian")
        (gradient,) = torch.autograd.grad(sum(output.sin().sum() for output in outputs), step)
        results.append((*outputs, gradient))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 3, 1), (2, 1, 2), (2, 3, 2), (3, 2), (1, 3, 2), (2, 6)])
def test_step_sizes_of_codes_of_two_dimensions(shape: tuple[int, ...]) -> None:
    """What does not name every number is broadcast, as it would be written out."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Mish(), nn.Linear(5, 4)).double()
    z = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 3, 2)
    step = torch.linspace(0.05, 0.2, torch.Size(shape).numel(), dtype=z.dtype).view(shape).requires_grad_()
    whole = step.view(2, 3, 2) if shape == (2, 6) else step.expand(2, 3, 2)
    results = []
    for given in (step, whole):
        outputs = ops.hamiltonian_flow(module, z, 0.5 * z, torch.zeros(4, 4).to(z), given, z.new_ones(2))
        results.append((*outputs, *torch.autograd.grad(sum(output.sin().sum() for output in outputs), step)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_no_step_at_all() -> None:
    module, z = sine(), codes().requires_grad_()
    z_K, rho_K, log_px = flow(module, z, alpha=z.new_ones(0))
    path = ops.trajectory(module, z, **arguments_of(z, alpha=z.new_ones(0)))
    assert torch.equal(z_K, z)
    assert torch.equal(rho_K, torch.ones_like(z))
    assert path.z.shape == (1, 3, 3)
    wanted = Gaussian().log_prob(module(z), torch.zeros(3, 4).to(z))
    torch.testing.assert_close(
        gradients(log_px, module, z), gradients(wanted, module, z), rtol=1e-10, atol=1e-12
    )


def test_no_sample_and_no_latent() -> None:
    module, z = sine(), codes().requires_grad_()
    assert [part.shape for part in flow(module, z[:0])] == [(0, 3), (0, 3), (0,)]
    assert ops.jacobian_l1(module, z[:0], "none").shape == (0,)
    for p in (1, 2):
        nothing = ops.jacobian_l1(module, z, latents=[], p=p)
        assert nothing == 0
        assert not any(gradient.any() for gradient in gradients(nothing, module, z).values())


def test_codes_that_are_no_numbers_stay_alone() -> None:
    module, z = sine(), codes()
    z[1] = float("nan")
    for found in (ops.jacobian_l1(module, z, "none"), flow(module, z)[2]):
        assert found.isnan().tolist() == [False, True, False]


REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], object], type[Exception], str]] = {
    "x, too wide": (
        lambda m, z: flow(m, z, x=torch.zeros(3, 7).to(z)),
        ValueError,
        r"x: 7 elements a sample need 7 decoder outputs, got x \[3, 7\]",
    ),
    "x, too few": (lambda m, z: flow(m, z, x=torch.zeros(2, 4).to(z)), ValueError, r"x: expected 3 samples"),
    "x, elsewhere": (
        lambda m, z: flow(m, z, x=torch.zeros(3, 4, device="meta")),
        ValueError,
        r"fastvae::hamiltonian_flow: x: expected \S+ as z, got \[3, 4\] on meta",
    ),
    "rho": (lambda m, z: flow(m, z, rho=z[:2]), ValueError, r"rho: expected torch.float64 \[3, 3\] as z"),
    "alpha": (lambda m, z: flow(m, z, alpha=z), ValueError, r"alpha: expected shape \[K\], got \[3, 3\]"),
    "step_size": (
        lambda m, z: flow(m, z, step_size=z.new_ones(2)),
        ValueError,
        r"step_size: expected a number",
    ),
    "z, one row": (lambda m, z: flow(m, z[0]), ValueError, r"z: expected shape \[B, d\], got \[3\]"),
    "memory": (lambda m, z: flow(m, z, memory="none"), ValueError, r"memory: expected 'auto', 'store' or"),
    "latents": (lambda m, z: ops.jacobian_l1(m, z, latents=[3]), ValueError, r"latents"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_came(name: str) -> None:
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        call(sine(), codes())


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_second_derivative_of_the_jacobian_is_refused(reduction: str) -> None:
    """It was a gradient without a graph: a penalty on it lost its terms in silence."""
    module, z = sine(), codes().requires_grad_()
    found = torch.autograd.grad(
        ops.jacobian_l1(module, z, reduction).sum(),
        [z, *module.parameters()],
        create_graph=True,
        allow_unused=True,
    )
    for gradient in found:
        if gradient is not None:
            with pytest.raises(
                NotImplementedError, match=r"second derivative.*use fastvae\.reference\.jacobian_l1"
            ):
                gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_a_second_derivative_of_the_flow_is_refused(memory: str) -> None:
    module, z = sine(), codes().requires_grad_()
    loss = sum(part.sum() for part in flow(module, z, memory=memory))
    found = torch.autograd.grad(loss, [z, *module.parameters()], create_graph=True)
    for gradient in found:
        with pytest.raises(
            NotImplementedError, match=r"second derivative.*use fastvae\.reference\.hamiltonian_flow"
        ):
            (loss + gradient.sum()).backward(retain_graph=True)
    plain = torch.autograd.grad(flow(module, z, memory=memory)[2].sum(), z)[0]
    assert not plain.requires_grad


def test_weights_changed_before_the_backward_pass_are_noticed() -> None:
    """By PyTorch, as for any other operator; the gradient at other weights was handed out."""
    module, z = sine(), codes().requires_grad_()
    for function in (lambda: flow(module, z)[2].sum(), lambda: ops.jacobian_l1(module, z, "none").sum()):
        value = function()
        with torch.no_grad():
            module.last.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


def test_a_backward_pass_twice() -> None:
    module, z = sine(), codes().requires_grad_()
    for memory in ("store", "recompute"):
        value = flow(module, z, memory=memory)[2].sum()
        first, second = (torch.autograd.grad(value, z, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_a_frozen_decoder_gets_no_gradient() -> None:
    module, z = sine().requires_grad_(False), codes()
    assert not flow(module, z)[2].requires_grad
    assert not ops.jacobian_l1(module, z).requires_grad
    z.requires_grad_()
    value = flow(module, z)[2].sum() + ops.jacobian_l1(module, z)
    value.backward()
    assert z.grad is not None
    assert all(parameter.grad is None for parameter in module.parameters())


def test_weight_gradients_are_formed_where_they_are_wanted() -> None:
    """Of a layer trained in part, and never of a frozen one."""
    module = sine()
    module.first.weight.requires_grad_(False)
    module.last.requires_grad_(False)
    network = read_network(module, codes())
    trained = [t for t in network.tensors if t is not None and t.requires_grad]
    assert {id(t) for t in trained} == {id(p) for p in module.parameters() if p.requires_grad}
    z = codes().requires_grad_()
    for function in (ops.jacobian_l1, reference.jacobian_l1):
        found = gradients(function(module, z, "none"), module, z)
        assert set(found) == {"z", "first.bias", "norm.weight", "norm.bias"}


class Mixed(Likelihood):
    """A likelihood of one's own, in plain PyTorch."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -(params - x).abs().add(1).log().flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return params


@pytest.mark.filterwarnings("ignore:.*likelihood of its own")
@pytest.mark.parametrize(
    "likelihood", [Bernoulli(), Gaussian(0.3), Mixed()], ids=lambda like: type(like).__name__
)
def test_data_of_other_kinds(likelihood: Likelihood) -> None:
    module, z = sine(), codes()
    x = torch.tensor([[0, 1, 1, 0]] * 3)
    kinds = (
        (x.bool(), x.float(), x.double(), x.double().view(3, 2, 2))
        if not isinstance(likelihood, Mixed)
        else (x.double(),)
    )
    for data in kinds:
        found = flow(module, z, x=data, likelihood=likelihood)
        wanted = reference.hamiltonian_flow(
            module, z, torch.ones_like(z), data, 0.1, z.new_ones(2), likelihood
        )
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

"""What hamiltonian_flow refuses, and the words in which it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from flow_problems import MEMORY, Problem, Residual, conv, mlp, problem
from layer_kinds import Around, Call
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastvae import ops
from fastvae.likelihoods import Bernoulli, Categorical
from fastvae.lowering import CoupledSamples

each_memory = pytest.mark.parametrize("memory", MEMORY)


# Which leaves require a gradient: all, the flow's inputs (frozen decoder), one alone.
@pytest.mark.parametrize(
    "names",
    [None, ["z", "rho"], ["alpha"], ["step_size"], ["0.weight"]],
    ids=["all", "frozen", "alpha", "step", "w"],
)
@each_memory
def test_second_derivative_raises(names: list[str] | None, memory: str, device: torch.device) -> None:
    p = problem().to(device).require(names)
    leaves = [leaf for leaf in p.leaves().values() if leaf.requires_grad]
    loss = sum(out.square().sum() for out in p.run(memory=memory))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    for gradient in first:
        with pytest.raises(NotImplementedError, match=r"fastvae::hamiltonian_flow.*fastvae\.reference"):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)


def test_gradient_of_a_gradient_in_its_cotangent_raises(device: torch.device) -> None:
    """The product of a vector and the Jacobian is linear in the vector, and still refuses."""
    p = problem().to(device).require(["z"])
    out = p.run()[0]
    v = torch.ones_like(out, requires_grad=True)
    (product,) = torch.autograd.grad(out, p.z, v, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"fastvae\.reference"):
        torch.autograd.grad(product.sum(), v)


@pytest.mark.parametrize("name", ["z", "rho", "x", "step_size", "alpha", "0.weight"])
def test_forward_mode_raises(name: str, device: torch.device) -> None:
    p = problem().to(device)
    with forward_ad.dual_level():
        leaf = p.leaves()[name]
        dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
        if name == "0.weight":
            del p.decoder[0].weight
            p.decoder[0].weight = dual
        else:
            p = replace(p, **{name: dual})
        with pytest.raises(NotImplementedError, match=r"fastvae::hamiltonian_flow.*fastvae\.reference"):
            p.run()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "vmap": lambda f, z: torch.func.vmap(f)(torch.stack([z, z])),
    "grad": lambda f, z: torch.func.grad(lambda z: f(z).sum())(z),
    "vjp": lambda f, z: torch.func.vjp(f, z),
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (z,)),
    "jacrev": lambda f, z: torch.func.jacrev(f)(z),
    "hessian": lambda f, z: torch.func.hessian(lambda z: f(z).sum())(z),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["z", "rho", "alpha"])
def test_function_transforms_raise(name: str, transform: str, device: torch.device) -> None:
    p = problem().to(device)
    with pytest.raises(NotImplementedError, match=r"fastvae::hamiltonian_flow.*fastvae\.reference"):
        TRANSFORMS[transform](lambda t: replace(p, **{name: t}).run()[0], getattr(p, name))


def test_function_transform_over_parameters_raises(device: torch.device) -> None:
    p = problem().to(device)
    parameters = {name: t.detach() for name, t in p.decoder.named_parameters()}

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = p.decoder

        def forward(self) -> Tensor:
            return replace(p, decoder=self.decoder).run()[2].sum()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(Flow(), {f"decoder.{k}": v for k, v in weights.items()}, ())

    with pytest.raises(NotImplementedError, match=r"fastvae::hamiltonian_flow"):
        torch.func.grad(loss)(parameters)


def test_checks_hold_in_inference_mode(device: torch.device) -> None:
    p = problem().to(device)
    with torch.inference_mode(), pytest.raises(ValueError, match="rho: expected shape"):
        replace(p, rho=p.rho[:2]).run()


# What is wrong: the error's type, its words, and the change to a problem that is right.
ERRORS: dict[str, tuple[type[Exception], str, Callable[[Problem], Problem]]] = {
    "z_dims": (ValueError, r"z: expected shape \[B, d\], got \[3\]", lambda p: replace(p, z=p.z[0])),
    "z_half": (TypeError, r"z: expected float32 or float64, got .*Half", lambda p: p.to(dtype=torch.half)),
    "z_integer": (
        TypeError,
        r"z: expected float32 or float64, got .*Long",
        lambda p: replace(p, z=p.z.long()),
    ),
    "z_features": (
        ValueError,
        "expected 3 features",
        lambda p: replace(p, z=p.z[:, :2], rho=p.rho[:, :2], step_size=0.1),
    ),
    "rho_shape": (
        ValueError,
        r"rho: expected shape \[3, 3\], got \[2, 3\]",
        lambda p: replace(p, rho=p.rho[:2]),
    ),
    "rho_dtype": (
        TypeError,
        "rho: expected Double as z, got .*Float",
        lambda p: replace(p, rho=p.rho.float()),
    ),
    "decoder_dtype": (
        TypeError,
        "parameters: expected Float as z, got .*Double",
        lambda p: replace(p.to(dtype=torch.float32), decoder=p.decoder),
    ),
    "alpha_empty": (
        ValueError,
        r"alpha: expected shape \[K\] with K > 0, got \[0\]",
        lambda p: replace(p, alpha=p.alpha[:0], step_size=0.1),
    ),
    "alpha_scalar": (
        ValueError,
        r"alpha: expected shape \[K\]",
        lambda p: replace(p, alpha=p.alpha[0], step_size=0.1),
    ),
    "alpha_dtype": (
        TypeError,
        "alpha: expected Double as z, got .*Float",
        lambda p: replace(p, alpha=p.alpha.float()),
    ),
    "step_size_shape": (
        ValueError,
        r"step_size: expected a number, .* got \[2\]",
        lambda p: replace(p, step_size=torch.ones(2)),
    ),
    "step_size_per_step": (
        ValueError,
        r"step_size\[:, None\]",
        lambda p: replace(p, alpha=p.alpha.new_ones(5), step_size=torch.ones(5)),
    ),
    "x_samples": (
        ValueError,
        r"x: expected 3 samples as z has, got \[2, 4\]",
        lambda p: replace(p, x=p.x[:2]),
    ),
    "x_elements": (
        ValueError,
        r"x: expected shape \[3, 4\], got \[3, 2\]",
        lambda p: replace(p, x=p.x[:, :2]),
    ),
    "x_dtype": (
        ValueError,
        "x: expected uint8, bool or a floating dtype",
        lambda p: replace(p, x=p.x.long()),
    ),
    "classes": (
        ValueError,
        "divisible by the 3 classes, got 4",
        lambda p: replace(p, likelihood=Categorical(3)),
    ),
    "likelihood": (
        ValueError,
        "likelihood: expected one of .*'poisson'",
        lambda p: replace(p, likelihood="poisson"),
    ),
    "likelihood_type": (TypeError, "likelihood: expected a name", lambda p: replace(p, likelihood=3)),
    "not_a_sigmoid": (
        ValueError,
        "ends in a sigmoid",
        lambda p: replace(p, likelihood=Bernoulli(probs=True)),
    ),
    "not_a_module": (TypeError, "nn.Module", lambda p: replace(p, decoder=lambda z: z)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    kind, message, change = ERRORS[case]
    with pytest.raises(kind, match=message):
        change(problem()).run()


def test_unknown_memory() -> None:
    with pytest.raises(ValueError, match="memory: expected 'auto', 'store' or 'recompute', got 'disk'"):
        problem().run(memory="disk")


@pytest.mark.parametrize("name", ["rho", "x", "alpha"])
def test_mixed_devices(name: str) -> None:
    p = problem()
    with pytest.raises(ValueError, match=f"{name}: expected cpu as z, got .* on meta"):
        replace(p, **{name: getattr(p, name).to("meta")}).run()


@pytest.mark.parametrize(
    "end", [nn.Sigmoid(), nn.Sequential(nn.Sigmoid(), nn.Unflatten(1, (1, 2, 2)))], ids=["flat", "image"]
)
def test_probabilities_need_saying(end: nn.Module, device: torch.device) -> None:
    p = problem(nn.Sequential(mlp(4), end), "gaussian").to(device)
    for likelihood in ("bernoulli", Bernoulli()):
        with pytest.raises(ValueError, match=r"Sigmoid; pass Bernoulli\(probs=True\)"):
            ops.hamiltonian_flow(*p.args()[:-1], likelihood)


def test_coupled_samples_raise(device: torch.device) -> None:
    decoder = problem(conv).decoder
    for training in (decoder.train(), nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).double().train()):
        p = replace(problem(), decoder=training).to(device)
        with pytest.raises(CoupledSamples, match=r"BatchNorm|Dropout"):
            p.run()


SWEPT = {"residual": lambda: Residual(3, 4), "opaque": lambda: Around(Call(torch.special.erfcx), (4,))}


@pytest.mark.parametrize("names", [None, ["z"], ["alpha"], ["x"], ["weights"]], ids=str)
@pytest.mark.parametrize("decoder", SWEPT)
@each_memory
def test_second_derivative_raises_in_sweeps(decoder: str, memory: str, names: list[str] | None) -> None:
    """Also where the cotangent requires no gradient, without which torch would leave the terms out in silence."""
    p = problem(SWEPT[decoder](), "gaussian")
    weights = [name for name, _ in p.decoder.named_parameters()][:1]
    p.require(weights if names == ["weights"] else names)
    leaves = [leaf for leaf in p.leaves().values() if leaf.requires_grad]
    for output in p.run(memory=memory)[::2]:
        first = torch.autograd.grad(output.sum(), leaves, create_graph=True, allow_unused=True)
        for gradient in (each for each in first if each is not None):
            with pytest.raises(NotImplementedError, match=r"fastvae::hamiltonian_flow.*fastvae\.reference"):
                torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)


@pytest.mark.parametrize("name", ["z", "x", "alpha", "inp.weight"])
@each_memory
def test_a_change_in_place_before_the_gradient_is_seen(name: str, memory: str) -> None:
    p = problem(Residual(3, 4), "gaussian").require()
    outputs = p.run(memory=memory)
    with torch.no_grad():
        p.leaves()[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(output.sum() for output in outputs).backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_by_the_operator_that_was_called(dtype: torch.dtype) -> None:
    """Also where the decoder is no chain: single layers have kernels that would refuse it in words of their own."""
    decoder = nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Linear(5, 4)).to(dtype)
    z, x = torch.randn(3, 2, dtype=dtype), torch.rand(3, 4, dtype=dtype)
    calls: dict[str, Callable[[], object]] = {
        "hamiltonian_flow": lambda: ops.hamiltonian_flow(decoder, z, z, x, 0.1, torch.ones(2), "gaussian"),
        "jacobian_l1": lambda: ops.jacobian_l1(decoder, z),
        "log_px": lambda: ops.log_px(decoder, z[None], x, "gaussian"),
        "log_px_and_force": lambda: ops.log_px_and_force(decoder, z, x, "gaussian"),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"fastvae::{name}: z: expected float32 or float64"):
            call()

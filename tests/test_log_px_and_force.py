"""log_px_and_force: value, gradient and refusals, for decoders that are swept and such as cannot be read."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from flow_problems import FLOAT32, FLOAT64, Residual, assert_near, conv, cotangents, mlp, seeded
from layer_kinds import Around, Call
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastvae import ops, reference
from fastvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fastvae.lowering import CoupledSamples, UnsupportedLayer


class StudentT(Likelihood):
    """One's own, with a residual and a curvature that no closed form of ours knows."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        off = x.flatten(1).to(params) - params.flatten(1)
        return -2 * torch.log1p(off.square() / 3).sum(1)


class Tempered(Bernoulli):
    """A stock likelihood with another density."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return 0.5 * super().log_prob(params, x)


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Bernoulli(),
    "probs": Bernoulli(probs=True),
    "gaussian": Gaussian(0.7),
    "categorical": Categorical(4),
    "student": StudentT(),
    "tempered": Tempered(),
}


def flattened_deconvolution(outputs: int) -> nn.Module:
    """A transposed convolution, whose output we lay out channels last, and a view of it."""
    return nn.Sequential(
        nn.Linear(3, 8),
        nn.Unflatten(1, (2, 2, 2)),
        nn.ConvTranspose2d(2, 3, 2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(27, outputs),
    )


def normalised(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, outputs))


def looked_at(h: Tensor) -> Tensor:
    """What it does depends on numbers, which no graph of operations has."""
    return torch.sin(h) if h.sum() < 1e9 else h


def unreadable(outputs: int) -> nn.Module:
    return nn.Sequential(Around(Call(looked_at), (6,)), nn.Linear(6, outputs))


DECODERS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": mlp,
    "conv": conv,
    "residual": lambda outputs: Residual(3, outputs),
    "deconvolution": flattened_deconvolution,
    "normalised": normalised,
    "unreadable": unreadable,
}
quiet = pytest.mark.filterwarnings("ignore:.*this decoder is not read")


@dataclass(frozen=True)
class Problem:
    decoder: nn.Module
    z: Tensor
    x: Tensor
    likelihood: Likelihood

    def leaves(self) -> dict[str, Tensor]:
        return {"z": self.z, "x": self.x, **dict(self.decoder.named_parameters())}

    def require(self, names: Sequence[str] | None = None) -> Problem:
        for name, leaf in self.leaves().items():
            real = name != "x" or not isinstance(self.likelihood, Categorical)
            leaf.requires_grad_(real if names is None else name in names)
        return self

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float64) -> Problem:
        own = [self.z, *self.decoder.parameters()]
        if all((t.device, t.dtype) == (torch.device(device), dtype) for t in own):
            return self
        decoder = copy.deepcopy(self.decoder).to(device, dtype)
        z, x = (
            t.detach().to(device, dtype, copy=True).requires_grad_(t.requires_grad) for t in (self.z, self.x)
        )
        return replace(self, decoder=decoder, z=z, x=x)

    def run(self) -> tuple[Tensor, Tensor]:
        return ops.log_px_and_force(self.decoder, self.z, self.x, self.likelihood)

    def oracle(self) -> tuple[Tensor, Tensor]:
        """By the definition."""
        z = self.z if self.z.requires_grad else self.z.detach().requires_grad_()
        log_px = self.likelihood.log_prob_of_output(self.decoder(z), self.x)
        return log_px, torch.autograd.grad(log_px.sum(), z, create_graph=True)[0]

    def gradients(self, outputs: Sequence[Tensor], **options: Any) -> dict[str, Tensor | None]:
        leaves = {name: leaf for name, leaf in self.leaves().items() if leaf.requires_grad}
        found = torch.autograd.grad(
            list(outputs), list(leaves.values()), cotangents(outputs), allow_unused=True, **options
        )
        return dict(zip(leaves, found, strict=True))


def made(decoder: str, values: int, probs: bool, seed: int) -> nn.Module:
    module = DECODERS[decoder](values * (1 if decoder == "conv" else 4))
    return seeded(nn.Sequential(module, nn.Sigmoid()) if probs else module, seed)


once_made = functools.cache(made)


def problem(
    decoder: str = "mlp",
    likelihood: str | Likelihood = "bernoulli",
    batch: int = 3,
    seed: int = 0,
    shared: bool = False,
) -> Problem:
    """Shared: of a decoder that other tests have, too, so that it is read once for all of them."""
    like = LIKELIHOODS[likelihood] if isinstance(likelihood, str) else likelihood
    module = (once_made if shared else made)(decoder, like.values_per_element, like.probs, seed)
    module.requires_grad_()
    generator = torch.Generator().manual_seed(seed + 1)
    z = torch.rand(batch, 3, generator=generator, dtype=torch.float64) * 3 - 1.5
    with torch.no_grad():
        elements = (
            math.prod(module(z[:1] if batch else z.new_zeros(1, 3)).shape[1:]) // like.values_per_element
        )
    return Problem(module, z, torch.rand(batch, elements, generator=generator, dtype=torch.float64), like)


def check(p: Problem, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> None:
    """Values and gradients against the oracle in float64 on the CPU."""
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    there = p.to(device, dtype)
    expected, found = p.oracle(), there.run()
    for name, value, wanted in zip(("log_px", "force"), found, expected, strict=True):
        assert value.dtype == dtype and value.requires_grad == any(
            t.requires_grad for t in p.leaves().values()
        )
        assert_near(value, wanted, tolerance, name)
    if not found[0].requires_grad:
        return
    wanted = p.gradients(expected)
    for name, gradient in there.gradients(found).items():
        if wanted[name] is None:
            assert gradient is None or not gradient.any(), name
        else:
            assert gradient is not None and gradient.dtype == dtype, name
            assert_near(gradient, wanted[name], tolerance, name)


@quiet
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_against_autograd(decoder: str, likelihood: str, device: torch.device) -> None:
    check(problem(decoder, likelihood, shared=True).require(), device)


@quiet
@pytest.mark.parametrize("decoder", ["mlp", "conv", "residual"])
def test_float32(decoder: str, device: torch.device) -> None:
    check(problem(decoder, "gaussian").require(), device, torch.float32)


@quiet
@pytest.mark.parametrize("names", [[], ["z"], ["x"], ["weights"], ["z", "x"], ["one"]])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "student"])
@pytest.mark.parametrize("decoder", ["mlp", "residual", "unreadable"])
def test_subsets_of_requires_grad(
    decoder: str, likelihood: str, names: list[str], device: torch.device
) -> None:
    p = problem(decoder, likelihood, shared=True)
    weights = [name for name, _ in p.decoder.named_parameters()]
    chosen = {"weights": weights, "one": weights[:1]}.get(names[0] if names else "", names)
    check(p.require(chosen), device)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("decoder", ["mlp", "residual"])
def test_by_differences(decoder: str, likelihood: str) -> None:
    p = problem(decoder, likelihood, batch=2, shared=True).require()
    leaves = [leaf for leaf in p.leaves().values() if leaf.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: p.run(), leaves)


def test_either_result_alone() -> None:
    p = problem("residual", "gaussian", shared=True).require()
    for at in (0, 1):
        wanted = p.gradients(p.oracle()[at : at + 1])
        for name, gradient in p.gradients(p.run()[at : at + 1]).items():
            assert gradient is not None, name
            assert_near(
                gradient, torch.zeros_like(gradient) if wanted[name] is None else wanted[name], FLOAT64, name
            )


@pytest.mark.parametrize("x", ["uint8", "bool", "image"])
def test_kinds_of_data(x: str, device: torch.device) -> None:
    p = problem("residual", shared=True).to(device)
    data = {
        "uint8": (p.x * 255).to(torch.uint8),
        "bool": p.x > 0.5,
        "image": p.x.reshape(3, 2, 2).transpose(1, 2).contiguous().transpose(1, 2),
    }[x]
    as_float = data.double() / 255 if x == "uint8" else data.double().reshape(3, 4)
    for found, wanted in zip(replace(p, x=data).run(), replace(p, x=as_float).oracle(), strict=True):
        assert_near(found, wanted.detach().cpu(), FLOAT64)


def test_expanded_and_strided_inputs() -> None:
    p = problem("residual", batch=4, shared=True)
    strided = replace(p, z=p.z.t().contiguous().t(), x=p.x[:1].expand(4, -1))
    assert not strided.z.is_contiguous()
    for found, wanted in zip(strided.run(), strided.oracle(), strict=True):
        assert_near(found, wanted.detach(), FLOAT64)


class Conditional(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.of_condition, self.last = nn.Linear(6, 5), nn.Linear(2, 5), nn.Linear(5, 4)
        self.step = step

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.last(self.step(self.first(z.flatten(1)) + self.of_condition(condition)))


@quiet
@pytest.mark.parametrize("batch", [3, 0])
@pytest.mark.parametrize("step", [torch.tanh, looked_at], ids=["read", "not read"])
def test_a_condition_and_codes_that_are_no_vectors(step: Callable[[Tensor], Tensor], batch: int) -> None:
    module = seeded(Conditional(step))
    z, c = torch.randn(batch, 3, 2, dtype=torch.float64), torch.randn(batch, 2, dtype=torch.float64)
    x = torch.rand(batch, 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (z, c, x, *module.parameters())]
    found = ops.log_px_and_force(module, z, x, "gaussian", condition=c)
    assert found[1].shape == z.shape
    log_px = Gaussian().log_prob(module(z, c), x)
    wanted = log_px, torch.autograd.grad(log_px.sum(), z, create_graph=True)[0]
    for value, expected in zip(found, wanted, strict=True):
        assert_near(value, expected, FLOAT64)
    gradients = [torch.autograd.grad(list(each), leaves, cotangents(each)) for each in (found, wanted)]
    for gradient, expected in zip(*gradients, strict=True):
        assert_near(gradient, expected, FLOAT64)
    with pytest.raises(ValueError, match="condition: expected"):
        ops.log_px_and_force(module, z, x, "gaussian", condition=torch.zeros(5, 2))


@quiet
@pytest.mark.parametrize("decoder", DECODERS)
def test_empty_batch(decoder: str) -> None:
    p = problem(decoder, batch=0, shared=True).require()
    log_px, force = p.run()
    assert log_px.shape == (0,) and force.shape == (0, 3)
    for name, gradient in p.gradients((log_px, force)).items():
        assert gradient is None or (gradient.shape == p.leaves()[name].shape and not gradient.any()), name


def test_a_sample_without_a_number_stays_alone() -> None:
    for decoder, likelihood in (("mlp", "bernoulli"), ("conv", "gaussian"), ("normalised", "categorical")):
        p = problem(decoder, likelihood, shared=True)
        p.z[1] = float("nan")
        for result in p.run():
            assert result[1].isnan().all() and result[[0, 2]].isfinite().all()
        # Repeated without a gradient, the calls are written down as code, whose results are compared with the call's.
        with torch.no_grad():
            for _ in range(4):
                for result in p.run():
                    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


@quiet
@pytest.mark.parametrize("decoder", ["residual", "unreadable"])
def test_no_grad_and_inference_mode(decoder: str) -> None:
    p = problem(decoder, "gaussian", shared=True).require()
    expected = p.run()
    with torch.no_grad():
        results = [p.run()]
    with torch.inference_mode():
        results += [p.run(), replace(p, z=p.z * 1, x=p.x * 1).run()]
    for found in results:
        for value, wanted in zip(found, expected, strict=True):
            assert not value.requires_grad and torch.equal(value, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", ["codes", "decoder"])
def test_autocast(of: str, dtype: torch.dtype, device: torch.device) -> None:
    """Everything is computed in float32, whatever the encoder's layers handed over; gradients come in their dtype."""
    p = problem("residual", "gaussian").to(device, torch.float32)
    p = replace(p, z=p.z.to(dtype)) if of == "codes" else replace(p, decoder=p.decoder.to(dtype))
    wide = p.to(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        found = p.require().run()
    expected = wide.require().run()
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    wanted = wide.gradients(expected)
    for name, gradient in p.gradients(found).items():
        assert gradient.dtype == p.leaves()[name].dtype
        torch.testing.assert_close(gradient, wanted[name].to(gradient.dtype), rtol=0, atol=0, msg=name)


def test_backward_twice_and_repeatable() -> None:
    p = problem("residual", "gaussian").require()
    outputs, again = p.run(), p.run()
    first = p.gradients(outputs, retain_graph=True)
    for name, gradient in p.gradients(outputs).items():
        assert torch.equal(gradient, first[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        p.gradients(outputs)
    for name, gradient in p.gradients(again).items():
        assert torch.equal(gradient, first[name]), name


@pytest.mark.parametrize("name", ["z", "x", "inp.weight"])
def test_a_change_in_place_before_the_gradient_is_seen(name: str) -> None:
    p = problem("residual", "gaussian").require()
    outputs = p.run()
    with torch.no_grad():
        p.leaves()[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        p.gradients(outputs)


def test_nothing_given_is_changed() -> None:
    p = problem("conv", "gaussian").require()
    state = {name: value.clone() for name, value in p.decoder.state_dict().items()}
    before = {name: leaf.detach().clone() for name, leaf in p.leaves().items()}
    p.gradients(p.run())
    assert all(torch.equal(before[name], leaf) and leaf.grad is None for name, leaf in p.leaves().items())
    assert all(torch.equal(state[name], value) for name, value in p.decoder.state_dict().items())
    assert not any(module.training for module in p.decoder.modules())


def test_a_decoder_that_changes_is_read_again() -> None:
    p = problem("mlp")
    p.run()
    p.decoder[1] = nn.Softplus()
    p.decoder[0].weight.data.mul_(0.5)
    check(p.require())
    p.decoder.append(nn.Sigmoid())
    with pytest.raises(ValueError, match="this one ends in a Sigmoid"):
        p.run()


def test_a_decoder_that_cannot_be_read_is_warned_of_once() -> None:
    p = problem("unreadable")
    with pytest.warns(
        UserWarning, match=r"log_px_and_force: this decoder is not read.*torch\.export cannot run"
    ):
        p.run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for decoder in ("mlp", "residual"):
            for likelihood in LIKELIHOODS:
                problem(decoder, likelihood, shared=True).run()


# --- refusals


@pytest.mark.parametrize("names", [None, ["z"], ["x"], ["out.weight"], ["out.bias"]])
@pytest.mark.parametrize("at", [0, 1])
def test_second_derivative_raises(at: int, names: list[str] | None) -> None:
    """Also where the cotangent requires no gradient, without which torch would leave the terms out in silence."""
    p = problem("residual", "gaussian", shared=True).require(names)
    leaves = [leaf for leaf in p.leaves().values() if leaf.requires_grad]
    first = torch.autograd.grad(p.run()[at].sum(), leaves, create_graph=True)
    for gradient in first:
        with pytest.raises(
            NotImplementedError, match=r"fastvae::log_px_and_force.*fastvae\.reference\.log_px_and_force"
        ):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)


def test_the_gradient_of_a_gradient_in_its_cotangent_raises() -> None:
    p = problem("residual", shared=True).require(["z"])
    force = p.run()[1]
    v = torch.ones_like(force, requires_grad=True)
    (product,) = torch.autograd.grad(force, p.z, v, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"fastvae\.reference"):
        torch.autograd.grad(product.sum(), v)


@pytest.mark.parametrize("name", ["z", "x", "out.weight"])
def test_forward_mode_raises(name: str) -> None:
    p = problem("residual", "gaussian")
    with forward_ad.dual_level():
        leaf = p.leaves()[name]
        dual = forward_ad.make_dual(leaf.detach(), torch.ones_like(leaf))
        if name == "out.weight":
            del p.decoder.out.weight
            p.decoder.out.weight = dual
        else:
            p = replace(p, **{name: dual})
        with pytest.raises(NotImplementedError, match=r"fastvae::log_px_and_force.*fastvae\.reference"):
            p.run()


TRANSFORMS: dict[str, Callable[..., object]] = {
    "vmap": lambda f, t: torch.func.vmap(f)(torch.stack([t, t])),
    "grad": lambda f, t: torch.func.grad(lambda t: f(t).sum())(t),
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (t,)),
    "jacrev": lambda f, t: torch.func.jacrev(f)(t),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["z", "x"])
def test_function_transforms_raise(name: str, transform: str) -> None:
    p = problem("residual", "gaussian", shared=True)
    with pytest.raises(NotImplementedError, match=r"fastvae::log_px_and_force.*fastvae\.reference"):
        TRANSFORMS[transform](lambda t: replace(p, **{name: t}).run()[1], getattr(p, name))


def emptied(t: Tensor) -> Tensor:
    """As sharded training leaves a tensor."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def without_a_weight(p: Problem) -> Problem:
    p.decoder[0].weight.untyped_storage().resize_(0)
    return p


ERRORS: dict[str, tuple[type[Exception], str, Callable[[Problem], Any]]] = {
    "z_dims": (ValueError, r"z: expected shape \[B, d\], got \[3\]", lambda p: replace(p, z=p.z[0])),
    "z_half": (TypeError, r"z: expected float32 or float64, got torch\.float16", lambda p: p.to("cpu", torch.half)),
    "z_integer": (TypeError, r"z: expected float32 or float64", lambda p: replace(p, z=p.z.long())),
    "z_type": (TypeError, "z: expected a tensor, got list", lambda p: replace(p, z=[[0.0]])),
    "z_meta": (ValueError, "z: expected a tensor with numbers", lambda p: replace(p, z=p.z.to("meta"))),
    "z_features": (ValueError, "expected 3 features", lambda p: replace(p, z=p.z[:, :2])),
    "decoder_dtype": (
        TypeError,
        r"fastvae::log_px_and_force: parameters: expected Float as z",
        lambda p: replace(p.to("cpu", torch.float32), decoder=p.decoder),
    ),
    "decoder_half": (
        TypeError,
        r"decoder: expected parameters in float32 or float64, got torch\.float16.*decoder\.float\(\)",
        lambda p: replace(p.to("cpu", torch.float32), decoder=copy.deepcopy(p.decoder).half()),
    ),
    "x_samples": (ValueError, r"x: expected 3 samples as z has, got \[2, 4\]", lambda p: replace(p, x=p.x[:2])),
    "x_scalar": (ValueError, "x: expected 3 samples as z has", lambda p: replace(p, x=p.x[0, 0])),
    "x_elements": (ValueError, "x: 2 elements a sample need 2", lambda p: replace(p, x=p.x[:, :2])),
    "x_dtype": (ValueError, "x: expected uint8, bool or a floating dtype", lambda p: replace(p, x=p.x.long())),
    "x_sparse": (ValueError, "x: expected a dense tensor", lambda p: replace(p, x=p.x.to_sparse())),
    "z_emptied": (ValueError, "z: expected a storage of at least 72", lambda p: replace(p, z=emptied(p.z))),
    "x_emptied": (ValueError, "x: expected a storage of at least 96", lambda p: replace(p, x=emptied(p.x))),
    "weight_emptied": (ValueError, "0.weight: expected a storage", lambda p: without_a_weight(p)),
    "x_device": (ValueError, "x: expected cpu as z, got .* on meta", lambda p: replace(p, x=p.x.to("meta"))),
    "likelihood": (ValueError, "likelihood: expected one of .*'poisson'", lambda p: replace(p, likelihood="poisson")),
    "likelihood_type": (TypeError, "likelihood: expected a name", lambda p: replace(p, likelihood=3)),
    "no_sigmoid": (ValueError, "ends in a sigmoid", lambda p: replace(p, likelihood=Bernoulli(probs=True))),
    "a_sigmoid": (
        ValueError,
        "'bernoulli' expects a decoder that returns logits",
        lambda p: replace(p, decoder=nn.Sequential(p.decoder, nn.Sigmoid())),
    ),
    "not_a_module": (TypeError, "nn.Module", lambda p: replace(p, decoder=lambda z: z)),
    "coupled": (
        CoupledSamples,
        "BatchNorm1d",
        lambda p: replace(p, decoder=nn.Sequential(p.decoder, nn.BatchNorm1d(4).double())),
    ),
    "a_pair": (
        TypeError,
        "decoder output: expected a tensor .*, got tuple",
        lambda p: replace(p, decoder=nn.Sequential(p.decoder, Call(lambda y: (y, y)))),
    ),
}  # fmt: skip


@quiet
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, inference: bool) -> None:
    kind, message, change = ERRORS[case]
    p = problem()
    with torch.inference_mode(inference), pytest.raises(kind, match=message):
        change(p).run()


@pytest.mark.parametrize("known", [False, True])
def test_weights_without_their_memory_are_refused_by_every_operator(known: bool) -> None:
    """PyTorch reads what lies there, or crashes."""
    p = problem("residual", "gaussian")
    calls = (
        p.run,
        lambda: ops.jacobian_l1(p.decoder, p.z),
        lambda: ops.hamiltonian_flow(p.decoder, p.z, p.z, p.x, 0.1, p.z.new_ones(2), p.likelihood),
    )
    for call in calls if known else ():
        call()
    p.decoder.inp.weight.untyped_storage().resize_(0)
    for call in calls:
        with pytest.raises(ValueError, match="expected a storage of at least"):
            call()


# --- torch.compile and torch.export


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("decoder", ["mlp", "residual"])
def test_one_graph_of_a_compiled_function(decoder: str) -> None:
    p = problem(decoder, "gaussian").require()

    def step(z: Tensor, x: Tensor) -> Tensor:
        log_px, force = ops.log_px_and_force(p.decoder, torch.tanh(z), x, p.likelihood)
        return (log_px + (torch.sin(force) * z).sum(1)).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(p.z, p.x)
    eager = step(p.z, p.x)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=0)
    wanted = p.gradients([eager])
    for name, gradient in p.gradients([compiled]).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-11, atol=1e-12, msg=name)


def test_it_cannot_be_exported() -> None:
    p = problem()

    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = p.decoder

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return ops.log_px_and_force(self.decoder, z, x)[1]

    with pytest.raises(UnsupportedLayer, match="log_px_and_force: it has no kernel"):
        torch.export.export(Forces(), (p.z, p.x), strict=False)


# --- the reference


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_reference_has_a_second_derivative(likelihood: str) -> None:
    p = problem("residual", likelihood, batch=2).require()
    leaves = [leaf for leaf in p.leaves().values() if leaf.requires_grad]

    def run(*_: Tensor) -> tuple[Tensor, Tensor]:
        return reference.log_px_and_force(p.decoder, p.z, p.x, p.likelihood)

    assert torch.autograd.gradcheck(run, leaves) and torch.autograd.gradgradcheck(run, leaves)


def test_the_reference_inside_transforms_and_in_forward_mode() -> None:
    p = problem("residual", "gaussian")

    def force(z: Tensor) -> Tensor:
        return reference.log_px_and_force(p.decoder, z, p.x[: len(z)], p.likelihood)[1]

    rows = torch.func.vmap(
        lambda z, x: reference.log_px_and_force(p.decoder, z[None], x[None], p.likelihood)[1][0]
    )
    torch.testing.assert_close(rows(p.z, p.x), force(p.z), rtol=1e-12, atol=1e-12)
    along = torch.ones_like(p.z)
    wanted = torch.func.jvp(force, (p.z,), (along,))[1]
    torch.testing.assert_close(torch.func.vjp(force, p.z)[1](along)[0], wanted, rtol=1e-12, atol=1e-12)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(force(forward_ad.make_dual(p.z, along))).tangent
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_reference_without_a_graph() -> None:
    p = problem("unreadable").require()
    for value, wanted in zip(
        reference.log_px_and_force(p.decoder, p.z, p.x, create_graph=False), p.oracle(), strict=True
    ):
        assert not value.requires_grad
        assert_near(value, wanted, FLOAT64)

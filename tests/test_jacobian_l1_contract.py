"""What jacobian_l1 promises besides its value: layouts, modes, compilation, refusals."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from flow_problems import Residual
from jacobian_problems import FLOAT64, assert_close, gradients, on, oracle, problem
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastvae
from fastvae.lowering import CoupledSamples, lower
from fastvae.ops import jacobian_l1

raw = fastvae._C
REDUCTIONS = ("mean", "sum", "none")
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def op_args(decoder: nn.Module, z: Tensor, reduction: str) -> tuple:
    network = lower(decoder)
    return z, network.tensors, network.spec + ";sigmoid", [2, 0], 1, reduction


@each_reduction
def test_opcheck(reduction: str, device: torch.device) -> None:
    decoder, z = on(*problem(), device)
    torch.library.opcheck(
        torch.ops.fastvae.jacobian_l1.default, op_args(decoder, z, reduction), rtol=1e-10, atol=1e-12
    )


@each_reduction
def test_opcheck_of_the_gradient(reduction: str, device: torch.device) -> None:
    decoder, z = on(*problem(), device)
    args = op_args(decoder, z.detach(), reduction)
    cotangent = torch.ones(len(z)).to(z) if reduction == "none" else None
    for needs in ([1] * 7, [0, 1] * 3 + [0], [0] * 7):
        torch.library.opcheck(
            torch.ops.fastvae.jacobian_l1_with_gradient.default,
            (cotangent, *args, needs),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@each_reduction
def test_compile(reduction: str, backend: str, device: torch.device) -> None:
    decoder, z = on(*problem("conv" if reduction == "mean" else "mlp"), device)

    def step(z: Tensor) -> Tensor:
        return torch.tanh(jacobian_l1(decoder, z * 1.5, reduction, output="sigmoid", latents=[0, 2]))

    expected = step(z)
    wanted = gradients(expected, decoder, z)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    actual = compiled(z)
    assert_close(actual, expected, 1e-12)
    for name, gradient in gradients(actual, decoder, z).items():
        assert_close(gradient, wanted[name], 1e-11, name)
    with torch.no_grad():
        assert_close(compiled(z), expected, 1e-12)


def test_compile_with_a_dynamic_batch(device: torch.device) -> None:
    decoder, z = on(*problem(batch=6), device)
    compiled = torch.compile(lambda z: jacobian_l1(decoder, z), fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (6, 4, 3):
            part = z.detach()[:batch].clone().requires_grad_()
            wanted = gradients(jacobian_l1(decoder, part), decoder, part)
            for name, gradient in gradients(compiled(part), decoder, part).items():
                assert_close(gradient, wanted[name], 1e-11, name)


def test_a_decoder_that_cannot_be_lowered_works(device: torch.device) -> None:
    decoder, z = on(*problem(Residual(3, 4)), device)
    value = jacobian_l1(decoder, z, output="sigmoid")
    expected = oracle(decoder, z, output="sigmoid")
    assert_close(value, expected, FLOAT64)
    wanted = gradients(expected, decoder, z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, gradient in gradients(jacobian_l1(decoder, z, output="sigmoid"), decoder, z).items():
            assert_close(gradient, wanted[name], FLOAT64, name)
        with torch.inference_mode():
            assert_close(jacobian_l1(decoder, z * 1, output="sigmoid"), expected, FLOAT64)


def test_strided_and_expanded(device: torch.device) -> None:
    decoder, z = on(*problem("wide"), device)
    strided = z.detach().t().contiguous().t()
    expanded = z.detach()[:1].expand(4, 3)
    for point in (strided, expanded):
        assert not point.is_contiguous()
        dense = point.contiguous()
        for reduction in REDUCTIONS:
            results = []
            for leaf in (point.detach().requires_grad_(), dense.detach().requires_grad_()):
                value = jacobian_l1(decoder, leaf, reduction, output="sigmoid")
                results.append([value, *gradients(value, decoder, leaf).values()])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    expected = gradients(jacobian_l1(decoder, z), decoder, z)
    decoder.to(memory_format=torch.channels_last)
    for name, gradient in gradients(jacobian_l1(decoder, z), decoder, z).items():
        assert_close(gradient, expected[name], 1e-12, name)


def test_latents_as_a_tensor(device: torch.device) -> None:
    decoder, z = on(*problem(), device)
    expected = jacobian_l1(decoder, z, latents=[2, 1])
    for latents in (torch.tensor([2, 1], device=device), torch.tensor([2, 1], dtype=torch.uint8), (2, 1)):
        assert torch.equal(jacobian_l1(decoder, z, latents=latents), expected)
    assert torch.equal(jacobian_l1(decoder, z, latents=range(3)), jacobian_l1(decoder, z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    decoder, z = on(*problem("conv"), device, torch.float32)
    half = z.detach().to(dtype).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        value = jacobian_l1(decoder, half)
    assert value.dtype == torch.float32
    full = half.detach().float().requires_grad_()
    expected = jacobian_l1(decoder, full)
    assert torch.equal(value, expected)
    wanted = gradients(expected, decoder, full)
    for name, gradient in gradients(value, decoder, half).items():
        assert torch.equal(gradient, wanted[name].to(gradient.dtype)), name


@each_reduction
def test_no_grad_and_inference_mode(reduction: str, device: torch.device) -> None:
    decoder, z = on(*problem("conv"), device)
    expected = jacobian_l1(decoder, z, reduction)
    with torch.no_grad():
        results = [jacobian_l1(decoder, z, reduction)]
    with torch.inference_mode():
        results += [jacobian_l1(decoder, z, reduction), jacobian_l1(decoder, z * 1, reduction)]
    for result in results:
        assert not result.requires_grad
        assert_close(result, expected, 1e-14)


@each_reduction
def test_bound_operators(reduction: str, device: torch.device) -> None:
    """fastvae._C binds the operators themselves, with autograd and autocast."""
    decoder, z = on(*problem("conv"), device)
    args = op_args(decoder, z, reduction)
    value = torch.ops.fastvae.jacobian_l1(*args)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).to(device)
    wanted = gradients(value, decoder, z)
    with torch.autocast(device.type, torch.bfloat16):
        bound = raw.jacobian_l1(*args)
        assert_close(bound, value, 1e-14)
        cotangent = weights if reduction == "none" else None
        again, grad_z, of_parameters = raw.jacobian_l1_with_gradient(
            cotangent, *args, [1] * (1 + len(args[1]))
        )
    for name, gradient in gradients(bound, decoder, z).items():
        assert torch.equal(gradient, wanted[name]), name
    with pytest.raises(NotImplementedError, match="fastvae::jacobian_l1: differentiable once"):
        grad_z.sum().backward()
    assert_close(again, value, 1e-14)
    factor = 1.0 if reduction == "none" else float(weights[0])
    assert_close(grad_z * factor, wanted["z"], 1e-13)
    for name, gradient in zip(lower(decoder).names, of_parameters, strict=True):
        if name in wanted:
            assert_close(gradient * factor, wanted[name], 1e-13, name)


@each_reduction
def test_backward_twice_and_accumulation(reduction: str, device: torch.device) -> None:
    """The gradient that "mean" and "sum" hold is handed out once, and copied where it may be asked for again."""
    decoder, z = on(*problem("wide"), device)
    value = jacobian_l1(decoder, z, reduction).sum()
    leaves = [z, *decoder.parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(value * 2, leaves, retain_graph=True, **options)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(value * 3, leaves, **options)
    for one, before, other in zip(first, kept, second, strict=True):
        assert torch.equal(one, before)
        assert_close(other, 1.5 * one, 1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaves, **options)
    for _ in range(2):
        jacobian_l1(decoder, z, reduction).sum().backward()
    for parameter, gradient in zip(decoder.parameters(), first[1:], strict=True):
        if parameter.grad is not None:
            assert_close(parameter.grad, gradient, 1e-13)
    nn.Module.zero_grad(decoder, set_to_none=False)


@each_reduction
def test_repeats_to_the_last_bit(reduction: str, device: torch.device) -> None:
    decoder, z = on(*problem("wide", batch=7), device)
    results = []
    for _ in range(2):
        value = jacobian_l1(decoder, z, reduction, output="sigmoid")
        results.append([value, *gradients(value, decoder, z).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_two_python_threads(device: torch.device) -> None:
    problems = [on(*problem(kind, seed=seed), device) for seed in range(3) for kind in ("mlp", "wide")]

    def work(case: tuple[nn.Module, Tensor]) -> list[Tensor]:
        value = jacobian_l1(*case)
        return [value, *gradients(value, *case).values()]

    expected = [work(case) for case in problems]
    with ThreadPoolExecutor(2) as pool:
        for result, wanted in zip(pool.map(work, problems), expected, strict=True):
            assert all(torch.equal(r, w) for r, w in zip(result, wanted, strict=True))


def test_not_a_number_stays_in_its_row(device: torch.device) -> None:
    for activation in (nn.ReLU, nn.Tanh):
        decoder, z = on(*problem(nn.Sequential(nn.Linear(3, 8), activation(), nn.Linear(8, 5))), device)
        expected = jacobian_l1(decoder, z, "none", output="sigmoid").detach()
        for bad in (float("nan"), float("inf")):
            with torch.no_grad():
                z[1] = bad
            terms = jacobian_l1(decoder, z, "none", output="sigmoid")
            assert terms[1].isnan()
            assert_close(terms[[0, 2, 3]], expected[[0, 2, 3]], 1e-13)
            terms[[0, 2, 3]].sum().backward()
            assert z.grad[[0, 2, 3]].isfinite().all()
            z.grad = None


def test_inputs_are_left_alone(device: torch.device) -> None:
    decoder, z = on(*problem("conv"), device)
    before = copy.deepcopy(decoder.state_dict()), z.detach().clone()
    gradients(jacobian_l1(decoder, z), decoder, z)
    assert all(torch.equal(t, before[0][name]) for name, t in decoder.state_dict().items())
    assert torch.equal(z, before[1])


@pytest.mark.parametrize("frozen", [False, True])
@each_reduction
def test_second_derivative_raises(reduction: str, frozen: bool, device: torch.device) -> None:
    decoder, z = on(*problem(), device)
    decoder.requires_grad_(not frozen)
    leaves = [z, *(p for p in decoder.parameters() if p.requires_grad)]
    value = jacobian_l1(decoder, z, reduction, output="sigmoid")
    for gradient in torch.autograd.grad(value.square().sum(), leaves, create_graph=True):
        with pytest.raises(NotImplementedError, match=r"fastvae::jacobian_l1.*fastvae\.reference"):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)


@each_reduction
def test_in_sweeps_a_second_derivative_and_a_change_in_place_raise(reduction: str) -> None:
    """Also where the cotangent requires no gradient, without which torch would leave the terms out in silence."""
    decoder = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)).double()
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    leaves = [z, *(p for name, p in decoder.named_parameters() if name != "3.bias")]
    value = jacobian_l1(decoder, z, reduction)
    for gradient in torch.autograd.grad(value.sum(), leaves, create_graph=True):
        with pytest.raises(NotImplementedError, match=r"fastvae::jacobian_l1.*fastvae\.reference"):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)
    for leaf in leaves[:2]:
        value = jacobian_l1(decoder, z, reduction)
        with torch.no_grad():
            leaf.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.sum().backward()


def test_forward_mode_raises(device: torch.device) -> None:
    decoder, z = on(*problem(), device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z.detach(), torch.ones_like(z))
        with pytest.raises(NotImplementedError, match=r"fastvae::jacobian_l1.*fastvae\.reference"):
            jacobian_l1(decoder, dual)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "vmap": lambda f, z: torch.func.vmap(f)(torch.stack([z, z])),
    "grad": lambda f, z: torch.func.grad(f)(z),
    "jvp": lambda f, z: torch.func.jvp(f, (z,), (z,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_raise(transform: str, device: torch.device) -> None:
    decoder, z = on(*problem(), device)
    with pytest.raises(NotImplementedError, match=r"fastvae::jacobian_l1.*fastvae\.reference"):
        TRANSFORMS[transform](lambda z: jacobian_l1(decoder, z), z.detach())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.Dropout(0.5)])
def test_coupled_samples_raise(layer: nn.Module) -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), layer, nn.Linear(6, 5)).train()
    with pytest.raises(CoupledSamples):
        jacobian_l1(decoder, torch.randn(4, 3))


BAD: dict[str, tuple[type[Exception], str, dict]] = {
    "reduction": (ValueError, "reduction", {"reduction": "max"}),
    "output": (ValueError, "output", {"output": "softmax"}),
    "p": (ValueError, "p: expected", {"p": 3}),
    "latent too large": (ValueError, "latents", {"latents": [3]}),
    "latent negative": (ValueError, "latents", {"latents": [-1]}),
    "latent twice": (ValueError, "latents", {"latents": [1, 1]}),
    "latents of floats": (TypeError, "latents", {"latents": [0.5]}),
    "latents as a mask": (TypeError, "latents", {"latents": torch.ones(3, dtype=torch.bool)}),
    "latents in two dimensions": (ValueError, "latents", {"latents": torch.zeros(1, 1, dtype=torch.long)}),
    "z of one dimension": (ValueError, "z", {"z": torch.zeros(3)}),
    "z of integers": (TypeError, "z", {"z": torch.zeros(2, 3, dtype=torch.long)}),
    "z in another dtype": (TypeError, "parameters", {"z": torch.zeros(2, 3, dtype=torch.float64)}),
    "z too wide": (ValueError, "features", {"z": torch.zeros(2, 4)}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name: str) -> None:
    error, message, arguments = BAD[name]
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))
    with pytest.raises(error, match=f"jacobian_l1.*{message}"):
        jacobian_l1(decoder, **{"z": torch.zeros(2, 3), **arguments})


def test_sigmoid_of_a_sigmoid_raises() -> None:
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Flatten())
    with pytest.raises(ValueError, match="ends in a Sigmoid"):
        jacobian_l1(decoder, torch.zeros(2, 3), output="sigmoid")


class Ending(nn.Module):
    """A skip connection, which is not lowered; with a branch, which cannot be read either; then a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], branching: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 4)
        self.function, self.branching = function, branching

    def forward(self, z: Tensor) -> Tensor:
        h = z + torch.tanh(self.first(z))
        if self.branching and bool((h > 100).any()):
            h = h * 2
        return self.function(self.last(h))


UNLOWERED_SIGMOIDS: dict[str, Callable[[], nn.Module]] = {
    "a layer": lambda: nn.Sequential(Ending(lambda h: h), nn.Sigmoid(), nn.Flatten()),
    "a function": lambda: Ending(torch.sigmoid),
    "a method, reshaped": lambda: Ending(lambda h: h.sigmoid().view(-1, 2, 2).transpose(1, 2)),
    "after a branch": lambda: Ending(torch.sigmoid, branching=True),
    "compiled": lambda: torch.compile(Ending(torch.sigmoid), backend="aot_eager"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", UNLOWERED_SIGMOIDS)
@pytest.mark.filterwarnings("ignore:.*cannot be lowered:UserWarning")
def test_sigmoid_of_a_sigmoid_raises_where_autograd_runs(name: str) -> None:
    torch.manual_seed(0)
    decoder, z = UNLOWERED_SIGMOIDS[name]().double(), torch.randn(2, 3, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"fastvae::jacobian_l1: output: 'sigmoid' .* ends in a Sigmoid; pass"
        ):
            jacobian_l1(decoder, z, output="sigmoid")
    if name != "compiled":  # of which there is no second derivative
        assert_close(jacobian_l1(decoder, z), fastvae.reference.jacobian_l1(decoder, z), FLOAT64)


@pytest.mark.filterwarnings("ignore:.*cannot be lowered:UserWarning")
def test_sigmoids_inside_of_a_decoder_of_logits_are_no_ending() -> None:
    z = torch.randn(2, 3, dtype=torch.float64)
    for function in (lambda h: h, lambda h: torch.sigmoid(h) + h, lambda h: torch.sigmoid(h) * 2):
        for branching in (False, True):
            decoder = Ending(function, branching).double()
            found = jacobian_l1(decoder, z, output="sigmoid")
            expected = fastvae.reference.jacobian_l1(decoder, z, output="sigmoid")
            assert_close(found, expected, FLOAT64)
            if not branching:
                assert_close(found, oracle(decoder, z, output="sigmoid"), FLOAT64)


def test_raw_checks() -> None:
    decoder, z = problem()
    network = lower(decoder)
    args = [z, network.tensors, network.spec, [0], 1, "none"]

    def expect(message: str, **changes: object) -> None:
        names = ("z", "parameters", "network", "latents", "p", "reduction")
        with pytest.raises(ValueError, match=message):
            raw.jacobian_l1(**{**dict(zip(names, args, strict=True)), **changes})

    expect("latents: expected indices", latents=[3])
    expect("p: expected 1 or 2", p=0)
    expect("reduction: expected", reduction="max")
    expect("z: expected shape", z=z[0])
    with pytest.raises(ValueError, match="needs: expected 7 flags"):
        raw.jacobian_l1_with_gradient(torch.ones(4).double(), *args, [1])
    with pytest.raises(ValueError, match="cotangent: expected"):
        raw.jacobian_l1_with_gradient(None, *args, [1] * 7)
    with pytest.raises(ValueError, match="cotangent: expected shape"):
        raw.jacobian_l1_with_gradient(torch.ones(3).double(), *args, [1] * 7)

"""gaussian_kl: values, gradients, layouts, refusals, compilation, modes, errors."""

from __future__ import annotations

import math

import pytest
import torch
from flow_problems import FLOAT32, assert_near
from leapfrog_calls import leaves
from torch import Tensor
from torch.autograd import forward_ad

import fastvae
from fastvae import ops, reference

raw = fastvae._C
both_priors = pytest.mark.parametrize("given", [2, 4], ids=["standard normal p", "p given"])


def inputs(given: int, batch: int = 4, dim: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """mu_q, logvar_q and, with ``given`` = 4, mu_p, logvar_p on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(given)]


def value_and_gradients(call, args: list[Tensor]) -> list[Tensor]:
    out = call(*args)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, args, cotangent.to(out))]


def test_the_formula_written_out(device: torch.device) -> None:
    """KL(N(1, 4) || N(3, 9)) = log(3/2) + (4 + 4) / 18 - 1/2, and to a standard normal."""
    mu_q, logvar_q, mu_p, logvar_p = (
        torch.tensor([[v]], dtype=torch.float64, device=device) for v in (1.0, math.log(4), 3.0, math.log(9))
    )
    expected = math.log(1.5) + 8 / 18 - 0.5
    assert ops.gaussian_kl(mu_q, logvar_q, mu_p, logvar_p).item() == pytest.approx(expected, rel=1e-15)
    assert ops.gaussian_kl(mu_q, logvar_q).item() == pytest.approx(0.5 * (1 + 4 - 1 - math.log(4)), rel=1e-15)
    assert ops.gaussian_kl(mu_q, logvar_q, mu_q, logvar_q).item() == 0.0


def test_against_torch_distributions() -> None:
    mu_q, logvar_q, mu_p, logvar_p = inputs(4)
    q, p = (
        torch.distributions.Normal(mu, (logvar / 2).exp())
        for mu, logvar in ((mu_q, logvar_q), (mu_p, logvar_p))
    )
    expected = torch.distributions.kl_divergence(q, p).sum(1)
    torch.testing.assert_close(ops.gaussian_kl(mu_q, logvar_q, mu_p, logvar_p), expected, rtol=1e-13, atol=0)


# Elementary functions of a few ulp, sums of up to 4099 terms.
@pytest.mark.parametrize("batch, dim", [(4, 3), (1, 1), (1, 7), (33, 1), (257, 65), (5, 4099)], ids=str)
@both_priors
def test_against_reference(given: int, batch: int, dim: int, device: torch.device) -> None:
    """Also sizes that no vector divides, and enough elements for several threads."""
    tensors = inputs(given, batch, dim)
    expected = value_and_gradients(reference.gaussian_kl, leaves(tensors))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, FLOAT32)):
        actual = value_and_gradients(ops.gaussian_kl, leaves(tensors, device, dtype))
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == dtype and a.device.type == device.type
            assert_near(a, e, tolerance)


def test_nearly_equal_gaussians_keep_their_digits(device: torch.device) -> None:
    """In float32, against l^2 / 4 + l^3 / 12 + m^2 / 2 in float64, where e^l - 1 - l would have lost half of them."""
    gap = torch.logspace(-6, -2, 30, dtype=torch.float32).reshape(-1, 1)
    zero = torch.zeros_like(gap)
    wide = gap.double()
    for of_mean in (False, True):
        args = [gap, zero, zero, zero] if of_mean else [zero, gap, zero, zero]
        expected = wide**2 / 2 if of_mean else wide**2 / 4 + wide**3 / 12 + wide**4 / 48
        found = ops.gaussian_kl(*(a.to(device) for a in args)).cpu().double()
        torch.testing.assert_close(found, expected[:, 0], rtol=1e-6, atol=0)


def test_extremes(device: torch.device) -> None:
    """A variance of 0 or beyond the range gives infinity, not a large number; NaN stays in its sample."""
    zero = torch.zeros(3, 2, device=device)
    wild = torch.tensor([[-1e4, 0.0], [1e4, 0.0], [float("nan"), 0.0]], device=device)
    found = ops.gaussian_kl(zero, wild)
    assert found[0].item() == pytest.approx(0.5 * (1e4 - 1)) and found[1].isinf() and found[2].isnan()
    assert ops.gaussian_kl(wild, zero)[:2].tolist() == [pytest.approx(5e7)] * 2
    assert ops.gaussian_kl(zero, zero, zero, wild)[0].isinf()


@both_priors
def test_gradcheck(given: int, device: torch.device) -> None:
    assert torch.autograd.gradcheck(ops.gaussian_kl, leaves(inputs(given), device))


@both_priors
def test_every_subset_of_gradients(given: int, device: torch.device) -> None:
    tensors = inputs(given)
    whole = value_and_gradients(ops.gaussian_kl, leaves(tensors, device))[1:]
    cotangent = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    for subset in range(2**given):
        args = [t.to(device, copy=True).requires_grad_(bool(subset >> i & 1)) for i, t in enumerate(tensors)]
        out = ops.gaussian_kl(*args)
        assert out.requires_grad == bool(subset)
        wanted = [i for i in range(given) if subset >> i & 1]
        if wanted:
            found = torch.autograd.grad(out, [args[i] for i in wanted], cotangent)
            assert all(torch.equal(g, whole[i]) for g, i in zip(found, wanted, strict=True))


def test_one_tensor_for_several_arguments(device: torch.device) -> None:
    """KL(q || q) has gradient zero; its parts add up."""
    mu, logvar = leaves(inputs(2), device)
    gradients = torch.autograd.grad(ops.gaussian_kl(mu, logvar, mu, logvar).sum(), (mu, logvar))
    assert all(not g.any() for g in gradients)


@both_priors
def test_layouts(given: int, device: torch.device) -> None:
    """Expanded and transposed inputs give what their dense copies give, to the last bit."""
    dense = [t.to(device) for t in inputs(given, 3, 3)]
    strided = [t.t().contiguous().t() for t in dense]
    strided[1] = dense[1][:1].expand(3, 3)
    dense[1] = strided[1].contiguous()
    assert not any(t.is_contiguous() for t in strided)
    runs = [
        value_and_gradients(ops.gaussian_kl, [t.detach().requires_grad_() for t in ts])
        for ts in (strided, dense)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    args = leaves(dense)
    found = torch.autograd.grad(ops.gaussian_kl(*args).sum(), args)  # its cotangent is expanded
    assert_near(found[0], torch.autograd.grad(reference.gaussian_kl(*args).sum(), args)[0], 1e-14)


@pytest.mark.parametrize("batch, dim", [(0, 3), (3, 0), (0, 0)], ids=str)
@both_priors
def test_empty(given: int, batch: int, dim: int, device: torch.device) -> None:
    args = leaves(inputs(given, batch, dim), device)
    out = ops.gaussian_kl(*args)
    assert out.shape == (batch,) and not out.any()
    for argument, gradient in zip(args, torch.autograd.grad(out.sum(), args), strict=True):
        assert gradient.shape == argument.shape and not gradient.any()


# --- contract ----------------------------------------------------------------------------------


@both_priors
def test_second_derivative_raises(given: int, device: torch.device) -> None:
    for wanted in range(given):
        args = [t.to(device).requires_grad_(i == wanted) for i, t in enumerate(inputs(given))]
        (first,) = torch.autograd.grad(ops.gaussian_kl(*args).square().sum(), args[wanted], create_graph=True)
        with pytest.raises(
            NotImplementedError, match=r"fastvae::gaussian_kl: .*fastvae\.reference\.gaussian_kl"
        ):
            first.sum().backward()


@both_priors
def test_forward_mode_raises(given: int, device: torch.device) -> None:
    for wanted in range(given):
        args = [t.to(device) for t in inputs(given)]
        with forward_ad.dual_level():
            args[wanted] = forward_ad.make_dual(args[wanted], torch.ones_like(args[wanted]))
            with pytest.raises(NotImplementedError, match=r"fastvae::gaussian_kl: .*fastvae\.reference"):
                ops.gaussian_kl(*args)


@both_priors
def test_function_transforms_raise(given: int, device: torch.device) -> None:
    args = [t.to(device) for t in inputs(given)]
    transforms = [
        lambda f, t: torch.func.vmap(f)(torch.stack([t, t])),
        lambda f, t: torch.func.grad(lambda t: f(t).sum())(t),
        lambda f, t: torch.func.jvp(f, (t,), (t,)),
        lambda f, t: torch.func.jacrev(f)(t),
    ]
    for transform in transforms:
        for i in range(given):
            with pytest.raises(
                NotImplementedError, match=r"fastvae::gaussian_kl: .*fastvae\.reference\.gaussian_kl"
            ):
                transform(lambda t, i=i: ops.gaussian_kl(*args[:i], t, *args[i + 1 :]), args[i])


@both_priors
def test_opcheck(given: int, device: torch.device) -> None:
    args = leaves(inputs(given), device)
    padded = (*args, *[None] * (4 - given))
    torch.library.opcheck(torch.ops.fastvae.gaussian_kl.default, padded)
    detached = [None if t is None else t.detach() for t in padded]
    torch.library.opcheck(
        torch.ops.fastvae.gaussian_kl_backward.default,
        (torch.ones(4, dtype=torch.float64, device=device), *detached),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@both_priors
def test_compile(given: int, backend: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def call(*args: Tensor) -> Tensor:
        return torch.tanh(ops.gaussian_kl(*(2 * a for a in args)))

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    for batch in (4, 6, 1):
        tensors = inputs(given, batch)
        expected = value_and_gradients(call, leaves(tensors, device))
        for a, b in zip(value_and_gradients(compiled, leaves(tensors, device)), expected, strict=True):
            # Inductor has a tanh of its own.
            assert_near(a, b.cpu(), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@both_priors
def test_autocast(given: int, dtype: torch.dtype, device: torch.device) -> None:
    half = leaves(inputs(given), device, dtype)
    full = [t.detach().float().requires_grad_() for t in half]
    expected = value_and_gradients(ops.gaussian_kl, full)
    with torch.autocast(device.type, torch.bfloat16):
        out = ops.gaussian_kl(*half)
        assert out.dtype == torch.float32
    found = value_and_gradients(lambda *_: out, half)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e.to(f.dtype))


@both_priors
def test_modes_and_bound_operators(given: int, device: torch.device) -> None:
    args = leaves(inputs(given), device)
    expected = ops.gaussian_kl(*args)
    assert expected.requires_grad
    padded = (*args, *[None] * (4 - given))
    with torch.autocast(device.type, torch.bfloat16):
        bound = [raw.gaussian_kl(*padded)]
    bound.append(raw.gaussian_kl(*padded))
    assert all(result.requires_grad for result in bound)
    results = [result.detach() for result in bound]
    with torch.no_grad():
        results += [ops.gaussian_kl(*args), raw.gaussian_kl(*padded)]
    with torch.inference_mode():
        results.append(ops.gaussian_kl(*args))
        results.append(ops.gaussian_kl(*(a * 1 for a in args)))
    for result in results:
        assert not result.requires_grad and torch.equal(result, expected)


X = torch.zeros(3, 4)
ERRORS: dict[str, tuple[type[Exception], str, tuple[Tensor | None, ...]]] = {
    "dims": (ValueError, r"mu_q: expected shape \[B, d\], got \[4\]", (X[0], X[0])),
    "half": (TypeError, r"mu_q: expected float32 or float64, got .*Half", (X.half(), X.half())),
    "long": (TypeError, r"mu_q: expected float32 or float64, got .*Long", (X.long(), X.long())),
    "shape": (ValueError, r"logvar_q: expected shape \[3, 4\], got \[3, 2\]", (X, X[:, :2])),
    "no_broadcast": (ValueError, r"mu_p: expected shape \[3, 4\], got \[1, 4\]", (X, X, X[:1], X)),
    "mixed": (TypeError, r"logvar_p: expected Float as mu_q, got .*Double", (X, X, X, X.double())),
    "devices": (ValueError, r"mu_p: expected cpu as mu_q, got .*meta", (X, X, X.to("meta"), X)),
    "mean alone": (ValueError, r"logvar_p: expected both of mu_p and logvar_p, or neither", (X, X, X, None)),
    "logvar alone": (ValueError, r"mu_p: expected both of mu_p and logvar_p, or neither", (X, X, None, X)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    kind, message, args = ERRORS[case]
    with pytest.raises(kind, match="fastvae::gaussian_kl: " + message):
        ops.gaussian_kl(*args)

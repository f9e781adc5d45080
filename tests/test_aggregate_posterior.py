"""aggregate_posterior: values, gradients, layouts, refusals, compilation, modes, errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from model_problems import seeded
from torch import Tensor

from fastvae import ops, reference
from fastvae._extension import raw

Function = Callable[..., tuple[Tensor, Tensor]]
SIZES = [(1, 1, 1), (5, 3, 2), (70, 9, 5), (3, 130, 33), (4, 70, 150)]


def inputs(codes: int = 7, posteriors: int = 5, dim: int = 3) -> list[Tensor]:
    """z, mu and logvar; posteriors narrower than the prior, by far for some coordinates."""
    shapes = (codes, dim), (posteriors, dim), (posteriors, dim)
    z, mu, scale = (
        torch.randn(shape, generator=seeded(k), dtype=torch.float64) for k, shape in enumerate(shapes)
    )
    return [z, mu, scale - 1]


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


def value_and_gradients(function: Function, args: Sequence[Tensor]) -> list[Tensor]:
    """Both results, and the gradients of sums with weights of either sign."""
    log_q, log_marginals = function(*args)
    total = (log_q * torch.linspace(-1, 2, log_q.numel()).to(log_q)).sum()
    total = total + (log_marginals.cos() * 0.7).sum()
    wanted = [arg for arg in args if arg.requires_grad]
    return [log_q.detach(), log_marginals.detach(), *torch.autograd.grad(total, wanted)]


def assert_all_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        size = 1 + float(b.abs().max()) if b.numel() else 1
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * size)


def test_by_hand() -> None:
    z, mu, logvar = (
        torch.tensor(numbers, dtype=torch.float64)[:, None]
        for numbers in ([0.5], [0.0, 1.5], [0.0, math.log(4)])
    )
    density = (math.exp(-0.125) + math.exp(-0.125) / 2) / 2 / math.sqrt(2 * math.pi)
    for found in ops.aggregate_posterior(z, mu, logvar):
        assert found.item() == pytest.approx(math.log(density), rel=1e-14)


@pytest.mark.parametrize("function", [ops.aggregate_posterior, reference.aggregate_posterior])
def test_agrees_with_torch_distributions(function: Function) -> None:
    z, mu, logvar = inputs()
    each = torch.distributions.Normal(mu, (logvar / 2).exp())
    equal = torch.distributions.Categorical(torch.ones(5, dtype=torch.float64))
    whole = torch.distributions.MixtureSameFamily(equal, torch.distributions.Independent(each, 1))
    found = function(z, mu, logvar)
    torch.testing.assert_close(found.log_q, whole.log_prob(z), rtol=1e-13, atol=1e-13)
    one = torch.distributions.Normal(mu[:, 1], (logvar[:, 1] / 2).exp())
    marginal = torch.distributions.MixtureSameFamily(equal, one).log_prob(z[:, 1])
    torch.testing.assert_close(found.log_marginals[:, 1], marginal, rtol=1e-13, atol=1e-13)


def test_one_posterior_is_a_gaussian() -> None:
    z, mu, logvar = inputs(posteriors=1)
    log_q, log_marginals = ops.aggregate_posterior(z, mu, logvar)
    torch.testing.assert_close(log_q, log_marginals.sum(1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
# Exponentials of sums of d terms: their rounding counts in full.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-3)], ids=["64", "32"]
)
def test_values_and_gradients(sizes: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(*sizes)
    expected = value_and_gradients(reference.aggregate_posterior, leaves(tensors))
    assert_all_near(value_and_gradients(ops.aggregate_posterior, leaves(tensors, dtype)), expected, tolerance)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(ops.aggregate_posterior, leaves(inputs(3, 4, 2)))
    assert torch.autograd.gradcheck(reference.aggregate_posterior, leaves(inputs(3, 4, 2)))


@pytest.mark.parametrize("place", range(3))
def test_some_gradients_alone(place: int) -> None:
    tensors = inputs()
    whole = value_and_gradients(ops.aggregate_posterior, leaves(tensors))
    args = [t.requires_grad_(k == place) for k, t in enumerate(tensors)]
    found = value_and_gradients(ops.aggregate_posterior, args)
    assert torch.equal(found[2], whole[2 + place])
    log_q, _ = ops.aggregate_posterior(*args)
    alone = torch.autograd.grad(log_q.sum(), args[place])[0]
    expected = torch.autograd.grad(reference.aggregate_posterior(*args)[0].sum(), args[place])[0]
    assert_all_near([alone], [expected], 1e-13)


def test_codes_of_their_own_posteriors() -> None:
    """The tensor is an argument twice."""
    _, mu, logvar = leaves(inputs())
    found = value_and_gradients(lambda m, v: ops.aggregate_posterior(m, m, v), [mu, logvar])
    expected = value_and_gradients(lambda m, v: reference.aggregate_posterior(m, m, v), [mu, logvar])
    assert_all_near(found, expected, 1e-12)


def strided(t: Tensor) -> Tensor:
    return torch.stack((t, torch.full_like(t, torch.nan)), -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("layout", [strided, lambda t: t.mT.contiguous().mT], ids=["strided", "transposed"])
def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    tensors = inputs()
    expected = value_and_gradients(ops.aggregate_posterior, leaves(tensors))
    found = value_and_gradients(
        ops.aggregate_posterior, [layout(t).detach().requires_grad_() for t in tensors]
    )
    assert_all_near(found, expected, 0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, layout_of_any(layout)):
        assert_all_near(value_and_gradients(ops.aggregate_posterior, leaves(tensors)), expected, 0)


def layout_of_any(layout: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: layout(t) if t.dim() > 1 else strided(t)


def test_empty() -> None:
    z, mu, logvar = leaves(inputs(codes=0))
    found = value_and_gradients(ops.aggregate_posterior, [z, mu, logvar])
    assert [list(t.shape) for t in found] == [[0], [0, 3], [0, 3], [5, 3], [5, 3]]
    assert not found[3].any() and not found[4].any()
    log_q, log_marginals = ops.aggregate_posterior(torch.ones(2, 0), torch.ones(3, 0), torch.ones(3, 0))
    assert log_q.tolist() == pytest.approx([0.0, 0.0], abs=1e-6) and log_marginals.shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(dtype: torch.dtype) -> None:
    """Far codes are finite; NaN stays; a sharp component among wide ones."""
    mu, logvar = torch.zeros(3, 1, dtype=dtype), torch.tensor([[-20.0], [0.0], [9.0]], dtype=dtype)
    z = torch.tensor([[0.0], [50.0], [1e4], [float("nan")]], dtype=dtype)
    log_q, log_marginals = ops.aggregate_posterior(z, mu, logvar)
    expected, _ = reference.aggregate_posterior(z.double(), mu.double(), logvar.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(log_q.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(log_q.isnan(), log_marginals.isnan()[:, 0])
    far, _ = ops.aggregate_posterior(
        torch.full((1, 1), 1e30, dtype=torch.float32), mu.float(), logvar.float()
    )
    assert far.item() == -math.inf


def test_repeats_and_does_not_depend_on_the_batch() -> None:
    z, mu, logvar = inputs(codes=200)
    whole = ops.aggregate_posterior(z, mu, logvar)
    again = ops.aggregate_posterior(z, mu, logvar)
    part = ops.aggregate_posterior(z[90:170], mu, logvar)
    for a, b, c in zip(whole, again, part, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a[90:170], c, rtol=1e-14, atol=1e-14)


def test_memory_does_not_hold_the_pairs() -> None:
    args = leaves(inputs(600, 500, 40))  # 12 million densities, 96 MB
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        value_and_gradients(ops.aggregate_posterior, args)
    assert (
        max(abs(event.self_device_memory_usage + event.self_cpu_memory_usage) for event in seen.events())
        < 2**22
    )


# --- refusals, compilation, modes


def test_second_derivatives_and_transforms_are_refused() -> None:
    args = leaves(inputs())
    log_q, _ = ops.aggregate_posterior(*args)
    (first,) = torch.autograd.grad(log_q.sum(), args[0], create_graph=True)
    says = r"fastvae::aggregate_posterior: .*fastvae\.reference\.aggregate_posterior"
    with pytest.raises(NotImplementedError, match=says):
        torch.autograd.grad(first.sum(), args[1])
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(NotImplementedError, match=says):
            transform(lambda t: ops.aggregate_posterior(t, *args[1:])[0].sum())(args[0].detach())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[0].detach(), torch.ones_like(args[0]))
        with pytest.raises(NotImplementedError, match=r"fastvae::aggregate_posterior: .*fastvae\.reference"):
            ops.aggregate_posterior(dual, *args[1:])


def test_opcheck() -> None:
    args = leaves(inputs())
    torch.library.opcheck(torch.ops.fastvae.aggregate_posterior.default, args)
    z, mu, logvar = inputs()
    found = ops.aggregate_posterior(z, mu, logvar)
    torch.library.opcheck(
        torch.ops.fastvae.aggregate_posterior_backward.default,
        (found.log_q, found.log_marginals, z, mu, logvar, *found, [1, 0, 1]),
    )


def test_compile() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def total_correlation(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.aggregate_posterior(z, mu, logvar)
        return found.log_q - found.log_marginals.sum(1), found.log_marginals

    def plain(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        log_q, log_marginals = reference.aggregate_posterior(z, mu, logvar)
        return log_q - log_marginals.sum(1), log_marginals

    for sizes in ((7, 5, 3), (6, 4, 3)):
        args = leaves(inputs(*sizes))
        assert_all_near(value_and_gradients(total_correlation, args), value_and_gradients(plain, args), 1e-12)


def test_autocast() -> None:
    half = leaves(inputs(), torch.bfloat16)
    expected = ops.aggregate_posterior(*(t.detach().float() for t in half))
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.aggregate_posterior(*half)
    assert found.log_q.dtype == torch.float32 and all(map(torch.equal, found, expected))
    assert torch.autograd.grad(found.log_q.sum(), half)[0].dtype == torch.bfloat16


def test_modes_and_bound_operators() -> None:
    args = leaves(inputs())
    expected = ops.aggregate_posterior(*args)
    assert expected.log_q.requires_grad and expected.log_marginals.requires_grad
    results = [raw.aggregate_posterior(*args)]
    with torch.no_grad():
        results.append(ops.aggregate_posterior(*args))
    with torch.inference_mode():
        results.append(ops.aggregate_posterior(*args))
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, expected, strict=True))


X = torch.zeros(3, 4)
ERRORS: dict[str, tuple[type[Exception], str, tuple[object, ...]]] = {
    "dims": (ValueError, r"z: expected shape \[M, d\], got \[4\]", (X[0], X, X)),
    "half": (TypeError, r"z: expected float32 or float64, got .*Half", (X.half(), X.half(), X.half())),
    "mixed": (TypeError, r"logvar: expected Float as z, got .*Double", (X, X, X.double())),
    "coordinates": (ValueError, r"mu: expected shape \[N, 4\], got \[3, 2\]", (X, X[:, :2], X[:, :2])),
    "posteriors": (ValueError, r"logvar: expected shape \[3, 4\], got \[1, 4\]", (X, X, X[:1])),
    "none": (ValueError, r"mu: expected at least one posterior, got \[0, 4\]", (X, X[:0], X[:0])),
    "devices": (ValueError, r"mu: expected cpu as z, got .*meta", (X, X.to("meta"), X)),
    "no tensor": (TypeError, r"logvar: expected a tensor, got float", (X, X, 1.0)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    kind, message, args = ERRORS[case]
    with pytest.raises(kind, match="fastvae::aggregate_posterior: " + message):
        ops.aggregate_posterior(*args)  # type: ignore[arg-type]

"""grad_dot: values, gradients, compilation, modes, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastvae
from fastvae import ops, reference

raw = fastvae._C
# Samples, and for each layer: terms of a and of b, features in and out.
SHAPES = {
    "one": (5, 3, [(1, 1, 4, 3)]),
    "layers": (6, 4, [(2, 3, 5, 2), (1, 1, 3, 7)]),
    "tiles": (300, 270, [(1, 1, 3, 2)]),
    "long": (3, 2, [(300, 270, 2, 3), (1, 2, 3, 2)]),
    "single": (1, 1, [(1, 1, 1, 1)]),
}


def factors(
    shape: str = "layers", dtype: torch.dtype = torch.float64, device: object = "cpu"
) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    samples_a, samples_b, layers = SHAPES[shape]

    def random(*sizes: int) -> Tensor:
        values = torch.randn(*sizes, generator=generator, dtype=torch.float64)
        return values.to(device=device, dtype=dtype).requires_grad_()

    return [
        [random(samples_a, t, i) for t, _, i, _ in layers],
        [random(samples_a, t, o) for t, _, _, o in layers],
        [random(samples_b, u, i) for _, u, i, _ in layers],
        [random(samples_b, u, o) for _, u, _, o in layers],
    ]


def flat(lists: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for factors in lists for tensor in factors]


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients(shape: str, bias: bool, device: torch.device) -> None:
    lists = factors(shape, device=device)
    found, expected = ops.grad_dot(*lists, bias=bias), reference.grad_dot(*lists, bias=bias)
    # Sums of up to 81,000 products in another order.
    assert relative(found, expected) < 1e-13
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        device
    )
    gradients = [torch.autograd.grad(out, flat(lists), cotangent) for out in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b) < 1e-13
    single = [[tensor.detach().float() for tensor in of] for of in lists]
    assert relative(ops.grad_dot(*single, bias=bias), expected) < 1e-5


def test_it_is_the_dot_product_of_weight_and_bias_gradients(device: torch.device) -> None:
    h_a, delta_a, h_b, delta_b = (of[0].detach() for of in factors(device=device))
    weights = [torch.einsum("nto,nti->noi", d, h).flatten(1) for h, d in ((h_a, delta_a), (h_b, delta_b))]
    expected = weights[0] @ weights[1].T
    assert relative(ops.grad_dot(h_a, delta_a, h_b, delta_b, bias=False), expected) < 1e-13
    expected = expected + delta_a.sum(1) @ delta_b.sum(1).T
    assert relative(ops.grad_dot(h_a, delta_a, h_b, delta_b), expected) < 1e-13


def test_gradcheck(device: torch.device) -> None:
    lists = factors(device=device)

    def call(*tensors: Tensor) -> Tensor:
        depth = len(tensors) // 4
        return ops.grad_dot(*(tensors[i * depth : (i + 1) * depth] for i in range(4)), bias=[True, False])

    assert torch.autograd.gradcheck(call, flat(lists))
    for wanted in range(8):
        tensors = [tensor.detach().requires_grad_(i == wanted) for i, tensor in enumerate(flat(lists))]
        assert torch.autograd.gradcheck(call, tensors)


def test_second_derivative_raises(device: torch.device) -> None:
    lists = factors(device=device)
    (first,) = torch.autograd.grad(ops.grad_dot(*lists).square().sum(), lists[0][0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"fastvae::grad_dot: .*fastvae\.reference\.grad_dot"):
        first.sum().backward()


def test_forward_mode_and_function_transforms_raise() -> None:
    tensors = [of[0].detach() for of in factors()]
    for wanted in range(4):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, t) if i == wanted else t for i, t in enumerate(tensors)]
            for call in (ops.grad_dot, lambda *a: raw.grad_dot(*([t] for t in a), [1])):
                with pytest.raises(NotImplementedError, match=r"fastvae::grad_dot: .*fastvae\.reference"):
                    call(*duals)
        with pytest.raises(NotImplementedError, match=r"fastvae::grad_dot: .*fastvae\.reference\.grad_dot"):
            torch.func.grad(
                lambda t, wanted=wanted: ops.grad_dot(*tensors[:wanted], t, *tensors[wanted + 1 :]).sum()
            )(tensors[wanted])


def test_opcheck(device: torch.device) -> None:
    lists = factors(device=device)
    torch.library.opcheck(torch.ops.fastvae.grad_dot.default, (*lists, [1, 0]))
    detached = [[tensor.detach() for tensor in of] for of in lists]
    torch.library.opcheck(
        torch.ops.fastvae.grad_dot_backward.default,
        (torch.ones(6, 4, dtype=torch.float64, device=device), *detached, [1, 0], [1, 0, 1, 1, 0, 1, 1, 1]),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_compile(device: torch.device) -> None:
    torch._dynamo.reset()

    def call(*tensors: Tensor) -> Tensor:
        return ops.grad_dot(*(2 * tensor for tensor in tensors)).tanh()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ("one", "layers"):
        tensors = [of[0] for of in factors(shape, device=device)]
        found, expected = compiled(*tensors), call(*tensors)
        gradients = [torch.autograd.grad(out.sum(), tensors) for out in (found, expected)]
        for a, b in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_autocast_computes_in_float32(device: torch.device) -> None:
    half = factors(dtype=torch.bfloat16, device=device)
    full = [[tensor.detach().float() for tensor in of] for of in half]
    with torch.autocast(device.type, torch.bfloat16):
        found = ops.grad_dot(*half)
        assert torch.equal(raw.grad_dot(*full, [1, 1]), found)
    assert found.dtype == torch.float32 and torch.equal(found, ops.grad_dot(*full))


def test_modes_and_bound_operator(device: torch.device) -> None:
    lists = factors(device=device)
    expected = ops.grad_dot(*lists)
    assert expected.requires_grad
    bound = raw.grad_dot(*lists, [1, 1])
    assert bound.requires_grad
    with torch.no_grad():
        results = [bound.detach(), ops.grad_dot(*lists), raw.grad_dot(*lists, [1, 1])]
    with torch.inference_mode():
        results.append(ops.grad_dot(*([tensor * 1 for tensor in of] for of in lists)))
    for result in results:
        assert not result.requires_grad and torch.equal(result, expected)


def test_odd_inputs(device: torch.device) -> None:
    h_a, delta_a, h_b, delta_b = (of[0].detach() for of in factors(device=device))
    expected = ops.grad_dot(h_a, delta_a, h_b, delta_b)
    strided = torch.stack([h_a, h_a], -1)[..., 0]
    turned = delta_a.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(ops.grad_dot(strided, turned, h_b, delta_b), expected)
    spread = ops.grad_dot(h_a[:1].expand_as(h_a), delta_a[:1].expand_as(delta_a), h_b, delta_b)
    assert relative(spread, expected[:1].expand_as(spread)) < 1e-14
    assert torch.equal(
        ops.grad_dot(h_a[:, 0], delta_a[:, 0], h_b, delta_b),
        ops.grad_dot(h_a[:, :1], delta_a[:, :1], h_b, delta_b),
    )
    assert ops.grad_dot(h_a[:0], delta_a[:0], h_b, delta_b).shape == (0, 4)
    no_terms = ops.grad_dot(h_a[:, :0], delta_a[:, :0], h_b, delta_b)
    assert no_terms.shape == (6, 4) and not bool(no_terms.any())
    assert (
        relative(
            ops.grad_dot(h_a[..., :0], delta_a, h_b[..., :0], delta_b), delta_a.sum(1) @ delta_b.sum(1).T
        )
        < 1e-14
    )


A, B = torch.zeros(3, 2, 4), torch.zeros(5, 2, 4)
ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "dims": (
        lambda: ops.grad_dot(A[0, 0], A, B, B),
        ValueError,
        r"inputs_a: expected shape \[N, features\] or",
    ),
    "half": (
        lambda: ops.grad_dot(A.half(), A.half(), B.half(), B.half()),
        TypeError,
        "inputs_a: expected float32 or",
    ),
    "mixed": (
        lambda: ops.grad_dot(A, A.double(), B, B),
        TypeError,
        "output_grads_a: expected Float as inputs_a",
    ),
    "terms": (
        lambda: ops.grad_dot(A, A[:, :1], B, B),
        ValueError,
        "output_grads_a: expected samples and terms as",
    ),
    "samples": (
        lambda: ops.grad_dot(A, A, B, A),
        ValueError,
        "output_grads_b: expected samples and terms as",
    ),
    "in": (lambda: ops.grad_dot(A, A, B[..., :2], B), ValueError, "inputs_b: expected 4 features"),
    "out": (lambda: ops.grad_dot(A, A, B, B[..., :2]), ValueError, "output_grads_b: expected 4 features"),
    "layers": (lambda: ops.grad_dot([A], [A, A], [B], [B]), ValueError, "output_grads_a: expected 1 layers"),
    "none": (
        lambda: ops.grad_dot([], [], [], []),
        ValueError,
        "inputs_a: expected at least one layer, got none",
    ),
    "flags": (
        lambda: ops.grad_dot(A, A, B, B, [True, False]),
        ValueError,
        "bias: expected 1 layers as inputs_a",
    ),
    "devices": (
        lambda: ops.grad_dot(A, A, B, B.to("meta")),
        ValueError,
        "output_grads_b: expected cpu as inputs_a",
    ),
    "counts": (
        lambda: ops.grad_dot([A, A[:1]], [A, A[:1]], [B, B], [B, B]),
        ValueError,
        "inputs_a: expected 3 samples in every layer",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match="fastvae::grad_dot: " + message):
        call()


def test_repeats_to_the_bit_and_on_one_thread_or_two() -> None:
    lists = factors("tiles", torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = ops.grad_dot(*lists)
        assert torch.equal(two, ops.grad_dot(*lists))
        torch.set_num_threads(1)
        assert relative(ops.grad_dot(*lists), two) < 1e-6
    finally:
        torch.set_num_threads(before)

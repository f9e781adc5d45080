"""Decoders that are not lowered: what the operators' way through autograd promises, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from jacobian_problems import entries, gradients
from layer_kinds import Around, Call, Wave, decoder
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastvae import ops, reference

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be lowered")


def codes(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(32), nn.Sequential(nn.Unflatten(1, (4, 8)), nn.InstanceNorm1d(4))]
)
def test_the_gradient_through_a_norm(norm: nn.Module, p: int) -> None:
    """Reverse over forward, which torch gets wrong here, was off by 0.66."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 32), norm, nn.Flatten(), nn.GELU(), nn.Linear(32, 20)).double()
    z = codes().requires_grad_()
    for function in (ops.jacobian_l1, reference.jacobian_l1):
        value, wanted = function(module, z, "none", p=p), entries(module, z, p)
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
        expected = gradients(wanted, module, z)
        for name, gradient in gradients(value, module, z).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("p", [1, 2])
def test_many_latents_in_parts(p: int) -> None:
    """20 latents times 3 samples times 30,000 outputs: two parts of ten after the first, the last not full."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(21, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 30_000)).double()
    z = torch.randn(3, 21, dtype=torch.float64, requires_grad=True)
    chosen = list(range(1, 21))
    value = reference.jacobian_l1(module, z, latents=chosen, p=p)
    expected = torch.func.vmap(torch.func.jacfwd(module))(z)[:, :, chosen].abs().pow(p).sum() / 3
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    with torch.no_grad():
        alone = reference.jacobian_l1(module, z, latents=chosen, p=p)
    assert torch.equal(alone, value)
    parts = sum(reference.jacobian_l1(module, z, "sum", latents=[i], p=p) for i in chosen) / 3
    left, right = gradients(value, module, z), gradients(parts, module, z)
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-10, atol=1e-12, msg=name)


def test_a_decoder_made_for_one_batch_size() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.condition = nn.Linear(3, 5), torch.randn(4, 5, dtype=torch.float64)

        def forward(self, z: Tensor) -> Tensor:
            return torch.sin(self.inner(z) + self.condition)

    torch.manual_seed(0)
    module, z = Conditional().double(), codes().requires_grad_()
    value, wanted = ops.jacobian_l1(module, z, "none"), entries(module, z)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients(value, module, z), gradients(wanted, module, z), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("p", [1, 2])
def test_empty_and_frozen(p: int) -> None:
    module, z = decoder("LayerNorm"), codes()
    nothing = reference.jacobian_l1(module, z, latents=[], p=p)
    assert nothing == 0
    assert not any(g.any() for g in gradients(nothing, module, z.requires_grad_()).values())
    assert reference.jacobian_l1(module, z[:0], "none", p=p).shape == (0,)
    assert reference.jacobian_l1(module, z[:0], "sum", p=p) == 0
    frozen = decoder("LayerNorm").requires_grad_(False)
    assert not reference.jacobian_l1(frozen, z.detach(), p=p).requires_grad
    assert reference.jacobian_l1(frozen, z, p=p).requires_grad
    with torch.no_grad():
        assert not reference.jacobian_l1(module, z, p=p).requires_grad
    assert not z.grad and all(parameter.grad is None for parameter in module.parameters())


def test_a_sample_without_a_number_stays_alone() -> None:
    module, z = decoder("LayerNorm"), codes()
    z[1] = float("nan")
    found = reference.jacobian_l1(module, z, "none")
    assert found.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("p", [1, 2])
def test_torch_func_transforms_of_the_reference(p: int) -> None:
    module, z = decoder("LayerNorm"), codes().requires_grad_()

    def function(z: Tensor) -> Tensor:
        return reference.jacobian_l1(module, z, "sum", p=p)

    (expected,) = torch.autograd.grad(function(z), z)
    point = z.detach()
    torch.testing.assert_close(torch.func.grad(function)(point), expected, rtol=1e-12, atol=1e-12)
    one_by_one = torch.func.vmap(torch.func.grad(function))(point[:, None])[:, 0]
    torch.testing.assert_close(one_by_one, expected, rtol=1e-12, atol=1e-12)
    tangent = torch.func.jvp(function, (point,), (torch.ones_like(z),))[1]
    torch.testing.assert_close(tangent, expected.sum(), rtol=1e-12, atol=1e-12)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(point, torch.ones_like(z)))
        torch.testing.assert_close(
            forward_ad.unpack_dual(dual).tangent, expected.sum(), rtol=1e-12, atol=1e-12
        )


def test_forward_mode_of_the_flow() -> None:
    """A code that carries a tangent and requires no gradient lost it on the way to its force."""
    module, z = decoder("GELU"), codes(2)
    x, alpha = torch.zeros(2, 6, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def ends(z: Tensor) -> Tensor:
        return reference.hamiltonian_flow(module, z, torch.ones_like(z), x, 0.1, alpha, "gaussian")[0].sum()

    (expected,) = torch.autograd.grad(ends(z.requires_grad_()), z)
    with forward_ad.dual_level():
        dual = ends(forward_ad.make_dual(z.detach(), torch.ones_like(z)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected.sum(), rtol=1e-12, atol=0)


def flow(module: nn.Module, z: Tensor) -> tuple[Tensor, ...]:
    x = torch.zeros_like(module(z).detach())
    return ops.hamiltonian_flow(module, z, torch.ones_like(z), x, 0.1, z.new_ones(2), "gaussian")


def attention(h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])


TWICE: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Around(Call(attention), (4, 6)),
    "encoder layer": lambda: Around(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), (4, 6)).eval(),
    "lstm": lambda: Around(nn.LSTM(6, 4, batch_first=True), (4, 6)),
    "gru": lambda: Around(nn.GRU(6, 4, batch_first=True), (4, 6)),
    "glu": lambda: Around(nn.GLU(), (6,)),
    "hardsigmoid": lambda: Around(nn.Hardsigmoid(), (6,)),
    "autograd.Function": lambda: Around(Call(Wave.apply), (6,)),
}


@pytest.mark.parametrize("name", TWICE)
def test_operators_in_float32(name: str) -> None:
    """In float32, where PyTorch has kernels of its own for these: close to float64, gradients too."""
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        module = TWICE[name]().to(dtype)
        z = codes().to(dtype).requires_grad_()
        loss = ops.jacobian_l1(module, z) + sum(part.sum() for part in flow(module, z))
        found = gradients(loss, module, z)
        x = torch.zeros_like(module(z).detach())
        found["log_px"] = ops.log_px(module, z[None], x, "gaussian")
        results.append({"loss": loss.detach(), **found})
    for key, wanted in results[1].items():
        assert wanted.isfinite().all()
        torch.testing.assert_close(results[0][key].double(), wanted, rtol=1e-4, atol=1e-5, msg=key)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("step", [Once.apply, lambda h: Once.apply(h)], ids=["kept", "looked up"])
@pytest.mark.parametrize("operator", [ops.jacobian_l1, flow], ids=["jacobian_l1", "hamiltonian_flow"])
def test_once_differentiable_is_refused(
    operator: Callable[..., object], step: Callable[[Tensor], Tensor]
) -> None:
    """torch.autograd.grad leaves its terms out without a word."""
    module = Around(Call(step), (6,)).double()
    with pytest.raises(
        NotImplementedError, match=r"decoder: expected one that PyTorch can differentiate twice"
    ):
        operator(module, codes().requires_grad_())
    with torch.no_grad():
        if operator is flow:
            assert flow(module, codes())[0].isfinite().all()


def test_a_layer_that_torch_cannot_differentiate_twice_is_refused_in_our_words() -> None:
    module = Around(nn.CrossMapLRN2d(2), (4, 4, 4)).double()
    with pytest.raises(NotImplementedError, match=r"jacobian_l1: decoder: expected one that PyTorch can"):
        ops.jacobian_l1(module, codes())


@pytest.mark.slow
def test_a_compiled_part_is_refused_in_our_words() -> None:
    """By the reference, which runs the module itself; the operators read a copy without the compiler."""
    plain = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    inner = torch.compile(plain, backend="aot_eager")
    module, same = Around(inner, (6,)).double(), Around(plain, (6,)).double()
    same.load_state_dict(
        {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    )
    with pytest.raises(NotImplementedError, match=r"compiled by torch\.compile; pass the module as it was"):
        reference.jacobian_l1(module, codes().requires_grad_())
    torch.testing.assert_close(ops.jacobian_l1(module, codes()), ops.jacobian_l1(same, codes()))
    torch.testing.assert_close(flow(module, codes()), flow(same, codes()))


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_decoder_has_no_derivative() -> None:
    """It was 0.0, with a warning of the same result."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
    quantised = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
    z = codes().float()
    for operator in (ops.jacobian_l1, flow):
        with pytest.raises(
            ValueError, match=r"decoder: expected an output that can be differentiated.*quantised"
        ):
            operator(quantised, z)
    x = torch.zeros(4, 5)
    found = ops.log_px(quantised, z[None], x, "gaussian")
    torch.testing.assert_close(found, ops.log_px(network, z[None], x, "gaussian"), rtol=0.05, atol=0.05)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(self.bias).expand(len(z), 5)


@pytest.mark.parametrize(
    "module",
    [
        Constant(),
        Around(Call(torch.Tensor.detach), (6,)).double(),
        Around(Call(lambda h: h.argmax(1)[:, None]), (6,)).double(),
    ],
    ids=["constant", "detached", "argmax"],
)
def test_an_output_without_a_gradient_to_z_is_refused(module: nn.Module) -> None:
    for operator in (ops.jacobian_l1, flow):
        with pytest.raises(ValueError, match=r"decoder( output)?: expected an? (output|floating)"):
            operator(module, codes())


def test_outputs_that_are_no_tensor_are_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 5)

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(z), z

    module = nn.Sequential(nn.Linear(3, 3), Pair()).double()
    with pytest.raises(
        TypeError, match=r"decoder: expected it to return one tensor \[B, \.\.\.\], got a tuple"
    ):
        reference.jacobian_l1(module, codes())
    for operator in (
        lambda m, z: reference.hamiltonian_flow(m, z, z, z, 0.1, z.new_ones(1)),
        lambda m, z: reference.log_px(m, z[None], z),
    ):
        with pytest.raises(TypeError, match=r"decoder output: expected a tensor \[B, \.\.\.\], got tuple"):
            operator(module, codes())


def looking(h: Tensor) -> Tensor:
    """What it does depends on numbers, which no reading of its operations shows."""
    return torch.tanh(h) if h.sum() < 1e9 else h


def test_nothing_is_warned_twice() -> None:
    module = Around(Call(looking), (6,)).double()
    with pytest.warns(UserWarning, match="cannot be lowered"):
        ops.jacobian_l1(module, codes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.jacobian_l1(module, codes())

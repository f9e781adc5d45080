"""leapfrog_kick_drift and leapfrog_kick_temper: values, gradients, layouts."""

from __future__ import annotations

import pytest
import torch
from flow_problems import FLOAT32, assert_near, problem
from leapfrog_calls import OPS, each_op, function, inputs, leaves, value_and_gradients
from torch import Tensor

from fastvae import ops, reference


# Four roundings of elements of order one; for the step size and alpha a sum of twelve.
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("step_shape", [(), (1,), (3,), (1, 1)], ids=str)
@each_op
def test_against_reference(
    name: str, step_shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    tensors = inputs(name, step_shape)
    expected = value_and_gradients(function(name, reference), leaves(tensors))
    actual = value_and_gradients(function(name), leaves(tensors, device, dtype))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype and a.device.type == device.type
        assert_near(a, e, tolerance)


# Up to 64 samples share a row of terms.
@pytest.mark.parametrize(
    "batch, dim", [(1, 1), (1, 7), (33, 1), (257, 65), (5, 4099), (1003, 5), (20003, 2)], ids=str
)
@each_op
def test_odd_sizes(name: str, batch: int, dim: int, device: torch.device) -> None:
    """Sizes that no vector divides, and enough elements for several threads."""
    tensors = inputs(name, (dim,), batch, dim)
    expected = value_and_gradients(function(name, reference), leaves(tensors))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, FLOAT32)):
        actual = value_and_gradients(function(name), leaves(tensors, device, dtype))
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, tolerance)


@each_op
def test_gradcheck(name: str, device: torch.device) -> None:
    assert torch.autograd.gradcheck(function(name), leaves(inputs(name), device))


@each_op
def test_every_subset_of_gradients(name: str, device: torch.device) -> None:
    tensors = inputs(name)
    out = len(function(name)(*tensors))
    whole = value_and_gradients(function(name), leaves(tensors, device))[out:]
    for subset in range(2 ** len(tensors)):
        args = [t.to(device, copy=True).requires_grad_(bool(subset >> i & 1)) for i, t in enumerate(tensors)]
        outputs = function(name)(*args)
        assert outputs[0].requires_grad == bool(subset)
        wanted = [i for i in range(len(tensors)) if subset >> i & 1]
        if wanted:
            generator = torch.Generator().manual_seed(1)
            cotangents = [torch.randn(o.shape, generator=generator, dtype=o.dtype).to(o) for o in outputs]
            found = torch.autograd.grad(outputs, [args[i] for i in wanted], cotangents)
            assert all(torch.equal(g, whole[i]) for g, i in zip(found, wanted, strict=True))


def test_one_output_used(device: torch.device) -> None:
    args = leaves(inputs(OPS[0]), device)
    expected = leaves(inputs(OPS[0]))
    for i in range(2):
        found = torch.autograd.grad(ops.leapfrog_kick_drift(*args)[i].sum(), args, allow_unused=True)
        out = reference.leapfrog_kick_drift(*expected)[i]
        wanted = torch.autograd.grad(out.sum(), expected, allow_unused=True)
        for f, w in zip(found, wanted, strict=True):
            assert_near(
                torch.zeros(1) if f is None else f, torch.zeros_like(f).cpu() if w is None else w, 1e-14
            )


@pytest.mark.parametrize("number", [0.3, 1])
def test_numbers(number: float, device: torch.device) -> None:
    z, rho, force = (t.to(device) for t in inputs(OPS[0])[:3])
    whole = torch.tensor(float(number), dtype=z.dtype, device=device)
    for a, b in zip(
        ops.leapfrog_kick_drift(z, rho, force, number),
        ops.leapfrog_kick_drift(z, rho, force, whole),
        strict=True,
    ):
        assert torch.equal(a, b)
    half = torch.tensor(0.5, dtype=z.dtype, device=device)
    assert torch.equal(
        ops.leapfrog_kick_temper(rho, force, number, 0.5), ops.leapfrog_kick_temper(rho, force, whole, half)
    )


def test_the_step_written_out(device: torch.device) -> None:
    z, rho, force = (torch.tensor([[v]], dtype=torch.float64, device=device) for v in (1.0, 2.0, -4.0))
    z_next, rho_half = ops.leapfrog_kick_drift(z, rho, force, 0.5)
    assert (rho_half.item(), z_next.item()) == (1.0, 1.5)
    assert ops.leapfrog_kick_temper(rho_half, force, 0.5, 0.25).item() == 0.0
    assert ops.leapfrog_kick_temper(rho, force * 0, 0.5, 0.25).item() == 0.5
    assert ops.leapfrog_kick_temper(rho, force, 0.5, 0.0).item() == 0.0


@each_op
def test_layouts(name: str, device: torch.device) -> None:
    """Expanded and transposed inputs give what their dense copies give, to the last bit."""
    dense = [t.to(device) for t in inputs(name, (3,), 3, 3)]
    strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in dense]
    strided[1] = dense[1][:1].expand(3, 3)
    dense[1] = strided[1].contiguous()
    step = 2 if name == "leapfrog_kick_temper" else 3
    strided[step] = dense[step][:1].expand(3)
    dense[step] = strided[step].contiguous()

    def run(tensors: list[Tensor]) -> list[Tensor]:
        return value_and_gradients(function(name), [t.detach().requires_grad_() for t in tensors])

    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(run(strided), run(dense), strict=True))


@pytest.mark.parametrize("batch, dim", [(0, 3), (3, 0), (0, 0)], ids=str)
@each_op
def test_empty(name: str, batch: int, dim: int, device: torch.device) -> None:
    args = leaves(inputs(name, (), batch, dim), device)
    out = function(name)(*args)
    assert all(o.shape == (batch, dim) for o in out)
    for argument, gradient in zip(args, torch.autograd.grad([o.sum() for o in out], args), strict=True):
        assert gradient.shape == argument.shape and not gradient.any()


def test_the_two_halves_make_the_flow(device: torch.device) -> None:
    """With the force of a decoder by autograd, the loop that users write gives hamiltonian_flow."""
    p = problem(steps=4).to(device)

    def log_px(z: Tensor) -> Tensor:
        return p.likelihood.log_prob(p.decoder(z), p.x)

    def force(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(log_px(z).sum(), z)[0] - z.detach()

    z, rho, g = p.z, p.rho, force(p.z)
    for k in range(4):
        z, rho = ops.leapfrog_kick_drift(z, rho, g, p.step_size[k])
        g = force(z)
        rho = ops.leapfrog_kick_temper(rho, g, p.step_size[k], p.alpha[k])
    for actual, expected in zip((z, rho, log_px(z)), p.run(), strict=True):
        assert_near(actual, expected.detach().cpu(), 1e-12)

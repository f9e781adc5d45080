"""Products of matrices by our kernel or by torch's BLAS: the same to rounding; torch.matmul where that is needed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastvae import Network, ops
from fastvae._extension import raw

SCRIPT = """
import torch, fastvae
torch.manual_seed(0)
decoder = torch.nn.Sequential(torch.nn.Linear(3, 40), torch.nn.Softplus(), torch.nn.Linear(40, 50)).double()
z = torch.randn(17, 3, dtype=torch.float64, requires_grad=True)
penalty = fastvae.ops.jacobian_l1(decoder, z)
penalty.backward()
gradients = [float(p.grad.abs().sum()) for p in decoder.parameters() if p.grad is not None]
print(fastvae._C.build_info()["cpu_products"], penalty.item().hex(), *gradients)
"""


def run(products: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTVAE_PRODUCTS": products},
    )


def test_the_environment_chooses() -> None:
    found = {}
    for products in ("kernel", "library", ""):
        done = run(products)
        assert done.returncode == 0, done.stderr
        name, penalty, *gradients = done.stdout.split()
        assert name == products or products in ("", "kernel"), "the kernel needs AVX-512"
        found[products] = [float.fromhex(penalty), *map(float, gradients)]
    assert found["kernel"] == pytest.approx(found["library"], rel=1e-13)
    assert found[""] in (found["kernel"], found["library"])
    done = run("mkl")
    assert (
        done.returncode != 0 and "FASTVAE_PRODUCTS: expected 'kernel' or 'library', got 'mkl'" in done.stderr
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (0, 5), (1, 1, 5)], ids=str)
def test_as_matmul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = torch.randn(shape).mul(8).to(dtype), torch.randn(7, 5).mul(8).to(dtype)
    y = raw.matrix_product(a, b.mT)
    assert y.shape == (*shape[:-1], 7) and y.dtype == dtype
    torch.testing.assert_close(y, a @ b.mT)
    strided = torch.randn(*shape[:-1], 10).mul(8).to(dtype)[..., ::2]
    torch.testing.assert_close(raw.matrix_product(strided, b.mT), strided @ b.mT)
    torch.testing.assert_close(raw.matrix_product(a[..., :0], b[:, :0].mT), a[..., :0] @ b[:, :0].mT)


def test_what_is_transformed_is_left_to_torch() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(5, 2)
    torch.testing.assert_close(torch.func.vmap(lambda one: raw.matrix_product(one, b))(a), a @ b)
    leaf = b.clone().requires_grad_()
    raw.matrix_product(a, leaf).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, a.flatten(0, 1).sum(0)[:, None].expand(5, 2))
    _, along = torch.func.jvp(lambda x: raw.matrix_product(x, b), (a,), (a,))
    torch.testing.assert_close(along, a @ b)
    assert raw.matrix_product(a.to("meta"), b.to("meta")).shape == (3, 4, 2)


def test_wrong_sizes_are_errors() -> None:
    a: Tensor = torch.randn(3, 4)
    for b in (torch.randn(5, 2), torch.randn(4, 2, dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            raw.matrix_product(a, b)


@pytest.fixture
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 50)

    def forward(self, z: Tensor) -> Tensor:
        h = self.first(z).tanh()
        return self.last(h + self.middle(h).sigmoid())


CHAIN = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 50))


def flow_and_gradients(decoder: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, rho = torch.randn(2, 24, 8, generator=generator).to(dtype)
    x = torch.rand(24, 50, generator=generator).round().to(dtype)
    decoder, leaf = copy.deepcopy(decoder).to(dtype), z.requires_grad_()
    found = ops.hamiltonian_flow(decoder, leaf, rho, x, 0.05, torch.full((3,), 0.9, dtype=dtype))
    gradients = torch.autograd.grad(sum(f.sum() for f in found), [leaf, *decoder.parameters()])
    return [*(f.detach() for f in found), *gradients]


@pytest.mark.parametrize("decoder", [CHAIN, Residual()], ids=["chain", "read"])
def test_medium_precision_rounds_operands_to_bfloat16(decoder: nn.Module, medium: None) -> None:
    expected = flow_and_gradients(decoder, torch.float64)
    for actual, wanted in zip(flow_and_gradients(decoder, torch.float32), expected, strict=True):
        assert actual.dtype == torch.float32
        # 2^-9 for each operand of each product that a number has behind it; they do not all err one way.
        assert float((actual - wanted).norm()) <= 2**-6 * float(wanted.norm())
    assert Network(copy.deepcopy(decoder), z=torch.randn(4, 8)).lowered == 1


def test_medium_precision_touches_nothing_but_float32(medium: None) -> None:
    a, b = torch.randn(33, 40, dtype=torch.float64), torch.randn(40, 37, dtype=torch.float64)
    found = raw.matrix_product(a, b)
    torch.testing.assert_close(found, a @ b, rtol=1e-13, atol=1e-13)
    narrow = raw.matrix_product(a.float(), b.float())
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, raw.matrix_product(a, b))
    exact = raw.matrix_product(a.float(), b.float())
    torch.testing.assert_close(exact.double(), found, rtol=1e-5, atol=1e-5)
    if raw.build_info()["cpu_bfloat16"]:
        rounded = a.bfloat16().double() @ b.bfloat16().double()
        torch.testing.assert_close(narrow.double(), rounded, rtol=1e-5, atol=1e-5)

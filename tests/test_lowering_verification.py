"""What was read of a module is compared with the module's own output, and can be compared at any time."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from decoders import DECODERS
from torch import Tensor, nn

from fastvae import ops
from fastvae.influence import TracIn
from fastvae.lowering import UnsupportedLayer, explain, lower, verify
from fastvae.models import HVAE, VAE
from fastvae.models.base import BaseVAE
from fastvae.ood import LikelihoodRegret

CONFIG = np.array([0.2])
"""Not a dictionary, in which a change is seen: what becomes of an array nobody can tell."""


class Sloped(nn.Module):
    """Its slope is in a global array."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, z: Tensor) -> Tensor:
        return self.second(F.leaky_relu(self.first(z), float(CONFIG[0])))


@pytest.fixture(autouse=True)
def _restore() -> None:
    CONFIG[0] = 0.2


def sloped(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Sloped().to(dtype), torch.randn(5, 3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_global_that_changed_is_found_and_read_again(dtype: torch.dtype) -> None:
    module, z = sloped(dtype)
    before = ops.jacobian_l1(module, z)
    verify(module, z)
    CONFIG[0] = 0.9
    # What cannot be seen without looking:
    assert torch.equal(ops.jacobian_l1(module, z), before)
    with pytest.raises(
        UnsupportedLayer, match=r"Sloped\): the output of the network read from it is off by .* global"
    ):
        verify(module, z)
    wanted = torch.func.vmap(torch.func.jacfwd(module))(z).abs().sum() / len(z)
    torch.testing.assert_close(ops.jacobian_l1(module, z), wanted)
    verify(module, z)


def test_a_global_that_changed_before_the_first_use_is_read_again() -> None:
    module, z = sloped()
    assert "leaky_relu" in explain(module)
    CONFIG[0] = 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = ops.jacobian_l1(module, z)
    wanted = torch.func.vmap(torch.func.jacfwd(module))(z).abs().sum() / len(z)
    torch.testing.assert_close(value, wanted)


class Alternating(nn.Module):
    """Another slope with every run, which no reading can give."""

    runs: ClassVar[list[int]] = [0]

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, z: Tensor) -> Tensor:
        self.runs[0] += 1
        return F.leaky_relu(self.inner(z), (self.runs[0] % 7) / 7)


def test_a_forward_that_reading_gets_wrong_is_not_lowered() -> None:
    torch.manual_seed(0)
    module, z = Alternating().double(), torch.randn(5, 3, dtype=torch.float64)
    x = torch.zeros(5, 4, dtype=torch.float64)
    with pytest.warns(
        UserWarning, match=r"cannot be lowered.*Alternating\): the output of the network read from it"
    ):
        value = ops.log_px(module, z[None], x, "gaussian")
    module.runs[0] -= 1
    expected = -(
        module(z).square().sum(1) / 2 + 2 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    )
    torch.testing.assert_close(value[0], expected)
    with pytest.raises(UnsupportedLayer, match="read from it"):
        lower(module)
    assert "Not lowered" in explain(module)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [name for name, case in DECODERS.items() if case.lowered])
def test_every_public_decoder_passes(name: str, dtype: torch.dtype) -> None:
    module = DECODERS[name].make().to(dtype)
    for size in (1.0, 1e-6, 1e4):
        verify(module, size * torch.randn(3, DECODERS[name].latent_dim, dtype=dtype))


class Counted(nn.Module):
    runs: ClassVar[list[int]] = [0]

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, z: Tensor) -> Tensor:
        self.runs[0] += isinstance(z, Tensor)
        return torch.tanh(self.inner(z))


def test_it_is_compared_once_and_again_when_read_again() -> None:
    module, z = Counted(), torch.randn(5, 3)
    module.runs[0] = 0
    for _ in range(3):
        ops.jacobian_l1(module, z)
        ops.log_px(module, z[None], torch.zeros(5, 4), "gaussian")
    assert module.runs[0] == 1
    module.tag = "changed"
    ops.jacobian_l1(module, z)
    assert module.runs[0] == 2
    # A batch without codes shows nothing.
    fresh = Counted()
    ops.jacobian_l1(fresh, z[:0])
    assert module.runs[0] == 2
    ops.jacobian_l1(fresh, z)
    assert module.runs[0] == 3


def test_codes_that_show_nothing_are_left_to_the_operator() -> None:
    module, z = sloped(torch.float32)
    with pytest.raises(TypeError, match="parameters"):
        ops.jacobian_l1(module, z.double())
    with pytest.raises(ValueError, match="features"):
        ops.jacobian_l1(module, z[:, :2])
    for bad in (float("nan"), float("inf")):
        assert ops.jacobian_l1(module, torch.full_like(z, bad)).isnan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.jacobian_l1(module, z).isfinite()
    for wrong in (z[0], z.double(), z[:0], z.numpy()):
        with pytest.raises(ValueError, match="verify: z: expected codes"):
            verify(module, wrong)  # type: ignore[arg-type]


def test_nothing_is_left_changed() -> None:
    """spectral_norm moves on at each evaluation in training: once a call, as without the comparison."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 6)), nn.Tanh(), nn.Linear(6, 4)
    )
    z = torch.randn(5, 3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    lower(module)
    once = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert any(not torch.equal(once[name], before[name]) for name in once)
    module.load_state_dict(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.jacobian_l1(module, z)
    assert all(torch.equal(tensor, once[name]) for name, tensor in module.state_dict().items())
    assert module.training and all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    verify(module, z)


def test_threads_that_read_at_once() -> None:
    """One thread's tracing was another's "its type replaces __call__": not lowered, for good."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(5):
            cases = [sloped() for _ in range(4)]
            with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
                warnings.simplefilter("error")
                found = list(pool.map(lambda case: ops.jacobian_l1(*case), cases * 4))
            assert all(torch.equal(value, found[0]) for value in found)
            assert all("Not lowered" not in explain(module) for module, _ in cases)
    finally:
        sys.setswitchinterval(before)


def test_a_module_that_runs_while_another_is_read() -> None:
    """torch.fx patches every module's __call__ for as long as it traces: only its own thread may notice."""
    reading, done = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.shared = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, z: Tensor) -> Tensor:
            if not isinstance(z, Tensor):
                reading.set()
                assert done.wait(60)
            return F.linear(torch.tanh(self.inner(z)), self.shared.weight, self.shared.bias)

    module, z = Slow(), torch.randn(2, 3)
    wanted = module(z)
    with ThreadPoolExecutor(1) as pool:
        lowered = pool.submit(lower, module)
        assert reading.wait(60)
        try:
            found = module(z)
            bystander = nn.Sequential(nn.Linear(3, 2), nn.ReLU())(z)
        finally:
            done.set()
        assert lowered.result().spec == "linear 0 1;tanh;linear 2 3"
    assert type(found) is Tensor and torch.equal(found, wanted)
    assert type(bystander) is Tensor


def test_not_a_module_gets_a_hint() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def decode(self, z: Tensor) -> Tensor:
            return self.inner(z)

        forward = decode

    model, z = Model(), torch.zeros(2, 3)
    for wrong, hint in (
        (
            model.decode,
            r"got method \(decode of a Model\); pass a module whose forward does what decode does",
        ),
        (model.forward, r"got method \(forward of a Model\); pass the module itself|decode of a Model"),
        (lambda z: z, r"got function; pass a module"),
        (Model, r"got type; pass an instance, Model\(\.\.\.\)"),
        (3, r"got int$"),
    ):
        with pytest.raises(TypeError, match=r"fastvae::jacobian_l1: decoder must be an nn\.Module, " + hint):
            ops.jacobian_l1(wrong, z)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"lower: module must be an nn\.Module, " + hint):
            lower(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"verify: module must be an nn\.Module, " + hint):
            verify(wrong, z)  # type: ignore[arg-type]


class Misread(nn.Module):
    """Of slope 0.9, but for whoever reads it with a stand-in."""

    def __init__(self, inputs: int, outputs: int, honest: bool) -> None:
        super().__init__()
        self.first, self.second, self.honest = nn.Linear(inputs, 6), nn.Linear(6, outputs), honest

    def forward(self, z: Tensor) -> Tensor:
        slope = 0.9 if self.honest or type(z) is Tensor else 0.2
        return self.second(F.leaky_relu(self.first(z), slope))


def misread_model(kind: type[BaseVAE], part: str, honest: bool) -> tuple[BaseVAE, Tensor]:
    """Its encoder or decoder is misread, unless ``honest``."""
    torch.manual_seed(0)
    model = kind(Misread(5, 6, honest or part != "encoder"), Misread(3, 5, honest or part != "decoder"))
    return model.double().eval(), torch.rand(4, 5, dtype=torch.float64)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", [VAE, HVAE])
@pytest.mark.filterwarnings("ignore:.*slower:UserWarning", "ignore:.*cannot be lowered:UserWarning")
def test_influence_notices_a_misread_network(kind: type[BaseVAE], part: str) -> None:
    # The flow's own parameters are covered where its decoder is lowered.
    uncovered = "materialise" if kind is HVAE and part == "decoder" else "error"
    found, expected = (
        TracIn(model, x, None, seed=3, uncovered=uncovered).influence(x[:2])
        for model, x in (misread_model(kind, part, honest) for honest in (False, True))
    )
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("target", ["encoder", "posterior"])
@pytest.mark.filterwarnings("ignore:.*slower:UserWarning", "ignore:.*cannot be lowered:UserWarning")
def test_likelihood_regret_notices_a_misread_network(target: Any, part: str) -> None:
    found, expected = (
        LikelihoodRegret(model, num_steps=5, lr=1e-2, target=target).refit(x)
        for model, x in (misread_model(VAE, part, honest) for honest in (False, True))
    )
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.mu, expected.mu, rtol=1e-9, atol=1e-12)

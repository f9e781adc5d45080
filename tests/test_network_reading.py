"""Reading modules of all sorts: the sweeps do as the module, or it is not read for a reason."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jacobian_problems import gradients
from network_modules import COUPLED, NOT_READ, READ, Plain, of, through_a_list
from network_problems import check_network, codes
from torch import Tensor, nn

from fastvae import VAE, Network, ops, reference
from fastvae.likelihoods import Gaussian
from fastvae.lowering import CoupledSamples, UnsupportedLayer
from fastvae.network import cache
from fastvae.network.cache import read_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*cannot be lowered|.*is not read"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def state_of(module: nn.Module) -> dict[str, Any]:
    """All that a reading could change."""
    found: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    for path, inner in module.named_modules():
        own = {
            key: value for key, value in vars(inner).items() if isinstance(value, (int, str, list, Tensor))
        }
        found |= {
            f"{path}:{key}": list(value) if isinstance(value, list) else value for key, value in own.items()
        }
        found |= {f"{path}:{name}": (id(p), p.requires_grad, p.grad) for name, p in inner._parameters.items()}
    return found


def assert_unchanged(module: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(module)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value) if isinstance(value, Tensor) else after[key] == value, key


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_the_module(name: str) -> None:
    module = made(READ[name])
    before = state_of(module)
    read_network(module, codes())
    assert_unchanged(module, before)
    check_network(module, codes())
    check_network(module, codes(1))


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_runs_through_autograd(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, reason = NOT_READ[name]
    module = made(make)
    before = state_of(module)
    with pytest.raises(UnsupportedLayer, match=reason):
        read_network(module, codes())
    assert_unchanged(module, before)
    # torch.export shows the graph of what it cannot run, over pages.
    assert capfd.readouterr() == ("", "")
    z = codes().requires_grad_()
    value, wanted = ops.jacobian_l1(module, z, "none"), reference.jacobian_l1(module, z, "none")
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    found, expected = gradients(value, module, z), gradients(wanted, module, z)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    x = torch.zeros(len(z), 4, dtype=z.dtype)
    log_px = ops.log_px(module, z.detach()[None], x, "gaussian")
    torch.testing.assert_close(log_px, reference.log_px(module, z.detach()[None], x, "gaussian").detach())


def test_a_weight_that_a_hook_computes_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forward of the module leaves another tensor under its name."""
    module = made(READ["weight_norm by a hook"])
    read_network(module, codes())
    monkeypatch.setattr(cache, "read_program", None)
    module(codes())
    read_network(module, codes())
    assert "weight" in vars(module.first) and len(module.first._forward_pre_hooks) == 1


def test_a_hook_that_changes_buffers_is_not_read() -> None:
    module = made(READ["spectral_norm by a hook"]).train()
    with pytest.raises(UnsupportedLayer, match="computed by a hook"):
        read_network(module, codes())


OPERATORS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "jacobian_l1": ops.jacobian_l1,
    "hamiltonian_flow": lambda m, z: flow(m, z),
    "log_px_and_force": lambda m, z: ops.log_px_and_force(m, z, z.new_zeros(len(z), 4), "gaussian"),
    "log_px": lambda m, z: ops.log_px(m, torch.stack([z, z]), z.new_zeros(len(z), 4), "gaussian"),
    "Network.log_px": lambda m, z: Network(m, "gaussian").log_px(z, z.new_zeros(len(z), 4)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_samples_are_refused(name: str) -> None:
    said = r"a sample's output depends on the other samples|its forward draws random numbers"
    module = made(COUPLED[name])
    for operator in (*OPERATORS.values(), *OPERATORS.values()):
        with pytest.raises(CoupledSamples, match=said):
            operator(module, codes())
    for operator in OPERATORS.values():
        with pytest.raises(CoupledSamples, match=said):
            operator(made(COUPLED[name]), codes(1))


@pytest.mark.parametrize("name", [*COUPLED, "BatchNorm"])
def test_coupled_samples_are_trained(name: str) -> None:
    """By the gradient of their sum, which is PyTorch's own."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double() if name == "BatchNorm" else None
    module = made(COUPLED[name]) if module is None else module
    model = VAE(nn.Linear(4, 6).double(), module, latent_dim=3, likelihood="gaussian")
    x, z = torch.rand(5, 4, dtype=torch.float64), codes(5)
    for loss in (
        model(x).sum(),
        model.log_px(z, x).sum(),
        ops.elbo(model.encoder, module, x, z, "gaussian").sum(),
        ops.iwae_bound(model.encoder, module, x, likelihood="gaussian", num_samples=2).sum(),
    ):
        found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in found)
    torch.manual_seed(1)
    found = torch.autograd.grad(model.log_px(z, x).sum(), list(module.parameters()))
    torch.manual_seed(1)
    wanted = torch.autograd.grad(Gaussian().log_prob(module(z), x).sum(), list(module.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)  # the same operations


def test_random_numbers_of_a_reading_are_nobodys() -> None:
    """A run that is resumed reads at another step than one that was not stopped."""
    module = made(of(lambda m, z: Plain.forward(m, z + torch.randn_like(z))))
    before = torch.get_rng_state()
    with pytest.raises(UnsupportedLayer, match="random"):
        read_network(module, codes())
    assert torch.equal(torch.get_rng_state(), before)


def flow(module: nn.Module, z: Tensor) -> tuple[Tensor, ...]:
    x = torch.zeros(len(z), 4).to(z)
    return ops.hamiltonian_flow(module, z, torch.ones_like(z), x, 0.1, z.new_ones(2), "gaussian")


def test_a_branch_on_the_batch_size() -> None:
    """What torch.export says of batches of up to four was taken for all."""
    module = made(of(lambda m, z: Plain.forward(m, z) * (2 if z.shape[0] > 4 else 1)))
    for batch in (3, 5):
        z = codes(batch)
        for mine, wanted in zip(flow(module, z), by_reference(module, z), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*cannot be lowered")
def test_a_branch_on_the_batch_size_as_a_number() -> None:
    """Which torch.export takes for a constant: each larger batch is compared once."""
    module = made(of(lambda m, z: Plain.forward(m, z) * (2 if len(z) > 80 else 1)))
    for batch in (3, 70, 81, 70):
        z = codes(batch)
        for mine, wanted in zip(flow(module, z), by_reference(module, z), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(UnsupportedLayer, match="batches of another size"):
        read_network(module, z)


def by_reference(module: nn.Module, z: Tensor) -> tuple[Tensor, ...]:
    x = torch.zeros(len(z), 4).to(z)
    return reference.hamiltonian_flow(module, z, torch.ones_like(z), x, 0.1, z.new_ones(2), "gaussian")


def scaled(m: nn.Module, z: Tensor) -> Tensor:
    return Plain.forward(m, z) * m.scale * (2 if m.training else 1)


def through_a_tensor(m: nn.Module, z: Tensor) -> Tensor:
    return Plain.forward(m, z) * m.held["w"]


def new_parameter(module: nn.Module) -> None:
    module.first.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))


def double_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.layers[0].weight.mul_(2)


def layers() -> list[nn.Module]:
    return [nn.Linear(4, 4).double() for _ in range(2)]


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "an attribute": (of(scaled, scale=1.0), lambda m: setattr(m, "scale", 3.0)),
    "the training flag": (of(scaled, scale=1.0), lambda m: m.eval()),
    "a parameter": (Plain, new_parameter),
    "a parameter's data": (Plain, lambda m: setattr(m.first.weight, "data", torch.ones(6, 3).double())),
    "a child": (Plain, lambda m: setattr(m, "last", nn.Sequential(nn.Linear(6, 4), nn.ELU()).double())),
    "a hook that computed a weight": (
        READ["weight_norm by a hook"],
        lambda m: m.first._forward_pre_hooks and nn.utils.remove_weight_norm(m.first),
    ),
    "a forward hook": (Plain, lambda m: m.last.register_forward_hook(lambda _, given, output: output * 3)),
    "a hook before": (Plain, lambda m: m.register_forward_pre_hook(lambda _, given: (given[0] * 3,))),
    "a list, shorter": (of(through_a_list, layers=layers), lambda m: m.layers.pop()),
    "a list, one replaced": (
        of(through_a_list, layers=layers),
        lambda m: m.layers.__setitem__(0, layers()[0]),
    ),
    "a weight in a list": (of(through_a_list, layers=layers), double_in_place),
    "a ModuleList, longer": (
        of(through_a_list, layers=lambda: nn.ModuleList(layers())),
        lambda m: m.layers.append(layers()[0]),
    ),
    "a tensor in a dict": (
        of(through_a_tensor, held=lambda: {"w": torch.ones(4).double()}),
        lambda m: m.held.update(w=torch.full((4,), 3.0).double()),
    ),
    "a tensor in a dict, in place": (
        of(through_a_tensor, held=lambda: {"w": torch.ones(4).double()}),
        lambda m: m.held["w"].mul_(3),
    ),
    "the forward of the class": (
        of(scaled, scale=1.0),
        lambda m: setattr(type(m), "forward", lambda m, z: 3 * Plain.forward(m, z)),
    ),
    "its precision and back": (Plain, lambda m: m.float().double()),
    "what is trained": (Plain, lambda m: m.first.weight.requires_grad_(False)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_calls_are_seen(name: str) -> None:
    make, change = CHANGES[name]
    module = made(make)
    for _ in range(2):
        z = codes().requires_grad_()
        value, wanted = ops.jacobian_l1(module, z, "none"), reference.jacobian_l1(module, z, "none")
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
        found, expected = gradients(value, module, z), gradients(wanted, module, z)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        change(module)


def test_what_is_made_in_the_dtype_of_the_codes() -> None:
    """A trace notes float32; compared is in float64, where such numbers have more digits."""

    def waves(m: Plain, z: Tensor) -> Tensor:
        return Plain.forward(m, z) * (torch.linspace(0, 1, 4, dtype=z.dtype) * 7).sin()

    module, z = made(of(waves)).float(), codes().float()
    assert read_network(module, z).sweeps.by_autograd == []
    x = torch.zeros(len(z), 4)
    found = ops.log_px_and_force(module, z, x, "gaussian")
    wanted = reference.log_px_and_force(module, z, x, "gaussian")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # rounding in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies_again_and_again(dtype: torch.dtype) -> None:
    """From the third call on a flow is code, which holds complex numbers here."""
    module, z = made(READ["frequencies"]).to(dtype), codes().to(dtype).requires_grad_()
    results = []
    for _ in range(8):
        total = sum(part.sum() for part in flow(module, z)[:3]) + ops.jacobian_l1(module, z)
        results.append([total.detach(), *torch.autograd.grad(total, [z, *module.parameters()])])
    near = 1e-12 if dtype == torch.float64 else 1e-5  # the same operations, in another order
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=near, atol=near)


def test_frozen_and_trained_again() -> None:
    module, z = made(Plain), codes().requires_grad_()
    for trained in (True, False, True):
        module.requires_grad_(trained)
        value = ops.jacobian_l1(module, z, "none")
        wanted = reference.jacobian_l1(module, z, "none")
        torch.testing.assert_close(
            gradients(value, module, z), gradients(wanted, module, z), rtol=1e-10, atol=1e-10
        )
        network = read_network(module, z)
        assert all(t is None or t.requires_grad == trained for t in network.tensors)


def test_first_codes_that_are_no_numbers() -> None:
    """NaN compares with nothing: what was read was then never compared, and an own function's gradient was wrong."""
    module = made(of(lambda m, z: m.last(m.first(z).sin()) + z.sum(1, keepdim=True).detach()))
    z = codes()
    lost = ops.jacobian_l1(module, torch.full_like(z, float("nan")), "none")
    assert lost.isnan().all()
    torch.testing.assert_close(ops.jacobian_l1(module, z, "none"), reference.jacobian_l1(module, z, "none"))


def test_modules_are_let_go() -> None:
    """Neither the cache nor a copy keeps one, read or not."""
    for make in (Plain, READ["a function of one's own"], NOT_READ["a branch on the code"][0]):
        module = made(make)
        sum(part.sum() for part in flow(module, codes().requires_grad_())).backward()
        ops.jacobian_l1(module, codes())
        kind, one = type(module), weakref.ref(module)
        weight = weakref.ref(module.first.weight)
        del module
        gc.collect()
        assert one() is None
        assert weight() is None
        assert not [each for each in gc.get_objects() if type(each) is kind]


def test_threads_that_read_at_once() -> None:
    """Eight threads, four of them with a module of their own."""
    shared = made(Plain)
    own = [made(of(lambda m, z: Plain.forward(m, z).cos())) for _ in range(4)]
    z, failures, start = codes(), [], threading.Barrier(8)
    wanted = {id(m): reference.jacobian_l1(m, z, "none").detach() for m in (shared, *own)}

    def work(module: nn.Module) -> None:
        try:
            start.wait()
            for _ in range(5):
                torch.testing.assert_close(
                    ops.jacobian_l1(module, z, "none").detach(), wanted[id(module)], rtol=1e-12, atol=1e-12
                )
                torch.testing.assert_close(module(z), copy.deepcopy(module)(z))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(module,)) for module in (*own, *[shared] * 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_inference_mode() -> None:
    with torch.inference_mode():
        z = codes()
        module = made(Plain)
        value = ops.jacobian_l1(module, z, "none"), *flow(module, z)
    usual = made(Plain)
    wanted = ops.jacobian_l1(usual, codes(), "none"), *flow(usual, codes())
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    # The codes of an inference mode that is over.
    torch.testing.assert_close(ops.jacobian_l1(usual, z, "none"), wanted[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(flow(usual, z), wanted[1:], rtol=1e-12, atol=0)


def test_autocast_at_the_first_reading() -> None:
    module, z = made(Plain).float(), codes().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = ops.jacobian_l1(module, z, "none")
    torch.testing.assert_close(first, ops.jacobian_l1(module, z, "none"), rtol=0, atol=0)
    torch.testing.assert_close(first, reference.jacobian_l1(module, z, "none"), rtol=1e-5, atol=1e-6)


def keeps(m: Plain, z: Tensor) -> Tensor:
    m.kept = m.first(z)  # type: ignore[assignment]
    return m.last(m.slope * m.kept.sin())  # type: ignore[operator]


class KeepsAndCounts(Plain):
    """Not to be read, for the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.slope = 0, 1.0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        return keeps(self, z)


@pytest.mark.parametrize("make", [of(keeps, slope=1.0), KeepsAndCounts], ids=["read", "not read"])
def test_what_each_forward_changes_does_not_make_it_read_again(make: Callable[[], nn.Module]) -> None:
    module, z = made(make), codes()

    def known() -> list[Any]:
        with contextlib.suppress(UnsupportedLayer):
            read_network(module, z)
        return list(cache._known[module].values())

    known()
    module(z)
    first = known()  # with the new attribute
    for _ in range(2):
        module(z)
        assert known()[0] is first[0]
    module.slope = 2.0
    assert known()[0] is not first[0]
    _, force = ops.log_px_and_force(module, z, torch.ones(len(z), 4, dtype=z.dtype))
    expected = reference.log_px_and_force(module, z, torch.ones(len(z), 4, dtype=z.dtype), "bernoulli")[1]
    torch.testing.assert_close(force, expected, rtol=1e-10, atol=1e-12)

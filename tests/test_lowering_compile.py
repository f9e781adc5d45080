"""lower() inside torch.compile, and on modules that are compiled themselves."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from decoders import DECODERS, FunctionalMLP
from lowered import EXACT, LOWERED, check, latents, mlp, run_spec, wrapped
from torch import Tensor, nn

from fastvae.lowering import UnsupportedLayer, lower


def traced(decoder: nn.Module, z: Tensor) -> Tensor:
    network = lower(decoder)
    return run_spec(network.spec, network.tensors, z).square().sum()


class Counter:
    """A backend that counts how often Dynamo compiles."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.count += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LOWERED)
def test_compiles_without_a_break(name: str, counter: Counter) -> None:
    case = DECODERS[name]
    module, z = case.make(), latents(case.latent_dim)
    compiled = torch.compile(traced, fullgraph=True, backend=counter)
    for _ in range(2):
        parameters = list(module.parameters())
        ours = torch.autograd.grad(compiled(module, z), parameters)
        theirs = torch.autograd.grad(module(z).square().sum(), parameters)
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.1)
    assert counter.count == 1


def test_compiled_region_sees_a_changed_module(counter: Counter) -> None:
    compiled = torch.compile(traced, fullgraph=True, backend=counter)
    module, z = mlp(), latents(4)

    def compare() -> None:
        torch.testing.assert_close(compiled(module, z), module(z).square().sum(), **EXACT)

    compare()
    for change in (
        lambda: module.__setitem__(1, nn.Tanh()),
        lambda: setattr(module[3], "negative_slope", 0.5),
        lambda: module.append(nn.Dropout(0.5).eval()),
        lambda: module.append(nn.Sigmoid()),
        lambda: setattr(module[4], "bias", None),
        lambda: setattr(module[0], "weight", nn.Parameter(torch.randn_like(module[0].weight))),
    ):
        change()
        compare()
    module.train()
    with pytest.raises(Exception, match="switch the module to eval"):
        compiled(module, z)
    module.eval()
    compare()
    module.append(nn.Softmax(-1))
    with pytest.raises(Exception, match=r"layer '7' \(Softmax\): there is no closed form"):
        compiled(module, z)


def test_compiled_custom_modules_guard_their_attributes(counter: Counter) -> None:
    class Model(FunctionalMLP):
        def __init__(self) -> None:
            super().__init__()
            self.slope = 0.1
            self.shape = [1, 8, 8]
            self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

        def forward(self, z: Tensor) -> Tensor:
            return F.leaky_relu(self.fc4(self.fc3(z)), self.slope).view(-1, *self.shape)

    torch.manual_seed(0)
    module, z = Model().double(), latents(6)
    compiled = torch.compile(traced, fullgraph=True, backend=counter)
    for change in (lambda: None, lambda: setattr(module, "slope", 0.3), lambda: module.shape.pop(0)):
        change()
        torch.testing.assert_close(compiled(module, z), module(z).square().sum(), **EXACT)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        return  # Dynamo itself does not look at requires_grad again
    module.frozen.requires_grad_(True)
    with pytest.raises(Exception, match="parameter 'frozen' requires a gradient"):
        compiled(module, z)


def test_without_fullgraph_the_error_is_unsupported_layer(counter: Counter) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1))

    def fallback(decoder: nn.Module, z: Tensor) -> Tensor:
        try:
            network = lower(decoder)
        except UnsupportedLayer:
            return decoder(z).sum()
        return run_spec(network.spec, network.tensors, z).sum()

    z = torch.ones(1, 2)
    with pytest.raises(UnsupportedLayer, match="Softmax"):
        torch.compile(traced, backend=counter)(module, z)
    torch.testing.assert_close(torch.compile(fallback, backend=counter)(module, z), module(z).sum())


def test_strip_sigmoid_compiles(counter: Counter) -> None:
    def function(decoder: nn.Module, z: Tensor) -> Tensor:
        network = lower(decoder, strip_sigmoid=True)
        assert not network.ends_in_sigmoid
        return run_spec(network.spec, network.tensors, z).sigmoid()

    module, z = FunctionalMLP().double(), latents(6)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(module, z), module(z), **EXACT)
    with pytest.raises(Exception, match="strip_sigmoid=True"):
        compiled(mlp(), latents(4))


def test_compiled_modules_are_looked_through(counter: Counter) -> None:
    module, z = mlp(), latents(4)
    network = lower(torch.compile(module, backend=counter))
    assert network.spec == lower(module).spec
    assert network.names == lower(module).names
    assert all(left is right for left, right in zip(network.tensors, lower(module).tensors, strict=True))

    inner = nn.Sequential(nn.Linear(4, 4).double(), torch.compile(module, backend=counter))
    check(inner, z)
    mixed = wrapped(F.relu)
    mixed.fc = torch.compile(mixed.fc, backend=counter)
    check(mixed, z)
    module.compile(backend=counter)
    check(module, z)
    for decoder in (torch.compile(mlp(), backend=counter), inner):
        compiled = torch.compile(traced, fullgraph=True, backend=counter)
        torch.testing.assert_close(compiled(decoder, z), decoder(z).square().sum(), **EXACT)
    wrapper = torch.compile(mlp(), backend=counter)
    wrapper.register_forward_hook(lambda *_: types.SimpleNamespace())
    with pytest.raises(UnsupportedLayer, match="hook"):
        lower(wrapper)

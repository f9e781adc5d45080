"""lower() on modules that change, are copied, or are dropped: what is cached never shows."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from decoders import DECODERS, FunctionalMLP, ViewConv
from lowered import EXACT, LOWERED, check, latents, mlp, run_spec
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastvae.lowering import UnsupportedLayer, explain, lower


@pytest.mark.parametrize("name", ["sequential_mlp", "pytorch_vae"])
def test_weight_updates_are_seen(name: str) -> None:
    case = DECODERS[name]
    module, z = case.make(), latents(case.latent_dim)
    check(module, z)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    check(module, z)
    module.load_state_dict(case.make(seed=5).state_dict())
    check(module, z)
    first = next(inner for inner in module.modules() if isinstance(inner, nn.Linear))
    first.weight = nn.Parameter(torch.randn_like(first.weight))
    assert any(tensor is first.weight for tensor in check(module, z).tensors)


def test_changed_modules_are_read_again() -> None:
    module, z = mlp(), latents(4)
    check(module, z)
    module[1] = nn.Tanh()
    assert "tanh" in check(module, z).spec
    module[3].negative_slope = 0.5
    assert "leaky_relu 0.5" in check(module, z).spec
    module[4].bias = None
    assert check(module, z).spec.endswith("linear 4 -1")
    module.append(nn.Sigmoid())
    assert check(module, z).ends_in_sigmoid
    del module[5]
    module.insert(2, nn.Identity())
    check(module, z)
    module[0] = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 6)).double()
    check(module, z)
    module[0][0] = parametrizations.weight_norm(module[0][0])
    check(module, z)
    torch.nn.utils.parametrize.remove_parametrizations(module[0][0], "weight")
    check(module, z)


def test_custom_modules_that_change_are_read_again() -> None:
    @dataclasses.dataclass
    class Config:
        channels: int = 8

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 16)
            self.size = [2, 8]
            self.config = Config()
            self.act = F.relu
            self.mode = "plain"
            self.last = None

        def forward(self, z: Tensor) -> Tensor:
            h = self.act(self.fc(z))
            h = torch.tanh(h) if self.mode == "tanh" else h
            h = h.view(-1, *self.size).flatten(1).view(h.size(0), self.config.channels, -1)
            return h if self.last is None else self.last(h)

    torch.manual_seed(0)
    module, z = Model().double(), latents(4)
    check(module, z)
    for change in (
        lambda: module.size.__setitem__(slice(None), [4, 4]),
        lambda: setattr(module.config, "channels", 2),
        lambda: setattr(module, "act", F.silu),
        lambda: setattr(module, "mode", "tanh"),
        lambda: setattr(module, "last", nn.Flatten()),
        lambda: setattr(module.last, "start_dim", -2),
    ):
        before = lower(module).spec
        change()
        after = check(module, z).spec
        assert after != before or module.last is not None


def test_a_replaced_forward_is_seen() -> None:
    class Model(FunctionalMLP):
        pass

    module = Model().double()
    assert "sigmoid" in lower(module).spec
    Model.forward = lambda self, z: self.fc4(self.fc3(z))
    assert lower(module).spec == "linear 0 1;linear 2 3"


def test_structure_is_not_read_again_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvae.lowering import structure

    modules = [case.make() for case in DECODERS.values()]
    for module in modules:
        try:
            lower(module)
        except UnsupportedLayer:
            continue

    def fail(module: nn.Module) -> None:
        raise AssertionError(f"read {type(module).__name__} again")

    monkeypatch.setattr(structure, "Structure", fail)
    for module in modules:
        try:
            lower(module)
        except UnsupportedLayer:
            continue


def test_parametrised_tensors_follow_their_originals() -> None:
    case = DECODERS["parametrised"]
    module, z = case.make(), latents(case.latent_dim)
    network = check(module, z)
    assert set(network.names[:2]) == {"0.bias", "0.weight"}
    with torch.no_grad():
        module[2].parametrizations.weight.original.add_(1.0)
    check(module, z)

    # In training mode every read of a spectral norm's weight is a power iteration: one a call, none by
    # explain.
    twin = copy.deepcopy(module).train()
    other = copy.deepcopy(twin)
    lower(twin), lower(twin), explain(twin)
    other(z), other(z)
    name = "0.parametrizations.weight.0._u"
    assert torch.equal(dict(twin.named_buffers())[name], dict(other.named_buffers())[name])


def test_copies_and_pickles() -> None:
    for name in LOWERED:
        case = DECODERS[name]
        module, z = case.make(), latents(case.latent_dim)
        lower(module)
        twin = copy.deepcopy(module)
        network = check(twin, z)
        ours = {tensor.data_ptr() for tensor in module.parameters()}
        assert not any(tensor.data_ptr() in ours for tensor in network.tensors)
        # Parametrised modules cannot be pickled (torch says so).
        if name != "parametrised":
            check(pickle.loads(pickle.dumps(module)), z)


def test_modules_are_not_kept_alive() -> None:
    references = []
    for name, case in DECODERS.items():
        module = case.make()
        try:
            lower(module)
        except UnsupportedLayer:
            assert not case.lowered, name
        references.append(weakref.ref(module))
        del module
    layer = nn.Linear(2, 2)
    lower(layer)
    references.append(weakref.ref(layer))
    del layer
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_functional_call_and_fx_graph_modules() -> None:
    module, z = mlp(), latents(4)
    lower(module)
    replaced = {name: torch.randn_like(tensor) for name, tensor in module.named_parameters()}

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = module

        def forward(self, z: Tensor) -> Tensor:
            network = lower(self.decoder)
            return run_spec(network.spec, network.tensors, z)

    ours = torch.func.functional_call(Reader(), {f"decoder.{k}": v for k, v in replaced.items()}, z)
    theirs = torch.func.functional_call(module, replaced, z)
    torch.testing.assert_close(ours, theirs, **EXACT)
    check(torch.fx.symbolic_trace(ViewConv().double()), latents(5))

"""lower() against the modules themselves, through an interpreter of the spec in plain torch (float64)."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from decoders import DECODERS, DCGANView, FunctionalMLP, PyTorchVAE, ViewConv
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fastvae.lowering import CoupledSamples, LoweredNetwork, UnsupportedLayer, explain, lower

# The interpreter calls the ATen functions that the modules call, in the same order: equal up to the
# rounding of another memory layout.
EXACT = {"rtol": 0.0, "atol": 1e-12}
LOWERED = [name for name, case in DECODERS.items() if case.lowered]


def run_spec(spec: str, tensors: list[Tensor], z: Tensor) -> Tensor:
    """The network of a spec, layer by layer."""
    h = z
    for text in spec.split(";"):
        kind, *words = text.split()

        def tensor(word: str) -> Tensor | None:
            return None if word == "-1" else tensors[int(word)]

        if kind == "linear":
            h = F.linear(h, *map(tensor, words))
        elif kind == "conv2d":
            sh, sw, ph, pw, dh, dw, groups = map(int, words[2:])
            h = F.conv2d(h, *map(tensor, words[:2]), (sh, sw), (ph, pw), (dh, dw), groups)
        elif kind == "conv_transpose2d":
            sh, sw, ph, pw, oph, opw, dh, dw, groups = map(int, words[2:])
            h = F.conv_transpose2d(
                h, *map(tensor, words[:2]), (sh, sw), (ph, pw), (oph, opw), groups, (dh, dw)
            )
        elif kind == "batch_norm":
            weight, bias, mean, var = map(tensor, words[:4])
            h = F.batch_norm(h, mean, var, weight, bias, False, 0.0, float(words[4]))
        elif kind == "reshape":
            h = h.reshape(h.shape[0], *map(int, words))
        elif kind == "gelu_tanh":
            h = F.gelu(h, approximate="tanh")
        elif kind in ("tanh", "sigmoid"):
            h = getattr(torch, kind)(h)
        else:
            h = getattr(F, kind)(h, *map(float, words))
    return h


def check(module: nn.Module, z: Tensor) -> LoweredNetwork:
    network = lower(module)
    torch.testing.assert_close(run_spec(network.spec, network.tensors, z), module(z), **EXACT)
    return network


def latents(dim: int, batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 3)
    ).double()


class Wrapped(nn.Module):
    """A Linear(4, 6), then whatever function the test is about."""

    def __init__(self, function) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(self.fc(z))


def wrapped(function) -> nn.Module:
    torch.manual_seed(0)
    return Wrapped(function).double()


@pytest.mark.parametrize("name", LOWERED)
def test_decoder_is_lowered_exactly(name: str) -> None:
    case = DECODERS[name]
    module, z = case.make(), latents(case.latent_dim)
    network = check(module, z)
    used = {id(tensor) for tensor in network.tensors}
    if name != "parametrised":
        assert all(id(parameter) in used for parameter in module.parameters())
    assert len(network.tensors) == len(network.names)


@pytest.mark.parametrize("name", LOWERED)
def test_gradients_reach_every_parameter(name: str) -> None:
    case = DECODERS[name]
    module, z = case.make(), latents(case.latent_dim)
    network = lower(module)
    parameters = list(module.parameters())
    ours = torch.autograd.grad(run_spec(network.spec, network.tensors, z).square().sum(), parameters)
    theirs = torch.autograd.grad(module(z).square().sum(), parameters)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_at_least_eight_of_the_ten_are_lowered() -> None:
    assert len(DECODERS) >= 10
    assert len(LOWERED) >= 8


def test_residual_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayer, match=r"add.*two tensors that both depend on z"):
        lower(DECODERS["residual"].make())


def test_control_flow_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"module itself.*Conditional.*torch\.fx cannot trace"):
        lower(DECODERS["conditional"].make())


def test_spec_text() -> None:
    network = lower(mlp())
    assert network.spec == "linear 0 1;relu;linear 2 3;leaky_relu 0.01;linear 4 5"
    assert network.names == ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")
    assert not network.ends_in_sigmoid
    spec = lower(DECODERS["view_conv"].make()).spec.split(";")
    assert spec[2] == "reshape 8 4 4"
    assert spec[3] == "conv_transpose2d 2 3 2 2 1 1 1 1 1 1 1"
    assert spec[5] == "conv_transpose2d 4 -1 2 2 1 1 0 0 1 1 1"
    assert spec[-1] == "reshape -1"


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        F.silu,
        F.gelu,
        F.elu,
        F.softplus,
        torch.relu,
        torch.tanh,
        torch.sigmoid,
        torch.nn.functional.sigmoid,
        lambda h: F.gelu(h, approximate="tanh"),
        lambda h: F.softplus(h, 3.0, threshold=1.0),
        lambda h: F.leaky_relu(h, negative_slope=0.3),
        lambda h: F.elu(input=h, alpha=0.3),
        lambda h: h.relu(),
        lambda h: h.sigmoid(),
        lambda h: h.tanh(),
        lambda h: h.relu_(),
        lambda h: F.dropout(h, 0.5, training=False).relu(),
        lambda h: h.view(-1, 2, 3).tanh(),
        lambda h: h.view(h.size(0), 2, -1),
        lambda h: h.view((h.shape[0], 3, 2)),
        lambda h: h.reshape(h.size()[0], 1, h.size(1)),
        lambda h: h.reshape(h.shape[0], h.shape[-1] // 2, 2),
        lambda h: torch.reshape(h, (-1, 6, 1, 1)),
        lambda h: torch.reshape(h, shape=(-1, 6, 1)),
        lambda h: h.view(h.shape + (1, 1)),  # noqa: RUF005
        lambda h: h.view(h.size(0), 2, 3).flatten(1),
        lambda h: torch.flatten(h.view(-1, 1, 2, 3), start_dim=2),
        lambda h: h.unflatten(1, (2, 3)),
        lambda h: torch.unflatten(h, -1, (3, -1)),
        lambda h: h.unsqueeze(-1).unsqueeze(2),
        lambda h: h.unsqueeze(1).squeeze(1),
        lambda h: h[:, None],
        lambda h: h[..., None, None],
        lambda h: h[:, :, None].contiguous(),
        lambda h: h[:, None, ..., None].clone(),
    ],
)
def test_functions(function) -> None:
    check(wrapped(function), latents(4))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: h + h, "add"),
        (lambda h: h + h.relu(), "two tensors"),
        (lambda h: 2 * h, "mul"),
        (lambda h: h * 2, r"mul.*no closed form"),
        (lambda h: h[0], "not a reshape"),
        (lambda h: h[:, :2], "not a reshape"),
        (lambda h: h[None], "not a reshape"),
        (lambda h: h.view(-1), "cannot reshape"),
        (lambda h: h.view(-1, 3), "cannot be reshaped"),
        (lambda h: h.view(3, 6), "must be the batch size"),
        (lambda h: h.view(-1, h.size(0)), "only the first dimension"),
        (lambda h: h.view(6, h.size(0)), "only the first dimension"),
        (lambda h: h.flatten(), "flattens the batch"),
        (lambda h: h.unsqueeze(0), "batch dimension"),
        (lambda h: h.squeeze(), "not supported"),
        (lambda h: h.permute(1, 0), "permute"),
        (lambda h: F.softmax(h, -1), "softmax"),
        (lambda h: F.layer_norm(h, (6,)), "layer_norm"),
        (lambda h: (h, h.relu())[0], "branches|last tensor"),
        (lambda h: (h.relu(), 1), "returns a tuple"),
        (lambda h: {"reconstruction": h}, "returns a dict"),
        (lambda h: h.detach(), "detach"),
        (lambda h: h.float(), "float"),
        (lambda h: h.to(h.device), "size or attributes"),
        (lambda h: h + torch.randn(6, dtype=torch.float64), "closed form|beside"),
        (lambda h: h.sigmoid() if h.sum() > 0 else h, "cannot trace"),
        (lambda h: h.new_zeros(h.shape[0], 6), "new_zeros"),
        (lambda h: torch.zeros(h.shape[0], 6), "zeros"),
        (lambda h: F.linear(h, torch.eye(6, dtype=torch.float64)), "parameter"),
        (lambda h: h.view(-1, 2, 3).view(torch.float64), "not supported|reshaped|must be"),
    ],
)
def test_refused_functions(function, message: str) -> None:
    with pytest.raises(UnsupportedLayer, match=message):
        lower(wrapped(function))


def test_dropped_in_place_result_is_not_skipped() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, z: Tensor) -> Tensor:
            h = self.fc1(z)
            F.relu(h, inplace=True)
            return self.fc2(h)

    with pytest.raises(UnsupportedLayer, match=r"fc2.*earlier tensor"):
        lower(Model())


def test_functional_linear_reads_the_modules_parameters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
            self.bias = nn.Parameter(torch.randn(5, dtype=torch.float64))
            self.out = nn.Linear(5, 3).double()

        def forward(self, z: Tensor) -> Tensor:
            return F.linear(F.linear(z, self.weight, self.bias).tanh(), self.out.weight, bias=self.out.bias)

    torch.manual_seed(0)
    assert set(check(Model(), latents(4)).names) == {"weight", "bias", "out.weight", "out.bias"}


def test_custom_modules_inside_sequential() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), FunctionalMLP(6), nn.Linear(64, 2)).double()
    network = check(module, latents(3))
    assert "2.fc3.weight" in network.names


def test_default_arguments_and_extra_arguments() -> None:
    class Defaults(FunctionalMLP):
        def forward(
            self, z: Tensor, y: Tensor | None = None, scale: float = 1.0, *, logits: bool = True
        ) -> Tensor:
            h = F.relu(self.fc3(z)) if y is None else z
            h = self.fc4(h)
            return h if logits and scale == 1.0 else torch.sigmoid(h)

    class Required(FunctionalMLP):
        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            return self.fc4(self.fc3(z))

    torch.manual_seed(0)
    check(Defaults().double(), latents(6))
    with pytest.raises(UnsupportedLayer, match="needs labels"):
        lower(Required())


def test_module_list_loop_and_shared_module() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.act = nn.Tanh()

        def forward(self, z: Tensor) -> Tensor:
            for layer in self.layers:
                z = self.act(layer(z))
            return self.layers[0](z)

    torch.manual_seed(0)
    network = check(Loop().double(), latents(4))
    assert len(network.tensors) == 6
    assert network.spec.split(";")[-1] == network.spec.split(";")[0]

    layer = nn.Linear(4, 4)
    tied = nn.Sequential(layer, nn.Tanh(), layer).double()
    assert check(tied, latents(4)).tensors[0] is layer.weight

    other = nn.Linear(4, 4)
    other.weight = layer.weight
    check(nn.Sequential(layer, nn.Tanh(), other).double(), latents(4))


def test_bare_layer() -> None:
    torch.manual_seed(0)
    assert check(nn.Linear(4, 3, bias=False).double(), latents(4)).spec == "linear 0 -1"


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


@pytest.mark.parametrize("name", ["pytorch_vae", "unflatten_conv", "dcgan_view", "nested_sequential"])
def test_train_mode_couples_samples_and_eval_mends_it(name: str) -> None:
    case = DECODERS[name]
    module, z = case.make(), latents(case.latent_dim)
    check(module, z)
    module.train()
    with pytest.raises(CoupledSamples, match=r"switch the module to eval\(\)"):
        lower(module)
    module.eval()
    check(module, z)


def test_coupled_samples_details() -> None:
    assert issubclass(CoupledSamples, UnsupportedLayer)
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0)).double()
    check(module, latents(3))
    module[1].p = 0.1
    with pytest.raises(CoupledSamples, match=r"layer '1' \(Dropout\)"):
        lower(module)
    with pytest.raises(CoupledSamples, match="running statistics"):
        lower(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval())
    with pytest.raises(CoupledSamples, match="dropout"):
        lower(wrapped(lambda h: F.dropout(h, 0.5)))
    torch.manual_seed(0)
    check(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)).double().eval(), latents(4))


def test_hooks_are_refused_by_name() -> None:
    def hook(*_: object) -> None:
        return None

    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        module = mlp()
        lower(module)
        handle = getattr(module[2], register)(hook)
        with pytest.raises(UnsupportedLayer, match=r"layer '2' \(Linear\).*hook"):
            lower(module)
        handle.remove()
        lower(module)
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        with pytest.raises(UnsupportedLayer, match="global module hooks"):
            lower(module)
    finally:
        handle.remove()
    lower(module)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm_names_the_new_one() -> None:
    with pytest.raises(UnsupportedLayer, match=r"WeightNorm.*parametrizations"):
        lower(nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 4))))
    module = nn.Sequential(nn.Linear(3, 4))
    prune.random_unstructured(module[0], "weight", amount=0.5)
    with pytest.raises(UnsupportedLayer, match=r"prune\.remove"):
        lower(module)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Activated(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input))


class Renamed(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        nn.init.zeros_(self.bias)


def test_subclasses() -> None:
    check(nn.Sequential(Renamed(4, 3), nn.ReLU()).double(), latents(4))

    class Inside(FunctionalMLP):
        def __init__(self) -> None:
            super().__init__()
            self.fc3 = Renamed(6, 20)

    check(Inside().double(), latents(6))
    with pytest.raises(UnsupportedLayer, match=r"layer '0' \(mul\)"):
        lower(nn.Sequential(Doubled(4, 3)))
    spec = check(nn.Sequential(Activated(4, 3), nn.Linear(3, 2)).double(), latents(4)).spec
    assert spec == "linear 0 1;tanh;linear 2 3"


def test_a_patched_stock_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = mlp()
    lower(module)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, h: h)
    with pytest.raises(UnsupportedLayer, match=r"layer '1' \(ReLU\): it changes the forward of ReLU"):
        lower(module)


def test_replaced_instance_forward_and_call_are_refused() -> None:
    module = mlp()
    module[1].forward = lambda h: h
    with pytest.raises(UnsupportedLayer, match="replaced on the instance"):
        lower(module)

    class Called(nn.ReLU):
        def __call__(self, h: Tensor) -> Tensor:
            return h

    with pytest.raises(UnsupportedLayer, match="__call__"):
        lower(nn.Sequential(nn.Linear(2, 2), Called()))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1)), r"layer '1' \(Softmax\): there is no closed form"),
        (nn.Sequential(nn.Linear(2, 2), nn.PReLU()), r"PReLU"),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), r"LayerNorm"),
        (nn.Sequential(nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.Upsample(scale_factor=2)), "Upsample"),
        (
            nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")),
            "padding_mode='reflect'",
        ),
        (nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 2, 4, padding="same")), "one side more"),
        (nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(3, 2, 1)), "expected 3 channels"),
        (nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1)), r"expected a \[B, 2, height, width\] input"),
        (nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)), nn.Linear(2, 3)), "flat.*last dimension"),
        (nn.Sequential(nn.Linear(2, 4), nn.Linear(3, 3)), "expected 3 features"),
        (nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (3, 2))), "4 elements"),
        (nn.Sequential(nn.Linear(2, 4), nn.Flatten(0)), "batch"),
        (nn.Sequential(nn.LazyLinear(4)), "lazy"),
        (nn.Sequential(nn.Identity()), "no layer that changes"),
        (nn.DataParallel(nn.Sequential(nn.Linear(2, 2))), r"DataParallel.*wrap the whole model"),
        (nn.GRUCell(2, 2), "GRUCell"),
    ],
)
def test_refused_modules(module: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedLayer, match=message):
        lower(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_and_non_modules_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        lower(lambda z: z)  # type: ignore[arg-type]
    scripted = torch.jit.trace(mlp(), latents(4))
    for module in (scripted, nn.Sequential(nn.Linear(4, 4), scripted)):
        with pytest.raises(UnsupportedLayer, match="TorchScript"):
            lower(module)
        assert "TorchScript" in explain(module)


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_refused() -> None:
    module = nn.Sequential(torch.ao.nn.quantized.Linear(2, 2))
    with pytest.raises(UnsupportedLayer, match="quantised"):
        lower(module)


def test_dtensor_parameters_are_refused_by_name(tmp_path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = mlp()
        lower(module)
        mesh = init_device_mesh("cpu", (1,))
        module[2].weight = nn.Parameter(distribute_tensor(module[2].weight.detach(), mesh))
        with pytest.raises(UnsupportedLayer, match=r"parameter '2\.weight' is a DTensor"):
            lower(module)
        with pytest.raises(UnsupportedLayer, match=r"'2\.weight' is a DTensor"):
            lower(copy.copy(module))
        wrapper = nn.parallel.DistributedDataParallel(mlp())
        with pytest.raises(UnsupportedLayer, match="DistributedDataParallel"):
            lower(wrapper)
    finally:
        distributed.destroy_process_group()


def test_unused_parameters_are_refused_by_name() -> None:
    module = FunctionalMLP().double()
    lower(module)
    module.extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedLayer, match=r"parameter 'extra\.weight' requires a gradient"):
        lower(module)
    module.extra.requires_grad_(False)
    check(module, latents(6))
    module.extra.bias.requires_grad_(True)
    with pytest.raises(UnsupportedLayer, match=r"'extra\.bias'"):
        lower(module)
    del module.extra
    module.tied = module.fc3.weight
    check(module, latents(6))
    module.scale = nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedLayer, match="'scale'"):
        lower(module)
    del module.scale
    module.extra = parametrizations.weight_norm(nn.Linear(2, 2, bias=False))
    with pytest.raises(UnsupportedLayer, match=r"extra\.parametrizations\.weight\.original0"):
        lower(module)


def test_parametrised_tensors_follow_their_originals() -> None:
    case = DECODERS["parametrised"]
    module, z = case.make(), latents(case.latent_dim)
    network = check(module, z)
    assert set(network.names[:2]) == {"0.bias", "0.weight"}
    with torch.no_grad():
        module[2].parametrizations.weight.original0.mul_(3.0)
    check(module, z)

    # In training mode every read of a spectral norm's weight is a power iteration: one a call, none by explain.
    twin = copy.deepcopy(module).train()
    other = copy.deepcopy(twin)
    lower(twin), lower(twin), explain(twin)
    other(z), other(z)
    name = "0.parametrizations.weight.0._u"
    assert torch.equal(dict(twin.named_buffers())[name], dict(other.named_buffers())[name])


@pytest.mark.parametrize("make", [FunctionalMLP, lambda: DECODERS["unflatten_conv"].make()])
def test_strip_sigmoid(make) -> None:
    module = make().double().eval()
    whole, stripped = lower(module), lower(module, strip_sigmoid=True)
    assert whole.ends_in_sigmoid
    assert not stripped.ends_in_sigmoid
    assert whole.spec == stripped.spec + ";sigmoid"


def test_strip_sigmoid_before_a_reshape_and_without_a_sigmoid() -> None:
    module = wrapped(lambda h: torch.sigmoid(h).view(-1, 1, 2, 3))
    z = latents(4)
    network = lower(module, strip_sigmoid=True)
    assert lower(module).ends_in_sigmoid
    torch.testing.assert_close(run_spec(network.spec, network.tensors, z).sigmoid(), module(z), **EXACT)
    with pytest.raises(ValueError, match="ends in a sigmoid, got one ending in linear") as caught:
        lower(mlp(), strip_sigmoid=True)
    assert not isinstance(caught.value, UnsupportedLayer)


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


def test_explain() -> None:
    text = explain(PyTorchVAE().eval())
    assert "decoder.0.1" in text
    assert "batch_norm" in text
    assert "weight [7, 48]" not in text
    assert "weight [48, 7], bias [48]" in text
    assert "[B, 3, 16, 16]" in text
    assert "Lowered: " in text
    text = explain(nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1), nn.Linear(3, 4)))
    lines = text.splitlines()
    assert lines[1].endswith("yes")
    assert lines[2].split()[:2] == ["1", "Softmax"]
    assert lines[2].endswith(" no")
    assert lines[3].endswith("not read")
    assert "autograd" in lines[-1]
    assert "switch the module to eval()" in explain(DCGANView().train())
    hooked = mlp()
    hooked[2].register_forward_hook(lambda *_: None)
    assert "forward_hook" in explain(hooked)


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

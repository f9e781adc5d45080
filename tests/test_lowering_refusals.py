"""What lower() refuses, and that it says why by name."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from decoders import DECODERS, FunctionalMLP
from lowered import check, latents, mlp, wrapped
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fastvae.lowering import CoupledSamples, UnsupportedLayer, explain, lower


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


def test_a_forward_that_assigns_attributes_is_refused_and_leaves_no_trace() -> None:
    class Remembers(FunctionalMLP):
        def forward(self, z: Tensor) -> Tensor:
            self.hidden = self.fc3(z)
            return self.fc4(self.hidden)

    module = Remembers().double()
    for _ in range(2):
        with pytest.raises(UnsupportedLayer, match=r"assigns attributes \(hidden\)"):
            lower(module)
        assert "hidden" not in vars(module)
    module(torch.zeros(1, 6, dtype=torch.float64))
    kept = module.hidden
    with pytest.raises(UnsupportedLayer, match="assigns attributes"):
        lower(module)
    assert module.hidden is kept


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


def test_residual_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayer, match=r"add.*two tensors that both depend on z"):
        lower(DECODERS["residual"].make())


def test_control_flow_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"module itself.*Conditional.*torch\.fx cannot trace"):
        lower(DECODERS["conditional"].make())


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
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)).double().eval()
    check(module, latents(4))
    mean, module[1].running_mean = module[1].running_mean, None
    with pytest.raises(CoupledSamples):
        lower(module)
    module[1].running_mean = mean
    check(module, latents(4))


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
        assert "'2.weight' is a DTensor" in explain(module)
        fresh = copy.deepcopy(module)
        with pytest.raises(UnsupportedLayer, match=r"parameter '2\.weight' is a DTensor"):
            lower(fresh)
        fresh[2].weight = nn.Parameter(fresh[2].weight.full_tensor())
        lower(fresh)
        wrapper = nn.parallel.DistributedDataParallel(mlp())
        with pytest.raises(UnsupportedLayer, match="DistributedDataParallel"):
            lower(wrapper)
        del wrapper  # where it outlives its group, PyTorch may wait for ever when it is freed
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

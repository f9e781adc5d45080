"""lower() against the modules themselves, through the plain torch interpreter of the spec (float64)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decoders import DECODERS, DCGANView, FunctionalMLP, PyTorchVAE
from lowered import EXACT, LOWERED, check, latents, mlp, run_spec, wrapped
from torch import Tensor, nn

from fastvae.lowering import UnsupportedLayer, explain, lower


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

"""Private copies of modules: nothing of the module is shared that a score would change, and it computes the same."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from influence_problems import mlp
from torch import Tensor, nn

from fastvae import HVAE, VAE
from fastvae.lowering import lower
from fastvae.private import PrivateCopies, private_copy, twin_of


class Tied(nn.Module):
    """One layer under two names, one weight in two layers, a list that holds a layer again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.order = [self.second, self.first]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = torch.tanh(layer(x))
        return self.again(x)


class Locked(nn.Module):
    """Holds what copy.deepcopy cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lock = nn.Linear(4, 4), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.layer(x)


class Closures(nn.Module):
    """Runs its layers through a lambda, a function inside a function and bound methods."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.head = lambda x: self.norm(self.layer(x))

        def twice(x: Tensor) -> Tensor:
            return head(head(x))

        head = self.head
        self.twice, self.bound = twice, self.layer.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.bound(x))


class Old(nn.Module):
    """Weights that hooks compute before each forward: the old weight_norm, spectral_norm and prune."""

    def __init__(self) -> None:
        super().__init__()
        from torch.nn.utils import prune

        self.pruned = nn.Linear(4, 4)
        prune.l1_unstructured(self.pruned, "weight", 0.3)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.spectral = torch.nn.utils.spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.spectral(self.normed(self.pruned(x)))


def compiled() -> nn.Module:
    return nn.Sequential(torch.compile(mlp(4, 5, 4)), nn.DataParallel(nn.Linear(4, 4)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


KINDS = [
    Tied,
    Locked,
    Closures,
    Old,
    Recurrent,
    compiled,
    lambda: mlp(4, 5, 4),
    lambda: VAE(mlp(4, 8), mlp(4, 4)),
]


@pytest.mark.parametrize(
    "kind", KINDS, ids=["tied", "locked", "closures", "old", "lstm", "compiled", "mlp", "vae"]
)
def test_a_copy_computes_the_same_with_weights_of_its_own(kind: Any) -> None:
    torch.manual_seed(0)
    module, x = kind(), torch.rand(3, 4)
    call = (lambda m: m.encode(x)[0]) if isinstance(module, VAE) else (lambda m: m(x))
    module.eval()
    expected = call(copy.deepcopy(module)) if kind not in (Locked, Closures, Old, compiled) else None
    if expected is None and kind is not compiled:
        expected = call(module).detach()
    elif kind is compiled:
        expected = module[1].module(module[0]._orig_mod(x)).detach()
    module.train()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    made = private_copy(module)
    assert torch.equal(call(made), expected)
    assert not any(inner.training for inner in made.modules())
    assert all(inner.training for inner in module.modules())
    assert list(made.state_dict()) == list(state)
    call(made).sum().backward()
    with torch.no_grad():
        for value in (*made.parameters(), *made.buffers()):
            value.fill_(1.5)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    mine = {id(part) for part in (*module.modules(), *module.parameters(), *module.buffers())}
    assert not mine & {id(part) for part in (*made.modules(), *made.parameters(), *made.buffers())}
    assert len(list(made.parameters())) == len(list(module.parameters())), "what is tied stays tied"


def test_hooks_come_along_and_those_of_the_module_itself_move() -> None:
    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(4, 4), 0
            self.layer.register_forward_hook(self.note)

        def note(self, *_: Any) -> None:
            self.seen += 1

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    module, calls = Recording(), []
    module.register_forward_hook(lambda *_: calls.append(1))
    made = private_copy(module)
    made(torch.rand(2, 4))
    assert calls == [1] and module.seen == 0 and made.seen == 1


def test_what_cannot_be_copied_is_named() -> None:
    class Helper:
        def __init__(self, layer: nn.Module) -> None:
            self.layer, self.lock = layer, threading.Lock()

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.helper = Helper(self.layer)

    with pytest.raises(TypeError, match=r"fastvae: model: Holds: .*'helper' \(Helper\) holds parts of it"):
        private_copy(Holds())

    class Single(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    with pytest.raises(TypeError, match="the copy of Sequential has the same 0 as the module itself"):
        private_copy(nn.Sequential(Single(2, 2)))


def test_a_copy_that_came_back_serves_again_until_the_module_changes() -> None:
    torch.manual_seed(0)
    model, copies = HVAE(mlp(6, 8), mlp(4, 6)), PrivateCopies()

    def borrowed() -> nn.Module:
        with copies.borrowed(model) as made:
            assert not made.training
            assert all(
                torch.equal(a, b) and a.requires_grad == b.requires_grad
                for a, b in zip(made.parameters(), model.parameters(), strict=True)
            )
            lower(made.decoder)
        return made

    first = borrowed()
    assert borrowed() is first
    with torch.no_grad():
        model.decoder[0].weight.mul_(2)
    model.decoder[0].bias.requires_grad_(False)
    model.eval()
    assert borrowed() is first, "values and flags are copied anew"
    with copies.borrowed(model) as one, copies.borrowed(model) as other:
        assert one is first and other is not first
    changes = (
        lambda: setattr(model, "beta", 2.0),
        lambda: setattr(model, "beta", 2),
        lambda: model.decoder.append(nn.ELU(0.5)),
        lambda: setattr(model.decoder[1], "alpha", 0.25),
        lambda: model.double(),
        lambda: setattr(model.encoder, "0", model.encoder[0]) or model.encoder.append(model.encoder[0]),
    )
    known = borrowed()
    for change in changes[:-1]:
        change()
        made = borrowed()
        assert made is not known and made.beta == model.beta
        known = made
    with pytest.raises(KeyError), copies.borrowed(model):
        raise KeyError
    assert borrowed() is not known, "a copy does not come back from an error"
    handle = model.encoder.register_forward_hook(lambda *_: None)
    assert borrowed() is not borrowed()
    handle.remove()
    assert (
        copy.deepcopy(copies)._idle is not copies._idle and len(pickle.loads(pickle.dumps(copies))._idle) == 0
    )


def test_what_a_forward_leaves_in_a_copy_does_not_reach_the_next_call() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + self.calls

    module, copies = Counting(2, 2), PrivateCopies()
    module(torch.zeros(1, 2))
    found = []
    for _ in range(2):
        with copies.borrowed(module) as made:
            found.append(made(torch.zeros(1, 2)))
    assert torch.equal(*found) and module.calls == 1


def test_a_twin_shares_the_parts_and_not_the_methods() -> None:
    model = VAE(mlp(6, 8), mlp(4, 6))
    twin = twin_of(model, encode=lambda x: (x, x))
    assert twin.encoder is model.encoder and twin.encode(1) == (1, 1) and "encode" not in vars(model)
    assert type(twin) is VAE and twin.decoder[0].weight is model.decoder[0].weight

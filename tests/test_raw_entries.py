"""The raw entries: saved tensors that come back otherwise laid out, and arguments that no Python of ours would pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_problems import MEMORY, Problem, conv, mlp, problem
from fuzzing.raw_arguments import Arguments
from fuzzing.raw_entries import entries
from torch import Tensor, nn

import fastvae
from fastvae import ops
from fastvae.lowering import lower
from fastvae.ood.copies import Adam, LoweredCopies
from fastvae.ood.differentiated import VmappedCopies

raw: Any = torch.ops.fastvae
below: Any = fastvae._C

# --- saved tensors ------------------------------------------------------------------------------


def strided(t: Tensor) -> Tensor:
    """The same numbers, every second of a larger tensor."""
    if t.dim() == 0:
        return t
    return torch.stack((t, torch.full_like(t, torch.nan)), -1).flatten(-2)[..., ::2]


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else strided(t)


def offset(t: Tensor) -> Tensor:
    return torch.cat((torch.full_like(t.flatten()[:1], torch.nan), t.flatten()))[1:].view(t.shape)


LAYOUTS = {"strided": strided, "transposed": transposed, "offset": offset}


def leaves_of(p: Problem) -> list[Tensor]:
    return [leaf for leaf in p.leaves().values() if leaf.requires_grad]


def flow(make: Callable[..., nn.Module], memory: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    p = problem(make).require()
    return lambda: sum(out.sin().sum() for out in p.run(memory=memory)), leaves_of(p)  # type: ignore[return-value]


def jacobian(reduction: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    decoder, z = mlp(4).double(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    return lambda: ops.jacobian_l1(decoder, z, reduction).square().sum(), [z, *decoder.parameters()]


def plain(
    function: Callable[..., Any], *shapes: tuple[int, ...]
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run() -> Tensor:
        outputs = function(*leaves)
        return sum(out.sin().sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))  # type: ignore[return-value]

    return run, leaves


DIFFERENTIATED: dict[str, Callable[[], tuple[Callable[[], Tensor], list[Tensor]]]] = {
    **{f"small flow, {memory}": (lambda m=memory: flow(mlp, m)) for memory in MEMORY},  # type: ignore[misc]
    **{f"flow, {memory}": (lambda m=memory: flow(conv, m)) for memory in MEMORY},  # type: ignore[misc]
    **{f"jacobian, {how}": (lambda h=how: jacobian(h)) for how in ("mean", "none")},  # type: ignore[misc]
    "kick_drift": lambda: plain(ops.leapfrog_kick_drift, (4, 3), (4, 3), (4, 3), (3,)),
    "kick_temper": lambda: plain(ops.leapfrog_kick_temper, (4, 3), (4, 3), (3,), (1,)),
    "gaussian_kl": lambda: plain(ops.gaussian_kl, (4, 3), (4, 3), (4, 3), (4, 3)),
    "grad_dot": lambda: plain(ops.grad_dot, (4, 3, 5), (4, 3, 2), (2, 3, 5), (2, 3, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_saved_tensors_may_come_back_in_any_layout(name: str, layout: str) -> None:
    torch.manual_seed(0)
    run, leaves = DIFFERENTIATED[name]()
    wanted = torch.autograd.grad(run(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, LAYOUTS[layout]):
        found = torch.autograd.grad(run(), leaves)
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [mlp, conv])
def test_an_expanded_stash_is_read_as_it_is(make: Callable[..., nn.Module]) -> None:
    """Nothing that autograd hands out, but no reason to read beyond its one number."""
    p = problem(make).require()

    def gradients(unpack: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            return torch.autograd.grad(p.run(memory="store")[2].sum(), leaves_of(p))

    def one_number(t: Tensor) -> Tensor:
        return t[:1].expand(t.shape) if t.dim() == 1 and t.numel() > 100 else t

    expanded, dense = gradients(one_number), gradients(lambda t: one_number(t).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize(
    ("unpack", "error", "message"),
    [
        (lambda t: t[1:], ValueError, r"expected shape \[\d+"),
        (lambda t: t.float(), TypeError, "expected Double as z"),
        (lambda t: t.to("meta"), ValueError, "expected (cpu|meta) as z"),
    ],
)
def test_a_saved_tensor_that_does_not_fit_is_named(
    unpack: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    p = problem(mlp).require(["z"])
    for what in ("z_steps", "rho_steps", "stash"):
        seen: list[int] = []

        def one(t: Tensor, seen: list[int] = seen, what: str = what) -> Tensor:
            # In the order of save_for_backward: z_steps, rho_steps and stash before the inputs.
            seen.append(0)
            return unpack(t) if len(seen) == {"z_steps": 1, "rho_steps": 2, "stash": 3}[what] else t

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, one):
            outputs = p.run(memory="store")
        with pytest.raises(error, match=f"fastvae::hamiltonian_flow_backward: {what}: {message}"):
            outputs[0].sum().backward()


# --- arguments ----------------------------------------------------------------------------------


def test_no_latent_is_no_network() -> None:
    with pytest.raises(ValueError, match=r"fastvae::log_px: z: expected shape \[S, B, d\] with d > 0"):
        raw.log_px(torch.ones(1, 2, 0), torch.ones(2, 0), [], "relu", "bernoulli")
    with pytest.raises(ValueError, match="network: expected an input of 1 to"):
        below.hamiltonian_flow_stash("relu", "bernoulli", [], 0, 4, -1)
    with pytest.raises(ValueError, match="element_size: expected 1 to 16 bytes, got 0"):
        below.hamiltonian_flow_stash("relu", "bernoulli", [], 1, 0, -1)
    for shape in ([2**62, 3], [2**39, 3]):
        with pytest.raises(ValueError, match="size is larger than"):
            below.hamiltonian_flow_stash("linear 0 -1", "bernoulli", [shape], 3, 4, -1)


def test_activations_that_cannot_be_counted_are_refused() -> None:
    """2^37 outputs a sample and 2^27 samples are 2^64 numbers, which is 0 in 64 bits."""
    large = "reshape 1 1 1;conv_transpose2d 0 -1 {0} {1} 0 0 {2} {3} 1 1 1"
    weight, z = torch.ones(1, 1, 1, 1), torch.zeros(1, 1).expand(2**24, 1)
    with pytest.raises(ValueError, match="network: expected at most 1099511627776 numbers a sample"):
        spec = large.format(2**20, 2**20, 2**20 - 1, 2**20 - 1)
        below.decoder_gradient(z, z, [weight], f"{spec};relu", "gaussian 1")
    x = torch.zeros(1, 1).expand(2**24, 2**37)
    with pytest.raises(
        ValueError, match="z: expected samples whose activations can be counted, got 16777216"
    ):
        spec = large.format(2**19, 2**18, 2**19 - 1, 2**18 - 1)
        below.decoder_gradient(z, x, [weight], spec, "gaussian 1")


def test_a_norm_refuses_the_eps_that_pytorch_refuses() -> None:
    z, x, ones = torch.zeros(1, 2, 3), torch.zeros(2, 3), [torch.ones(3)] * 4
    assert bool(below.log_px(z, x, ones, "batch_norm 0 1 2 3 0", "bernoulli").isfinite().all())
    with pytest.raises(ValueError, match="eps of at least 0"):
        below.log_px(z, x, ones, "batch_norm 0 1 2 3 -5", "bernoulli")


def test_gradients_of_a_convolution_check_its_geometry() -> None:
    larger, smaller = torch.randn(4, 2, 5, 6), torch.randn(4, 3, 2, 3)

    def call(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        return below.convolution_gradients(larger, smaller, kernel, stride, padding, 2)

    found = call((3, 2), (2, 2), (0, 0))
    weight = torch.randn(3, 2, 3, 2, requires_grad=True)
    for sample in range(2):
        of_sample = slice(2 * sample, 2 * sample + 2)
        y = torch.nn.functional.conv2d(larger[of_sample], weight, stride=2)
        (wanted,) = torch.autograd.grad(y, weight, smaller[of_sample])
        torch.testing.assert_close(found[sample], wanted.permute(2, 3, 1, 0).reshape(6, 2, 3))
    for numbers in (
        ((3, 2), (2, 2), (-1, 0)),
        ((3, 2), (0, 2), (0, 0)),
        ((0, 2), (2, 2), (0, 0)),
        ((3, 2), (-2, 2), (0, 0)),
        ((2**62, 2), (2, 2), (0, 0)),
        ((3, 2), (2, 2), (2**62, 0)),
    ):
        with pytest.raises(
            ValueError, match="convolution_gradients: kernel, stride, padding: expected a convolution"
        ):
            call(*numbers)
    with pytest.raises(ValueError, match=r"smaller: expected shape \[4, 3, 3, 3\]"):
        call((3, 2), (1, 2), (0, 0))
    empty = below.convolution_gradients(larger[:0], smaller[:0], (3, 2), (2, 2), (0, 0), 2)
    assert empty.shape == (2, 6, 2, 3) and not empty.any()


def emptied(*shape: int) -> Tensor:
    """As sharded training leaves a parameter: its sizes, and no memory."""
    tensor = torch.ones(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def test_a_tensor_without_its_memory_is_refused() -> None:
    low = lower(nn.Linear(2, 3))
    z = torch.ones(4, 2)
    calls: dict[str, Callable[[], object]] = {
        "sample_keys: x": lambda: below.sample_keys(emptied(4, 3)),
        r"jacobian_l1\w*: parameters": lambda: raw.jacobian_l1(
            z, [emptied(3, 2), low.tensors[1]], low.spec, [0], 1, "sum"
        ),
        "gaussian_kl: logvar_q": lambda: raw.gaussian_kl(z, emptied(4, 2), None, None),
        "network_copies: parameters": lambda: below.NetworkCopies(
            low.spec, [emptied(3, 2), low.tensors[1]], z, 0.1, 0.9, 0.99, 1e-8, 0.0, 2
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"fastvae::{name}: expected a storage of at least"):
            call()
    assert below.sample_keys(emptied(0)).shape == (0,)


def test_a_lazily_negated_view_is_not_read_as_what_it_negates() -> None:
    negated = torch.imag(torch.complex(torch.zeros(4, 2), torch.ones(4, 2)).conj())
    assert negated.is_neg()
    rules = below.NormActivationRules("none", 1, 0.0, "relu")
    with pytest.raises(ValueError, match="x: expected a tensor without lazy negation"):
        rules.forward(negated, None, None, None, None)
    # The dispatcher resolves it.
    for space in (raw, below):
        torch.testing.assert_close(space.gaussian_kl(negated, torch.zeros(4, 2), None, None), torch.ones(4))


# --- copies of an encoder -----------------------------------------------------------------------


def norm(weight: bool, bias: bool) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(5)
    for name, wanted in (("weight", weight), ("bias", bias)):
        if wanted:
            nn.init.normal_(getattr(layer, name))
        else:
            setattr(layer, name, None)
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


@pytest.mark.parametrize("first", [False, True], ids=["inside", "first"])
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False), (True, True)])
def test_copies_train_the_parameters_that_a_norm_has(weight: bool, bias: bool, first: bool) -> None:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 5, bias=not first), norm(weight, bias), nn.Tanh(), nn.Linear(5, 4)]
    encoder = nn.Sequential(*(layers[1:] if first else layers)).double().eval()
    model = fastvae.VAE(encoder, nn.Linear(2, 5).double(), "gaussian").double().eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    adam = Adam(1e-1, (0.8, 0.99), 1e-2)
    fast, slow = LoweredCopies(model, x, adam, 20), VmappedCopies(model, x, adam)
    for step in range(20):
        found = fast.forward()
        torch.testing.assert_close(found, slow.forward(), rtol=1e-10, atol=1e-10)
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(step), dtype=found.dtype)
        fast.update(grad)
        slow.update(grad)
    wanted = slow.parameters()
    assert fast.parameters().keys() == wanted.keys()
    for name, parameter in fast.parameters().items():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-10, atol=1e-10)


def test_copies_are_called_in_turn() -> None:
    low = lower(nn.Linear(2, 3))
    copies = below.NetworkCopies(low.spec, low.tensors, torch.ones(4, 2), 0.1, 0.9, 0.99, 1e-8, 0.0, 2)
    with pytest.raises(ValueError, match="network_copies: update: expected a call of forward before each"):
        copies.update(torch.ones(4, 3))
    copies.forward()
    copies.update(torch.ones(4, 3))
    with pytest.raises(ValueError, match="network_copies: update: expected a call of forward before each"):
        copies.update(torch.ones(4, 3))
    with pytest.raises(ValueError, match="network_copies: steps: expected 1 to 2147483647"):
        below.NetworkCopies(low.spec, low.tensors, torch.ones(4, 2), 0.1, 0.9, 0.99, 1e-8, 0.0, 2**62)


# --- fake kernels -------------------------------------------------------------------------------


OF_NETWORKS = ("elbo_terms", "elbo_terms_backward", "log_px_pullback")
"""Operators whose lists hold tensors of several networks: tests/fuzzing puts any of them on another device."""


def backward_calls() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Of every operator a call that is taken, with all its optional tensors."""
    low, z, x = lower(mlp(3).float()), torch.randn(4, 3), torch.rand(4, 3)
    step, alpha = torch.full((2, 3), 0.1), torch.full((2,), 0.9)
    flow = [z, z, x, step, alpha, low.tensors, low.spec, "bernoulli"]
    out = raw.hamiltonian_flow(*flow, True, True)
    h, delta = torch.randn(4, 3, 5), torch.randn(4, 3, 2)
    factors = [[h], [delta], [h[:2]], [delta[:2]]]
    needs = [1] * len(low.tensors)
    known = {
        "leapfrog_kick_drift": (raw.leapfrog_kick_drift, [z, z, z, step[0]]),
        "leapfrog_kick_drift_backward": (raw.leapfrog_kick_drift_backward, [z, z, z, z, z, step[0]]),
        "leapfrog_kick_temper": (raw.leapfrog_kick_temper, [z, z, step[0], alpha[0]]),
        "leapfrog_kick_temper_backward": (raw.leapfrog_kick_temper_backward, [z, z, z, step[0], alpha[0]]),
        "gaussian_kl": (raw.gaussian_kl, [z, z, z, z]),
        "gaussian_kl_backward": (raw.gaussian_kl_backward, [z[:, 0], z, z, z, z]),
        "hamiltonian_flow": (raw.hamiltonian_flow, [*flow, True, True]),
        "hamiltonian_flow_backward": (
            raw.hamiltonian_flow_backward,
            [z, z, z[:, 0], *flow[:6], out[3], out[4], out[6], *flow[6:], True, [1] * 5 + needs],
        ),
        "grad_dot": (raw.grad_dot, [*factors, [1]]),
        "grad_dot_backward": (raw.grad_dot_backward, [torch.randn(4, 2), *factors, [1], [1] * 4]),
        "log_px": (raw.log_px, [z[None], x, low.tensors, low.spec, "bernoulli"]),
        "jacobian_l1": (raw.jacobian_l1, [z, low.tensors, low.spec, [0, 1], 1, "none"]),
        "jacobian_l1_with_gradient": (
            raw.jacobian_l1_with_gradient,
            [z[:, 0], z, low.tensors, low.spec, [0, 1], 1, "none", [1, *needs]],
        ),
    }
    drawn = Arguments()
    others = [
        each for each in entries() if each.place == "torch.ops" and each.name not in (*known, *OF_NETWORKS)
    ]
    return known | {
        each.name: (each.function, [drawn.of(each.place, each.name, name) for name in each.arguments])
        for each in others
    }


@pytest.mark.parametrize("name", backward_calls())
def test_one_meta_tensor_among_others_is_refused(name: str) -> None:
    function, arguments = backward_calls()[name]
    real = function(*arguments)
    places = [at for at, argument in enumerate(arguments) if isinstance(argument, (Tensor, list))]
    for at in places:
        value = arguments[at]
        if isinstance(value, list) and not isinstance(value[0], Tensor):
            continue
        moved = value.to("meta") if isinstance(value, Tensor) else [value[0].to("meta"), *value[1:]]
        for alone in (True, False):
            # One on meta and the rest on the CPU, or one on the CPU and the rest on meta.
            mixed = [
                moved
                if other == at and alone
                else _to_meta(argument)
                if other != at and not alone
                else argument
                for other, argument in enumerate(arguments)
            ]
            if len(places) == 1 and not alone:
                continue
            with pytest.raises(ValueError, match=rf"fastvae::{name}: \w+: expected (cpu|meta) as "):
                function(*mixed)
    fake = function(*map(_to_meta, arguments))
    assert _shapes(fake) == _shapes(real)


def _to_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_meta(entry) for entry in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def _shapes(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else [_shapes(entry) for entry in value]


def test_the_rules_of_a_norm_refuse_what_does_not_fit() -> None:
    rules = below.NormActivationRules("groups", 2, 1e-5, "silu")
    x = torch.randn(3, 4, 5)
    y, mean, s = rules.forward(x, None, None, None, None)
    torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)))
    refused: dict[str, Callable[[], object]] = {
        "statistics": lambda: below.NormActivationRules("batch", 1, 0.0, "relu"),
        "groups": lambda: below.NormActivationRules("groups", 0, 0.0, "relu"),
        "activation": lambda: below.NormActivationRules("none", 1, 0.0, "leaky_relu x"),
        "x: expected shape": lambda: rules.forward(x[0, 0], None, None, None, None),
        "x: expected channels": lambda: rules.forward(x[:, :3], None, None, None, None),
        "gain": lambda: rules.forward(x, torch.ones(3), None, None, None),
        "dy: expected rows": lambda: rules.reverse(y[:, :, :2], x, None, None, mean, s, False),
        "s: expected": lambda: rules.tangent(y, x, None, None, mean, s[:, :1]),
        "dy, dy_dot": lambda: rules.adjoint(torch.cat([y, y]), y, y, x, None, None, mean, s, True),
    }
    for words, call in refused.items():
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="x: expected float32 or float64"):
        rules.forward(x.half(), None, None, None, None)
    assert rules.forward(x[:0], None, None, None, None)[0].shape == (0, 4, 5)

"""Random decoders, legal and not, through the operators, against plain autograd: values, gradients, or both refuse.

float64 agrees to 1e-9; float32 to a few times the error that plain autograd has in float32 against float64.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvae import ops
from fastvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fastvae.lowering import CoupledSamples

from .decoders import Habitual, draw_module, spoil

CASES = 20

Case = dict[str, Any]


def jacobian(module: nn.Module, z: Tensor, case: Case) -> tuple[Tensor, ...]:
    return (ops.jacobian_l1(module, z, case["reduction"], **case["options"]),)


def eager_jacobian(module: nn.Module, z: Tensor, case: Case) -> tuple[Tensor, ...]:
    """One reverse pass an output; its own gradient is reverse over reverse."""
    options = case["options"]
    point = z if z.requires_grad else z.detach().requires_grad_()
    y = module(point).flatten(1)
    y = torch.sigmoid(y) if options["output"] == "sigmoid" else y
    terms = torch.zeros(len(z), dtype=z.dtype)
    case["smallest"] = math.inf
    for column in y.unbind(1):
        (row,) = torch.autograd.grad(column.sum(), point, create_graph=True)
        row = row if options["latents"] is None else row[:, options["latents"]]
        sizes = row.detach().abs()
        if (sizes > 0).any():
            # A whole column next to zero is what is left of differences that cancel.
            largest = sizes.max().clamp_min(1e-6)
            case["smallest"] = min(case["smallest"], float(sizes[sizes > 0].min() / largest))
        terms = terms + row.abs().pow(options["p"]).sum(1)
    # Where an entry is next to zero its sign is rounding's.
    case["kink"] = options["p"] == 1 and case["smallest"] < (1e-3 if case["dtype"] == torch.float32 else 1e-7)
    reduction = case["reduction"]
    return (terms if reduction == "none" else terms.mean() if reduction == "mean" else terms.sum(),)


def flow(module: nn.Module, z: Tensor, case: Case) -> tuple[Tensor, ...]:
    rho, x, eps, alpha = (case[name] for name in ("rho", "x", "eps", "alpha"))
    return tuple(
        ops.hamiltonian_flow(module, z, rho, x, eps, alpha, case["likelihood"], memory=case["memory"])
    )


def eager_flow(module: nn.Module, z: Tensor, case: Case) -> tuple[Tensor, ...]:
    rho, x, eps, alpha = (case[name] for name in ("rho", "x", "eps", "alpha"))

    def force(z: Tensor) -> tuple[Tensor, Tensor]:
        point = z if z.requires_grad else z.detach().requires_grad_()
        log_px = case["likelihood"].log_prob(module(point), x)
        return log_px, torch.autograd.grad(log_px.sum(), point, create_graph=True)[0] - z

    log_px, push = force(z)
    for factor in alpha:
        half = rho + eps / 2 * push
        z = z + eps * half
        log_px, push = force(z)
        rho = factor * (half + eps / 2 * push)
    return z, rho, log_px


def force(module: nn.Module, z: Tensor, case: Case) -> tuple[Tensor, ...]:
    return ops.log_px_and_force(module, z, case["x"], case["likelihood"])


def eager_force(module: nn.Module, z: Tensor, case: Case) -> tuple[Tensor, ...]:
    point = z if z.requires_grad else z.detach().requires_grad_()
    value = case["likelihood"].log_prob(module(point), case["x"])
    return value, torch.autograd.grad(value.sum(), point, create_graph=True)[0]


def log_px(module: nn.Module, z: Tensor, case: Case) -> tuple[Tensor, ...]:
    return (ops.log_px(module, z.expand(2, *z.shape), case["x"], case["likelihood"]).detach(),)


def eager_log_px(module: nn.Module, z: Tensor, case: Case) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (case["likelihood"].log_prob(module(z), case["x"]).expand(2, -1),)


Run = Callable[[nn.Module, Tensor, Case], tuple[Tensor, ...]]
OPERATORS: tuple[tuple[Run, Run], ...] = (
    (jacobian, eager_jacobian),
    (flow, eager_flow),
    (force, eager_force),
    (log_px, eager_log_px),
)


def draw_case(rng: random.Random) -> tuple[nn.Module, Tensor, Case]:
    dtype = rng.choice([torch.float64, torch.float64, torch.float32])
    latents, batch = rng.randint(1, 4), rng.choice([0, 1, 1, 2, 3, 5])
    module = draw_module(rng, latents)
    if rng.random() < 0.25:
        module = Habitual(module, rng.choice(Habitual.HABITS))
    module = module.to(dtype)
    module.train(rng.random() < 0.2)
    for parameter in module.parameters():
        parameter.requires_grad_(rng.random() < 0.8)
    z = torch.randn(batch, latents, dtype=dtype)
    if rng.random() < 0.15:
        z = spoil(rng, module, z)
    z.requires_grad_(rng.random() < 0.7)
    try:
        with torch.no_grad():
            outputs = copy.deepcopy(module)(z[:1].clone() if batch else z.new_zeros(1, latents)).shape[1:]
    except Exception:
        outputs = torch.Size([4])
    likelihood: Likelihood = rng.choice([Gaussian(0.7), Bernoulli()])
    if len(outputs) and outputs[0] % 3 == 0 and rng.random() < 0.3:
        likelihood = Categorical(3)
        outputs = torch.Size([outputs[0] // 3, *outputs[1:]])
    x = torch.rand(batch, outputs.numel() + (rng.random() < 0.02), dtype=dtype)
    steps = rng.randint(1, 3)
    chosen = rng.sample(range(latents), rng.randint(0, latents)) if rng.random() < 0.3 else None
    return (
        module,
        z,
        {
            "dtype": dtype,
            "reduction": rng.choice(["mean", "sum", "none"]),
            "options": {
                "p": rng.choice([1, 1, 2]),
                "output": rng.choice(["identity", "identity", "sigmoid"]),
                "latents": chosen,
            },
            "rho": torch.randn(batch, latents, dtype=dtype),
            "x": x,
            "eps": torch.tensor(0.1, dtype=dtype, requires_grad=True),
            "alpha": torch.full((steps,), 0.9, dtype=dtype, requires_grad=True),
            "likelihood": likelihood,
            "memory": rng.choice(["auto", "store", "recompute"]),
        },
    )


def outcome(run: Run, module: nn.Module, z: Tensor, case: Case) -> dict[str, Tensor]:
    """What an operator gives, and the gradients of its sums."""
    values = run(module, z, case)
    leaves = {"z": z, "eps": case["eps"], "alpha": case["alpha"], **dict(module.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = {f"value {at}": value.detach() for at, value in enumerate(values)}
    total = sum((at + 1) * value.sum() for at, value in enumerate(values))
    assert isinstance(total, Tensor)
    if total.requires_grad and leaves:
        gradients = torch.autograd.grad(
            total, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        found.update({f"gradient to {name}": g for name, g in zip(leaves, gradients, strict=True)})
    return found


def attempt(run: Run, module: nn.Module, z: Tensor, case: Case) -> dict[str, Tensor] | Exception:
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return outcome(run, module, z, case)
    except Exception as error:
        return error


def in_float64(module: nn.Module, z: Tensor, case: Case) -> tuple[nn.Module, Tensor, Case]:
    twin = copy.deepcopy(module).double()
    tensors = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        for name, value in case.items()
        if isinstance(value, Tensor)
    }
    return twin, z.detach().double().requires_grad_(z.requires_grad), {**case, **tensors}


def agree(case: Case, ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    # Of what both differentiate: ours may know that nothing has a gradient.
    for name in ours.keys() & eager.keys():
        if case.get("kink") and name.startswith("gradient"):
            continue
        a, b, e = (found[name].double() for found in (ours, eager, exact))
        assert a.shape == b.shape, f"{name}: {list(a.shape)} for {list(b.shape)}"
        assert torch.equal(a.isnan(), b.isnan()), f"{name}: not a number in other places"
        a, b, e = (t.nan_to_num() for t in (a, b, e))
        # A gradient may be the small difference of large terms; all are of order one.
        scale = float(e.norm()) + 1e-2 * math.sqrt(max(1, e.numel()))
        error, own = float((a - e).norm()), float((b - e).norm())
        bound = 1e-9 * scale if case["dtype"] == torch.float64 else 5 * own + 3e-5 * scale
        assert error <= bound, f"{name}: off by {error:.1e} of {scale:.1e}, plain autograd by {own:.1e}"
    assert {name for name in eager if name.startswith("value")} <= ours.keys()


def is_mixed(module: nn.Module, z: Tensor, case: Case) -> bool:
    """Whether the codes or a parameter were spoilt into another dtype."""
    return any(tensor.dtype != case["dtype"] for tensor in (z, *module.parameters()))


def run_case(seed: int) -> str:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    module, z, case = draw_case(rng)
    run, plain = rng.choice(OPERATORS)
    before = copy.deepcopy(module.state_dict()), [inner.training for inner in module.modules()]
    ours = attempt(run, module, z, case)
    state = module.state_dict()
    coupled = any(inner.training for inner in module.modules())
    if not coupled:
        assert all(torch.equal(state[name], tensor) for name, tensor in before[0].items())
    assert before[1] == [inner.training for inner in module.modules()]
    assert all(parameter.grad is None for parameter in module.parameters())
    if isinstance(module, Habitual):
        module.in_place = False  # The oracle's codes are still needed.
    eager = attempt(plain, module, z, case)
    assert not isinstance(ours, AssertionError) and not isinstance(eager, AssertionError), (ours, eager)
    if isinstance(ours, CoupledSamples):
        assert coupled, ours
        return "coupled samples"
    if isinstance(ours, Exception):
        documented = isinstance(ours, (ValueError, TypeError, NotImplementedError))
        if "ends in a Sigmoid" in str(ours):
            return "a sigmoid too many"
        if documented and is_mixed(module, z, case):
            return "mixed dtypes"
        if documented and z.shape != case["rho"].shape:  # PyTorch broadcasts what has one latent, say
            return "mixed shapes"
        if isinstance(eager, Exception):
            assert documented or type(ours) is type(eager), f"{module}\n{ours!r}\nplain: {eager!r}"
            return "both refused"
        raise AssertionError(f"{run.__name__} alone refuses: {ours!r}\n{module}\n{list(z.shape)}") from ours
    if isinstance(eager, Exception):
        if len(z) == 0:
            return "an empty batch that plain PyTorch refuses"
        raise AssertionError(f"plain PyTorch alone refuses: {eager!r}\n{module}\n{list(z.shape)}") from eager
    if is_mixed(module, z, case):  # PyTorch promotes what it can: to which dtype is not ours to say
        return "mixed dtypes"
    exact = eager
    if case["dtype"] == torch.float32:
        attempted = attempt(plain, *in_float64(module, z, case))
        assert not isinstance(attempted, Exception), attempted
        exact = attempted
    try:
        agree(case, ours, eager, exact)
    except AssertionError as error:
        words = {k: v for k, v in case.items() if not isinstance(v, Tensor)}
        raise AssertionError(f"{run.__name__}: {error}\n{module}\n{list(z.shape)} {words}") from None
    return "agreed, but for signs" if case.get("kink") else "agreed"

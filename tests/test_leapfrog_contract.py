"""leapfrog_kick_drift and leapfrog_kick_temper: refusals, compilation, modes, errors."""

from __future__ import annotations

import pytest
import torch
from flow_problems import assert_near
from leapfrog_calls import OPS, each_op, function, inputs, leaves, value_and_gradients
from torch import Tensor
from torch.autograd import forward_ad

import fastvae
from fastvae import ops

raw = fastvae._C


@each_op
def test_second_derivative_raises(name: str, device: torch.device) -> None:
    for wanted in range(len(inputs(name))):
        args = [t.to(device).requires_grad_(i == wanted) for i, t in enumerate(inputs(name))]
        loss = sum(o.square().sum() for o in function(name)(*args))
        (first,) = torch.autograd.grad(loss, args[wanted], create_graph=True)
        with pytest.raises(NotImplementedError, match=rf"fastvae::{name}: .*fastvae\.reference\.{name}"):
            first.sum().backward()


@each_op
def test_forward_mode_raises(name: str, device: torch.device) -> None:
    for wanted in range(len(inputs(name))):
        args = [t.to(device) for t in inputs(name)]
        with forward_ad.dual_level():
            args[wanted] = forward_ad.make_dual(args[wanted], torch.ones_like(args[wanted]))
            with pytest.raises(NotImplementedError, match=rf"fastvae::{name}: .*fastvae\.reference"):
                function(name)(*args)


@each_op
def test_function_transforms_raise(name: str, device: torch.device) -> None:
    args = [t.to(device) for t in inputs(name)]
    transforms = [
        lambda f, t: torch.func.vmap(f)(torch.stack([t, t])),
        lambda f, t: torch.func.grad(lambda t: f(t).sum())(t),
        lambda f, t: torch.func.jvp(f, (t,), (t,)),
        lambda f, t: torch.func.jacrev(f)(t),
    ]
    for transform in transforms:
        for i in range(len(args)):
            with pytest.raises(NotImplementedError, match=rf"fastvae::{name}: .*fastvae\.reference\.{name}"):
                transform(lambda t, i=i: function(name)(*args[:i], t, *args[i + 1 :])[0], args[i])


@pytest.mark.parametrize("step_shape", [(), (3,)], ids=str)
@each_op
def test_opcheck(name: str, step_shape: tuple[int, ...], device: torch.device) -> None:
    args = leaves(inputs(name, step_shape), device)
    torch.library.opcheck(getattr(torch.ops.fastvae, name).default, tuple(args))
    detached = [t.detach() for t in args]
    cotangents = [torch.ones_like(o) for o in function(name)(*detached)]
    torch.library.opcheck(
        getattr(torch.ops.fastvae, f"{name}_backward").default,
        (*cotangents, *detached),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@each_op
def test_compile(name: str, backend: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def loop(*args: Tensor) -> list[Tensor]:
        return [torch.tanh(o) for o in function(name)(*(2 * a for a in args))]

    compiled = torch.compile(loop, fullgraph=True, backend=backend, dynamic=True)
    for batch in (4, 6, 1):
        tensors = inputs(name, (3,), batch)
        expected = value_and_gradients(loop, leaves(tensors, device))
        for a, b in zip(value_and_gradients(compiled, leaves(tensors, device)), expected, strict=True):
            assert_near(a, b.cpu(), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_op
def test_autocast(name: str, dtype: torch.dtype, device: torch.device) -> None:
    half = leaves(inputs(name), device, dtype)
    full = [t.detach().float().requires_grad_() for t in half]
    expected = value_and_gradients(function(name), full)
    with torch.autocast(device.type, torch.bfloat16):
        out = function(name)(*half)
        assert all(o.dtype == torch.float32 for o in out)
    found = value_and_gradients(lambda *_: out, half)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e.to(f.dtype))


@each_op
def test_autocast_rounds_no_number(name: str, device: torch.device) -> None:
    states = [t.to(device, torch.bfloat16) for t in inputs(name) if t.dim() == 2]
    numbers = (0.1,) if name == "leapfrog_kick_drift" else (0.1, 0.7)
    with torch.autocast(device.type, torch.bfloat16):
        out = function(name)(*states, *numbers)
    wanted = function(name)(*(t.float() for t in states), *numbers)
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


@each_op
def test_modes_and_bound_operators(name: str, device: torch.device) -> None:
    args = leaves(inputs(name), device)
    expected = function(name)(*args)
    assert all(o.requires_grad for o in expected)
    with torch.autocast(device.type, torch.bfloat16):
        bound = [function(name, raw)(*args)]
    bound.append(function(name, raw)(*args))
    assert all(o.requires_grad for result in bound for o in result)
    results = [tuple(o.detach() for o in result) for result in bound]
    with torch.no_grad():
        results += [function(name)(*args), function(name, raw)(*args)]
    with torch.inference_mode():
        results.append(function(name)(*args))
        results.append(function(name)(*(a * 1 for a in args)))
    for result in results:
        for r, e in zip(result, expected, strict=True):
            assert not r.requires_grad and torch.equal(r, e)


@each_op
def test_not_a_number_stays_in_its_element(name: str, device: torch.device) -> None:
    args = [t.to(device) for t in inputs(name)]
    for state in range(2):
        bad = list(args)
        bad[state] = args[state].clone()
        bad[state][1, 2] = float("nan")
        for out, clean in zip(function(name)(*bad), function(name)(*args), strict=True):
            touched = out.isnan()
            touched[1, 2] = True
            assert touched.sum() == 1
            assert torch.equal(out[~touched], clean[~touched])
    assert function(name)(*bad)[0][1, 2].isnan()


CPU, STEP = torch.zeros(3, 4), torch.tensor(0.1)
HALF, LONG = (CPU.half(), CPU.half(), STEP.half()), (CPU.long(), CPU.long(), STEP.long())
# What is wrong: the error's type, its words, and the states [3, 4], the force and the step size of the call.
ERRORS: dict[str, tuple[type[Exception], str, Tensor, Tensor, Tensor]] = {
    "dims": (ValueError, r"{first}: expected shape \[B, d\], got \[4\]", CPU[0], CPU[0], STEP),
    "half": (
        TypeError,
        r"{first}: expected float32 or float64, got .*Half",
        CPU.half(),
        CPU.half(),
        STEP.half(),
    ),
    "long": (
        TypeError,
        r"{first}: expected float32 or float64, got .*Long",
        CPU.long(),
        CPU.long(),
        STEP.long(),
    ),
    "shape": (ValueError, r"force: expected shape \[3, 4\], got \[3, 2\]", CPU, CPU[:, :2], STEP),
    "no_broadcast": (ValueError, r"force: expected shape \[3, 4\], got \[1, 4\]", CPU, CPU[:1], STEP),
    "mixed": (TypeError, r"force: expected Float as {first}, got .*Double", CPU, CPU.double(), STEP),
    "devices": (ValueError, r"force: expected cpu as {first}, got .*meta", CPU, CPU.to("meta"), STEP),
    "step": (
        ValueError,
        r"step_size: expected one number or .*\[4\], got \[3\]",
        CPU,
        CPU,
        STEP.expand(3),
    ),
    "steps": (ValueError, r"step_size: .* shape \[4\], got \[3, 1\]", CPU, CPU, STEP.expand(3, 1)),
    "mixed_step": (TypeError, r"step_size: expected Float as {first}, got .*Double", CPU, CPU, STEP.double()),
}


@pytest.mark.parametrize("case", ERRORS)
@each_op
def test_errors(name: str, case: str) -> None:
    kind, message, state, force, step = ERRORS[case]
    first = "z" if name == OPS[0] else "rho_half"
    args = [state, state, force, step] if name == OPS[0] else [state, force, step, STEP]
    with pytest.raises(kind, match=f"fastvae::{name}: " + message.replace("{first}", first)):
        function(name)(*args)


def test_alpha_is_one_number() -> None:
    with pytest.raises(ValueError, match=r"alpha: expected one number, got \[3\]"):
        ops.leapfrog_kick_temper(CPU, CPU, 0.1, torch.ones(3))
    with pytest.raises(TypeError, match=r"alpha: expected Float as rho_half, got .*Double"):
        ops.leapfrog_kick_temper(CPU, CPU, 0.1, torch.tensor(0.5, dtype=torch.float64))

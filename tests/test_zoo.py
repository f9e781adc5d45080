"""Every operator on every decoder of the zoo, against plain autograd: values and all gradients.

In float64 to 1e-10; in float32 within twice the error that eager PyTorch itself has against float64. What fails today
is an expected failure, with its reason in the registry (``Entry.today``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import ZOO, Entry, Problem, is_installed, oracles, problem

from fastvae import ops

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be lowered", "ignore:.*without a kernel")

FLOAT64 = 1e-10
# A float32 result may be exact by chance: then ours may be off by some units of the last place of the largest element.
FLOAT32_FLOOR = 2e-6


def each_entry(operator: str, *, slow: bool = False, where: Callable[[Entry], bool] = lambda entry: True):
    """Parametrise over the zoo; an expected failure where the registry says so."""
    parameters = []
    for entry in ZOO.values():
        if not where(entry):
            continue
        marks: list[Any] = []
        if not is_installed(entry):
            marks.append(pytest.mark.skip(reason=f"{entry.package} is not installed: make zoo"))
        if operator in entry.today:
            marks.append(pytest.mark.xfail(strict=True, reason=entry.today[operator]))
        if slow or entry.heavy:
            marks.append(pytest.mark.slow)
        parameters.append(pytest.param(entry, marks=marks, id=entry.name))
    return pytest.mark.parametrize("entry", parameters)


@functools.lru_cache(maxsize=4)
def problem_of(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    return problem(ZOO[name], batch=2 if ZOO[name].heavy else 3, dtype=dtype)


def conditioned(p: Problem, z: Tensor) -> Tensor:
    """The decoder of codes for all samples, each repeated as often as z has rows for it."""
    times = len(z) // len(p.z)
    return p.decoder(z, *(c.repeat_interleave(times, 0) for c in p.condition))


def options_of(p: Problem) -> dict[str, Any]:
    return {"condition": p.condition[0]} if p.condition else {}


def momenta(p: Problem) -> dict[str, Tensor]:
    """What a flow takes beside the code and the data, all to be differentiated."""
    generator = torch.Generator().manual_seed(2)
    rho = torch.randn(p.z.shape, generator=generator)
    step_size = 0.02 + 0.05 * torch.rand(oracles.STEPS, *p.z.shape[1:], generator=generator)
    alpha = 0.8 + 0.2 * torch.rand(oracles.STEPS, generator=generator)
    return {"rho": rho.to(p.z.dtype), "step_size": step_size.to(p.z.dtype), "alpha": alpha.to(p.z.dtype)}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def parameters_of(p: Problem) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in p.decoder.named_parameters() if parameter.requires_grad}


def error_of(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest expected magnitude."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} and not {list(expected.shape)}"
    if not expected.numel():
        return 0.0
    scale = max(float(expected.abs().max()), 1e-3)
    return float((actual.detach().double() - expected.detach().double()).abs().max()) / scale


def assert_near(names: Sequence[str], actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for name, a, e in zip(names, actual, expected, strict=True):
        error = error_of(a, e)
        assert error <= FLOAT64, f"{name}: relative error {error:.3g}"


# --- the runs, by an operator and by its oracle ------------------------------------------------


Run = tuple[Callable[[], list[Tensor]], dict[str, Tensor]]
"""A function that computes outputs, and the leaves that they depend on."""


def flow_run(p: Problem, by_oracle: bool) -> Run:
    start = {"z": leaf(p.z), **{name: leaf(tensor) for name, tensor in momenta(p).items()}}

    def run() -> list[Tensor]:
        z, rho, step_size, alpha = start.values()
        if by_oracle:
            with oracles.careful():
                decode = functools.partial(conditioned, p)
                return oracles.flow(decode, z, rho, p.x, step_size, alpha, p.likelihood)
        return list(
            ops.hamiltonian_flow(p.decoder, z, rho, p.x, step_size, alpha, p.likelihood, **options_of(p))
        )

    return run, {**start, **parameters_of(p)}


def jacobian_run(p: Problem, by_oracle: bool) -> Run:
    z = leaf(p.z)

    def run() -> list[Tensor]:
        if by_oracle:
            with oracles.careful():
                return [oracles.jacobian_l1(functools.partial(conditioned, p), z)]
        return [ops.jacobian_l1(p.decoder, z, "none", **options_of(p))]

    return run, {"z": z, **parameters_of(p)}


RUNS: dict[str, Callable[[Problem, bool], Run]] = {"flow": flow_run, "jacobian": jacobian_run}


def everything(run: Run) -> tuple[list[str], list[Tensor]]:
    """Outputs, and the gradients of a combination of them to every leaf."""
    compute, leaves = run
    with oracles.careful():
        outputs = compute()
        found = oracles.gradients(outputs, list(leaves.values()))
    names = [f"output {i}" for i in range(len(outputs))]
    return names + [f"gradient to {name}" for name in leaves], [*(o.detach() for o in outputs), *found]


@functools.lru_cache(maxsize=2)
def exact(name: str, operator: str) -> tuple[list[str], list[Tensor]]:
    return everything(RUNS[operator](problem_of(name), True))


# --- float64 -----------------------------------------------------------------------------------


@each_entry("the oracle", where=lambda entry: not (entry.own_gradients or entry.heavy))
@pytest.mark.parametrize("operator", RUNS)
def test_oracle_agrees_with_differences(entry: Entry, operator: str) -> None:
    names, found = exact(entry.name, operator)
    compute, leaves = RUNS[operator](problem_of(entry.name), True)
    gradients = found[len(names) - len(leaves) :]
    assert not (problem := oracles.differences_agree(compute, list(leaves.values()), gradients)), problem


@each_entry("log_px")
def test_log_px(entry: Entry) -> None:
    p = problem_of(entry.name)
    codes = torch.stack([p.z, 0.5 * p.z.flip(0)])
    with torch.no_grad():
        expected = [oracles.log_prob(p.likelihood, conditioned(p, z), p.x) for z in codes]
    found = ops.log_px(p.decoder, codes, p.x, p.likelihood, **options_of(p))
    assert_near(["log_px"], [found], [torch.stack(expected)])


@each_entry("flow")
def test_flow(entry: Entry) -> None:
    names, expected = exact(entry.name, "flow")
    assert_near(names, everything(flow_run(problem_of(entry.name), False))[1], expected)


@each_entry("jacobian")
def test_jacobian(entry: Entry) -> None:
    names, expected = exact(entry.name, "jacobian")
    assert_near(names, everything(jacobian_run(problem_of(entry.name), False))[1], expected)

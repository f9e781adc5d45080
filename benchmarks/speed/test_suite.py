"""The operators' suite for pytest-benchmark: every contestant is checked in float64, then timed.

    pytest benchmarks/speed/test_suite.py --ops gaussian_kl --sizes small,paper

``python -m benchmarks.speed suite`` runs it and writes tables and figures. What fails or is wrong is skipped with a
note, and fails the test if it is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from . import common
from . import suite_problems as problems
from .suite_problem import BACKWARD, COMPILED, CONTESTANTS, FAIR, FORWARD, JAX, OURS, Rates, checked

ELEMENTWISE = ("leapfrog_kick_drift", "leapfrog_kick_temper", "gaussian_kl")
LIMIT_SECONDS = 240
"""A rival is compiled and called once in this time, or not at all."""


@dataclass(frozen=True)
class Case:
    operator: str
    size: str
    direction: str
    contestant: str

    def __str__(self) -> str:
        return f"{self.operator}-{self.size}-{self.direction}-{self.contestant}".replace(" ", "_")


def wanted(case: Case, config: pytest.Config) -> bool:
    """--quick leaves out what takes minutes: large problems of networks, compilers beyond small operators."""
    if case.contestant == JAX and not config.getoption("jax"):
        return False
    if case.contestant == COMPILED and not config.getoption("compile"):
        return False
    if case.operator == "log_px" and case.direction == BACKWARD:
        return False
    if not config.getoption("quick"):
        return True
    elementwise = case.operator in ELEMENTWISE
    if case.contestant == COMPILED:
        return case.size == "paper" and (elementwise or case.operator == "grad_dot")
    if case.contestant == JAX:
        return elementwise or case.size == "small" or (case.operator, case.size) == ("grad_dot", "paper")
    return elementwise or case.size != "large"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    operators = config.getoption("ops").split(",")
    if "case" in metafunc.fixturenames:
        cases = [
            Case(operator, size, direction, contestant)
            for operator in operators
            for size in config.getoption("sizes").split(",")
            for direction in (FORWARD, BACKWARD)
            for contestant in CONTESTANTS
        ]
        metafunc.parametrize("case", [case for case in cases if wanted(case, config)], ids=str)
    if "sweep" in metafunc.fixturenames:
        points = [
            (sweep, value, contestant)
            for sweep, values in problems.SWEEPS.items()
            if sweep.partition(",")[0] in operators
            for value in (values[:-1] if config.getoption("quick") else values)
            for contestant in (OURS, FAIR)
        ]
        metafunc.parametrize(("sweep", "value", "contestant"), points)


def timed(contestant: common.Contestant, device: torch.device) -> Callable[[], None]:
    """One whole call for pytest-benchmark's clock."""

    def run() -> None:
        contestant()
        if device.type == "cuda":
            torch.cuda.synchronize()

    run()
    time.sleep(0.01)  # the threads of PyTorch and of JAX spin for a while after a call
    return run


def test_operator(
    case: Case,
    rates: Callable[[str], Rates],
    steadiness: common.Steadiness,
    notes: list[dict[str, str]],
    pytestconfig: pytest.Config,
    benchmark: Any,
) -> None:
    device = torch.device(pytestconfig.getoption("device"))
    problem = problems.problem(case.operator, case.size, device)
    expected = problems.expected(case.operator, case.size, device, case.direction)
    try:
        with common.at_most(LIMIT_SECONDS):
            threads = pytestconfig.getoption("threads")
            contestant, error = checked(problem, case.contestant, case.direction, expected, threads)
    except Exception as failure:
        if case.contestant == OURS:
            raise
        reason = common.why(failure)
        notes.append({**vars(case), "note": reason})
        pytest.skip(reason)
    cost, machine = problem.costs[case.direction], rates(case.operator)
    benchmark.group = f"{case.operator}, {case.size}, {case.direction}"
    benchmark.extra_info.update(
        vars(case),
        title=problem.title,
        operations=cost.operations,
        bytes=cost.bytes,
        **vars(machine),
        floor_ms=cost.floor_ms(machine),
        relative_error=error,
    )
    run = timed(contestant, device)
    steadiness.wait()
    benchmark(run)


def test_scaling(
    sweep: str,
    value: int,
    contestant: str,
    steadiness: common.Steadiness,
    pytestconfig: pytest.Config,
    benchmark: Any,
) -> None:
    """Forward and backward of ours and of the fair rival, one number of a problem changed."""
    device = torch.device(pytestconfig.getoption("device"))
    problem = problems.swept(sweep, value, device)
    benchmark.group = f"{sweep} = {value}"
    benchmark.extra_info.update(sweep=sweep, value=value, contestant=contestant, title=problem.title)
    run = timed(problem.contestant(contestant, BACKWARD), device)
    steadiness.wait()
    benchmark(run)

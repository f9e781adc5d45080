"""Options and hooks of the operators' suite under pytest; ``python -m benchmarks.speed suite`` passes the options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import common
from . import suite_problems as problems
from .suite_problem import Rates

NOTES = pytest.StashKey[list[dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvae", "the operators' suite")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--threads", type=int, default=2, help="CPU threads")
    group.addoption("--ops", default=",".join(problems.OPERATORS), help="operators, by commas")
    group.addoption("--sizes", default=",".join(problems.SIZES), help="sizes, by commas")
    group.addoption("--quick", action="store_true", help="leave out what takes long")
    group.addoption("--no-jax", action="store_false", dest="jax", help="leave JAX out")
    group.addoption("--no-compile", action="store_false", dest="compile", help="leave torch.compile out")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOTES] = []
    torch.set_num_threads(config.getoption("threads"))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def notes(pytestconfig: pytest.Config) -> list[dict[str, str]]:
    """What was not timed, and why."""
    return pytestconfig.stash[NOTES]


@pytest.fixture(scope="session")
def steadiness(pytestconfig: pytest.Config) -> common.Steadiness:
    return common.Steadiness(torch.device(pytestconfig.getoption("device")))


@pytest.fixture(scope="session")
def rates(pytestconfig: pytest.Config, steadiness: common.Steadiness) -> Callable[[str], Rates]:
    """The machine's rates, measured anew for every operator: floors are work at these."""
    device = torch.device(pytestconfig.getoption("device"))
    megabytes = 128 if pytestconfig.getoption("quick") else 256
    side = common.square_side(device)

    @functools.lru_cache(maxsize=1)
    def measured(operator: str) -> Rates:
        steadiness.wait()
        (gflops,) = common.gemm_rate([(side, side, side)], device).values()
        return Rates(gflops, common.copy_rate(device, megabytes))

    return measured


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, str]:
    return common.environment(torch.device(config.getoption("device")))


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["notes"] = config.stash[NOTES]

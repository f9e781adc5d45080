"""Every fuzzer, for a fixed number of cases; ``make fuzz`` runs one for as long as you like."""

from __future__ import annotations

import importlib

import pytest
from fuzzing import fuzzer_names
from fuzzing.harness import fuzz


def test_the_harness_survives_and_names_each_failure() -> None:
    report = fuzz("misbehaving", cases=12, seconds_a_case=2)
    assert report.cases == 12
    assert {seed for seed, _ in report.failures} == {3, 5, 7, 9}
    reasons = dict(report.failures)
    assert "case three" in reasons[3]
    assert "SIGSEGV" in reasons[5]
    assert "still running" in reasons[7]
    assert "exit status 4" in reasons[9]
    assert report.outcomes == {"agreed": 2, "both refused": 6}
    assert "again: make fuzz ARGS='misbehaving --only 5'" in report.describe("misbehaving")


@pytest.mark.parametrize("name", fuzzer_names())
def test_no_case_fails(name: str) -> None:
    cases = importlib.import_module(f"fuzzing.{name}").CASES
    report = fuzz(name, cases=cases)
    assert not report.failures, report.describe(name)
    assert report.cases == cases

"""Every layer of fastvae.network by its own rules: against autograd, and against the reference of both methods."""

from __future__ import annotations

import pytest
from network_cases import FILES, Case, network_of
from network_problems import by_autograd, check_network, codes, kinds

CASES = [
    pytest.param(case, id=f"{file}: {name}") for file, cases in FILES.items() for name, case in cases.items()
]


@pytest.mark.parametrize("case", CASES)
def test_rules(case: Case) -> None:
    """Forward, reverse, tangent and bend; with latents in front (the Jacobian); the flow and its gradients."""
    module = network_of(case)
    network = check_network(module, codes())
    assert not by_autograd(network)
    assert set(case.takes) <= set(kinds(network))
    check_network(module, codes(1))

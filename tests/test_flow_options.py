"""The options of hamiltonian_flow: trajectory, likelihoods by name, memory, decoders that are not lowered."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import flow_problems
import pytest
import torch
from flow_problems import MEMORY, Residual, assert_near, conv, gradients, mlp, problem, seeded
from torch import Tensor, nn

from fastvae import ops, reference
from fastvae.likelihoods import Bernoulli, Gaussian


def test_trajectory(device: torch.device) -> None:
    p = problem(conv, "bernoulli", steps=6).to(device).require()
    expected, trajectory = reference.trajectory(*p.args()), p.trajectory()
    assert not any(t.requires_grad for t in trajectory)
    for memory in MEMORY:
        end = p.run(memory=memory)
        for name, values, wanted, last in zip(trajectory._fields, trajectory, expected, end, strict=True):
            assert_near(values, wanted.cpu(), 1e-11, name)
            assert torch.equal(values[-1], last)


@pytest.mark.parametrize("flow", [ops.hamiltonian_flow, reference.hamiltonian_flow])
def test_the_flag_for_a_trajectory_still_works_and_is_deprecated(flow, device: torch.device) -> None:
    p = problem().to(device).require()
    with pytest.warns(DeprecationWarning, match=r"fastvae\.\w+\.trajectory returns the trajectory") as caught:
        *outputs, trajectory = flow(*p.args(), return_trajectory=True)
    assert caught[0].filename == __file__, "points at the caller"
    for values, last in zip(trajectory, outputs, strict=True):
        assert torch.equal(values[-1], last) and last.requires_grad and not values.requires_grad


def test_trajectory_in_place_change_is_caught(device: torch.device) -> None:
    """It shares memory with what the backward pass reads, which must not change in silence."""
    p = problem().to(device).require()
    with pytest.warns(DeprecationWarning):
        *outputs, trajectory = p.run(return_trajectory=True)
    trajectory.z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[2].sum().backward()


def test_probabilities_equal_logits(device: torch.device) -> None:
    logits = problem(seeded(mlp(4)), "bernoulli").to(device)
    probabilities = replace(
        logits, decoder=nn.Sequential(logits.decoder, nn.Sigmoid()), likelihood=Bernoulli(probs=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(logits.run(), probabilities.run(), strict=True))


def test_names_of_likelihoods(device: torch.device) -> None:
    p = problem(mlp, Gaussian()).to(device)
    for name, likelihood in (("gaussian", Gaussian()), ("bernoulli", Bernoulli())):
        pairs = zip(
            ops.hamiltonian_flow(*p.args()[:-1], name),
            ops.hamiltonian_flow(*p.args()[:-1], likelihood),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(
        ops.hamiltonian_flow(*p.args()[:-1])[2], ops.hamiltonian_flow(*p.args()[:-1], "bernoulli")[2]
    )


def test_a_decoder_that_is_read_as_a_graph_agrees(device: torch.device) -> None:
    p = problem(Residual(3, 4)).to(device).require()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs, trajectory = p.run(), p.trajectory()
    expected = p.reference()
    for output, points, wanted in zip(outputs, trajectory, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
        assert torch.equal(points[-1], output)
    wanted_gradients = gradients(p, expected)
    for name, gradient in gradients(p, outputs).items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-11, atol=1e-11, msg=name)


class _Unread(Residual):
    """Its branch on numbers keeps it from being read."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) if bool(z.isfinite().all()) else z


def test_fallback_warns_once_and_agrees(device: torch.device) -> None:
    p = problem(_Unread(3, 4)).to(device).require()
    with pytest.warns(UserWarning, match="hamiltonian_flow: this decoder cannot be lowered") as caught:
        outputs = p.run()
    assert len(caught) == 1
    assert caught[0].filename == flow_problems.__file__, "points at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, trajectory = p.run(), p.trajectory()
    expected = p.reference()
    for output, other, points, wanted in zip(outputs, again, trajectory, expected, strict=True):
        assert torch.equal(output, wanted)
        assert torch.equal(other, wanted)
        assert torch.equal(points[-1], wanted)
    wanted_gradients = gradients(p, expected)
    for name, gradient in gradients(p, outputs).items():
        assert torch.equal(gradient, wanted_gradients[name]), name
    with pytest.warns(UserWarning, match="cannot be lowered"):
        problem(_Unread(3, 4)).run()


def test_memory_auto_follows_size_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the limit the stash is kept, above it is not; the result is the same to rounding."""
    p = problem(conv, "bernoulli", steps=5).to(device).require()
    module = sys.modules["fastvae.ops.hamiltonian_flow"]
    sizes = []
    for limit in (2**28, 0):
        monkeypatch.setattr(module, "STORE_LIMIT_BYTES", limit)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            outputs = p.run()
        sizes.append(sum(kept))
        assert all(torch.equal(a, b) for a, b in zip(outputs, p.run(memory="store"), strict=True))
    assert sizes[1] < sizes[0]


def test_recompute_memory_does_not_grow_with_steps(device: torch.device) -> None:
    """What a graph keeps for another step is z_k and rho_k, and step size and alpha of the step."""

    def kept_by(steps: int) -> int:
        p = problem(conv, "bernoulli", steps=steps, batch=5).to(device).require()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            p.run(memory="recompute")
        return sum(kept)

    assert kept_by(9) - kept_by(4) == 5 * (2 * 5 * 3 + 3 + 1)


def test_what_cannot_be_read_is_said_once_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="cannot be lowered"):
        problem(_Unread(3, 4)).run()
    assert capfd.readouterr() == ("", "")

"""hamiltonian_flow captured in a CUDA graph: forward and backward replayed on new inputs, by both routes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flow_problems import MEMORY, Problem, assert_near, conv, cotangents, mlp, problem
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_step(p: Problem, memory: str) -> Callable[[], list[Tensor]]:
    """Outputs and the gradients of a fixed random combination of them to every leaf; copies nothing from the host."""
    leaves = list(p.leaves().values())
    weights = cotangents(p.run(memory=memory))

    def step() -> list[Tensor]:
        outputs = p.run(memory=memory)
        return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, weights)]

    return step


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """As PyTorch's manual says: warm up on a side stream, then record."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def overwrite(p: Problem, other: Problem) -> None:
    """New numbers in the tensors that a graph has recorded, those of the decoder and its statistics included."""
    with torch.no_grad():
        for (_, old), (_, new) in zip(p.tensors(), other.tensors(), strict=True):
            old.copy_(new)
        p.decoder.load_state_dict(other.decoder.state_dict())


# mlp with memory="store" takes the kernel for small networks, everything else the general sweeps.
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("decoder", [mlp, conv], ids=["mlp", "conv"])
def test_replay_on_new_inputs_cuda(decoder, likelihood: str, memory: str) -> None:
    def fresh(seed: int) -> Problem:
        return problem(decoder, likelihood, batch=19, seed=seed).to("cuda").require()

    p = fresh(0)
    step = make_step(p, memory)  # it owns the cotangents, which the graph goes on reading
    graph, results = capture(step)
    for seed in (3, 4):
        overwrite(p, fresh(seed))
        graph.replay()
        for i, (got, wanted) in enumerate(zip(results, make_step(fresh(seed), memory)(), strict=True)):
            assert_near(got, wanted.cpu(), 1e-11, f"result {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_network_repeats_to_the_bit_cuda(dtype: torch.dtype) -> None:
    """Gradients of more samples than there are parts to sum: 256 parts of 8 or 4 samples."""
    step = make_step(problem(mlp, batch=3001).to("cuda", dtype).require(), "store")
    first = [tensor.clone() for tensor in step()]
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


def test_small_network_takes_one_launch_each_way_cuda() -> None:
    step = make_step(problem(mlp, batch=19).to("cuda").require(), "store")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    for kernel in ("small_flow_kernel", "small_flow_backward_kernel", "small_flow_sum_kernel"):
        assert sum(kernel in name for name in names) == 1, names

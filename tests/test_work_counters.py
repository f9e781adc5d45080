"""A guard on speed that no noise fools: what the operators call is counted, on decoders of the zoo and of the papers.

Floating-point operations of products are compared with the decoder's own forward, f, counted in the same way. A flow of
K steps has K + 1 points, and each costs six times f with the gradient: forward and reverse, tangent and its adjoint,
and two products for the weights (the tangent's and the value's); recomputing is forward and reverse once more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from counting import Work, held_bytes, made_nodes, names_of_nodes, saved_tensors
from emulation import of_cpu_kernels
from torch import Tensor, nn
from zoo import ZOO, Problem, problem

from fastvae import architectures, ops
from fastvae.likelihoods import resolve

STEPS = 3
POINTS = STEPS + 1
OTHER_TORCH = 1.1
"""Of recorded calls: another release of PyTorch may take an operator apart differently, or round sizes otherwise."""


class Counted(NamedTuple):
    """What is known of a decoder that runs by sweeps.

    calls: of ATen operators, of a flow that stores and of one that recomputes, the Jacobian's norm and the force,
        each with its gradient; recorded with PyTorch 2.13 and upper bounds.
    products: how many of those are products.
    behind: modules whose products come after the last curved operation: there the Jacobian's norm does not depend on
        the code but by the tangents, so that two of a product's passes are spared. All where none is curved.
    maps: upsamplings and paddings, whose reverse is PyTorch's, of a node of its own at each point.
    """

    calls: tuple[int, int, int, int]
    products: tuple[int, int, int, int]
    behind: tuple[str, ...] = ()
    maps: int = 0


ALL = ("",)
SWEPT = {
    "layernorm-mlp": Counted((737, 1035, 320, 223), (102, 168, 34, 30), ("out",)),
    "skips-of-the-code": Counted((482, 651, 145, 118), (51, 84, 16, 15), ("out",)),
    "labels": Counted((386, 500, 79, 86), (34, 56, 8, 10), ALL),
    "glu-highway": Counted((755, 1035, 248, 195), (68, 112, 22, 20), ("out",)),
    "topics-softmax": Counted((512, 639, 112, 107), (17, 28, 6, 5)),
    "resnet-batchnorm": Counted((885, 1164, 348, 246), (137, 188, 34, 35), ("out",), maps=2),
    "groupnorm-silu-attention": Counted((1881, 2420, 734, 534), (329, 444, 82, 83), ("out",), maps=1),
    "nearest-reflect-instancenorm": Counted((570, 749, 176, 139), (65, 92, 16, 17), ("2.5",), maps=3),
    "pixelshuffle-prelu": Counted((572, 747, 138, 140), (58, 88, 12, 16), ALL, maps=2),
    "gated-convolutions": Counted((802, 1061, 231, 192), (65, 92, 18, 17)),
    "spatial-broadcast": Counted((516, 636, 112, 119), (72, 96, 12, 18), ALL),
    "time-series": Counted((672, 891, 176, 168), (113, 156, 20, 29), ALL, maps=2),
}


class Lowered(NamedTuple):
    """A small network of the papers or of the zoo, which kernels take but in the force.

    calls, products: as in ``Counted``. Transposed convolutions and small flows are kernels of ours, which do products
        that are not seen: FLOPs are upper bounds here.
    computed: names of nodes of what is made of parameters alone.
    """

    make: Callable[[], nn.Module] | None
    code: int
    calls: tuple[int, int, int, int]
    products: tuple[int, int, int, int]
    likelihood: str = "bernoulli"
    computed: tuple[str, ...] = ()


LOWERED = {
    "hvae": Lowered(lambda: architectures.hvae_decoder(4), 64, (889, 1217, 426, 150), (54, 78, 16, 27)),
    "jacobian-l1": Lowered(
        lambda: architectures.jacobian_l1_decoder(1, 8), 10, (940, 1256, 301, 183), (36, 52, 6, 33)
    ),
    "dcgan": Lowered(
        lambda: architectures.dcgan_decoder(1, 4, 16),
        16,
        (1125, 1541, 1536, 258),
        (36, 52, 51, 23),
        "categorical",
    ),
    "tracin": Lowered(
        lambda: architectures.tracin_decoder(49, 16, 64), 16, (61, 835, 184, 132), (0, 104, 13, 20)
    ),
    "weights-used-twice": Lowered(None, 6, (58, 1190, 269, 140), (0, 156, 29, 30), computed=("TBackward0",)),
}


@functools.cache
def problem_of(name: str) -> Problem:
    if name in ZOO:
        return problem(ZOO[name])
    case = LOWERED[name]
    assert case.make is not None
    torch.manual_seed(0)
    decoder = case.make().double().eval()
    z = torch.randn(3, case.code, dtype=torch.float64)
    likelihood = resolve(case.likelihood)
    with torch.no_grad():
        shape = likelihood.mean(likelihood.params_of_output(decoder(z))).shape
    return Problem(decoder, z, (), torch.randint(0, 2, shape).double(), likelihood)


class Run(NamedTuple):
    """One operator's outputs with their graph, the leaves, and what was counted of both passes."""

    outputs: list[Tensor]
    nodes: int
    held: int
    work: Work


@functools.cache
def operators(name: str, steps: int = STEPS) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    p = problem_of(name)
    options: dict[str, Any] = {"condition": p.condition[0]} if p.condition else {}
    z = p.z.requires_grad_()
    rho, step = torch.ones_like(p.z, requires_grad=True), torch.full(p.z.shape[1:], 0.05, dtype=z.dtype)
    alpha = torch.full((steps,), 0.9, dtype=z.dtype)

    def flow(memory: str) -> tuple[Tensor, ...]:
        return ops.hamiltonian_flow(
            p.decoder, z, rho, p.x, step, alpha, p.likelihood, memory=memory, **options
        )

    return {
        "store": functools.partial(flow, "store"),
        "recompute": functools.partial(flow, "recompute"),
        "jacobian": lambda: (ops.jacobian_l1(p.decoder, z, **options),),
        "force": lambda: ops.log_px_and_force(p.decoder, z, p.x, p.likelihood, **options),
    }


OPERATORS = ("store", "recompute", "jacobian", "force")


@functools.cache
def counted(name: str, operator: str, steps: int = STEPS) -> Run:
    """Of a second call: the first one reads the module."""
    p, call = problem_of(name), operators(name, steps)[operator]
    call()
    with Work() as work, saved_tensors() as saved:
        outputs, nodes = made_nodes(call)
        held = held_bytes(saved, outputs)
        leaves = [p.z, *(parameter for parameter in p.decoder.parameters() if parameter.requires_grad)]
        torch.autograd.grad(
            outputs, leaves, [torch.ones_like(y) for y in outputs], retain_graph=True, allow_unused=True
        )
    return Run(list(outputs), nodes, held, work)


@functools.cache
def forward_of(name: str, behind: tuple[str, ...] = ()) -> tuple[Work, int]:
    """Of the decoder itself, and the FLOPs of some of its modules."""
    p = problem_of(name)
    found: list[Work] = []

    def begin(*_: Any) -> None:
        found.append(Work())
        found[-1].__enter__()

    def end(*_: Any) -> None:
        found[-1].__exit__(None, None, None)

    modules = [p.decoder.get_submodule(path) for path in behind]
    hooks = [module.register_forward_pre_hook(begin) for module in modules]
    hooks += [module.register_forward_hook(end) for module in modules]
    try:
        with torch.no_grad(), Work() as work:
            p.decoder(p.z, *p.condition)
    finally:
        for hook in hooks:
            hook.remove()
    return work, sum(each.total for each in found)


def parametrised(names: Iterable[str], operators: Iterable[str] = OPERATORS) -> Any:
    return pytest.mark.parametrize(
        ("name", "operator"), [(name, operator) for name in names for operator in operators]
    )


def passes(operator: str, latents: int) -> dict[str, int]:
    """Of the forward's FLOPs: of a product with weights, and of two values that depend on the code.

    The latter's reverse is two products, and so is its tangent, and its second-order term is two more: nine in all. Of
    the Jacobian, tangents, reverse and the second-order terms are of all latents at once, the rest of one row a sample.
    """
    return {
        "store": {"weights": 6 * POINTS, "values": 9 * POINTS},
        "recompute": {"weights": 8 * POINTS, "values": 12 * POINTS},
        "force": {"weights": 6, "values": 9},
        "jacobian": {"weights": 3 * latents + 3, "values": 6 * latents + 3},
    }[operator]


@parametrised(SWEPT)
def test_sweeps_multiply_as_often_as_the_mathematics_says(name: str, operator: str) -> None:
    forward, spared = forward_of(name, SWEPT[name].behind)
    expected = {
        kind: times * forward.flops[kind]
        for kind, times in passes(operator, problem_of(name).z[0].numel()).items()
    }
    if operator == "jacobian":
        expected["weights"] -= 2 * spared
    found = counted(name, operator).work.flops
    assert {kind: found[kind] for kind in expected} == expected


@parametrised(LOWERED)
def test_kernels_multiply_no_more_often_than_the_mathematics_says(name: str, operator: str) -> None:
    times = passes(operator, problem_of(name).z[0].numel())["weights"]
    found, most = counted(name, operator).work.total, times * forward_of(name)[0].total
    assert found <= most
    # All products of these are ATen's: sweeps of the force, and a perceptron that is no small flow.
    if operator == "force" or (name, operator) == ("tracin", "recompute"):
        assert found == most


@of_cpu_kernels
@parametrised([*SWEPT, *LOWERED])
def test_calls_are_no_more_than_recorded(name: str, operator: str) -> None:
    case: Counted | Lowered = {**SWEPT, **LOWERED}[name]
    place, work = OPERATORS.index(operator), counted(name, operator).work
    assert work.calls <= OTHER_TORCH * case.calls[place]
    assert work.products <= case.products[place]


@parametrised([*SWEPT, *LOWERED])
def test_the_graph_is_the_operators_own_function_alone(name: str, operator: str) -> None:
    """No node of the decoder's operations, but of what is made of parameters alone."""
    computed = set(LOWERED[name].computed) if name in LOWERED else set()
    names = names_of_nodes(counted(name, operator).outputs)
    assert computed <= names
    (own,) = names - computed
    assert {"store": "Flow", "recompute": "Flow", "jacobian": "Jacobian", "force": "Force"}[operator] in own


@parametrised(SWEPT)
def test_nodes_that_a_call_makes(name: str, operator: str) -> None:
    """One Function; the reverse of a map of images is PyTorch's, of a node for each number of rows at each point."""
    case, found = SWEPT[name], counted(name, operator).nodes
    most = 1 + case.maps * {"store": POINTS, "recompute": POINTS, "force": 1, "jacobian": 2}[operator]
    assert found <= most


@parametrised(LOWERED, ("store", "recompute", "jacobian"))
def test_nodes_that_a_call_of_kernels_makes(name: str, operator: str) -> None:
    assert counted(name, operator).nodes == 1 + len(LOWERED[name].computed)


@pytest.mark.parametrize("name", [*SWEPT, *LOWERED])
def test_recomputing_holds_codes_and_momenta_of_a_step_and_nothing_else(name: str) -> None:
    """A number of z and of rho, and alpha; what is stored grows with all layers."""
    p, more = problem_of(name), 4
    grown = {
        memory: counted(name, memory, STEPS + more).held - counted(name, memory).held
        for memory in ("store", "recompute")
    }
    assert grown["recompute"] == more * (2 * p.z.numel() + 1) * p.z.element_size()
    assert grown["store"] > 2 * grown["recompute"]

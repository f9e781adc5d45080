"""Every operator on every decoder of the zoo, against plain autograd: values and all gradients.

In float64 to 1e-10; in float32 within twice the error that eager PyTorch itself has against float64. What fails today
is an expected failure, with its reason in the registry (``Entry.today``).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import OPERATORS, ZOO, Entry, Problem, is_installed, oracles, problem
from zoo.table import reading

from fastvae import Network, ops
from fastvae.influence import TracIn
from fastvae.models import VAE
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.likelihood_regret import _FIRST_SAMPLE

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*cannot be lowered",
    "ignore:.*without a kernel",
    "ignore:.*trained by torch.vmap",
    "ignore:.*are all in \\[0, 1\\]",
)

FLOAT64 = 1e-10
# A float32 result may be exact by chance: then ours may be off by some units of the last place of the largest element.
# Adam's first steps are signs of the gradient: one that is nearly zero moves a weight by 1e-2.
FLOAT32_FLOOR = {"log_px": 2e-6, "flow": 5e-6, "jacobian": 5e-6, "tracin": 5e-6, "regret": 1e-4}


# All but the first are autograd Functions of their authors, whose gradients are their own.
OUTSIDE = {
    "straight-through": r"Round +autograd",
    "swish-function": r"Swish +autograd",
    "disent-conv64-instancenorm-swish": r"_SwishFunction +autograd",
}
"""Decoders of which a part or all runs through autograd, and what ``Network.explain`` says of it: a tenth at most."""


def cases(
    operators: Mapping[str, Any] | tuple[str, ...],
    kind: str = "",
    *,
    slow: tuple[str, ...] = (),
    heavy: tuple[str, ...] = (),
) -> Any:
    """Parametrise over operators and the zoo; an expected failure where the registry says so."""
    found = []
    # A decoder's operators one after the other: it is read once for all.
    for entry in ZOO.values():
        for operator in operators:
            if operator == "regret" and not fits_a_vae(entry):
                continue
            marks: list[Any] = []
            if not is_installed(entry):
                marks.append(pytest.mark.skip(reason=f"{entry.package} is not installed: see `make zoo`"))
            reason = entry.today.get(operator + kind, entry.today.get(operator))
            if reason is not None:
                marks.append(pytest.mark.xfail(strict=True, reason=reason))
            if operator in slow or entry.heavy:
                marks.append(pytest.mark.slow)
            if operator in heavy or (entry.heavy and (operator in slow or operator != "flow")):
                marks.append(pytest.mark.heavy)
            found.append(pytest.param(operator, entry, marks=marks, id=f"{operator}-{entry.name}"))
    return pytest.mark.parametrize(("operator", "entry"), found)


def fits_a_vae(entry: Entry) -> bool:
    return len(entry.code) == 1 and entry.condition is None


@functools.lru_cache(maxsize=2)
def problem_named(name: str, dtype: torch.dtype) -> Problem:
    return problem(ZOO[name], batch=2 if ZOO[name].heavy else 3, dtype=dtype)


def problem_of(entry: Entry, dtype: torch.dtype = torch.float64) -> Problem:
    return problem_named(entry.name, dtype)


def conditioned(p: Problem, z: Tensor) -> Tensor:
    """The decoder's outputs for codes of all samples, a sample's one after the other."""
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
    return {"rho": rho.to(p.z), "step_size": step_size.to(p.z), "alpha": alpha.to(p.z)}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def parameters_of(p: Problem) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in p.decoder.named_parameters() if parameter.requires_grad}


# --- the runs, by an operator and by its oracle ------------------------------------------------


Run = tuple[Callable[[], list[Tensor]], dict[str, Tensor]]
"""A function that computes outputs, and the leaves to which they have gradients."""


def log_px_run(p: Problem, by_oracle: bool) -> Run:
    codes = torch.stack([p.z, 0.5 * p.z.flip(0)])

    def run() -> list[Tensor]:
        if by_oracle:
            with torch.no_grad():
                found = [oracles.log_prob(p.likelihood, conditioned(p, z), p.x) for z in codes]
            return [torch.stack(found)]
        return [ops.log_px(p.decoder, codes, p.x, p.likelihood, **options_of(p))]

    return run, {}


def flow_run(p: Problem, by_oracle: bool) -> Run:
    start = {"z": leaf(p.z), **{name: leaf(tensor) for name, tensor in momenta(p).items()}}

    def run() -> list[Tensor]:
        z, rho, step_size, alpha = start.values()
        if by_oracle:
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
            return [oracles.jacobian_l1(functools.partial(conditioned, p), z)]
        return [ops.jacobian_l1(p.decoder, z, "none", **options_of(p))]

    return run, {"z": z, **parameters_of(p)}


def tracin_run(p: Problem, by_oracle: bool) -> Run:
    """Dot products of the per-sample gradients of -log p(x | z), and their squared norms."""

    def loss(output: Tensor, x: Tensor) -> Tensor:
        return -p.likelihood.log_prob_of_output(output, x)

    def run() -> list[Tensor]:
        samples = (p.z, *p.condition, p.x)
        if by_oracle:
            rows = torch.stack(
                [gradient_of(p, tuple(part[i : i + 1] for part in samples)) for i in range(len(p.z))]
            )
            return [rows[:2] @ rows.T, rows.square().sum(1)]
        tracin = TracIn(p.decoder, samples, None, loss_fn=loss, uncovered="materialise")
        queries = tuple(part[:2] for part in samples)
        return [tracin.influence(queries), tracin.self_influence()]

    return run, {}


def gradient_of(p: Problem, sample: tuple[Tensor, ...]) -> Tensor:
    *inputs, x = sample
    parameters = list(parameters_of(p).values())
    value = oracles.log_prob(p.likelihood, p.decoder(*inputs), x).sum()
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


REFIT: dict[str, Any] = {"num_steps": 3, "num_samples": 4, "lr": 1e-2}


def regret_run(p: Problem, by_oracle: bool) -> Run:
    """An encoder of each image trained for three steps: posteriors, losses and the regret itself."""
    torch.manual_seed(3)
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(p.x[0].numel(), 6), nn.Tanh(), nn.Linear(6, 2 * p.z.shape[1])
    )
    encoder.to(p.z.device, p.z.dtype)
    # In float32 under either dtype: noise is keyed by the bytes.
    x = p.x.float()

    def run() -> list[Tensor]:
        if not by_oracle:
            model = VAE(encoder, p.decoder, p.likelihood, latent_dim=p.z.shape[1]).eval()
            detector = LikelihoodRegret(model, **REFIT)
            return [*detector.refit(x)[:3], detector.predict(x)]
        keys = keys_of(x)
        each = [
            oracles.regret(
                encoder,
                p.decoder,
                p.likelihood,
                x[i : i + 1],
                SampleNoise(keys[i : i + 1], 0, 1)(0, REFIT["num_steps"], p.z[:1])[0],
                SampleNoise(keys[i : i + 1], 0, 1, start=_FIRST_SAMPLE)(0, REFIT["num_samples"], p.z[:1])[0],
                lr=REFIT["lr"],
            )
            for i in range(len(x))
        ]
        return [torch.cat(parts) for parts in zip(*each, strict=True)]

    return run, {}


RUNS: dict[str, Callable[[Problem, bool], Run]] = {
    "log_px": log_px_run,
    "flow": flow_run,
    "jacobian": jacobian_run,
    "tracin": tracin_run,
    "regret": regret_run,
}
DIFFERENTIATED = ("flow", "jacobian")


def everything(operator: str, p: Problem, by_oracle: bool) -> dict[str, Tensor]:
    """Outputs, and the gradients of a combination of them to every leaf, by name."""
    compute, leaves = RUNS[operator](p, by_oracle)
    with oracles.careful(p.decoder) if by_oracle else contextlib.nullcontext():
        outputs = compute()
        gradients = oracles.gradients(outputs, list(leaves.values())) if leaves else []
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return found | {f"gradient to {name}": g for name, g in zip(leaves, gradients, strict=True)}


@functools.lru_cache(maxsize=8)
def exact(operator: str, name: str) -> dict[str, Tensor]:
    return everything(operator, problem_of(ZOO[name]), True)


def errors_of(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of each, in units of its largest expected magnitude.

    Not below a tenth of the largest of all gradients: that to a bias in front of an InstanceNorm is zero, a sum
    whose terms cancel.
    """
    assert actual.keys() == expected.keys()
    gradients = [e for name, e in expected.items() if name.startswith("gradient") and e.numel()]
    least = 0.1 * max([1e-2, *(float(e.abs().max()) for e in gradients)])
    errors = {}
    for name, e in expected.items():
        assert actual[name].shape == e.shape, f"{name}: {list(actual[name].shape)} and not {list(e.shape)}"
        if e.numel():
            scale = max(float(e.abs().max()), least if name.startswith("gradient") else 1e-3)
            errors[name] = float((actual[name].cpu().double() - e.cpu().double()).abs().max()) / scale
    return errors


def assert_near(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], most: float = FLOAT64) -> None:
    for name, error in errors_of(actual, expected).items():
        assert error <= most, f"{name}: relative error {error:.3g}"


# --- the tests ---------------------------------------------------------------------------------


def test_the_registry_names_operators() -> None:
    assert tuple(RUNS) == OPERATORS and len(ZOO) >= 45
    for name, entry in ZOO.items():
        assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name) and bool(entry.package) == (entry.origin != "own")
        assert {key.removesuffix(" float32") for key in entry.today} <= set(OPERATORS), entry.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "entry"),
    [
        pytest.param(
            operator,
            entry,
            id=f"{operator}-{entry.name}",
            marks=pytest.mark.skipif(
                not is_installed(entry), reason=f"{entry.package} is not installed: see `make zoo`"
            ),
        )
        for operator in DIFFERENTIATED
        for entry in ZOO.values()
        if not (entry.own_gradients or entry.heavy)
    ],
)
def test_oracle_agrees_with_differences(operator: str, entry: Entry) -> None:
    compute, leaves = RUNS[operator](problem_of(entry), True)
    expected = exact(operator, entry.name)
    gradients = [expected[f"gradient to {name}"] for name in leaves]
    with oracles.careful(problem_of(entry).decoder):
        problem = oracles.differences_agree(compute, list(leaves.values()), gradients)
    assert not problem, problem


def test_nine_tenths_are_in_kernels_or_sweeps() -> None:
    """Which ones these are is asserted where a flow has read them: test_float64."""
    assert set(OUTSIDE) <= set(ZOO) and len(OUTSIDE) <= 0.1 * len(ZOO)


def explanation_of_what_is_outside(p: Problem) -> str:
    """Of kernels and sweeps; empty where all of the decoder is inside."""
    if reading(p)[0]:
        return ""
    network = Network(p.decoder, z=p.z, **options_of(p))
    return network.explain() if network.opaque or network.lowered < 1 else ""


@cases(RUNS, slow=("tracin", "regret"))
def test_float64(operator: str, entry: Entry) -> None:
    p = problem_of(entry)
    before = {name: tensor.clone() for name, tensor in p.decoder.state_dict().items()}
    assert_near(everything(operator, p, False), exact(operator, entry.name))
    assert not p.decoder.training
    for name, tensor in p.decoder.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed"
    if operator == "flow":
        outside = explanation_of_what_is_outside(p)
        assert bool(outside) == (entry.name in OUTSIDE), (
            outside or "all of it is inside now: take it off the list"
        )
        assert re.search(OUTSIDE.get(entry.name, ""), outside)


def errors_of_roundings(p: Problem, expected: Mapping[str, Tensor]) -> Iterator[dict[str, float]]:
    """Eager PyTorch's, with weights of the decoder that differ by as much as a sum of 16 roundings.

    Adam's first steps are signs of gradients: where one is nearly zero, either is right.
    """
    decoder, generator = copy.deepcopy(p.decoder), torch.Generator().manual_seed(1)
    rounded = p._replace(decoder=decoder)
    for _ in range(16):
        with torch.no_grad():
            for theirs, own in zip(decoder.parameters(), p.decoder.parameters(), strict=True):
                theirs.copy_(own * (1 + 2.4e-7 * torch.empty_like(own).normal_(generator=generator)))
        yield errors_of(everything("regret", rounded, True), expected)


@cases(RUNS, " float32", slow=OPERATORS)
def test_float32(operator: str, entry: Entry) -> None:
    p = problem_of(entry, torch.float32)
    expected = exact(operator, entry.name)
    allowed = errors_of(everything(operator, p, True), expected)
    errors = errors_of(everything(operator, p, False), expected)

    def exceeding() -> dict[str, str]:
        return {
            name: f"relative error {error:.3g}, eager PyTorch's {allowed[name]:.3g}"
            for name, error in errors.items()
            if not error <= max(2 * allowed[name], FLOAT32_FLOOR[operator])
        }

    for other in errors_of_roundings(p, expected) if operator == "regret" and exceeding() else ():
        allowed = {name: max(error, other[name]) for name, error in allowed.items()}
        if not exceeding():
            break
    assert not exceeding()


@cases(DIFFERENTIATED, slow=DIFFERENTIATED)
def test_a_sample_does_not_depend_on_its_batch(operator: str, entry: Entry) -> None:
    """Outputs and the gradient to z of 16 samples, and of each part of them."""
    p = problem(entry, batch=2 if entry.heavy else 16)
    start = momenta(p)

    def run(part: slice) -> dict[str, Tensor]:
        few = p._replace(z=leaf(p.z[part]), x=p.x[part], condition=tuple(c[part] for c in p.condition))
        if operator == "jacobian":
            outputs = [ops.jacobian_l1(few.decoder, few.z, "none", **options_of(few))]
        else:
            pace = start["step_size"], start["alpha"]
            outputs = list(
                ops.hamiltonian_flow(
                    few.decoder, few.z, start["rho"][part], few.x, *pace, few.likelihood, **options_of(few)
                )
            )
        outputs += torch.autograd.grad(sum(output.sum() for output in outputs), few.z)
        return {f"output {index}": output.detach() for index, output in enumerate(outputs)}

    whole = run(slice(None))
    for part in (slice(0, 1), slice(1, 5)):
        assert_near(run(part), {name: output[part] for name, output in whole.items()})


BREAK_GRAPHS = {"lstm": "does not support RNN, GRU, or LSTM"}
"""Decoders that are no part of a graph of torch.compile, and what the error says of them."""


@cases(DIFFERENTIATED, slow=DIFFERENTIATED, heavy=("jacobian",))
def test_in_one_graph(operator: str, entry: Entry) -> None:
    """torch.compile(fullgraph=True): kernels and sweeps are calls of the graph."""
    p = problem_of(entry)
    compute, leaves = RUNS[operator](p, False)
    expected = everything(operator, p, False)
    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    if entry.name in BREAK_GRAPHS:
        with pytest.raises(torch._dynamo.exc.Unsupported, match=BREAK_GRAPHS[entry.name]):
            compiled()
        return
    for _ in range(2):
        outputs = compiled()
        gradients = oracles.gradients(outputs, list(leaves.values()))
        found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
        found |= {f"gradient to {name}": g for name, g in zip(leaves, gradients, strict=True)}
        assert_near(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@cases(RUNS)
def test_float64_on_cuda(operator: str, entry: Entry) -> None:
    """The same on a GPU, where nothing but PyTorch's own operators sweeps what is read as a graph."""
    p = problem_of(entry)
    moved = p._replace(
        decoder=copy.deepcopy(p.decoder).cuda(),
        z=p.z.cuda(),
        x=p.x.cuda(),
        condition=tuple(c.cuda() for c in p.condition),
    )
    # PyTorch's kernel of weight_norm on a GPU takes the root of a norm in float32 (6e-8), of float64 weights too.
    most = 1e-6 if entry.name.startswith("weight-spectral-norm") else FLOAT64
    assert_near(everything(operator, moved, False), everything(operator, moved, True), most)
    if operator == "flow":
        assert bool(explanation_of_what_is_outside(moved)) == (entry.name in OUTSIDE)

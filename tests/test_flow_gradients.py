"""hamiltonian_flow against the float64 reference: values, and gradients to everything that has one."""

from __future__ import annotations

import pytest
import torch
from flow_problems import (
    ACTIVATIONS,
    LIKELIHOODS,
    MEMORY,
    Problem,
    check_against_reference,
    conv,
    gradients,
    mlp,
    problem,
    seeded,
)
from torch import Tensor

from fastvae import ops

DTYPES = {"float64": torch.float64, "float32": torch.float32}
each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
each_memory = pytest.mark.parametrize("memory", MEMORY)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@each_memory
@each_likelihood
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation: str, likelihood: str, memory: str, device: torch.device) -> None:
    p = problem(lambda outputs: mlp(outputs, ACTIVATIONS[activation]), likelihood)
    check_against_reference(p, device, memory=memory)


@each_memory
@each_likelihood
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolutions(activation: str, likelihood: str, memory: str, device: torch.device) -> None:
    decoder = conv(LIKELIHOODS[likelihood].values_per_element, ACTIVATIONS[activation])
    check_against_reference(problem(decoder, likelihood, steps=2), device, memory=memory)


@each_memory
@each_likelihood
@pytest.mark.parametrize("decoder", [mlp, conv], ids=["mlp", "conv"])
def test_float32(decoder: object, likelihood: str, memory: str, device: torch.device) -> None:
    check_against_reference(problem(decoder, likelihood, steps=10), device, torch.float32, memory=memory)


@each_dtype
@each_memory
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33])
def test_sizes_of_batches(batch: int, memory: str, dtype: torch.dtype, device: torch.device) -> None:
    """Around the vector lengths of both types."""
    check_against_reference(problem(mlp, steps=2, batch=batch, outputs=19), device, dtype, memory=memory)


@each_memory
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 10])
def test_numbers_of_steps(steps: int, memory: str, device: torch.device) -> None:
    """K + 1 points around the multiples of the four whose weight gradients are formed together."""
    check_against_reference(problem(mlp, "gaussian", steps=steps), device, memory=memory)


@pytest.mark.parametrize("steps", [3, 4, 5, 10])
def test_numbers_of_steps_of_convolutions(steps: int, device: torch.device) -> None:
    check_against_reference(problem(conv, "bernoulli", steps=steps, batch=2), device)


# One number: python, [], [1], [1, 1]; one a dimension: [3], [1, 3]; one a step: [4, 1]; all [4, 3].
@each_dtype
@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 1), (1, 3), (4, 1), (4, 3)], ids=str)
def test_step_sizes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    p = problem(steps=4)
    step_size = p.step_size.flatten()[: max(1, torch.Size(shape).numel())].reshape(shape)
    check_against_reference(
        Problem(p.decoder, p.z, p.rho, p.x, step_size, p.alpha, p.likelihood), device, dtype
    )


@pytest.mark.parametrize("step_size", [0.1, [0.1, 0.2, 0.05]], ids=["number", "list"])
def test_step_sizes_of_python(step_size: object, device: torch.device) -> None:
    p = problem(steps=4)
    check_against_reference(Problem(p.decoder, p.z, p.rho, p.x, step_size, p.alpha, p.likelihood), device)


def test_zero_tempering(device: torch.device) -> None:
    """alpha = 0 stops the momentum; nothing divides by it."""
    p = problem(steps=3)
    p.alpha[1] = 0.0
    check_against_reference(p, device)
    p.alpha[:] = 0.0
    check_against_reference(p, device)


SUBSETS = {
    "nothing": [],
    "z": ["z"],
    "rho": ["rho"],
    "x": ["x"],
    "step_size": ["step_size"],
    "alpha": ["alpha"],
    "parameters": [f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")],
    "one_frozen_layer": ["z", "rho", "0.weight", "0.bias", "4.weight", "4.bias"],
    "biases": ["0.bias", "2.bias", "4.bias"],
    "frozen_decoder": ["z", "rho", "x", "step_size", "alpha"],
    "encoder": ["z", "rho"],
}


@each_memory
@pytest.mark.parametrize("subset", SUBSETS)
def test_subsets_of_gradients(subset: str, memory: str, device: torch.device) -> None:
    check_against_reference(problem(steps=4), device, names=SUBSETS[subset], memory=memory)


@pytest.mark.parametrize("names", [["6.weight"], ["1.bias", "4.weight"], ["5.weight", "5.bias"]], ids=str)
def test_subsets_of_convolutional_gradients(names: list[str], device: torch.device) -> None:
    check_against_reference(problem(conv, "gaussian", steps=2), device, names=["z", *names])


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=["z_K", "rho_K", "log_px", "z_K-log_px"])
@each_likelihood
def test_single_outputs(used: tuple[int, ...], likelihood: str, device: torch.device) -> None:
    """A cotangent that is missing counts as zero."""
    p = problem(mlp, likelihood).to().require()
    on_device = p.to(device)
    expected, actual = p.reference(), on_device.run()
    wanted = gradients(p, [expected[i] for i in used])
    found = gradients(on_device, [actual[i] for i in used])
    for name, gradient in wanted.items():
        got = found[name]
        if gradient is None:
            assert got is None or not got.any(), name
        else:
            assert got is not None
            torch.testing.assert_close(got.cpu(), gradient, rtol=1e-10, atol=1e-11, msg=name)


@each_memory
def test_gradcheck(memory: str, device: torch.device) -> None:
    """Against finite differences, which know nothing of the reference."""
    p = problem(seeded(mlp(2, latent_dim=2)), steps=2, batch=2, latent_dim=2).to(device).require()
    names = [name for name, _ in p.decoder.named_parameters()]
    parameters = [p.decoder.get_parameter(name) for name in names]

    def run(z: Tensor, rho: Tensor, x: Tensor, step: Tensor, alpha: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        # gradcheck changes the parameters in place.
        return ops.hamiltonian_flow(p.decoder, z, rho, x, step, alpha, p.likelihood, memory=memory)

    assert torch.autograd.gradcheck(run, (p.z, p.rho, p.x, p.step_size, p.alpha, *parameters))


def test_categorical_data_has_no_gradient(device: torch.device) -> None:
    p = problem(mlp, "categorical").to(device).require(["z", "x"])
    with pytest.raises(ValueError, match=r"x: expected .*gradient|x\.requires_grad"):
        sum(out.sum() for out in p.run()).backward()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool], ids=["uint8", "bool"])
@each_likelihood
def test_integer_data(dtype: torch.dtype, likelihood: str, device: torch.device) -> None:
    p = problem(conv, likelihood, steps=2)
    x = (p.x * 4).to(torch.uint8) if dtype == torch.uint8 else p.x > 0.5
    p = Problem(p.decoder, p.z, p.rho, x, p.step_size, p.alpha, p.likelihood)
    check_against_reference(p, device, names=["z", "0.weight"])

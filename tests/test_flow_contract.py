"""What hamiltonian_flow promises besides its value: layouts, modes, raw functions, repeatability."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from flow_problems import (
    MEMORY,
    Problem,
    assert_near,
    conv,
    cotangents,
    gradients,
    mlp,
    problem,
    seeded,
)
from torch import Tensor

import fastvae
from fastvae import ops
from fastvae.lowering import lower

raw = fastvae._C
flow = ops.hamiltonian_flow
each_memory = pytest.mark.parametrize("memory", MEMORY)


def op_args(p: Problem, store: bool = True, trajectory: bool = False) -> tuple:
    """The arguments of torch.ops.fastvae.hamiltonian_flow."""
    network = lower(p.decoder)
    x = p.likelihood.as_float(p.x, p.z.dtype).flatten(1)
    step_size = p.step_size.expand(p.alpha.shape[0], p.z.shape[1])
    tensors = (p.z, p.rho, x, step_size, p.alpha, network.tensors)
    return *tensors, network.spec, p.likelihood.spec, store, trajectory


@pytest.mark.parametrize("trajectory", [False, True])
@each_memory
def test_opcheck(memory: str, trajectory: bool, device: torch.device) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch with dynamic shapes."""
    p = problem().to(device).require()
    torch.library.opcheck(
        torch.ops.fastvae.hamiltonian_flow.default,
        op_args(p, memory == "store", trajectory),
        rtol=1e-10,
        atol=1e-12,
    )


@each_memory
def test_opcheck_of_the_backward(memory: str, device: torch.device) -> None:
    p = problem().to(device)
    args = op_args(p, memory == "store")
    z_K, rho_K, log_px, z_steps, rho_steps, _, stash = torch.ops.fastvae.hamiltonian_flow(*args)
    for needs in ([1] * 11, [0, 1] * 5 + [0]):
        backward_args = (
            *(torch.ones_like(z_K), torch.ones_like(rho_K), torch.ones_like(log_px)),
            *(*args[:6], z_steps, rho_steps, stash, args[6], args[7], memory == "store", needs),
        )
        torch.library.opcheck(
            torch.ops.fastvae.hamiltonian_flow_backward.default,
            backward_args,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def test_expanded_and_strided_inputs(device: torch.device) -> None:
    """Every layout gives what the dense copy gives, to the last bit."""
    p = problem(conv, "gaussian", batch=4).to(device)
    z = p.z.t().contiguous().t()
    rho = p.rho[:1].expand(4, 3)
    x = p.x[:1].transpose(2, 3).expand(4, -1, -1, -1)
    alpha = torch.stack([p.alpha, p.alpha], 1)[:, 0]
    step_size = p.step_size[:1].expand(3, 3)
    strided = replace(p, z=z, rho=rho, x=x, alpha=alpha, step_size=step_size)
    assert not any(t.is_contiguous() for _, t in strided.tensors())
    dense = replace(strided, **{name: t.contiguous() for name, t in strided.tensors()})
    for memory in MEMORY:
        results = []
        for q in (strided, dense):
            leaves = {name: t.detach().requires_grad_() for name, t in q.tensors()}
            q = replace(q, **leaves)
            results.append(gradients(q, q.run(memory=memory)))
        for name, gradient in results[0].items():
            torch.testing.assert_close(gradient, results[1][name], rtol=0, atol=0, msg=name)


def test_channels_last_weights(device: torch.device) -> None:
    p = problem(conv, "gaussian").to(device).require()
    expected = gradients(p, p.run())
    p.decoder.to(memory_format=torch.channels_last)
    for name, gradient in gradients(p, p.run()).items():
        assert_near(gradient, expected[name].cpu(), 1e-12, name)


def test_expanded_cotangent(device: torch.device) -> None:
    """``sum().backward()`` hands in a cotangent with stride 0."""
    p = problem().to(device).require(["z"])
    p.run()[0].sum().backward()
    expanded = p.z.grad.clone()
    p.z.grad = None
    out = p.run()[0]
    out.backward(torch.ones_like(out).contiguous())
    assert torch.equal(expanded, p.z.grad)


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("latent_dim", [1, 3])
@pytest.mark.parametrize("decoder", [mlp, conv], ids=["mlp", "conv"])
@each_memory
def test_small_batches(decoder, latent_dim: int, batch: int, memory: str, device: torch.device) -> None:
    module = seeded(decoder(1 if decoder is conv else 4, latent_dim=latent_dim))
    whole = problem(module, "bernoulli", batch=7, latent_dim=latent_dim, steps=5).to(device)
    p = replace(whole, z=whole.z[:batch].clone(), rho=whole.rho[:batch].clone(), x=whole.x[:batch].clone())
    p.require()
    outputs, trajectory = flow(*p.args(), memory=memory), p.trajectory()
    assert [list(o.shape) for o in outputs] == [[batch, latent_dim], [batch, latent_dim], [batch]]
    assert [list(t.shape) for t in trajectory] == [[6, batch, latent_dim]] * 2 + [[6, batch]]
    for output, of_whole in zip(outputs, whole.run(memory=memory), strict=True):
        # A GEMM of other sizes may sum in another order.
        torch.testing.assert_close(output, of_whole[:batch], rtol=1e-11, atol=1e-11)
    for name, gradient in gradients(p, outputs).items():
        assert gradient.shape == p.leaves()[name].shape
        assert batch or not gradient.any(), f"{name}: no samples, no gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_memory
def test_autocast(memory: str, dtype: torch.dtype, device: torch.device) -> None:
    """Under autocast everything is float32, whatever the encoder's layers handed over."""
    p = problem(conv, "bernoulli").to(device, torch.float32)
    half = replace(p, z=p.z.to(dtype), rho=p.rho.to(dtype)).require()
    full = (
        replace(p, z=half.z.detach().float(), rho=half.rho.detach().float())
        .to(device, torch.float32)
        .require()
    )
    with torch.autocast(device.type, torch.bfloat16):
        outputs = half.run(memory=memory)
    assert all(o.dtype == torch.float32 for o in outputs)
    expected = full.run(memory=memory)
    for output, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(output, wanted)
    found, wanted_gradients = gradients(half, outputs), gradients(full, expected)
    for name, gradient in found.items():
        assert gradient.dtype == half.leaves()[name].dtype
        torch.testing.assert_close(
            gradient, wanted_gradients[name].to(gradient.dtype), rtol=0, atol=0, msg=name
        )


def test_autocast_rounds_no_data(device: torch.device) -> None:
    """z in bfloat16 makes neither the pixels nor the step size bfloat16."""
    p = problem(mlp, "gaussian").to(device, torch.float32)
    pixels = (p.x * 255).to(torch.uint8)
    z, rho = p.z.bfloat16(), p.rho.bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        outputs = flow(p.decoder, z, rho, pixels, 0.1, p.alpha, p.likelihood)
    for output, wanted in zip(
        outputs, flow(p.decoder, z.float(), rho.float(), pixels, 0.1, p.alpha, p.likelihood), strict=True
    ):
        assert_near(output, wanted.cpu(), 1e-6)


def test_no_grad_and_inference_mode(device: torch.device) -> None:
    p = problem(conv, "gaussian").to(device).require()
    expected = (*p.run(), *p.trajectory())
    with torch.no_grad():
        no_grad = (*p.run(), *p.trajectory())
    with torch.inference_mode():
        inference = (*p.run(), *p.trajectory())
        # Inference tensors as inputs.
        q = replace(p, z=p.z * 1, rho=p.rho * 1, alpha=p.alpha * 1)
        again = (*q.run(), *q.trajectory())
    for results in (no_grad, inference, again):
        for result, wanted in zip(results, expected, strict=True):
            assert not result.requires_grad
            assert torch.equal(result, wanted)


@each_memory
def test_bound_operators(memory: str, device: torch.device) -> None:
    """fastvae._C binds the operators themselves, with autograd and autocast, and their gradients."""
    store = memory == "store"
    p = problem(conv, "bernoulli").to(device).require()
    outputs = p.run(memory=memory)
    wanted = gradients(p, outputs)
    args = op_args(p, store)
    with torch.autocast(device.type, torch.bfloat16):
        results = raw.hamiltonian_flow(*args)
        assert [r.requires_grad for r in results] == [True] * 3 + [False] * 4
        assert all(r.dtype == torch.float64 for r in results)
        _, _, _, z_steps, rho_steps, _, stash = results
        tensors = len(args[5])
        *found, of_parameters = raw.hamiltonian_flow_backward(
            *cotangents(outputs),
            *args[:6],
            z_steps,
            rho_steps,
            stash,
            args[6],
            args[7],
            store,
            [1] * (5 + tensors),
        )
    for result, output in zip(results, outputs, strict=False):
        assert torch.equal(result, output)
    for name, gradient in gradients(p, results[:3]).items():
        assert gradient is wanted[name] is None or torch.equal(gradient, wanted[name]), name
    with pytest.raises(NotImplementedError, match="fastvae::hamiltonian_flow: differentiable once"):
        found[0].sum().backward()
    for name, gradient in zip(("z", "rho", "x", "step_size", "alpha"), found, strict=True):
        assert torch.equal(gradient.view_as(wanted[name]), wanted[name]), name
    for name, gradient in zip(lower(p.decoder).names, of_parameters, strict=True):
        if name in wanted:
            assert torch.equal(gradient, wanted[name]), name


def test_a_device_without_kernels() -> None:
    """What a CUDA tensor meets on a CPU build, tried with the meta device that no build has kernels for."""
    meta = torch.zeros(2, 3, device="meta")
    build = raw.build_info()
    expected = (
        "CPU or CUDA tensor"
        if build["cuda"]
        else r"build of fastvae has no CUDA kernels .*FASTVAE_CUDA=1 pip"
    )
    with pytest.raises(ValueError, match=expected):
        raw.decoder_gradient(meta, meta, [], "relu", "bernoulli")


@each_memory
def test_backward_twice(memory: str, device: torch.device) -> None:
    p = problem(conv, "gaussian", steps=5).to(device).require()
    outputs = p.run(memory=memory)
    first = gradients(p, outputs, keep=True)
    for name, gradient in gradients(p, outputs).items():
        assert torch.equal(gradient, first[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        gradients(p, outputs)


@each_memory
def test_repeats_to_the_last_bit(memory: str, device: torch.device) -> None:
    p = problem(conv, "categorical", steps=5).to(device).require()
    first, second = ((*o, *gradients(p, o).values()) for o in (p.run(memory=memory), p.run(memory=memory)))
    for one, other in zip(first, second, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_two_python_threads(device: torch.device) -> None:
    problems = [
        problem(decoder, "gaussian", steps=4, seed=s).to(device).require()
        for s in range(4)
        for decoder in (mlp, conv)
    ]

    def work(p: Problem) -> tuple[Tensor, ...]:
        outputs = p.run()
        return (*outputs, *gradients(p, outputs).values())

    expected = [work(p) for p in problems]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for result, wanted in zip(pool.map(work, problems), expected, strict=True):
                assert all(torch.equal(r, w) for r, w in zip(result, wanted, strict=True))


def test_inputs_are_left_alone(device: torch.device) -> None:
    p = problem(conv, "bernoulli").to(device).require()
    before = {name: leaf.detach().clone() for name, leaf in p.leaves().items()}
    gradients(p, p.run())
    assert all(torch.equal(before[name], leaf) for name, leaf in p.leaves().items())


def test_not_a_number_passes_through(device: torch.device) -> None:
    """A diverged sample is a NaN of its own row, never a crash and never its neighbours' business."""
    for decoder, likelihood in ((mlp, "bernoulli"), (conv, "gaussian"), (mlp, "categorical")):
        p = problem(decoder, likelihood).to(device).require(["z"])
        with torch.no_grad():
            p.z[1] = float("nan")
        outputs = p.run()
        sum(o.sum() for o in outputs).backward()
        for result in (*outputs, p.z.grad):
            assert result[1].isnan().all()
            assert result[[0, 2]].isfinite().all()
        with torch.no_grad():
            p.z[1] = float("inf")
        p.run()

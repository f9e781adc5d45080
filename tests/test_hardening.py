"""Whatever comes in: the right numbers, NaN where NaN belongs, or an error that is documented; never a crash."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from emulation import EMULATED
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastvae
from fastvae import ops, reference
from fastvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

HERE, PACKAGE = Path(__file__).parent, Path(fastvae.__file__).parents[1]

# Deterministic, so that a run in CI repeats; the time of a first call (reading the decoder) is nobody's fault.
fuzz = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
each_dtype = st.sampled_from([torch.float32, torch.float64])
LAYOUTS = ["dense", "transposed", "strided", "offset", "expanded"]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers of this shape, in one of the ways that memory can hold them."""
    seed, layout = draw(st.integers(0, 2**31)), draw(st.sampled_from(LAYOUTS))
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=dtype) * scale

    if layout == "transposed" and shape:
        return normal(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "strided" and shape:
        return normal(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    if layout == "offset":
        return normal(math.prod(shape) + 3)[3:].view(shape)
    if layout == "expanded" and shape:
        return normal(1, *shape[1:]).expand(shape)
    return normal(*shape)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Within roundings of a sum of some hundred terms as large as the largest expected number."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    if expected.numel():
        largest = max(float(expected.detach().abs().max()), 1e-30)
        tolerance = (2e-5 if dtype == torch.float32 else 1e-12) * factor
        error = float((actual.detach().double() - expected.detach()).abs().max())
        assert error <= tolerance * largest, f"{error} of {largest}"


def doubled(*values: Tensor) -> list[Tensor]:
    return [value.detach().double().requires_grad_() for value in values]


def agree(
    ours: Callable[..., Any], theirs: Callable[..., Any], inputs: list[Tensor], factor: float = 1.0
) -> None:
    """Values and gradients to every input of an op against its reference in float64."""
    dtype = inputs[0].dtype
    leaves = [value.detach().requires_grad_() for value in inputs]
    wide = doubled(*inputs)
    got, wanted = ours(*leaves), theirs(*wide)
    got, wanted = ([r] if isinstance(r, Tensor) else list(r) for r in (got, wanted))
    for actual, expected in zip(got, wanted, strict=True):
        close(actual, expected, dtype, factor)
    ours_total = sum((r * (i + 1)).sum() for i, r in enumerate(got))
    theirs_total = sum((r * (i + 1)).sum() for i, r in enumerate(wanted))
    gradients = torch.autograd.grad(ours_total, leaves, allow_unused=True)
    constant = not theirs_total.requires_grad  # no latents: plain PyTorch sees no dependence at all
    expected_gradients = (
        [None] * len(wide) if constant else torch.autograd.grad(theirs_total, wide, allow_unused=True)
    )
    for leaf, actual, expected in zip(leaves, gradients, expected_gradients, strict=True):
        close(
            torch.zeros_like(leaf) if actual is None else actual,
            torch.zeros_like(leaf, dtype=torch.float64) if expected is None else expected,
            dtype,
            10 * factor,
        )


# --- shapes, strides, dtypes, magnitudes, empty inputs -----------------------------------------


sizes = st.integers(0, 6)


@fuzz
@given(st.data(), sizes, sizes, each_dtype, st.sampled_from([1e-12, 1.0, 1e12]), st.booleans())
def test_leapfrog(data: Any, batch: int, dim: int, dtype: torch.dtype, scale: float, shared: bool) -> None:
    z, rho, force = (data.draw(tensors((batch, dim), dtype, scale)) for _ in range(3))
    step = data.draw(tensors(() if shared else (dim,), dtype))
    alpha = data.draw(tensors((), dtype))
    agree(ops.leapfrog_kick_drift, reference.leapfrog_kick_drift, [z, rho, force, step])
    agree(ops.leapfrog_kick_temper, reference.leapfrog_kick_temper, [rho, force, step, alpha])


@fuzz
@given(st.data(), *[st.integers(0, 4)] * 6, each_dtype, st.booleans(), st.booleans())
def test_grad_dot(
    data: Any,
    n: int,
    m: int,
    t: int,
    u: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    flat: bool,
    bias: bool,
) -> None:
    shapes = [(n, t, inputs), (n, t, outputs), (m, u, inputs), (m, u, outputs)]
    factors = [data.draw(tensors(s[:1] + s[2:] if flat else s, dtype)) for s in shapes]
    agree(lambda *f: ops.grad_dot(*f, bias=bias), lambda *f: reference.grad_dot(*f, bias=bias), factors)


ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU]


@st.composite
def decoders(draw: st.DrawFn, latent_dim: int, outputs: int, dtype: torch.dtype) -> nn.Sequential:
    """Dense layers of odd widths, some without bias, with any activation, or none."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers: list[nn.Module] = []
    width = latent_dim
    for _ in range(draw(st.integers(0, 3))):
        wider = draw(st.integers(1, 9))
        layers.append(nn.Linear(width, wider, bias=draw(st.booleans())))
        if draw(st.integers(0, 4)):
            layers.append(draw(st.sampled_from(ACTIVATIONS))())
        width = wider
    layers.append(nn.Linear(width, outputs, bias=draw(st.booleans())))
    return nn.Sequential(*layers).to(dtype)


def with_parameters(decoder: nn.Module, count: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call(decoder, *first count)`` where the decoder's parameters are the remaining arguments."""
    names = [name for name, _ in decoder.named_parameters()]

    def run(*values: Tensor) -> Any:
        for name, value in zip(names, values[count:], strict=True):
            owner, _, attribute = name.rpartition(".")
            decoder.get_submodule(owner)._parameters[attribute] = value  # type: ignore[assignment]
        return call(decoder, *values[:count])

    return run


@fuzz
@given(
    st.data(),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 7),
    st.sampled_from([Bernoulli(), Gaussian(0.7), Categorical(3)]),
    each_dtype,
    st.sampled_from(["store", "recompute"]),
)
def test_hamiltonian_flow(
    data: Any,
    batch: int,
    dim: int,
    steps: int,
    pixels: int,
    like: Likelihood,
    dtype: torch.dtype,
    memory: str,
) -> None:
    decoder = data.draw(decoders(dim, pixels * like.values_per_element, dtype))
    z, rho = (data.draw(tensors((batch, dim), dtype)) for _ in range(2))
    x = data.draw(tensors((batch, pixels), dtype)).sigmoid()
    step = data.draw(st.sampled_from([(), (dim,), (steps, 1), (steps, dim)]))
    step_size = data.draw(tensors(step, dtype)).sigmoid() * 0.2
    alpha = data.draw(tensors((steps,), dtype)).sigmoid()
    parameters = list(decoder.parameters())

    def ours(network: nn.Module, *state: Tensor) -> Any:
        return ops.hamiltonian_flow(network, *state[:2], x, *state[2:], like, memory=memory)

    def theirs(network: nn.Module, *state: Tensor) -> Any:
        return reference.hamiltonian_flow(network, *state[:2], x.double(), *state[2:], like)

    agree(
        with_parameters(decoder, 4, ours),
        with_parameters(decoder, 4, theirs),
        [z, rho, step_size, alpha, *parameters],
        factor=5,
    )


@fuzz
@given(
    st.data(),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(1, 7),
    each_dtype,
    st.sampled_from(["none", "sum", "mean"]),
    st.sampled_from(["identity", "sigmoid"]),
    st.sampled_from([1, 2]),
)
def test_jacobian_l1(
    data: Any, batch: int, dim: int, pixels: int, dtype: torch.dtype, reduction: str, output: str, p: int
) -> None:
    decoder = data.draw(decoders(dim, pixels, dtype))
    latents = data.draw(st.none() | st.lists(st.integers(0, dim - 1), unique=True, max_size=dim))
    z = data.draw(tensors((batch, dim), dtype))
    if reduction == "mean" and batch == 0:
        assert ops.jacobian_l1(decoder, z, reduction, output=output, latents=latents, p=p).isnan()
        return
    options: dict[str, Any] = {"output": output, "latents": latents, "p": p}
    agree(
        with_parameters(decoder, 1, lambda network, z: ops.jacobian_l1(network, z, reduction, **options)),
        with_parameters(
            decoder, 1, lambda network, z: reference.jacobian_l1(network, z, reduction, **options)
        ),
        [z, *decoder.parameters()],
        factor=5,
    )


# --- NaN and infinity --------------------------------------------------------------------------


BAD = [math.nan, math.inf, -math.inf]


def small_flow_inputs() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 3))
    step, alpha = torch.full((3, 2), 0.1), torch.full((3,), 0.9)
    return decoder, [torch.randn(4, 2), torch.randn(4, 2), torch.rand(4, 3), step, alpha]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("place", range(3), ids=["z", "rho", "x"])
def test_a_bad_sample_of_the_flow_stays_alone(place: int, memory: str, bad: float) -> None:
    decoder, inputs = small_flow_inputs()
    good = ops.hamiltonian_flow(decoder, *inputs, memory=memory)
    inputs[place][1, 0] = bad
    found = ops.hamiltonian_flow(decoder, *inputs, memory=memory)
    for before, after in zip(good, found, strict=True):
        torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]])
    assert not torch.cat([out[1].flatten() for out in found]).isfinite().all()
    # Its gradient is NaN where it is, and a number in the others.
    z = inputs[0].clone().requires_grad_()
    found = ops.hamiltonian_flow(decoder, z, *inputs[1:], memory=memory)
    (gradient,) = torch.autograd.grad(sum(out.sum() for out in found), z)
    assert gradient[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("place", ["step_size", "alpha", "0.weight", "0.bias", "2.weight", "2.bias"])
def test_nan_in_what_all_samples_share_is_in_all_results(place: str) -> None:
    decoder, inputs = small_flow_inputs()
    if place in ("step_size", "alpha"):
        inputs[3 + (place == "alpha")].flatten()[0] = math.nan
    else:
        with torch.no_grad():
            decoder.get_parameter(place).flatten()[0] = math.nan
    for memory in ("store", "recompute"):
        _, rho, log_px = ops.hamiltonian_flow(decoder, *inputs, memory=memory)
        assert log_px.isnan().all() and rho.isnan().any(1).all(), memory
    if "." in place and place != "2.bias":  # a Jacobian does not depend on the last bias
        assert ops.jacobian_l1(decoder, inputs[0], "none").isnan().all()


@pytest.mark.parametrize("bad", BAD)
def test_bad_numbers_in_the_other_ops(bad: float) -> None:
    decoder, inputs = small_flow_inputs()
    z, rho = inputs[:2]
    z[1, 0] = bad
    value = ops.jacobian_l1(decoder, z, "none")
    assert value[1].isnan() and value[[0, 2, 3]].isfinite().all()
    drifted, half = ops.leapfrog_kick_drift(z, rho, z, 0.1)
    wanted = reference.leapfrog_kick_drift(z, rho, z, 0.1)
    torch.testing.assert_close((drifted, half), wanted, equal_nan=True)
    h, delta = torch.randn(3, 2, 4), torch.randn(3, 2, 5)
    h[1, 0, 0] = bad
    products = ops.grad_dot(h, delta, h, delta)
    assert not products[1].isfinite().any() and not products[:, 1].isfinite().any()
    torch.testing.assert_close(products[::2, ::2], reference.grad_dot(h, delta, h, delta)[::2, ::2])


@pytest.mark.parametrize("bad", BAD)
def test_models_refuse_bad_data(bad: float) -> None:
    decoder, inputs = small_flow_inputs()
    for model in (fastvae.VAE(nn.Linear(3, 4), decoder), fastvae.HVAE(nn.Linear(3, 4), decoder, num_steps=2)):
        x = inputs[2].clone()
        x[2, 1] = bad
        with pytest.raises(
            ValueError, match=r"x holds 1 NaN or infinite value\(s\) in 12; expected finite data"
        ):
            model.loss(x)


# --- threads, forks, kills ---------------------------------------------------------------------


def script(name: str, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """A script of tests/ in a process of its own, which may crash without taking the tests with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{PACKAGE}"}
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


AT_ONCE = """
import os
import threading
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import fastvae
from fastvae import ops

torch.set_num_threads(2)
torch.manual_seed(0)
decoder = nn.Sequential(nn.Linear(8, 256), nn.Softplus(), nn.Linear(256, 64))
z, rho, x = torch.randn(64, 8), torch.randn(64, 8), torch.rand(64, 64)
h, delta = torch.randn(64, 4, 32), torch.randn(64, 4, 16)

def results():
    leaf = z.clone().requires_grad_()
    flow = ops.hamiltonian_flow(decoder, leaf, rho, x, 0.05, torch.full((4,), 0.9))
    penalty = ops.jacobian_l1(decoder, leaf)
    gradient = torch.autograd.grad(sum(f.sum() for f in flow) + penalty, [leaf, *decoder.parameters()])
    return [t.detach() for t in (*flow, penalty, *gradient, ops.grad_dot(h, delta, h, delta))]

expected = results()
wrong = []
def work():
    for _ in range(10):
        found = results()
        # Another thread may take cores, so that sums are split in another way.
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected)):
            wrong.append(found)

class Flowed(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        with torch.no_grad():
            return torch.stack([t.double().sum() for t in ops.hamiltonian_flow(
                decoder, z[i:i + 2], rho[i:i + 2], x[i:i + 2], 0.05, torch.full((4,), 0.9))])

loader = DataLoader(Flowed(), num_workers=2, multiprocessing_context="fork")
threads = [threading.Thread(target=work) for _ in range(3)]
# AddressSanitizer's allocator knows nothing of forks: a worker forked while a thread allocates would wait for ever.
batches = iter(loader) if "asan" in os.environ.get("LD_PRELOAD", "") else None
for thread in threads:
    thread.start()
first = torch.cat(list(batches or loader))
for thread in threads:
    thread.join()
assert not wrong
again = torch.stack([Flowed()[i] for i in range(6)])
torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-5)
print("sound")
"""


@pytest.mark.skipif(EMULATED, reason="a process that has used a GPU cannot fork: replays hold locks there")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_threads_and_forked_loaders_at_once(tmp_path: Path) -> None:
    """Three Python threads and two forked workers use the ops while torch's own two threads do."""
    (tmp_path / "at_once.py").write_text(AT_ONCE)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(PACKAGE),
    }
    result = subprocess.run(
        [sys.executable, str(tmp_path / "at_once.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout == "sound\n", result.stderr[-3000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_training_resumes(tmp_path: Path, count: int) -> None:
    result = script("killed_training.py", tmp_path, count)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout.endswith("killed; the same end\n")


# --- files that mean harm ----------------------------------------------------------------------


class Harm:
    """Pickled, it writes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def harmful_files(folder: Path, mark: Path) -> list[Path]:
    plain, torches, fake, legacy = (folder / f"{name}.pt" for name in ("pickle", "torch", "fake", "legacy"))
    plain.write_bytes(pickle.dumps(Harm(mark)))
    torch.save({"format": "fastvae checkpoint 1", "model": Harm(mark)}, torches)
    model = fastvae.VAE(nn.Linear(3, 4), nn.Linear(2, 3))
    fake_state = {
        "format": "fastvae checkpoint 1",
        "model": model.state_dict(),
        "penalties": [],
        "weight": 1.0,
    }
    torch.save({**fake_state, "optimizer": None, "state": Harm(mark)}, fake)
    torch.save(Harm(mark), legacy, _use_new_zipfile_serialization=False)
    return [plain, torches, fake, legacy]


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    model = fastvae.VAE(nn.Linear(3, 4), nn.Linear(2, 3))
    loader = torch.utils.data.DataLoader(torch.rand(8, 3), batch_size=4)
    for path in harmful_files(tmp_path, mark):
        with pytest.raises(
            ValueError, match=rf"{path.name}: expected a checkpoint, found a damaged or foreign file"
        ):
            fastvae.training.load_checkpoint(model, path)
        with pytest.raises(ValueError, match=rf"{path.name}: expected a checkpoint"):
            fastvae.fit(model, loader, epochs=1, resume=path, progress=False)
        assert not mark.exists(), path
        # What would have happened:
        pickle.loads(path.read_bytes()) if path.stem == "pickle" else torch.load(path, weights_only=False)
        assert mark.exists(), path
        mark.unlink()


def test_images_with_code_are_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    numpy.savez(tmp_path / "images.npz", images=numpy.array([Harm(mark)], dtype=object))
    with pytest.raises(ValueError, match=r"images\.npz"):
        fastvae.data.load(tmp_path / "images.npz")
    assert not mark.exists()


@pytest.mark.parametrize("what", ["a list", "missing keys", "weights of a number", "no state of a run"])
def test_a_checkpoint_of_another_make_is_refused(tmp_path: Path, what: str) -> None:
    """Whole files with the right mark whose content is not what fit writes."""
    model = fastvae.VAE(nn.Linear(3, 4), nn.Linear(2, 3))
    good = {"format": "fastvae checkpoint 1", "model": model.state_dict(), "penalties": [], "weight": 1.0}
    good |= {"optimizer": None, "state": None}
    content: Any = {
        "a list": [good],
        "missing keys": {"format": "fastvae checkpoint 1"},
        "weights of a number": {**good, "model": 3},
        "no state of a run": {**good, "state": {"complete": True}},
    }[what]
    path = tmp_path / "other.pt"
    torch.save(content, path)
    if what != "no state of a run":  # its weights alone are as good as any
        with pytest.raises(ValueError, match=r"other\.pt: expected"):
            fastvae.training.load_checkpoint(model, path)
    loader = torch.utils.data.DataLoader(torch.rand(8, 3), batch_size=4)
    with pytest.raises(ValueError, match=r"other\.pt: expected"):
        fastvae.fit(model, loader, epochs=1, resume=path, progress=False)


# --- the same bits again -----------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_results_repeat_to_the_bit(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = everything(), everything()
    finally:
        torch.set_num_threads(before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def everything() -> dict[str, Tensor]:
    """A training, scores and influences of a model, from one seed."""
    torch.manual_seed(0)
    model = fastvae.HVAE(
        nn.Sequential(nn.Linear(30, 64), nn.Softplus(), nn.Linear(64, 8)),
        nn.Sequential(nn.Linear(4, 64), nn.Softplus(), nn.Linear(64, 30)),
        num_steps=3,
        penalties=[fastvae.penalties.JacobianL1(0.1)],
    )
    x = torch.rand(64, 30, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(x, batch_size=32, shuffle=True)
    history = fastvae.fit(model, loader, epochs=2, seed=3, progress=False)
    generator = torch.Generator().manual_seed(2)
    bare = fastvae.HVAE(model.encoder, model.decoder, num_steps=3)
    tracin = fastvae.influence.TracIn(bare, x, [None], lambda model, checkpoint: 1.0, num_samples=2)
    return {
        "losses": torch.tensor(history.train_loss, dtype=torch.float64),
        "weights": torch.cat([value.double().flatten() for value in model.state_dict().values()]),
        "log likelihood": model.log_likelihood(x[:8], 50, generator=generator),
        "influence": tracin.influence(x[:4]),
    }

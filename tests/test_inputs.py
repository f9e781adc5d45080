"""What people hand to models: each kind works, or is refused in one sentence that says what to do."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from model_problems import DIM, MODELS, PIXELS, data, make, mlp, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastvae import HVAE, IWAE, VAE, JacobianL1VAE, fit, ood, ops, reference
from fastvae.data import binarize
from fastvae.likelihoods import Bernoulli, Categorical, Gaussian

# ---- kinds of x ----


@pytest.mark.parametrize("kind", [VAE, IWAE, HVAE])
def test_an_x_that_is_no_tensor_is_refused_with_the_way_to_one(kind: Any) -> None:
    model, x = make(kind), data()
    calls = (model, model.elbo, model.log_likelihood, model.encode, model.reconstruct, model.loss)
    for call in (
        *calls,
        ood.NegativeLogLikelihood(model, num_samples=2),
        ood.LikelihoodRegret(model, num_steps=1),
    ):
        with pytest.raises((TypeError, ValueError), match=r"x: expected .*, got ndarray"):
            call(x.numpy())
    for call in calls:
        with pytest.raises(
            TypeError, match=r"E: x: expected a tensor .*got ndarray; to mend it: torch.as_tensor\(x\)"
        ):
            call(x.numpy())
        with pytest.raises(TypeError, match=r"got tuple; to mend it: .*fastvae\.data\.images_of\(batch\)"):
            call((x, torch.zeros(5)))


def test_token_ids_are_classes() -> None:
    torch.manual_seed(0)
    ids = torch.randint(7, (4, PIXELS))
    model = VAE(mlp(PIXELS, 2 * DIM), mlp(DIM, 7 * PIXELS), Categorical(7))
    expected = model(ids.to(torch.uint8), generator=seeded())
    for dtype in (torch.int64, torch.int32, torch.int16):
        torch.testing.assert_close(model(ids.to(dtype), generator=seeded()), expected, rtol=0, atol=0)
        torch.testing.assert_close(
            model.log_likelihood(ids.to(dtype), 3, generator=seeded()),
            model.log_likelihood(ids.to(torch.uint8), 3, generator=seeded()),
        )
    fit(model, [ids], epochs=1, progress=False)
    with pytest.raises(ValueError, match="Categorical: x: expected classes below num_classes = 7, got 7"):
        model(torch.full((2, PIXELS), 7))
    with pytest.raises(ValueError, match="Categorical: x: expected classes of at least 0, got -1"):
        model(torch.full((2, PIXELS), -1))


def test_integers_under_other_likelihoods_say_what_to_do() -> None:
    for likelihood in ("bernoulli", "gaussian"):
        with pytest.raises(ValueError, match=r"got torch\.int64; convert integers yourself .*Categorical"):
            make(VAE, likelihood)(torch.ones(2, PIXELS, dtype=torch.int64))


def test_an_embedding_in_the_encoder_says_what_it_is_given() -> None:
    class Embedding(nn.Module):
        def __init__(self, back: bool) -> None:
            super().__init__()
            self.table, self.out, self.back = nn.Embedding(7, 3), nn.Linear(3 * PIXELS, 2 * DIM), back

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.table((6 * x).round().long() if self.back else x).flatten(1))

    ids = torch.randint(7, (4, PIXELS))
    with pytest.raises(
        TypeError, match=r"VAE: encoder: an Embedding expects class indices.*round them back first"
    ):
        VAE(Embedding(False), mlp(DIM, 7 * PIXELS), Categorical(7))(ids)
    VAE(Embedding(True), mlp(DIM, 7 * PIXELS), Categorical(7))(ids)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(256)])
def test_rounding_beyond_the_range_is_no_wrong_range(likelihood: Any) -> None:
    model = VAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS * likelihood.values_per_element), likelihood)
    for x in (torch.tensor(1.0000001), torch.tensor(-1e-8), torch.tensor(1.0000001, dtype=torch.float64)):
        rounded = x.clamp(0, 1).expand(2, PIXELS)
        found = model(x.expand(2, PIXELS), generator=seeded())
        torch.testing.assert_close(found, model(rounded, generator=seeded()), rtol=1e-5, atol=1e-5)
    likelihood.check(torch.tensor([1.0]).half() + 0.001)
    for value in (1.00001, -0.001, 255.0):
        with pytest.raises(ValueError, match=rf"expected values in \[0, 1\] \(or uint8\), got .*{value:.9g}"):
            model(torch.full((2, PIXELS), value))
    assert binarize(torch.full((2, 3), 1.0000001)).eq(1).all()
    with pytest.raises(ValueError, match="binarize: x: expected values in"):
        binarize(torch.full((2, 3), 1.001))


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_a_batch_of_one_with_batch_norm_says_what_to_do(role: str) -> None:
    norm = nn.BatchNorm1d(16)
    networks = {"encoder": mlp(PIXELS, 2 * DIM), "decoder": mlp(DIM, PIXELS)}
    networks[role].insert(1, norm)
    model = VAE(networks["encoder"], networks["decoder"])
    with pytest.raises(
        ValueError, match=rf"VAE: {role}: BatchNorm in training mode .* batch of 1; .*drop_last=True"
    ):
        fit(model, DataLoader(TensorDataset(data(5)), batch_size=4), epochs=1, progress=False)
    model.eval()(data(1))
    fit(model, DataLoader(TensorDataset(data(5)), batch_size=4, drop_last=True), epochs=1, progress=False)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("role", ["encoder", "decoder"])
@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 2), nn.InstanceNorm1d(2, affine=True)], ids=["group", "instance"]
)
def test_a_norm_of_a_single_value_says_what_to_do(norm: nn.Module, role: str, mode: str) -> None:
    """PyTorch speaks of training, whatever the mode."""
    single = nn.Sequential(nn.Linear(PIXELS if role == "encoder" else DIM, 2), nn.Unflatten(1, (2, 1)), norm)
    single.extend([nn.Flatten(), nn.Linear(2, 2 * DIM if role == "encoder" else PIXELS)])
    networks = {"encoder": mlp(PIXELS, 2 * DIM), "decoder": mlp(DIM, PIXELS), role: single}
    model = VAE(networks["encoder"], networks["decoder"]).train(mode == "train")
    kind = "GroupNorm" if isinstance(norm, nn.GroupNorm) else "InstanceNorm"
    with pytest.raises(ValueError) as caught:
        model(data(1))
    assert str(caught.value) == (
        f"VAE: {role}: {kind} expects more than one value to take the mean of, in eval mode too, and got one: a single "
        "position of a single channel; leave the layer out there, or put it where images are larger"
    )


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_or_a_norm_of_a_single_value(mode: str) -> None:
    """Both are there: the error is of the one that PyTorch refused."""
    layers = [
        nn.Linear(PIXELS, 2),
        nn.BatchNorm1d(2),
        nn.Unflatten(1, (2, 1)),
        nn.GroupNorm(2, 2),
        nn.Flatten(),
    ]
    model = VAE(nn.Sequential(*layers, nn.Linear(2, 2 * DIM)), mlp(DIM, PIXELS)).train(mode == "train")
    with pytest.raises(ValueError, match="BatchNorm in training" if mode == "train" else "GroupNorm expects"):
        model(data(1))


# ---- fit's loader ----


def test_samples_in_a_tensor_or_an_array_are_no_loader() -> None:
    x = data(6)
    for samples, way in ((x, r"TensorDataset\(x\)"), (x.numpy(), r"TensorDataset\(torch\.as_tensor\(x\)\)")):
        kind = type(samples).__name__
        expected = (
            rf"expected a data set or an iterable of batches, got the samples themselves \({kind}\); .*{way}"
        )
        with pytest.raises(TypeError, match=f"fit: loader: {expected}"):
            fit(make(VAE), samples, epochs=1)
        with pytest.raises(TypeError, match=f"fit: val_loader: {expected}"):
            fit(make(VAE), [x], val_loader=samples, epochs=1)
    with pytest.raises(
        TypeError, match="fit: loader: expected a data set or an iterable of batches, got int"
    ):
        fit(make(VAE), 3, epochs=1)  # type: ignore[arg-type]


def test_whatever_gives_batches_is_a_loader() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter([data(), data()])

    for loader in ([data()], (data(), data()), Stream(), DataLoader(TensorDataset(data()), batch_size=2)):
        assert fit(make(VAE), loader, epochs=1, progress=False).train_loss


# ---- half precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [VAE, IWAE])
def test_models_in_half_precision_train_and_score(kind: Any, dtype: torch.dtype) -> None:
    options = {"num_samples": 3} if kind is IWAE else {}
    full, x = make(kind, Gaussian(0.5), **options), data()
    model = make(kind, Gaussian(0.5), **options).to(dtype)
    # Half precision has 8 or 11 bits, and a loss is a sum over few numbers.
    close: dict[str, float] = {"rtol": 0.1, "atol": 0.3}
    found = model(x, generator=seeded())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, full(x, generator=seeded()), **close)
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(
        model.log_likelihood(x, 50, generator=seeded()),
        full.log_likelihood(x, 50, generator=seeded()),
        **close,
    )
    assert model.reconstruct(x).shape == x.shape and model.sample(3).shape == (3, PIXELS)
    model(x.to(dtype))
    fit(model, [x], epochs=1, optimizer=torch.optim.SGD(model.parameters(), 1e-3), progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_half_precision_does_not_do_an_error_says_so(dtype: torch.dtype) -> None:
    x = data()
    message = (
        rf"decoder: expected parameters in float32 or float64, got {dtype}; to mend it: decoder\.float\(\)"
    )
    for kind in (HVAE, JacobianL1VAE):
        with pytest.raises(TypeError, match=message):
            make(kind).to(dtype)(x)
    z = torch.zeros(5, DIM)
    decoder = mlp(DIM, PIXELS).to(dtype)
    with pytest.raises(TypeError, match=message):
        ops.log_px(decoder, z[None], x)
    with pytest.raises(TypeError, match=message):
        ops.hamiltonian_flow(
            nn.Sequential(decoder, nn.LayerNorm(PIXELS, dtype=dtype)), z, z, x, 0.1, torch.ones(2)
        )
    with pytest.raises(
        ValueError, match="LikelihoodRegret: model: expected parameters in float32 or float64"
    ):
        ood.LikelihoodRegret(make(VAE).to(dtype), num_steps=1)(x)


def test_a_half_precision_decoder_under_autocast_runs_in_float32() -> None:
    decoder, x = mlp(DIM, PIXELS), data()
    z = torch.zeros(1, 5, DIM)
    expected = ops.log_px(decoder, z, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.log_px(decoder.to(torch.bfloat16), z, x)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


# ---- torch.func ----


def test_gradients_of_each_sample_by_vmap() -> None:
    model, x = make(VAE).double(), data(4, torch.float64)
    noise = torch.randn(1, 4, DIM, dtype=torch.float64, generator=seeded())
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, noise: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x[None],), {"noise": noise[:, None]})[0]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 1))(parameters, x, noise)
    for index in range(4):
        model.zero_grad()
        model(x[index : index + 1], noise=noise[:, index : index + 1]).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][index], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "categorical"])
def test_log_likelihood_by_vmap(likelihood: str) -> None:
    model, x = make(VAE, likelihood), data(3)
    found = torch.func.vmap(lambda x: model.elbo(x[None])[0], randomness="different")(x)
    assert torch.isfinite(found).all()


# ---- classes that are none ----


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_reaches_the_output_of_its_sample(bad: float) -> None:
    likelihood = Categorical(5)
    torch.manual_seed(0)
    decoder = nn.Linear(DIM, 5 * PIXELS).double()
    x = data(3, torch.float64)
    broken = x.clone()
    broken[1, 2] = bad
    z = torch.randn(3, DIM, dtype=torch.float64)
    params = decoder(z).detach().requires_grad_()
    value = likelihood.log_prob(params, broken)
    (grad,) = torch.autograd.grad(value.sum(), params)
    assert torch.isnan(value).tolist() == [False, True, False]
    assert torch.isnan(grad).any(1).tolist() == [False, True, False]
    torch.testing.assert_close(value[::2], likelihood.log_prob(params, x)[::2], rtol=0, atol=0)
    swept = ops.log_px(decoder, z[None], broken, likelihood)[0]
    assert torch.isnan(swept).tolist() == [False, True, False]
    torch.testing.assert_close(swept[::2], value[::2].detach())
    rho, alpha = torch.zeros_like(z), torch.ones(2, dtype=torch.float64)
    for flow in (ops.hamiltonian_flow, reference.hamiltonian_flow):
        z_K, rho_K, log_px = flow(decoder, z, rho, broken, 0.1, alpha, likelihood)
        for found in (z_K, rho_K, log_px):
            assert torch.isnan(found.reshape(3, -1)).all(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="x holds 1 NaN or infinite"):
        VAE(mlp(PIXELS, 2 * DIM), mlp(DIM, 5 * PIXELS), likelihood).double()(broken)


def test_nan_reaches_the_output_of_a_last_transposed_convolution() -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(DIM, 16), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 16, 2, 2))
    x = torch.rand(3, 1, 4, 4)
    x[1, 0, 2, 3] = math.nan
    found = ops.log_px(decoder, torch.randn(2, 3, DIM), x, Categorical(16))
    assert torch.isnan(found).tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("value", [300.0, -3.0])
def test_values_beyond_the_range_are_the_nearest_class_where_nobody_checks(value: float) -> None:
    torch.manual_seed(0)
    decoder, likelihood = nn.Linear(DIM, 5 * PIXELS).double(), Categorical(5)
    z, x = torch.randn(3, DIM, dtype=torch.float64), torch.full((3, PIXELS), value, dtype=torch.float64)
    expected = likelihood.log_prob(decoder(z), x.clamp(0, 1))
    torch.testing.assert_close(likelihood.log_prob(decoder(z), x), expected)
    torch.testing.assert_close(ops.log_px(decoder, z[None], x, likelihood)[0], expected.detach())
    too_large = torch.full((3, PIXELS), 9, dtype=torch.uint8)
    expected = likelihood.log_prob(decoder(z), torch.ones(3, PIXELS))
    torch.testing.assert_close(likelihood.log_prob(decoder(z), too_large), expected)
    torch.testing.assert_close(ops.log_px(decoder, z[None], too_large, likelihood)[0], expected.detach())
    for wrong in (x, too_large):
        with pytest.raises(ValueError, match="Categorical: x: expected"):
            likelihood.check(wrong)


@pytest.mark.parametrize("kind", MODELS)
def test_good_data_are_not_warned_of(kind: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(kind)(data())
        make(kind, "categorical")(torch.randint(256, (5, PIXELS), dtype=torch.uint8))

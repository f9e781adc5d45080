"""fastvae.ops.elbo: value, gradient and gradient of the gradient against plain PyTorch, and where kernels take it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import likelihoods, reference
from fastvae.ops import elbo
from fastvae.ops.elbo import fused

D, B = 3, 5


class TwoHeads(nn.Module):
    """A trunk with a mean and a log variance apart."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(32, 7), nn.SiLU())
        self.mu, self.logvar = nn.Linear(7, D, bias=bias), nn.Linear(7, D, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.mu(h), self.logvar(h)


class Halves(nn.Module):
    """One tensor, taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(32, 2 * D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.net(x).chunk(2, dim=1)
        return mu, logvar


def dense_encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.Softplus(), nn.Linear(6, 2 * D))


def convolutional_encoder() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ELU(), nn.BatchNorm2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 2 * D)).eval()


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "dense": dense_encoder,
    "convolutional": convolutional_encoder,
    "two-heads": TwoHeads,
    "two-heads-without-bias": lambda: TwoHeads(bias=False),
    "halves": Halves,
}


def dense_decoder(outputs: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, outputs))


def convolutional_decoder(outputs: int = 2) -> nn.Module:
    layers = [nn.Linear(D, 16), nn.GELU(), nn.Unflatten(1, (4, 2, 2)), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(4, outputs, 4, stride=2, padding=1)).eval()


LIKELIHOODS: dict[str, tuple[likelihoods.Likelihood, int]] = {
    "bernoulli": (likelihoods.Bernoulli(), 1),
    "gaussian": (likelihoods.Gaussian(scale=0.7), 1),
    "laplace": (likelihoods.Laplace(scale=0.4), 1),
    "poisson": (likelihoods.Poisson(), 1),
    "negative-binomial": (likelihoods.NegativeBinomial(dispersion=2.0), 1),
    "categorical": (likelihoods.Categorical(num_classes=4), 4),
}


def data(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (B, 2, 4, 4)
    if kind in ("poisson", "negative-binomial"):
        return torch.randint(0, 6, shape, generator=generator).to(dtype)
    if kind == "categorical":
        return torch.randint(0, 4, shape, generator=generator).to(dtype) / 3
    return torch.rand(shape, generator=generator, dtype=dtype)


def problem(
    encoder: str, convolutional: bool, likelihood: str
) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    values = LIKELIHOODS[likelihood][1]
    decoder = convolutional_decoder(2 * values) if convolutional else dense_decoder(32 * values)
    noise = torch.randn(B, D, dtype=torch.float64)
    networks = ENCODERS[encoder]().double(), decoder.double()
    for module in networks:
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return *networks, data(likelihood), noise


def gradients(loss: Tensor, *modules: nn.Module) -> list[Tensor]:
    parameters = [p for module in modules for p in module.parameters()]
    return list(torch.autograd.grad(loss, parameters, retain_graph=True))


@pytest.mark.parametrize("convolutional", [False, True], ids=["dense", "convolutional"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_value_and_gradient_are_the_networks_own(encoder: str, likelihood: str, convolutional: bool) -> None:
    enc, dec, x, noise = problem(encoder, convolutional, likelihood)
    like = LIKELIHOODS[likelihood][0]
    assert fused(enc, dec, x, like, D) is not None, "kernels take it"
    weight = torch.linspace(-1, 2, B, dtype=torch.float64)
    found, wanted = (of(enc, dec, x, noise, like, beta=0.3) for of in (elbo, reference.elbo))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        gradients(found @ weight, enc, dec), gradients(wanted @ weight, enc, dec), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("encoder", ["two-heads", "convolutional"])
def test_its_gradient_can_be_differentiated(encoder: str) -> None:
    enc, dec, x, noise = problem(encoder, True, "bernoulli")
    parameters = [*enc.parameters(), *dec.parameters()]

    def penalised(of: Callable[..., Tensor]) -> list[Tensor]:
        values = of(enc, dec, x, noise, beta=2.0)
        grads = torch.autograd.grad(values.sum(), parameters, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), parameters))

    for mine, theirs in zip(penalised(elbo), penalised(reference.elbo), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_every_term_has_its_gradient() -> None:
    enc, dec, x, _ = problem("dense", False, "gaussian")
    noise = torch.randn(4, B, D, dtype=torch.float64)
    like = LIKELIHOODS["gaussian"][0]
    by_kernels = fused(enc, dec, x, like, D)
    assert by_kernels is not None
    found, wanted = by_kernels.terms(noise), reference.elbo_terms(enc, dec, x, noise, like)
    assert found is not None
    for mine, theirs, name in zip(found, wanted, wanted._fields, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=name)
        cotangent = torch.cos(torch.arange(mine.numel(), dtype=torch.float64)).reshape(mine.shape)
        parameters = [*enc.parameters(), *dec.parameters()]
        for a, b in zip(
            *(
                torch.autograd.grad(of, parameters, cotangent, retain_graph=True, materialize_grads=True)
                for of in (mine, theirs)
            ),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=name)


def test_float32_is_as_exact_as_eager() -> None:
    enc, dec, x, noise = problem("convolutional", True, "bernoulli")
    exact = gradients(reference.elbo(enc, dec, x, noise).sum(), enc, dec)
    enc, dec, x, noise = enc.float(), dec.float(), x.float(), noise.float()

    def error(of: Callable[..., Tensor]) -> float:
        found = gradients(of(enc, dec, x, noise).sum(), enc, dec)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))

    # A rounding of single numbers: that of sums in another order, whose errors are within a few units of each other.
    assert error(elbo) <= max(2 * error(reference.elbo), 1e-6)


def test_frozen_networks_and_no_grad() -> None:
    enc, dec, x, noise = problem("two-heads", False, "bernoulli")
    wanted = reference.elbo(enc, dec, x, noise)
    with torch.no_grad():
        torch.testing.assert_close(elbo(enc, dec, x, noise), wanted.detach())
    enc.requires_grad_(False)
    frozen = elbo(enc, dec, x, noise)
    for mine, theirs in zip(gradients(frozen.sum(), dec), gradients(wanted.sum(), dec), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    dec.requires_grad_(False)
    assert not elbo(enc, dec, x, noise).requires_grad


def test_a_gradient_is_computed_twice_from_one_graph() -> None:
    enc, dec, x, noise = problem("dense", False, "bernoulli")
    found = elbo(enc, dec, x, noise).sum()
    first, second = gradients(found, enc, dec), gradients(found, enc, dec)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weights_changed_before_the_backward_pass_are_refused() -> None:
    enc, dec, x, noise = problem("dense", False, "bernoulli")
    found = elbo(enc, dec, x, noise).sum()
    with torch.no_grad():
        next(dec.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 32)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.last(z + torch.tanh(self.first(z)))
        return out


@pytest.mark.parametrize(
    "case", ["decoder", "training-norm", "condition", "x", "noise", "likelihood", "autocast"]
)
def test_what_kernels_do_not_take_runs_as_it_is(case: str) -> None:
    enc, dec, x, noise = problem("convolutional", False, "gaussian")
    like: likelihoods.Likelihood = LIKELIHOODS["gaussian"][0]
    options: dict[str, Tensor] = {}
    if case == "decoder":
        dec = Residual().double()
    elif case == "training-norm":
        enc.train()
    elif case == "condition":
        options["condition"] = torch.randn(B, 2, dtype=torch.float64)
        enc, dec = Conditional(enc, 32 + 2, 2 * D), Conditional(dec, D + 2, 32)
    elif case in ("x", "noise"):
        (x if case == "x" else noise).requires_grad_()
    elif case == "likelihood":
        like = likelihoods.StudentT(df=3.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        # One of the two moves the running statistics, which the other must not see.
        found = elbo(copy.deepcopy(enc), copy.deepcopy(dec), x, noise, like, **options)
        wanted = reference.elbo(enc, dec, x, noise, like, **options)
    torch.testing.assert_close(found, wanted)
    if case in ("x", "noise"):
        of = x if case == "x" else noise
        for mine, theirs in zip(*(torch.autograd.grad(y.sum(), of) for y in (found, wanted)), strict=True):
            torch.testing.assert_close(mine, theirs)


class Conditional(nn.Module):
    def __init__(self, _: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, dtype=torch.float64)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.cat([x.flatten(1), c], 1))
        return out


def test_errors_name_the_argument() -> None:
    enc, dec, x, noise = problem("dense", False, "bernoulli")
    with pytest.raises(ValueError, match=r"fastvae::elbo: noise: expected shape \[5, d\], got \[4, 3\]"):
        elbo(enc, dec, x, noise[:4])
    with pytest.raises(ValueError, match=r"elbo: noise: expected \[5, 3\] as means, got \[5, 2\]"):
        elbo(enc, dec, x, noise[:, :2])
    with pytest.raises(ValueError, match="beta: expected a finite number, got nan"):
        elbo(enc, dec, x, noise, beta=float("nan"))
    with pytest.raises(TypeError, match="fastvae::elbo: x: expected a tensor, got list"):
        elbo(enc, dec, x.tolist(), noise)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="condition: expected 5 samples"):
        elbo(enc, dec, x, noise, condition=noise[:2])


def test_under_torch_func_and_compile() -> None:
    enc, dec, x, noise = problem("dense", False, "bernoulli")
    parameters = {name: p.detach() for name, p in dec.named_parameters()}

    def value(given: dict[str, Tensor]) -> Tensor:
        def decode(z: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(dec, given, z)
            return out

        return reference.elbo(enc, decode, x, noise).sum()

    found = torch.func.grad(value)(parameters)
    wanted = gradients(elbo(enc, dec, x, noise).sum(), dec)
    for mine, theirs in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    compiled = torch.compile(elbo, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(enc, dec, x, noise), elbo(enc, dec, x, noise))


def test_the_operator_is_one_of_pytorchs() -> None:
    enc, dec, x, noise = problem("dense", False, "bernoulli")
    of_encoder = fastvae.lowering.lower(enc, shape=x.shape[1:])
    of_decoder = fastvae.lowering.lower(dec)
    arguments = (
        x.flatten(1),
        noise[None],
        of_encoder.tensors,
        of_decoder.tensors,
        of_encoder.spec,
        of_decoder.spec,
        "bernoulli",
        True,
    )
    torch.library.opcheck(torch.ops.fastvae.elbo_terms, arguments)


def test_networks_are_not_kept_alive() -> None:
    enc, dec, x, noise = problem("two-heads", False, "bernoulli")
    elbo(enc, dec, x, noise).sum().backward()
    gone = weakref.ref(enc), weakref.ref(dec)
    del enc, dec
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


def test_what_somebody_holds_is_not_written_to() -> None:
    """Gradients large enough for memory that is used again: views, arrays and earlier steps keep their numbers."""
    torch.manual_seed(0)
    enc = nn.Sequential(nn.Flatten(), nn.Linear(784, 2 * D))
    dec = nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, 784))
    held, copies, places = [], [], set()
    for step in range(4):
        x, noise = torch.rand(32, 784), torch.randn(32, D)
        grads = torch.autograd.grad(elbo(enc, dec, x, noise).sum(), [*enc.parameters(), *dec.parameters()])
        weight = grads[-2]
        places.add(weight.data_ptr())
        if step % 2:
            array = weight if weight.is_cuda else weight.numpy()
            held += [array, weight[3:].t(), weight.detach()][step // 2 :]
            copies += [torch.as_tensor(array).clone(), weight[3:].t().clone(), weight.clone()][step // 2 :]
        del grads, weight
    assert len(places) < 4, "memory is used again"
    for now, then in zip(held, copies, strict=True):
        assert torch.equal(torch.as_tensor(now), torch.as_tensor(then))


# --- what models do when somebody looks on


class Clamped(nn.Module):
    """Changes a head in place."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.mu, self.logvar = nn.Linear(32, 7), nn.Linear(7, D), nn.Linear(7, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x.flatten(1)))
        mu, logvar = self.mu(h), self.logvar(h)
        logvar.clamp_(-3, 3)
        return mu, logvar


class Counting(nn.Module):
    """Keeps what it computed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind, self.seen, self.kept = nn.Linear(D, 32), kind, [], {}
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        h: Tensor = self.layer(z)
        if self.kind == "list":
            self.seen.append(h)
        elif self.kind == "dict":
            self.kept["h"] = h
        else:
            self.calls.add_(1)
        return h


def test_a_head_changed_in_place_is_not_lost() -> None:
    torch.manual_seed(0)
    enc, dec, x, noise = (
        Clamped().double(),
        dense_decoder().double(),
        data("bernoulli"),
        torch.randn(B, D).double(),
    )
    for value in (0.0, 9.0):
        enc.logvar.bias.data.fill_(value)
        torch.testing.assert_close(elbo(enc, dec, x, noise), reference.elbo(enc, dec, x, noise))


class Inheriting(Counting):
    """What its parent does, it does."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z)


@pytest.mark.parametrize("of", [Counting, Inheriting])
@pytest.mark.parametrize("kind", ["list", "dict", "buffer"])
def test_forwards_with_effects_run(kind: str, of: type[Counting]) -> None:
    dec = of(kind)
    model = fastvae.VAE(nn.Sequential(nn.Flatten(), nn.Linear(32, 2 * D)), dec, latent_dim=D)
    before, calls = len(dec.seen), float(dec.calls)
    for _ in range(3):
        model(torch.rand(B, 32).round()).sum().backward()
    assert kind != "list" or (
        len(dec.seen) == before + 3 and all(type(h) is Tensor for h in dec.seen[before:])
    )
    assert kind != "dict" or dec.kept["h"].shape == (B, 32)
    assert kind != "buffer" or float(dec.calls) == calls + 3


def test_heads_of_different_sizes_are_refused() -> None:
    enc = TwoHeads()
    enc.logvar = nn.Linear(7, D + 2)
    model = fastvae.VAE(enc, dense_decoder(), latent_dim=D + 1)
    with pytest.raises(ValueError, match="expected"):
        model(torch.rand(B, 32))


def test_a_shared_layer_and_a_frozen_network_have_second_derivatives() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    enc = nn.Sequential(
        nn.Flatten(), nn.Linear(32, 6), nn.Tanh(), shared, nn.Tanh(), nn.Linear(6, 2 * D)
    ).double()
    dec = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), shared, nn.Tanh(), nn.Linear(6, 32)).double()
    x, noise = data("bernoulli"), torch.randn(B, D).double()
    found, wanted = (
        torch.autograd.grad(of(enc, dec, x, noise).sum(), shared.weight, create_graph=True)[0]
        for of in (elbo, reference.elbo)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
    enc.requires_grad_(False)
    last = dec[-1].weight
    found, wanted = (
        torch.autograd.grad(of(enc, dec, x, noise).sum(), last, create_graph=True)[0]
        for of in (elbo, reference.elbo)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_gradients_of_many_cotangents_at_once() -> None:
    enc, dec, x, noise = problem("dense", False, "bernoulli")
    found, wanted = (
        torch.autograd.grad(
            of(enc, dec, x, noise), dec[0].weight, torch.eye(B, dtype=torch.float64), is_grads_batched=True
        )[0]
        for of in (elbo, reference.elbo)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_data_changed_in_between_do_not_count() -> None:
    enc, dec, _, noise = problem("dense", False, "bernoulli")
    x = torch.randint(0, 2, (B, 2, 4, 4), dtype=torch.uint8) * 255
    wanted = torch.autograd.grad(elbo(enc, dec, x, noise).sum(), dec[0].weight)[0]
    found = elbo(enc, dec, x, noise).sum()
    x.zero_()
    torch.testing.assert_close(torch.autograd.grad(found, dec[0].weight, create_graph=True)[0], wanted)


def test_whoever_looks_into_a_step_finds_its_graph() -> None:
    enc, dec, x, _ = problem("dense", False, "bernoulli")
    step = fastvae.VAE(enc, dec).objective(x)
    (force,) = torch.autograd.grad(step.log_px.sum(), step.z, retain_graph=True)
    assert force.shape == (B, D)
    torch.autograd.grad(step.kl.sum(), step.mu)


def test_missing_values_reach_no_encoder() -> None:
    enc, dec, x, noise = problem("dense", False, "gaussian")
    weight = (torch.rand_like(x) < 0.7).double()
    holed = x.where(weight != 0, torch.nan)
    for found in (
        elbo(enc, dec, holed, noise, "gaussian", weight=weight),
        fastvae.ops.iwae_bound(enc, dec, holed, "gaussian", num_samples=3, weight=weight),
    ):
        assert bool(found.isfinite().all())

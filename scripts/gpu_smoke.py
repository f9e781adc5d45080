"""Run every CUDA kernel through the operators, against the CPU in float64; small, for compute-sanitizer and ncu.

python scripts/gpu_smoke.py [--device cpu] [CASE...]        (default: all, on the GPU)

With --device cpu the script checks itself: the CPU in float32 and float64 against the CPU in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastvae
from fastvae import likelihoods
from fastvae.likelihoods import Likelihood

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}

Place = tuple[torch.device, torch.dtype]
Case = Callable[[Place], list[Tensor]]


def decoders() -> dict[str, tuple[nn.Module, str | Likelihood, tuple[int, ...]]]:
    """Decoder, likelihood and shape of a sample of x; together they reach all activations and heads."""
    torch.manual_seed(0)
    activations = [nn.ReLU(), nn.LeakyReLU(0.1), nn.ELU(), nn.Softplus(), nn.Tanh(), nn.Sigmoid(), nn.SiLU()]
    activations += [nn.GELU(), nn.GELU(approximate="tanh")]
    deep = [layer for activation in activations for layer in (nn.Linear(9, 9), activation)]
    image = [
        nn.Linear(5, 12),
        nn.Softplus(),
        nn.Unflatten(1, (3, 2, 2)),
        nn.ConvTranspose2d(3, 4, 3, stride=2),
    ]
    image += [nn.BatchNorm2d(4), nn.ELU(), nn.Conv2d(4, 1, 2)]
    small = nn.Sequential(nn.Linear(5, 33), nn.Softplus(), nn.Linear(33, 64), nn.GELU(), nn.Linear(64, 37))
    categorical = nn.Sequential(nn.Linear(5, 6 * 256), nn.Unflatten(1, (256, 2, 3)))

    def dense(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, outputs))

    return {
        "small": (small, "bernoulli", (37,)),
        "activations": (nn.Sequential(nn.Linear(5, 9), *deep, nn.Linear(9, 37)), "bernoulli", (37,)),
        "gaussian": (dense(300), "gaussian", (300,)),
        # Of counts that are none: the formulas hold for them, too.
        "laplace": (dense(300), likelihoods.Laplace(0.7), (300,)),
        "poisson": (dense(37), likelihoods.Poisson(), (37,)),
        "negative-binomial": (dense(300), likelihoods.NegativeBinomial(1.5), (300,)),
        "student-t": (dense(37), likelihoods.StudentT(3.0, 0.5), (37,)),
        "gaussian-head": (dense(74), likelihoods.GaussianHead(), (37,)),
        "zero-inflated": (dense(74), likelihoods.ZeroInflatedNegativeBinomial(1.5), (37,)),
        "image": (nn.Sequential(*image), "bernoulli", (1, 4, 4)),
        "categorical": (categorical, "categorical", (1, 2, 3)),
    }


def draw(*shape: int, seed: int) -> Tensor:
    """Standard normal, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of the sum of their mean squares."""
    total = torch.stack([output.square().mean() for output in outputs]).sum()
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, inputs)]


def leaves(place: Place, *tensors: Tensor) -> list[Tensor]:
    """The tensors there, with a gradient."""
    return [tensor.to(*place).requires_grad_() for tensor in tensors]


def flow(name: str, memory: str) -> Case:
    """A flow of three steps."""
    decoder, likelihood, shape = decoders()[name]

    def run(place: Place) -> list[Tensor]:
        network = decoder.to(*place).eval()
        x = draw(7, *shape, seed=2).sigmoid().to(*place)
        inputs = leaves(
            place,
            draw(7, 5, seed=1),
            draw(7, 5, seed=3),
            torch.full((3, 5), 0.05),
            torch.tensor([0.8, 0.9, 0.95]),
        )
        z, rho, step_size, alpha = inputs
        outputs = fastvae.ops.hamiltonian_flow(
            network, z, rho, x, step_size, alpha, likelihood, memory=memory
        )
        return with_gradients(list(outputs), [*inputs, *network.parameters()])

    return run


def jacobian(name: str) -> Case:
    """The Jacobian's L1 norm."""
    decoder, _, _ = decoders()[name]

    def run(place: Place) -> list[Tensor]:
        network = decoder.to(*place).eval()
        (z,) = leaves(place, draw(7, 5, seed=1))
        value = fastvae.ops.jacobian_l1(network, z, output="sigmoid")
        return with_gradients([value], [z, *list(network.parameters())[:-1]])

    return run


def log_px(name: str) -> Case:
    """Importance sampling's inside."""
    decoder, likelihood, shape = decoders()[name]

    def run(place: Place) -> list[Tensor]:
        x = draw(7, *shape, seed=2).sigmoid().to(*place)
        z = draw(3, 7, 5, seed=1).to(*place)
        return [fastvae.ops.log_px(decoder.to(*place).eval(), z, x, likelihood)]

    return run


def force(name: str) -> Case:
    """log p(x | z) and its gradient, in sweeps of PyTorch operators."""
    decoder, likelihood, shape = decoders()[name]

    def run(place: Place) -> list[Tensor]:
        network = decoder.to(*place).eval()
        x = draw(7, *shape, seed=2).sigmoid().to(*place)
        (z,) = leaves(place, draw(7, 5, seed=1))
        outputs = fastvae.ops.log_px_and_force(network, z, x, likelihood)
        return with_gradients(list(outputs), [z, *network.parameters()])

    return run


def leapfrog(place: Place) -> list[Tensor]:
    """Both halves of a step."""
    z, rho, force = inputs = leaves(place, *(draw(7, 5, seed=seed) for seed in (1, 2, 3)))
    step_size, alpha = leaves(place, torch.tensor(0.1), torch.tensor(0.9))
    z_next, rho_half = fastvae.ops.leapfrog_kick_drift(z, rho, force, step_size)
    rho_next = fastvae.ops.leapfrog_kick_temper(rho_half, z_next.sin(), step_size, alpha)
    return with_gradients([z_next, rho_next], [*inputs, step_size, alpha])


def grad_dot(place: Place) -> list[Tensor]:
    """Inner products of gradients."""
    inputs = leaves(
        place, *(draw(*shape, seed=k) for k, shape in enumerate([(9, 6, 8), (9, 6, 5), (4, 6, 8), (4, 6, 5)]))
    )
    return with_gradients([fastvae.ops.grad_dot(*inputs)], inputs)


def gaussian_kl(place: Place) -> list[Tensor]:
    """With and without the second Gaussian."""
    inputs = leaves(place, *(draw(7, 67, seed=seed) for seed in range(4)))
    return with_gradients([fastvae.ops.gaussian_kl(*inputs[:2]), fastvae.ops.gaussian_kl(*inputs)], inputs)


def vae_networks(place: Place) -> tuple[nn.Module, nn.Module, Tensor]:
    """An encoder with two heads' worth of outputs, a decoder, and images."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ELU(), nn.Flatten()]
    encoder = nn.Sequential(*convolutions, nn.Linear(64, 10))
    head = nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1)
    decoder = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Unflatten(1, (4, 4, 4)), head)
    return encoder.to(*place), decoder.to(*place), draw(6, 2, 8, 8, seed=4).sigmoid().to(*place)


def elbo(place: Place) -> list[Tensor]:
    """A VAE's objective and its gradients."""
    encoder, decoder, x = vae_networks(place)
    found = fastvae.ops.elbo(encoder, decoder, x, draw(6, 5, seed=5).to(*place), beta=0.5)
    return with_gradients([found], [*encoder.parameters(), *decoder.parameters()])


def iwae_bound(place: Place) -> list[Tensor]:
    """The same of many draws."""
    encoder, decoder, x = vae_networks(place)
    noise = draw(40, 6, 5, seed=5).to(*place)
    found = fastvae.ops.iwae_bound(encoder, decoder, x, num_samples=40, noise=noise, estimator="dreg")
    return with_gradients([found], [*encoder.parameters(), *decoder.parameters()])


def regret(place: Place) -> list[Tensor]:
    """The losses of encoders trained for an image each: dense layers, convolutions, BatchNorm."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2)]
    encoder = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(27, 10))
    model = fastvae.VAE(encoder, nn.Sequential(nn.Linear(5, 64), nn.Unflatten(1, (1, 8, 8))))
    x = (
        draw(6, 1, 8, 8, seed=4).sigmoid().mul(255).byte()
    )  # noise is keyed by the bytes, the same for both dtypes
    detector = fastvae.ood.LikelihoodRegret(model.to(*place), num_steps=5, num_samples=1)
    return [detector.refit(x.to(place[0])).losses]


def cases() -> dict[str, Case]:
    """Every case by name."""
    found: dict[str, Case] = {}
    for name in decoders():
        for memory in ("store", "recompute"):
            found[name if memory == "store" else f"{name}-{memory}"] = flow(name, memory)
    found |= {f"jacobian-{name}": jacobian(name) for name in ("small", "activations", "image")}
    found |= {
        f"log_px-{name}": log_px(name)
        for name in ("small", "image", "categorical", "laplace", "poisson", "negative-binomial")
    }
    found |= {f"log_px_and_force-{name}": force(name) for name in ("small", "image", "categorical")}
    return found | {
        "leapfrog": leapfrog,
        "grad_dot": grad_dot,
        "gaussian_kl": gaussian_kl,
        "elbo": elbo,
        "iwae_bound": iwae_bound,
        "regret": regret,
    }


def main() -> None:
    """Compare, and print the largest relative difference of each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="what is compared with the CPU (default: cuda)")
    parser.add_argument("case", nargs="*", help="only these")
    options = parser.parse_args()
    # What repeats to the bit is ours; cuDNN must not choose another algorithm in between, or convolve in TF32.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    known = cases()
    if unknown := sorted(set(options.case) - set(known)):
        parser.error(f"case: expected some of {sorted(known)}, got {unknown}")
    for name in options.case or known:
        expected = known[name]((torch.device("cpu"), torch.float64))
        for dtype, tolerance in TOLERANCE.items():
            place = torch.device(options.device), dtype
            got, again = known[name](place), known[name](place)
            worst = max(
                ((a.cpu().double() - b).abs().max() / (1.0 + b.abs().max())).item()
                for a, b in zip(got, expected, strict=True)
            )
            repeats = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
            print(f"{name} {dtype}: off by {worst:.1e}, repeats to the bit: {repeats}", flush=True)
            if not worst <= tolerance:
                raise SystemExit(f"gpu_smoke: {name}: expected at most {tolerance}, got {worst}")
    if options.device == "cuda":
        torch.cuda.synchronize()
    print("gpu_smoke: every case agrees with the CPU")


if __name__ == "__main__":
    main()

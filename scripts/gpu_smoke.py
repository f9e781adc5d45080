"""Run every CUDA kernel through the operators, against the CPU in float64; small, for compute-sanitizer and ncu.

python scripts/gpu_smoke.py [CASE...]        (default: all)
"""

import sys

import torch
from torch import Tensor, nn

import fastvae

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


def decoders() -> list[tuple[str, nn.Module, str, tuple[int, ...]]]:
    """Name, decoder, likelihood and shape of a sample of x; together they reach all activations and heads."""
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
    return [
        ("small", small, "bernoulli", (37,)),
        ("activations", nn.Sequential(nn.Linear(5, 9), *deep, nn.Linear(9, 37)), "bernoulli", (37,)),
        ("gaussian", nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 300)), "gaussian", (300,)),
        ("image", nn.Sequential(*image), "bernoulli", (1, 4, 4)),
        (
            "categorical",
            nn.Sequential(nn.Linear(5, 6 * 256), nn.Unflatten(1, (256, 2, 3))),
            "categorical",
            (1, 2, 3),
        ),
    ]


def run(decoder: nn.Module, likelihood: str, x: Tensor, memory: str) -> list[Tensor]:
    """Outputs of a flow of three steps and the gradients to everything that has one."""
    generator = torch.Generator().manual_seed(1)
    z, rho = torch.randn(2, x.size(0), 5, generator=generator, dtype=torch.float64).to(x)
    step_size = torch.full((3, 5), 0.05).to(x)
    alpha = torch.tensor([0.8, 0.9, 0.95]).to(x)
    inputs = [tensor.requires_grad_() for tensor in (z, rho, step_size, alpha)] + list(decoder.parameters())
    outputs = fastvae.ops.hamiltonian_flow(decoder, z, rho, x, step_size, alpha, likelihood, memory=memory)
    total = sum((output.square().mean() for output in outputs[:2]), outputs[2].mean())
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, inputs)]


def main() -> None:
    """Compare, and print the largest relative difference of each case."""
    for name, decoder, likelihood, shape in decoders():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        decoder = decoder.double().eval()
        x = torch.rand(7, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        expected = run(decoder, likelihood, x, "store")
        for dtype, tolerance in TOLERANCE.items():
            for memory in ("store", "recompute"):
                on_gpu = decoder.to("cuda", dtype)
                got = run(on_gpu, likelihood, x.to("cuda", dtype), memory)
                again = run(on_gpu, likelihood, x.to("cuda", dtype), memory)
                worst = max(
                    ((a.cpu().double() - b).abs().max() / (1.0 + b.abs().max())).item()
                    for a, b in zip(got, expected, strict=True)
                )
                repeats = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
                print(
                    f"{name} {likelihood} {dtype} {memory}: off by {worst:.1e}, repeats to the bit: {repeats}"
                )
                if not worst <= tolerance:
                    raise SystemExit(f"gpu_smoke: {name}: expected at most {tolerance}, got {worst}")
        decoder.to("cpu", torch.float64)
    torch.cuda.synchronize()
    print("gpu_smoke: every case agrees with the CPU")


if __name__ == "__main__":
    main()

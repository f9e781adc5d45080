"""Where the time of each operator goes on a GPU: host or device, how many launches, which kernels.

python scripts/gpu_profile.py [--device cpu] [CASE...]      (default: all, on the GPU)

A case prints its median time with the device waited for, the device's busy time and launches a call, the share of the
time that the device is busy, and its longest kernels; "eager" beside it is the same by plain PyTorch. First come the
rates of a large copy and a large float32 product, from which floors follow. On a CPU the cases run once and small,
which shows only that they run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fastvae  # noqa: E402
from benchmarks.networks import mlp, softplus_mlp  # noqa: E402
from benchmarks.speed import flow, harness, timing  # noqa: E402
from fastvae import architectures, ops, reference  # noqa: E402
from fastvae.training import fit  # noqa: E402

Work = Callable[[], object]


def flow_case(key: str, batch: int | None = None) -> Callable[[torch.device, bool], dict[str, Work]]:
    """A flow of benchmarks/speed/flow.py, forward and backward."""

    def build(device: torch.device, small: bool) -> dict[str, Work]:
        size = next(size for size in flow.sizes(quick=False) if size.key == key)
        problem = flow.Problem(size, device, batch=2 if small else batch, num_steps=1 if small else None)
        ours, eager = (problem.contestant(f) for f in (ops.hamiltonian_flow, reference.hamiltonian_flow))
        works: dict[str, Work] = {"ours": ours, "eager": eager}
        if device.type == "cuda":
            works |= {"ours, captured": timing.captured(ours), "eager, captured": timing.captured(eager)}
        return works

    return build


def jacobian_case(
    decoder: Callable[[], nn.Module], latents: int, batch: int
) -> Callable[..., dict[str, Work]]:
    """The penalty and its gradients; eager by forward differences, which is what its authors do."""

    def build(device: torch.device, small: bool) -> dict[str, Work]:
        torch.manual_seed(0)
        network = decoder().to(device)
        z = torch.randn(2 if small else batch, latents, device=device, requires_grad=True)
        inputs = [z, *network.parameters()]

        def penalty(value: Callable[[], Tensor]) -> Work:
            return lambda: torch.autograd.grad(value().sum(), inputs, allow_unused=True)

        def differences() -> Tensor:
            columns = torch.eye(latents, device=device) * 1e-2
            moved = network((z + columns[:, None]).flatten(0, 1)).unflatten(0, (latents, -1))
            return (moved - network(z)).flatten(2).abs().sum((0, 2)) / 1e-2

        return {"ours": penalty(lambda: ops.jacobian_l1(network, z)), "differences": penalty(differences)}

    return build


def dcgan(device: torch.device) -> fastvae.VAE:
    """The likelihood regret paper's model."""
    torch.manual_seed(0)
    encoder, decoder = architectures.dcgan_encoder(1, 32, 100), architectures.dcgan_decoder(1, 32, 100)
    return fastvae.VAE(encoder, decoder, "categorical").eval().to(device).requires_grad_(False)


def log_px_case(device: torch.device, small: bool) -> dict[str, Work]:
    """Importance sampling with a thousand samples an image; eager decodes in the same tiles."""
    model, images, samples = dcgan(device), 2 if small else 8, 3 if small else 1000
    x = torch.randint(256, (images, 1, 32, 32), device=device) / 255
    z = torch.randn(samples, images, 100, device=device)
    rows = (x * 255).round().long()

    @torch.no_grad()
    def eager() -> None:
        for codes in z.split(16):
            logits = model.decoder(codes.flatten(0, 1)).unflatten(1, (256, 1))
            nn.functional.cross_entropy(logits, rows.repeat(len(codes), 1, 1, 1), reduction="none").sum(
                (1, 2, 3)
            )

    return {
        "ours": lambda: ops.log_px(model.decoder, z, x, "categorical"),
        "log_likelihood": lambda: model.log_likelihood(x, samples),
        "eager": eager,
    }


def regret_case(images: int) -> Callable[[torch.device, bool], dict[str, Work]]:
    """A hundred steps for each image of a batch."""

    def build(device: torch.device, small: bool) -> dict[str, Work]:
        model = dcgan(device)
        x = torch.randint(256, (2 if small else images, 1, 32, 32), device=device) / 255
        detector = fastvae.ood.LikelihoodRegret(model, num_steps=2 if small else 100, num_samples=10)
        return {"ours": lambda: detector.refit(x)}

    return build


def fit_case(make: Callable[[], fastvae.models.BaseVAE], *shape: int) -> Callable[..., dict[str, Work]]:
    """Forty training steps of 128 images, the few before a capture among them."""

    def build(device: torch.device, small: bool) -> dict[str, Work]:
        x = torch.rand(2 if small else 128, *shape, device=device)

        def trained(cuda_graph: bool) -> Work:
            torch.manual_seed(0)
            model = make().to(device)
            adam = functools.partial(torch.optim.Adam, lr=1e-3, fused=True)
            options = {"optimizer": adam, "epochs": 1, "progress": False, "cuda_graph": cuda_graph}
            return lambda: fit(model, [x] * (2 if small else 40), **options)

        works = {"ours": trained(False)}
        if device.type == "cuda":
            works["ours, captured"] = trained(True)
        return works

    return build


def dense_networks() -> tuple[nn.Module, nn.Module]:
    """784-512-64 and 32-512-784."""
    return mlp(784, 512, 64), softplus_mlp(32, 512, 784)


def tracin_case(train: int, queries: int, draws: int) -> Callable[[torch.device, bool], dict[str, Work]]:
    """The paper's MNIST model, one checkpoint."""

    def build(device: torch.device, small: bool) -> dict[str, Work]:
        torch.manual_seed(0)
        encoder, decoder = architectures.tracin_encoder(), architectures.tracin_decoder()
        model = fastvae.VAE(encoder, decoder, beta=4.0).to(device)
        x, q = (
            torch.rand(min(count, 4) if small else count, 784, device=device).round()
            for count in (train, queries)
        )
        tracin = fastvae.influence.TracIn(model, x, [None], lambda *_: 1.0, num_samples=draws)
        return {"ours": lambda: tracin.influence(q, k=min(20, len(x)))}

    return build


def grad_dot_case(device: torch.device, small: bool) -> dict[str, Work]:
    """One tile of TracIn; eager by batched products."""
    n, m, draws, width = (4, 3, 2, 8) if small else (1024, 100, 16, 512)
    a, g = (torch.randn(n, draws, width, device=device) for _ in range(2))
    b, h = (torch.randn(m, draws, width, device=device) for _ in range(2))

    def eager() -> Tensor:
        inputs = (a.flatten(0, 1) @ b.flatten(0, 1).T).add_(1)
        return (inputs * (g.flatten(0, 1) @ h.flatten(0, 1).T)).reshape(n, draws, m, draws).sum((1, 3))

    return {"ours": lambda: ops.grad_dot(a, g, b, h), "eager": eager}


# Only by name: what the README promises a user with much data.
LARGE: dict[str, Callable[[torch.device, bool], dict[str, Work]]] = {
    "tracin-60000": tracin_case(60_000, 1000, 16),
    "regret-500": regret_case(500),
}

CASES: dict[str, Callable[[torch.device, bool], dict[str, Work]]] = {
    "flow-small": flow_case("small"),
    "flow-small-128": flow_case("small", 128),
    "flow-mlp": flow_case("mlp"),
    "flow-conv": flow_case("conv"),
    "jacobian-mlp": jacobian_case(lambda: softplus_mlp(10, 512, 512, 784), 10, 128),
    "jacobian-small": jacobian_case(lambda: mlp(2, 64, 64, 64), 2, 128),
    "jacobian-conv": jacobian_case(lambda: architectures.jacobian_l1_decoder(), 10, 64),
    "log_px": log_px_case,
    "grad_dot": grad_dot_case,
    "tracin": tracin_case(2000, 100, 16),
    "fit-vae": fit_case(lambda: fastvae.VAE(*dense_networks()), 784),
    "fit-hvae": fit_case(lambda: fastvae.HVAE(*dense_networks(), num_steps=10), 784),
    "fit-hvae-conv": fit_case(
        lambda: fastvae.HVAE(architectures.hvae_encoder(), architectures.hvae_decoder(), num_steps=10),
        1,
        28,
        28,
    ),
    "regret-8": regret_case(8),
    "regret-64": regret_case(64),
}


def median_ms(work: Work, device: torch.device, seconds: float, least: int) -> float:
    """Milliseconds a call by the host's clock, the device waited for."""
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < least or (time.perf_counter() - start < seconds and len(found) < 50):
        before = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - before) * 1e3)
    return statistics.median(found)


def kernels_of(work: Work) -> tuple[float, int, list[str]]:
    """Busy milliseconds, launches, and a line for each of the longest kernels of a call."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as found:
        work()
        torch.cuda.synchronize()
    rows = [row for row in found.key_averages() if row.device_type == torch.autograd.DeviceType.CUDA]
    rows.sort(key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 1e3
    lines = [
        f"    {row.self_device_time_total / 1e3:9.3f} ms {row.count:6d} x {row.key[:110]}" for row in rows[:8]
    ]
    calls = [
        row
        for row in found.key_averages()
        if row.key.startswith(("cudaStreamSync", "cudaDeviceSync", "cudaMemcpy"))
    ]
    return (
        busy,
        sum(row.count for row in rows),
        [*lines, *(f"    {row.count:6d} x {row.key}" for row in calls)],
    )


def main() -> None:
    """Print what each case takes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="that a contestant is timed (default 0.5)")
    parser.add_argument("case", nargs="*", help="only these")
    options = parser.parse_args()
    known = CASES | LARGE
    if unknown := sorted(set(options.case) - set(known)):
        parser.error(f"case: expected some of {sorted(known)}, got {unknown}")
    device = torch.device(options.device)
    small = device.type == "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, value in harness.environment_of(device).items():
        print(f"{name}: {value}")
    probes = {
        "copy, GB/s": timing.large_copy(device, quick=small),
        "float32 product, GFLOP/s": timing.square_product(device, quick=small),
    }
    found = timing.interleave({name: probe.run for name, probe in probes.items()}, seconds=0.5)
    print(", ".join(f"{name}: {probe.giga_per_second(found[name]):.0f}" for name, probe in probes.items()))
    for name in options.case or CASES:
        try:
            works = known[name](device, small)
        except Exception as error:
            print(f"{name}: {harness.why(error)}", flush=True)
            continue
        for contestant, work in works.items():
            try:
                if name not in LARGE:
                    work()
                elapsed = median_ms(work, device, 0 if small else options.seconds, 1 if name in LARGE else 3)
                print(f"{name}, {contestant}: {elapsed:.3f} ms", end="", flush=True)
                if small or name in LARGE or "captured" in contestant:
                    print(flush=True)
                    continue
                busy, launches, lines = kernels_of(work)
                print(f", device {busy:.3f} ms ({busy / elapsed:.0%}), {launches} launches", flush=True)
                print("\n".join(lines), flush=True)
            except Exception as error:
                print(f"{name}, {contestant}: {harness.why(error)}", flush=True)


if __name__ == "__main__":
    main()

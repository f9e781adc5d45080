"""Run as a script by each of two processes: what data parallel training does, saved for the test to look at.

two_processes.py RANK FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from interoperability_models import BUILDERS, build, data, noise_for
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastvae
from fastvae.models import DivergenceError
from fastvae.training.locking import FolderLock

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])


def gradients(name: str) -> dict[str, Tensor]:
    """Of half a batch, averaged by DistributedDataParallel; the second of two steps, which has seen the first."""
    model = build(name)
    parallel = DistributedDataParallel(model)
    x = data(6)
    noise = noise_for(model, x)
    half = slice(3 * RANK, 3 * RANK + 3)
    for _ in range(2):
        model.zero_grad()
        parallel(x[half], noise=noise[:, half]).mean().backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def loader() -> DataLoader[Any]:
    images = TensorDataset(data(24))
    return DataLoader(images, batch_size=4, sampler=DistributedSampler(images, shuffle=True))


def fit(folder: str, epochs: int, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    model = build("HVAE with penalties")
    history = fastvae.fit(
        DistributedDataParallel(model),
        loader(),
        epochs=epochs,
        val_loader=loader(),
        run_dir=FOLDER / folder,
        progress=False,
        **options,
    )
    return history.to_dict(FOLDER), model.state_dict()


class Diverging(nn.Module):
    """Its second step diverges in the second process; the loss of the fourth is NaN there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if RANK == 1 and self.calls == 2:
            raise DivergenceError("on purpose")
        losses: Tensor = (x * self.weight).square().sum(1)
        return losses * float("nan") if RANK == 1 and self.calls == 4 else losses


def fails(model: nn.Module) -> str:
    try:
        fastvae.fit(DistributedDataParallel(model), loader(), epochs=2, progress=False)
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def refused(folder: str, **options: Any) -> str:
    """What both are told where the first cannot write, or the run is another."""
    try:
        fit(folder, 3, **options)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store", rank=RANK, world_size=2)
    results: dict[str, Any] = {"gradients": {name: gradients(name) for name in BUILDERS}}
    results["whole"] = fit("whole", 3)
    fit("parts", 1)
    results["another run"] = refused("parts", clip_grad_norm=float(1 + RANK))
    lock = FolderLock(FOLDER / "parts", "test") if RANK == 0 else None
    dist.barrier()
    results["held"] = refused("parts")
    if lock is not None:
        lock.release()
    if RANK == 0:
        (FOLDER / "taken").mkdir()
        (FOLDER / "taken" / "epoch-0001.pt").write_text("of somebody else")
    dist.barrier()
    results["taken"] = refused("taken", resume=FOLDER / "parts" / "epoch-0001.pt")
    results["parts"] = fit("parts", 3)
    skipping = Diverging()
    history = fastvae.fit(
        DistributedDataParallel(skipping), loader(), epochs=2, on_nonfinite="skip", progress=False
    )
    results["skipped"] = history.skipped, skipping.weight.detach(), history.train_loss
    results["failure"] = fails(Diverging())
    torch.save(results, FOLDER / f"{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

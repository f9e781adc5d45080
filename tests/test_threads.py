"""Threads of torch's OpenMP runtime: used, harmless, and the only ones in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import of_cpu_kernels

import fastvae

SAME_WITH_TWO_THREADS = """
import os, re
import numpy as np
import torch
from dataclasses import replace
from torch import nn
import fastvae
from fastvae import ops
from flow_problems import conv, gradients, mlp, problem

assert fastvae._C.build_info()["openmp"]
torch.set_num_threads(2)

# numpy made these: no parallel region of torch has run yet.
rng = np.random.default_rng(0)
z, rho, force = (torch.from_numpy(rng.standard_normal((512, 512))) for _ in range(3))
step = torch.from_numpy(np.full(512, 0.1))
tasks = len(os.listdir("/proc/self/task"))
fastvae._C.leapfrog_kick_drift(z, rho, force, step)
assert len(os.listdir("/proc/self/task")) > tasks, "kick_drift ran on one thread"

def results():
    out = []
    for decoder, likelihood in ((lambda n: mlp(n, nn.Softplus), "bernoulli"), (conv, "categorical")):
        p = problem(decoder, likelihood, steps=2, batch=512, outputs=64).require()
        flow = p.run()
        out += [*flow, *(g for g in gradients(p, flow).values() if g is not None)]
    half = ops.leapfrog_kick_drift(z, rho, force, step)
    return [t.detach() for t in (*out, *half, ops.leapfrog_kick_temper(rho, force, step, 0.5))]

two = results()
torch.set_num_threads(1)
for a, b in zip(two, results(), strict=True):
    # Sums over the batch are split in another way.
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)

runtimes = set(re.findall(r"/\\S*(?:libgomp|libiomp|libomp)\\S*", open("/proc/self/maps").read()))
print("runtimes", *sorted(runtimes))
assert len(runtimes) == 1, runtimes
"""


@of_cpu_kernels
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc, which is Linux's")
def test_two_threads_and_one_runtime() -> None:
    here, package = Path(__file__).parent, Path(fastvae.__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(here)!r}, {str(package)!r}]\n" + SAME_WITH_TWO_THREADS
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_DYNAMIC": "false"}
    # A waiting thread that spins would take the core from the one it waits for where others are busy too.
    environment["OMP_WAIT_POLICY"] = "passive"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, cwd=here
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith("runtimes"), result.stdout

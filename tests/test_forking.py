"""A process forked while threads are at work, as a loader's workers are, finds none of our locks held and reads on."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
from emulation import EMULATED
from torch import Tensor, nn

from fastvae import ops
from fastvae.likelihoods import StudentT
from fastvae.locks import Turns

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.skipif(
        EMULATED, reason="a process that has used a GPU cannot fork: replays hold locks there"
    ),
    pytest.mark.skipif(
        "asan" in os.environ.get("LD_PRELOAD", ""),
        reason="AddressSanitizer's allocator knows nothing of forks",
    ),
]


def run_in_fork(work: Callable[[], Tensor]) -> Tensor:
    """What ``work`` returns in a forked process; one that stands still for 30 seconds fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # A child that waits for a lock for ever must die, and none may go on with the tests.
        signal.alarm(30)
        try:
            torch.set_num_threads(1)
            os.write(writing, pickle.dumps(work().tolist()))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        told = stream.read()
    assert os.waitpid(child, 0)[1] == 0 and told, "the forked process waited for a lock"
    return torch.tensor(pickle.loads(told), dtype=torch.float64)


class Slow(nn.Module):
    """Says when it runs and takes its time, so that a fork happens while it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.runs = threading.Event()

    def forward(self, z: Tensor) -> Tensor:
        self.runs.set()
        time.sleep(0.05)
        return self.linear(z) + self.linear(z.flip(1))


class Residual(nn.Module):
    """Read, and not lowered layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 5)

    def forward(self, z: Tensor) -> Tensor:
        return self.second(z + self.first(z).tanh())


def log_px(decoder: nn.Module) -> Tensor:
    torch.manual_seed(3)
    z, x = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        return ops.log_px_and_force(decoder, z, x, StudentT(4.0, 1.0))[1]


def test_fork_while_another_thread_reads() -> None:
    log_px(Residual().double())  # what a first reading imports is none of a fork's business
    slow = Slow().double()
    thread = threading.Thread(target=log_px, args=(slow,))
    thread.start()
    assert slow.runs.wait(30)
    decoder = Residual().double()  # the child must read it anew
    found = run_in_fork(lambda: log_px(decoder))
    thread.join()
    torch.testing.assert_close(found, log_px(decoder), rtol=1e-12, atol=1e-12)


def test_fork_while_turns_are_taken() -> None:
    turns = Turns()

    def take() -> Tensor:
        with turns:
            return torch.ones(1)

    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with turns:
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(30)
    try:
        assert run_in_fork(take) == 1
    finally:
        done.set()
        thread.join()
    assert take() == 1


def test_fork_while_threads_allocate() -> None:
    """Intermediate values of 64 KB and more come from pools of memory, which all threads share."""
    decoder = nn.Sequential(nn.Linear(3, 256), nn.Softplus(), nn.Linear(256, 5)).double()
    z, x = torch.randn(100, 3, dtype=torch.float64), torch.randn(100, 5, dtype=torch.float64)

    def force() -> Tensor:
        with torch.no_grad():
            return ops.log_px_and_force(decoder, z, x, StudentT(4.0, 1.0))[1]

    expected, stop = force(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            force()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            torch.testing.assert_close(run_in_fork(force), expected, rtol=1e-10, atol=1e-10)
    finally:
        stop.set()
        for thread in threads:
            thread.join()

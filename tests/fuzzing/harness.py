"""Runs the cases of a fuzzer in a forked worker, and a new worker after each crash or hang.

    parent --starts--> server (has imported torch and the fuzzer, has run nothing) --forks--> worker (runs cases)

The server forks because importing torch takes seconds, and runs no operator itself because threads do not survive a
fork. A worker announces each case before it runs, so that the parent knows which one it died of.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

_SECONDS_A_CASE = 60.0
_SERVER = multiprocessing.get_context("spawn")


@dataclass
class Report:
    """What came of a run: how many cases ended in which way, and those that failed."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values()) + len(self.failures)

    def describe(self, name: str) -> str:
        """Counts, and of each failure the seed, the reason and the command that repeats it."""
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        lines = [f"{name}: {self.cases} cases in {self.seconds:.0f} s: {counts or 'none ended'}"]
        for seed, reason in self.failures:
            lines += [
                f"--- case {seed} failed; again: make fuzz ARGS='{name} --only {seed}'",
                reason.rstrip(),
            ]
        return "\n".join(lines)


def _work(run_case: Callable[[int], str], seeds: range, pipe: Connection) -> None:
    """Of a worker: run the cases in turn, saying of each that it begins and how it ended."""
    # A crash is reported by its signal; the traceback helps whoever repeats the case.
    faulthandler.enable()
    warnings.simplefilter("ignore")
    for seed in seeds:
        pipe.send(("begin", seed))
        try:
            outcome: tuple[str, str] = ("ended", run_case(seed))
        except Exception:
            outcome = ("failed", traceback.format_exc())
        pipe.send(outcome)
    pipe.send(("done", ""))


def _serve(name: str, path: list[str], requests: Connection, pipe: Connection) -> None:
    """Of the server: fork a worker for each range of seeds asked for, and tell the parent its process id."""
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    run_case = importlib.import_module(f"fuzzing.{name}").run_case
    while True:
        try:
            seeds = requests.recv()
        except EOFError:
            return
        worker = os.fork()
        if worker == 0:
            status = 1
            try:
                _work(run_case, seeds, pipe)
                status = 0
            finally:
                os._exit(status)
        requests.send(worker)
        _, status = os.waitpid(worker, 0)
        if status != 0:
            pipe.send(("died", _how(status)))


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit status {os.WEXITSTATUS(status)}"


def fuzz(
    name: str,
    *,
    first_seed: int = 0,
    cases: int | None = None,
    seconds: float | None = None,
    seconds_a_case: float = _SECONDS_A_CASE,
    most_failures: int = 20,
    on_progress: Callable[[Report], Any] = lambda report: None,
) -> Report:
    """Run cases first_seed, first_seed + 1, ... until their number, the time or ``most_failures`` is reached."""
    mine, its = _SERVER.Pipe()
    reading, writing = _SERVER.Pipe(duplex=False)
    server = _SERVER.Process(target=_serve, args=(name, sys.path, its, writing), daemon=True)
    server.start()
    its.close()
    writing.close()
    report, begun = Report(), time.monotonic()
    seed, last = first_seed, first_seed + (cases if cases is not None else sys.maxsize - first_seed)

    def time_left() -> bool:
        report.seconds = time.monotonic() - begun
        return seconds is None or report.seconds < seconds

    try:
        while seed < last and time_left() and len(report.failures) < most_failures:
            mine.send(range(seed, last))
            worker: int = mine.recv()
            while True:
                if not reading.poll(seconds_a_case):
                    os.kill(worker, signal.SIGKILL)
                    report.failures.append((seed, f"still running after {seconds_a_case:.0f} s"))
                    seed += 1
                    while reading.recv()[0] != "died":
                        pass
                    break
                kind, what = reading.recv()
                if kind == "begin":
                    seed = what
                    continue
                if kind == "done":
                    return report
                if kind == "ended":
                    report.outcomes[what] += 1
                else:
                    report.failures.append((seed, what))
                seed += 1
                on_progress(report)
                if kind == "died":
                    break
                if not time_left() or len(report.failures) >= most_failures:
                    return report
        return report
    finally:
        time_left()
        mine.close()
        # The worker first: a server that waits for it would not see that its pipe is closed.
        if server.is_alive():
            for child in _children(server.pid):
                os.kill(child, signal.SIGKILL)
            server.terminate()
        server.join()


def _children(pid: int | None) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as listing:
            return [int(child) for child in listing.read().split()]
    except OSError:
        return []

"""The files of a run: one writer at a time, no link followed, whole or not at all, and nothing lost in an error."""

from __future__ import annotations

import errno
import functools
import gc
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_problems import Annealed, batches, images, make, quiet_fit, weights

from fastvae.atomic import write_atomically
from fastvae.training import History, load_checkpoint, save_checkpoint
from fastvae.training.locking import FolderLock

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def unchanged(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- one writer at a time ----------------------------------------------------------------------


HOLDER = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from training_problems import batches, make, quiet_fit
    model = make()
    calls = 0
    def wait(module, arguments):
        global calls
        calls += 1
        if calls == 8:
            print("training", flush=True)
            time.sleep(600)
    model.register_forward_pre_hook(wait)
    quiet_fit(model, batches({workers}), epochs=3, run_dir={folder!r})
"""


@contextmanager
def another_process_training(folder: Path, workers: str = "") -> Iterator[subprocess.Popen[str]]:
    script = textwrap.dedent(HOLDER).format(
        tests=str(Path(__file__).parent), folder=str(folder), workers=workers
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "training\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_process_is_told_who_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with another_process_training(run) as holder:
        before = unchanged(run)
        model = make(1)
        weights_before = weights(model)
        with pytest.raises(BlockingIOError) as caught:
            quiet_fit(model, batches(), epochs=3, run_dir=run)
        message = str(caught.value)
        assert "fit: run_dir: expected a folder that no other run writes to, found it held by " in message
        assert f"process {holder.pid} on {os.uname().nodename} since 20" in message and str(run) in message
        assert unchanged(run) == before and torch.equal(weights(model), weights_before)
        with pytest.raises(BlockingIOError):
            quiet_fit(model, batches(), epochs=3, run_dir=run, resume=False)
        # Another folder is another matter, as is reading.
        quiet_fit(make(1), batches(), epochs=1, run_dir=tmp_path / "other", resume=run / "epoch-0001.pt")
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert ".lock" in names(run)
        resumed = quiet_fit(make(1), batches(), epochs=3, run_dir=run)
    assert resumed.train_loss == quiet_fit(make(), batches(), epochs=3).train_loss
    assert names(run) == [*(f"epoch-000{n}.pt" for n in range(4)), "history.json"]


def test_workers_of_a_killed_process_keep_no_lock(tmp_path: Path) -> None:
    with another_process_training(tmp_path, "num_workers=1, persistent_workers=True") as holder:
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        workers = [int(child) for child in children.read_text().split()] if children.exists() else []
        try:
            for worker in workers:
                os.kill(worker, signal.SIGSTOP)
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
            FolderLock(tmp_path, "test").release()
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)


def test_a_second_thread_is_told_too(tmp_path: Path) -> None:
    inside, done = threading.Event(), threading.Event()
    model = make()

    def wait(module: nn.Module, arguments: Any) -> None:
        inside.set()
        assert done.wait(60)

    model.register_forward_pre_hook(wait)
    thread = threading.Thread(
        target=quiet_fit, args=(model, batches()), kwargs={"epochs": 1, "run_dir": tmp_path}
    )
    thread.start()
    assert inside.wait(60)
    with pytest.raises(BlockingIOError, match=f"held by process {os.getpid()} "):
        quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path)
    done.set()
    thread.join()
    assert quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path).trained_epochs == 0


def count_up(folder: Path, times: int) -> None:
    """Adds to a number, which goes wrong as soon as two do it at once."""
    for _ in range(times):
        while True:
            try:
                lock = FolderLock(folder, "test")
                break
            except BlockingIOError:
                time.sleep(0.0005)
        path = folder / "count"
        path.write_text(str(int(path.read_text()) + 1))
        lock.release()


def test_the_lock_excludes(tmp_path: Path) -> None:
    """The lock's file goes with each release: whoever has opened it before must not think that it holds the folder."""
    (tmp_path / "count").write_text("0")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=count_up, args=(tmp_path, 60)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "count").read_text() == "240" and names(tmp_path) == ["count"]


def test_locks_come_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    lock = FolderLock(folder, "test")
    assert lock.held and json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not folder.exists() and not lock.held
    (tmp_path / ".lock").write_text("of a process that was killed")
    FolderLock(tmp_path, "test").release()
    assert not (tmp_path / ".lock").exists()
    # An error before the first checkpoint leaves no folder behind.
    with pytest.raises(FileNotFoundError):
        quiet_fit(make(), batches(), epochs=1, run_dir=folder, resume=tmp_path / "missing.pt")
    with pytest.raises(FileNotFoundError, match="resume=True"):
        quiet_fit(make(), batches(), epochs=1, run_dir=folder, resume=True)
    assert not folder.exists()


# --- no link followed --------------------------------------------------------------------------


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.write_text("mine")
    run.mkdir()
    for name in ("epoch-0000.pt", "epoch-0001.pt", "history.json"):
        (run / f".{name}.tmp").symlink_to(mine)
    (run / "history.json").symlink_to(mine)
    quiet_fit(make(), batches(), epochs=1, run_dir=run)
    assert mine.read_text() == "mine"
    assert names(run) == ["epoch-0000.pt", "epoch-0001.pt", "history.json"]
    assert not any(path.is_symlink() for path in run.iterdir())
    (run / ".lock").symlink_to(mine)
    with pytest.raises(OSError, match=r"fit: run_dir: expected to open a lock file: .*\.lock"):
        quiet_fit(make(), batches(), epochs=1, run_dir=run)
    assert mine.read_text() == "mine"


def test_temporary_names_are_never_the_same(tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        write_atomically(tmp_path / "x", lambda file: seen.add(file.name))  # type: ignore[attr-defined]
    assert len(seen) == 3 and names(tmp_path) == ["x"]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    ours = [".epoch-0002.pt.0123456789abcdef.tmp", ".history.json.0123456789abcdef.tmp", ".epoch-0002.pt.tmp"]
    others = [".notes.txt.0123456789abcdef.tmp", "epoch-0002.pt.tmp"]
    for name in [*ours, *others]:
        (tmp_path / name).write_text("half")
    quiet_fit(make(), batches(), epochs=1, run_dir=tmp_path)
    assert names(tmp_path) == sorted([*others, "epoch-0000.pt", "epoch-0001.pt", "history.json"])


def test_a_history_names_files_of_its_folder_only(tmp_path: Path) -> None:
    run = tmp_path / "run"
    history = quiet_fit(make(), batches(), epochs=2, run_dir=run)
    outside = tmp_path / "outside.pt"
    save_checkpoint(make(), outside)
    (run / "link.pt").symlink_to(outside)
    (run / "out").symlink_to(tmp_path)
    (run / "inside.pt").symlink_to(run / "epoch-0001.pt")
    good = json.loads((run / "history.json").read_text())
    for name in ("../outside.pt", str(outside), "link.pt", "out/outside.pt", "x/../../outside.pt"):
        (run / "history.json").write_text(json.dumps({**good, "checkpoints": ["epoch-0001.pt", name]}))
        with pytest.raises(ValueError, match=r"history\.json: expected a History .*outside of") as caught:
            History.load(run / "history.json")
        assert name in str(caught.value)
    (run / "history.json").write_text(json.dumps({**good, "checkpoints": ["inside.pt"]}))
    assert History.load(run / "history.json").checkpoints == [run / "inside.pt"]
    with pytest.raises(
        ValueError, match=r"History: checkpoints: expected files in .*, got '\.\./run/epoch-0001\.pt'"
    ):
        (tmp_path / "other").mkdir()
        history.save(tmp_path / "other" / "history.json")
    assert names(tmp_path / "other") == []


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [6]},
        {"steps": [6, "12"]},
        {"train_loss": 3},
        {"best_epoch": 9},
        {"best_epoch": True},
        {"stopped": "tired"},
        {"checkpoints": [3]},
        {"checkpoints": None},
        {"seconds": [[], []]},
    ],
    ids=str,
)
def test_a_history_of_other_values_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    quiet_fit(make(), batches(), epochs=2, run_dir=tmp_path)
    path = tmp_path / "history.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"history\.json: expected a History.*{next(iter(change))}"):
        History.load(path)


def test_a_run_goes_on_elsewhere_with_all_its_checkpoints(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    quiet_fit(make(), batches(), epochs=3, run_dir=first)
    (first / "epoch-0001.pt").unlink()
    second.mkdir()
    (second / "epoch-0002.pt").write_text("of somebody else")
    again = functools.partial(quiet_fit, make(1), batches(), epochs=4, resume=first / "epoch-0003.pt")
    with pytest.raises(FileExistsError, match=r"expected no other file at .*second/epoch-0002\.pt"):
        again(run_dir=second)
    (second / "epoch-0002.pt").unlink()
    history = again(run_dir=second)
    assert [path.name for path in history.checkpoints] == [f"epoch-000{n}.pt" for n in (1, 2, 3, 4)]
    assert names(second) == ["epoch-0002.pt", "epoch-0003.pt", "epoch-0004.pt", "history.json"]
    (second / "epoch-0004.pt").unlink()
    assert again(run_dir=second).train_loss == history.train_loss


# --- a full disk, and Ctrl-C -------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does: writing beyond fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 3_000, 20_000])
def test_a_full_disk(tmp_path: Path, size: int) -> None:
    """The error names path and cause, and the last checkpoint is what it was."""
    run = tmp_path / "run"
    model = nn.Linear(100, 100)
    quiet_fit(make(), batches(), epochs=1, run_dir=run)
    before = unchanged(run)
    with files_of_at_most(size), pytest.raises(OSError, match="unchanged: File too large") as caught:
        save_checkpoint(model, run / "epoch-0001.pt")
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(run / "epoch-0001.pt")
    assert unchanged(run) == before
    # In a run: the epoch before is there to go on from, once there is room.
    if size < 20_000:
        with (
            files_of_at_most(size),
            pytest.raises(OSError, match=r"unchanged: File too large.*epoch-0002\.pt"),
        ):
            quiet_fit(make(1), batches(), epochs=2, run_dir=run)
        assert unchanged(run) == before
    history = quiet_fit(make(1), batches(), epochs=2, run_dir=run)
    assert history.train_loss == quiet_fit(make(), batches(), epochs=2).train_loss


def test_a_device_without_room(tmp_path: Path) -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full on this system")

    def fill(file: Any) -> None:
        with open("/dev/full", "wb") as full:
            full.write(b"x")

    with pytest.raises(OSError, match="unchanged: No space left on device") as caught:
        write_atomically(tmp_path / "x", fill)
    assert caught.value.errno == errno.ENOSPC and names(tmp_path) == []


def test_an_earlier_error_is_not_taken_for_the_cause(tmp_path: Path) -> None:
    try:
        raise FileNotFoundError(2, "earlier")
    except FileNotFoundError:
        with pytest.raises(RuntimeError, match="mine"):
            write_atomically(tmp_path / "x", fail)
    assert names(tmp_path) == []


def fail(file: Any) -> None:
    raise RuntimeError("mine")


def interrupted(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """At 150 moments from the call to after its end: the old content or the new, and nothing else in the folder."""
    path = tmp_path / "x.pt"
    models = [nn.Sequential(*(nn.Linear(20, 20) for _ in range(20))) for _ in range(2)]
    contents = []
    for model in models:
        began = time.perf_counter()
        save_checkpoint(model, path)
        contents.append(path.read_bytes())
        whole = time.perf_counter() - began
    counts = {"interrupted": 0, "saved": 0}
    previous = signal.signal(signal.SIGALRM, interrupted)
    try:
        for turn in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1.3 * whole * turn / 150)
                save_checkpoint(models[turn % 2], path)
                signal.setitimer(signal.ITIMER_REAL, 0)
                counts["saved"] += 1
            except KeyboardInterrupt as error:
                counts["interrupted"] += 1
                assert not error.args or str(error).startswith(f"{path}: interrupted; not written")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert path.read_bytes() in contents and names(tmp_path) == ["x.pt"]
        gc.collect()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert counts["interrupted"] > 10


def test_ctrl_c_inside_torch_save(tmp_path: Path) -> None:
    """What is left of torch's writer is collected later, and writes to a file that is closed: that would abort."""

    class Stopping:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    save_checkpoint(make(), tmp_path / "x.pt")
    before = unchanged(tmp_path)
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(make(), tmp_path / "x.pt", state={"x": Stopping()})
    with pytest.raises(
        KeyboardInterrupt, match=r"y\.pt: interrupted; not written, and what was there before"
    ):
        write_atomically(tmp_path / "y.pt", stop)
    gc.collect()
    assert unchanged(tmp_path) == before


def stop(file: Any) -> None:
    file.write(b"half")
    raise KeyboardInterrupt


# --- all or nothing ----------------------------------------------------------------------------


class Refusing(Annealed):
    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = -1
        super().load_state_dict(state)


def test_loading_changes_nothing_unless_all_fits(tmp_path: Path) -> None:
    model = make(penalties=(Annealed(), Refusing()))
    path = save_checkpoint(model, tmp_path / "good.pt")
    good = torch.load(path, weights_only=True)
    target = make(1, penalties=(Annealed(), Refusing()))
    target.penalties[0].count, target.penalties[1].count = 4, 5
    before = weights(target)
    last = list(good["model"])[-1]
    damages: dict[str, dict[str, Any]] = {
        "another shape": {"model": {**good["model"], last: torch.zeros(3)}},
        "no tensor": {"model": {**good["model"], last: "text"}},
        "one too many": {"model": {**good["model"], "more": torch.zeros(3)}},
        "one too few": {"model": {k: v for k, v in good["model"].items() if k != last}},
        "a key that is no name": {"model": {**good["model"], 3: torch.zeros(3)}},
        "penalty": {"penalties": [{"count": 9}, {"other": 9}]},
    }
    for name, damage in damages.items():
        torch.save({**good, **damage}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=r"bad\.pt: expected the weights of this model"):
            load_checkpoint(target, tmp_path / "bad.pt")
        assert torch.equal(weights(target), before), name
        assert [penalty.count for penalty in target.penalties] == [4, 5], name
    load_checkpoint(target, path)
    assert torch.equal(weights(target), weights(model)) and target.penalties[0].count == 0


STATES: dict[str, dict[str, Any]] = {
    "no epoch": {"epoch": None},
    "an epoch of text": {"epoch": "1"},
    "another epoch": {"epoch": 2},
    "another step": {"steps": 7},
    "a history of numbers": {"history": {"train_loss": 3}},
    "a list as history": {"history": []},
    "no generators": {"generators": []},
    "generators of numbers": {"generators": [[3]]},
    "a short generator": {"generators": [[torch.zeros(3, dtype=torch.uint8)]]},
    "a scheduler of text": {"scheduler": {"last_epoch": "x", "base_lrs": ["y"]}},
    "best weights of another shape": {"best": {"decoder.weight": torch.zeros(1)}},
    "a definition of numbers": {"definition": {"parts": {}, "settings": {"model.beta": 3}, "moved": {}}},
    "half a definition": {"definition": {"parts": {}}},
}


@pytest.mark.parametrize("case", [*STATES, "optimizer", "momentum", "rate", "model"])
def test_a_damaged_state_is_passed_over(tmp_path: Path, case: str) -> None:
    """Damage that no checksum shows: the one before is taken, and what could not be loaded has changed nothing."""

    def run(epochs: int, seed: int = 0) -> tuple[History, nn.Module]:
        model = make(seed)
        history = quiet_fit(
            model,
            batches(generator=torch.Generator().manual_seed(3)),
            epochs=epochs,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
            val_loader=batches(images(16, 1)),
            patience=5,
            run_dir=tmp_path,
        )
        return history, model

    run(2)
    path = tmp_path / "epoch-0002.pt"
    content = torch.load(path, weights_only=True)
    if case in STATES:
        changes = {"epoch": 3} if case == "another epoch" else STATES[case]
        content["state"].update(changes)
    elif case == "optimizer":
        content["optimizer"] = {"state": {}}
    elif case == "momentum":
        content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    elif case == "rate":
        content["optimizer"]["param_groups"][0]["lr"] = "fast"
    else:
        content["model"]["decoder.bias"] = torch.zeros(1)
    torch.save(content, path)
    with pytest.warns(UserWarning, match=r"epoch-0002\.pt: expected .* found a damaged .*going back to the"):
        history, model = run(3, seed=1)
    (tmp_path / "history.json").unlink()
    for left in tmp_path.glob("epoch-*.pt"):
        left.unlink()
    whole, whole_model = run(3)
    assert history.train_loss == whole.train_loss and torch.equal(weights(model), weights(whole_model))


def test_one_checkpoint_under_another_ones_name(tmp_path: Path) -> None:
    history = quiet_fit(make(), batches(), epochs=3, run_dir=tmp_path)
    first, last = (tmp_path / f"epoch-000{n}.pt" for n in (1, 3))
    last.write_bytes(first.read_bytes())
    with pytest.warns(UserWarning, match=r"epoch-0003\.pt: .*the state of epoch 1"):
        again = quiet_fit(make(1), batches(), epochs=3, run_dir=tmp_path)
    assert again.train_loss == history.train_loss


def test_a_checkpoint_that_announces_more_than_it_holds(tmp_path: Path) -> None:
    path = save_checkpoint(make(), tmp_path / "x.pt")
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, bytes(10**8) if name.endswith("data/0") else data)
    with pytest.raises(ValueError, match=r"bomb\.pt: expected a checkpoint.*compressed"):
        load_checkpoint(make(), tmp_path / "bomb.pt")
    # decoder.bias is a storage of 6 numbers: BININT1 6 before its persistent id becomes 200.
    with zipfile.ZipFile(tmp_path / "more.pt", "w") as archive:
        for name, data in entries:
            archive.writestr(name, data.replace(b"K\x06t", b"K\xc8t") if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match=r"more\.pt: expected a checkpoint.*a tensor of 800 bytes in 24"):
        load_checkpoint(make(), tmp_path / "more.pt")


@pytest.mark.parametrize("column", [0.5, True, None, "steps"])
def test_a_history_whose_steps_are_no_list_is_refused(tmp_path: Path, column: object) -> None:
    path = tmp_path / "history.json"
    History().save(path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "steps": column}))
    with pytest.raises(ValueError, match="steps"):
        History.load(path)


def test_a_tensor_that_brings_backward_hooks_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(make(), tmp_path / "x.pt")
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    # The last argument of a tensor is an empty OrderedDict, its hooks: the class itself instead.
    made = re.compile(rb"([\x88\x89])(ccollections\nOrderedDict\n(?:q.)?|h.)\)R(?:q.)?t", re.DOTALL)
    with zipfile.ZipFile(tmp_path / "hooked.pt", "w") as archive:
        for name, data in entries:
            archive.writestr(name, made.sub(rb"\1\2t", data) if name.endswith("data.pkl") else data)
    assert "OrderedDict" in str(torch.load(tmp_path / "hooked.pt")["model"]["decoder.bias"]._backward_hooks)
    with pytest.raises(ValueError, match=r"hooked\.pt: expected a checkpoint.*a tensor with backward hooks"):
        load_checkpoint(make(), tmp_path / "hooked.pt")

"""A lock on a folder, which says who holds it and which the system takes back from a process that died."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fastvae.atomic import remove_leftovers
from fastvae.training.parallel import Team

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["FolderLock", "run_folder_held"]

_FILES = re.compile(r"epoch-\d+\.pt|step-\d+\.pt|history\.json")
"""Of a run."""
_NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_descriptors: set[int] = set()


def _forget() -> None:
    """In a forked child, such as a loader's worker: it must not keep the lock of a parent that was killed."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class FolderLock:
    """Holds ``folder`` from its construction to :meth:`release`; makes the folder if it is not there.

    The lock is ``flock`` on a file ``.lock`` that names the holder's process, host and time: whatever ends the
    process, the system releases it. Where the file system has no locks a warning says so; where the folder cannot be
    written to, there is nothing to protect.

    Args:
        folder: to hold.
        what: begins the messages, such as "fit: run_dir".

    Raises:
        BlockingIOError: another process, or another thread of this one, holds it; says which.
        OSError: the lock file cannot be opened, or is a link.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self._path, self._what = folder, folder / _NAME, what
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = None if fcntl is None else self._acquire()

    @property
    def held(self) -> bool:
        """Whether there is a lock, and so nobody else in the folder."""
        return self._descriptor is not None

    def release(self) -> None:
        """Let go of the folder, and remove it if it was made here and is still empty."""
        if self._descriptor in _descriptors:
            assert self._descriptor is not None
            # Removed while it is held: who opened it before finds that the name has gone, and tries again.
            self._path.unlink(missing_ok=True)
            _descriptors.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None
        if self._made:
            with contextlib.suppress(OSError):  # in use, as it should be
                self.folder.rmdir()

    def _acquire(self) -> int | None:
        while True:
            try:
                descriptor = os.open(
                    self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666
                )
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EROFS) and not os.access(self.folder, os.W_OK):
                    return None
                raise OSError(
                    error.errno,
                    f"{self._what}: expected to open a lock file: {error.strerror}",
                    str(self._path),
                ) from error
            _descriptors.add(descriptor)
            try:
                if not self._lock(descriptor):
                    self._close(descriptor)
                    return None
                if self._is_current(descriptor):
                    _sign(descriptor)
                    return descriptor
                self._close(descriptor)
            except BaseException:
                if descriptor in _descriptors:
                    self._close(descriptor)
                raise

    def _close(self, descriptor: int) -> None:
        _descriptors.discard(descriptor)
        os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        """Whether the file system knows locks. BlockingIOError if another holds this one."""
        assert fcntl is not None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno,
                f"{self._what}: expected a folder that no other run writes to, found it held by "
                f"{_holder(descriptor)}; wait for that run to end or choose another folder",
                str(self.folder),
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{self._what}: the file system of {self.folder} has no locks ({error.strerror}); "
                "make sure that no other run writes to it",
                stacklevel=2,
            )
            return False
        return True

    def _is_current(self, descriptor: int) -> bool:
        """Whether the file that was locked is still the one of that name."""
        opened = os.fstat(descriptor)
        if not stat.S_ISREG(opened.st_mode):
            raise OSError(errno.EINVAL, f"{self._what}: expected a plain lock file", str(self._path))
        try:
            return os.path.samestat(opened, os.lstat(self._path))
        except FileNotFoundError:
            return False


def _sign(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):  # a full disk: it holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextlib.contextmanager
def run_folder_held(folder: Path | None, team: Team) -> Iterator[None]:
    """Keep other runs out of a run's folder, None for none; all processes of a team raise if the first cannot."""
    locks: list[FolderLock] = []
    if folder is not None:
        team.by_first(lambda: locks.append(FolderLock(folder, "fit: run_dir")))
    try:
        for lock in locks:
            if lock.held:
                remove_leftovers(lock.folder, _FILES)
        yield
    finally:
        for lock in locks:
            lock.release()

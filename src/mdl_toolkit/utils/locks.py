"""Locks between processes: a whole file by `filelock`, single bytes of one by POSIX record locks.

The operating system frees both when their holder ends, however it ends: after `kill -9` nothing stays locked.
They hold across hosts as far as the file system's locks do (NFS with its lock service). Where a platform or a
file system has none, every lock succeeds. No marker file stands in for a lock: it would outlive its holder.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

# Tries at a lock that others may hold for a moment, and the seconds between them.
TRIES, PAUSE = 10, 0.02


@contextmanager
def hold_lock(path: Path, busy: Exception | None = None, *, remove: bool = False) -> Iterator[bool]:
    """Hold a lock file against other processes and threads for as long as the context lasts.

    Args:
        path: the lock file; it is made, with its folder, where it is missing.
        busy: raised if somebody else holds it; without one, wait for its release.
        remove: delete the file in the end; whoever waits for it notices and makes a new one.

    Yields:
        Whether it is held: False where there are no locks.
    """
    timeout = -1.0 if busy is None else TRIES * PAUSE
    lock = FileLock(path, timeout, poll_interval=PAUSE, thread_local=False, fallback_to_soft=False)
    is_held = _acquire(lock, busy)
    try:
        yield is_held
    finally:
        # Before the release: a file that is deleted later may be somebody else's lock by then.
        if remove:
            with suppress(OSError):
                path.unlink()
        lock.release()


def _acquire(lock: FileLock, busy: Exception | None) -> bool:
    """Acquire a lock, and tell whether that worked: False where there are no locks."""
    for _ in range(TRIES):
        try:
            lock.acquire()
        except Timeout as problem:
            raise busy or problem from None
        except FileNotFoundError:
            # The holder has removed the folder too; the next try makes it again.
            continue
        except OSError:
            return False
        return True
    return False


class ByteLocks:
    """Lock single bytes of one file: thousands of locks without a file for each.

    They keep processes apart, not threads, and all of them end when the process closes the file, also by
    another descriptor: no process may open it twice.

    Args:
        path: the file; it is made where it is missing.

    Attributes:
        are_there: platform and file system have such locks, as far as is known; else every lock succeeds.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.are_there = path, fcntl is not None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        """Release all locks."""
        os.close(self._descriptor)

    def is_in_place(self) -> bool:
        """Tell whether the file still has its name; a lock on a deleted one keeps nobody out."""
        with suppress(OSError):
            return os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        return False

    def try_acquire(self, byte: int, tries: int = 1) -> bool:
        """Lock a byte; False if another process has it at every try."""
        for number in range(tries if self.are_there else 0):
            time.sleep(PAUSE if number else 0)
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError as problem:
                if problem.errno in (errno.EACCES, errno.EAGAIN):
                    continue
                self.are_there = False
            return True
        return not self.are_there

    def release(self, byte: int) -> None:
        """Unlock a byte."""
        if self.are_there:
            with suppress(OSError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)

    def is_free(self, byte: int) -> bool:
        """Tell whether no other process has locked a byte, by locking it for a moment."""
        if not self.try_acquire(byte):
            return False
        self.release(byte)
        return True

"""Locks between processes, by `filelock`.

The operating system frees a lock when its holder ends, however it ends: after `kill -9` nothing stays locked.
Locks hold across hosts as far as the file system's do (NFS with its lock service). Where a platform or a file
system has none, every lock succeeds. No marker file stands in for a lock: it would outlive its holder.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

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
    for _ in range(TRIES):
        try:
            lock.acquire()
        except Timeout as problem:
            raise busy or problem from None
        except FileNotFoundError:
            # The holder has removed the folder too; the next try makes it again.
            continue
        except OSError:
            # There are no locks here.
            pass
        break
    try:
        yield lock.is_locked
    finally:
        # Before the release: a file that is deleted later may be somebody else's lock by then.
        if remove:
            with suppress(OSError):
                path.unlink()
        lock.release()

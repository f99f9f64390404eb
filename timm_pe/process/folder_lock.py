"""The lock of a folder: two processes that write into one folder would mix their files.

It is `flock` itself. The library `filelock` puts a marker file in its place where a file system has none: that outlives
a killed run, and the folder would stay locked.
"""

import contextlib
import errno
import logging
import os
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..errors import UsageError, one_line

_logger = logging.getLogger(__name__)

# Seconds for which a run waits for another process in its folder. One that was asked to stop finishes its step, loader
# workers of one that was killed live a little longer, and NFS keeps the lock of a machine that is gone for 90.
OTHER_ENDS = 120.0
NAME = '.lock'
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class FolderLock:
    """Holds one folder, from `take` to the end of the context or of the process.

    Args:
        flag: The flag that gives the folder, for messages.
        does: What a process does that holds it.
        instead: What else a user can do than wait.
    """

    def __init__(self, flag: str = '--output', does: str = 'trains', instead: str = 'give another --experiment'):
        self.flag, self.does, self.instead = flag, does, instead
        self._fd: int | None = None
        self._folder = Path()

    def __enter__(self) -> 'FolderLock':
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    def take(self, folder: Path, wait: float = 0.0) -> None:
        """Hold an existing folder, in place of the one that is held; one that is held already stays so.

        A file system without locks is named, and the folder is used without.

        Args:
            folder: The folder.
            wait: For how many seconds another process may still hold it.

        Raises:
            UsageError: Another process holds it.
        """
        file = folder / NAME
        if fcntl is None or (self._fd is not None and _is_at(self._fd, file)):
            return
        end, waits = time.monotonic() + wait, False
        fd: int | None = None
        try:
            while not _lock(fd := _open(file)) or not _is_at(fd, file):  # it may have been moved aside meanwhile
                os.close(fd)
                fd = None
                if time.monotonic() >= end:
                    raise UsageError(
                        f"{self.flag}: another process {self.does} in '{folder}': stop it or wait for its end, or {self.instead}"
                    )
                if not waits:
                    _logger.info(f"Another process {self.does} in '{folder}': waiting up to {wait:.0f} s for its end.")
                waits = True
                time.sleep(0.2)
        except OSError as e:  # such as NFS without a lock daemon
            _logger.warning(f"No lock in '{folder}' ({one_line(e, 120)}): do not start a second one in it.")
        self._release()
        self._fd, self._folder = fd, folder

    def _release(self) -> None:
        if self._fd is None:
            return
        with contextlib.suppress(OSError):
            if os.listdir(self._folder) == [NAME] and _is_at(self._fd, self._folder / NAME):  # nothing was written
                os.unlink(self._folder / NAME)
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # loader workers that are still there have it open too
        os.close(self._fd)
        self._fd = None


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # of another user
        return os.open(file, os.O_RDONLY)


def _lock(fd: int) -> bool:
    """Whether an open file could be locked.

    Raises:
        OSError: Its file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in _HELD:
            raise
        return False
    return True


def _is_at(fd: int, file: Path) -> bool:
    """Whether an open file is the one of that name: a folder that was moved aside took its lock along."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), os.stat(file))
    return False

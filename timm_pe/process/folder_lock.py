"""The lock of a run's folder: two processes that train in one folder would mix their files."""

import logging
import os
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UsageError, one_line

_logger = logging.getLogger(__name__)

# seconds for which a run waits for another process in its folder: one that was asked to stop finishes its step, and loader
# workers of one that was killed live a little longer
OTHER_ENDS = 20.0
NAME = '.lock'


class FolderLock:
    """Holds one folder, from `take` to the end of the context or of the process."""

    def __init__(self) -> None:
        self._lock: FileLock | None = None
        self._file: tuple[int, int] | None = None

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
        if self._lock is not None and _identity(file) == self._file:
            return
        lock = FileLock(file)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    raise
                _logger.info(f"Another process trains in '{folder}': waiting up to {wait:.0f} s for its end.")
                lock.acquire(timeout=wait)
        except Timeout as e:
            raise UsageError(
                f"--output: another process trains in '{folder}': stop it or wait for its end, or give another --experiment"
            ) from e
        except (OSError, NotImplementedError) as e:  # such as NFS without a lock daemon
            _logger.warning(f"No lock in '{folder}' ({one_line(e, 120)}): do not start a second run in it.")
        self._release()
        self._lock, self._file = lock, _identity(file)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = None


def _identity(file: Path) -> tuple[int, int] | None:
    """What a file is, under any name: a folder that was moved aside takes its lock along."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino

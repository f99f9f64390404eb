"""Files that appear whole or not at all, and a short hash of what is in one."""

import contextlib
import hashlib
import os
from collections.abc import Iterator


def sync_file(path: str | os.PathLike[str]) -> None:
    """Wait until a file is on the disk, not only in memory."""
    with open(path, 'rb') as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a name beside `path` to write to; once the block ends well and its bytes are on the disk, it becomes `path`.

    Raises:
        OSError: It cannot be written; what was at `path` is as it was.
    """
    beside = f'{os.fspath(path)}.tmp'
    try:
        yield beside
        sync_file(beside)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def hash_content(content: bytes) -> int:
    """64 bits of the SHA-256 of some bytes, never 0. Processors have instructions for it; a JPEG takes 30 times as long to decode."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], 'little') or 1

"""Files that appear whole or not at all, and a short hash of a file's content."""

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
    """Yield a temporary path beside `path`; when the block succeeds and its bytes are on the disk, it replaces `path`.

    Raises:
        OSError: It cannot be written; `path` is unchanged.
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
    """64 bits of the SHA-256 of `content`, never 0. Fast (CPU instructions): decoding a JPEG takes 30 times longer."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], 'little') or 1

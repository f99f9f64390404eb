"""Images within tar files (shards, as of WebDataset), read in place like files of a folder."""

import io
import os
import posixpath
import tarfile
from collections import Counter
from typing import BinaryIO

from ..errors import UsageError, one_line

SHARD = '.tar'


class PathInShard(str):
    """A path `SHARD/NAME` to an image within a tar file, with its place there.

    Attributes:
        shard: Path of the tar file.
        offset: Its first byte.
        size: Number of its bytes.
    """

    __slots__ = ('offset', 'shard', 'size')
    shard: str
    offset: int
    size: int

    def __new__(cls, shard: str, name: str, offset: int, size: int) -> 'PathInShard':
        path = super().__new__(cls, f'{shard}/{name}')
        path.shard, path.offset, path.size = shard, offset, size
        return path

    def __getnewargs__(self) -> tuple[str, str, int, int]:  # type: ignore[override]
        return self.shard, self[len(self.shard) + 1 :], self.offset, self.size


def open_image(path: str) -> BinaryIO:
    """An image file, within a tar file or not, opened to read bytes.

    Raises:
        OSError: It cannot be read.
    """
    if not isinstance(path, PathInShard):
        return open(path, 'rb')
    with open(path.shard, 'rb') as f:
        f.seek(path.offset)
        return io.BytesIO(f.read(path.size))


def stat_image(path: str) -> tuple[int, int]:
    """Size of an image file in bytes and time of change in nanoseconds, that of its tar file if it is within one.

    Raises:
        OSError: It cannot be accessed.
    """
    stat = os.stat(path.shard if isinstance(path, PathInShard) else path)
    return (path.size if isinstance(path, PathInShard) else stat.st_size), stat.st_mtime_ns


def scan_shard(shard: str, endings: frozenset[str], ignored: Counter[str]) -> list[PathInShard]:
    """The images in a tar file, of one name the last, as when it is unpacked.

    Args:
        shard: Its path.
        endings: Endings of images, with their dots.
        ignored: Counts the files left out, by kind.

    Raises:
        UsageError: It is no readable tar file, or a compressed one.
    """
    images: dict[str, PathInShard] = {}
    try:
        with tarfile.open(shard, 'r:') as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                ending = posixpath.splitext(name)[1].lower()
                if member.isdir():
                    continue
                if any(part.startswith('.') or part == '__MACOSX' for part in name.split('/')):
                    ignored['hidden'] += 1
                elif not member.isfile() or member.issparse():
                    ignored['link'] += 1
                elif ending in endings:
                    images[name] = PathInShard(shard, name, member.offset_data, member.size)
                else:
                    ignored[ending or 'without ending'] += 1
    except (OSError, tarfile.TarError) as e:
        raise UsageError(f"cannot read '{shard}' as a tar file without compression: {one_line(e)}") from e
    return list(images.values())

"""Images within tar files (shards, as of WebDataset), read in place like files of a folder."""

import io
import os
import posixpath
import tarfile
from collections import Counter
from typing import Any, BinaryIO

from ..errors import UsageError, one_line

SHARD = '.tar'
# zeros at the end of a tar file, in bytes: up to the largest block that it is written in
_LONGEST_END = 2**22


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

    def __reduce__(self) -> tuple[Any, ...]:
        return PathInShard, (self.shard, self[len(self.shard) + 1 :], self.offset, self.size)


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


def is_shard(path: str) -> bool:
    """Whether a file is a tar file by its name."""
    return path.lower().endswith(SHARD)


def begins_as_shard(path: str) -> bool:
    """Whether a file begins as a tar file without compression; those of PyTorch's checkpoints (`.pth.tar`) do not.

    True if it cannot be read: `scan_shard` says why.
    """
    try:
        with tarfile.open(path, 'r:'):
            return True
    except OSError:
        return True
    except tarfile.TarError:
        return False


def scan_shard(shard: str, endings: frozenset[str], ignored: Counter[str]) -> list[PathInShard]:
    """The images in a tar file, as when it is unpacked: of one name the last, and hard links are further names.

    Args:
        shard: Its path.
        endings: Endings of images, with their dots.
        ignored: Counts the files left out, by kind.

    Raises:
        UsageError: It is no tar file, a compressed one, or one that does not end where a tar file ends.
    """
    files: dict[str, tuple[int, int]] = {}  # all regular ones: place and size
    images: dict[str, PathInShard] = {}
    try:
        with tarfile.open(shard, 'r:') as tar:
            for member in tar:
                name = posixpath.normpath(member.name).lstrip('/')
                images.pop(name, None)
                if member.isreg() and not member.issparse():
                    files[name] = member.offset_data, member.size
                elif member.islnk() and (target := posixpath.normpath(member.linkname).lstrip('/')) in files:
                    files[name] = files[target]
                elif member.isdir():
                    continue
                else:
                    ignored['sparse' if member.issparse() else 'link'] += 1
                    continue
                ending = posixpath.splitext(name)[1].lower()
                if any(part.startswith('.') and part != '..' or part == '__MACOSX' for part in name.split('/')):
                    ignored['hidden'] += 1
                elif ending in endings:
                    images[name] = PathInShard(shard, name, *files[name])
                else:
                    ignored[ending or 'without ending'] += 1
            end = tar.offset
        _check_end(shard, end)
    except (OSError, tarfile.TarError) as e:
        raise UsageError(
            f"cannot read '{shard}' as a tar file without compression ({one_line(e)}): unpack it, mend it, or move it elsewhere"
        ) from e
    return list(images.values())


def _check_end(shard: str, end: int) -> None:
    """Refuse what follows the last member unless it is a tar file's end, zeros: tarfile takes a damaged header for one."""
    with open(shard, 'rb') as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(end)
        rest = f.read(_LONGEST_END + 1)
    if rest.strip(b'\0') or len(rest) > _LONGEST_END:
        raise tarfile.ReadError(f'damaged at byte {end} of {size}')

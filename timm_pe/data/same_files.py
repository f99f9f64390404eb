"""Which files are the same image: one file that several paths lead to, or copies of the same content."""

import contextlib
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .fingerprint import hash_files
from .shards import PathInShard

# threads that look at files, which may be on a network disk
_THREADS = 8


def real_paths(paths: Iterable[str]) -> Iterator[str]:
    """`os.path.realpath` of each, looking at each folder once: a look at every part of every path takes long."""
    real_folder: dict[str, str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in real_folder:
            real_folder[folder] = os.path.realpath(folder)
        yield os.path.realpath(path) if os.path.islink(path) else os.path.join(real_folder[folder], name)


def identify_files(paths: Sequence[str]) -> list[Hashable]:
    """A value for each path that is equal for paths to one file, by symlinks or hard links, and for no others.

    Of a `PathInShard` it is that of the tar file and the place in it.
    """
    return _look_at(paths)[0]


def _look_at(paths: Sequence[str]) -> tuple[list[Hashable], np.ndarray]:
    """What `identify_files` gives, and the size of each in bytes, int64 [n]; -1 if it is inaccessible."""
    files = [path.shard if isinstance(path, PathInShard) else path for path in paths]
    found: list[Hashable] = list(real_paths(files))
    sizes = np.full(len(paths), -1, np.int64)

    def look(part: np.ndarray) -> None:
        for i in part.tolist():
            path = paths[i]
            with contextlib.suppress(OSError):
                stat = os.stat(files[i])
                sizes[i] = path.size if isinstance(path, PathInShard) else stat.st_size
                if stat.st_nlink > 1:
                    found[i] = stat.st_dev, stat.st_ino

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(look, np.array_split(np.arange(len(paths)), _THREADS)))
    identities = [
        (file, path.offset) if isinstance(path, PathInShard) else file for path, file in zip(paths, found, strict=True)
    ]
    return identities, sizes


def find_same(paths: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """For each file the index of the first other one that is the same file or has the same content, int64 [n]; else -1.

    Only files whose size occurs on both sides are read.
    """
    same = np.full(len(paths), -1, np.int64)
    (files, sizes), (other_files, other_sizes) = _look_at(paths), _look_at(others)
    index_of = {file: i for i, file in reversed(list(enumerate(other_files)))}
    for i, file in enumerate(files):
        same[i] = index_of.get(file, -1)
    read = np.flatnonzero((same < 0) & (sizes > 0) & np.isin(sizes, other_sizes))
    other_read = np.flatnonzero(np.isin(other_sizes, sizes[read]))
    hashes = hash_files([others[i] for i in other_read.tolist()]).tolist()
    index_of_content = {hash: i for hash, i in reversed(list(zip(hashes, other_read.tolist(), strict=True))) if hash}
    for i, hash in zip(read.tolist(), hash_files([paths[i] for i in read.tolist()]).tolist(), strict=True):
        same[i] = index_of_content.get(hash, -1)
    return same

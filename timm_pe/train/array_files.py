"""The files of a teacher cache: memory-mapped arrays, created whole with all blocks reserved, by one process at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np

from ..errors import UsageError, one_line
from ..process.files import sync_file
from ..process.folder_lock import NAME, FolderLock
from ..process.runtime import HOST_TIMEOUT

# to read, or to read and write
Mode = Literal['r', 'r+']


def open_array(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, mode: Mode, without: str = 'to fill that view anew'
) -> np.memmap:
    """Map a file of numpy's format.

    Raises:
        UsageError: It cannot be read, or holds another array; `without` ends the message.
    """
    try:
        # open for reading first: opening for writing would grow a truncated file to the size in its header
        array = np.load(path, mmap_mode='r', allow_pickle=False)
        if mode != 'r':
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        reason = getattr(e, 'strerror', None) or one_line(e, 120)
        raise UsageError(f"--teacher-cache: cannot open '{path}' ({reason}): delete it {without}") from e
    if getattr(array, 'shape', None) != shape or array.dtype != dtype:
        raise UsageError(
            f"--teacher-cache: '{path}' holds {getattr(array, 'dtype', 'no array')} {list(getattr(array, 'shape', []))}, "
            f'not {dtype} {list(shape)}: delete it {without}'
        )
    return array


def create_array(path: Path, shape: tuple[int, ...], dtype: np.dtype, made: list[Path]) -> None:
    """Create a file of zeros in numpy's format, all blocks reserved: a full disk under a memory map raises SIGBUS."""
    beside = path.with_name(f'.{path.name}.tmp')
    made.append(beside)
    with open(beside, 'wb') as f:
        header = {'descr': np.lib.format.dtype_to_descr(dtype), 'fortran_order': False, 'shape': shape}
        np.lib.format.write_array_header_1_0(f, header)
        f.flush()
        _reserve(f, int(np.prod(shape)) * dtype.itemsize)
    os.replace(beside, path)
    made[-1] = path


def _reserve(file: IO[bytes], size: int) -> None:
    if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(file.fileno(), file.tell(), size)
        return
    while size > 0:  # macOS
        size -= file.write(bytes(min(size, 2**20)))


def write_whole(path: Path, content: bytes, made: list[Path]) -> None:
    """Write a file that appears whole or not at all; `made` has what a caller has to remove if it gives up."""
    beside = path.with_name(f'.{path.name}.tmp')
    made.append(beside)
    beside.write_bytes(content)
    sync_file(beside)
    os.replace(beside, path)
    made[-1] = path


@contextlib.contextmanager
def locked(folder: Path, made: list[Path]) -> Iterator[None]:
    """Hold the folder's lock: another run that makes the same files waits."""
    path = folder / NAME
    if not path.exists():
        made.append(path)
    with FolderLock('--teacher-cache', 'makes files', 'give another folder') as lock:
        lock.take(folder, HOST_TIMEOUT.total_seconds())
        yield

"""Short hashes of what a run depends on: weights, images, their files and pixels."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..process.files import hash_content
from .draws import Draw, SeededDataset
from .unreadable import forget_unreadable

_PIXEL_SAMPLES = 8


# of files that are looked at: their disk may be far away
_THREADS = 8


def hash_names(dataset: Dataset[Any]) -> str:
    """Short SHA-256 of what identifies the images of a data set, in their order.

    File names without the root folder; for Hugging Face data their own fingerprint, for torchvision's the labels.
    """
    dataset = _unwrapped(dataset)
    reader = getattr(dataset, 'reader', None)
    fingerprint = getattr(getattr(reader, 'dataset', None), '_fingerprint', None)
    if fingerprint:
        names = [fingerprint]
    elif hasattr(dataset, 'filenames'):
        root = str(getattr(reader, 'root', None) or '')
        # absolute, then cut: a relative path is a normalization a file, seconds for a million
        names = [str(name).removeprefix(root).lstrip('/') for name in dataset.filenames(absolute=True)]
    else:
        labels = getattr(dataset, 'targets', getattr(dataset, 'labels', []))
        names = [type(dataset).__name__, hashlib.sha256(np.asarray(labels).tobytes()).hexdigest()]
    return hashlib.sha256('\n'.join(names).encode('utf-8', 'surrogateescape')).hexdigest()[:16]


def hash_pixels(dataset: SeededDataset) -> list[str]:
    """Of a few images, the hash of the file and short SHA-256 of what leaves the transform: sees other files and libraries.

    The file is '-' where it is not hashed, and '?' where the image cannot be read.
    """
    hashes = []
    for index in np.linspace(0, len(dataset) - 1, _PIXEL_SAMPLES, dtype=int).tolist():
        pixels = hashlib.sha256(np.ascontiguousarray(dataset[Draw(0, index, 0)][0]).data).hexdigest()[:16]
        source = getattr(dataset.dataset, 'source', 0)
        replaced = getattr(dataset.dataset, 'replaced', False)
        hashes.append('? ?' if replaced else f'{f"{source:016x}" if source else "-"} {pixels}')
    forget_unreadable(dataset)
    return hashes


def _unwrapped(dataset: Any) -> Any:
    while not hasattr(dataset, 'reader') and hasattr(dataset, 'dataset'):  # timm's own wrappers
        dataset = dataset.dataset
    return dataset


def list_files(dataset: Dataset[Any]) -> list[str] | None:
    """The files of the images of a data set, in their order; None where images are not files of their own under one folder."""
    images = _unwrapped(dataset)
    root = getattr(getattr(images, 'reader', None), 'root', None)
    if not root or not hasattr(images, 'filenames') or not os.path.isdir(root):
        return None
    first = str(images.filename(0, absolute=True))  # to ask for all names can be to read the whole data set
    # names inside a tar do not begin with its folder; a link to nowhere is a file that cannot be read
    if not first.startswith(str(root)) or not os.path.lexists(first):
        return None
    return [str(path) for path in images.filenames(absolute=True)]


def stat_files(paths: Sequence[str]) -> np.ndarray:
    """Size in bytes and time of change in nanoseconds of each file, int64 [n, 2]; -1 where it is out of reach."""
    stats = np.full((len(paths), 2), -1, np.int64)

    def look(part: np.ndarray) -> None:
        for i in part:
            with contextlib.suppress(OSError):
                stat = os.stat(paths[i])
                stats[i] = stat.st_size, stat.st_mtime_ns

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(look, np.array_split(np.arange(len(paths)), _THREADS)))
    return stats


def hash_file(path: str) -> int:
    """`hash_content` of a file, 0 where it cannot be read."""
    try:
        return hash_content(Path(path).read_bytes())
    except OSError:
        return 0


def hash_files(paths: Sequence[str]) -> np.ndarray:
    """`hash_file` of each, as uint64."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return np.array(list(pool.map(hash_file, paths)), np.uint64)

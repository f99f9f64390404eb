"""Short hashes of a run's images: their names, files and pixels."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..process.files import hash_content
from .draws import Draw, SeededDataset
from .shards import open_image, stat_image
from .unreadable import forget_unreadable

_PIXEL_SAMPLES = 8


# threads that read files, which may be on a network disk
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
        # absolute paths, then cut: making each path relative takes seconds for a million files
        names = [str(name).removeprefix(root).lstrip('/') for name in dataset.filenames(absolute=True)]
    else:
        labels = getattr(dataset, 'targets', getattr(dataset, 'labels', []))
        names = [type(dataset).__name__, hashlib.sha256(np.asarray(labels).tobytes()).hexdigest()]
    return hashlib.sha256('\n'.join(names).encode('utf-8', 'surrogateescape')).hexdigest()[:16]


def hash_pixels(dataset: SeededDataset) -> list[str]:
    """For a few images, the file's hash and a short SHA-256 of the transformed pixels: detects other files and
    libraries.

    The file's hash is '-' if files are not hashed; both are '?' if the image is unreadable.
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
    """The image files of a data set, in its order; None unless each is its own file under one folder, or a `PathInShard`."""
    images = _unwrapped(dataset)
    root = getattr(getattr(images, 'reader', None), 'root', None)
    if not root or not hasattr(images, 'filenames') or not os.path.isdir(root):
        return None
    first = images.filename(0, absolute=True) or ''  # asking for all names may read the whole data set
    # names inside timm's tar files do not begin with its folder; a broken link counts as an unreadable file
    if not str(first).startswith(str(root)) or not os.path.lexists(getattr(first, 'shard', first)):
        return None
    return list(images.filenames(absolute=True))


def stat_files(paths: Sequence[str]) -> np.ndarray:
    """Size in bytes and time of change in nanoseconds of each file, int64 [n, 2]; -1 if it is inaccessible."""
    stats = np.full((len(paths), 2), -1, np.int64)

    def look(part: np.ndarray) -> None:
        for i in part:
            with contextlib.suppress(OSError):
                stats[i] = stat_image(paths[i])

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(look, np.array_split(np.arange(len(paths)), _THREADS)))
    return stats


def hash_file(path: str) -> int:
    """`hash_content` of a file, 0 if it cannot be read."""
    try:
        with open_image(path) as f:
            return hash_content(f.read())
    except OSError:
        return 0


def hash_files(paths: Sequence[str], hash: Callable[[str], int] = hash_file) -> np.ndarray:
    """`hash` of each, as uint64."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return np.array(list(pool.map(hash, paths)), np.uint64)

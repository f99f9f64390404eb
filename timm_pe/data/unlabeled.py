"""Images without labels: all in some folders and tar files, each once, and a part of them held out for validation."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset

from ..config.flags import DataFlags
from ..errors import UsageError
from ..process.files import hash_content
from .fingerprint import hash_files
from .folders import describe_ignored, find_split, image_endings, natural_key, scan_folder
from .same_files import identify_files
from .shards import SHARD, begins_as_shard, is_shard, open_image, scan_shard
from .unreadable import CountingImageDataset

_logger = logging.getLogger(__name__)

_Reader = TypeVar('_Reader', bound=Reader)

_GIVE = 'give folders that hold images, at any depth, or tar files of images'
# what the data set gives in place of a label
NO_LABEL = -1
# images are held out at least, where there are twice as many
_LEAST_HELD_OUT = 16
# the start table says of fewer that which epoch is best among them is partly chance
_FEW_HELD_OUT = 100
# of a file that is larger than all of them, the number of blocks whose hash decides whether it is held out, and their
# bytes: reading all of large files would take hours
_BLOCKS, _BLOCK = 16, 2**16


@dataclass(frozen=True)
class ImagesFound:
    """The images of some folders and tar files.

    Attributes:
        root: The innermost folder that holds all of them.
        paths: The images, absolute (`PathInShard` within tar files), sorted by their paths within their folder.
        ignored: Number of files left out, by kind (see `FolderReader`).
        repeated: Number of further paths that lead to one of the images, by overlapping folders or links.
        first_repeated: One of these paths.
        copies: Number of images with the content of another one, 0 if they were not compared.
    """

    root: str
    paths: list[str]
    ignored: Counter[str]
    repeated: int = 0
    first_repeated: str = ''
    copies: int = 0


def check_unlabeled(folders: Sequence[str]) -> None:
    """Refuse what is neither a folder nor a tar file.

    Raises:
        UsageError: The message names the first of them.
    """
    for folder in folders:
        path = os.path.abspath(folder)  # without a slash at its end
        if not os.path.isdir(path) and not (os.path.isfile(path) and is_shard(path)):
            what = 'is neither a folder nor a .tar file' if os.path.exists(path) else 'does not exist'
            raise UsageError(f"--unlabeled: '{folder}' {what}: {_GIVE}")


def warn_of_splits(folders: Sequence[str]) -> None:
    """Warn of folders that have a training and a validation split with classes in common: their labels are not used."""
    for folder in filter(os.path.isdir, folders):
        try:
            splits = [find_split(folder, split) for split in ('train', 'validation')]
        except UsageError:  # two folders for one split
            continue
        classes = [
            {entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith('.')}
            for split in splits
            if split
        ]
        if len(classes) == 2 and set.intersection(*classes):
            names = ' and '.join(f"'{os.path.basename(split)}'" for split in splits if split)
            _logger.warning(
                f"--unlabeled: '{folder}' has the splits {names} of class folders, and all of its images are used without "
                f'labels. To train with its labels, give it before --unlabeled, or with --data-dir.'
            )


def find_images(folders: Sequence[str]) -> ImagesFound:
    """All images below some folders and in tar files, each file once, in an order that does not depend on that of the folders.

    Args:
        folders: Folders, and tar files. Those within the folders are read too.

    Raises:
        UsageError: A folder without an image, or a tar file that cannot be read.
    """
    check_unlabeled(folders)
    ignored: Counter[str] = Counter()
    found: list[tuple[Any, str, str]] = []
    folders = list(dict.fromkeys(map(os.path.abspath, folders)))
    for folder in folders:
        own: Counter[str] = Counter()
        images = _scan(folder, own)
        if not images:
            left_out = f' ({describe_ignored(own)})' if own else ''
            raise UsageError(f"--unlabeled: no images in '{folder}'{left_out}: {_GIVE}")
        if not any(other != folder and os.path.commonpath([other, folder]) == other for other in folders):
            ignored += own  # else the outer folder counts them
        found += [(natural_key(name), name, path) for name, path in images]
    paths, seen, repeated = [], set(), []
    sorted_paths = [path for _, _, path in sorted(found)]
    for path, file in zip(sorted_paths, identify_files(sorted_paths), strict=True):
        if file in seen:
            repeated.append(path)
        else:
            seen.add(file)
            paths.append(path)
    root = os.path.commonpath([os.path.dirname(f) if os.path.isfile(f) else f for f in folders])
    return ImagesFound(root, paths, ignored, len(repeated), repeated[0] if repeated else '')


def _scan(folder: str, ignored: Counter[str]) -> list[tuple[str, str]]:
    """Names and paths of the images below a folder, those in tar files too, or in a tar file; names begin at the folder."""
    given = folder if os.path.isfile(folder) else None
    if given:
        files, folder = [os.path.basename(folder)], os.path.dirname(folder)
    else:
        files = scan_folder(folder, image_endings() | {SHARD}, ignored)[0]
    images: list[tuple[str, str]] = []
    for name in files:
        path = os.path.join(folder, name)
        if is_shard(name) and path != given and not begins_as_shard(path):
            ignored['.tar that is none or is compressed'] += 1
        elif is_shard(name):
            inside = scan_shard(path, image_endings(), ignored)
            images += [(os.path.join(name, image[len(path) + 1 :]), image) for image in inside]
        else:
            images.append((name, path))
    return images


def hash_images(paths: Sequence[str]) -> np.ndarray:
    """Hashes of their contents, uint64 [n]; see `_hash_blocks`."""
    return hash_files(paths, _hash_blocks)


def hold_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which images are held out, by the hashes of their contents, bool [n].

    Those whose hash of their content is below the fraction. If these are fewer than 16, the images of the lowest hashes
    are held out, up to 16. Copies have the same hash, so they are on one side. Images that would make it more than half
    are not held out, so none may be.

    A file that is renamed stays on its side. A file that is added moves no other one as long as the fraction alone holds
    out from 16 images to half of them: all but certain from 32 / fraction images on, unless the fraction is near 0.5.
    """
    below, least, most = np.uint64(int(fraction * 2**64)), min(_LEAST_HELD_OUT, len(hashes) // 2), len(hashes) // 2
    taken, number = [], 0
    for hash, copies in zip(*np.unique(hashes[hashes > 0], return_counts=True), strict=True):
        if hash >= below and number >= least:
            break
        if number + copies <= most:
            taken.append(hash)
            number += copies
    return np.isin(hashes, taken)


def _hash_blocks(path: str) -> int:
    """Hash of a file of up to 1 MiB, or of the size of a larger one and of 16 blocks from its first bytes to its last.

    It is 0 if the file cannot be read: training counts and names it.
    """
    try:
        with open_image(path) as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(0)
            if size <= _BLOCKS * _BLOCK:
                return hash_content(f.read())
            content = [size.to_bytes(8, 'little')]
            for i in range(_BLOCKS):
                f.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
                content.append(f.read(_BLOCK))
            return hash_content(b''.join(content))
    except OSError:
        return 0


class UnlabeledReader(Reader):
    """Images without labels.

    Args:
        found: The images.
        held_out: Which of them are held out, bool [n].
        training: Whether to read the others.

    Attributes:
        root: Folder that holds them all.
        paths: The images that it reads.
        found: As given.
    """

    def __init__(self, found: ImagesFound, held_out: np.ndarray, training: bool):
        super().__init__()
        self.root, self.found = found.root, found
        self.paths = [found.paths[i] for i in np.flatnonzero(~held_out if training else held_out).tolist()]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open_image(self.paths[index]), NO_LABEL

    def __len__(self) -> int:
        return len(self.paths)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.paths[index]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def create_unlabeled(flags: DataFlags, mode: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """Open the images to train on and those that are held out.

    Args:
        flags: The folders, and the share that is held out.
        mode: PIL mode that images are converted to.

    Raises:
        UsageError: No such folder, one without images, a single image, or one image in many copies.
    """
    found = find_images(flags.unlabeled)
    if len(found.paths) < 2:
        raise UsageError(
            f"--unlabeled: '{found.paths[0]}' is the only image: one to train on and one to hold out are needed"
        )
    hashes = hash_images(found.paths)
    held_out = hold_out(hashes, flags.val_fraction)
    readable = hashes[hashes > 0]
    found = replace(found, copies=len(readable) - len(np.unique(readable)))
    if not held_out.any():
        raise UsageError(
            f'--unlabeled: none of the {len(found.paths)} images can be held out: more than half of them are copies of one '
            f'image, or none can be read: give others'
        )
    train, evaluation = (
        CountingImageDataset(
            ImageDataset(found.root, reader=UnlabeledReader(found, held_out, training), input_img_mode=mode)
        )
        for training in (True, False)
    )
    return train, evaluation


def describe_unlabeled(train: Any, evaluation: Any, fraction: float) -> list[tuple[str, str]]:
    """Rows of the start table about images without labels, and what was left out.

    Args:
        train: Those to train on.
        evaluation: Those that are held out.
        fraction: --val-fraction.
    """
    reader = reader_of(train, UnlabeledReader)
    assert reader is not None
    found = reader.found
    rows = [
        ('data', f'{len(train)} images without labels, of {found.root}'),
        ('held out', f'{len(evaluation)} more, chosen by their content (--val-fraction {fraction:g})'),
    ]
    if len(evaluation) < _FEW_HELD_OUT:
        rows.append(('', 'so few that the best epoch is partly chance; the last one is in last.pth.tar'))
    if found.copies:
        rows.append(('copies', f'{found.copies} of the images have the content of another one, and are used as well'))
    if found.ignored:
        rows.append(('left out', describe_ignored(found.ignored)))
    return [*rows, *describe_repeated(found)]


def describe_repeated(found: ImagesFound) -> list[tuple[str, str]]:
    """The row of the start table about files that several paths lead to, if there are any."""
    if not found.repeated:
        return []
    further = f'{found.repeated} further path{"s" * (found.repeated > 1)} to the same files'
    return [('counted once', f"{further}, one is '{found.first_repeated}'")]


def reader_of(dataset: Any, kind: type[_Reader]) -> _Reader | None:
    """The reader of this kind in a data set, or in one that wraps it; None if it has none."""
    while dataset is not None and not isinstance(dataset, kind):
        dataset = getattr(dataset, 'reader', getattr(dataset, 'dataset', None))
    return dataset

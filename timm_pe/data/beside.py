"""Labelled images and images without labels in one training: one data set, in batches that hold the same share of both."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset, Sampler

from ..config.flags import DataFlags
from ..errors import UsageError
from .draws import derive_seed
from .folders import FolderReader
from .same_files import find_same
from .shards import open_image
from .unlabeled import NO_LABEL, ImagesFound, describe_repeated, find_images
from .unreadable import CountingImageDataset


class BesideReader(Reader):
    """Labelled images, and after them images without labels. What else is asked is answered by the labelled ones.

    Args:
        labeled: The labelled images.
        found: The images without labels.
        known: Number of images left out of these because they are labelled ones too.
        validated: How many of them are ones to validate.

    Attributes:
        num_labeled: Number of labelled images.
        found: As given.
        known: As given.
        validated: As given.
        root: Folder that holds all of them.
    """

    def __init__(self, labeled: FolderReader, found: ImagesFound, known: int, validated: int):
        super().__init__()
        self.labeled, self.found, self.known, self.validated = labeled, found, known, validated
        self.num_labeled = len(labeled)
        self.root = os.path.commonpath([os.path.abspath(labeled.root), found.root])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index < self.num_labeled:
            return self.labeled[index]
        return open_image(self.found.paths[index - self.num_labeled]), NO_LABEL

    def __len__(self) -> int:
        return self.num_labeled + len(self.found.paths)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'labeled':
            raise AttributeError(name)
        return getattr(self.labeled, name)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        if index < self.num_labeled:
            path = os.path.abspath(self.labeled.samples[index][0])
        else:
            path = self.found.paths[index - self.num_labeled]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def put_beside(flags: DataFlags, train: Dataset[Any], evaluation: Dataset[Any]) -> Dataset[Any]:
    """The labelled images to train on, and those of --unlabeled after them.

    Images of --unlabeled that are labelled ones too, to train on or to validate, are left out: links to their files, and
    copies with the same content.

    Args:
        flags: Flags of the data.
        train: The labelled images.
        evaluation: Those of validation.

    Raises:
        UsageError: The labelled images are in no folder of class folders, or no image is left of --unlabeled.
    """
    readers: list[Any] = [getattr(getattr(dataset, 'reader', None), 'reader', None) for dataset in (train, evaluation)]
    if not isinstance(train, CountingImageDataset) or not all(isinstance(reader, FolderReader) for reader in readers):
        raise UsageError('--unlabeled goes beside a folder of class folders alone: give one, or no data at all')
    found = find_images(flags.unlabeled)
    # those to validate first: an image of both splits is one of them
    labeled = [path for reader in reversed(readers) for path, _ in reader.samples]
    same = find_same(found.paths, labeled)
    if (same >= 0).all():
        raise UsageError('--unlabeled: all of its images are labelled ones of the data folder: give others')
    known, validated = int((same >= 0).sum()), int(((same >= 0) & (same < len(readers[1]))).sum())
    found = replace(found, paths=[found.paths[i] for i in np.flatnonzero(same < 0).tolist()])
    reader = BesideReader(readers[0], found, known, validated)
    return CountingImageDataset(ImageDataset(readers[0].root, reader=reader, input_img_mode=train.input_img_mode))


def drawn_beside(flags: DataFlags, reader: BesideReader) -> int:
    """How many of the images without labels an epoch has: those of --unlabeled-ratio, at least 1, else all."""
    ratio = flags.unlabeled_ratio
    return len(reader.found.paths) if ratio is None else max(1, round(ratio * reader.num_labeled))


def describe_beside(flags: DataFlags, reader: BesideReader, batch_size: int) -> list[tuple[str, str]]:
    """Rows of the start table about the images without labels."""
    number, found, drawn = len(reader.found.paths), reader.found, drawn_beside(flags, reader)
    share = batch_size * reader.num_labeled / (reader.num_labeled + drawn)
    an_epoch = '' if flags.unlabeled_ratio is None else f', {drawn} in an epoch'
    rows = [
        (
            'without labels',
            f'{number} images more, of {found.root}{an_epoch}: {share:.3g} of {batch_size} in a batch are labelled',
        )
    ]
    if reader.known:
        known = f'{reader.known} image{"s" * (reader.known > 1)} of --unlabeled that the data folder has with labels'
        rows.append(('counted once', f'{known}, {reader.validated} of them to validate'))
    return [*rows, *describe_repeated(found)]


class EvenSampler(Sampler[int]):
    """Labelled images and others, each in a random order, spread evenly over an epoch and over the ranks.

    Each rank has its share of both. Where a rank's batch has less than one labelled image, ranks take turns.

    Args:
        labeled: Number of labelled images, the first ones. An epoch has each of them once.
        others: Number of the others.
        drawn: How many of the others an epoch has; None means each of them once. Of more, all come again as often.
        rank: This rank.
        world_size: Number of ranks; each has the same number of images.
    """

    def __init__(self, labeled: int, others: int, rank: int, world_size: int, drawn: int | None = None):
        self.labeled, self.others, self.rank, self.world_size = labeled, others, rank, world_size
        self.drawn = others if drawn is None else drawn
        self.seed = 0

    def set_epoch(self, seed: int) -> None:
        """Set the seed of the next order; `DrawBatchSampler` derives it from the run's seed and the epoch."""
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        rng, ranks = np.random.default_rng(derive_seed(self.seed)), range(self.world_size)
        labeled, passes = rng.permutation(self.labeled), range(-(-self.drawn // self.others))
        others = self.labeled + np.concatenate([rng.permutation(self.others) for _ in passes])[: self.drawn]
        shares = [labeled[rank :: self.world_size][: len(self)] for rank in ranks]
        ends = np.cumsum([len(self) - len(share) for share in shares])
        mine = [shares[self.rank], np.split(others, ends)[self.rank]]
        # of the distance between two labelled images, so that those of the ranks do not fall into the same batches
        offset = (self.rank + 0.5) / self.world_size - 0.5
        places = [
            (np.arange(len(images)) + 0.5 + shift) / len(images)
            for images, shift in zip(mine, (offset, 0), strict=True)
        ]
        order = np.concatenate(mine)[np.argsort(np.concatenate(places), kind='stable')]
        yield from order.tolist()

    def __len__(self) -> int:
        return (self.labeled + self.drawn) // self.world_size

"""Loaders over seeded draws, and the batches of an epoch from a given one on."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from timm.data.loader import MultiEpochsDataLoader, PrefetchLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..config.run_config import RunConfig
from ..errors import RunError, UsageError, one_line
from ..process.runtime import Runtime
from .beside import BesideReader, EvenSampler, drawn_beside
from .draws import Batch, DrawBatchSampler, SeededCollate, SeededDataset, SeededErasing, ViewBatches
from .unlabeled import reader_of
from .unreadable import forget_unreadable


def seed_loader(loader: Any, config: RunConfig, runtime: Runtime) -> Any:
    """Replace timm's DataLoader by one over seeded draws, under its prefetcher if there is one."""
    plain = plain_loader(loader)
    beside = reader_of(plain.dataset, BesideReader)
    batch_sampler: Any = plain.batch_sampler
    repeated = bool(config.aug_repeats)
    if beside is not None:
        others, drawn = len(beside.found.paths), drawn_beside(config, beside)
        repeated = drawn > others
        if repeated and config.teacher_cache:
            raise UsageError(
                f'--teacher-cache keeps one feature an image and view, and --unlabeled-ratio {config.unlabeled_ratio:g} draws '
                f'{drawn} of {others} images without labels in an epoch: give {others / beside.num_labeled:.3g} or less'
            )
        sampler = EvenSampler(beside.num_labeled, others, runtime.rank, runtime.world_size, drawn)
        batch_sampler = BatchSampler(sampler, config.batch_size, drop_last=True)
    loader_class = MultiEpochsDataLoader if config.use_multi_epochs_loader else DataLoader
    seeded = loader_class(
        SeededDataset(plain.dataset, config.seed),
        batch_sampler=DrawBatchSampler(
            batch_sampler,
            config.seed,
            runtime.rank,
            runtime.world_size,
            repeated=repeated,
            views=config.teacher_cache_views if config.teacher_cache else None,
        ),
        collate_fn=SeededCollate(  # type: ignore[arg-type]  # its batches are those of SeededDataset
            plain.collate_fn,
            config.seed,
            runtime.rank,
            config.mixup_off_epoch,
            indexed=bool(config.teacher_cache),
            some_labeled=beside is not None,
        ),
        num_workers=plain.num_workers,
        pin_memory=plain.pin_memory,
        worker_init_fn=plain.worker_init_fn,
        persistent_workers=plain.persistent_workers,
        generator=torch.Generator(),  # else each epoch takes its workers' seed from the run's random state
    )
    if not isinstance(loader, PrefetchLoader):
        return seeded
    loader.loader = seeded
    if loader.random_erasing is not None:
        erasing = SeededErasing(loader.random_erasing, config.seed, runtime.rank)
        loader.random_erasing = erasing  # type: ignore[assignment]  # called as timm's is
    return loader


def plain_loader(loader: Any) -> Any:
    """The DataLoader under a prefetcher."""
    return loader.loader if isinstance(loader, PrefetchLoader) else loader


def set_epoch(loader: Any, epoch: int, start: int = 0) -> bool:
    """Tell all parts of a training loader which epoch comes next, and with which batch.

    Returns:
        Whether it will begin with batch `start`; a loader that cannot begins with the first.
    """
    plain = plain_loader(loader)
    batches: Any = getattr(plain, 'batch_sampler', None)
    erasing: Any = getattr(loader, 'random_erasing', None)
    multi_epochs = isinstance(plain, MultiEpochsDataLoader)
    if multi_epochs:
        # its single iterator prefetches and counts epochs by itself once it runs
        batches = batches.sampler if plain.iterator is None else None
    part: Any
    for part in (batches, getattr(loader, 'dataset', None), erasing):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
    seeks = isinstance(batches, DrawBatchSampler) and not multi_epochs
    for part in (batches, erasing) if seeks else ():
        if part is not None:
            part.set_epoch(epoch, start)
    return seeks


def epoch_batches(loader: Any, epoch: int, start: int = 0) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """The batches of an epoch from number `start` on, with their numbers.

    If the loader can only start at the first batch, earlier batches are drawn and discarded.
    """
    first = start if set_epoch(loader, epoch, start) else 0
    for i, batch in enumerate(loader, first):
        if i >= start:
            yield i, batch


def first_batch(loader: Any) -> tuple[Any, Any]:
    """The first batch of epoch 0; the loader's state stays as if it had not been drawn.

    Raises:
        UsageError: Its images cannot be read.
    """
    set_epoch(loader, 0)
    plain = plain_loader(loader)
    if not isinstance(plain.dataset, IterableDataset):
        # read in this process: workers would read ahead, and their unreadable images would count in epoch 0
        loader = _loader_over(loader, [next(iter(plain.batch_sampler))], num_workers=0)
    try:
        batch = next(iter(loader))
    except RunError as e:  # nothing has begun yet
        raise UsageError(one_line(e)) from e
    forget_unreadable(loader.dataset)
    if isinstance(plain, MultiEpochsDataLoader):
        plain.iterator = None
    return batch


def view_loader(loader: Any, view: int, indices: np.ndarray, batch_size: int) -> Any:
    """`loader` over one view of the images `indices` only, in that order: the same pixels, workers, normalization."""
    return _loader_over(loader, ViewBatches(view, indices, batch_size), plain_loader(loader).num_workers)


def _loader_over(loader: Any, batches: Iterable[Batch], num_workers: int) -> Any:
    """`loader` over other batches, with the same pixels and normalization."""
    plain = plain_loader(loader)
    other = DataLoader(
        plain.dataset,
        batch_sampler=batches,
        collate_fn=plain.collate_fn,
        num_workers=num_workers,
        pin_memory=plain.pin_memory,
        worker_init_fn=plain.worker_init_fn,
        generator=torch.Generator(),
    )
    if not isinstance(loader, PrefetchLoader):
        return other
    loader = copy.copy(loader)
    loader.loader = other
    return loader

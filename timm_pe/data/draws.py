"""Random draws that depend on what is drawn, not on the process that draws it.

The seed of an image's draws is derived from (seed, view, index, repeat), that of a batch's draws (mixup, cutmix, random
erasing) from (seed, epoch, batch number, rank), that of an epoch's order from (seed, epoch). The view is the epoch;
with K views, the epoch mod K. Any number of workers, and a resumed run, see the same pixels.
"""

import hashlib
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from timm.data import FastCollateMixup, Mixup, ScheduledBatchSampler
from torch.utils.data import BatchSampler, Dataset, RandomSampler, Sampler


def derive_seed(*key: int) -> int:
    """A 63-bit seed for a tuple of integers; near tuples give unrelated seeds."""
    digest = hashlib.blake2b(struct.pack(f'<{len(key)}q', *key), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device, at 25 times the cost


@contextmanager
def kept_rng() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch's CPU at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Draw(NamedTuple):
    """One draw of an image: the view, the index of the image, and how often the epoch has drawn it before.

    After loading, `replaced` tells whether the image was unreadable and replaced by another one; `source` is the hash
    of its file, or 0.
    """

    view: int
    index: Any
    repeat: int
    replaced: bool = False
    source: int = 0


def _image_of(index: Any) -> int:
    """The image in a sampler's index, which with scheduled sizes is (image, size of the batch)."""
    return index if isinstance(index, int) else index[0]


class Batch(list[Any]):
    """The draws (after loading: the samples) of a batch, with its epoch and number; samples come with their draws."""

    def __init__(self, items: Any, epoch: int, number: int, draws: Any = ()):
        super().__init__(items)
        self.epoch, self.number, self.draws = epoch, number, draws

    def __reduce__(self) -> tuple[Any, ...]:
        return Batch, (list(self), self.epoch, self.number, self.draws)


class IndexedTarget(NamedTuple):
    """The targets of a batch and the indices of its images, by which a teacher cache is read.

    Loaders pin it and move it to the device as they do a tensor. `index` stays on the host, where it is needed: reading
    it never waits for the device. It is -1 for an unreadable image that another one replaces. `sources` are hashes of
    the images' files, 0 if unknown.
    """

    target: 'torch.Tensor | LabeledTarget'
    index: np.ndarray  # type: ignore[assignment]  # replaces tuple.index, which has no use here
    view: int
    sources: np.ndarray | None = None

    def to(self, *args: Any, **kwargs: Any) -> 'IndexedTarget':
        """The target as `target.to(...)`."""
        return self._replace(target=self.target.to(*args, **kwargs))


class LabeledTarget(NamedTuple):
    """The targets of the labelled images of a batch that has others too.

    Loaders pin it and move it to the device as they do a tensor; the host knows the shapes, so nothing waits for it.

    Attributes:
        target: Labels `[l]` of the images that have one.
        rows: Their places in the batch, `[l]`.
    """

    target: torch.Tensor
    rows: torch.Tensor

    def to(self, *args: Any, **kwargs: Any) -> 'LabeledTarget':
        """Both as `tensor.to(...)`."""
        return LabeledTarget(self.target.to(*args, **kwargs), self.rows.to(*args, **kwargs))


class DrawBatchSampler(Sampler[Batch]):
    """timm's batches of indices as batches of `Draw`s; their order is a function of seed and epoch, on any number of ranks.

    Args:
        batch_sampler: Batch sampler (torch's, or timm's ScheduledBatchSampler) over an index sampler.
        seed: Run seed, the same on all ranks: the order of DistributedSampler and RepeatAugSampler follows it too.
        rank: This rank.
        world_size: Number of ranks.
        repeated: Whether the sampler repeats images over ranks; then each rank draws its repeat differently.
        views: Number K of views of each image: epoch e draws view e mod K. None draws a new one each epoch.
    """

    def __init__(
        self,
        batch_sampler: BatchSampler | ScheduledBatchSampler,
        seed: int,
        rank: int,
        world_size: int,
        repeated: bool,
        views: int | None = None,
    ):
        self.batch_sampler, self.sampler, self.seed = batch_sampler, batch_sampler.sampler, seed
        self.rank, self.world_size, self.repeated, self.views = rank, world_size, repeated, views
        self.epoch = self.start = 0
        if isinstance(self.sampler, RandomSampler):
            self.sampler.generator = torch.Generator()

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch and first batch of the next iteration; without it, the next epoch runs from its first batch."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        start, self.start = self.start, 0
        if hasattr(self.batch_sampler, 'set_epoch'):  # the epochs of its schedule
            self.batch_sampler.set_epoch(epoch)
        if isinstance(self.sampler, RandomSampler):
            self.sampler.generator.manual_seed(derive_seed(self.seed, epoch))
        elif hasattr(self.sampler, 'set_epoch'):  # distributed samplers use the epoch only as a seed
            self.sampler.set_epoch(derive_seed(self.seed, epoch))
        view = epoch % self.views if self.views else epoch
        times: Counter[int] = Counter()
        batches: Iterable[list[Any]] = self.batch_sampler
        for number, indices in enumerate(batches):
            draws = []
            for index in indices:
                image = _image_of(index)
                repeat = times[image]  # above 0 in a second pass over the data too (--train-batches-per-epoch)
                times[image] += 1
                draws.append(Draw(view, index, repeat * self.world_size + self.rank if self.repeated else repeat))
            if number >= start:
                yield Batch(draws, epoch, number)

    def __len__(self) -> int:
        return len(self.batch_sampler)


class ViewBatches(Sampler[Batch]):
    """Batches of the same view of given images, in their order.

    Args:
        view: The view.
        indices: Indices of the images.
        batch_size: Images in a batch; the last may have fewer.
    """

    def __init__(self, view: int, indices: np.ndarray, batch_size: int):
        self.view, self.indices, self.batch_size = view, indices, batch_size

    def __iter__(self) -> Iterator[Batch]:
        for number, start in enumerate(range(0, len(self.indices), self.batch_size)):
            indices = self.indices[start : start + self.batch_size].tolist()
            yield Batch([Draw(self.view, index, 0) for index in indices], self.view, number)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)


class SeededDataset(Dataset[Any]):
    """A map-style data set whose random transforms depend only on the draw."""

    def __init__(self, dataset: Dataset[Any], seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, batch: Batch) -> Batch:
        with kept_rng():
            samples, draws = [], []
            for draw in batch:
                samples.append(self._load(draw))
                replaced, source = getattr(self.dataset, 'replaced', False), getattr(self.dataset, 'source', 0)
                draws.append(draw._replace(replaced=replaced, source=source))
            return Batch(samples, batch.epoch, batch.number, draws)

    def __getitem__(self, draw: Draw) -> tuple[Any, ...]:
        with kept_rng():
            return self._load(draw)

    def _load(self, draw: Draw) -> tuple[Any, ...]:
        _seed_all(derive_seed(self.seed, draw.view, _image_of(draw.index), draw.repeat))
        return cast(tuple[Any, ...], self.dataset[draw.index])

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))


class SeededCollate:
    """A collate function whose draws (mixup, cutmix) depend only on the batch; mixing ends at `mixup_off_epoch`.

    With `indexed` its targets are `IndexedTarget`s; with `some_labeled` only images whose target is not negative have a
    label, and targets are `LabeledTarget`s.
    """

    def __init__(
        self,
        collate: Callable[[Any], Any],
        seed: int,
        rank: int,
        mixup_off_epoch: int,
        indexed: bool = False,
        some_labeled: bool = False,
    ):
        self.collate, self.seed, self.rank, self.mixup_off_epoch = collate, seed, rank, mixup_off_epoch
        self.indexed, self.some_labeled = indexed, some_labeled

    def __call__(self, batch: Batch) -> Any:
        if isinstance(self.collate, FastCollateMixup):
            self.collate.mixup_enabled = not self.mixup_off_epoch or batch.epoch < self.mixup_off_epoch
        with kept_rng():
            _seed_all(derive_seed(self.seed, batch.epoch, batch.number, self.rank))
            collated = self.collate(batch)
        input, target = collated
        if self.some_labeled:
            rows = (target >= 0).nonzero()[:, 0]
            target = LabeledTarget(target[rows], rows)
        if not self.indexed:
            return input, target
        index = np.array([-1 if draw.replaced else draw.index for draw in batch.draws])
        sources = np.array([draw.source for draw in batch.draws], np.uint64)
        return input, IndexedTarget(target, index, batch.draws[0].view, sources)


class SeededErasing:
    """timm's RandomErasing on the device, with draws that depend only on the batch.

    The prefetcher erases batch n + 1 before it hands out batch n, so the count is kept here.
    """

    def __init__(self, erasing: Callable[[torch.Tensor], torch.Tensor], seed: int, rank: int):
        self.erasing, self.seed, self.rank = erasing, seed, rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch and the number of the next batch."""
        self.epoch, self.number = epoch, start

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        devices = [input.device] if input.device.type == 'cuda' else []
        with kept_rng(), torch.random.fork_rng(devices):
            seed = derive_seed(self.seed, self.epoch, self.number, self.rank, 1)
            _seed_all(seed)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            self.number += 1
            return self.erasing(input)


def seeded_mixup(
    mixup: Mixup, input: torch.Tensor, target: torch.Tensor, *key: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mixup(input, target)` with the draws of `key`, (seed, epoch, batch number, rank)."""
    with kept_rng():
        _seed_all(derive_seed(*key))
        return mixup(input, target)

"""Random draws of the data as functions of what is drawn, not of who draws it.

An image is drawn by (seed, epoch, index, repeat), what is drawn once a batch (order, mixup, cutmix, random erasing) by
(seed, epoch, batch number, rank). Any number of workers, and a restart, see the same pixels.
"""

import hashlib
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import FastCollateMixup, Mixup
from torch.utils.data import Dataset, RandomSampler, Sampler


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
    """Give the random states of python, numpy and torch's CPU back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Draw(NamedTuple):
    """One draw of an image: which epoch, which image, the how-many-th time."""

    epoch: int
    index: Any
    repeat: int


class Batch(list):
    """The draws, or then the samples, of a batch that knows its place in the run."""

    def __init__(self, items: Any, epoch: int, number: int):
        super().__init__(items)
        self.epoch, self.number = epoch, number

    def __reduce__(self) -> tuple:
        return Batch, (list(self), self.epoch, self.number)


class DrawBatchSampler(Sampler):
    """timm's batches of indices as batches of `Draw`s; the order of a RandomSampler is a function of the epoch too.

    Args:
        batch_sampler: Batch sampler (torch's, or timm's ScheduledBatchSampler) over an index sampler.
        seed: Run seed.
        rank: This rank.
        world_size: Number of ranks.
        repeated: The sampler repeats images over ranks; then each rank's repeat is another draw.
    """

    def __init__(self, batch_sampler: Sampler, seed: int, rank: int, world_size: int, repeated: bool):
        self.batch_sampler, self.sampler, self.seed = batch_sampler, batch_sampler.sampler, seed
        self.rank, self.world_size, self.repeated = rank, world_size, repeated
        self.epoch = 0
        if isinstance(self.sampler, RandomSampler):
            self.sampler.generator = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; without a word it is the one after the last."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        for part in (self.batch_sampler, self.sampler):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)
        if isinstance(self.sampler, RandomSampler):
            self.sampler.generator.manual_seed(derive_seed(self.seed, epoch))
        times = Counter()
        for number, indices in enumerate(self.batch_sampler):
            draws = []
            for index in indices:
                draws.append(Draw(epoch, index, times[index] * self.world_size + self.rank if self.repeated else 0))
                if self.repeated:
                    times[index] += 1
            yield Batch(draws, epoch, number)

    def __len__(self) -> int:
        return len(self.batch_sampler)


class SeededDataset(Dataset):
    """A map-style data set whose random transforms depend on the draw alone."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, batch: Batch) -> Batch:
        with kept_rng():
            return Batch([self._load(draw) for draw in batch], batch.epoch, batch.number)

    def __getitem__(self, draw: Draw) -> tuple:
        with kept_rng():
            return self._load(draw)

    def _load(self, draw: Draw) -> tuple:
        # with scheduled sizes an index is (index, choice of the batch)
        index = draw.index if isinstance(draw.index, int) else draw.index[0]
        _seed_all(derive_seed(self.seed, draw.epoch, index, draw.repeat))
        return self.dataset[draw.index]

    def __len__(self) -> int:
        return len(self.dataset)


class SeededCollate:
    """A collate function whose draws (mixup, cutmix) depend on the batch alone; mixing ends at `mixup_off_epoch`."""

    def __init__(self, collate: Callable, seed: int, rank: int, mixup_off_epoch: int):
        self.collate, self.seed, self.rank, self.mixup_off_epoch = collate, seed, rank, mixup_off_epoch

    def __call__(self, batch: Batch) -> Any:
        if isinstance(self.collate, FastCollateMixup):
            self.collate.mixup_enabled = not self.mixup_off_epoch or batch.epoch < self.mixup_off_epoch
        with kept_rng():
            _seed_all(derive_seed(self.seed, batch.epoch, batch.number, self.rank))
            return self.collate(batch)


class SeededErasing:
    """timm's RandomErasing on the device, with draws that depend on the batch alone.

    The prefetcher erases batch n + 1 before it hands out batch n, so the count is kept here.
    """

    def __init__(self, erasing: Callable, seed: int, rank: int):
        self.erasing, self.seed, self.rank = erasing, seed, rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.number = epoch, 0

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


def seeded_mixup(mixup: Mixup, input: torch.Tensor, target: torch.Tensor, *key: int) -> tuple:
    """`mixup(input, target)` with the draws of `key`, (seed, epoch, batch number, rank)."""
    with kept_rng():
        _seed_all(derive_seed(*key))
        return mixup(input, target)

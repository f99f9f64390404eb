"""Batches that timm's loader prefetches to the device are whole when they are read, however late that is.

The loader frees a batch's memory when the next one is asked for, while work on it may still be queued on the device. timm
1.0.31 is the first whose loader lets its stream wait for that work; this is why it is the lowest that is supported.
"""

import numpy as np
import pytest
import torch
from conftest import DEVICE
from timm.data import create_loader
from torch.utils.data import Dataset

BATCHES, BATCH = 12, 16
CLOCKS = 50_000_000  # of a device that is kept busy, some 30 ms


class Numbered(Dataset):
    """Images whose pixels are all the image's number."""

    transform = None

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((3, 224, 224), index, dtype=np.uint8), index

    def __len__(self) -> int:
        return BATCHES * BATCH


def numbers_read(pin_memory: bool = True) -> list[int]:
    """The numbers of the images as a consumer reads them that is slower than the loader."""
    loader = create_loader(
        Numbered(),
        input_size=(3, 224, 224),
        batch_size=BATCH,
        mean=(0.0,) * 3,
        std=(1 / 255,) * 3,
        num_workers=2,
        pin_memory=pin_memory,
        device=torch.device(DEVICE),
    )
    read = []
    for input, _ in loader:
        if DEVICE != 'cpu':
            torch.cuda._sleep(CLOCKS)
        read.append(input.mean((1, 2, 3)).round().long())
    return torch.cat(read).tolist()


@pytest.mark.parametrize('pin_memory', [True, False])
def test_each_batch_is_read_as_it_was_loaded(pin_memory):
    assert numbers_read(pin_memory) == list(range(BATCHES * BATCH))


@pytest.mark.skipif(DEVICE == 'cpu', reason='a CPU has one stream')
def test_without_the_wait_for_the_consumer_batches_are_overwritten(monkeypatch):
    wait, consumer = torch.cuda.Stream.wait_stream, torch.cuda.current_stream()
    monkeypatch.setattr(
        torch.cuda.Stream, 'wait_stream', lambda self, other: None if other == consumer else wait(self, other)
    )
    assert numbers_read() != list(range(BATCHES * BATCH))

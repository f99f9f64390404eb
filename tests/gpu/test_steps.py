"""Steps on the device: nothing waits for it, and its memory does not grow."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import DEVICE
from helpers import KINDS, PAIR, make_trainer

from timm_pe.train.meters import LossMeter
from timm_pe.train.nonfinite import UpdateGuard

BFLOAT16 = '--amp --amp-dtype bfloat16'
# float16 is not among them: torch's loss scaler asks in each step whether the gradients are finite
MORE = [
    BFLOAT16,
    f'{BFLOAT16} --channels-last --kd-loss-weight 0.5 --grad-accum-steps 2',
    '--teacher-dtype bfloat16 --channels-last',
    '--mixup 0.2 --cutmix 0.5 --reprob 0.5',
    f'{BFLOAT16} --model-ema --nonfinite skip --clip-grad 1 --torchcompile',
]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Let what waits for the device raise; a CPU has nothing to wait for."""
    if DEVICE == 'cpu':
        yield
        return
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def do_not_read(monkeypatch) -> None:
    """Leave out the meter's reading at an epoch's end and at log intervals: there a run does wait."""
    monkeypatch.setattr(LossMeter, 'read', lambda self: OrderedDict(loss=1.0))
    monkeypatch.setattr(UpdateGuard, 'say', lambda self, why: None)


@pytest.mark.parametrize('flags', [*KINDS, *MORE])
def test_a_step_never_waits_for_the_device(flags, on_device, monkeypatch):
    trainer = make_trainer([*on_device, *PAIR, '--epochs', '3', *flags.split()], monkeypatch)
    do_not_read(monkeypatch)
    trainer.train_epoch(0)  # libraries are loaded, kernels chosen, the optimizer's state made
    with waiting_is_an_error():
        trainer.train_epoch(1)


def test_a_step_with_cached_features_does_not_wait_either(on_device, tmp_path, monkeypatch):
    cache = ['--teacher-cache', str(tmp_path / 'cache'), '--teacher-cache-views', '1']
    # an epoch of three batches sees all 36 images, so the next one finds all rows
    trainer = make_trainer([*on_device, *PAIR, *cache, '--epochs', '3', '-b', '12'], monkeypatch)
    do_not_read(monkeypatch)
    trainer.train_epoch(0)
    with waiting_is_an_error():
        trainer.train_epoch(1)


@pytest.mark.skipif(DEVICE == 'cpu', reason='a CPU has nothing to wait for')
def test_a_step_that_waits_is_found(on_device, monkeypatch):
    trainer = make_trainer([*on_device, *PAIR, '--epochs', '3'], monkeypatch)
    do_not_read(monkeypatch)
    trainer.train_epoch(0)
    forward = trainer.task.forward
    monkeypatch.setattr(trainer.task, 'forward', lambda *a, **k: (r := forward(*a, **k), r['loss'].item())[0])
    with pytest.raises(RuntimeError, match='synchroniz'), waiting_is_an_error():
        trainer.train_epoch(1)


@pytest.mark.skipif(DEVICE == 'cpu', reason="the CPU's allocator does not count")
@pytest.mark.parametrize(
    'flags', ['--model-ema --nonfinite skip', '--amp --amp-dtype float16 --kd-loss-weight 0.5', '--reprob 0.5 -j 2']
)
def test_memory_stays_flat_over_epochs(flags, on_device, monkeypatch, record_property):
    trainer = make_trainer([*on_device, *PAIR, '--epochs', '8', *flags.split()], monkeypatch)
    state = None
    allocated, reserved = [], []
    for number in range(6):
        trainer.train_epoch(number)
        state = state or trainer.state(number, 0)
        trainer.validate(state)
        allocated.append(torch.cuda.memory_allocated())
        reserved.append(torch.cuda.memory_reserved())
    record_property('allocated', allocated)
    assert len(set(allocated[1:])) == 1
    assert len(set(reserved[2:])) == 1

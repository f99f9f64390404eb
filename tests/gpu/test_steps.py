"""Steps on the device: nothing waits for it, and its memory does not grow."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from conftest import DEVICE
from helpers import KINDS, KINDS_OF_TWO, PAIR, TWO, make_trainer

from timm_pe import ProjectorEnsembleTask
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
MORE_OF_TWO = [f'{BFLOAT16} --pe-map-weight 1 --channels-last', f'{BFLOAT16} --pe-map-weight 1 --torchcompile']
ALL = [
    *(pytest.param(PAIR, flags, id=flags) for flags in [*KINDS, *MORE]),
    *(pytest.param(TWO, flags, id=f'two {flags}') for flags in [*KINDS_OF_TWO, *MORE_OF_TWO]),
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


@pytest.mark.parametrize(('models', 'flags'), ALL)
def test_a_step_never_waits_for_the_device(models, flags, on_device, monkeypatch):
    trainer = make_trainer([*on_device, *models, '--epochs', '3', *flags.split()], monkeypatch)
    do_not_read(monkeypatch)
    trainer.train_epoch(0)  # libraries are loaded, kernels chosen, the optimizer's state made
    with waiting_is_an_error():
        trainer.train_epoch(1)


def test_a_task_is_on_the_device_of_its_student():
    student = timm.create_model('test_resnet', num_classes=3).to(DEVICE)
    task = ProjectorEnsembleTask(student, timm.create_model('test_vit', num_classes=3), verbose=False)
    images, labels = torch.randn(2, 3, 160, 160, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    assert task(images, labels)['loss'].device == next(student.parameters()).device


@pytest.mark.parametrize(('models', 'flags'), [(PAIR, ''), (TWO, '--pe-map-weight 1 --kd-loss-weight 0.5')])
def test_a_step_with_cached_rows_does_not_wait_either(models, flags, on_device, tmp_path, monkeypatch):
    cache = ['--teacher-cache', str(tmp_path / 'cache'), '--teacher-cache-views', '1']
    # an epoch of three batches sees all 36 images, so the next one finds all rows
    trainer = make_trainer([*on_device, *models, *flags.split(), *cache, '--epochs', '3', '-b', '12'], monkeypatch)
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
    ('models', 'flags'),
    [
        (PAIR, '--model-ema --nonfinite skip'),
        (PAIR, '--amp --amp-dtype float16 --kd-loss-weight 0.5'),
        (PAIR, '--reprob 0.5 -j 2'),
        (TWO, '--pe-map-weight 1 --teacher-drop 0.5 --teacher-input-size 32 48'),
    ],
)
def test_memory_stays_flat_over_epochs(models, flags, on_device, monkeypatch, record_property):
    trainer = make_trainer([*on_device, *models, '--epochs', '8', *flags.split()], monkeypatch)
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

"""What the end-to-end tests share."""

import argparse
import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import train_distill
from timm_pe.train.trainer import Trainer

# those of the fixture image_folder
CLASSES = ('ant', 'bee', 'cat')
PAIR = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained', '--teacher-num-classes', '3']
TWO = ['--model', 'test_resnet', '--teacher', 'test_vit', 'test_resnet', *PAIR[4:]]
# steps that differ in what they compute
KINDS = [
    '',
    '--pe-projector mlp --pe-loss logsum --distill-loss-weight 1',
    '--pe-projector linear_bn --pe-teacher-norm batch',
    '--pe-projector orthogonal --pe-teacher-norm layer',
    '--pe-loss mse --distill-loss-weight 1 --pe-act relu --pe-projectors 1',
    '--pe-target logits --kd-loss-weight 0.5',
    '--kd-loss-weight 0.5 --grad-accum-steps 2 --nonfinite skip',
    '--model-ema --model-ema-decay 0.9 --channels-last --opt adamw --clip-grad 1',
    '--opt lookahead_adamw --clip-grad 0.05 --clip-mode agc',
    '--opt lamb --clip-grad 0.1 --clip-mode value --sched-on-updates --drop 0.2',
    '--loss bce --smoothing 0.1',
]
# the same of TWO
KINDS_OF_TWO = [
    '--kd-loss-weight 0.5 --teacher-weights 1 3',
    '--pe-map-weight 1 --teacher-input-size 32 48',
    '--pe-map-weight 1 --teacher-drop 0.5 --kd-loss-weight 0.5 --model-ema --nonfinite skip --channels-last --clip-grad 1',
    '--pe-map-weight 1 --pe-teacher-norm layer --teacher-input-size 32 48 --grad-accum-steps 2',
    '--pe-map-weight 1 --pe-teacher-norm batch --pe-projector linear_bn',
]


def run(argv: list[str], capsys=None) -> str:
    """A run of the script; what it said, where `capsys` is given."""
    train_distill.main(argv)
    return capsys.readouterr().err if capsys else ''


def make_trainer(argv: list[str], monkeypatch) -> Trainer:
    """The trainer of a run, as it is before the first epoch."""
    made: list[Trainer] = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'fit', lambda self: made.append(self))
        run(argv)
    return made[0]


def refused(argv: list[str], capsys, code: int = 2) -> str:
    """The one line that a run ends with."""
    with pytest.raises(SystemExit) as e:
        train_distill.main(argv)
    err = capsys.readouterr().err
    assert e.value.code == code
    assert 'Traceback' not in err
    errors = [line for line in err.splitlines() if line.startswith('train_distill: error:')]
    assert len(errors) == 1
    assert err.splitlines()[-1] == errors[0]
    return errors[0]


def stopped(argv: list[str], capsys, code: int = 143) -> tuple[str, str]:
    """What a run says that a signal stops, and the command that it says goes on."""
    with pytest.raises(SystemExit) as e:
        train_distill.main(argv)
    err = capsys.readouterr().err
    assert e.value.code == code
    assert 'Traceback' not in err
    assert 'error:' not in err
    said, command = err.splitlines()[-2:]
    assert said.startswith('train_distill: ')
    return said, command


def summary(folder: Path) -> list[dict[str, str]]:
    """The rows of summary.csv."""
    with open(folder / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))


def load(path: Path) -> dict:
    """A training checkpoint, as plain timm reads it: tensors and a Namespace only."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def tensorboard_curves(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], list[tuple[str, int]]]:
    """Curves of a run's event files as (step, value), and the names and numbers of its pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / 'tensorboard')).Reload()
    curves = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()['scalars']}
    return curves, [(name, len(events.Images(name))) for name in events.Tags()['images']]


def compiled_and_eager(make: Callable[[], Any], batch: Callable[[], tuple], before: int = 0) -> tuple[Any, Any]:
    """A compiled and an eager task, whose results and gradients after a step from the same random state were equal.

    Args:
        make: Makes a task.
        batch: Makes the batch.
        before: Forwards before the step.
    """
    tasks, results = (make().train(), make().train()), []
    tasks[0].compile(backend='aot_eager', fullgraph=True)
    for task in tasks:
        torch.manual_seed(3)
        for _ in range(before):
            task(*batch())
        result = task(*batch())
        result['loss'].backward()
        results.append((result, [p.grad for p in task.trainable_module.parameters()]))
    torch.testing.assert_close(*results)
    return tasks


@contextmanager
def one_rank(folder: Path, backend: str = 'gloo') -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(backend, init_method=f'file://{folder}/store', rank=0, world_size=1)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

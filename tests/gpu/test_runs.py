"""Whole runs on the device, by the command line."""

import math
import signal

import pytest
import safetensors.torch
import torch
from conftest import DEVICE
from helpers import PAIR, load, make_trainer, one_rank, run, stopped, summary
from timm.utils import load_checkpoint_metadata

from timm_pe.process import runtime as runtimes
from timm_pe.process.signals import Interrupts

DIGITS = ['--dataset', 'sklearn/digits', '--img-size', '32', '-b', '64', '-j', '2', '--device', DEVICE]
DIGITS += ['--model', 'test_resnet', '--teacher', 'test_resnet', '--no-teacher-pretrained', '--no-teacher-eval']
DIGITS += [
    '--epochs',
    '3',
    '--warmup-epochs',
    '0',
    '--opt',
    'adamw',
    '--lr',
    '2e-3',
    '--log-interval',
    '4',
    '--seed',
    '1',
]
# a CPU takes minutes for float16
AMP = ['--amp', '--amp-dtype', 'bfloat16' if DEVICE == 'cpu' else 'float16']


def rows(folder) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items() if v} for row in summary(folder)]


def random_states(folder) -> list:
    return load_checkpoint_metadata(str(folder / 'last.pth.tar'))['saver']['run']['ranks']


def test_a_float16_run_that_is_stopped_and_resumed_ends_as_one_left_alone(
    tmp_path, monkeypatch, capsys, record_property
):
    argv = [*DIGITS, *AMP, '--model-ema', '--model-ema-decay', '0.9', '--nonfinite', 'skip', '--drop', '0.2']
    argv += ['--output', str(tmp_path)]
    run([*argv, '--experiment', 'alone'])
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, 'requested', lambda self: signal.SIGTERM * (calls.append(1) or len(calls) == 20))
        stopped([*argv, '--experiment', 'run', '--resume', 'auto'], capsys)
    run([*argv, '--experiment', 'run', '--resume', 'auto'])
    alone, resumed = rows(tmp_path / 'alone'), rows(tmp_path / 'run')
    assert [row['epoch'] for row in resumed] == [0, 1, 2]
    record_property('train_loss', [[row['train_loss'] for row in r] for r in (alone, resumed)])
    # not bit by bit: the device adds in another order from run to run
    assert [row['train_loss'] for row in resumed] == pytest.approx([row['train_loss'] for row in alone], rel=0.02)
    checkpoint = load(tmp_path / 'run' / 'last.pth.tar')
    if DEVICE != 'cpu':
        assert checkpoint['amp_scaler']['scale'] > 1
    states = [torch.utils._pytree.tree_leaves(random_states(tmp_path / name)) for name in ('alone', 'run')]
    # random states, not statistics
    of_torch = [[t for t in leaves if isinstance(t, torch.Tensor) and t.dtype == torch.uint8] for leaves in states]
    assert len(of_torch[0]) >= 1 + (DEVICE != 'cpu')
    assert all(torch.equal(a, b) for a, b in zip(*of_torch, strict=True))


@pytest.mark.skipif(DEVICE == 'cpu', reason='on a CPU it depends on its instructions')
@pytest.mark.parametrize(
    ('flags', 'precision'), [([], 'float32'), (AMP, 'AMP float16'), ([*AMP[:2], 'bfloat16'], 'bfloat16')]
)
def test_the_teacher_takes_the_precision_of_amp(flags, precision, on_device, monkeypatch):
    assert make_trainer([*on_device, *PAIR, *flags], monkeypatch).teachers[0].precision == precision


@pytest.mark.parametrize('mode', [[], ['--torchcompile-mode', 'reduce-overhead']], ids=['default', 'reduce-overhead'])
def test_a_compiled_run_has_the_losses_of_an_eager_one(mode, tmp_path, record_property):
    argv = [
        *DIGITS,
        '--amp',
        '--amp-dtype',
        'bfloat16',
        '--model-ema',
        '--model-ema-decay',
        '0.9',
        '--kd-loss-weight',
        '0.5',
    ]
    argv += ['--teacher-num-classes', '10', '--epochs', '2', '--output', str(tmp_path)]
    run([*argv, '--experiment', 'eager'])
    backend = [] if DEVICE != 'cpu' else ['aot_eager']
    run([*argv, '--experiment', 'compiled', '--torchcompile', *backend, *(mode if DEVICE != 'cpu' else [])])
    eager, compiled = rows(tmp_path / 'eager'), rows(tmp_path / 'compiled')
    record_property('train_loss', [[row['train_loss'] for row in r] for r in (eager, compiled)])
    assert [row['train_loss'] for row in compiled] == pytest.approx([row['train_loss'] for row in eager], rel=0.03)
    student = safetensors.torch.load_file(tmp_path / 'compiled' / 'student.safetensors')
    assert not any(name.startswith('_orig_mod') for name in student)


@pytest.fixture
def one_of_several(tmp_path, monkeypatch):
    """A process group of this process alone, which a run takes for one of several ranks."""
    joined = {'device': DEVICE, 'distributed': True, 'global_rank': 0, 'local_rank': 0, 'world_size': 1}
    monkeypatch.setattr(runtimes, 'init_distributed_device_so', lambda name: joined)
    with one_rank(tmp_path, 'gloo' if DEVICE == 'cpu' else 'nccl'):
        yield


@pytest.mark.parametrize(
    'flags',
    [
        '--model-ema --model-ema-decay 0.9 --grad-accum-steps 2 --recovery-interval 2',
        '--sync-bn --torchcompile --amp --amp-dtype bfloat16',
    ],
)
def test_ranks_train_validate_and_save_through_their_process_group(flags, one_of_several, on_device, tmp_path):
    if DEVICE == 'cpu':
        flags = flags.replace('--sync-bn --torchcompile', '--torchcompile aot_eager')
    run([*on_device, *PAIR, *flags.split()])
    found = rows(tmp_path / 'run')
    assert [row['epoch'] for row in found] == [0, 1]
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert (tmp_path / 'run' / 'student.safetensors').exists()

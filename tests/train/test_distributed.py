"""./distributed_train.sh with two CPU processes (gloo)."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from helpers import run, summary, tensorboard_curves
from PIL import Image

import train_distill
from timm_pe.config.run_config import parse_config
from timm_pe.data.datasets import create_datasets
from timm_pe.data.epochs import plain_loader
from timm_pe.data.loaders import create_data
from timm_pe.process.runtime import setup_runtime

ROOT = Path(train_distill.__file__).parent
PAIR = ['--model', 'test_vit', '--teacher', 'test_resnet', '--no-teacher-pretrained']

# every process of the run imports this at start: it dumps what each rank has trained
DUMP = """
import os
if 'TIMM_PE_DUMP' in os.environ and 'RANK' in os.environ:
    import torch
    from timm.utils import unwrap_model
    from timm_pe.train.trainer import Trainer

    fit = Trainer.fit

    def dumping_fit(trainer):
        fit(trainer)
        state = unwrap_model(trainer.task.get_trainable_module()).state_dict()
        torch.save(state, os.path.join(os.environ['TIMM_PE_DUMP'], 'rank' + os.environ['RANK'] + '.pt'))

    Trainer.fit = dumping_fit
"""


def launch(argv, tmp_path, nproc=2, also=''):
    (tmp_path / 'sitecustomize.py').write_text(DUMP + also)
    env = {
        **os.environ,
        'TIMM_PE_DUMP': str(tmp_path),
        'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)]),
        'PYTHON': sys.executable,
        'OMP_NUM_THREADS': '1',
    }
    command = [str(ROOT / 'distributed_train.sh'), str(nproc), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)


def states(tmp_path):
    return [torch.load(tmp_path / f'rank{r}.pt', weights_only=True) for r in range(2)]


def _check_tensorboard(folder):
    """The first rank alone has written, and agreement with the teacher counts the images of both."""
    curves, _ = tensorboard_curves(folder)
    assert len(os.listdir(folder / 'tensorboard')) == 1
    assert len(curves['step/loss']) == len(summary(folder))
    agreeing = curves['eval_teacher_agreement'][-1][1] / 100 * 12  # of 12 images
    assert agreeing == pytest.approx(round(agreeing), abs=1e-4)


# a process that joins another; the default group waits two seconds, rank 0 is busy for four
BUSY = """
import datetime, logging, sys, time
import torch.distributed as dist
from timm_pe.config.run_config import parse_config
from timm_pe.process.runtime import on_primary, setup_runtime
from timm_pe.process.signals import Interrupts

logging.basicConfig(level=logging.INFO)
join = dist.init_process_group
dist.init_process_group = lambda **kwargs: join(**kwargs, timeout=datetime.timedelta(seconds=2))
runtime = setup_runtime(parse_config(['DATA', '--device', 'cpu']))
on_primary(runtime, lambda: time.sleep(4), 'a large file')
interrupts = Interrupts(runtime)
if runtime.is_primary:
    time.sleep(4)
assert interrupts.requested() == 0
if runtime.is_primary:
    time.sleep(4)
assert runtime.share(runtime.rank) == 0 and runtime.gather(runtime.rank) == [0, 1]
dist.destroy_process_group()
"""


def start_ranks(script):
    """Two processes on this machine, each a rank of a job; returns what they said and their exit codes."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    env = {**env, 'WORLD_SIZE': '2', 'OMP_NUM_THREADS': '1'}
    ranks = [
        subprocess.Popen(
            [sys.executable, '-c', script],
            env={**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    return said, [rank.returncode for rank in ranks]


@pytest.mark.long
def test_ranks_wait_for_rank_0_longer_than_their_devices_would():
    said, codes = start_ranks(BUSY)
    assert codes == [0, 0], said
    assert '2 ranks connect by gloo, network interface: ' in said[0]


@pytest.mark.long
def test_hosts_that_cannot_connect_say_so_and_wait_on_their_devices():
    refuse = """
def refuse(**kwargs):
    raise RuntimeError('connectFullMesh failed: Connection refused')

dist.new_group = refuse
"""
    script = BUSY.replace('runtime = setup', f'{refuse}runtime = setup').replace('time.sleep(4)', 'time.sleep(0)')
    said, codes = start_ranks(script)
    assert codes == [0, 0], said
    assert 'gloo (connectFullMesh failed: Connection refused)' in said[0]
    assert 'GLOO_SOCKET_IFNAME names the network interface to use' in said[0]


def test_objects_are_exchanged_by_the_runtime_alone():
    sources = {path: path.read_text() for path in (ROOT / 'timm_pe').rglob('*.py')}
    words = ('_object(', '_object_list(', 'dist.barrier(')
    assert {path.name for path, text in sources.items() if any(word in text for word in words)} == {'runtime.py'}


@pytest.mark.parametrize(
    'more', [[], ['--teacher', 'test_vit', 'test_convnext', '--teacher-weights', '2', '1', '--pe-map-weight', '1']]
)
def test_two_ranks_end_equal_and_average_their_gradients_as_one_process_with_the_double_batch(
    small_run, tmp_path, more
):
    # all 36 images in one step an epoch: which rank draws which image cannot matter
    settings = [*small_run, *PAIR, '--lr', '0.05', '--color-jitter', '0.4', '--distill-loss-weight', '5']
    settings += ['--teacher-num-classes', '3', '--teacher-dtype', 'float32', *more]
    out = launch([*settings, '-b', '18', '--log-tb'], tmp_path)
    assert out.returncode == 0, out.stderr
    if not more:  # of one teacher there is an agreement
        _check_tensorboard(tmp_path / 'run')
    first, second = states(tmp_path)
    assert any(k.startswith('projection.') for k in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert out.stderr.count('Epoch 2/2') == 1  # rank 0 alone talks
    assert 'global batch    36 = 18 x 2 ranks x 1 steps' in out.stderr

    train_distill.main([*settings, '-b', '36', '--experiment', 'one'])
    with torch.serialization.safe_globals([__import__('argparse').Namespace]):
        one = torch.load(tmp_path / 'one' / 'last.pth.tar', weights_only=True)
    expected = {f'student.{k}': v for k, v in one['state_dict'].items()}
    expected.update({f'projection.{k}': v for k, v in one['task_state']['projection'].items()})
    assert set(expected) == set(first)
    for name in expected:
        torch.testing.assert_close(first[name], expected[name], rtol=1e-3, atol=2e-6, msg=name)


def test_two_ranks_with_batch_norm_average_accumulation_and_workers(small_run, tmp_path):
    more = [
        '--model',
        'test_resnet',
        '--teacher',
        'test_vit',
        '--model-ema',
        '--grad-accum-steps',
        '2',
        '-j',
        '1',
        '-b',
        '4',
    ]
    out = launch([*small_run, *PAIR, *more], tmp_path)
    assert out.returncode == 0, out.stderr
    first, second = states(tmp_path)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.long
def test_the_average_begins_equal_on_all_ranks_at_any_epoch(small_run, tmp_path):
    dump_average = """
fit_and_dump = Trainer.fit if 'RANK' in os.environ else None

def fit_with_average(trainer):
    fit_and_dump(trainer)
    state = unwrap_model(trainer.task.get_trainable_module(ema=True)).state_dict()
    torch.save(state, os.path.join(os.environ['TIMM_PE_DUMP'], 'ema' + os.environ['RANK'] + '.pt'))

if fit_and_dump is not None:
    Trainer.fit = fit_with_average
"""
    argv = [*small_run, *PAIR, '--model-ema', '--model-ema-decay', '0.99', '--epochs', '3', '--start-epoch', '2']
    out = launch(argv, tmp_path, also=dump_average)
    assert out.returncode == 0, out.stderr
    first, second = (torch.load(tmp_path / f'ema{r}.pt', weights_only=True) for r in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.long
def test_repeated_augmentation_works_over_ranks(small_run, tmp_path):
    more = ['--model', 'test_resnet', '--teacher', 'test_vit', '--aug-repeats', '2', '-b', '4', '--mixup', '0.3']
    out = launch([*small_run, *PAIR, *more], tmp_path)
    assert out.returncode == 0, out.stderr
    first, second = states(tmp_path)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_a_rank_without_a_cuda_device_stops_in_place_of_training_on_the_cpu(small_run, tmp_path):
    argv = [word for word in small_run if word not in ('--device', 'cpu')]
    out = launch([*argv, *PAIR], tmp_path)
    assert out.returncode != 0
    assert "no CUDA device for this rank, 'cuda' needs one on each: --device cpu needs none" in out.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.long
def test_synchronized_batch_norm_on_the_cpu_is_refused(small_run, tmp_path):
    out = launch([*small_run, *PAIR, '--sync-bn'], tmp_path)
    assert out.returncode != 0
    assert out.stderr.count('train_distill: error: --sync-bn needs GPUs') == 1


@pytest.mark.long
def test_two_machines_meet_and_train_as_one(small_run, tmp_path):
    """Two torchrun agents on this machine, one process each, over a c10d rendezvous on loopback."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    (tmp_path / 'sitecustomize.py').write_text(DUMP)
    env = {
        **os.environ,
        'TIMM_PE_DUMP': str(tmp_path),
        'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)]),
        'PYTHON': sys.executable,
        'OMP_NUM_THREADS': '1',
        'NNODES': '2',
        'RDZV_ENDPOINT': f'127.0.0.1:{port}',
    }
    command = [str(ROOT / 'distributed_train.sh'), '1', *small_run, *PAIR, '-b', '18']
    nodes = [
        subprocess.Popen(command, env={**env, 'NODE_RANK': str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum('global batch    36 = 18 x 2 ranks x 1 steps' in s for s in said) == 1
    first, second = states(tmp_path)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_several_machines_need_a_meeting_point():
    env = {**os.environ, 'NNODES': '2'}
    command = [str(ROOT / 'distributed_train.sh'), '1']
    out = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert out.returncode == 2
    assert 'NNODES=2 needs RDZV_ENDPOINT=HOST:PORT' in out.stderr


def test_a_mistake_under_torchrun_is_said_once(small_run, tmp_path):
    out = launch([*small_run, '--model', 'test_vit', '--teacher', 'resnt34'], tmp_path)
    assert out.returncode != 0
    assert out.stderr.count('train_distill: error:') == 1
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('argv', [[], ['zero'], ['0', 'data']])
def test_the_launcher_says_how_it_is_used(argv):
    out = subprocess.run([str(ROOT / 'distributed_train.sh'), *argv], capture_output=True, text=True, check=False)
    assert out.returncode == 2
    assert out.stderr.startswith('usage: ')


def test_a_rank_that_fails_alone_says_so_and_ends_the_job(small_run, tmp_path):
    break_rank_1 = """
import os
if os.environ.get('RANK') == '1':
    from timm_pe.train.trainer import Trainer

    def fail(*args):
        raise MemoryError('this rank has no memory left')

    Trainer._backward = fail
"""
    start = time.monotonic()
    out = launch([*small_run, *PAIR], tmp_path, also=break_rank_1)
    assert out.returncode != 0
    said = [line for line in out.stderr.splitlines() if 'train_distill: error: [rank 1] out of memory' in line]
    assert len(said) == 1
    assert time.monotonic() - start < 120


@pytest.mark.long
def test_ranks_that_find_different_checkpoints_are_refused(small_run, tmp_path):
    lose_it = """
import os
if os.environ.get('RANK') == '1':
    import timm_pe.train.build as module
    module.find_resume = lambda config: ''
"""
    argv = [*small_run, *PAIR, '--resume', 'auto']
    assert launch(argv, tmp_path).returncode == 0
    out = launch([*argv, '--epochs', '3'], tmp_path, also=lose_it)
    assert out.returncode != 0
    assert "--resume: rank 0 found 'last.pth.tar' of epoch 2, rank 1 no checkpoint" in out.stderr
    assert len(summary(tmp_path / 'run')) == 2


@pytest.mark.long
def test_without_broadcast_buffers_projectors_still_start_equal_on_all_ranks(small_run, tmp_path):
    more = ['--pe-projector', 'orthogonal', '--pe-projectors', '1', '--no-ddp-bb']
    out = launch([*small_run, *PAIR, *more], tmp_path)
    assert out.returncode == 0, out.stderr
    first, second = states(tmp_path)
    bases = [name for name in first if name.endswith('.base')]
    assert bases
    for name in bases:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.long
def test_agreement_with_the_teacher_counts_each_image_once_where_ranks_share_an_odd_number(
    small_run, image_folder, tmp_path
):
    folder = tmp_path / 'images'
    shutil.copytree(image_folder, folder)
    first, *_, last = sorted((folder / 'val').rglob('*.png'))
    last.unlink()
    Image.new('RGB', (40, 40), 'white').save(first)  # the one that both ranks see: it makes their shares equal
    # the teacher always names class 0, the student does but for the white image
    told = """
import torch
import timm_pe.train.trackers as module

def telling(method, other):
    def told(self, forward):
        def named(input):
            white = (input.mean((1, 2, 3)) > 1).long()
            return torch.nn.functional.one_hot(other * white, 3).float() + 0 * forward(input)
        return method(self, named)
    return told

agreement = module.TeacherAgreement
agreement.record = telling(agreement.record, 0)
agreement.compare = telling(agreement.compare, 1)
"""
    argv = [str(folder), *small_run[1:], *PAIR, '--teacher-num-classes', '3', '--log-tb', '--mean', '0', '--std', '0.5']
    out = launch(argv, tmp_path, also=told)
    assert out.returncode == 0, out.stderr
    curves, _ = tensorboard_curves(tmp_path / 'run')
    assert [value for _, value in curves['eval_teacher_agreement']] == pytest.approx([100 * 10 / 11] * 2)


@pytest.mark.long
@pytest.mark.parametrize('task', ['classification', 'multilabel'])
def test_a_stream_is_validated_on_each_image_once_however_its_shards_are_shared(
    task, uneven_shards, small_run, tmp_path, capsys
):
    argv = [str(uneven_shards), *small_run[1:], '--dataset', 'wds/x', '--model', 'test_vit', '--epochs', '1', '-j', '2']
    argv += ['--task', 'multilabel', '--target-key', 'several'] if task == 'multilabel' else []
    out = launch(argv, tmp_path)
    assert out.returncode == 0, out.stderr
    trained = summary(tmp_path / 'run')[0]
    said = run(['--evaluate', str(tmp_path / 'run'), '--device', 'cpu', '-j', '0'], capsys)
    metric, name = ('map', 'mAP') if task == 'multilabel' else ('top1', 'top-1')
    assert f'{name} {float(trained[f"eval_{metric}"]):.3f} %' in said
    assert f'val loss {float(trained["eval_loss"]):.4f} on 12 images' in said


@pytest.mark.long
def test_ranks_that_find_other_classes_are_refused(small_run, tmp_path):
    other_order = """
import os
if os.environ.get('RANK') == '1':
    import timm_pe.data.folders as module
    module.natural_key = lambda name: [-ord(c) for c in os.path.basename(name)]
"""
    out = launch([*small_run, *PAIR], tmp_path, also=other_order)
    assert out.returncode != 0
    said = [line for line in out.stderr.splitlines() if 'train_distill: error:' in line]
    assert "rank 0 has class 'ant' as 0, rank 1 has it as 2" in said[0]
    assert not (tmp_path / 'run').exists()


@pytest.mark.long
@pytest.mark.parametrize('case', ['a file less', 'other images held out'])
def test_ranks_that_find_other_images_are_refused(case, small_run, image_folder, tmp_path):
    other_files = """
import os
if os.environ.get('RANK') == '1':
    import timm_pe.data.folders as module
    scan = module.scan_folder

    def fewer(*args):
        images, folders = scan(*args)
        return images[:-1], folders

    module.scan_folder = fewer
"""
    other_side = """
import os
if os.environ.get('RANK') == '1':
    import timm_pe.data.unlabeled as module
    seen, hashed = [], module._hash_blocks
    module._hash_blocks = lambda path: 0 if seen.append(path) or len(seen) % 2 else hashed(path)
"""
    argv, also = [*small_run, *PAIR], other_files
    if case != 'a file less':
        argv, also = ['--unlabeled', str(image_folder), *small_run[3:], *PAIR], other_side
    out = launch(argv, tmp_path, also=also)
    assert out.returncode != 0
    said = [line for line in out.stderr.splitlines() if 'train_distill: error:' in line]
    assert re.search(r'rank 0 has \d+ images of hash \w+, rank 1 \d+ of hash \w+: all machines must have', said[0]), (
        out.stderr
    )
    assert not (tmp_path / 'run').exists()


@pytest.mark.long
def test_ranks_wait_while_rank_0_looks_for_images_that_it_has_twice(small_run, image_folder, tmp_path):
    slow = """
import time, torch.distributed
from datetime import timedelta
start = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda *args, **more: start(*args, **{**more, 'timeout': timedelta(seconds=8)})
import timm_pe.data.knn_data as module
find = module.find_same

def slowly(*args):
    time.sleep(20)
    return find(*args)

module.find_same = slowly
"""
    others = tmp_path / 'others'
    others.mkdir()
    for path in (image_folder / 'val').rglob('*.png'):  # the same files are not trained on, their mirror images are
        Image.open(path).rotate(180).save(others / f'{path.parent.name}-{path.name}')
    argv = [*small_run, *PAIR, '--teacher-num-classes', '3', '--epochs', '1', '--unlabeled', str(others)]
    argv += ['--knn-data', str(image_folder)]
    out = launch(argv, tmp_path, also=slow)
    assert out.returncode == 0, out.stderr[-2000:]


def test_two_ranks_train_on_the_batches_of_one_process_with_the_double_batch_at_any_seed(small_run, tmp_path):
    note_indices = """
import os
if 'TIMM_PE_DUMP' in os.environ:
    import timm_pe.data.draws as module

    load = module.SeededDataset.__getitems__

    def noting(self, batch):
        with open(os.path.join(os.environ['TIMM_PE_DUMP'], 'read-' + os.environ.get('RANK', 'alone')), 'a') as f:
            print(*(draw.index for draw in batch), file=f)
        return load(self, batch)

    module.SeededDataset.__getitems__ = noting
"""
    argv = [*small_run, '--model', 'test_resnet', '--seed', '7', '-j', '0']
    out = launch([*argv, '-b', '4'], tmp_path, also=note_indices)
    assert out.returncode == 0, out.stderr
    ranks = [(tmp_path / f'read-{rank}').read_text().splitlines() for rank in range(2)]
    together = [sorted(f'{a} {b}'.split()) for a, b in zip(*ranks, strict=True)]

    args = parse_config([*argv, '-b', '8'])
    data = create_data(
        args, create_datasets(args), timm.create_model('test_resnet', num_classes=3), setup_runtime(args)
    )
    batches = plain_loader(data.train).batch_sampler
    alone = [sorted(str(draw.index) for draw in batch) for _ in range(2) for batch in batches]
    assert together == alone

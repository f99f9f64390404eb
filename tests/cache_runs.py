"""Runs with a teacher cache, and small caches without a run, for its tests."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import run, summary
from PIL import Image

from timm_pe import precompute
from timm_pe.config.run_config import parse_config
from timm_pe.data.datasets import create_datasets
from timm_pe.data.draws import IndexedTarget
from timm_pe.data.epochs import first_batch, set_epoch
from timm_pe.data.loaders import create_data
from timm_pe.method.teacher import TeacherOutput
from timm_pe.process.runtime import setup_runtime
from timm_pe.train.cache import TeacherCache
from timm_pe.train.evaluate import batch_to_device
from timm_pe.train.run_cache import open_teacher_caches
from timm_pe.train.run_teachers import create_run_teachers
from timm_pe.train.student import create_student
from timm_pe.train.teacher_precision import settle_precision

PAIR = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained']
IMAGES, WIDTH = 36, 64
PARTS = ('done', 'feature', 'feature_scale', 'source')


def stages(argv):
    """What a run has before its cache is opened."""
    args = parse_config(argv)
    runtime = setup_runtime(args)
    student = create_student(args)
    data = create_data(args, create_datasets(args, student.in_chans), student, runtime)
    teacher = create_run_teachers(args, data, runtime)[0]
    parts = SimpleNamespace(config=args, runtime=runtime, teachers=[teacher], checkpoint='')
    settle_precision(parts, {}, lambda: first_batch(data.train))
    return args, teacher, data, runtime


def open_caches(made):
    """Its cache, from the parts that `stages` makes."""
    args, teacher, data, runtime = made
    return open_teacher_caches(args, [teacher], data, runtime)


def never():
    pytest.fail('the teacher was asked again')


def assert_equal_to_float16(actual, expected):
    """Half a unit of float16's 11 bits, next to what another batch changes in float32."""
    torch.testing.assert_close(actual, expected.float(), rtol=2**-11 + 1e-5, atol=1e-6)


def small_cache(folder, manifest=None, views=2, images=10):
    return TeacherCache(folder, manifest or {'seed': 1}, images, {'feature': 4}, views, torch.device('cpu'))


def batch(index, view=0):
    return IndexedTarget(torch.zeros(len(index)), np.array(index), view)


def answers(index, view=0):
    """A teacher whose rows tell their image and view."""
    return TeacherOutput(torch.tensor(index).float()[:, None] + 100 * view + torch.tensor([0.0, 0.1, 0.2, 0.3]), None)


def opened(folder, **kwargs):
    cache = small_cache(folder, **kwargs)
    cache.look()
    if not cache.is_complete:
        cache.allocate()
    cache.open()
    return cache


def precompute_fails(argv, capsys, code):
    with pytest.raises(SystemExit) as e:
        precompute.main(argv)
    assert e.value.code == code
    return capsys.readouterr().err


def assert_replays_the_online_teacher(argv, views=2):
    args, teacher, data, runtime = stages(argv)
    cache = open_teacher_caches(args, [teacher], data, runtime)[0]
    assert cache.is_complete
    seen = {}
    for epoch in range(views + 1):
        set_epoch(data.train, epoch)
        for input, target in data.train:
            input, target = batch_to_device(args, runtime, input, target)
            assert target.view == epoch % views
            with runtime.autocast():
                online = teacher(input)
            cached = cache(target, never)
            assert_equal_to_float16(cached.feature, online.feature)
            for index, row in zip(target.index.tolist(), cached.feature, strict=True):
                seen.setdefault(index, {})[target.view] = row
    both = [rows for rows in seen.values() if len(rows) == views]
    assert len(both) > IMAGES // 2
    assert not any(torch.allclose(rows[0], rows[1], rtol=1e-2) for rows in both)  # views are told apart


@pytest.mark.parametrize(
    'more', [[], ['--no-prefetcher', '--reprob', '0.5'], ['--amp', '--amp-dtype', 'bfloat16', '--channels-last']]
)
def train(argv, tmp_path, name, more=()):
    run([*argv, '--experiment', name, *more])
    return [(float(r['train_loss']), float(r['train_pe_loss'])) for r in summary(tmp_path / name)]


def files(folder):
    return {path.name: np.load(path) for path in sorted(folder.glob('*.npy'))}


def done(tmp_path, view):
    return np.load(tmp_path / 'cache' / f'view-{view}.done.npy')


def change(path, keep_size=False):
    """Another picture under the same name; `keep_size` makes the file as long as it was."""
    size = path.stat().st_size
    Image.new('RGB', (40, 40), 'red').save(path)
    if keep_size:
        path.write_bytes(path.read_bytes().ljust(size, b'\0'))  # a PNG may be followed by anything
        assert path.stat().st_size == size

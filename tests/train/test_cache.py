"""The cached teacher: what is replayed is what the online teacher says, and anything else is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from helpers import refused, run, summary
from PIL import Image
from timm.data.loader import fast_collate

import train_distill
from timm_pe import UsageError, precompute
from timm_pe.config.run_config import parse_config
from timm_pe.data.datasets import create_datasets
from timm_pe.data.draws import Batch, Draw, IndexedTarget, SeededCollate
from timm_pe.data.epochs import first_batch, set_epoch
from timm_pe.data.fingerprint import hash_names
from timm_pe.data.loaders import create_data
from timm_pe.method.teacher import Teacher, TeacherOutput
from timm_pe.method.weight_files import hash_tensors
from timm_pe.process.runtime import setup_runtime
from timm_pe.train import cache as cache_module
from timm_pe.train import run_cache
from timm_pe.train.cache import TeacherCache
from timm_pe.train.evaluate import batch_to_device
from timm_pe.train.meters import LossMeter
from timm_pe.train.run_cache import allocate_caches, open_teacher_caches
from timm_pe.train.run_task import create_run_teachers
from timm_pe.train.student import create_student
from timm_pe.train.teacher_precision import settle_precision
from timm_pe.train.trainer import Trainer

ROOT = Path(train_distill.__file__).parent
PAIR = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained']
IMAGES, WIDTH = 36, 64


@pytest.fixture
def argv(small_run, tmp_path) -> list[str]:
    """A run with a cache of two views, in `tmp_path / 'cache'`."""
    return [*small_run, *PAIR, '--teacher-cache', str(tmp_path / 'cache'), '--teacher-cache-views', '2']


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Batch size of each forward of the teacher."""
    sizes, forward = [], Teacher.forward

    def counting(self, x):
        sizes.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Teacher, 'forward', counting)
    return sizes


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


# Replay ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'more', [[], ['--no-prefetcher', '--reprob', '0.5'], ['--amp', '--amp-dtype', 'bfloat16', '--channels-last']]
)
def test_what_is_replayed_equals_the_online_teacher_with_any_number_of_workers_and_after_a_restart(argv, more):
    precompute.main([*argv, *more, '-j', '1'])
    for workers in ('0', '1', '2'):
        assert_replays_the_online_teacher([*argv, *more, '-j', workers])


def test_a_complete_cache_trains_without_a_single_forward_of_the_teacher(argv, forwards, capsys):
    precompute.main(argv)
    assert sum(forwards) == 2 * IMAGES  # all images of both views, those that an epoch of training drops too
    forwards.clear()
    said = run([*argv, '--epochs', '3'], capsys)
    assert not forwards
    assert f'teacher cache   2 views x 36 images x {WIDTH} float16, 10.2 kB in ' in said
    assert '72 of 72 rows there' in said
    assert "--pe-act auto is 'none'" in said


def train(argv, tmp_path, name, more=()):
    run([*argv, '--experiment', name, *more])
    return [(float(r['train_loss']), float(r['train_pe_loss'])) for r in summary(tmp_path / name)]


def test_losses_are_those_of_the_online_teacher_when_there_is_a_view_for_each_epoch(
    small_run, argv, tmp_path, monkeypatch
):
    lr = ['--lr', '1e-4']  # else training blows any difference up
    online = train([*small_run, *PAIR], tmp_path, 'online', lr)
    filled = train(argv, tmp_path, 'filled', lr)
    assert train(argv, tmp_path, 'replayed', lr) == filled  # what is computed now is rounded as what is read later
    np.testing.assert_allclose(filled, online, rtol=1e-5)
    other = train([*argv, '--teacher-cache-views', '1'], tmp_path, 'other', lr)
    assert abs(other[1][1] / online[1][1] - 1) > 1e-4

    forward = Teacher.forward
    monkeypatch.setattr(Teacher, 'forward', lambda s, x: TeacherOutput(forward(s, x).feature.half().float(), None))
    assert train([*small_run, *PAIR], tmp_path, 'rounded', lr) == filled  # the rounding is all there is


def test_validation_of_the_teacher_is_online_with_a_complete_cache_too(argv, capsys):
    argv = [*argv, '--teacher-num-classes', '3']
    precompute.main(argv)
    assert 'Teacher: top-1' in run(argv, capsys)


def test_an_epoch_trains_on_the_view_of_its_number_modulo_k_in_an_order_of_its_own(argv):
    _, _, data, _ = stages([*argv, '-b', '36'])
    epochs = []
    for epoch in range(4):
        set_epoch(data.train, epoch)
        ((input, target),) = [(x.clone(), y) for x, y in data.train]
        epochs.append((target.view, target.index, input[np.argsort(target.index)]))
    assert [view for view, _, _ in epochs] == [0, 1, 0, 1]
    assert len({tuple(index) for _, index, _ in epochs}) == 4
    assert torch.equal(epochs[0][2], epochs[2][2])
    assert torch.equal(epochs[1][2], epochs[3][2])
    assert not torch.equal(epochs[0][2], epochs[1][2])


def test_as_many_views_as_epochs_are_the_pixels_of_a_run_without_a_cache(small_run, argv):
    plain, cached = (stages(a)[2] for a in ([*small_run, *PAIR], argv))
    for epoch in range(2):
        for data in (plain, cached):
            set_epoch(data.train, epoch)
        for (x, y), (x_cached, y_cached) in zip(plain.train, cached.train, strict=True):
            assert torch.equal(x, x_cached)
            assert torch.equal(y, y_cached.target)


def files(folder):
    return {path.name: np.load(path) for path in sorted(folder.glob('*.npy'))}


PARTS = ('done', 'feature', 'feature_scale', 'source')


def test_filling_while_training_gives_what_precompute_gives(argv, tmp_path, forwards):
    run([*argv, '--epochs', '12'])
    trained = files(tmp_path / 'cache')
    assert trained['view-0.done.npy'].all()  # by then each image has been in a batch of each view
    assert sum(forwards) < 12 * IMAGES / 2
    precompute.main([*argv, '--teacher-cache', str(tmp_path / 'ahead')])
    ahead = files(tmp_path / 'ahead')
    assert (
        set(trained)
        == set(ahead)
        == {
            'images.npy',
            *(f'view-{v}.{part}.npy' for v in range(2) for part in PARTS),
        }
    )
    for name in ahead:
        np.testing.assert_allclose(trained[name], ahead[name], rtol=2**-10, atol=1e-6)


def test_logits_are_kept_where_a_loss_compares_them_and_nothing_that_no_loss_reads(argv, tmp_path, small_run):
    kd = ['--teacher-num-classes', '3', '--kd-loss-weight', '1', '--lr', '1e-4']
    online = train([*small_run, *PAIR], tmp_path, 'online', kd)
    for name in ('filled', 'replayed'):
        np.testing.assert_allclose(train(argv, tmp_path, name, kd), online, rtol=1e-5)
    assert files(tmp_path / 'cache')['view-0.logits.npy'].shape == (IMAGES, 3)
    precompute.main([*argv, '--teacher-cache', str(tmp_path / 'logits'), '--pe-target', 'logits'])
    assert [p.name for p in sorted((tmp_path / 'logits').glob('view-0*'))] == [
        f'view-0.{part}.npy' for part in ('done', 'logits', 'logits_scale', 'source')
    ]
    assert train([*argv, '--teacher-cache', str(tmp_path / 'logits'), '--pe-target', 'logits'], tmp_path, 'kd1proj')


def test_a_step_with_a_cache_reads_nothing_from_the_device(small_run, argv, monkeypatch):
    precompute.main(argv)
    reads = {}

    def count(name):
        original = getattr(torch.Tensor, name)

        def counting(self, *args):
            reads['all'] += 1
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counting)

    def measure(owner, name, what):
        original = getattr(owner, name)

        def measuring(*args):
            before = reads['all']
            try:
                return original(*args)
            finally:
                reads[what] += reads['all'] - before

        monkeypatch.setattr(owner, name, measuring)

    measure(TeacherCache, '__call__', 'cache')
    measure(TeacherCache, '_take', 'host')  # its buffer is the host's
    measure(LossMeter, 'read', 'meter')
    measure(Trainer, 'train_epoch', 'epochs')
    for name in ('item', 'tolist', '__bool__', '__float__', '__int__', 'cpu', 'numpy'):
        count(name)
    others = []
    for command in ([*small_run, *PAIR], argv):
        reads.update(all=0, cache=0, host=0, meter=0, epochs=0)
        run([*command, '-j', '1', '--log-interval', '100', '--pe-act', 'none'])  # images are drawn in another process
        assert reads['cache'] == reads['host']
        assert reads['meter'] > 0
        others.append(reads['epochs'] - reads['meter'] - reads['host'])
    assert max(others) < 8  # not one a step: the loader's, once an epoch


# Files ----------------------------------------------------------------------------------------------------------------


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


def test_sizes_are_said_before_anything_is_written_and_a_full_disk_leaves_nothing(argv, tmp_path, capsys, monkeypatch):
    reserve, calls = os.posix_fallocate, []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, 'No space left on device')
        reserve(*args)

    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(SystemExit) as e:
        run(argv)
    err = capsys.readouterr().err
    assert e.value.code == 2
    said, error = err.splitlines()[-2:]
    where = f'{tmp_path / "cache"}, 0 of 72 rows there.'
    assert said.endswith(f'Teacher cache: 2 views x 36 images x 64 float16, 10.2 kB in {where}')
    assert error.startswith("train_distill: error: --teacher-cache: cannot make the files of 10.2 kB in '")
    assert 'No space left on device' in error
    assert 'take fewer --teacher-cache-views' in error
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, 'posix_fallocate', reserve)
    run(argv)


def test_a_full_disk_leaves_the_views_that_were_there_before(tmp_path, monkeypatch):
    cache = opened(tmp_path, views=1)
    cache(batch([3]), lambda: answers([3]))
    cache.flush()

    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(UsageError, match='No space left'):
        opened(tmp_path, views=2)
    assert sorted(p.name for p in tmp_path.glob('[!.]*')) == [
        'manifest.json',
        *(f'view-0.{part}.npy' for part in ('done', 'feature', 'feature_scale')),
    ]
    cache = small_cache(tmp_path, views=1)
    cache.look()
    assert cache.counts == [1]


def test_all_blocks_of_the_files_are_there_from_the_start(argv, tmp_path):
    cache = opened(tmp_path / 'cache', images=100_000)
    for path in (tmp_path / 'cache').glob('view-*'):
        assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert cache.num_bytes == 2 * 100_000 * (4 * 2 + 4 + 1)  # with scale and flag


def test_what_a_batch_finds_missing_is_computed_once_and_only_that_is_written(tmp_path):
    cache = opened(tmp_path)
    asked = []

    def ask(index, view=0, **kwargs):
        def compute():
            asked.append((index, view))
            return answers(index, view)

        return cache(batch(index, view), kwargs.get('compute', compute)).feature

    ask([1, 5, 2])
    ask([1, 5, 2], view=1)
    cache.flush()
    torch.testing.assert_close(ask([2, 1]), answers([2, 1]).feature, rtol=2**-11, atol=0)
    torch.testing.assert_close(ask([2, 1], view=1), answers([2, 1], 1).feature, rtol=2**-11, atol=0)
    assert asked == [([1, 5, 2], 0), ([1, 5, 2], 1)]
    wrong = TeacherOutput(torch.tensor([[7.0] * 4, [8.0] * 4]), None)
    result = ask([5, 6], compute=lambda: wrong)  # only the row of 6 is taken
    torch.testing.assert_close(result[0], answers([5]).feature[0], rtol=2**-11, atol=0)
    assert (result[1] == 8).all()
    cache.flush()
    assert cache.missing(0).tolist() == [0, 3, 4, 7, 8, 9]
    assert cache.missing(1).tolist() == [0, 3, 4, 6, 7, 8, 9]


def test_a_flag_is_set_only_after_its_row_is_on_the_disk(tmp_path, monkeypatch):
    cache = opened(tmp_path)
    flushed, flush = [], np.memmap.flush

    def watch(array):
        flushed.append((array.dtype.name, int(np.load(tmp_path / 'view-0.done.npy').sum())))
        flush(array)

    monkeypatch.setattr(np.memmap, 'flush', watch)
    cache(batch([1, 2]), lambda: answers([1, 2]))
    assert np.load(tmp_path / 'view-0.done.npy').sum() == 0  # a kill now loses the rows, and says so
    cache.flush()
    assert flushed == [('float16', 0), ('float32', 0), ('uint8', 2)]


def test_rows_are_flushed_by_the_clock_too(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, '_FLUSH_EVERY_S', 0.0)
    cache = opened(tmp_path)
    cache(batch([1, 2]), lambda: answers([1, 2]))
    assert np.load(tmp_path / 'view-0.done.npy').sum() == 2


def test_a_cache_that_was_stopped_in_the_middle_goes_on(argv, tmp_path, forwards, monkeypatch, capsys):
    call = TeacherCache.__call__

    def stopping(self, target, compute):
        if sum(forwards) >= 16:
            raise KeyboardInterrupt
        return call(self, target, compute)

    monkeypatch.setattr(TeacherCache, '__call__', stopping)
    with pytest.raises(SystemExit):
        precompute.main(argv)
    monkeypatch.setattr(TeacherCache, '__call__', call)
    assert np.load(tmp_path / 'cache' / 'view-0.done.npy').sum() == 16
    done = np.load(tmp_path / 'cache' / 'view-0.done.npy', mmap_mode='r+')
    done[:4] = 0
    done.flush()
    np.load(tmp_path / 'cache' / 'view-0.feature.npy', mmap_mode='r+')[:4] = -1  # rows half written are written again
    forwards.clear()
    capsys.readouterr()
    precompute.main(argv)
    said = capsys.readouterr().err
    assert sum(forwards) == 2 * IMAGES - 12
    assert said.splitlines()[-1].endswith('72 of 72 rows there.')
    assert_replays_the_online_teacher(argv)
    forwards.clear()
    precompute.main(argv)
    assert not forwards


def test_precompute_trains_nothing_and_makes_no_run_folder(argv, tmp_path):
    precompute.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ['cache']


def test_a_kill_while_the_files_are_made_leaves_a_folder_that_resumes(tmp_path, monkeypatch):
    create, calls = cache_module.create_array, []

    def killed(path, *args):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        create(path, *args)

    monkeypatch.setattr(cache_module, 'create_array', killed)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / 'cache')
    monkeypatch.setattr(cache_module, 'create_array', create)
    cache = opened(tmp_path / 'cache')
    assert cache.counts == [0, 0]
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / '.manifest.json.tmp').write_text('{"se')
    opened(tmp_path / 'empty')


def test_flags_never_outlive_their_rows(tmp_path, monkeypatch):
    cache = opened(tmp_path)
    cache(batch([1, 2]), lambda: answers([1, 2]))
    cache.flush()
    (tmp_path / 'view-0.feature.npy').unlink()
    create = cache_module.create_array

    def killed(path, *args):
        create(path, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module, 'create_array', killed)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    cache = small_cache(tmp_path)
    cache.look()
    assert cache.counts == [0, 0]
    monkeypatch.setattr(cache_module, 'create_array', create)
    assert len(opened(tmp_path).missing(0)) == 10


def test_a_cache_may_get_more_views_later_and_a_run_may_use_fewer(tmp_path):
    cache = opened(tmp_path, views=1)
    cache(batch(range(10)), lambda: answers(range(10)))
    cache.flush()
    assert opened(tmp_path, views=3).counts == [10, 0, 0]
    assert opened(tmp_path, views=1).is_complete


KEPT = {'feature width': 4, 'logits': 4, 'map': [1, 2, 2]}


@pytest.mark.parametrize('beyond', ['logits', 'map'])
def test_rows_that_keep_more_than_a_run_computes_are_read_where_all_are_there_and_never_added_to(tmp_path, beyond):
    more = {'feature width': 4, beyond: KEPT[beyond]}
    widths = {'feature': 4, beyond: 4}
    full = TeacherCache(tmp_path, more, 10, widths, 1, torch.device('cpu'), map_shape=(1, 2, 2))
    full.look()
    full.allocate()
    full.open()
    first = answers(range(5)).feature
    as_told = {
        'feature': first,
        'logits': None,
        'map': None,
        beyond: first.reshape(5, 1, 2, 2) if beyond == 'map' else first,
    }
    full(batch(range(5)), lambda: TeacherOutput(**as_told))
    full.flush()
    # a row that this run added would have zeros where the other run expects its map
    with pytest.raises(UsageError, match=rf'keeps {beyond}s? too, which this run does not compute, and 5 of 10 rows'):
        opened(tmp_path, manifest={'feature width': 4}, views=1)
    full(batch(range(5, 10)), lambda: TeacherOutput(**as_told))
    full.flush()
    fewer = opened(tmp_path, manifest={'feature width': 4}, views=1)
    told = fewer(batch(range(5)), never)
    torch.testing.assert_close(told.feature, first, rtol=2**-10, atol=0)
    assert told.logits is told.map is None
    with pytest.raises(UsageError, match='5 rows|10 of 20 rows'):
        opened(tmp_path, manifest={'feature width': 4}, views=2)
    with pytest.raises(UsageError, match='feature width 4 there and 5 here'):
        opened(tmp_path, manifest={'feature width': 5}, views=1)


def test_a_run_without_maps_adds_no_rows_to_a_cache_with_maps(argv, tmp_path, capsys):
    maps = [*argv, '--pe-map-weight', '1', '--teacher-cache-views', '1']
    run([*maps, '--epochs', '1', '-b', str(IMAGES // 2 + 1)])  # half of the images, an incomplete batch is dropped
    with pytest.raises(SystemExit):
        run([*argv, '--teacher-cache-views', '1', '--epochs', '1'])
    assert 'keeps maps too, which this run does not compute' in capsys.readouterr().err
    precompute.main(maps)
    run([*argv, '--teacher-cache-views', '1', '--epochs', '1'])
    assert files(tmp_path / 'cache')['view-0.map.npy'].any(1).all()


def test_a_complete_cache_is_opened_to_read_alone(tmp_path):
    cache = opened(tmp_path, views=1)
    cache(batch(range(10)), lambda: answers(range(10)))
    cache.flush()
    assert opened(tmp_path, views=1)._open(0).done.mode == 'r'


def test_rows_that_another_run_clears_end_the_one_that_reads_with_one_line(tmp_path):
    cache = opened(tmp_path, views=1)
    cache(batch(range(10)), lambda: answers(range(10)))
    cache.flush()
    reading = opened(tmp_path, views=1)
    cache._open(0).done[3] = 0
    cache._open(0).done.flush()
    with pytest.raises(UsageError, match='another run has cleared 1 rows of'):
        reading(batch(range(10)), lambda: answers(range(10)))


def test_nothing_is_written_before_the_files_are_allocated(tmp_path):
    cache = small_cache(tmp_path / 'cache')
    cache.look()
    result = cache(batch([1]), lambda: answers([1])).feature
    assert torch.equal(result, answers([1]).feature.half().float())  # as it will be read
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('scale', [1e-38, 1e-12, 1e-6, 1.0, 1e6, 1e36])
def test_rows_of_any_scale_are_replayed_to_the_relative_precision_of_float16(tmp_path, scale):
    torch.manual_seed(0)
    widths = {'feature': 4, 'logits': 3}
    rows = [torch.randn(10, width) * scale for width in widths.values()]
    rows[0][3] *= 1e-3  # scales differ between rows
    rows[0][7] = 0
    cache = TeacherCache(tmp_path, {'seed': 1}, 10, widths, 1, torch.device('cpu'))
    cache.allocate()
    cache.open()
    for compute in (lambda: TeacherOutput(*rows), never):  # computed now, and read
        said = cache(batch(range(10)), compute)
        cache.flush()
        for cached, online in zip(said[:2], rows, strict=True):
            torch.testing.assert_close(cached, online, rtol=2**-11, atol=0)


def test_features_of_any_scale_train_as_online(small_run, argv, tmp_path, monkeypatch):
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, 'forward', lambda s, x: TeacherOutput(forward(s, x).feature * 1e-7, None))
    more = ['--lr', '1e-4', '--pe-act', 'none']
    np.testing.assert_allclose(
        train(argv, tmp_path, 'cached', more), train([*small_run, *PAIR], tmp_path, 'online', more), rtol=1e-5
    )


@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_what_is_not_finite_is_an_error_and_never_kept(tmp_path, value):
    cache = opened(tmp_path)
    with pytest.raises(UsageError, match="the teacher's feature is not finite, .* --teacher-dtype"):
        cache(batch([1]), lambda: TeacherOutput(torch.tensor([[1.0, value, 0.0, 0.0]]), None))
    cache.flush()
    assert len(cache.missing(0)) == 10
    assert not np.load(tmp_path / 'view-0.feature.npy').any()


def test_a_cache_of_an_earlier_version_is_refused_as_one(argv, tmp_path, capsys):
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / 'manifest.json').write_text(json.dumps({'format': 1, 'seed': 7}))
    error = refused(argv, capsys)
    assert error.endswith(
        'was made by another version of timm_pe (format 1, this one: 3): give another folder, or delete it'
    )


# Images that change or cannot be read -----------------------------------------------------------------------------------


@pytest.fixture
def images(image_folder, argv, tmp_path):
    """A copy of the images, which `argv` reads from here on."""
    folder = tmp_path / 'images'
    shutil.copytree(image_folder, folder)
    argv[0] = str(folder)
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def precompute_fails(argv, capsys, code):
    with pytest.raises(SystemExit) as e:
        precompute.main(argv)
    assert e.value.code == code
    return capsys.readouterr().err


@pytest.mark.parametrize('workers', ['0', '2'])
def test_the_row_of_an_image_that_cannot_be_read_is_left_open_until_it_can(images, argv, tmp_path, workers, capsys):
    broken = images / 'train' / 'bee' / '4.png'
    whole = broken.read_bytes()
    truncate(broken)
    precompute.main([*argv, '-j', workers])
    said = capsys.readouterr().err
    assert (
        said.count("1 of 36 images could not be read and were replaced by other images, the first is 'bee/4.png'") == 1
    )  # once, though each view draws it
    assert '70 of 72 rows there' in said
    for view in range(2):
        assert np.flatnonzero(np.load(tmp_path / 'cache' / f'view-{view}.done.npy') == 0).tolist() == [16]
    broken.write_bytes(whole)
    precompute.main([*argv, '-j', workers])
    assert_replays_the_online_teacher(argv)


def test_training_with_an_image_that_cannot_be_read_is_that_of_the_online_teacher(images, argv, tmp_path, small_run):
    truncate(images / 'train' / 'bee' / '4.png')
    small_run[0] = argv[0]
    lr = ['--lr', '1e-5', '-b', '9']  # each image once an epoch
    online = train([*small_run, *PAIR], tmp_path, 'online', lr)
    for name in ('filled', 'replayed'):
        np.testing.assert_allclose(train(argv, tmp_path, name, lr), online, rtol=1e-5)
        for view in range(2):
            assert np.flatnonzero(np.load(tmp_path / 'cache' / f'view-{view}.done.npy') == 0).tolist() == [16]


def test_an_image_that_breaks_under_a_complete_cache_gets_what_the_teacher_says_of_its_substitute(
    images, argv, tmp_path, small_run, monkeypatch
):
    precompute.main(argv)
    truncate(images / 'train' / 'bee' / '4.png')
    small_run[0] = argv[0]
    lr = ['--lr', '1e-5', '-b', '9']
    online = train([*small_run, *PAIR], tmp_path, 'online', lr)
    np.testing.assert_allclose(train(argv, tmp_path, 'cached', lr), online, rtol=1e-5)


def test_more_than_a_tenth_unreadable_ends_precompute_as_it_ends_training(images, argv, tmp_path, capsys):
    for path in images.glob('train/*/[0369].png'):
        truncate(path)
    said = precompute_fails(argv, capsys, code=1)
    assert (
        "error: 12 of 36 images cannot be read, the first is 'ant/0.png': are the disk and the files in order?" in said
    )
    assert np.load(tmp_path / 'cache' / 'view-0.done.npy').sum() == 24  # what was computed is kept
    assert '12 of 36 images cannot be read' in precompute_fails(argv, capsys, code=1)  # and asked for again


def done(tmp_path, view):
    return np.load(tmp_path / 'cache' / f'view-{view}.done.npy')


def change(path, keep_size=False):
    """Another picture under the same name; `keep_size` makes the file as long as it was."""
    size = path.stat().st_size
    Image.new('RGB', (40, 40), 'red').save(path)
    if keep_size:
        path.write_bytes(path.read_bytes().ljust(size, b'\0'))  # a PNG may be followed by anything
        assert path.stat().st_size == size


@pytest.mark.parametrize('keep_size', [False, True])
@pytest.mark.parametrize('name', ['ant/0.png', 'bee/4.png'])  # one of those whose pixels the manifest has, and another
def test_an_image_that_changed_is_named_once_and_its_rows_alone_are_computed_again(
    images, argv, tmp_path, forwards, capsys, name, keep_size
):
    precompute.main(argv)
    before = files(tmp_path / 'cache')
    change(images / 'train' / name, keep_size)
    forwards.clear()
    capsys.readouterr()
    precompute.main([*argv, '--teacher-cache-views', '1'])  # the other view is as stale as this one
    said = capsys.readouterr().err
    path = images / 'train' / name
    assert (
        said.count(f"1 of 36 images has changed since its rows were computed, '{path}': they are computed again") == 1
    )
    assert sum(forwards) == 1
    index = 0 if name == 'ant/0.png' else 16
    assert done(tmp_path, 0).all()
    assert np.flatnonzero(done(tmp_path, 1) == 0).tolist() == [index]
    precompute.main(argv)
    assert ' changed since' not in capsys.readouterr().err
    assert sum(forwards) == 2
    assert_replays_the_online_teacher(argv)
    after = files(tmp_path / 'cache')
    for view in range(2):
        rows = f'view-{view}.feature.npy'
        assert np.flatnonzero((before[rows] != after[rows]).any(1)).tolist() == [index]


def test_training_sees_a_changed_image_as_precompute_does(images, argv, tmp_path, forwards, capsys):
    precompute.main(argv)
    for name in ('ant/0.png', 'cat/7.png'):
        change(images / 'train' / name)
    forwards.clear()
    capsys.readouterr()
    said = run([*argv, '-b', '9'], capsys)
    assert (
        f"2 of 36 images have changed since their rows were computed, the first is '{images}/train/ant/0.png'" in said
    )
    assert '68 of 72 rows there' in said
    assert done(tmp_path, 0).all()
    assert done(tmp_path, 1).all()
    assert_replays_the_online_teacher(argv)


def test_a_copy_of_the_images_with_other_times_keeps_all_rows_and_is_compared_once(
    images, argv, tmp_path, forwards, capsys, monkeypatch
):
    precompute.main(argv)
    for path in images.rglob('*.png'):
        os.utime(path, (1, 1))
    forwards.clear()
    compared, hash_files = [], cache_module.hash_files
    monkeypatch.setattr(cache_module, 'hash_files', lambda paths: compared.extend(paths) or hash_files(paths))
    for command in (precompute.main, run):
        command(argv)
        assert ' changed since' not in capsys.readouterr().err
    assert len(compared) == 36
    assert not forwards


def test_without_what_is_known_of_the_files_all_of_them_are_compared(images, argv, tmp_path, forwards, capsys):
    precompute.main(argv)
    (tmp_path / 'cache' / 'images.npy').unlink()
    change(images / 'train' / 'bee' / '4.png')
    forwards.clear()
    precompute.main(argv)
    assert '1 of 36 images has changed' in capsys.readouterr().err
    assert sum(forwards) == 2


def test_an_image_that_changes_while_the_cache_is_filled_is_known_by_what_was_read(images, argv, tmp_path, capsys):
    made = stages(argv)
    cache = open_caches(made)[0]
    allocate_caches([cache], [made[1]], made[3])
    precompute.fill_view(made[0], [cache], [made[1]], *made[2:], view=0)
    change(images / 'train' / 'bee' / '4.png')  # between the views
    precompute.fill_view(made[0], [cache], [made[1]], *made[2:], view=1)
    assert (done(tmp_path, 0).all(), done(tmp_path, 1).all()) == (True, True)
    cache = open_caches(made)[0]
    assert {view: rows.tolist() for view, rows in cache.stale.items()} == {0: [16]}
    precompute.main(argv)
    assert_replays_the_online_teacher(argv)


def test_a_run_of_fewer_views_leaves_it_known_that_another_view_is_stale(images, argv, tmp_path):
    path = images / 'train' / 'bee' / '4.png'
    original = path.read_bytes()
    made = stages(argv)
    cache = open_caches(made)[0]
    allocate_caches([cache], [made[1]], made[3])
    precompute.fill_view(made[0], [cache], [made[1]], *made[2:], view=0)
    change(path)
    precompute.fill_view(made[0], [cache], [made[1]], *made[2:], view=1)
    path.write_bytes(original)  # the row of view 0 is right again, that of view 1 is of the other picture
    os.utime(path, (2000, 2000))
    assert open_caches(stages([*argv, '--teacher-cache-views', '1']))[0].is_complete
    assert {view: rows.tolist() for view, rows in open_caches(made)[0].stale.items()} == {1: [16]}


def test_a_cache_that_is_switched_on_at_a_resume_is_named(argv, small_run, tmp_path, capsys):
    run([*small_run, *PAIR, '--epochs', '2', '--stop-epoch', '1'])
    assert 'no --teacher-cache then' in run([*argv, '--epochs', '2', '--resume', 'auto'], capsys)
    assert 'no --teacher-cache now' in run([*small_run, *PAIR, '--epochs', '3', '--resume', 'auto'], capsys)


def test_a_changed_image_under_a_cache_that_cannot_be_written_is_refused_by_name(images, argv, capsys, monkeypatch):
    precompute.main(argv)
    change(images / 'train' / 'bee' / '4.png')

    def read_only(*args):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(cache_module, 'locked', read_only)
    error = refused(argv, capsys)
    assert f"1 of 36 images has changed since its rows were computed, '{images}/train/bee/4.png'" in error
    assert 'cannot be written (Permission denied)' in error


def test_a_complete_cache_that_cannot_be_written_is_read_although_the_times_of_the_images_differ(
    images, argv, monkeypatch, forwards
):
    precompute.main(argv)
    os.utime(images / 'train' / 'bee' / '4.png', (1, 1))
    forwards.clear()

    def read_only(*args):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(cache_module, 'write_whole', read_only)
    run(argv)
    assert not forwards


def test_a_changed_image_is_refused_by_name_where_ranks_on_several_machines_only_read(
    images, argv, monkeypatch, capsys
):
    precompute.main(argv)
    change(images / 'train' / 'bee' / '4.png')
    made = stages(argv)
    monkeypatch.setattr(run_cache, '_on_several_machines', lambda runtime: True)
    with pytest.raises(UsageError, match=r'70 of 72 rows .*1 of 36 images has changed .*bee/4\.png'):
        open_caches(made)[0]


def test_images_in_a_tar_are_told_apart_by_names_and_some_pixels_alone(images, argv, tmp_path, capsys, forwards):
    argv[0] = str(tmp_path / 'images.tar')
    with tarfile.open(argv[0], 'w') as tar:
        tar.add(images / 'train', 'images')
    precompute.main(argv)
    assert json.loads((tmp_path / 'cache' / 'manifest.json').read_text())['image files'] is False
    assert not list((tmp_path / 'cache').glob('*source*'))
    forwards.clear()
    os.utime(argv[0], (1, 1))
    run(argv)
    assert not forwards


def test_pixels_that_come_out_otherwise_from_the_same_bytes_are_refused(argv, tmp_path, capsys):
    precompute.main(argv)
    path = tmp_path / 'cache' / 'manifest.json'
    manifest = json.loads(path.read_text())
    content, pixels = manifest['pixels'][2].split()
    manifest['pixels'][2] = f'{content} {pixels[::-1]}'
    path.write_text(json.dumps(manifest))
    assert f'pixels {content} {pixels[::-1]} there and {content} {pixels} here' in refused(argv, capsys)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_each_entry_of_the_manifest_that_differs_is_named_with_both_values(argv, tmp_path):
    precompute.main(argv)
    path = tmp_path / 'cache' / 'manifest.json'
    manifest = json.loads(path.read_text())
    assert len(manifest) == 22
    made = stages(argv)

    def message(**changes):
        path.write_text(json.dumps({k: v for k, v in {**manifest, **changes}.items() if v != 'missing'}))
        with pytest.raises(UsageError) as e:
            open_caches(made)[0]
        return str(e.value)

    assert 'made by another version of timm_pe (format 7, this one: 3)' in message(format=7)
    for name, value in manifest.items():
        if name == 'format':
            continue
        if name == 'logits':  # this run needs none, and all rows are there: more of them is no difference
            assert f'{name} None there and 0 here' in message(logits='missing')
            continue
        said = message(**{name: 'something else'})
        assert f'this one: {name} something else there and {value} here: give another folder, or delete it' in said
        assert f'{name} None there and {value} here' in message(**{name: 'missing'})
    assert 'images 7 there and 36 here; seed 1 there and 42 here' in message(seed=1, images=7)


@pytest.mark.parametrize(
    ('more', 'names'),
    [
        (['--seed', '43'], ['seed 42 there and 43 here', 'pixels', 'teacher weights']),  # its weights are random
        (['--hflip', '0'], ['transform RandomHorizontalFlip(p=0.5) there and nothing here', 'pixels']),
        (['--scale', '0.6', '1'], ['transform RandomResizedCropAndInterpolation(size=(32, 32), scale=(0.5, 1.0)']),
        (['--vflip', '0.5'], ['transform nothing there and RandomVerticalFlip(p=0.5) here']),
        (['--mean', '0.1', '0.2', '0.3'], ['image mean [0.5, 0.5, 0.5] there and [0.1, 0.2, 0.3] here']),
        (['--img-size', '48'], ['image size [3, 32, 32] there and [3, 48, 48] here', 'teacher input 3x32x32 there']),
        (['--teacher-input-size', '48'], ['teacher input 3x32x32 there and 3x48x48 here']),
        (['--teacher-mean', '0.4'], ['teacher mean [0.5, 0.5, 0.5] there and [0.4, 0.4, 0.4] here']),
        (['--teacher-std', '0.4'], ['teacher std']),
        (['--teacher-dtype', 'bfloat16'], ['teacher precision float32 there and bfloat16 here', 'teacher weights']),
        (['--model-dtype', 'bfloat16'], ['image precision float32 there and bfloat16 here']),
        (['--teacher', 'test_vit2'], ['teacher test_vit there and test_vit2 here', 'teacher weights']),
        (['--teacher-num-classes', '3', '--kd-loss-weight', '1'], ['logits 0 there and 3 here']),
        (['--no-prefetcher'], ['transform MaybePILToTensor()']),
    ],
    ids=lambda x: ' '.join(x) if x[0].startswith('--') else '',
)
def test_a_run_that_would_see_other_features_is_refused(argv, more, names, tmp_path, capsys, filled_cache):
    os.symlink(filled_cache, tmp_path / 'cache')
    error = refused([*argv, *more], capsys)
    for name in names:
        assert name in error
    assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def filled_cache(image_folder, tmp_path_factory):
    """The cache of the `argv` of this file."""
    root = tmp_path_factory.mktemp('filled')
    argv = [str(image_folder), '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu']
    argv += [*PAIR, '--scale', '0.5', '1.0', '--teacher-cache', str(root / 'cache'), '--teacher-cache-views', '2']
    precompute.main(argv)
    return root / 'cache'


def test_what_does_not_touch_the_features_may_change(argv, tmp_path, filled_cache, forwards):
    os.symlink(filled_cache, tmp_path / 'cache')
    more = ['--lr', '0.1', '-b', '12', '-j', '1', '--epochs', '1', '--smoothing', '0', '--drop', '0.1', '--model-ema']
    run([*argv, *more, '--pe-projectors', '2', '--teacher-cache-views', '1', '--model', 'test_resnet'])
    assert not forwards


def test_other_images_are_noticed_by_name(image_folder, argv, tmp_path, capsys):
    moved = tmp_path / 'moved'
    shutil.copytree(image_folder, moved)
    precompute.main(argv)
    argv = [str(moved), *argv[1:]]
    cache = tmp_path / 'cache'
    precompute.main(argv)  # the same images elsewhere
    first = moved / 'train' / 'ant' / '0.png'
    first.rename(first.with_name('00.png'))
    error = refused(argv, capsys)
    assert 'image names' in error
    first.with_name('00.png').rename(first)
    first.unlink()
    assert 'images 36 there and 35 here' in refused(argv, capsys)
    assert cache.is_dir()


def test_the_hash_of_weights_sees_names_values_and_precision():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet')
    before = hash_tensors(model.state_dict())
    assert before == hash_tensors(model.state_dict())
    assert before != hash_tensors(model.bfloat16().state_dict())
    other = timm.create_model('test_resnet')
    other.load_state_dict(model.state_dict())
    own = hash_tensors(other.state_dict())
    other.bn1.num_batches_tracked += 1
    assert own != hash_tensors(other.state_dict())


def test_data_without_file_names_is_told_apart_by_its_labels():
    sets = [SimpleNamespace(targets=t) for t in ([0, 1, 2], [0, 2, 1])]
    assert hash_names(sets[0]) != hash_names(sets[1])
    assert hash_names(sets[0]) == hash_names(SimpleNamespace(targets=[0, 1, 2]))
    hub = [SimpleNamespace(reader=SimpleNamespace(dataset=SimpleNamespace(_fingerprint=f))) for f in 'ab']
    assert hash_names(hub[0]) != hash_names(hub[1])


def test_data_in_a_wrapper_is_told_apart_as_without_it():
    def read_every_file(absolute):
        pytest.fail('the whole data set was read')

    reader = SimpleNamespace(dataset=SimpleNamespace(_fingerprint='a'))
    hub = SimpleNamespace(reader=reader)
    assert hash_names(SimpleNamespace(dataset=hub, filenames=read_every_file)) == hash_names(hub)


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--mixup', '0.2'], '--mixup mixes images of the batch: leave one out'),
        (['--cutmix', '1'], '--cutmix mixes images'),
        (['--cutmix-minmax', '0.1', '0.5'], '--cutmix-minmax mixes images'),
        (['--reprob', '0.2'], '--reprob erases batch by batch: leave one out, or add --no-prefetcher'),
        (['--aug-repeats', '2'], '--aug-repeats draws an image several times'),
        (['--train-img-sizes', '32', '40'], '--train-img-sizes gives an image another size'),
        (['--aug-splits', '3'], '--aug-splits does not go with --teacher'),
        (['--naflex-loader'], '--naflex-loader does not go with --teacher'),
        (['--teacher-cache-views', '0'], '--teacher-cache-views must be 1 or more, got 0'),
    ],
)
def test_what_cannot_be_exact_is_refused(argv, more, message, capsys, tmp_path):
    assert message in refused([*argv, *more], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--teacher-cache', 'x'], '--teacher-cache needs --teacher'),
        (['--teacher-cache', 'x', '--kd-model-name', 'test_vit'], '--teacher-cache needs --teacher'),
        (['--teacher-cache-views', '2'], '--teacher-cache-views needs --teacher'),
        (['--teacher', 'test_vit', '--teacher-cache-views', '2'], '--teacher-cache-views needs --teacher-cache'),
    ],
)
def test_a_flag_without_the_one_it_belongs_to_is_refused(small_run, more, message, capsys):
    assert message in refused([*small_run, '--model', 'test_resnet', *more], capsys)


def test_a_stream_has_no_index_to_keep_features_by(argv, tmp_path, capsys):
    webdataset = pytest.importorskip('webdataset')
    from PIL import Image

    shards = tmp_path / 'wds'
    shards.mkdir()
    for split, number in (('train', 16), ('validation', 8)):
        with webdataset.TarWriter(str(shards / f'set-{split}-0000.tar')) as tar:
            for i in range(number):
                tar.write({'__key__': str(i), 'png': Image.new('RGB', (32, 32)), 'cls': i % 3})
    splits = {
        s: {'filenames': [f'set-{s}-0000.tar'], 'shard_lengths': [n]} for s, n in (('train', 16), ('validation', 8))
    }
    (shards / '_info.json').write_text(
        json.dumps({'splits': {k: {**v, 'name': k, 'num_samples': v['shard_lengths'][0]} for k, v in splits.items()}})
    )
    error = refused([str(shards), *argv[1:], '--dataset', 'wds/set'], capsys)
    assert "knows images by their index, 'wds/set' is a stream without: leave the cache out" in error
    assert not (tmp_path / 'cache').exists()


def test_precompute_needs_a_cache_to_fill(small_run, capsys):
    for more, message in (
        ([], 'needs --teacher-cache'),
        (['--teacher-cache', 'x', '--evaluate', 'y'], 'no --evaluate'),
    ):
        with pytest.raises(SystemExit):
            precompute.main([*small_run, *PAIR, *more])
        assert message in capsys.readouterr().err


def test_precompute_refuses_what_training_would(argv, capsys, tmp_path):
    with pytest.raises(SystemExit):
        precompute.main([*argv, '--kd-loss-weight', '1'])
    assert 'logit distillation compares logits of equal classes' in capsys.readouterr().err
    assert not (tmp_path / 'cache').exists()


def damage(folder, name, how):
    path = folder / name
    if how == 'truncate':
        os.truncate(path, path.stat().st_size - 10)
    elif how == 'garbage':
        path.write_bytes(b'not what it was')
    elif how == 'pickle':
        np.save(path, np.array([{}]), allow_pickle=True)
    elif how == 'empty':
        path.write_bytes(b'')
    else:
        np.save(path, np.zeros(*how))


@pytest.mark.parametrize('name', ['view-0.feature.npy', 'view-1.done.npy'])
@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('truncate', 'cannot open'),
        ('garbage', 'cannot open'),
        ('pickle', 'cannot open'),
        ('empty', 'cannot open'),
        (((9, 4), np.float16), 'holds float16 [9, 4], not'),
        (((10, 4), np.float64), 'holds float64 [10, 4], not'),
    ],
    ids=str,
)
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path, name, how, message):
    opened(tmp_path)
    damage(tmp_path, name, how)
    before = (tmp_path / name).read_bytes()
    cache = small_cache(tmp_path)
    with pytest.raises(UsageError) as e:
        cache.look()
    assert message in str(e.value)
    assert f"{name}'" in str(e.value)
    assert 'delete it to fill that view anew' in str(e.value)
    assert (tmp_path / name).read_bytes() == before
    (tmp_path / name).unlink()
    assert opened(tmp_path).counts == [0, 0]


@pytest.mark.parametrize('text', ['{"seed": ', '[1]', '"seed"', '\xff'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    opened(tmp_path)
    (tmp_path / 'manifest.json').write_text(text, encoding='latin1')
    with pytest.raises(UsageError, match='--teacher-cache: .*give another folder, or delete it'):
        small_cache(tmp_path).look()


def test_a_folder_of_something_else_is_refused(image_folder, argv, tmp_path, capsys):
    (tmp_path / 'cache').mkdir()
    (tmp_path / 'cache' / 'thesis.tex').write_text('')
    error = refused(argv, capsys)
    assert "cache' holds thesis.tex and no manifest.json, so it is no teacher cache: give another folder" in error
    assert [p.name for p in (tmp_path / 'cache').iterdir()] == ['thesis.tex']
    assert 'Not a directory' in refused([*argv, '--teacher-cache', str(tmp_path / 'cache' / 'thesis.tex')], capsys)


# Batches --------------------------------------------------------------------------------------------------------------


def test_an_indexed_target_is_pinned_and_moved_as_a_tensor_and_keeps_its_index_on_the_host(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self, *device: self + 1)
    target = pin_memory(IndexedTarget(torch.zeros(2), np.array([4, 5]), 3))
    assert torch.equal(target.target, torch.ones(2))
    moved = target.to(device='meta', non_blocking=True)
    assert moved.target.device.type == 'meta'
    assert isinstance(moved.index, np.ndarray)
    assert (moved.index.tolist(), moved.view) == ([4, 5], 3)


def test_targets_of_many_labels_know_their_images_too():
    images = [(np.zeros((3, 4, 4), np.uint8), torch.tensor([0.0, 1.0, float(i)])) for i in range(2)]
    collate = SeededCollate(fast_collate, seed=0, rank=0, mixup_off_epoch=0, indexed=True)
    _, target = collate(Batch(images, 7, 0, [Draw(3, 9, 0), Draw(3, 4, 0)]))
    assert torch.equal(target.target, torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
    assert (target.index.tolist(), target.view) == ([9, 4], 3)


def test_the_task_takes_what_the_teacher_says_from_outside(monkeypatch):
    from timm_pe import ProjectorEnsembleTask

    torch.manual_seed(0)
    student, teacher = (timm.create_model(n, num_classes=3) for n in ('test_resnet', 'test_vit'))
    task = ProjectorEnsembleTask(student, teacher, act='none', verbose=False).train()
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    said = task.teacher(x)
    online = task(x, y)['pe_loss']
    monkeypatch.setattr(Teacher, 'forward', lambda *_: never())
    assert torch.equal(task(x, y, teacher=said)['pe_loss'], online)
    other = task(x, y, teacher=TeacherOutput(-said.feature, None))['pe_loss']
    torch.testing.assert_close(other, 2 - online)  # 1 + cosine


# Ranks ----------------------------------------------------------------------------------------------------------------


def torchrun(module, argv, nproc=2):
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        f'--nproc-per-node={nproc}',
        *module,
        *argv,
    ]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)


def test_two_ranks_fill_and_read_one_cache(argv, tmp_path):
    out = torchrun(['-m', 'timm_pe.precompute'], argv)
    assert out.returncode == 0, out.stderr
    assert out.stderr.splitlines()[-1].endswith('72 of 72 rows there.')
    assert out.stderr.count('View 1/1 [   3/3 (100%)]') == 1
    assert_replays_the_online_teacher(argv)

    ahead = files(tmp_path / 'cache')
    (tmp_path / 'cache' / 'view-1.done.npy').unlink()
    out = torchrun([str(ROOT / 'train_distill.py')], argv)  # reads view 0, fills view 1
    assert out.returncode == 0, out.stderr
    assert '36 of 72 rows there' in out.stderr
    trained = files(tmp_path / 'cache')
    assert np.array_equal(trained['view-0.feature.npy'], ahead['view-0.feature.npy'])
    done = trained['view-1.done.npy'] == 1
    assert done.sum() == 32  # two ranks, two batches of 8, each image once
    rows, expected = (a['view-1.feature.npy'][done] for a in (trained, ahead))
    np.testing.assert_allclose(rows, expected, rtol=2**-10, atol=1e-6)


def test_a_rank_that_looks_later_still_takes_its_own_share(argv):
    args, teacher, data, runtime = stages(argv)
    cache = open_teacher_caches(args, [teacher], data, runtime)[0]
    allocate_caches([cache], [teacher], runtime)
    for rank in range(2):
        share = replace(runtime, rank=rank, world_size=2)
        precompute.fill_view(args, [cache], [teacher], data, share, view=1)
        assert cache.missing(1).tolist() == ([] if rank else list(range(1, IMAGES, 2)))


def test_two_ranks_agree_on_what_has_changed(images, argv, tmp_path):
    precompute.main(argv)
    change(images / 'train' / 'bee' / '4.png')
    for module, views in ((['-m', 'timm_pe.precompute'], '1'), ([str(ROOT / 'train_distill.py')], '2')):
        out = torchrun(module, [*argv, '-b', '18', '--teacher-cache-views', views])
        assert out.returncode == 0, out.stderr
        assert out.stderr.count('1 of 36 images has changed') == (views == '1')
        assert done(tmp_path, int(views) - 1).all()
    assert_replays_the_online_teacher(argv)


def test_under_torchrun_a_mismatch_is_said_once(argv, tmp_path, filled_cache):
    os.symlink(filled_cache, tmp_path / 'cache')
    out = torchrun([str(ROOT / 'train_distill.py')], [*argv, '--hflip', '0'])
    assert out.returncode != 0
    assert out.stderr.count('train_distill: error: --teacher-cache') == 1


def test_ranks_on_several_machines_read_a_complete_cache_and_fill_none(argv, monkeypatch):
    made = stages(argv)
    monkeypatch.setattr(run_cache, '_on_several_machines', lambda runtime: True)
    with pytest.raises(UsageError, match=r'several machines can only read .* has 0 of 72 rows: fill it on one of them'):
        open_caches(made)[0]
    precompute_alone(argv, monkeypatch)
    cache = open_caches(made)[0]
    allocate_caches([cache], [made[1]], made[3])
    assert cache.is_complete


def precompute_alone(argv, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(run_cache, '_on_several_machines', lambda runtime: False)
        precompute.main(argv)

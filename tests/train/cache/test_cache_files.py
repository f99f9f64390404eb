"""The files of a teacher cache: allocated, filled, continued, and never read where a row is missing."""

import errno
import json
import os
import signal

import numpy as np
import pytest
import torch
from cache_runs import (
    IMAGES,
    PAIR,
    answers,
    assert_replays_the_online_teacher,
    batch,
    files,
    never,
    opened,
    small_cache,
    train,
)
from helpers import refused, run

from timm_pe import UsageError, precompute
from timm_pe.method.teacher import Teacher, TeacherOutput
from timm_pe.train import cache as cache_module
from timm_pe.train.cache import TeacherCache


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


@pytest.mark.usefixtures('hears_sigint')
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_precompute_and_the_same_command_fills_what_is_left(signum, argv, tmp_path, monkeypatch, capsys):
    fill, views = precompute.fill_view, []

    def filled(*args):
        fill(*args)
        if not views:
            views.append(1)
            signal.raise_signal(signum)

    monkeypatch.setattr(precompute, 'fill_view', filled)
    with pytest.raises(SystemExit) as e:
        precompute.main(argv)
    assert e.value.code == 128 + signum
    line = f'stopped by {signum.name} while it filled the cache; the same command goes on where it was stopped'
    assert capsys.readouterr().err.splitlines()[-1].endswith(line)
    precompute.main(argv)
    assert '36 of 72 rows there' in (said := capsys.readouterr().err)
    assert '72 of 72 rows there' in said


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

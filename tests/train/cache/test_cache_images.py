"""Images that change or cannot be read under a teacher cache."""

import errno
import json
import os
import tarfile

import numpy as np
import pytest
from cache_runs import (
    PAIR,
    assert_replays_the_online_teacher,
    change,
    done,
    files,
    open_caches,
    precompute_fails,
    stages,
    train,
)
from helpers import refused, run

from timm_pe import UsageError, precompute
from timm_pe.train import cache as cache_module
from timm_pe.train import run_cache
from timm_pe.train.run_cache import allocate_caches


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


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
    first = "'ant/0.png', then 'ant/3.png', 'ant/6.png', 'ant/9.png', 'bee/0.png'"
    assert f'error: 12 of 36 images cannot be read, the first is {first}: are the disk and the files in order?' in said
    assert np.load(tmp_path / 'cache' / 'view-0.done.npy').sum() == 24  # what was computed is kept
    assert '12 of 36 images cannot be read' in precompute_fails(argv, capsys, code=1)  # and asked for again


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

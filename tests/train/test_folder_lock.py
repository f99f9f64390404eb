"""Two processes and one run folder: the second waits for the first, or is refused."""

import contextlib
import errno
import fcntl
import os
import shutil
import threading

import pytest
from helpers import PAIR, refused, run, summary

from timm_pe.errors import UsageError, one_line
from timm_pe.process import folder_lock
from timm_pe.process.folder_lock import FolderLock
from timm_pe.train import build, start
from timm_pe.train.trainer import Trainer


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize('more', [[], ['--overwrite'], ['--resume', 'auto']], ids=['fresh', 'overwrite', 'resume'])
def test_a_second_run_in_the_folder_of_a_run_that_is_still_going_is_refused_and_changes_nothing(
    more, small_run, tmp_path, monkeypatch, capsys
):
    argv = [*small_run, *PAIR]
    monkeypatch.setattr(build, 'OTHER_ENDS', 0.1)
    save, said = Trainer._save_epoch, []

    def save_and_start_another(trainer, state, *args):
        best = save(trainer, state, *args)
        if state.epoch == 0:
            before = files_of(tmp_path / 'run')
            said.append(refused([*argv, *more], capsys))
            assert files_of(tmp_path / 'run') == before
        return best

    monkeypatch.setattr(Trainer, '_save_epoch', save_and_start_another)
    run(argv)
    assert said == [
        f"train_distill: error: --output: another process trains in '{tmp_path / 'run'}': stop it or wait for its end, or give "
        f'another --experiment'
    ]
    assert [path.name for path in tmp_path.iterdir()] == ['run']
    assert [row['epoch'] for row in summary(tmp_path / 'run')] == ['0', '1']
    run([*argv, '--epochs', '3', '--resume', 'auto'])  # the first has ended
    assert len(summary(tmp_path / 'run')) == 3


def held(folder):
    """The lock of a folder, held as by another process: flock tells open files apart, not processes."""
    lock = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return contextlib.closing(os.fdopen(lock, 'w'))


def test_a_run_that_waits_for_another_to_end_goes_on_from_what_that_wrote_last(small_run, tmp_path, capsys):
    argv = [*small_run, *PAIR, '--epochs', '3']
    run([*argv, '--stop-epoch', '2'], capsys)
    folder, aside = tmp_path / 'run', tmp_path / 'aside'
    shutil.copytree(folder, aside)
    for path in folder.iterdir():  # as it is in the first epoch
        if path.name not in ('args.yaml', '.lock'):
            path.unlink()
    other = held(folder)

    def end() -> None:
        with other:
            shutil.copytree(aside, folder, ignore=shutil.ignore_patterns('.lock'), dirs_exist_ok=True)

    timer = threading.Timer(2, end)
    timer.start()
    said = run([*argv, '--overwrite', '--resume', 'auto'], capsys)
    timer.join()
    assert f"Another process trains in '{folder}': waiting up to 120 s for its end." in said
    assert 'Epoch 3/3' in said
    assert 'Epoch 2/3' not in said


def test_runs_that_begin_at_the_same_time_in_one_new_folder_are_told_at_once(small_run, tmp_path, capsys):
    (tmp_path / 'run').mkdir()
    with held(tmp_path / 'run'):
        said = refused([*small_run, *PAIR], capsys)
    assert 'another process trains in' in said
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['.lock']


def test_runs_without_a_name_that_begin_in_one_second_have_folders_of_their_own(small_run, tmp_path, monkeypatch):
    argv = [*small_run, *PAIR, '--epochs', '1', '--experiment', '']
    monkeypatch.setattr(start, '_folder_path', lambda parts, span: str(tmp_path / '20261127-120000-test_resnet-32'))
    for _ in range(3):
        run(argv)
    names = [f'20261127-120000-test_resnet-32{end}' for end in ('', '_2', '_3')]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(len(summary(tmp_path / name)) == 1 for name in names)


def test_a_run_that_is_refused_lets_go_of_its_folder(small_run, tmp_path, capsys):
    argv = [*small_run, *PAIR, '--epochs', '1']
    run(argv)
    student = ['--initial-checkpoint', str(tmp_path / 'run' / 'student.safetensors')]
    with pytest.raises(SystemExit) as kept:  # as a notebook keeps the last one
        run([*argv, *student])
    said = run([*argv, '--epochs', '2', '--resume', 'auto'], capsys)
    assert kept.value.code == 2
    assert 'Another process' not in said


def test_a_new_run_from_the_checkpoint_of_one_that_still_goes_does_not_wait_for_it(small_run, tmp_path, capsys):
    argv = [*small_run, *PAIR]
    run([*argv, '--stop-epoch', '1'])
    with held(tmp_path / 'run'):
        said = run([*argv, '--resume', str(tmp_path / 'run'), '--experiment', 'other'], capsys)
    assert 'Another process' not in said
    assert len(summary(tmp_path / 'other')) == 1


def test_a_run_that_resumes_a_folder_by_its_path_waits_for_it_too(small_run, tmp_path, monkeypatch, capsys):
    argv = [*small_run, *PAIR]
    run([*argv, '--stop-epoch', '1'])
    monkeypatch.setattr(build, 'OTHER_ENDS', 0.1)
    before = files_of(tmp_path / 'run')
    with held(tmp_path / 'run'):
        assert 'another process trains in' in refused(
            [*argv, '--resume', str(tmp_path / 'run'), '--experiment', ''], capsys
        )
    assert files_of(tmp_path / 'run') == before


def test_an_earlier_run_that_is_moved_aside_leaves_a_lock_to_the_new_one(tmp_path):
    (tmp_path / 'run').mkdir()
    with FolderLock() as lock, FolderLock() as other:
        lock.take(tmp_path / 'run')
        (tmp_path / 'run').rename(tmp_path / 'run.1')
        (tmp_path / 'run').mkdir()
        lock.take(tmp_path / 'run')
        with pytest.raises(UsageError, match='another process'):
            other.take(tmp_path / 'run')
        other.take(tmp_path / 'run.1')


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_the_run_goes_on(number, small_run, tmp_path, monkeypatch, capsys):
    def flock(fd, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_lock.fcntl, 'flock', flock)
    argv = [*small_run, *PAIR]
    for _ in range(2):
        said = run([*argv, '--epochs', '1'], capsys)
        assert f'({one_line(OSError(number, os.strerror(number)))}): do not start a second one in it' in said
    assert len(summary(tmp_path / 'run')) == 1

"""Ranks share one teacher cache."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_runs import IMAGES, assert_replays_the_online_teacher, change, done, files, open_caches, stages

import train_distill
from timm_pe import UsageError, precompute
from timm_pe.train import run_cache
from timm_pe.train.run_cache import allocate_caches, open_teacher_caches

ROOT = Path(train_distill.__file__).parent


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


@pytest.mark.long
def test_two_ranks_agree_on_what_has_changed(images, argv, tmp_path):
    precompute.main(argv)
    change(images / 'train' / 'bee' / '4.png')
    for module, views in ((['-m', 'timm_pe.precompute'], '1'), ([str(ROOT / 'train_distill.py')], '2')):
        out = torchrun(module, [*argv, '-b', '18', '--teacher-cache-views', views])
        assert out.returncode == 0, out.stderr
        assert out.stderr.count('1 of 36 images has changed') == (views == '1')
        assert done(tmp_path, int(views) - 1).all()
    assert_replays_the_online_teacher(argv)


@pytest.mark.long
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

"""Runs that are killed again and again, alone and on two ranks: minutes, so a target of their own (make test-survival)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from survive import COMMON, compare, write_images  # noqa: E402

ROOT = TESTS.parent


def test_fifty_kills_at_random_moments_lose_nothing_and_the_runs_end_bit_equal():
    argv = [sys.executable, str(TESTS / 'survive.py'), '--kills', '50', '--seed', str(int(time.time()))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert json.loads(done.stdout)['stops']['SIGKILL'] >= 50


def rank_one(launcher: int) -> int | None:
    """Pid of rank 1 among the descendants of a torchrun process."""
    for path in Path('/proc').glob('[0-9]*'):
        try:
            environ = (path / 'environ').read_bytes().split(b'\0')
            parent = int((path / 'stat').read_text().rsplit(')', 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        if parent == launcher and b'RANK=1' in environ:
            return int(path.name)
    return None


def start(argv: list[str], log: Path) -> subprocess.Popen:
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'MAX_RESTARTS': '5', 'PYTHON': sys.executable}
    with open(log, 'wb') as f:
        return subprocess.Popen([str(ROOT / 'distributed_train.sh'), '2', *argv], stdout=f, stderr=f, env=env)


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='finds the ranks in /proc')
@pytest.mark.parametrize(
    'variant', [['--model-ema', '--model-ema-decay', '0.9'], ['--mixup', '0.5', '--no-ddp-bb', '-j', '1']]
)
def test_two_ranks_of_which_one_is_killed_twice_end_as_two_that_were_left_alone(variant, tmp_path):
    images = write_images(tmp_path / 'images', train=48)
    argv = [str(images), *COMMON, *variant, '--output', str(tmp_path), '--recovery-interval', '1', '--epochs', '6']
    assert start([*argv, '--experiment', 'alone'], tmp_path / 'alone.log').wait(300) == 0
    run = start([*argv, '--experiment', 'run', '--resume', 'auto'], tmp_path / 'run.log')
    folder = tmp_path / 'run'
    for reached in ('recovery-1-*', 'recovery-3-*'):
        until = time.monotonic() + 120
        while not list(folder.glob(reached)):
            assert run.poll() is None, (tmp_path / 'run.log').read_text()[-3000:]
            assert time.monotonic() < until
            time.sleep(0.005)
        os.kill(rank_one(run.pid), signal.SIGKILL)
    assert run.wait(300) == 0, (tmp_path / 'run.log').read_text()[-3000:]
    assert (tmp_path / 'run.log').read_text().count('Loaded checkpoint') >= 2
    assert compare(tmp_path / 'alone', folder) == []

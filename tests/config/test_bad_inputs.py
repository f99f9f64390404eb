"""Hundreds of bad inputs: each ends in one line and exit code 2, nothing runs, nothing is written."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from bad_checkpoints import CANARY
from bad_inputs import CORPUS, Bad
from helpers import refused

import train_distill
from timm_pe.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings('ignore')  # what torch warns of while the bad files are made
# the most that one refusal may take
SECONDS, MEGABYTES = 120, 300
# through the command itself; to start it takes seconds, so but for the last four it is started once and forked
COMMANDS = (
    '--teacher-checkpoint: weights of another architecture',
    '--teacher-checkpoint: a pipe that nobody fills',
    '--initial-checkpoint: a pickle bomb',
    '--initial-checkpoint: cut in the middle',
    '--pretrained-path: weights with renamed keys',
    '--resume: code: exec',
    '--resume: whose optimizer has other groups',
    '--evaluate: weights with a NaN',
    '--evaluate: an endless device',
    'YAML: a billion laughs in kwargs',
    'YAML: an endless device',
    'args.yaml of a run folder: a tag that makes an object',
    '--model local-dir: weights that are code: exec',
    'data empty',
    'a model that clears the terminal',
    '--epochs 0',
    '--teacher-checkpoint: code: os.system',
    '--pretrained-path: a storage bomb',
    'YAML: a tag that calls os.system',
    '--output: a file',
)
FRESH = 4
# the console script, once for each command line on its input; prints the exit codes, and the most memory that one had
FORKS = """
import json, os, resource, sys
import timm_pe.train.run  # what every one of them needs
import train_distill

codes = []
for argv, folder in json.load(sys.stdin):
    pid = os.fork()
    if not pid:
        os.chdir(folder)
        for name, number in (('.out', 1), ('.err', 2)):
            os.dup2(os.open(folder + name, os.O_CREAT | os.O_WRONLY), number)
        sys.argv = ['train-distill', *argv]
        sys.exit(train_distill.main())
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps([codes, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))
"""


def good_run(images: Path, folder: Path) -> list[str]:
    """The command line of a good run that writes into `folder`."""
    return [
        *(str(images), '--num-classes', '3', '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu'),
        *('--epochs', '2', '--warmup-epochs', '0', '--output', str(folder / 'output'), '--experiment', 'run'),
        *('--scale', '0.5', '1.0', '--model', 'test_resnet', '--teacher', 'test_resnet', '--no-teacher-pretrained'),
    ]


def make(bad: Bad, folder: Path) -> list[str]:
    (folder / 'input').mkdir()
    return bad.make(folder / 'input')


def test_the_corpus_has_at_least_200_different_inputs():
    assert len({bad.name for bad in CORPUS}) == len(CORPUS) >= 200


@pytest.fixture
def _in_time() -> Iterator[None]:
    """What hangs fails."""

    def stop(*_):
        raise TimeoutError(f'no answer after {SECONDS} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def peak_mb() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def case(bad: Bad) -> object:
    skip = pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
    return pytest.param(bad, id=bad.name, marks=skip if 'may not be read' in bad.name else ())


@pytest.mark.usefixtures('_in_time')
@pytest.mark.parametrize('bad', map(case, CORPUS))
def test_a_bad_input_is_one_line_and_nothing_runs_or_is_written(bad, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*good_run(image_folder, tmp_path), *make(bad, tmp_path)]
    made, memory = sorted(tmp_path.rglob('*')), peak_mb()
    error = refused(argv, capsys)
    assert bad.message in error
    assert error.isprintable()
    assert len(error) < 1500
    assert sorted(tmp_path.rglob('*')) == made
    assert not Path(CANARY).exists()
    assert peak_mb() - memory < MEGABYTES


class Outcome(NamedTuple):
    """What a command left: its exit code, what it said, the most memory it had, whether its folder is as it was before."""

    code: int
    out: str
    err: str
    peak_mb: float
    untouched: bool


def forked(argvs: list[tuple[list[str], Path]]) -> list[tuple[int, str, str, float]]:
    cases = json.dumps([(argv, str(folder)) for argv, folder in argvs])
    argv = [sys.executable, '-c', FORKS]
    where = Path(train_distill.__file__).parent
    done = subprocess.run(argv, input=cases, stdout=subprocess.PIPE, text=True, check=True, timeout=300, cwd=where)
    said = [[Path(f'{folder}{name}').read_text() for name in ('.out', '.err')] for _, folder in argvs]
    codes, peak = json.loads(done.stdout)
    return [(code, *texts, peak) for code, texts in zip(codes, said, strict=True)]


def fresh(case: tuple[list[str], Path]) -> tuple[int, str, str, float]:
    argv, folder = case
    argv = [sys.executable, train_distill.__file__, *argv]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    return (
        done.returncode,
        done.stdout,
        done.stderr,
        0.0,
    )  # the system adds what this process has to that of a program it starts


@pytest.fixture(scope='module')
def outcomes(image_folder, tmp_path_factory) -> dict[str, Outcome]:
    """What the command makes of each of COMMANDS."""
    corpus = {bad.name: bad for bad in CORPUS}
    folders = [tmp_path_factory.mktemp('command') for _ in COMMANDS]
    cases = [
        ([*good_run(image_folder, folder), *make(corpus[name], folder)], folder)
        for name, folder in zip(COMMANDS, folders, strict=True)
    ]
    made = [sorted(folder.rglob('*')) for folder in folders]
    with ThreadPoolExecutor(2) as pool:
        results = [*forked(cases[:-FRESH]), *pool.map(fresh, cases[-FRESH:])]
    return {
        name: Outcome(*result, sorted(folder.rglob('*')) == before)
        for name, result, folder, before in zip(COMMANDS, results, folders, made, strict=True)
    }


@pytest.mark.long
@pytest.mark.parametrize('name', COMMANDS)
def test_the_command_ends_with_code_2_and_one_line(name, outcomes):
    code, out, err, _, untouched = outcomes[name]
    errors = [line for line in err.splitlines() if line.startswith('train_distill: error: ')]
    assert code == 2, err
    assert [err.splitlines()[-1]] == errors
    assert 'Traceback' not in err
    assert out == ''
    assert next(bad.message for bad in CORPUS if bad.name == name) in errors[0]
    assert untouched


@pytest.mark.long
def test_no_command_took_much_memory(outcomes):
    peaks = [outcome.peak_mb for outcome in outcomes.values()]
    assert 100 < max(peaks) < 1500


def test_a_resumed_run_that_is_not_there_is_named_before_its_data_is_asked_for(capsys):
    assert "--resume: no file '/no/run', and no folder" in refused(['--resume', '/no/run'], capsys)


def test_what_a_finished_run_went_on_from_may_be_gone(tmp_path):
    (tmp_path / 'args.yaml').write_text('dataset: sklearn/digits\nresume: /no/checkpoint.pth.tar\n')
    assert RunFolder(tmp_path).config().resume == '/no/checkpoint.pth.tar'

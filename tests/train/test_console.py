"""What a run says while it goes on: on a terminal of 80 and of 120 columns, and into a file."""

import fcntl
import io
import logging
import os
import pty
import re
import shlex
import struct
import sys
import termios
import time

import pytest
import safetensors.torch
import timm
import torch
from helpers import run

import train_distill
from timm_pe import export
from timm_pe.errors import UsageError
from timm_pe.train import build, trainer
from timm_pe.train import student as student_module
from timm_pe.train.console import setup_logging
from timm_pe.train.evaluate import format_metrics
from timm_pe.train.meters import Pace
from timm_pe.train.position import RunState, Span

PAIR = ['--model', 'test_resnet', '--teacher', 'test_resnet', '--no-teacher-pretrained']


def on_terminal(argv: list[str], columns: int) -> list[str]:
    """What a run leaves on a terminal of so many columns, a line for each time that the cursor goes to the first column."""
    pid, terminal = pty.fork()
    if not pid:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack('HHHH', 40, columns, 0, 0))
        os.environ.pop('COLUMNS', None)
        os.execv(sys.executable, [sys.executable, train_distill.__file__, *argv])
    said = b''
    while True:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said.decode()
    return [line for line in re.split(r'[\r\n]+', said.decode()) if line.strip()]


@pytest.mark.parametrize('columns', [80, 120])
def test_a_terminal_has_a_bar_with_whole_numbers_and_an_epoch_leaves_lines_that_fit(small_run, columns):
    said = on_terminal([*small_run, *PAIR, '--log-interval', '1'], columns)
    bars = [line for line in said if re.match(r'(Train|Test|Teacher)\b.*%\|', line)]
    assert len(bars) >= 8
    for bar in bars:
        assert len(re.search(r'\|(.*?)\|', bar)[1]) == 10
        assert len(bar) <= columns
    shown = [text.strip().split('  ') for bar in bars if (text := bar.partition(', ')[2])]
    terms = [part.split(' ') for parts in shown for part in parts if 'loss ' in part]
    assert terms
    assert all(f'{float(value):#.4g}' == value for _, value in terms)
    if columns == 120:
        assert {parts[-1].split(' ')[-1] for parts in shown} == {'images/s'}
    first = next(i for i, line in enumerate(said) if line.startswith('Epoch 1/2'))
    left = [said[first], *(line for line in said[first + 1 : first + 3] if line.startswith('    '))]
    assert all(len(line) < columns for line in left)
    assert re.fullmatch(
        r'Epoch 1/2  top-1 [\d.]+ % \(best\)  val loss [\d.]+  loss [\d.]+ +task_loss [\d.]+ +pe_loss [\d.]+ +'
        r'lr [\d.e-]+ +[\d.]+ images/s +0:00:\d\d +left 0:00:\d\d',
        re.sub(' {3,}', '  ', '  '.join(left)),
    )


def test_an_epoch_leaves_one_line_with_fewer_batches_than_the_log_interval(small_run, capsys):
    said = run([*small_run, *PAIR, '--log-interval', '50'], capsys)
    assert re.search(r'Epoch 1/2  top-1 .*loss .*pe_loss .*lr .*images/s  0:00:\d\d  left 0:00:\d\d\n', said)
    assert re.search(r'Epoch 2/2  top-1 .*images/s  0:00:\d\d\n', said)  # nothing is left
    assert said.count('task_loss ') == 2


def test_an_epoch_without_validation_leaves_its_line_too(small_run, capsys):
    said = run([*small_run, *PAIR, '--val-interval', '2'], capsys)
    assert re.search(r'Epoch 1/2  loss ', said)
    assert re.search(r'Epoch 2/2  top-1 [\d.]+ % \(best\)', said)


def test_five_classes_or_fewer_have_no_top_5():
    metrics = {'loss': 1.0, 'top1': 50.0, 'top5': 90.0}
    assert format_metrics(metrics, 6) == 'top-1 50.000 %  top-5 90.000 %  val loss 1.0000'
    assert format_metrics(metrics, 5) == 'top-1 50.000 %  val loss 1.0000'


def test_the_time_left_is_that_of_the_run_at_its_pace(monkeypatch):
    now = 100.0
    monkeypatch.setattr('time.perf_counter', lambda: now)
    pace = Pace(Span(first=2, schedule=10, end=10), 8)
    now = 130.0  # an epoch and a half in 30 s
    assert pace.left(3.5) == pytest.approx(30 / 1.5 * 6.5)
    assert pace.split(4) == (30, pytest.approx(30 / 2 * 6))
    now = 140.0
    assert pace.split(4)[0] == 10
    # of a resumed epoch the part before does not count
    state = RunState(2, 4, settings={}, data={}, ranks=[])
    now = 200.0
    pace = Pace(Span(first=2, schedule=10, end=10, resumed=state), 8)
    now = 210.0
    assert pace.left(3) == pytest.approx(10 / 0.5 * 7)


@pytest.mark.parametrize(
    ('model', 'needs'),
    [
        (['test_resnet', '--in-chans', '1'], ''),
        (['test_vit', '--model-kwargs', 'patch_size=8', 'depth=1', '--img-size', '40', '--gp', 'avg'], ''),
        (['test_efficientnet', '--bn-eps', '0.01'], ''),
        (['cifar_resnet8'], 'import timm_pe; '),
    ],
    ids=lambda value: value[0] if value else None,
)
def test_a_run_ends_with_lines_to_copy_that_work(small_run, tmp_path, monkeypatch, capsys, model, needs):
    monkeypatch.chdir(tmp_path)
    said = run([*small_run, '--model', *model, '--epochs', '1'], capsys)
    code = re.search(r'In timm:   (.*)', said)[1]
    assert code.startswith(needs)
    assert ('import' in code) == bool(needs)
    student = eval(code.removeprefix(needs), {'timm': timm})  # noqa: S307  that is the contract
    saved = safetensors.torch.load_file(tmp_path / 'run' / 'student.safetensors')
    assert all(torch.equal(saved[name], value) for name, value in student.state_dict().items())
    command = shlex.split(re.search(r'Evaluate:  train-distill (.*)', said)[1])
    assert 'on 12 images' in run([*command, '--device', 'cpu'], capsys)
    command = shlex.split(re.search(r'Export:    timm-pe export (.*)', said)[1])
    export.main(command)
    assert (tmp_path / 'exported' / 'config.json').exists()


def test_the_share_of_time_that_waits_for_data_is_said(monkeypatch, small_run, capsys):
    batches = trainer.epoch_batches

    def slowly(*args):
        for batch in batches(*args):
            time.sleep(0.3)
            yield batch

    def share(said: str) -> int:
        return int(re.search(r'Train 2/2 .*waiting for data (\d+)%', said)[1])

    monkeypatch.setattr(trainer, 'epoch_batches', slowly)
    assert share(run([*small_run, *PAIR], capsys)) > 60


def test_weights_that_are_loaded_are_said_once_with_what_they_are_for(small_run, tmp_path, capsys):
    run([*small_run, '--model', 'test_resnet', '--epochs', '1'])
    said = run(['--evaluate', str(tmp_path / 'run'), '--device', 'cpu', '-j', '0'], capsys)
    assert said.count(f"--evaluate: weights of '{tmp_path / 'run'}' loaded.") == 1
    assert 'from checkpoint' not in said


def test_a_run_whose_model_folder_is_gone_at_its_end_ends_well(small_run, tmp_path, monkeypatch, capsys):
    def gone(config, overlay):
        raise UsageError('no folder')

    keep = student_module.create_student

    def create(*args):
        model = keep(*args)
        monkeypatch.setattr(student_module, '_model_args', gone)
        return model

    monkeypatch.setattr(build, 'create_student', create)
    said = run([*small_run, '--model', 'test_resnet', '--epochs', '1'], capsys)
    assert 'Evaluate:  train-distill --evaluate' in said
    assert 'In timm' not in said


def test_a_run_that_is_resumed_behind_an_epochs_last_batch_has_no_pace_yet():
    resumed = RunState(2, 8, settings={}, data={}, ranks=[])
    pace = Pace(Span(first=2, schedule=10, end=10, resumed=resumed), 8)
    assert pace.split(3)[1] == 0


@pytest.mark.parametrize(('metric', 'part'), [('loss', r'val loss [\d.]+ \(best'), ('top5', r'top-1 [\d.]+ % \(best')])
def test_the_best_is_marked_at_the_metric_that_ranks(small_run, capsys, metric, part):
    said = run([*small_run, '--model', 'test_resnet', '--epochs', '1', '--eval-metric', metric], capsys)
    assert re.search(part, said)


def test_the_hub_says_each_thing_once():
    of_hub, said = logging.getLogger('huggingface_hub'), io.StringIO()
    own = logging.StreamHandler(said)
    of_hub.addHandler(own)
    try:
        setup_logging()
        for seconds in (1, 2, 4):
            logging.getLogger('huggingface_hub.utils').warning("'no network' thrown while requesting HEAD weights")
            logging.getLogger('huggingface_hub.utils').warning(f'Retrying in {seconds}s [Retry {seconds}/5].')
    finally:
        of_hub.removeHandler(own)
    assert said.getvalue() == "'no network' thrown while requesting HEAD weights\nRetrying in 1s [Retry 1/5].\n"

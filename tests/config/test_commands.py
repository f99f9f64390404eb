"""The installed commands: flags are read before torch is imported, each tool is reached by its name, and what `import timm_pe` does."""

import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import summary

import timm_pe
import timm_pe_command
import train_distill
from timm_pe.config.run_config import create_parser

ROOT = Path(train_distill.__file__).parent
VERSIONS = f'{timm_pe.__version__} (torch {version("torch")}, timm {version("timm")})'
# how each command starts, as the scripts that pip writes do
START = {
    'train-distill': 'import timm_pe_command; timm_pe_command.train_distill()',
    'train_distill': 'import runpy; runpy.run_path("train_distill.py", run_name="__main__")',
    'timm-pe': 'import timm_pe_command; timm_pe_command.main()',
}
NO_TORCH = 'import sys; sys.modules["torch"] = sys.modules["timm"] = None; '


def start(code: str, *argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A fresh Python that runs `code` with a command line."""
    return subprocess.run(
        [sys.executable, '-c', code, *argv], cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


# Before torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('--teachr x', 'unknown argument --teachr, did you mean --teacher?'),
        ('--data x', 'unknown argument --data: give it without --data'),
        ('--epochs three', "argument --epochs: invalid int value: 'three'"),
        ('--loss cross', "argument --loss: invalid choice: 'cross'"),
        ('data --teacher resnet34 --pe-projector lin', "argument --pe-projector: invalid choice: 'lin'"),
        ('data -c nowhere', "--config: cannot read 'nowhere'"),
        ('data --pe-projectors 3 --mixup 0.1 -b 7', '--batch-size must be even, got 7'),
        ('data --lr 1e39', '--lr must be a finite number (of float32), got 1e+39'),
        ('', 'no data: give a folder'),
    ],
)
def test_a_wrong_flag_is_refused_without_torch(words, message):
    done = start(NO_TORCH + START['train-distill'], *words.split())
    assert (done.returncode, done.stdout) == (2, ''), done.stderr
    assert done.stderr.count('\n') == 1
    assert done.stderr.startswith('train-distill: error: ')
    assert message in done.stderr


@pytest.mark.parametrize('command', START)
def test_help_needs_no_torch(command):
    done = start(NO_TORCH + START[command], '--help')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith(f'usage: {command} [-h] ')


@pytest.mark.parametrize('command', START)
def test_the_version_is_one_line_and_needs_no_torch(command):
    done = start(NO_TORCH + START[command], '--version')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == f'{command} {VERSIONS}\n'


def test_help_has_our_groups_first():
    titles = re.findall(r'^(\S.*):$', create_parser().format_help(), re.MULTILINE)
    ours = ['Teacher', 'Cache of the teacher', 'Distillation with teacher and projector ensemble']
    assert titles[: 2 + len(ours)] == ['options', 'Run settings', *ours]


def test_help_says_the_default_of_every_flag_in_80_columns(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    parser = create_parser()
    assert max(map(len, parser.format_help().splitlines())) <= 80
    silent = {a.dest for a in parser._actions if '(default: ' not in a.help}
    # a switch is off where nothing is said
    assert silent <= {a.dest for a in parser._actions if a.nargs == 0}


# timm-pe TOOL -----------------------------------------------------------------------------------------------------------


def module_of(tool: str) -> str:
    return 'timm_pe.train.main' if tool == 'train' else f'timm_pe.{tool}'


@pytest.mark.parametrize('tool', timm_pe_command.TOOLS)
def test_a_tool_gets_the_arguments_after_its_name_and_names_the_command(tool, monkeypatch, capsys):
    module, got = importlib.import_module(module_of(tool)), []
    with pytest.raises(SystemExit) as e:
        timm_pe_command.main([tool, '--help'])
    assert e.value.code == 0
    assert capsys.readouterr().out.startswith(f'usage: timm-pe {tool} [-h] ')
    monkeypatch.setattr(module, 'main', lambda argv, prog: got.append((argv, prog)))
    monkeypatch.setattr(sys, 'argv', ['timm-pe', tool, 'a', '--b', '-h'])
    timm_pe_command.main()
    assert got == [(['a', '--b', '-h'], f'timm-pe {tool}')]


@pytest.mark.parametrize('tool', timm_pe_command.TOOLS)
def test_a_tool_ends_with_the_line_and_the_code_of_its_python_m_form(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ends = []
    for call in (
        lambda argv: timm_pe_command.main([tool, *argv]),
        lambda argv: importlib.import_module(module_of(tool)).main(argv),
    ):
        with pytest.raises(SystemExit) as e:
            call(['nowhere', '--seeds', '0'] if tool == 'demo' else ['nowhere'])
        prog, line = capsys.readouterr().err.split(': error: ')
        ends.append((e.value.code, line))
    assert prog == ('train_distill' if tool == 'train' else f'python -m timm_pe.{tool}')
    assert ends[0] == ends[1]


def test_every_tool_of_the_package_is_one_of_timm_pe():
    modules = {path.stem for path in (ROOT / 'timm_pe').glob('*.py') if '__main__' in path.read_text()}
    assert modules == timm_pe_command.TOOLS.keys() - {'train'}


def test_the_help_of_timm_pe_has_a_line_for_each_tool(capsys):
    with pytest.raises(SystemExit):
        timm_pe_command.main(['--help'])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for tool, what in timm_pe_command.TOOLS.items():
        assert sum(line.split() == [tool, *what.split()] for line in lines) == 1, tool


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['reprot', 'RUN'], "unknown tool 'reprot', did you mean report? the tools are train, precompute, analysis, "),
        (['xyz'], "unknown tool 'xyz': the tools are train, "),
        ([], 'no tool is named: the tools are train, '),
        (['--tool', 'report'], 'unknown argument --tool'),
    ],
)
def test_an_unknown_tool_is_refused_with_the_known_ones_before_torch(argv, message):
    done = start(NO_TORCH + START['timm-pe'], *argv)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('timm-pe: error: ')
    assert done.stderr.count('\n') == 1
    assert message in done.stderr


# import timm_pe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('imports', ['import timm_pe, timm', 'import timm, timm_pe', 'import train_distill, timm'])
def test_an_import_of_the_package_registers_the_cifar_networks(imports):
    done = start(f'{imports}; timm.create_model("cifar_resnet8x4", num_classes=10)')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('before', ['', 'import timm_pe_command; '])
def test_every_public_name_can_be_imported(before):
    names = ', '.join(timm_pe.__all__)
    code = f'{before}from timm_pe import {names}; import timm_pe; print([n for n in timm_pe.__all__ if n not in dir(timm_pe)])'
    done = start(f'{code}; import timm; timm.create_model("cifar_resnet8x4"); from timm_pe import *; Teacher, zoo')
    assert (done.returncode, done.stdout.strip()) == (0, '[]'), done.stderr


def test_a_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'timm_pe' has no attribute 'Teacherr'"):
        _ = timm_pe.Teacherr
    assert not hasattr(timm_pe, 'TARGETS')


def test_a_command_trains_a_cifar_network(small_run, tmp_path):
    argv = [*small_run, '--model', 'cifar_resnet8', '--epochs', '1']
    done = start(START['train-distill'], *argv)
    assert done.returncode == 0, done.stderr
    assert len(summary(tmp_path / 'run')) == 1


def test_a_tool_finds_the_cifar_networks():
    code = START['timm-pe'].replace('main()', 'main(["report", "--help"])')
    done = start(f'try:\n {code}\nexcept SystemExit:\n import timm; print(timm.is_model("cifar_resnet8x4"))')
    assert done.stdout.endswith('\nTrue\n'), done.stderr

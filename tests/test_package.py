"""What users install: the wheel has the whole package, recipes too, and starts outside the repository."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

import timm_pe
import train_distill
from timm_pe.config.recipes import list_recipes
from timm_pe.config.run_config import parse_config

ROOT = Path(train_distill.__file__).parent
RECIPES = sorted(path.stem for path in (ROOT / 'hparams').glob('*.yaml'))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, unpacked. It is built from a copy: building leaves folders."""
    root = tmp_path_factory.mktemp('wheel')
    tree = root / 'tree'
    tree.mkdir()
    for name in ('timm_pe', 'hparams'):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE', 'train_distill.py', 'timm_pe_command.py'):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', str(root)]
    subprocess.run([*pip, str(tree)], check=True, timeout=300)
    (built,) = root.glob('*.whl')
    with zipfile.ZipFile(built) as archive:
        archive.extractall(root / 'installed')
    return root / 'installed'


def start(wheel: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    """Python with the unpacked wheel before anything else, in a folder that is not the repository."""
    env = {**os.environ, 'PYTHONPATH': str(wheel)}
    return subprocess.run([sys.executable, *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_wheel_has_every_module_the_recipes_and_what_else_is_read(wheel):
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / 'timm_pe').rglob('*.py')}
    extra = {'train_distill.py', 'timm_pe_command.py', 'timm_pe/py.typed', 'timm_pe/report_template.html'}
    recipes = {f'timm_pe/hparams/{name}.yaml' for name in RECIPES}
    files = {str(path.relative_to(wheel)) for path in wheel.rglob('*') if path.is_file()}
    assert len(recipes) >= 11
    assert sources | extra | recipes <= files
    assert not [name for name in files if name.startswith(('tests', 'benchmarks', 'examples'))]
    for name in RECIPES:
        assert (wheel / f'timm_pe/hparams/{name}.yaml').read_text() == (ROOT / f'hparams/{name}.yaml').read_text()


def test_the_version_of_the_wheel_is_the_one_of_the_package(wheel):
    (info,) = wheel.glob('*.dist-info')
    metadata = email.message_from_string((info / 'METADATA').read_text())
    assert metadata['Version'] == timm_pe.__version__
    texts = [path for pattern in ('*.toml', '*.cfg', '*.cff') for path in ROOT.glob(pattern)]
    assert len(texts) >= 3
    assert not [path.name for path in texts if timm_pe.__version__ in path.read_text()]


@pytest.mark.parametrize('command', ['train-distill', 'timm-pe'])
def test_each_command_of_the_wheel_starts(command, wheel, tmp_path):
    (info,) = wheel.glob('*.dist-info')
    entries = ConfigParser()
    entries.read(info / 'entry_points.txt')
    module, function = entries['console_scripts'][command].split(':')
    done = start(wheel, tmp_path, '-c', f'from {module} import {function}; {function}()', '--version')
    assert done.stdout.startswith(f'{command} {timm_pe.__version__} (torch '), done.stderr


def test_an_installed_command_takes_a_recipe_by_its_name(wheel, tmp_path):
    code = (
        'import timm_pe, train_distill; print(timm_pe.__file__); train_distill.main()',
        f'nowhere -c {RECIPES[0]} --dataset sklearn/digits --model test_resnet --teacher nosuch',
    )
    done = start(wheel, tmp_path, '-c', code[0], *code[1].split())
    assert done.stdout.strip() == str(wheel / 'timm_pe' / '__init__.py')
    assert done.returncode == 2
    # the recipe was read: it is the model after it that is refused
    assert "unknown model 'nosuch'" in done.stderr


def test_every_installed_command_starts_outside_the_repository(wheel, tmp_path):
    (entries,) = wheel.glob('*.dist-info/entry_points.txt')
    commands = re.findall(r'^([\w-]+) *= *([\w.]+):(\w+)$', entries.read_text(), re.MULTILINE)
    assert 'train-distill' in [name for name, _, _ in commands]
    for name, module, function in commands:
        code = f'import sys; from {module} import {function}; sys.argv[0] = {name!r}; {function}()'
        done = start(wheel, tmp_path, '-c', code, '--help')
        assert (done.returncode, done.stderr) == (0, '')
        assert done.stdout.startswith('usage: ')


def test_c_takes_a_recipe_by_its_name_and_a_file_of_that_name_first(tmp_path, monkeypatch, capsys):
    assert list_recipes() == RECIPES
    monkeypatch.chdir(tmp_path)
    name = 'imagenet_resnet34_resnet18_paper'
    for word in (name, f'{name}.yaml'):
        args = parse_config(['data', '-c', word])
        assert (args.model, args.teacher) == ('resnet18', 'resnet34.tv_in1k')
    Path(name).write_text('model: test_vit\n')
    assert parse_config(['data', '-c', name]).model == 'test_vit'
    for word, hint in (('imagenet_resnet34_resnet18', f'did you mean {name}'), ('zzz', f'which are {RECIPES[0]}')):
        with pytest.raises(SystemExit):
            parse_config(['data', '-c', word])
        assert hint in capsys.readouterr().err


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['cff-version'] == '1.2.0'
    assert citation['license'] == 'Apache-2.0'
    paper = citation['preferred-citation']
    assert paper['title'] == 'Improved Feature Distillation via Projector Ensemble'
    assert (paper['year'], paper['authors'][0]['family-names']) == (2022, 'Chen')
    (arxiv,) = re.findall(r'arXiv (\d{4}\.\d{5})\b', (ROOT / 'README.md').read_text())[:1]
    assert paper['identifiers'] == [{'type': 'other', 'value': f'arXiv:{arxiv}'}]

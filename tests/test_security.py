"""Nothing is executed from a data set, a checkpoint or a YAML file, and no secret leaves the process."""

import ast
import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers import refused, run
from timm.data import create_dataset

import timm_pe
import train_distill
from timm_pe.config import yaml_file

ROOT = Path(train_distill.__file__).parent
SOURCES = [*sorted(ROOT.glob('timm_pe/**/*.py')), ROOT / 'train_distill.py', ROOT / 'timm_pe_command.py']
# modules that unpickle, run code or run commands
DANGEROUS = {
    *('pickle', 'cPickle', '_pickle', 'dill', 'cloudpickle', 'joblib', 'marshal', 'shelve', 'code', 'codeop', 'runpy'),
    *('subprocess', 'pty', 'popen2', 'commands', 'imp', 'ctypes', 'torch.hub'),
}
# calls that do so, by their last two names
CALLS = {
    *('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'pandas.read_pickle', 'hub.load'),
    *('importlib.import_module', 'import_module', 'yaml.unsafe_load', 'yaml.full_load', 'yaml.load_all'),
    *('torch.load', 'yaml.load', 'np.load', 'numpy.load', 'jit.load', 'package.PackageImporter'),
}
# (file, call) -> why it may
ALLOWED = {
    (
        'runtime.py',
        'importlib.import_module',
    ): 'modules of --device-modules, which is taken from the command line alone',
    ('timm_pe_command.py', 'importlib.import_module'): 'the tools of this package, by a table of their names',
    ('yaml_file.py', 'yaml.load'): 'with a SafeLoader that refuses a key given twice',
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls in a file, by the last two of the names that lead to them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield '.'.join(ast.unparse(node.func).split('.')[-2:]), node


def findings(source: str, file: str) -> list[str]:
    """What in a file could run code that comes from outside."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
        found += [f'import of {name}' for name in names if name in DANGEROUS or name.split('.')[0] in DANGEROUS]
    for name, call in calls(tree):
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if keywords.get('weights_only', 'True') != 'True' or keywords.get('allow_pickle', 'False') != 'False':
            found.append(f'{name} that unpickles')
        if keywords.get('shell', 'False') != 'False':
            found.append(f'{name} with a shell')
        if name.startswith(('os.exec', 'os.spawn', 'os.posix_spawn')):
            found.append(name)
        safe = (name == 'torch.load' and 'weights_only' in keywords) or (
            name in ('np.load', 'numpy.load') and 'allow_pickle' in keywords
        )
        if name in CALLS and not safe and (file, name) not in ALLOWED:
            found.append(name)
    return found


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.name)
def test_no_module_runs_code_or_commands_that_come_from_outside(path):
    assert findings(path.read_text(encoding='utf-8'), path.name) == []


@pytest.mark.parametrize(
    'line',
    [
        'import pickle',
        'from pickle import loads',
        'import subprocess as s',
        'import os; os.system(x)',
        'os.execvp(a, b)',
        'eval(x)',
        'exec(x)',
        'torch.load(f)',
        'torch.load(f, weights_only=False)',
        'load_state_dict(f, weights_only=args.safe)',
        'np.load(f)',
        'np.load(f, allow_pickle=True)',
        'yaml.load(f, Loader=yaml.Loader)',
        'yaml.unsafe_load(f)',
        'importlib.import_module(name)',
        'run(x, shell=True)',
        'torch.hub.load(x)',
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert findings(line, 'x.py')


def test_the_yaml_loader_makes_no_more_than_yamls_safe_one():
    loader = yaml_file._UniqueKeyLoader
    assert issubclass(loader, yaml.SafeLoader)
    assert loader.yaml_constructors == yaml.SafeLoader.yaml_constructors
    assert loader.yaml_multi_constructors == yaml.SafeLoader.yaml_multi_constructors
    for name, call in calls(ast.parse(Path(yaml_file.__file__).read_text(encoding='utf-8'))):
        if name == 'yaml.load':
            assert {k.arg: ast.unparse(k.value) for k in call.keywords} == {'Loader': '_UniqueKeyLoader'}


# Secrets ---------------------------------------------------------------------------------------------------------------

SECRETS = {
    name: f'secret-{i}-0123456789abcdef'
    for i, name in enumerate(('WANDB_API_KEY', 'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'AWS_SECRET_ACCESS_KEY'))
}


@pytest.fixture
def secrets(monkeypatch) -> list[str]:
    """Tokens in the environment, as they are on a machine that trains."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return list(SECRETS.values())


def test_no_secret_of_the_environment_is_in_what_a_run_writes_or_says(small_run, tmp_path, secrets, capsys):
    run([*small_run, '--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained', '--epochs', '1'])
    said = capsys.readouterr()
    files = [path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()]
    assert len(files) >= 5
    for secret in secrets:
        assert secret not in said.out + said.err
        assert not any(secret.encode() in content for content in files)


@pytest.mark.parametrize('flag', ['--model', '--teacher'])
def test_no_secret_is_in_the_error_of_a_hub_that_cannot_be_reached(flag, small_run, tmp_path, secrets, capsys):
    more = ['--model', 'test_resnet', flag, 'hf-hub:nobody/nothing', '--teacher-pretrained']
    error = refused([*small_run, *(more if flag == '--teacher' else more[:-1])], capsys)
    assert 'hf-hub:nobody/nothing' in error
    assert not any(secret in error for secret in secrets)
    assert not (tmp_path / 'run').exists()


# Data ------------------------------------------------------------------------------------------------------------------


class _Runs:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f'touch {self.path}',)


def test_a_pickled_class_map_runs_nothing(small_run, tmp_path, capsys):
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(_Runs(tmp_path / 'canary')))
    argv = [*small_run, '--model', 'test_resnet', '--class-map', str(tmp_path / 'map.pkl')]
    assert 'not permitted in a class map' in refused(argv, capsys)
    assert not (tmp_path / 'canary').exists()


def test_a_pickled_index_beside_a_tar_runs_nothing(tmp_path):
    with tarfile.open(tmp_path / 'train.tar', 'w'):
        pass
    for name in ('_train_tarinfos.pickle', 'train_tarinfos.pickle', '_tarinfos.pickle'):
        (tmp_path / name).write_bytes(pickle.dumps(_Runs(tmp_path / 'canary')))
    with pytest.raises(Exception, match='.'):
        create_dataset('', root=str(tmp_path / 'train.tar'), cache_tarinfo=True)
    assert not (tmp_path / 'canary').exists()


def test_a_web_data_set_that_names_a_command_runs_nothing(tmp_path):
    pytest.importorskip('webdataset')
    command = f'pipe:touch {tmp_path}/canary'
    train = {'name': 'train', 'num_samples': 1, 'filenames': [command], 'shard_lengths': [1]}
    (tmp_path / '_info.json').write_text(json.dumps({'splits': {'train': train}}))
    dataset = create_dataset('wds/x', root=str(tmp_path), split='train')
    assert list(dataset) == []
    assert not (tmp_path / 'canary').exists()


def test_a_checkpoint_with_code_is_not_loaded_in_python_either(tmp_path):
    torch.save({'state_dict': {'fc.bias': torch.zeros(3)}, 'args': _Runs(tmp_path / 'canary')}, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='holds code'):
        timm_pe.create_teacher('test_resnet', checkpoint=tmp_path / 'x.pth')
    assert not (tmp_path / 'canary').exists()


def test_the_canaries_would_sing(tmp_path):
    pickle.loads(pickle.dumps(_Runs(tmp_path / 'canary')))
    assert (tmp_path / 'canary').exists()

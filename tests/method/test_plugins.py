"""Projectors and losses of packages outside the tree, found by their entry points."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import refused, run, summary

import train_distill
from timm_pe import ProjectorEnsemble, UsageError, create_feature_loss, list_feature_losses, list_projectors
from timm_pe.config.run_config import create_parser, parse_config
from timm_pe.method.names import FEATURE_LOSSES, PROJECTORS
from timm_pe.method.plugins import load_plugins

GOOD = """
import torch.nn as nn
from timm_pe import register_feature_loss, register_projector


@register_projector('narrow')
class Narrow(nn.Sequential):
    def __init__(self, in_dim, out_dim):
        super().__init__(nn.Linear(in_dim, 7), nn.Linear(7, out_dim))


@register_feature_loss('smooth_l1')
class SmoothL1(nn.Module):
    def forward(self, projected, teacher):
        return nn.functional.smooth_l1_loss(projected, teacher)
"""
FLAGS = ['--pe-projector', 'narrow', '--pe-loss', 'smooth_l1', '--distill-loss-weight', '2']


def install(folder: Path, name: str, source: str) -> Path:
    """A package as pip leaves it in `folder`: a module, and its metadata with an entry point."""
    module = name.replace('-', '_')
    info = folder / f'{module}-1.5.dist-info'
    info.mkdir(parents=True)
    (folder / f'{module}.py').write_text(source)
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n')
    (info / 'entry_points.txt').write_text(f'[timm_pe.plugins]\n{module} = {module}\n')
    return folder


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Gives a function that installs a package for this process; afterwards all is forgotten."""
    registries = [(registry, dict(registry)) for registry in (PROJECTORS.factories, FEATURE_LOSSES.factories)]
    modules = []

    def install_here(name: str, source: str) -> str:
        monkeypatch.syspath_prepend(install(tmp_path / 'site', name, source))
        modules.append(name.replace('-', '_'))
        load_plugins.cache_clear()
        return modules[-1]

    load_plugins.cache_clear()
    yield install_here
    load_plugins.cache_clear()
    for registry, before in registries:
        registry.clear()
        registry.update(before)
    for module in modules:
        sys.modules.pop(module, None)


TORCHRUN = ['-m', 'torch.distributed.run', '--nproc-per-node', '1']


@pytest.mark.parametrize('launcher', [[], pytest.param(TORCHRUN, marks=pytest.mark.long)], ids=['python', 'torchrun'])
def test_a_package_outside_the_tree_trains_with_its_projector_and_loss(launcher, small_run, tmp_path):
    install(tmp_path / 'site', 'my-projectors', GOOD)
    script = Path(train_distill.__file__)
    path = os.pathsep.join([str(tmp_path / 'site'), str(script.parent)])
    models = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained', '--no-teacher-eval']
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *small_run, *models, *FLAGS, '--epochs', '1'],
        env={**os.environ, 'PYTHONPATH': path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert '3 x narrow' in done.stderr
    assert float(summary(tmp_path / 'run')[0]['train_pe_loss']) > 0
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)['task_state']
    assert any(value.shape[0] == 7 for value in state['projection'].values())


def test_names_of_plugins_are_known_in_yaml_in_help_and_in_python(installed, tmp_path, capsys):
    installed('my-projectors', GOOD)
    (tmp_path / 'run.yaml').write_text('teacher: resnet34\npe_projector: narrow\npe_loss: smooth_l1\n')
    args = parse_config(['data', '-c', str(tmp_path / 'run.yaml')])
    assert (args.pe_projector, args.pe_loss) == ('narrow', 'smooth_l1')
    with pytest.raises(SystemExit):
        parse_config(['--help'])
    said = ' '.join(capsys.readouterr().out.split())
    assert f'kind of projector: {", ".join(list_projectors())}' in said
    assert 'narrow' in list_projectors()
    assert 'smooth_l1' in list_feature_losses()
    assert ProjectorEnsemble(4, 6, 2, 'narrow')(torch.randn(3, 4)).shape == (3, 6)
    assert create_feature_loss('smooth_l1')(torch.zeros(3, 4), torch.zeros(3, 4)) == 0


def test_a_run_that_uses_no_plugin_imports_none(installed, small_run, tmp_path, capsys):
    module = installed('broken-projectors', 'raise RuntimeError("no luck")')
    said = run([*small_run, '--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained'], capsys)
    assert 'Plugin' not in said
    assert module not in sys.modules
    assert (tmp_path / 'run' / 'student.safetensors').is_file()


@pytest.mark.parametrize(
    ('source', 'reason'),
    [
        ('raise RuntimeError("no\\nluck")', 'RuntimeError: no luck'),
        ('import sys; sys.exit(3)', 'SystemExit: 3'),
        ('import no_such_package', 'no_such_package'),
        ('def broken(', 'SyntaxError'),
        (GOOD.replace('narrow', 'linear'), "projector 'linear' is registered already"),
    ],
)
def test_a_broken_plugin_is_one_warning_that_names_its_package(source, reason, installed, small_run, capsys, caplog):
    linear = PROJECTORS.factories['linear']
    installed('broken-projectors', source)
    error = refused([*small_run, '--model', 'test_resnet', '--teacher', 'test_vit', '--pe-projector', 'narow'], capsys)
    assert 'narow' in error
    assert all(name in error for name in ('linear', 'mlp', 'orthogonal'))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("Plugin 'broken_projectors' of broken-projectors 1.5 is broken")
    assert reason in warning
    assert '\n' not in warning
    assert PROJECTORS.factories['linear'] is linear


def test_one_broken_plugin_does_not_hide_another(installed, caplog):
    installed('broken-projectors', 'raise RuntimeError')
    installed('my-projectors', GOOD)
    assert 'narrow' in list_projectors()
    assert 'narrow' in create_parser().format_help()
    assert len(caplog.records) == 1


def test_a_projector_of_the_wrong_width_is_refused_before_a_loss_can_broadcast_it(installed):
    installed('my-projectors', GOOD.replace('nn.Linear(7, out_dim)', 'nn.Linear(7, 1)'))
    ensemble = ProjectorEnsemble(4, 6, 2, 'narrow')
    with pytest.raises(UsageError, match=r"projector 'narrow' must map \[b, 4\] to \[b, 6\].*give \[3, 2, 1\]"):
        ensemble(torch.randn(3, 4))


SPARE = """
import torch.nn as nn
from timm_pe import register_projector


@register_projector('narrow')
class Narrow(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.used, self.spare = nn.Linear(in_dim, out_dim), nn.Linear(in_dim, 2)

    def forward(self, x):
        return self.used(x)
"""


def test_a_projector_with_parameters_that_get_no_gradient_is_refused_in_one_line(
    installed, small_run, tmp_path, capsys
):
    installed('my-projectors', SPARE)
    models = ['--model', 'test_resnet', '--teacher', 'test_vit', '--no-teacher-pretrained', '--no-teacher-eval']
    error = refused([*small_run, *models, '--pe-projector', 'narrow', '--pe-projectors', '2'], capsys)
    assert (
        "projector 'narrow' has parameters without a gradient, 0.spare.weight, 0.spare.bias, 1.spare.weight and 1 more"
        in error
    )
    assert 'use them in its forward, or take them out of it' in error
    assert not (tmp_path / 'run').exists()


def test_a_projector_that_is_cut_off_from_its_parameters_is_refused(installed):
    installed('my-projectors', SPARE.replace('self.used(x)', 'self.used(x).detach()'))
    with pytest.raises(
        UsageError, match="'narrow' has parameters without a gradient, 0.used.weight, 0.used.bias, 0.spare"
    ):
        ProjectorEnsemble(4, 6, 1, 'narrow').check_gradients()


@pytest.mark.parametrize('name', ['linear', 'mlp', 'linear_bn', 'orthogonal', 'identity', 'narrow'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_looking_for_gradients_changes_nothing(name, dtype, installed):
    installed(
        'my-projectors',
        GOOD.replace('nn.Linear(7, out_dim)', 'nn.Dropout(0.5), nn.BatchNorm1d(7), nn.Linear(7, out_dim)'),
    )
    ensemble = ProjectorEnsemble(6, 6, 1, name).to(dtype).eval()
    before, random = {k: v.clone() for k, v in ensemble.state_dict().items()}, torch.get_rng_state()
    ensemble.check_gradients()
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in ensemble.modules())
    assert all(torch.equal(value, before[k]) for k, value in ensemble.state_dict().items())
    assert all(p.grad is None for p in ensemble.parameters())

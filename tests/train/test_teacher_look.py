"""What a run says of its teacher before it begins: how good it is by its own transforms, whether it is random, what is wrong."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from helpers import refused, run, summary

from timm_pe import create_teacher
from timm_pe.train import first_look


@pytest.fixture
def taught(small_run, tmp_path) -> Path:
    """A teacher's run at 40 pixels, nearest and whole images, where the others have 32, bicubic and a crop."""
    argv = ['--model', 'test_resnet', '--experiment', 'teacher', '--epochs', '8', '--lr', '0.05', '--img-size', '40']
    run([*small_run, *argv, '--crop-pct', '1', '--interpolation', 'bilinear'])
    return tmp_path / 'teacher'


def best(folder: Path) -> float:
    return max(float(row['eval_top1']) for row in summary(folder))


def test_a_run_folder_names_its_network_and_is_validated_by_its_own_transforms_too(small_run, tmp_path, taught, capsys):
    said = run(
        [*small_run, '--model', 'test_efficientnet', '--teacher-checkpoint', str(taught), '--epochs', '1'], capsys
    )
    assert yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())['teacher'] == 'test_resnet'
    found = re.search(
        r'Teacher: top-1 ([\d.]+) %  val loss [\d.]+ on the validation split by its own transforms '
        r'\(40x40, crop 1, bilinear\),\n'
        r"(?:.*)Teacher: top-1 [\d.]+ %  val loss [\d.]+ by this run's \(32x32, crop 0\.95, bicubic\), as it teaches\.",
        said,
    )
    assert float(found[1]) == pytest.approx(best(taught), abs=1e-3)


def test_one_number_is_said_where_the_transforms_are_the_same(small_run, taught, capsys):
    same = ['--img-size', '40', '--crop-pct', '1', '--interpolation', 'bilinear', '--epochs', '1']
    said = run([*small_run, '--model', 'test_efficientnet', '--teacher-checkpoint', str(taught), *same], capsys)
    assert f'Teacher: top-1 {best(taught):.3f} %' in said
    assert 'own transforms' not in said


@pytest.mark.parametrize('name', ['', 'local-dir:'])
def test_a_run_folder_in_place_of_a_models_name_is_refused_with_the_flag_that_takes_it(name, small_run, taught, capsys):
    error = refused([*small_run, '--model', 'test_resnet', '--teacher', f'{name}{taught}'], capsys)
    assert f"is a run folder, and no model's name: give --teacher-checkpoint {taught} in its place" in error
    error = refused([*small_run, '--model', f'{name}{taught}'], capsys)
    assert f'--pretrained-path {taught} for its weights or --resume {taught} to go on' in error


def test_a_name_of_timm_is_one_beside_a_run_folder_of_that_name_too(small_run, taught, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(taught, 'test_resnet')
    run(
        [
            *small_run,
            '--model',
            'test_resnet',
            '--teacher',
            'test_resnet',
            '--teacher-checkpoint',
            'test_resnet',
            '--epochs',
            '1',
        ]
    )


@pytest.mark.parametrize(('own', 'alarm'), [(90.0, False), (33.4, True)])
def test_the_alarm_is_raised_where_both_numbers_are_at_chance(small_run, taught, monkeypatch, capsys, own, alarm):
    numbers = iter([33.4, own])
    monkeypatch.setattr(first_look, 'validate', lambda *args: {'loss': 1.0, 'top1': next(numbers)})
    argv = ['--model', 'test_efficientnet', '--teacher-checkpoint', str(taught), '--epochs', '1']
    assert ('CHANCE LEVEL' in run([*small_run, *argv], capsys)) == alarm


def test_a_teacher_of_images_in_another_colour_space_is_refused(small_run, taught, capsys):
    argv = [*small_run, '--model', 'test_vit', '--teacher-checkpoint', str(taught), '--input-img-mode', 'HSV']
    assert 'was trained with --input-img-mode RGB, this one has HSV: give both the same' in refused(argv, capsys)


def test_the_wrong_name_for_a_run_folder_says_which_network_that_is(small_run, taught, tmp_path, capsys):
    argv = [*small_run, '--model', 'test_vit', '--teacher', 'test_efficientnet', '--teacher-checkpoint', str(taught)]
    said = refused(argv, capsys)
    assert f"--teacher test_efficientnet: the run in '{taught}' has trained test_resnet: leave --teacher out" in said
    assert not (tmp_path / 'run').exists()


def test_random_weights_are_said_to_be_random_and_raise_no_alarm(small_run, capsys):
    random = ['--teacher', 'test_vit', '--no-teacher-pretrained', '--teacher-num-classes', '3', '--epochs', '1']
    said = run([*small_run, '--model', 'test_resnet', *random], capsys)
    assert 'Teacher: its weights are RANDOM' in said
    assert 'test_vit (random weights)' in said
    assert 'CHANCE' not in said


@pytest.mark.parametrize(
    ('argv', 'ways'),
    [
        (
            ['--model', 'test_vit', '--teacher', 'test_resnet'],
            ['--teacher-checkpoint FILE', '--teacher local-dir:FOLDER'],
        ),
        (['--model', 'test_resnet', '--pretrained'], ['--pretrained-path FILE', '--model local-dir:FOLDER']),
    ],
)
def test_weights_that_cannot_be_had_name_the_flags_that_take_them_from_here(small_run, argv, ways, capsys):
    said = refused([*small_run, *argv], capsys)
    assert 'no pretrained weights for' in said
    for way in ways:
        assert way in said


def test_weights_of_torchvision_are_known_for_what_they_are(small_run, tmp_path, capsys):
    file = tmp_path / 'weights.pth'
    network = torchvision.models.mobilenet_v3_small(num_classes=3)
    torch.save(network.state_dict(), file)
    teacher = ['--teacher', 'mobilenetv3_small_100', '--teacher-checkpoint', str(file)]
    said = refused([*small_run, '--model', 'test_resnet', *teacher], capsys)
    assert "it is torchvision's mobilenet_v3_small, which names its weights otherwise" in said
    assert create_teacher(network, checkpoint=file, tap='classifier.3').width == 1024

"""The size at which a run's teacher sees images: what is said of it, and what goes on as it was."""

import json
import re

import pytest
import torch
from helpers import load, make_trainer, refused, run

PAIR = ['--model', 'test_resnet', '--teacher', 'test_vit_relpos', '--no-teacher-pretrained']


@pytest.fixture
def argv(small_run):
    return [*small_run, *PAIR, '--img-size', '40', '--teacher-dtype', 'float32']


def size_of(trainer):
    return trainer.teachers[0].size_for(torch.empty(1, 3, 40, 40))


def test_a_vit_is_built_for_the_students_images_and_that_is_said(argv, capsys):
    said = run(argv, capsys)
    assert re.search(r'input +3x40x40 +3x32x32 \(bicubic\), built for it in place of 160x160', said)
    assert said.count("Teacher: built for 32x32 images, the student's are 40x40") == 1


@pytest.mark.parametrize(
    ('flags', 'size'),
    [
        ('', (32, 32)),
        ('--teacher-input-size 160', (160, 160)),
        ('--teacher-input-size 64', (64, 64)),
        ('--teacher-kwargs img_size=48', (48, 48)),
        ('--teacher-kwargs img_size=160', (160, 160)),
    ],
)
def test_flags_win(flags, size, argv, monkeypatch):
    assert size_of(make_trainer([*argv, *flags.split()], monkeypatch)) == size


def test_a_teacher_that_needs_more_pixels_is_said(small_run, capsys):
    argv = [*small_run, '--model', 'test_resnet', '--teacher', 'mixer_s32_224', '--no-teacher-pretrained']
    assert "Teacher: it sees 224x224 images, as its architecture cannot take the student's 32x32: 49.0 times" in run(
        [*argv, '--epochs', '1'], capsys
    )


def test_a_checkpoint_of_before_goes_on_with_the_size_that_it_had(argv, tmp_path, monkeypatch, capsys):
    run([*argv, '--epochs', '1'])
    last = tmp_path / 'run' / 'last.pth.tar'
    checkpoint = load(last)
    assert checkpoint['saver']['run']['meaning'].pop('teacher_input') == '32x32'
    resumed = [*argv, '--resume', str(last), '--experiment', 'on']
    assert size_of(make_trainer(resumed, monkeypatch)) == (32, 32)
    torch.save(checkpoint, last)
    capsys.readouterr()
    assert size_of(make_trainer(resumed, monkeypatch)) == (160, 160)
    assert "as its architecture cannot take the student's 40x40: 16.0 times as many pixels" in capsys.readouterr().err


def test_a_cache_of_before_is_not_mixed(argv, tmp_path, capsys):
    argv = [*argv, '--teacher-cache', str(tmp_path / 'cache'), '--seed', '1']
    run(argv)
    manifest = tmp_path / 'cache' / 'manifest.json'
    values = json.loads(manifest.read_text())
    assert values['teacher input'] == '3x32x32'
    manifest.write_text(json.dumps({**values, 'teacher input': '3x160x160'}))
    assert 'teacher input 3x160x160 there and 3x32x32 here' in refused([*argv, '--experiment', 'on'], capsys)

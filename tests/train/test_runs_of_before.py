"""A run folder that the flat layout wrote (commit dfac537) is resumed, evaluated, analysed, and teaches.

tests/fixtures/run_of_dfac537 has its run of four epochs: `whole` was left alone, `student` was stopped in epoch 2, and
`teacher` taught both.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers import load, run, summary
from safetensors.torch import load_file
from torch.utils._pytree import keystr, tree_flatten_with_path

from timm_pe import analysis, create_teacher

WRITTEN = Path(__file__).parents[1] / 'fixtures' / 'run_of_dfac537'
SHAPE = {'num_classes': 10, 'patch_size': 4, 'img_size': 16, 'depth': 1, 'num_heads': 2, 'embed_dim': 8}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A copy of what was written; the working folder, since its paths are relative."""
    for name in ('teacher', 'student'):
        shutil.copytree(WRITTEN / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(row: dict[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name != 'train_images_per_s'}


def best(folder: Path) -> float:
    return max(float(row['eval_top1']) for row in summary(folder))


def resume(here: Path) -> Path:
    run(['-c', str(here / 'student' / 'args.yaml'), '--experiment', 'student', '--resume', 'auto'])
    return here / 'student'


def test_it_is_resumed_in_mid_epoch_and_ends_as_the_run_that_was_left_alone(here):
    resumed = resume(here)
    ours, theirs = load(resumed / 'last.pth.tar'), load(WRITTEN / 'whole' / 'last.pth.tar')
    assert ours['epoch'] == theirs['epoch'] == 3
    for part in ('state_dict', 'task_state', 'optimizer'):
        (our, our_tree), (their, their_tree) = tree_flatten_with_path(ours[part]), tree_flatten_with_path(theirs[part])
        assert our_tree == their_tree
        for (key, value), (_, expected) in zip(our, their, strict=True):
            # the gradient of a key's bias is zero but for rounding, of which AdamW makes steps
            if 'qkv.bias' in keystr(key):
                value, expected = (torch.cat([b.chunk(3)[0], b.chunk(3)[2]]) for b in (value, expected))
            if isinstance(expected, torch.Tensor):  # other processors round otherwise
                torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)
            else:
                assert value == expected
    for our, their in zip(summary(resumed), summary(WRITTEN / 'whole'), strict=True):
        assert list(our) == list(their)
        assert numbers(our) == pytest.approx(numbers(their), rel=1e-4)


def test_its_student_loads_in_plain_timm_and_evaluates_to_its_own_top1(here, capsys):
    student = timm.create_model('test_vit', **SHAPE)
    student.load_state_dict(load_file(here / 'student' / 'student.safetensors'))
    said = run(['--evaluate', str(here / 'student'), '-j', '0', '--device', 'cpu'], capsys)
    assert float(re.search(r'top-1 ([\d.]+) %', said)[1]) == pytest.approx(best(here / 'student'), abs=1e-3)


def test_it_is_analysed(here):
    analysis.main([str(resume(here)), '--device', 'cpu'])
    found = json.loads((here / 'student' / 'analysis.json').read_text())
    assert found['validation']['top1'] == pytest.approx(best(here / 'student'), abs=1e-3)


@pytest.mark.parametrize(
    'file', ['last.pth.tar', 'recovery-2-0.pth.tar', 'checkpoint-0.pth.tar', 'student.safetensors']
)
def test_each_of_its_files_can_be_a_teacher(here, file):
    shape = {name: value for name, value in SHAPE.items() if name != 'num_classes'}
    teacher = create_teacher('test_vit', checkpoint=here / 'student' / file, model_kwargs=shape)
    assert teacher.num_classes == 10

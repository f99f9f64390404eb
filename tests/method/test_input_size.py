"""A teacher with a fixed input size is built for the student's images, with its position embeddings resampled."""

import functools

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from timm_pe import create_teacher
from timm_pe.method.input_size import size_to_build

FIXED = {'dynamic_img_size': False}


def fixed_vit(**kwargs):
    return timm.create_model('test_vit', **FIXED, **kwargs)


@pytest.mark.parametrize(
    ('wanted', 'size'), [((64, 64), (64, 64)), ((70, 90), (64, 96)), ((5, 5), (16, 16)), ((160, 160), None)]
)
def test_images_are_rounded_to_patches(wanted, size):
    assert size_to_build(fixed_vit, wanted) == size


def test_a_size_that_is_given_is_not_rounded():
    assert size_to_build(fixed_vit, (64, 64), rounds=False) == (64, 64)
    assert size_to_build(fixed_vit, (70, 70), rounds=False) is None


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'test_convnext'])
def test_what_takes_any_size_is_left_as_it_is(name):
    assert size_to_build(functools.partial(timm.create_model, name), (64, 64)) is None


def test_it_costs_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    size_to_build(fixed_vit, (64, 64))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize('name', ['swin_tiny_patch4_window7_224', 'vit_relpos_small_patch16_224', 'coatnet_0_224'])
def test_windows_and_relative_positions_are_built_anew_too(name):
    assert size_to_build(functools.partial(timm.create_model, name), (64, 64)) == (64, 64)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'vit.pth'
    torch.manual_seed(3)
    torch.save(fixed_vit().state_dict(), path)
    return path


def test_its_embeddings_are_those_that_timm_resamples_for_another_size(checkpoint):
    teacher = create_teacher('test_vit', checkpoint, model_kwargs=FIXED, student_size=(70, 70))
    assert (teacher.built_size, teacher.own_size) == ((64, 64), (160, 160))
    timms = fixed_vit(img_size=64).eval()
    timms.load_state_dict(checkpoint_filter_fn(torch.load(checkpoint), timms))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(teacher.model(x), timms(x))
    assert teacher.size_for(torch.empty(1, 3, 70, 70)) == (64, 64)
    assert teacher(torch.randn(2, 3, 70, 70)).feature.shape == (2, 64)


def test_its_fingerprint_is_that_of_its_file(checkpoint):
    resized, own = (
        create_teacher('test_vit', checkpoint, model_kwargs=FIXED, student_size=s) for s in ((64, 64), None)
    )
    assert resized.fingerprint == own.fingerprint
    assert own.built_size is None
    assert own.size_for(torch.empty(1, 3, 64, 64)) == (160, 160)


def test_a_size_that_is_given_wins(checkpoint):
    create = functools.partial(create_teacher, 'test_vit', checkpoint, model_kwargs=FIXED, student_size=(64, 64))
    assert create(input_size=160).size_for(torch.empty(1, 3, 64, 64)) == (160, 160)
    assert create(input_size=96).size_for(torch.empty(1, 3, 64, 64)) == (96, 96)

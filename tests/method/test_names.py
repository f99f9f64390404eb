"""Names are declared without torch, what they stand for with it: both are the same."""

import pytest

from timm_pe.method import losses, names, projectors, task


@pytest.mark.parametrize(
    ('known', 'registry'),
    [(names.PROJECTOR_NAMES, projectors._PROJECTORS), (names.FEATURE_LOSS_NAMES, losses._FEATURE_LOSSES)],
    ids=['projectors', 'feature losses'],
)
def test_the_names_of_this_package_are_those_that_it_registers(known, registry):
    assert {name for name, made in registry.items() if made.__module__.startswith('timm_pe.')} == set(known.own)
    assert len(known.own) == len(set(known.own))


def test_each_name_of_a_teacher_norm_is_one():
    assert tuple(losses.TEACHER_NORMS) == names.TEACHER_NORM_NAMES


def test_the_loss_of_a_target_is_a_known_one():
    assert {recipe.feature_loss for recipe in names.TARGETS.values()} <= set(names.FEATURE_LOSS_NAMES.own)
    assert task.TARGETS is names.TARGETS

"""Names are declared without torch, what they stand for with it: both are the same."""

import pytest

from timm_pe.method import losses, names, projectors, task


@pytest.mark.parametrize('registry', [projectors.PROJECTORS, losses.FEATURE_LOSSES], ids=lambda registry: registry.what)
def test_the_names_of_this_package_are_those_that_it_registers(registry):
    made_here = {name for name, made in registry.factories.items() if made.__module__.startswith('timm_pe.')}
    assert made_here == set(registry.own)
    assert len(registry.own) == len(set(registry.own))


def test_each_name_of_a_teacher_norm_is_one():
    assert tuple(losses.TEACHER_NORMS) == names.TEACHER_NORM_NAMES


def test_the_loss_of_a_target_is_a_known_one():
    assert {recipe.feature_loss for recipe in names.TARGETS.values()} <= set(names.FEATURE_LOSSES.own)
    assert task.TARGETS is names.TARGETS

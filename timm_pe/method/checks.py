"""What arguments of a task cannot be, and what they say about one of its parts."""

from collections.abc import Iterable

import torch.nn as nn
from timm.layers import PatchDropout, PatchDropoutWithIndices

from ..errors import UsageError
from .aims import Aim, has_rows
from .losses import TEACHER_NORMS, KlLoss, create_feature_loss
from .map_tap import MapTap
from .names import TARGETS
from .tap import FeatureTap
from .teacher import Teacher
from .teachers import check_logits


def check_settings(target: str, teacher_norm: str, temperature: float, compares_many_labels: bool) -> None:
    """Refuse names that do not exist, and logits that cannot be compared.

    Raises:
        UsageError: The message has what was given and what is allowed.
    """
    _check_choice('target', target, TARGETS)
    _check_choice('teacher_norm', teacher_norm, TEACHER_NORMS)
    if compares_many_labels:
        raise UsageError('logit distillation compares softmax logits, which multi-label targets do not have')
    if temperature <= 0:
        raise UsageError(f'the KD temperature must be above 0, got {temperature}')
    if target == 'logits' and teacher_norm != 'none':
        raise UsageError(f"teacher_norm '{teacher_norm}' is for features, it does not go with target 'logits'")


def check_weights(**weights: float | None) -> None:
    """Refuse weights of the loss, by their names, that are no number from 0 on; None is the default one.

    Raises:
        UsageError: The message has the name and what was given.
    """
    for name, weight in weights.items():
        if weight is not None and not 0 <= weight < float('inf'):
            raise UsageError(f'{name} must be a number from 0 on, got {weight}')


def create_frozen_loss(name: str, temperature: float) -> nn.Module:
    """The feature loss of that name; 'kl' with the temperature.

    Raises:
        UsageError: Unknown, or with parameters of its own.
    """
    loss = create_feature_loss(name)
    if any(p.requires_grad for p in loss.parameters()):
        raise UsageError(
            f"feature loss '{name}' has parameters, which no optimizer trains: freeze them, or make them part of a projector"
        )
    if isinstance(loss, KlLoss):
        loss.temperature = temperature
    return loss


def widths_of(
    aim: Aim, tap: FeatureTap, map_tap: MapTap | None, student: nn.Module, teacher: Teacher
) -> tuple[int, int]:
    """How wide the student's output is that the projectors of an aim map, and how wide the teacher's is."""
    if aim.tapped == 'map' and map_tap is not None:
        return map_tap.width, teacher.tap_map().width
    if aim.tapped == 'feature':
        return tap.width, teacher.width
    check_logits(teacher)
    return _num_classes(student, 'student'), _num_classes(teacher, 'teacher')


def check_whole_maps(student: nn.Module) -> None:
    """Refuse a student that drops patches in training: what is left is no map.

    Raises:
        UsageError: It does.
    """
    if any(
        isinstance(module, (PatchDropout, PatchDropoutWithIndices)) and module.prob > 0 for module in student.modules()
    ):
        raise UsageError(
            'the student drops patches in training (patch_drop_rate), so it has no whole map: leave that off, or give no map '
            'weight'
        )


def check_drop(drop: float, teachers: int, loss: nn.Module, loss_name: str) -> None:
    """Refuse a `teacher_drop` that is no probability, or has nothing to choose from.

    Raises:
        UsageError: The message says which.
    """
    if not 0 <= drop <= 1:
        raise UsageError(f'teacher_drop is a probability from 0 to 1, got {drop}')
    if drop and teachers == 1:
        raise UsageError('teacher_drop chooses between teachers, and there is one: give several, or leave it at 0')
    if drop and not has_rows(loss):
        raise UsageError(
            f"teacher_drop needs a loss of each image, which '{loss_name}' does not give: use the feature loss 'direction'"
        )


def check_dim(name: str, given: int | None, measured: int) -> None:
    """Refuse a width that was given and is not the measured one.

    Raises:
        UsageError: The message has both.
    """
    if given is not None and given != measured:
        raise UsageError(f'{name} is {given}, but the feature that enters the classifier has {measured} channels')


def _check_choice(name: str, given: str, allowed: Iterable[str]) -> None:
    if given not in allowed:
        raise UsageError(f"unknown {name} '{given}': choose from {', '.join(allowed)}")


def _num_classes(model: nn.Module, what: str) -> int:
    classes = getattr(model, 'num_classes', None)
    if not classes:
        raise UsageError(f"the {what} has no logits to project (its num_classes is {classes}): use target 'feature'")
    return classes


def has_classifier(student: nn.Module, task_loss_weight: float | None) -> bool:
    """Whether a student has a classifier, whose outputs a task loss can read.

    Raises:
        UsageError: It has none, and the task loss has a weight.
    """
    if getattr(student, 'num_classes', None) != 0:
        return True
    if task_loss_weight:
        raise UsageError(
            'the student has no classifier (num_classes=0), so there is no task loss: leave task_loss_weight out, or give a '
            'criterion for its features'
        )
    return False

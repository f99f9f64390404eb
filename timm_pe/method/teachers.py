"""The teachers of a task: one or several, created, named, weighed and checked."""

import itertools
import logging
import math
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from timm.data.model_config import resolve_input_data_config
from timm.utils import unwrap_model
from torch.nn.modules.batchnorm import _NormBase

from ..errors import UsageError
from .teacher import Teacher, create_teacher, refuse_given

_logger = logging.getLogger(__name__)

# what names a teacher to the task
TeacherLike = str | nn.Module


def as_list(teachers: TeacherLike | Sequence[TeacherLike]) -> list[TeacherLike]:
    """The teachers, also of a single one.

    Raises:
        UsageError: There is none.
    """
    several = isinstance(teachers, nn.ModuleList) or not isinstance(teachers, (str, nn.Module))
    found: list[TeacherLike] = list(teachers) if several else [teachers]  # type: ignore[list-item, arg-type]
    if not found:
        raise UsageError('the list of teachers is empty: give one or more')
    return found


def check_single(
    number: int,
    teacher_pretrained_path: str | None,
    teacher_pretrained_cfg_overlay: dict[str, Any] | None,
    teacher_tap: str | None,
    teacher_feature_dim: int | None,
) -> None:
    """Refuse arguments about one teacher where there are several.

    Raises:
        UsageError: The message names them.
    """
    given = {
        'teacher_pretrained_path': teacher_pretrained_path,
        'teacher_pretrained_cfg_overlay': teacher_pretrained_cfg_overlay,
        'teacher_tap': teacher_tap,
        'teacher_feature_dim': teacher_feature_dim,
    }
    named = [name for name, value in given.items() if value is not None]
    if number > 1 and named:
        raise UsageError(
            f'{", ".join(named)} cannot say which of {number} teachers is meant: make each with create_teacher(...)'
        )


def check_apart(student: nn.Module, teachers: Sequence[TeacherLike]) -> None:
    """Refuse networks that share parameters or norms.

    Raises:
        UsageError: The student with a teacher, or two teachers.
    """
    states = [_states(t) if isinstance(t, nn.Module) else set() for t in teachers]
    if any(_states(student) & of_teacher for of_teacher in states):
        raise UsageError(
            'student and teacher share parameters or norms, and a teacher is frozen: give copy.deepcopy(student) as the teacher'
        )
    for j in range(len(teachers)):
        for i in range(j):
            if states[i] & states[j]:
                raise UsageError(f'teachers {i + 1} and {j + 1} share parameters or norms: give each network once')


def _states(network: nn.Module) -> set[int]:
    """Identities of the parameters and norms of a network: a norm without parameters has statistics, and a mode."""
    norms = (m for m in network.modules() if isinstance(m, _NormBase) and m.running_mean is not None)
    return {id(x) for x in [*network.parameters(), *norms]}


def normalize_weights(weights: Sequence[float] | None, number: int) -> list[float]:
    """The teachers' weights, scaled to sum 1; equal ones for None.

    Raises:
        UsageError: Another number of weights than of teachers, or one that is not above 0.
    """
    weights = [1.0] * number if weights is None else [float(w) for w in weights]
    if len(weights) != number:
        raise UsageError(f'{len(weights)} teacher_weights for {number} teachers: give one for each')
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise UsageError(
            f'teacher_weights must be above 0, got {weights}: leave out a teacher that is to count nothing'
        )
    return [w / sum(weights) for w in weights]


def name_teachers(teachers: Sequence[Teacher]) -> list[str]:
    """A name for each: its architecture, else its class: 'resnet34'.

    Those of one architecture have timm's tag of the name that they were made with too, 'resnet50_a1_in1k', else a number:
    'resnet34_2'. Weights of a file, and random ones, have no tag.
    """
    cfgs: list[Any] = [getattr(unwrap_model(teacher.model), 'pretrained_cfg', None) or {} for teacher in teachers]
    classes = [type(unwrap_model(teacher.model)).__name__.lower() for teacher in teachers]
    bases = [cfg.get('architecture') or name for cfg, name in zip(cfgs, classes, strict=True)]
    names: list[str] = []
    for base, cfg in zip(bases, cfgs, strict=True):
        tags = [other.get('tag') for other, of in zip(cfgs, bases, strict=True) if of == base]
        is_told = len(tags) > 1 and all(tags) and len(set(tags)) == len(tags)
        name = first = re.sub(r'\W', '_', f'{base}_{cfg["tag"]}' if is_told else base)
        number = itertools.count(2)
        while name in names:
            name = f'{first}_{next(number)}'
        names.append(name)
    return names


def resolve_teacher(
    teacher: TeacherLike,
    student: nn.Module,
    checkpoint: str | None,
    cfg_overlay: dict[str, Any] | None,
    tap: str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    device: torch.device,
    needs_logits: bool,
) -> Teacher:
    """One teacher as the task takes it, on its device; the arguments are the task's.

    Raises:
        UsageError: An argument that a given teacher cannot follow.
    """
    overlay = {'teacher_pretrained_cfg_overlay': cfg_overlay}
    if isinstance(teacher, Teacher):
        refuse_given('a Teacher', {'teacher_pretrained_path': checkpoint, **overlay, 'teacher_tap': tap})
        return teacher.to(device)
    if isinstance(teacher, nn.Module):
        refuse_given('a module', overlay)
    mean, std = _norm_of_student(student, mean, std)
    return create_teacher(
        teacher,
        checkpoint=checkpoint,
        model_kwargs={'pretrained_cfg_overlay': cfg_overlay} if cfg_overlay else None,
        tap=tap,
        input_mean=mean,
        input_std=std,
        device=device,
        needs_logits=needs_logits,
    )


def _norm_of_student(
    student: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and standard deviation that are given, else those that timm resolves for the student; None if it is not timm's."""
    if (mean and std) or not getattr(student, 'pretrained_cfg', None):
        return mean, std
    own = resolve_input_data_config(model=student)
    return mean or own['mean'], std or own['std']


def told_input_norm(
    teachers: Sequence[TeacherLike], mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """What the batches of a task are normalized with: as the task is told, else as those were told that made its teachers.

    Raises:
        UsageError: Two teachers were told otherwise, and the task nothing.
    """
    told = {(t.input_mean, t.input_std) for t in teachers if isinstance(t, Teacher) and t.input_norm_by == 'caller'}
    if mean or std or not told:
        return mean, std
    if len(told) > 1:
        raise UsageError(
            f'the teachers were made for images of mean and std {" and ".join(map(str, sorted(told)))}, and a batch has '
            f'one of them: make them with the same input_mean and input_std'
        )
    return told.pop()


def settle_input_norms(
    teachers: Sequence[Teacher], student: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """Tell teachers what the student's batches are normalized with, unless whoever made them has.

    Args:
        teachers: All of a task.
        student: Its student.
        mean: What the task is given; None is that of the student.
        std: Likewise.

    Raises:
        UsageError: One was told otherwise; none is changed then.
    """
    of_student, is_given = _norm_of_student(student, mean, std), bool(mean or std)
    norms = [_settled(teacher, *of_student, is_given) for teacher in teachers]
    for teacher, norm in zip(teachers, norms, strict=True):
        if teacher.input_norm_by == 'nobody':
            teacher.set_input_norm(*norm)
            teacher.input_norm_by = 'task'


def _settled(
    teacher: Teacher, mean: Sequence[float] | None, std: Sequence[float] | None, is_given: bool
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The normalization that a teacher is to expect."""
    known = teacher.input_mean, teacher.input_std
    wanted = tuple(mean or teacher.mean), tuple(std or teacher.std)
    if teacher.input_norm_by == 'nobody':
        return wanted
    if wanted == known:
        return known
    if teacher.input_norm_by == 'task' and (mean or std):
        raise UsageError(
            f'the teacher teaches a task whose images have mean and std {known}, those of this one have {wanted}: make a '
            f'Teacher for each, or tell it first, teacher.set_input_norm(mean, std)'
        )
    if is_given:
        raise UsageError(
            f'the teacher was made for images of mean and std {known}, the task is given {wanted}: give one of both'
        )
    _logger.info(f'The teacher keeps the input normalization that it has, {known}.')
    return known


def check_logits(teacher: Teacher) -> None:
    """Refuse a teacher that leaves out its classifier.

    Raises:
        UsageError: It was made without the logits that a loss compares.
    """
    if not teacher.needs_logits:
        raise UsageError('the teacher was made with needs_logits=False, but a loss compares logits: make it with True')


def teachers_of_classes(student: nn.Module, teachers: Sequence[Teacher], names: Sequence[str]) -> list[int]:
    """Which teachers have as many classes as the student, or do not tell how many.

    Raises:
        UsageError: None has.
    """
    classes = getattr(student, 'num_classes', None)
    fitting = [i for i, teacher in enumerate(teachers) if teacher.num_classes in (None, classes)]
    if not fitting:
        theirs = [
            f'the teacher{f" {n}" if len(names) > 1 else ""} {t.num_classes}'
            for n, t in zip(names, teachers, strict=True)
        ]
        raise UsageError(
            f'logit distillation compares logits of equal classes, the student has {classes} and {", ".join(theirs)}: '
            f'set the KD weight to 0 (features need no equal classes) or take another teacher'
        )
    if len(fitting) < len(teachers):
        left_out = [names[i] for i in range(len(teachers)) if i not in fitting]
        _logger.info(f'Logit distillation leaves out {", ".join(left_out)}: of other classes than the student.')
    for i in fitting:
        check_logits(teachers[i])
    return fitting


def keep_out_of_state_dict(task: nn.Module) -> None:
    """Leave a task's frozen teachers out of its state_dict, and of that of a module around it; loading does not need them."""
    task.register_state_dict_post_hook(_drop_teachers)
    task.register_load_state_dict_pre_hook(_add_teachers)


def _drop_teachers(task: nn.Module, state: dict[str, Any], prefix: str, *more: Any) -> None:
    for name in [name for name in state if name.startswith(f'{prefix}teacher.')]:
        del state[name]


def _add_teachers(task: nn.Module, state: dict[str, Any], prefix: str, *more: Any) -> None:
    """Those that the task has, where the state has none."""
    for name, value in cast(nn.Module, task.teacher).state_dict().items():
        state.setdefault(f'{prefix}teacher.{name}', value)

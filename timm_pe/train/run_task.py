"""The task that the flags ask for: ours with teachers, else one of timm."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch.nn as nn
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)

from ..config.derive import loss_type, number_of_projectors
from ..config.run_config import RunConfig
from ..errors import UsageError, one_line
from ..method.names import TARGETS
from ..method.tap import classifiers
from ..method.task import ProjectorEnsembleTask
from ..method.teacher import Teacher
from ..method.weight_files import announce_download
from ..process.runtime import Runtime
from .student import place_student
from .task_loss import create_task_loss

_logger = logging.getLogger(__name__)


def create_run_task(
    config: RunConfig,
    student: nn.Module,
    teachers: Sequence[Teacher],
    data_config: Mapping[str, Any],
    runtime: Runtime,
) -> TrainingTask:
    """Make our task with teachers, timm's distillation task with --kd-model-name, else timm's classification task."""
    criterion = None
    if config.has_labels:
        criterion = create_task_loss(config, cast(int, student.num_classes), runtime.world_size).to(runtime.device)
    student = place_student(student, config, runtime)
    common: dict[str, Any] = {'device': runtime.device, 'dtype': runtime.model_dtype, 'verbose': False}
    if teachers:
        common |= {'input_mean': data_config['mean'], 'input_std': data_config['std']}
        return _create_projector_task(config, student, teachers, criterion, common)
    if config.kd_model_name:
        task = _create_timm_kd_task(config, config.kd_model_name, student, criterion, common)
        for name in ('mean', 'std'):  # timm's task has those of the student's pretrained_cfg, whatever the loader does
            known = getattr(task, f'student_{name}')
            values = known.new_tensor(data_config[name]).view(1, -1, 1, 1)
            task.register_buffer(f'student_{name}', values, persistent=False)
        return task
    if config.task == 'multilabel':
        return MultiLabelClassificationTask(student, criterion, threshold=config.multilabel_threshold, **common)
    return ClassificationTask(student, criterion, **common)


def _create_projector_task(
    config: RunConfig,
    student: nn.Module,
    teachers: Sequence[Teacher],
    criterion: nn.Module | None,
    common: dict[str, Any],
) -> ProjectorEnsembleTask:
    _warn_of_losses(config, teachers, criterion)
    task = ProjectorEnsembleTask(
        student_model=student,
        teacher_model=teachers,
        criterion=criterion,
        num_projectors=number_of_projectors(config),
        projector=config.pe_projector,
        act=config.pe_act,
        feature_loss=config.pe_loss,
        target=config.pe_target,
        teacher_norm=config.pe_teacher_norm,
        distill_loss_weight=config.distill_loss_weight,
        task_loss_weight=config.task_loss_weight,
        kd_loss_weight=config.kd_loss_weight,
        kd_temperature=config.kd_temperature,
        multi_label=config.task == 'multilabel',
        threshold=config.multilabel_threshold,
        student_tap=config.student_tap,
        teacher_weights=config.teacher_weights,
        teacher_drop=config.teacher_drop,
        map_weight=config.pe_map_weight,
        **common,
    )
    if config.student_tap and not config.has_labels and not _holds_classifier(student, config.student_tap):
        _logger.warning(
            f'Without labels nothing trains the layers behind --student-tap {config.student_tap}: those of a backbone that is '
            f'exported stay as they start.'
        )
    return task


def _warn_of_losses(config: RunConfig, teachers: Sequence[Teacher], criterion: nn.Module | None) -> None:
    """Say where a default does not suit the losses that were chosen."""
    recipe = TARGETS[config.pe_target]
    if config.pe_loss not in (None, recipe.feature_loss) and config.distill_loss_weight is None:
        _logger.warning(
            f'The default weight {recipe.distill_loss_weight:g} was chosen for the {recipe.feature_loss} loss, it now weighs {config.pe_loss!r}: '
            f'consider --distill-loss-weight.'
        )
    loss = loss_type(config) or ('bce' if config.task == 'multilabel' else 'ce')
    if config.distill_loss_weight is None and criterion is not None and loss == 'bce' and not config.bce_sum:
        summed = '--bce-sum' if loss_type(config) else '--loss bce --bce-sum'
        _logger.warning(
            f'The default weight {recipe.distill_loss_weight:g} was chosen beside a cross-entropy. The binary one is a mean over all '
            f'classes, and small: consider {summed} or --distill-loss-weight.'
        )
    widest = max(teacher.width for teacher in teachers)
    if config.pe_teacher_norm == 'whiten' and config.batch_size <= widest + 1:  # they span all that the images are
        _logger.warning(
            f'--pe-teacher-norm whiten: a batch of {config.batch_size} images is too small for {widest} channels of a '
            f'teacher, any two images become equally unlike: give a --batch-size well above that.'
        )
    if config.task_loss_weight == 0 and not config.kd_loss_weight and config.pe_target == 'feature':
        _logger.warning(
            "With --task-loss-weight 0 and features alone nothing trains the student's classifier: add --kd-loss-weight."
        )


def _holds_classifier(student: nn.Module, path: str) -> bool:
    """Whether a module of a student is its classifier, or holds it."""
    layers = [layer for head in classifiers(student) for layer in head]
    return any(module is layer for module in student.get_submodule(path).modules() for layer in layers)


def _create_timm_kd_task(
    config: RunConfig, teacher: str, student: nn.Module, criterion: nn.Module | None, common: dict[str, Any]
) -> TrainingTask:
    """timm's logit, feature or token distillation. It gives its teacher the student's classes and pretrained weights."""
    common = {
        **common,
        'student_model': student,
        'teacher_model': teacher,
        'criterion': criterion,
        'distill_loss_weight': config.distill_loss_weight,
        'task_loss_weight': config.task_loss_weight,
    }
    announce_download(teacher, '--kd-model-name')
    try:
        if config.kd_distill_type == 'logit':
            return LogitDistillationTask(loss_type=config.kd_loss_type, temperature=config.kd_temperature, **common)
        if config.kd_distill_type == 'feature':
            return FeatureDistillationTask(
                student_feature_dim=config.kd_student_feature_dim,
                teacher_feature_dim=config.kd_teacher_feature_dim,
                **common,
            )
        return TokenDistillationTask(
            distill_type=config.kd_token_distill_type, temperature=config.kd_temperature, **common
        )
    except Exception as e:
        raise UsageError(f"--kd-model-name '{teacher}': {one_line(e)}") from e

"""Teacher, task loss and task that the flags ask for."""

import contextlib
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision
from timm.loss import create_classification_loss
from timm.loss.class_weights import load_class_stats, resolve_class_weights
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)

from ..config.derive import label_smoothing, mixing_active, number_of_projectors, torch_dtype
from ..config.flags import LossFlags
from ..config.rules import loss_type
from ..config.run_config import RunConfig
from ..config.teachers import OneTeacher, teachers_of
from ..data.datasets import class_map_of, count_classes, describe_other_class
from ..data.draws import LabeledTarget
from ..data.loaders import Data
from ..errors import NoPretrainedWeights, UsageError, one_line
from ..method.input_size import Size
from ..method.names import TARGETS
from ..method.tap import classifiers
from ..method.task import ProjectorEnsembleTask
from ..method.teacher import Teacher, create_teacher
from ..method.weight_files import announce_download, read_state_dict
from ..process.runtime import Runtime
from ..run_folder import RunFolder
from .checkpoints import saved_classes
from .from_run import teacher_settings
from .student import place_student

_logger = logging.getLogger(__name__)


def create_run_teachers(config: RunConfig, data: Data, runtime: Runtime, resizes: bool = True) -> list[Teacher]:
    """The teachers that the flags name; none without --teacher.

    With --teacher-dtype auto the precision is open: `settle_precision` decides it, until then it follows autocast.

    Args:
        config: Run settings.
        data: The data that they have to fit.
        runtime: Device and ranks.
        resizes: Whether to build a network of a fixed input size for the student's.
    """
    return [_create_run_teacher(config, teacher, data, runtime, resizes) for teacher in teachers_of(config)]


def _create_run_teacher(config: RunConfig, flags: OneTeacher, data: Data, runtime: Runtime, resizes: bool) -> Teacher:
    settings = teacher_settings(flags)
    other_class = other_class_of_teacher(flags, data)
    if other_class and config.kd_loss_weight and not _is_left_out(config, flags, data):
        raise UsageError(
            f"--kd-loss-weight compares class by class, and the teacher's run has learnt other classes ({other_class}): give "
            f'data of the same classes, leave the weight at 0, or, if they are the same under other names, give a copy of its '
            f'weights outside of the run'
        )
    create = functools.partial(
        create_teacher,
        flags.name,
        checkpoint=flags.checkpoint,
        pretrained=flags.pretrained,
        num_classes=flags.num_classes,
        use_ema=flags.ema,
        needs_logits=config.kd_loss_weight > 0 or config.pe_target == 'logits',
        model_kwargs=settings.kwargs,
        what='--teacher',
        student_size=data.config['input_size'][1:] if resizes and not _has_own_size(flags) else None,
        input_mean=data.config['mean'],
        input_std=data.config['std'],
        input_size=flags.input_size,
        mean=settings.mean,
        std=settings.std,
        tap=flags.tap,
        device=runtime.device,
        dtype=None if flags.dtype == 'auto' else torch_dtype(flags.dtype),
        autocast_dtype=torch_dtype(config.amp_dtype) if config.amp and not flags.dtype else None,
        # a CPU runs convolutions up to a third faster so, and the rest no slower (benchmarks/step_time.py)
        channels_last=config.channels_last or runtime.device.type == 'cpu',
        fold=flags.fold,
    )
    try:
        teacher = create()
    except NoPretrainedWeights as e:
        raise UsageError(
            f'{e} (--teacher-checkpoint FILE or RUN, --teacher local-dir:FOLDER, --no-teacher-pretrained)'
        ) from e
    except UsageError as e:
        other = _torchvision_name(flags) if 'missing keys' in str(e) else ''
        if not other:
            raise
        raise UsageError(
            f"{e}; it is torchvision's {other}, which names its weights otherwise: in Python create_teacher("
            f'torchvision.models.{other}(), checkpoint=..., tap=...) takes it'
        ) from e
    _say_teacher(flags, teacher, data.config['input_size'][1:])
    if runtime.distributed:
        # ranks have different seeds and DDP does not wrap the teacher: random weights would differ between ranks
        for tensor in teacher.state_dict().values():
            dist.broadcast(tensor, src=0)
    return teacher


def _is_left_out(config: RunConfig, flags: OneTeacher, data: Data) -> bool:
    """Whether the logits of one of several teachers are not compared: its run has learnt another number of classes."""
    folder = RunFolder.around(flags.checkpoint)
    learnt = saved_classes(folder) if folder is not None else None
    several = isinstance(config.teacher, list)
    return several and learnt is not None and len(learnt) != count_classes(data.eval.dataset)


def _has_own_size(flags: OneTeacher) -> bool:
    """Whether flags say for which size the teacher is built."""
    return bool({'img_size', 'dynamic_img_size'} & set(flags.kwargs))


def _say_teacher(flags: OneTeacher, teacher: Teacher, student_size: Size) -> None:
    if flags.is_random:
        _logger.warning(
            f'{flags.title}: its weights are RANDOM (--no-teacher-pretrained without --teacher-checkpoint).'
        )
    _say_size(flags.title, teacher, student_size)
    if teacher.folded:
        _logger.info(f'{flags.title}: {teacher.folded} batch norms folded into the layers before them.')


def _say_size(who: str, teacher: Teacher, student_size: Size) -> None:
    """Log a size of the teacher's images that is not the student's: a larger one may cost many times as much."""
    if teacher.input_size:
        return
    mine, own = 'x'.join(map(str, student_size)), 'x'.join(map(str, teacher.own_size or ()))
    if teacher.built_size:
        _logger.info(
            f"{who}: built for {'x'.join(map(str, teacher.built_size))} images, the student's are {mine}; "
            f'--teacher-input-size N gives another size, its own is {own}.'
        )
        return
    size = teacher.size_for(torch.empty(1, len(teacher.input_mean), *student_size, device=teacher.scale.device))
    times = size[0] * size[1] / (student_size[0] * student_size[1])
    if times > 1:
        _logger.info(
            f"{who}: it sees {'x'.join(map(str, size))} images, as its architecture cannot take the student's {mine}: "
            f'{times:.1f} times as many pixels.'
        )


def _torchvision_name(flags: OneTeacher) -> str:
    """The torchvision classifier that fits the teacher's checkpoint; '' if none (of those that build on meta)."""
    names = read_state_dict(str(flags.checkpoint), '--teacher-checkpoint', flags.ema).keys()
    for other in torchvision.models.list_models(module=torchvision.models):
        with contextlib.suppress(Exception), torch.device('meta'):
            if torchvision.models.get_model(other, weights=None).state_dict().keys() == names:
                return other
    return ''


def other_class_of_teacher(flags: OneTeacher, data: Data) -> str:
    """The first class in which the teacher's run and the data differ; '' if none or unknown."""
    folder = RunFolder.around(flags.checkpoint)
    return describe_other_class(saved_classes(folder), class_map_of(data.eval.dataset)) if folder is not None else ''


class LabeledLoss(nn.Module):
    """A task loss of the labelled images of a batch that has others too; without any it is 0.

    The batch is that of all ranks. Each rank weighs its mean by its number of labelled images, so that the mean of the
    ranks, which is what DDP makes of their gradients, is the mean over all labelled images.

    Args:
        criterion: The loss of logits `[l, c]` and labels `[l]`.
        world_size: Number of ranks; all of them must call it.

    Attributes:
        images: Number of labelled images in the last batch, of all ranks.
    """

    def __init__(self, criterion: nn.Module, world_size: int = 1):
        super().__init__()
        self.criterion, self.world_size = criterion, world_size
        self.images: int | torch.Tensor = 0

    def forward(self, logits: torch.Tensor, target: LabeledTarget) -> torch.Tensor:
        """The loss of logits `[b, c]` of all images."""
        own = self.images = len(target.rows)
        if self.world_size > 1:
            self.images = torch.full((), float(own), device=logits.device)
            dist.all_reduce(self.images)
        if not own:
            return logits.sum() * 0.0  # the classifier gets a gradient of zeros: DDP waits for one
        loss: torch.Tensor = self.criterion(logits.index_select(0, target.rows), target.target)
        return loss if self.world_size == 1 else loss * (own * self.world_size / self.images)


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
        criterion = _create_criterion(config, cast(int, student.num_classes)).to(runtime.device)
        criterion = LabeledLoss(criterion, runtime.world_size) if config.unlabeled else criterion
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
    recipe = TARGETS[config.pe_target]
    if config.pe_loss not in (None, recipe.feature_loss) and config.distill_loss_weight is None:
        _logger.warning(
            f'The default weight {recipe.distill_loss_weight:g} was chosen for the {recipe.feature_loss} loss, it now weighs {config.pe_loss!r}: '
            f'consider --distill-loss-weight.'
        )
    if config.task_loss_weight == 0 and not config.kd_loss_weight and config.pe_target == 'feature':
        _logger.warning(
            "With --task-loss-weight 0 and features alone nothing trains the student's classifier: add --kd-loss-weight."
        )
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


def check_loss_weights(flags: LossFlags, num_classes: int | None) -> None:
    """Refuse weights and counts of the task loss that can't be read or don't match `num_classes` (None: not checked).

    Raises:
        UsageError: The message has the flag, and both numbers.
    """
    _load_loss_weights(flags, num_classes)


def _load_loss_weights(
    flags: LossFlags, num_classes: int | None
) -> tuple[tuple[torch.Tensor, int] | None, dict[str, float | torch.Tensor | None]]:
    """Counts of --class-stats, and weights by timm's names for them."""
    if flags.class_stats and not os.path.isfile(flags.class_stats):
        raise UsageError(f"--class-stats: no file '{flags.class_stats}'")
    try:
        stats = load_class_stats(flags.class_stats)
    except (ValueError, TypeError, OSError) as e:
        raise UsageError(f"--class-stats: cannot read '{flags.class_stats}' ({one_line(e)})") from e
    if stats is not None:
        _check_number('--class-stats', stats[0], num_classes)
    bce = flags.loss_pos_weight is None
    weights: dict[str, float | torch.Tensor | None] = {}
    for kind, flag, given in (
        (
            'pos_weight',
            '--bce-pos-weight' if bce else '--loss-pos-weight',
            flags.bce_pos_weight if bce else flags.loss_pos_weight,
        ),
        ('class_weight', '--loss-class-weight', flags.loss_class_weight),
    ):
        try:
            weights[kind] = resolve_class_weights(
                given,
                kind,
                stats,
                power=flags.loss_weight_power,
                beta=flags.loss_weight_beta,
                max_weight=flags.loss_weight_max,
            )
        except (ValueError, TypeError, OSError) as e:
            if 'could not convert' in str(e) and not os.path.exists(str(given)):
                raise UsageError(f"{flag}: no file '{given}', and no numbers") from e
            raise UsageError(f'{flag}: {one_line(e)}') from e
        _check_number(flag, weights[kind], num_classes)
    return stats, weights


def _check_number(flag: str, values: float | torch.Tensor | None, num_classes: int | None) -> None:
    if isinstance(values, torch.Tensor) and num_classes is not None and len(values) != num_classes:
        raise UsageError(f'{flag} has {len(values)} values, the student has {num_classes} classes: give one for each')


def _create_criterion(config: RunConfig, num_classes: int) -> nn.Module:
    stats, weights = _load_loss_weights(config, num_classes)
    counts, number = stats if stats is not None and loss_type(config) == 'db' else (None, None)
    try:
        return create_classification_loss(
            loss_type(config),
            multi_label=config.task == 'multilabel',
            smoothing=label_smoothing(config),
            soft_targets=mixing_active(config),
            bce_target_thresh=config.bce_target_thresh,
            bce_sum=config.bce_sum,
            asl_gamma_pos=config.asl_gamma_pos,
            asl_gamma_neg=config.asl_gamma_neg,
            asl_clip=config.asl_clip,
            asl_reduction=config.asl_reduction,
            poly_epsilon=config.poly_epsilon,
            poly_gamma=config.poly_gamma,
            poly_alpha=config.poly_alpha,
            jsd_splits=config.aug_splits,
            twoway_tp=config.twoway_tp,
            twoway_tn=config.twoway_tn,
            class_counts=counts,
            num_samples=number,
            db_neg_scale=config.db_neg_scale,
            db_init_bias=config.db_init_bias,
            db_focal_gamma=config.db_focal_gamma,
            **weights,
        )
    except (ValueError, TypeError, OSError) as e:
        raise UsageError(f'task loss: {one_line(e)}') from e

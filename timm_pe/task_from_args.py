"""Teacher, task loss and task that the flags ask for."""

import argparse
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.loss import create_classification_loss
from timm.loss.class_weights import load_class_stats, resolve_class_weights
from timm.models import resolve_model_input_args
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)

from .args import find_run_args, read_run_settings, resolve_dtype
from .data import Data, mixing_active, resolve_smoothing
from .errors import UsageError, one_line
from .loading import announce_download
from .models import place_student
from .runtime import Runtime
from .task import TARGETS, ProjectorEnsembleTask
from .teacher import Teacher, create_teacher

_logger = logging.getLogger(__name__)

# what a pretrained cfg says of a model's input
_INPUT_FIELDS = ('mean', 'std', 'input_size', 'interpolation', 'crop_pct', 'crop_mode')


def create_run_teacher(args: argparse.Namespace, data: Data, runtime: Runtime) -> Teacher | None:
    """The teacher that the flags name; None without --teacher."""
    if not args.teacher:
        return None
    _take_run_folder_settings(args)
    teacher = create_teacher(
        args.teacher,
        checkpoint=args.teacher_checkpoint,
        pretrained=args.teacher_pretrained,
        num_classes=args.teacher_num_classes,
        use_ema=args.teacher_ema,
        needs_logits=args.kd_loss_weight > 0 or args.pe_target == 'logits',
        model_kwargs=args.teacher_kwargs,
        what='--teacher',
        input_mean=data.config['mean'],
        input_std=data.config['std'],
        input_size=args.teacher_input_size,
        mean=args.teacher_mean,
        std=args.teacher_std,
        tap=args.teacher_tap,
        device=runtime.device,
        dtype=resolve_dtype(args.teacher_dtype),
        # a CPU runs convolutions up to a third faster so, and the rest no slower (benchmarks/step_time.py)
        channels_last=args.channels_last or runtime.device.type == 'cpu',
        fold=args.teacher_fold,
    )
    if teacher.folded:
        _logger.info(f'Teacher: {teacher.folded} batch norms folded into the layers before them.')
    if runtime.distributed:
        # ranks seed differently and DDP never sees the teacher: weights that were drawn would differ between them
        for tensor in teacher.state_dict().values():
            dist.broadcast(tensor, src=0)
    return teacher


def _take_run_folder_settings(args: argparse.Namespace) -> None:
    """A teacher from a run folder of train_distill is built and fed as it was in that run, where no flag says else."""
    path = find_run_args(args.teacher_checkpoint)
    if not path:
        return
    run = read_run_settings(path, '--teacher-checkpoint')
    args.teacher_mean = args.teacher_mean or run['mean']
    args.teacher_std = args.teacher_std or run['std']
    built = _built_in(args, run)
    model_kwargs = {**(run['model_kwargs'] or {}), 'in_chans': run['in_chans'], 'global_pool': run['gp']}
    # an architecture of one size was built for that of its images
    model_kwargs['img_size'] = built.get('img_size')
    # what that run's model name and overlay said of its input; the name of the teacher may have another tag
    model_kwargs['pretrained_cfg_overlay'] = {k: v for k, v in built['pretrained_cfg'].items() if k in _INPUT_FIELDS}
    args.teacher_kwargs = {**{k: v for k, v in model_kwargs.items() if v is not None}, **args.teacher_kwargs}


def _built_in(args: argparse.Namespace, run: Mapping[str, Any]) -> dict[str, Any]:
    """What timm built the student of a `run` with, `pretrained_cfg` and `img_size` in it."""
    given = {key: run[key] for key in ('img_size', 'input_size', 'in_chans')}
    overlay = {'pretrained_cfg_overlay': run['pretrained_cfg_overlay']} if run['pretrained_cfg_overlay'] else {}
    name = run['model'] or args.teacher
    try:
        return resolve_model_input_args(name, given, **{**(run['model_kwargs'] or {}), **overlay})
    except Exception as e:  # the config.json of a hub or local-dir model may be anything, or gone
        raise UsageError(
            f"--teacher-checkpoint: cannot tell how '{name}' was built and fed in its run ({one_line(e)}): give a weights file "
            f'outside of the run, --teacher-mean and --teacher-std'
        ) from e


def create_run_task(
    args: argparse.Namespace,
    student: nn.Module,
    teacher: Teacher | None,
    runtime: Runtime,
) -> TrainingTask:
    """Ours with --teacher, timm's own distillation tasks with --kd-model-name, else timm's classification tasks."""
    criterion = _create_criterion(args, student.num_classes).to(runtime.device)
    student = place_student(student, args, runtime)
    common = {'device': runtime.device, 'dtype': runtime.model_dtype, 'verbose': False}
    if teacher is not None:
        return _create_projector_task(args, student, teacher, criterion, common)
    if args.kd_model_name:
        return _create_timm_kd_task(args, student, criterion, common)
    if args.task == 'multilabel':
        return MultiLabelClassificationTask(student, criterion, threshold=args.multilabel_threshold, **common)
    return ClassificationTask(student, criterion, **common)


def _create_projector_task(
    args: argparse.Namespace,
    student: nn.Module,
    teacher: Teacher,
    criterion: nn.Module,
    common: dict,
) -> ProjectorEnsembleTask:
    _, weight, loss = TARGETS[args.pe_target]
    if args.pe_loss not in (None, loss) and args.distill_loss_weight is None:
        _logger.warning(
            f'The default weight {weight:g} was chosen for the {loss} loss, it now weighs {args.pe_loss!r}: '
            f'consider --distill-loss-weight.'
        )
    if args.task_loss_weight == 0 and not args.kd_loss_weight and args.pe_target == 'feature':
        _logger.warning(
            "With --task-loss-weight 0 and features alone nothing trains the student's classifier: add --kd-loss-weight."
        )
    return ProjectorEnsembleTask(
        student_model=student,
        teacher_model=teacher,
        criterion=criterion,
        num_projectors=args.pe_projectors,
        projector=args.pe_projector,
        act=args.pe_act,
        feature_loss=args.pe_loss,
        target=args.pe_target,
        teacher_norm=args.pe_teacher_norm,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        kd_loss_weight=args.kd_loss_weight,
        kd_temperature=args.kd_temperature,
        multi_label=args.task == 'multilabel',
        threshold=args.multilabel_threshold,
        student_tap=args.student_tap,
        **common,
    )


def _create_timm_kd_task(
    args: argparse.Namespace, student: nn.Module, criterion: nn.Module, common: dict
) -> TrainingTask:
    """timm's logit, feature or token distillation. It gives its teacher the student's classes and pretrained weights."""
    common = {
        **common,
        'student_model': student,
        'teacher_model': args.kd_model_name,
        'criterion': criterion,
        'distill_loss_weight': args.distill_loss_weight,
        'task_loss_weight': args.task_loss_weight,
    }
    announce_download(args.kd_model_name, '--kd-model-name')
    try:
        if args.kd_distill_type == 'logit':
            return LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
        if args.kd_distill_type == 'feature':
            return FeatureDistillationTask(
                student_feature_dim=args.kd_student_feature_dim,
                teacher_feature_dim=args.kd_teacher_feature_dim,
                **common,
            )
        return TokenDistillationTask(distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)
    except Exception as e:
        raise UsageError(f"--kd-model-name '{args.kd_model_name}': {one_line(e)}") from e


def loss_type(args: argparse.Namespace) -> str | None:
    """--loss, or what timm's older flags for it mean."""
    return args.loss or ('jsd' if args.jsd_loss else 'bce' if args.bce_loss else None)


def check_loss_weights(args: argparse.Namespace, num_classes: int | None) -> None:
    """Refuse weights and counts of the task loss that can't be read, or are not those of `num_classes`; None knows no number.

    Raises:
        UsageError: With the flag, and both numbers.
    """
    _load_loss_weights(args, num_classes)


def _load_loss_weights(
    args: argparse.Namespace, num_classes: int | None
) -> tuple[tuple[torch.Tensor, int] | None, dict[str, float | torch.Tensor | None]]:
    """Counts of --class-stats, and weights by timm's names for them."""
    if args.class_stats and not os.path.isfile(args.class_stats):
        raise UsageError(f"--class-stats: no file '{args.class_stats}'")
    try:
        stats = load_class_stats(args.class_stats)
    except (ValueError, TypeError, OSError) as e:
        raise UsageError(f"--class-stats: cannot read '{args.class_stats}' ({one_line(e)})") from e
    if stats is not None:
        _check_number('--class-stats', stats[0], num_classes)
    bce = args.loss_pos_weight is None
    weights = {}
    for kind, flag, given in (
        (
            'pos_weight',
            '--bce-pos-weight' if bce else '--loss-pos-weight',
            args.bce_pos_weight if bce else args.loss_pos_weight,
        ),
        ('class_weight', '--loss-class-weight', args.loss_class_weight),
    ):
        try:
            weights[kind] = resolve_class_weights(
                given,
                kind,
                stats,
                power=args.loss_weight_power,
                beta=args.loss_weight_beta,
                max_weight=args.loss_weight_max,
            )
        except (ValueError, TypeError, OSError) as e:
            if 'could not convert' in str(e) and not os.path.exists(given):
                raise UsageError(f"{flag}: no file '{given}', and no numbers") from e
            raise UsageError(f'{flag}: {one_line(e)}') from e
        _check_number(flag, weights[kind], num_classes)
    return stats, weights


def _check_number(flag: str, values: float | torch.Tensor | None, num_classes: int | None) -> None:
    if isinstance(values, torch.Tensor) and num_classes is not None and len(values) != num_classes:
        raise UsageError(f'{flag} has {len(values)} values, the student has {num_classes} classes: give one for each')


def _create_criterion(args: argparse.Namespace, num_classes: int) -> nn.Module:
    stats, weights = _load_loss_weights(args, num_classes)
    for_db = stats is not None and loss_type(args) == 'db'
    try:
        return create_classification_loss(
            loss_type(args),
            multi_label=args.task == 'multilabel',
            smoothing=resolve_smoothing(args),
            soft_targets=mixing_active(args),
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            asl_gamma_pos=args.asl_gamma_pos,
            asl_gamma_neg=args.asl_gamma_neg,
            asl_clip=args.asl_clip,
            asl_reduction=args.asl_reduction,
            poly_epsilon=args.poly_epsilon,
            poly_gamma=args.poly_gamma,
            poly_alpha=args.poly_alpha,
            jsd_splits=args.aug_splits,
            twoway_tp=args.twoway_tp,
            twoway_tn=args.twoway_tn,
            class_counts=stats[0] if for_db else None,
            num_samples=stats[1] if for_db else None,
            db_neg_scale=args.db_neg_scale,
            db_init_bias=args.db_init_bias,
            db_focal_gamma=args.db_focal_gamma,
            **weights,
        )
    except (ValueError, TypeError, OSError) as e:
        raise UsageError(f'task loss: {one_line(e)}') from e

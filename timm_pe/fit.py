"""The loop over epochs, and what it needs first: task, optimizer, schedule, resumed state, run folder."""

import argparse
import logging
import os
import time
from collections import OrderedDict
from datetime import datetime
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import yaml
from timm.loss import create_classification_loss
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import ClassificationTask, TrainingTask
from timm.utils import distribute_bn, get_outdir, trim_summary, unwrap_model

from . import checkpoints
from .args import resolve_dtype, resolve_lr
from .checkpoints import Saver
from .data import Data, mixing_active, set_epoch
from .engine import Trainer, evaluate, mean_lr, train_one_epoch
from .errors import UsageError, one_line
from .loading import load_weights, read_state_dict
from .logs import Progress, start_table, write_summary
from .models import place_student
from .runtime import Runtime, prepare_task
from .task import ProjectorEnsembleTask
from .teacher import Teacher, create_teacher

_logger = logging.getLogger(__name__)


def create_run_teacher(args: argparse.Namespace, student: nn.Module, data: Data, runtime: Runtime) -> Teacher | None:
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
        needs_logits=args.kd_loss_weight > 0,
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
        channels_last=args.channels_last,
    )
    if runtime.distributed:
        # ranks seed differently and DDP never sees the teacher: weights that were drawn would differ between them
        for tensor in teacher.state_dict().values():
            dist.broadcast(tensor, src=0)
    return teacher


def _take_run_folder_settings(args: argparse.Namespace) -> None:
    """A teacher from a run folder of train_distill is built and fed as it was in that run, where no flag says else."""
    path = os.path.join(args.teacher_checkpoint or '', 'args.yaml')
    if not args.teacher_checkpoint or not os.path.isfile(path):
        return
    with open(path, encoding='utf-8') as f:
        run = yaml.safe_load(f)
    args.teacher_mean = args.teacher_mean or run.get('mean')
    args.teacher_std = args.teacher_std or run.get('std')
    model_kwargs = {**(run.get('model_kwargs') or {}), 'in_chans': run.get('in_chans'), 'global_pool': run.get('gp')}
    args.teacher_kwargs = {**{k: v for k, v in model_kwargs.items() if v is not None}, **args.teacher_kwargs}


def create_run_task(
    args: argparse.Namespace,
    student: nn.Module,
    teacher: Teacher | None,
    runtime: Runtime,
) -> TrainingTask:
    """The task that the flags ask for: timm's ClassificationTask, or ours where there is a teacher."""
    student = place_student(student, args, runtime)
    criterion = _create_criterion(args).to(runtime.device)
    common = {'device': runtime.device, 'dtype': runtime.model_dtype, 'verbose': False}
    if teacher is None:
        return ClassificationTask(student, criterion, **common)
    if args.pe_loss != 'direction' and args.distill_loss_weight is None:
        _logger.warning(
            f'The default weight 25 was chosen for the direction loss, it now weighs {args.pe_loss!r}: '
            f'consider --distill-loss-weight.'
        )
    return ProjectorEnsembleTask(
        student_model=student,
        teacher_model=teacher,
        criterion=criterion,
        num_projectors=args.pe_projectors,
        projector=args.pe_projector,
        act=args.pe_act,
        feature_loss=args.pe_loss,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        kd_loss_weight=args.kd_loss_weight,
        kd_temperature=args.kd_temperature,
        student_tap=args.student_tap,
        **common,
    )


def _create_criterion(args: argparse.Namespace) -> nn.Module:
    try:
        return create_classification_loss(
            'jsd' if args.jsd_loss else 'bce' if args.bce_loss else None,
            smoothing=0.1 if args.smoothing is None else args.smoothing,
            soft_targets=mixing_active(args),
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            pos_weight=args.bce_pos_weight,
            jsd_splits=args.aug_splits,
        )
    except ValueError as e:
        raise UsageError(f'task loss: {one_line(e)}') from e


def create_trainer(
    args: argparse.Namespace,
    task: TrainingTask,
    data: Data,
    runtime: Runtime,
) -> tuple[Trainer, int, int]:
    """Optimizer, resumed state, moving average, compile and DDP, schedule, in this order.

    Returns:
        The trainer, the first epoch, and the number of epochs with warmup prefix and cooldown.
    """
    args.lr = resolve_lr(args, runtime.world_size)
    optimizer = _create_optimizer(args, task)
    start_epoch = checkpoints.resume(args, task, optimizer, runtime) if args.resume else None
    if args.resume and not args.no_resume_opt:
        _announce_resumed_settings(args, optimizer)
    if args.model_ema:
        device = torch.device('cpu') if args.model_ema_force_cpu else None
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)
        if args.resume:
            checkpoints.resume_ema(args, task)
    if isinstance(task, ProjectorEnsembleTask):
        _settle_activation(args, task, data, runtime)
    prepare_task(task, args, runtime)
    trainer = Trainer(task, data, optimizer, None, runtime, args)
    try:
        trainer.scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=args.eval_metric == 'loss'),
            updates_per_epoch=trainer.updates_per_epoch,
        )
    except (ValueError, AssertionError) as e:
        raise UsageError(f'schedule: {one_line(e)}') from e
    start_epoch = args.start_epoch if args.start_epoch is not None else (start_epoch or 0)
    if start_epoch >= num_epochs:
        raise UsageError(
            f'nothing to train: the run starts at epoch {start_epoch} and --epochs gives {num_epochs} (--start-epoch 0 '
            f'starts the schedule anew)'
        )
    if not args.warmup_prefix and args.warmup_epochs >= num_epochs:
        _logger.warning(
            f'All {num_epochs} epochs are warmup (--warmup-epochs {args.warmup_epochs}): the learning rate never reaches '
            f'{args.lr:.4g}.'
        )
    if trainer.scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            trainer.scheduler.step_update(start_epoch * trainer.updates_per_epoch)
        else:
            trainer.scheduler.step(start_epoch)
    return trainer, start_epoch, num_epochs


def _announce_resumed_settings(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> None:
    """A resumed optimizer brings its own settings: say so where the flags would give others, and show what holds."""
    resumed_lr = optimizer.param_groups[0].get('initial_lr', optimizer.param_groups[0]['lr'])
    resumed_decay = max(group.get('weight_decay', args.weight_decay) for group in optimizer.param_groups)
    for name, resumed in (('lr', resumed_lr), ('weight_decay', resumed_decay)):
        if resumed != getattr(args, name):
            _logger.warning(
                f'--resume continues with {name.replace("_", " ")} {resumed:.4g} of the checkpoint, not with '
                f'{getattr(args, name):.4g}: --no-resume-opt starts a fresh optimizer.'
            )
            setattr(args, name, resumed)


def _create_optimizer(args: argparse.Namespace, task: TrainingTask) -> torch.optim.Optimizer:
    module = task.get_trainable_module()
    try:
        optimizer = create_optimizer_v2(module, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (ValueError, TypeError) as e:
        raise UsageError(f"--opt: cannot make optimizer '{args.opt}': {one_line(e)}") from e
    if isinstance(task, ProjectorEnsembleTask):
        check_projectors_optimized(task.projection, optimizer)
    return optimizer


def check_projectors_optimized(projection: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless each projector parameter is in exactly one group of the optimizer.

    Raises:
        RuntimeError: Projectors that would silently not train, or train twice as fast.
    """
    grouped = [id(p) for group in optimizer.param_groups for p in group['params']]
    for name, param in projection.named_parameters():
        if grouped.count(id(param)) != 1:
            raise RuntimeError(
                f'projector parameter {name} is in {grouped.count(id(param))} optimizer groups, not in 1'
            )


def _settle_activation(args: argparse.Namespace, task: ProjectorEnsembleTask, data: Data, runtime: Runtime) -> None:
    """Decide an 'auto' activation on the run's first training batch, the one that epoch 0 will start with."""
    if task.projection.act != 'auto':
        return
    set_epoch(data.train, 0)
    input, _ = next(iter(data.train))
    input = input.to(runtime.device, runtime.model_dtype or torch.float32)
    with runtime.autocast():
        act = task.resolve_act(input)
    signs = 'all >= 0' if act == 'relu' else 'of both signs'
    _logger.info(f"--pe-act auto is '{act}': the teacher's features on the first training batch are {signs}.")


def check_teacher(
    args: argparse.Namespace, teacher: Teacher | None, data: Data, num_classes: int, runtime: Runtime
) -> None:
    """Validate the teacher through the student's own loader: a teacher that was not loaded right teaches nothing."""
    if teacher is None or not args.teacher_eval:
        return
    if teacher.num_classes != num_classes:
        _logger.info(
            f'Teacher: its {teacher.num_classes} classes are not the {num_classes} of the data, so its accuracy cannot be '
            f'checked.'
        )
        return
    metrics = validate(lambda x: teacher(x).logits, data, runtime, args, 'Teacher')
    _logger.info(f'Teacher: top-1 {metrics["top1"]:.2f} %, top-5 {metrics["top5"]:.2f} % on the validation split.')
    chance, images = 1 / num_classes, len(data.eval.dataset)
    if num_classes > 1 and metrics['top1'] / 100 < chance + 3 * (chance * (1 - chance) / images) ** 0.5:
        _logger.warning(
            f'THE TEACHER IS AT CHANCE LEVEL (top-1 {metrics["top1"]:.2f} % of {num_classes} classes): were its weights '
            f'loaded, are the classes in its order?'
        )


def validate(model: Any, data: Data, runtime: Runtime, args: argparse.Namespace, what: str) -> OrderedDict[str, float]:
    """`evaluate` over the validation split, with its progress shown."""
    progress = Progress(what, len(data.eval), runtime.is_primary)
    try:
        return evaluate(model, data.eval, runtime, args, progress)
    finally:
        progress.close()


def evaluate_checkpoint(args: argparse.Namespace, student: nn.Module, data: Data, runtime: Runtime) -> None:
    """Validate the weights of --evaluate, say what came out, and stop."""
    load_weights(student, read_state_dict(args.evaluate, '--evaluate'), '--evaluate', args.evaluate)
    student = place_student(student, args, runtime).eval()
    metrics = validate(student, data, runtime, args, 'Evaluate')
    _logger.info(
        f"'{args.evaluate}': top-1 {metrics['top1']:.3f} %, top-5 {metrics['top5']:.3f} %, loss {metrics['loss']:.4f} on "
        f'{len(data.eval.dataset)} images.'
    )


def open_run_folder(args: argparse.Namespace, args_text: str, trainer: Trainer, start_epoch: int) -> str:
    """Make the run's folder with args.yaml, and the saver in it, on the primary rank. Nothing is written before."""
    failure = [None]
    folder = ''
    if trainer.runtime.is_primary:
        try:
            folder = _make_run_folder(args, args_text, trainer, start_epoch)
        except OSError as e:
            failure = [f"--output: cannot write into '{args.output or 'output/train'}' ({e.strerror})"]
    if trainer.runtime.distributed:
        dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise UsageError(failure[0])
    return folder


def _make_run_folder(args: argparse.Namespace, args_text: str, trainer: Trainer, start_epoch: int) -> str:
    size = trainer.data.config['input_size'][-1]
    name = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}-{size}'
    folder = get_outdir(args.output or os.path.join('output', 'train'), name)
    with open(os.path.join(folder, 'args.yaml'), 'w', encoding='utf-8') as f:
        f.write(args_text)
    task = trainer.task
    with_ema = task.has_ema() and not args.model_ema_force_cpu
    trainer.saver = Saver(
        folder,
        task,
        trainer.optimizer,
        args,
        trainer.runtime.scaler,
        decreasing=args.eval_metric == 'loss',
        evaluated_model=lambda: task.get_eval_model(ema=with_ema),
    )
    resumed = checkpoints.find_resume(args) if args.resume else None
    same_folder = resumed and start_epoch > 0 and os.path.realpath(os.path.dirname(resumed)) == os.path.realpath(folder)
    if same_folder:
        trainer.saver.load_state_dict_from_checkpoint(resumed)
    trim_summary(os.path.join(folder, 'summary.csv'), start_epoch if same_folder else 0)
    return folder


def announce(
    args: argparse.Namespace, trainer: Trainer, teacher: Teacher | None, epochs: tuple[int, int], folder: str
) -> None:
    """Print every resolved choice, once."""
    student = unwrap_model(trainer.task.get_eval_model())
    table = start_table(
        args, trainer.runtime, student, trainer.task, trainer.data, student.num_classes, epochs, teacher
    )
    _logger.info(f'\n{table}\n{"folder":<16}{folder}\n')


def fit(trainer: Trainer, start_epoch: int, num_epochs: int, folder: str) -> None:
    """Train, validate and save, epoch by epoch.

    Args:
        trainer: What to train with.
        start_epoch: First epoch, from 0.
        num_epochs: One past the last.
        folder: The run's folder, used on the primary rank.
    """
    args, runtime = trainer.args, trainer.runtime
    metric_name = args.eval_metric or 'top1'
    best = (None, None)
    began = time.perf_counter()
    for epoch in range(start_epoch, num_epochs):
        set_epoch(trainer.data.train, epoch)
        progress = Progress(f'Train {epoch}/{num_epochs - 1}', len(trainer.data.train), runtime.is_primary)
        try:
            train_metrics = train_one_epoch(trainer, epoch, progress)
        finally:
            progress.close()
        lr = mean_lr(trainer.optimizer)
        _share_bn(trainer)
        due = (epoch + 1) % args.val_interval == 0 or epoch == num_epochs - 1
        eval_metrics = _validate_task(trainer, epoch, num_epochs) if due else None
        metric = eval_metrics[metric_name] if eval_metrics else None
        if runtime.is_primary:
            write_summary(os.path.join(folder, 'summary.csv'), epoch, train_metrics, eval_metrics, lr)
            best = trainer.saver.save_checkpoint(epoch, metric=metric)
        if trainer.scheduler is not None:
            trainer.scheduler.step(epoch + 1, metric)
    if runtime.is_primary and best[0] is not None:
        _logger.info(
            f'Best {metric_name} {best[0]:.3f} at epoch {best[1]}, {time.perf_counter() - began:.0f} s. '
            f"The student: '{os.path.join(folder, 'student.safetensors')}'."
        )


def _share_bn(trainer: Trainer) -> None:
    args, runtime, task = trainer.args, trainer.runtime, trainer.task
    if runtime.distributed and args.dist_bn in ('broadcast', 'reduce'):
        for ema in (False, True):
            module = task.get_trainable_module(ema=ema)
            if module is not None and not (ema and args.model_ema_force_cpu):
                distribute_bn(module, runtime.world_size, args.dist_bn == 'reduce')


def _validate_task(trainer: Trainer, epoch: int, num_epochs: int) -> OrderedDict[str, float]:
    """Validate the weights, and where there is a moving average that too; its metrics are the ones that count."""
    task, args = trainer.task, trainer.args
    for ema in (False, True) if task.has_ema() and not args.model_ema_force_cpu else (False,):
        model = task.get_eval_model(ema=ema).eval()
        metrics = validate(model, trainer.data, trainer.runtime, args, 'Test (EMA)' if ema else 'Test')
        _logger.info(
            f'Test{" (EMA)" if ema else ""} {epoch}/{num_epochs - 1}: top-1 {metrics["top1"]:.3f}  top-5 '
            f'{metrics["top5"]:.3f}  loss {metrics["loss"]:.4f}'
        )
    return metrics

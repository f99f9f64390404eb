"""The loop over epochs, and what it needs first: task, optimizer, schedule, resumed state, run folder."""

import argparse
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import TrainingTask, evaluation_sample_limit
from timm.utils import distribute_bn, get_outdir, unwrap_model
from torch.utils.data import IterableDataset

from . import checkpoints
from .args import resolve_lr
from .cache import TeacherCache, hash_names
from .checkpoints import Saver
from .data import Data, first_batch, plain_loader
from .engine import Trainer, create_evaluator, evaluate, mean_lr, train_one_epoch
from .errors import UsageError, one_line
from .files import replaced
from .interrupts import Interrupted, Interrupts
from .loading import load_weights, read_state_dict
from .logs import Progress, cut_summary, read_summary, start_table, write_summary
from .models import place_student
from .nonfinite import UpdateGuard, check_finite
from .run_state import (
    RunState,
    check_rank_state,
    restore_rank_state,
    restore_schedule,
    run_meaning,
    run_settings,
)
from .runtime import Runtime, on_primary, prepare_task
from .task import ProjectorEnsembleTask
from .teacher import Teacher
from .trackers import TeacherAgreement, is_tracked, log_epoch, start_trackers
from .unreadable import describe_unreadable

_logger = logging.getLogger(__name__)


def create_trainer(
    args: argparse.Namespace,
    task: TrainingTask,
    data: Data,
    runtime: Runtime,
    cache: TeacherCache | None = None,
) -> tuple[Trainer, int, int]:
    """Optimizer, resumed state, moving average, compile and DDP, schedule, in this order.

    Returns:
        The trainer, the first epoch, and the number of epochs with warmup prefix and cooldown.
    """
    args.lr = resolve_lr(args, runtime.world_size)
    optimizer = _create_optimizer(args, task)
    meaning = run_meaning(args, task, data, runtime)
    start_epoch, state = checkpoints.resume(args, task, optimizer, runtime, meaning) if args.resume else (None, None)
    if runtime.distributed:
        _check_same_start(args, start_epoch, state, runtime)
    if args.resume and not args.no_resume_opt:
        _announce_resumed_settings(args, optimizer)
    if args.model_ema:
        device = torch.device('cpu') if args.model_ema_force_cpu else None
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)
        if args.resume:
            checkpoints.resume_ema(args, task, meaning)
    if isinstance(task, ProjectorEnsembleTask):
        _look_at_first_batch(task, data, runtime, cache)
    prepare_task(task, args, runtime)
    images = _describe_images(data)
    trainer = Trainer(task, data, optimizer, None, runtime, args, cache=cache, images=images, meaning=meaning)
    if args.resume:
        trainer.seconds_before = state.seconds if state else None
    trainer.resumed = _accept_state(trainer, state)
    if args.nonfinite == 'skip':
        trainer.guard = UpdateGuard(task.get_trainable_module(), scales=runtime.scaler is not None)
    try:
        trainer.scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=args.eval_metric == 'loss'),
            updates_per_epoch=trainer.updates_per_epoch,
        )
    except (ValueError, AssertionError) as e:
        raise UsageError(f'schedule: {one_line(e)}') from e
    start_epoch = args.start_epoch if args.start_epoch is not None else (start_epoch or 0)
    _check_epochs(args, num_epochs)
    if start_epoch >= num_epochs and not args.resume_auto:
        raise UsageError(
            f'nothing to train: the run starts at epoch {start_epoch} and --epochs gives {num_epochs} (--start-epoch 0 '
            f'starts the schedule anew)'
        )
    if not args.warmup_prefix and args.warmup_epochs >= num_epochs:
        _logger.warning(
            f'All {num_epochs} epochs are warmup (--warmup-epochs {args.warmup_epochs}): the learning rate never reaches '
            f'{args.lr:.4g}.'
        )
    if trainer.scheduler is not None and (start_epoch > 0 or trainer.resumed):
        _resume_schedule(trainer, start_epoch)
    return trainer, start_epoch, num_epochs


def _check_same_start(
    args: argparse.Namespace, start_epoch: int | None, state: RunState | None, runtime: Runtime
) -> None:
    """Raise unless all ranks go on from the same place.

    Raises:
        UsageError: They do not: machines whose disks hold different checkpoints.
    """
    own = (os.path.basename(args.resume), start_epoch, state.batch if state else None)
    ranks = [None] * runtime.world_size
    dist.all_gather_object(ranks, own)
    if len(set(ranks)) > 1:
        other = next(r for r, found in enumerate(ranks) if found != ranks[0])
        found = [
            f"'{name}' of epoch {epoch}" if name else 'no checkpoint' for name, epoch, _ in (ranks[0], ranks[other])
        ]
        raise UsageError(
            f'--resume: rank 0 found {found[0]}, rank {other} {found[1]}: --output must be a folder that all machines share'
        )


def _resume_schedule(trainer: Trainer, start_epoch: int) -> None:
    scheduler, state = trainer.scheduler, trainer.resumed
    schedule = state.schedule if state else {}
    metric = state.metric if state else None
    if schedule and _metric_then(trainer.args) != ranked_by(trainer.args):
        _logger.warning('--eval-metric is another than before: the plateau schedule counts anew.')
        schedule, metric = {**schedule, 'plateau': {}}, None
    restore_schedule(scheduler, schedule)
    if trainer.args.sched_on_updates:
        batches = state.batch if state and not state.validated else 0
        scheduler.step_update(start_epoch * trainer.updates_per_epoch + trainer.updates_after(batches))
    elif not isinstance(scheduler, PlateauLRScheduler):
        scheduler.step(start_epoch)
    elif not state or state.validated:
        scheduler.step(start_epoch, metric)


def _describe_images(data: Data) -> dict[str, Any]:
    dataset = getattr(plain_loader(data.train).dataset, 'dataset', None)
    if dataset is None or isinstance(dataset, IterableDataset):
        return {}
    return {'number': len(dataset), 'names': hash_names(dataset)}


def _accept_state(trainer: Trainer, state: RunState | None) -> RunState | None:
    """What of a checkpoint's state holds for this run; where something in it has changed, say what follows."""
    if state is None or trainer.args.start_epoch is not None:
        return None
    if state.data != trainer.images:
        _logger.warning(
            f'The training images have changed since the checkpoint: {state.data.get("number")} of hash '
            f'{state.data.get("names")} then, {trainer.images.get("number")} of hash {trainer.images.get("names")} now.'
        )
    check_rank_state(state, trainer.task, trainer.runtime)
    if state.validated:
        return state
    settings = run_settings(trainer.args, len(trainer.data.train), trainer.runtime.world_size)
    changed = [k for k, v in settings.items() if state.settings.get(k) != v]
    if state.train_metrics or (not changed and state.data == trainer.images):
        return state
    why = ', '.join(f'{k.replace("_", " ")} {state.settings.get(k)} then and {settings[k]} now' for k in changed)
    _logger.warning(f'Epoch {state.epoch} starts again from its first batch: {why or "other images"}.')
    return None


def _check_epochs(args: argparse.Namespace, num_epochs: int) -> None:
    for name, epochs in (('stop-epoch', [args.stop_epoch]), ('save-epochs', args.save_epochs or [])):
        wrong = [e for e in epochs if e is not None and not 1 <= e <= num_epochs]
        if wrong:
            raise UsageError(f'--{name} must be from 1 to the {num_epochs} epochs of the schedule, got {wrong[0]}')


def is_finished(args: argparse.Namespace, trainer: Trainer, start_epoch: int, num_epochs: int) -> bool:
    """Whether --resume auto found nothing left to train; a kill may have left files of the last epoch to write."""
    if not args.resume_auto or start_epoch < (args.stop_epoch or num_epochs):
        return False
    if trainer.runtime.is_primary and args.resume:
        trainer.saver = _create_saver(args, trainer, os.path.dirname(args.resume))
        _continue_folder(args, trainer, start_epoch)
    _logger.info(f'--resume auto: the run is finished after {start_epoch} epochs.')
    return True


def _announce_resumed_settings(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> None:
    """Say which flags are others than before. An optimizer brings its own settings: show what holds."""
    differences = checkpoints.describe_differences(args)
    if differences:
        _logger.warning(f'--resume: flags that differ from those of the checkpoint: {differences}.')
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
    except (ValueError, TypeError, IndexError) as e:
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


def _look_at_first_batch(
    task: ProjectorEnsembleTask, data: Data, runtime: Runtime, cache: TeacherCache | None = None
) -> None:
    """Ask the teacher about the batch that epoch 0 will start with: is it sound, and what does it make of an 'auto' activation?

    Raises:
        UsageError: A feature or logit that is not finite.
    """
    input, target = first_batch(data.train)
    input = input.to(runtime.device, runtime.model_dtype or torch.float32)
    with runtime.autocast():
        teacher = cache(target, lambda: task.teacher(input)) if cache is not None else task.teacher(input)
        for what, values in (('features', teacher.feature), ('logits', teacher.logits)):
            if values is not None and not torch.isfinite(values).all():
                raise UsageError(
                    f"the teacher's {what} on the first training batch are not finite: are its weights right, is "
                    f'--teacher-dtype wide enough?'
                )
        if task.projection.act != 'auto':
            return
        act = task.resolve_act(input, teacher)
    signs = 'all >= 0' if act == 'relu' else 'of both signs'
    _logger.info(f"--pe-act auto is '{act}': the teacher's features on the first training batch are {signs}.")


def check_teacher(
    args: argparse.Namespace, teacher: Teacher | None, data: Data, num_classes: int, runtime: Runtime
) -> TeacherAgreement | None:
    """Validate the teacher through the student's own loader: a teacher that was not loaded right teaches nothing.

    Returns:
        For a run with trackers, what the student's validations can be compared with.
    """
    if teacher is None or not args.teacher_eval:
        return None
    if teacher.num_classes != num_classes:
        _logger.info(
            f'Teacher: its {teacher.num_classes} classes are not the {num_classes} of the data, so its accuracy cannot be '
            f'checked.'
        )
        return None
    if args.task == 'multilabel':
        metrics = validate(teacher.forward_logits, data, runtime, args, 'Teacher')
        _logger.info(f'Teacher: {format_metrics(metrics)} on the validation split.')
        return None
    # the images of a stream come in no fixed order
    measured = is_tracked(args) and not isinstance(data.eval.dataset, IterableDataset)
    agreement = TeacherAgreement(evaluation_sample_limit(data.eval)) if measured else None
    forward = teacher.forward_logits if agreement is None else agreement.record(teacher.forward_logits)
    metrics = validate(forward, data, runtime, args, 'Teacher')
    _logger.info(f'Teacher: top-1 {metrics["top1"]:.2f} %, top-5 {metrics["top5"]:.2f} % on the validation split.')
    chance, images = 1 / num_classes, len(data.eval.dataset)
    if num_classes > 1 and metrics['top1'] / 100 < chance + 3 * (chance * (1 - chance) / images) ** 0.5:
        _logger.warning(
            f'THE TEACHER IS AT CHANCE LEVEL (top-1 {metrics["top1"]:.2f} % of {num_classes} classes): were its weights '
            f'loaded, are the classes in its order?'
        )
    return agreement


def validate(
    model: Any,
    data: Data,
    runtime: Runtime,
    args: argparse.Namespace,
    what: str,
    after_batch: Callable[[], None] = lambda: None,
) -> OrderedDict[str, float]:
    """`evaluate` over the validation split, with its progress shown."""
    progress = Progress(what, len(data.eval), runtime.is_primary)
    try:
        metrics = evaluate(model, data.eval, runtime, args, progress, after_batch)
    finally:
        progress.close()
    _say_unreadable(data.eval, len(data.eval.dataset), runtime)
    return metrics


def ranked_by(args: argparse.Namespace) -> str:
    """The metric that names the best epoch of a run."""
    return args.eval_metric or default_metric(args)


def default_metric(args: argparse.Namespace) -> str:
    """What names the best epoch: top-1, or for multi-label data mAP."""
    return 'map' if args.task == 'multilabel' else 'top1'


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Metrics on one line, percentages to three places."""
    names = {'top1': 'top-1', 'top5': 'top-5', 'map': 'mAP'}
    percent = [f'{names.get(k, k)} {v:.3f} %' for k, v in metrics.items() if k != 'loss']
    return '  '.join([*percent, f'loss {metrics["loss"]:.4f}'])


def flat_metrics(
    epoch: int, train_metrics: Mapping[str, float], eval_metrics: Mapping[str, float], lr: float
) -> dict[str, float]:
    """One epoch's numbers under the names of summary.csv."""
    train = {f'train_{k}': v for k, v in train_metrics.items()}
    return {'epoch': epoch, **train, **{f'eval_{k}': v for k, v in eval_metrics.items()}, 'lr': lr}


def evaluate_checkpoint(args: argparse.Namespace, student: nn.Module, data: Data, runtime: Runtime) -> None:
    """Validate the weights of --evaluate, say what came out, and stop."""
    # a moving average that the run kept on the CPU was not what it evaluated
    state_dict = read_state_dict(args.evaluate, '--evaluate', use_ema=not args.model_ema_force_cpu)
    load_weights(student, state_dict, '--evaluate', args.evaluate)
    student = place_student(student, args, runtime).eval()
    metrics = validate(student, data, runtime, args, 'Evaluate')
    _logger.info(f"'{args.evaluate}': {format_metrics(metrics)} on {len(data.eval.dataset)} images.")


def open_run_folder(args: argparse.Namespace, args_text: str, trainer: Trainer, start_epoch: int) -> str:
    """Make the run's folder with args.yaml, and the saver in it, on the primary rank. Nothing is written before."""
    failure = [None]
    folder = ''
    if trainer.runtime.is_primary:
        try:
            folder = _make_run_folder(args, args_text, trainer, start_epoch)
        except UsageError as e:
            failure = [str(e)]
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
    same_folder = bool(
        args.resume
        and (start_epoch > 0 or trainer.resumed)
        and os.path.realpath(os.path.dirname(args.resume)) == os.path.realpath(folder)
    )
    trainer.trackers = start_trackers(args, folder, resumed=same_folder)
    checkpoints.remove_half_written(folder)
    with replaced(os.path.join(folder, 'args.yaml')) as path, open(path, 'w', encoding='utf-8') as f:
        f.write(args_text)
    trainer.saver = _create_saver(args, trainer, folder)
    if same_folder:
        _continue_folder(args, trainer, start_epoch)
    cut_summary(os.path.join(folder, 'summary.csv'), start_epoch if same_folder else 0)
    return folder


def _create_saver(args: argparse.Namespace, trainer: Trainer, folder: str) -> Saver:
    task = trainer.task
    with_ema = task.has_ema() and not args.model_ema_force_cpu
    return Saver(
        folder,
        task,
        trainer.optimizer,
        args,
        trainer.runtime.scaler,
        decreasing=args.eval_metric == 'loss',
        evaluated_model=lambda: task.get_eval_model(ema=with_ema),
    )


def _continue_folder(args: argparse.Namespace, trainer: Trainer, start_epoch: int) -> None:
    then, now = _metric_then(args), ranked_by(args)
    metrics = None if then == now else _metrics_so_far(args, f'eval_{now}', start_epoch)
    if trainer.saver.continue_from(args.resume, metrics):
        _save_milestone(trainer, start_epoch)
    if metrics is not None:
        _announce_best(trainer.saver, metrics, f'--eval-metric is {now} now and was {then} before')


def _metric_then(args: argparse.Namespace) -> str:
    """What the epochs of --resume were ranked by."""
    saved = checkpoints.saved_args(args.resume)
    return ranked_by(args if saved is None else argparse.Namespace(**{**vars(args), **vars(saved)}))


def _metrics_so_far(args: argparse.Namespace, column: str, start_epoch: int) -> dict[int, float]:
    """A column of summary.csv in the folder of --resume, as far as it goes before an epoch."""
    path = os.path.join(os.path.dirname(args.resume), 'summary.csv')
    rows = read_summary(path) if os.path.exists(path) else {}
    metrics = {epoch: row.get(column) for epoch, row in rows.items() if epoch < start_epoch}
    return {epoch: metric for epoch, metric in metrics.items() if metric is not None}


def _announce_best(saver: Saver, metrics: Mapping[int, float], why: str) -> None:
    if not metrics:
        _logger.warning(f'{why}: summary.csv has none of it, the best epoch is found among those to come.')
        return
    best = (min if saver.decreasing else max)(metrics, key=lambda epoch: metrics[epoch])
    said = f'{why}: epoch {best} is the best so far'
    if saver.best_metric is None:
        said += ', but no weights are kept: the best is found among the epochs to come'
    elif metrics[best] != saver.best_metric:
        said += f', but its weights are not kept: of those that are, epoch {saver.best_epoch} is'
    _logger.warning(f'{said}.')


def announce(
    args: argparse.Namespace, trainer: Trainer, teacher: Teacher | None, epochs: tuple[int, int], folder: str
) -> None:
    """Print every resolved choice, once."""
    student = unwrap_model(trainer.task.get_eval_model())
    table = start_table(
        args,
        trainer.runtime,
        student,
        trainer.task,
        trainer.data,
        student.num_classes,
        epochs,
        teacher,
        trainer.cache,
    )
    _logger.info(f'\n{table}\n{"folder":<16}{folder}\n')


def fit(trainer: Trainer, start_epoch: int, num_epochs: int, folder: str) -> None:
    """Train, validate and save, epoch by epoch; a resumed run goes on at the batch where it was.

    Args:
        trainer: What to train with.
        start_epoch: First epoch, from 0.
        num_epochs: One past the last.
        folder: The run's folder, used on the primary rank.

    Raises:
        Interrupted: A signal asked the run to stop; a checkpoint of where it stopped is written.
        RunError: It cannot go on; checkpoints written before are whole.
    """
    args, runtime = trainer.args, trainer.runtime
    metric_name = ranked_by(args)
    stop = args.stop_epoch or num_epochs
    trainer.began = time.perf_counter()
    losses = restore_rank_state(trainer.resumed, trainer.task, runtime) if trainer.resumed else {}
    state = trainer.resumed if trainer.resumed and not trainer.resumed.validated else None
    best = (None, None)
    with Interrupts(runtime) as trainer.interrupts:
        for epoch in range(start_epoch, stop):
            if state is None or not state.train_metrics:
                state = _train(trainer, epoch, num_epochs, state.batch if state else 0, losses)
            due = (epoch + 1) % args.val_interval == 0 or epoch == stop - 1 or epoch + 1 in (args.save_epochs or [])
            eval_metrics = _validate_task(trainer, state, num_epochs) if due else None
            metric = eval_metrics[metric_name] if eval_metrics else None
            best = _save_epoch(trainer, state, eval_metrics, metric, folder)
            if trainer.scheduler is not None:
                trainer.scheduler.step(epoch + 1, metric)
            state, losses = None, {}
    if runtime.is_primary and best[0] is not None:
        seconds = time.perf_counter() - trainer.began if trainer.seconds is None else trainer.seconds
        of = ' since it was resumed' if trainer.seconds is None else ' in all' if args.resume else ''
        _logger.info(
            f'Best {metric_name} {best[0]:.3f} at epoch {best[1]}, {seconds:.0f} s{of}. '
            f"The student: '{os.path.join(folder, 'student.safetensors')}'."
        )


def _train(trainer: Trainer, epoch: int, num_epochs: int, start: int, losses: Mapping[str, Any]) -> RunState:
    """An epoch's training, or the rest of it; gives where the run is after it."""
    args, runtime, num_batches = trainer.args, trainer.runtime, len(trainer.data.train)
    progress = Progress(f'Train {epoch}/{num_epochs - 1}', num_batches, runtime.is_primary)
    try:
        metrics = train_one_epoch(trainer, epoch, progress, start, losses)
    finally:
        progress.close()
    _say_unreadable(trainer.data.train, (num_batches - start) * args.batch_size * runtime.world_size, runtime)
    _share_bn(trainer)
    state = trainer.state(epoch, num_batches, train_metrics=dict(metrics))
    if args.recovery_interval:
        trainer.save_recovery(state)
    _stop_if_asked(trainer, state)
    return state


def _stop_if_asked(trainer: Trainer, state: RunState) -> None:
    signum = trainer.interrupts.requested()
    if signum:
        trainer.save_recovery(state)
        raise Interrupted(signum, f'after epoch {state.epoch}, before its validation was through')


def _say_unreadable(loader: Any, images: int, runtime: Runtime) -> None:
    said = describe_unreadable(loader.dataset, images, runtime.distributed)
    if said:
        _logger.warning(said)


def _save_epoch(
    trainer: Trainer,
    state: RunState,
    eval_metrics: Mapping[str, float] | None,
    metric: float | None,
    folder: str,
) -> tuple[float | None, int | None]:
    """An epoch's row in summary.csv and its checkpoints; gives the best metric and its epoch on the primary rank."""
    args, runtime, epoch = trainer.args, trainer.runtime, state.epoch
    check_finite(trainer.task, runtime)
    state = trainer.state(
        epoch, len(trainer.data.train), train_metrics=state.train_metrics, validated=True, metric=metric
    )
    lr = mean_lr(trainer.optimizer)
    best = [(None, None)]

    def save() -> None:
        metric_names = create_evaluator(args, runtime, trainer.data.eval).metric_names
        shown = eval_metrics or dict.fromkeys(metric_names, '')
        write_summary(os.path.join(folder, 'summary.csv'), epoch, state.train_metrics, shown, lr)
        if trainer.trackers:
            row = flat_metrics(epoch, state.train_metrics, eval_metrics or {}, lr)
            agreement = trainer.agreement.percent if trainer.agreement and eval_metrics else None
            log_epoch(trainer.trackers, trainer.task, (epoch + 1) * trainer.updates_per_epoch, row, agreement)
        trainer.saver.run = state
        best[0] = trainer.saver.save_checkpoint(epoch, metric=metric)
        _save_milestone(trainer, epoch + 1)

    on_primary(runtime, save, 'the checkpoint of an epoch')
    return best[0]


def _save_milestone(trainer: Trainer, completed: int) -> None:
    if completed in (trainer.args.save_epochs or []):
        trainer.saver.save_milestone(completed)


def _share_bn(trainer: Trainer) -> None:
    args, runtime, task = trainer.args, trainer.runtime, trainer.task
    if runtime.distributed and args.dist_bn in ('broadcast', 'reduce'):
        for ema in (False, True):
            module = task.get_trainable_module(ema=ema)
            if module is not None and not (ema and args.model_ema_force_cpu):
                distribute_bn(module, runtime.world_size, args.dist_bn == 'reduce')


def _validate_task(trainer: Trainer, state: RunState, num_epochs: int) -> OrderedDict[str, float]:
    """Validate the weights, and where there is a moving average that too; its metrics are the ones that count."""
    task, args, epoch = trainer.task, trainer.args, state.epoch
    # ranks of a stream may differ in their numbers of batches: they are not asked together
    is_stream = isinstance(trainer.data.eval.dataset, IterableDataset)
    ask = (lambda: None) if is_stream else (lambda: _stop_if_asked(trainer, state))
    for ema in (False, True) if task.has_ema() and not args.model_ema_force_cpu else (False,):
        model = task.get_eval_model(ema=ema).eval()
        forward = model if trainer.agreement is None else trainer.agreement.compare(model)
        metrics = validate(forward, trainer.data, trainer.runtime, args, 'Test (EMA)' if ema else 'Test', ask)
        if trainer.agreement is not None:
            trainer.agreement.finish(trainer.runtime.distributed)
        _logger.info(f'Test{" (EMA)" if ema else ""} {epoch}/{num_epochs - 1}: {format_metrics(metrics)}')
    return metrics

"""The start of a run: optimizer, resumed state, schedule, folder. It returns a complete `Trainer`."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch.utils.data import IterableDataset

from ..config.declare import name_of
from ..config.derive import learning_rate, ranked_by
from ..config.flags import AverageFlags
from ..config.run_config import RunConfig
from ..data.datasets import warn_of_empty_classes
from ..data.epochs import plain_loader
from ..data.fingerprint import hash_names
from ..data.loaders import Data
from ..errors import UsageError, one_line
from ..method.task import ProjectorEnsembleTask
from ..process.folder_lock import FolderLock
from ..process.runtime import Runtime, prepare_task, ranks_together
from ..run_folder import DEFAULT_OUTPUT, RunFolder
from . import checkpoints
from .build import Parts
from .cache import TeacherCache
from .checkpoints import Saver, continued_folder, named_folder
from .console import hint_at_short_run, start_table, warn_of_settings
from .first_look import prepare_teachers
from .meters import Accumulation
from .nonfinite import UpdateGuard
from .position import RunState, Span, check_rank_state, is_plateau, restore_schedule, run_meaning, run_settings
from .resumed_settings import check_same_student, resumed_rates, with_kept_settings
from .run_cache import allocate_caches
from .trackers import Trackers, start_trackers
from .trainer import Trainer
from .validation import create_validation

_logger = logging.getLogger(__name__)

# inputs of which a run keeps no copy
_INPUTS = ('data', 'data_dir', 'unlabeled', 'knn_data', 'class_map', 'class_stats', 'loss_pos_weight', 'loss_class_weight', 'teacher_cache', 'teacher_checkpoint', 'initial_checkpoint', 'pretrained_path')  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What --resume found.

    Attributes:
        path: The checkpoint, '' for a fresh run.
        epoch: The epoch to start with, None if the checkpoint names none.
        state: The run's exact position, None if the checkpoint does not have it.
    """

    path: str = ''
    epoch: int | None = None
    state: RunState | None = None


def start(parts: Parts, lock: FolderLock) -> Trainer | None:
    """Make the trainer of a run; its steps are in the order of their dependencies.

    Weights are loaded before the moving average copies them, the average is made before both are compiled, and all of them
    before DDP wraps them. The run's folder comes last: a run that cannot start leaves nothing behind.

    Args:
        parts: The parts of the run.
        lock: Holds the run's folder from here on; one that existed it holds already.

    Returns:
        The trainer; None if --resume auto finds that the run is finished.

    Raises:
        UsageError: A setting, a checkpoint or a folder that does not fit.
    """
    given, runtime, data, task = parts.config, parts.runtime, parts.data, parts.training_task
    saved = checkpoints.saved_args(parts.checkpoint)
    resumes_optimizer = bool(parts.checkpoint) and not given.no_resume_opt
    config = with_kept_settings(given, saved) if resumes_optimizer else given
    lr = learning_rate(config, runtime.world_size)
    optimizer = _create_optimizer(config, task, lr)
    meaning = run_meaning(config, task, data, runtime)
    found = _resume(parts, optimizer, meaning)
    rates = lr, config.weight_decay
    if resumes_optimizer:
        rates = resumed_rates(given, saved, learning_rate(given, runtime.world_size), optimizer)
        # a checkpoint may say another rate than its optimizer has
        config = replace(config, weight_decay=rates[1], lr=config.lr if rates[0] == lr else rates[0])
    parts = replace(parts, config=config)
    if config.model_ema:
        _set_up_average(config, task, found.path, meaning, runtime)
    caches = prepare_teachers(parts, meaning)
    prepare_task(task, config, runtime)
    guard = None
    if config.nonfinite == 'skip':
        guard = UpdateGuard(cast(nn.Module, task.get_trainable_module()), scales=runtime.scaler is not None)
    images = _describe_images(data)
    resumed = _accept_state(parts, images, found.state)
    accumulation = Accumulation(len(data.train), config.grad_accum_steps)
    scheduler, num_epochs = _create_scheduler(config, optimizer, accumulation)
    span = _create_span(config, found, resumed, num_epochs)
    warn_of_settings(given, num_epochs, rates[0])
    if scheduler is not None and (span.first > 0 or resumed):
        _resume_schedule(config, scheduler, found, span, accumulation)
    if config.resume == 'auto' and span.first >= span.end:
        _finish(parts, optimizer, found, span)
        return None
    if _goes_on(found, span, _folder_path(parts, span)):
        check_same_student(config, saved, found.path, parts.student)
    validation = create_validation(parts)
    allocate_caches(caches, parts.teachers, runtime)
    folder, saver, trackers = _open_run_folder(parts, optimizer, found, span, lock)
    _announce(parts, span, rates, caches, folder)
    if not found.path:
        hint_at_short_run(task, span.schedule * accumulation.updates_after(accumulation.num_batches))
    return Trainer(
        parts,
        optimizer,
        scheduler,
        span,
        images=images,
        meaning=meaning,
        caches=caches,
        guard=guard,
        folder=folder,
        saver=saver,
        trackers=trackers,
        validation=validation,
    )


def _create_optimizer(config: RunConfig, task: TrainingTask, lr: float) -> torch.optim.Optimizer:
    module = cast(nn.Module, task.get_trainable_module())
    settings = {**optimizer_kwargs(cfg=config), 'lr': lr}
    more = dict(config.opt_kwargs)
    patterns = more.get('fallback_list')
    if patterns and not isinstance(patterns, (list, tuple)):
        raise UsageError(f'--opt-kwargs fallback_list is a list of patterns, got {patterns!r}')
    if patterns and isinstance(task, ProjectorEnsembleTask):
        # the student's parameters have a longer name beside projectors
        more['fallback_list'] = [*patterns, *(f'student.{pattern}' for pattern in patterns)]
    try:
        optimizer = create_optimizer_v2(module, **settings, **more)
    except (ValueError, TypeError, IndexError) as e:
        raise UsageError(f"--opt: cannot make optimizer '{config.opt}': {one_line(e)}") from e
    if isinstance(task, ProjectorEnsembleTask):
        task.check_optimizer(optimizer)
    return optimizer


def _create_scheduler(
    config: RunConfig, optimizer: torch.optim.Optimizer, accumulation: Accumulation
) -> tuple[Scheduler | None, int]:
    """The schedule, and its epochs with warmup prefix and cooldown."""
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(config, decreasing_metric=config.eval_metric == 'loss'),
            updates_per_epoch=accumulation.updates_after(accumulation.num_batches),
        )
    except (ValueError, AssertionError) as e:
        raise UsageError(f'schedule: {one_line(e)}') from e
    for name, epochs in (('stop-epoch', [config.stop_epoch]), ('save-epochs', config.save_epochs or [])):
        wrong = [e for e in epochs if e is not None and not 1 <= e <= num_epochs]
        if wrong:
            raise UsageError(f'--{name} must be from 1 to the {num_epochs} epochs of the schedule, got {wrong[0]}')
    return scheduler, num_epochs


def _create_span(config: RunConfig, found: Found, resumed: RunState | None, num_epochs: int) -> Span:
    first = config.start_epoch if config.start_epoch is not None else (found.epoch or 0)
    if first >= num_epochs and config.resume != 'auto':
        raise UsageError(
            f'nothing to train: the run starts at epoch {first} and --epochs gives {num_epochs} (--start-epoch 0 '
            f'starts the schedule anew)'
        )
    seconds = (found.state.seconds if found.state else None) if found.path else 0.0
    return Span(
        first=first,
        schedule=num_epochs,
        end=config.stop_epoch or num_epochs,
        resumed=resumed,
        seconds_before=seconds,
        is_resumed=bool(found.path),
    )


def _resume(parts: Parts, optimizer: torch.optim.Optimizer, meaning: Mapping[str, Any]) -> Found:
    """Load weights, optimizer and scaler of the checkpoint, which must be the same on all ranks.

    Raises:
        UsageError: See `checkpoints.resume`; or the machines' disks hold different checkpoints.
    """
    config, runtime, path = parts.config, parts.runtime, parts.checkpoint
    found = Found()
    if path:
        found = Found(path, *checkpoints.resume(config, path, parts.training_task, optimizer, runtime, meaning))
    if not runtime.distributed:
        return found
    ranks = runtime.gather((os.path.basename(path), found.epoch, found.state.batch if found.state else None))
    if len(set(ranks)) > 1:
        other = next(r for r, of_rank in enumerate(ranks) if of_rank != ranks[0])
        said = [
            f"'{name}' of epoch {epoch}" if name else 'no checkpoint' for name, epoch, _ in (ranks[0], ranks[other])
        ]
        raise UsageError(
            f'--resume: rank 0 found {said[0]}, rank {other} {said[1]}: --output must be a folder that all machines share'
        )
    return found


def _set_up_average(
    flags: AverageFlags, task: TrainingTask, path: str, meaning: Mapping[str, Any], runtime: Runtime
) -> None:
    if runtime.distributed:  # DDP, which makes the ranks equal, comes later: each would average from its own start
        for tensor in cast(nn.Module, task.get_trainable_module()).state_dict().values():
            dist.broadcast(tensor, src=0)
    device = torch.device('cpu') if flags.model_ema_force_cpu else None
    task.setup_ema(decay=flags.model_ema_decay, use_warmup=flags.model_ema_warmup, device=device)
    if path:
        checkpoints.resume_ema(path, task, meaning)


def _describe_images(data: Data) -> dict[str, Any]:
    dataset = getattr(plain_loader(data.train).dataset, 'dataset', None)
    if dataset is None or isinstance(dataset, IterableDataset):
        return {}
    return {'number': len(dataset), 'names': hash_names(dataset)}


def _accept_state(parts: Parts, images: Mapping[str, Any], state: RunState | None) -> RunState | None:
    """A checkpoint's state if it is valid for this run, else None; logs what has changed and the consequence."""
    if state is None or parts.config.start_epoch is not None:
        return None
    if state.data != images:
        _logger.warning(
            f'The training images have changed since the checkpoint: {state.data.get("number")} of hash '
            f'{state.data.get("names")} then, {images.get("number")} of hash {images.get("names")} now.'
        )
    check_rank_state(state, parts.training_task, parts.runtime)
    if state.validated:
        return state
    settings = run_settings(parts.config, len(parts.data.train), parts.runtime.world_size)
    changed = [k for k, v in settings.items() if state.settings.get(k) != v]
    if state.train_metrics or (not changed and state.data == images):
        return state
    why = ', '.join(f'{k.replace("_", " ")} {state.settings.get(k)} then and {settings[k]} now' for k in changed)
    _logger.warning(f'Epoch {state.epoch} starts again from its first batch: {why or "other images"}.')
    return None


def _resume_schedule(
    config: RunConfig, scheduler: Scheduler, found: Found, span: Span, accumulation: Accumulation
) -> None:
    state = span.resumed
    schedule, metric = (state.schedule, state.metric) if state else ({}, None)
    if schedule and _metric_then(config, found) != ranked_by(config):
        _logger.warning('--eval-metric is another than before: the plateau schedule counts anew.')
        schedule, metric = {**schedule, 'plateau': {}}, None
    restore_schedule(scheduler, schedule)
    if config.sched_on_updates:
        batches = state.batch if state and not state.validated else 0
        before = span.first * accumulation.updates_after(accumulation.num_batches)
        scheduler.step_update(before + accumulation.updates_after(batches))
    elif not is_plateau(scheduler):
        scheduler.step(span.first)
    elif not state or state.validated:
        scheduler.step(span.first, metric)


def _finish(parts: Parts, optimizer: torch.optim.Optimizer, found: Found, span: Span) -> None:
    """Write missing files of the last epoch, after a kill: --resume auto found nothing left to train."""
    if parts.runtime.is_primary and found.path:
        folder = RunFolder(os.path.dirname(found.path))
        _continue_folder(parts.config, _create_saver(parts, optimizer, folder), found, span)
    _logger.info(f'--resume auto: the run is finished after {span.first} epochs.')


def _open_run_folder(
    parts: Parts, optimizer: torch.optim.Optimizer, found: Found, span: Span, lock: FolderLock
) -> tuple[RunFolder, Saver | None, Trackers]:
    """Make the run's folder with args.yaml, and on the primary rank saver and trackers; the first files written."""
    config, runtime = parts.config, parts.runtime
    folder, saver, trackers = RunFolder(_folder_path(parts, span)), None, Trackers()
    with ranks_together(runtime):
        if runtime.is_primary:
            try:
                folder = _make_folder(folder, is_own=not config.experiment and not _goes_on(found, span, folder.path))
                saver, trackers = _fill_folder(parts, optimizer, found, span, folder, lock)
            except OSError as e:
                raise UsageError(
                    f"--output: cannot write into '{config.output or DEFAULT_OUTPUT}' ({e.strerror})"
                ) from e
    return folder, saver, trackers


def _folder_path(parts: Parts, span: Span) -> str:
    """The folder of --experiment; without a name that of the run that --resume names and continues, else one by the time."""
    config, size = parts.config, parts.data.config['input_size'][-1]
    continued = continued_folder(config) if span.first > 0 or span.resumed else ''
    by_time = f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(config.model)}-{size}'
    return named_folder(config) or continued or os.path.join(config.output or DEFAULT_OUTPUT, by_time)


def _make_folder(folder: RunFolder, is_own: bool) -> RunFolder:
    """Make the folder, if it is not there; one that must be the run's own has a number behind its name if it is there."""
    path, number = folder.path, 1
    while True:
        try:
            folder.path.mkdir(parents=True, exist_ok=not is_own)
            return folder
        except FileExistsError:
            if not is_own or not folder.path.is_dir():
                raise
            number += 1
            folder = RunFolder(f'{path}_{number}')


def _goes_on(found: Found, span: Span, folder: str | os.PathLike[str]) -> bool:
    """Whether the run goes on in the folder of its checkpoint, and does not start a new one."""
    same = os.path.realpath(os.path.dirname(found.path)) == os.path.realpath(folder)
    return bool(found.path and (span.first > 0 or span.resumed) and same)


def _fill_folder(
    parts: Parts, optimizer: torch.optim.Optimizer, found: Found, span: Span, folder: RunFolder, lock: FolderLock
) -> tuple[Saver, Trackers]:
    config = parts.config
    goes_on = _goes_on(found, span, folder.path)
    if not goes_on:
        folder.check_is_of_a_run()
    lock.take(folder.path)
    # with --resume auto, a row without weights is of an epoch that a kill interrupted: it is trained and written again
    if not goes_on and folder.results() and (config.resume != 'auto' or folder.has_weights()):
        _check_own_inputs(config, folder)
        folder.make_room(config.overwrite)
        lock.take(folder.path)  # a new one, if the earlier run was moved aside
    trackers = start_trackers(config, str(folder.path), resumed=goes_on)
    folder.remove_half_written()
    folder.write_args(config.to_yaml())
    saver = _create_saver(parts, optimizer, folder)
    if goes_on:
        _continue_folder(config, saver, found, span)
    folder.cut_rows(span.first if goes_on else 0)
    return saver, trackers


def _check_own_inputs(config: RunConfig, folder: RunFolder) -> None:
    """Refuse a fresh run that would move or delete an earlier run with files that it reads.

    Raises:
        UsageError: The message names the flag whose file lies in the run's own folder.
    """
    own = os.path.realpath(folder.path)
    for name in _INPUTS:
        given = getattr(config, name)
        for path in given if isinstance(given, list) else [given]:
            if path and os.path.exists(path) and os.path.commonpath([own, os.path.realpath(path)]) == own:
                raise UsageError(
                    f"{name_of(name)}: '{path}' lies in the folder of the earlier run, which makes room for this one: give "
                    f'another --experiment, or --resume auto to go on'
                )


def _create_saver(parts: Parts, optimizer: torch.optim.Optimizer, folder: RunFolder) -> Saver:
    config, task = parts.config, parts.training_task
    with_average = task.has_ema() and not config.model_ema_force_cpu
    return Saver(
        folder,
        task,
        optimizer,
        config,
        parts.runtime.scaler,
        decreasing=config.eval_metric == 'loss',
        evaluated_model=lambda: cast(nn.Module, task.get_eval_model(ema=with_average)),
    )


def _continue_folder(config: RunConfig, saver: Saver, found: Found, span: Span) -> None:
    then, now = _metric_then(config, found), ranked_by(config)
    metrics = None if then == now else _metrics_so_far(found, f'eval_{now}', span.first)
    is_last = saver.continue_from(found.path, metrics)
    if is_last and span.first in (config.save_epochs or []):
        saver.save_milestone(span.first)  # a kill may have come between `last` and the milestone
    if metrics is not None:
        _announce_best(saver, metrics, f'--eval-metric is {now} now and was {then} before')


def _metric_then(config: RunConfig, found: Found) -> str:
    """The metric by which the epochs of the checkpoint were ranked."""
    saved = checkpoints.saved_args(found.path)
    return ranked_by(replace(config, **{k: saved[k] for k in ('eval_metric', 'task') if k in saved}))


def _metrics_so_far(found: Found, column: str, start_epoch: int) -> dict[int, float]:
    """A column of summary.csv in the folder of the checkpoint, for the epochs before `start_epoch`."""
    folder = RunFolder(os.path.dirname(found.path))
    rows = folder.rows_by_epoch() if folder.summary_file.exists() else {}
    metrics = {epoch: row.get(column) for epoch, row in rows.items() if epoch < start_epoch}
    return {epoch: metric for epoch, metric in metrics.items() if metric is not None}


def _announce_best(saver: Saver, metrics: Mapping[int, float], why: str) -> None:
    if not metrics:
        _logger.warning(f'{why}: summary.csv has none of it, the best epoch is found among those to come.')
        return
    best = (min if saver.decreasing else max)(metrics, key=lambda epoch: metrics[epoch])
    said = f'{why}: epoch {best + 1} is the best so far'
    if saver.best_metric is None:
        said += ', but no weights are kept: the best is found among the epochs to come'
    elif metrics[best] != saver.best_metric:
        said += f', but its weights are not kept: of those that are, epoch {cast(int, saver.best_epoch) + 1} is'
    _logger.warning(f'{said}.')


def _announce(
    parts: Parts,
    span: Span,
    rates: tuple[float, float],
    caches: Sequence[TeacherCache],
    folder: RunFolder,
) -> None:
    """Print every resolved choice, once."""
    task = parts.training_task
    if parts.config.has_labels:
        warn_of_empty_classes(parts.data.train.dataset)
    table = start_table(
        parts.config,
        parts.runtime,
        unwrap_model(task.get_eval_model()),
        task,
        parts.data,
        parts.num_classes,
        (span.first, span.schedule),
        rates,
        parts.teachers,
        caches,
    )
    _logger.info(f'\n{table}\n{"folder":<16}{folder.path}\n')

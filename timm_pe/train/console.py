"""What a run prints: warnings, the start table, progress, a line per epoch."""

import itertools
import logging
import math
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence, Sized
from typing import cast

import timm
import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import setup_default_logging, world_info_from_env
from torch.utils.data import get_worker_info
from tqdm import tqdm

from ..config.declare import default_of
from ..config.derive import given_classes, label_smoothing, loader_workers, pins_memory
from ..config.rules import without_effect
from ..config.run_config import RunConfig
from ..config.teachers import teachers_of
from ..data.beside import BesideReader, describe_beside
from ..data.datasets import count_classes, describe_data
from ..data.loaders import Data
from ..data.unlabeled import describe_unlabeled, reader_of, warn_of_splits
from ..method.task import ProjectorEnsembleTask
from ..method.teacher import Teacher
from ..process.runtime import Runtime, describe_precision
from ..version import __version__
from .cache import TeacherCache
from .task_loss import LabeledLoss

_logger = logging.getLogger(__name__)

# images that the suggested epochs of a pretraining without labels see, where those are from 10 to 300; not tuned
_PRETRAINING_IMAGES = 2_000_000
# updates below which projectors cost accuracy at equal widths; between 1,560 and 4,680 they began to gain on CIFAR-10
SHORT_RUN = 2000

# longest line of timm about weights that is shown whole
_LONGEST = 300
# format of a progress bar
_BAR = '{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {remaining}{postfix}'


class _TqdmHandler(logging.Handler):
    """Writes log lines without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if get_worker_info() is None:
            tqdm.write(self.format(record), file=sys.stderr)
        else:  # a loader process has a copy of the bar from when it was forked, which tqdm would draw again
            print(self.format(record), file=sys.stderr, flush=True)


def _is_no_bare_load(record: logging.LogRecord) -> bool:
    """False for timm's 'Loaded state_dict from checkpoint': our own messages name their purpose."""
    return "from checkpoint '" not in str(record.msg)


def _is_no_skipped_image(record: logging.LogRecord) -> bool:
    """False for timm's line about each unreadable image and epoch: they are counted, and the first is named."""
    return not str(record.msg).startswith('Skipped sample')


def _cut(record: logging.LogRecord) -> bool:
    """Shorten a line that lists hundreds of names, as timm's about weights that do not fit."""
    message = record.getMessage()
    if len(message) > _LONGEST:  # what it means is at its end
        record.msg, record.args = f'{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}', None
    return True


class _OnceEach(logging.Filter):
    """Lets each message of a library pass once, and of retries the first; those of others always.

    Args:
        name: The library's logger.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.seen: dict[str, logging.LogRecord] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not super().filter(record):
            return True
        message = record.getMessage()
        known = 'Retrying' if message.startswith('Retrying') else message
        return self.seen.setdefault(known, record) is record  # also for a second handler


# the hub says the same for each file and attempt
_OF_HUB = _OnceEach('huggingface_hub')


def setup_logging(level: int = logging.INFO) -> None:
    """Plain messages from `level` up on the primary rank, errors only on the others."""
    is_primary = world_info_from_env()[1] == 0
    setup_default_logging(default_level=level if is_primary else logging.ERROR)
    # it would list all files that are kept, after every epoch
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)
    logging.getLogger('timm.models._helpers').addFilter(_is_no_bare_load)
    logging.getLogger('timm.models._builder').addFilter(_cut)
    logging.getLogger('timm.data.dataset').addFilter(_is_no_skipped_image)
    of_hub = logging.getLogger('huggingface_hub')
    of_hub.propagate = False  # it prints by itself
    _OF_HUB.seen.clear()
    for own in of_hub.handlers:
        own.addFilter(_OF_HUB)
    root = logging.getLogger()
    handler = _TqdmHandler()
    handler.setFormatter(root.handlers[0].formatter)
    root.handlers = [handler]
    logging.captureWarnings(True)  # those of libraries would break the bar


def _count(params: int) -> str:
    return f'{params / 1e6:.2f} M' if params >= 1e5 else f'{params:,}'


def numbers(values: Sequence[float]) -> str:
    """A few numbers in a line."""
    return ' '.join(f'{v:.4g}' for v in values)


def count_params(module: nn.Module) -> int:
    """Number of parameters of `module`."""
    return sum(p.numel() for p in module.parameters())


def warn_of_tta(config: RunConfig) -> None:
    """Say that --tta averages different images."""
    if config.tta > 1:
        _logger.warning(
            f'--tta {config.tta} averages {config.tta} images in a row, as in timm; this loader gives each image once, so '
            f'different images are averaged and the metrics mean nothing.'
        )


def warn_of_settings(config: RunConfig, num_epochs: int, lr: float) -> None:
    """Name flags without effect, labels that are not used, and a warmup that fills half of a run of `num_epochs` epochs, or
    all of it, at learning rate `lr`.
    """
    idle = without_effect(config)
    if idle:
        _logger.warning(f'Without effect: {", ".join(idle)}.')
    if not config.has_labels:
        warn_of_splits(config.unlabeled)
    warn_of_tta(config)
    warmup = config.warmup_epochs
    if config.sched == 'none' or config.warmup_prefix or 2 * warmup < num_epochs:
        return
    if warmup >= num_epochs:
        of = f'All {num_epochs} epochs are warmup (--warmup-epochs {warmup}): the learning rate never reaches {lr:.4g}'
    else:  # warmup takes the place of the schedule's first epochs: afterwards a cosine is far down already
        of = f'{warmup} of {num_epochs} epochs are warmup (--warmup-epochs): few are left for a learning rate of {lr:.4g}'
    _logger.warning(f'{of}. Lower --warmup-epochs.')


def hint_at_short_run(task: TrainingTask, updates: int) -> None:
    """Say where features are equally wide and the run is so short that projectors cost accuracy when it was measured."""
    if not isinstance(task, ProjectorEnsembleTask) or task.criterion is None or updates >= SHORT_RUN:
        return
    for aim, projectors in zip(task.aims, task.projectors, strict=True):
        if aim.tapped == 'feature' and projectors.in_dim == projectors.out_dim and projectors.projector != 'identity':
            _logger.info(
                f'A short run, {updates:,} updates, and both features are {projectors.in_dim} wide: where that was measured, '
                f'students did better without projectors. Try --pe-projector identity too (docs/guide/teachers.md).'
            )
            return


def start_table(
    config: RunConfig,
    runtime: Runtime,
    student: nn.Module,
    task: TrainingTask,
    data: Data,
    num_classes: int,
    epochs: tuple[int, int],
    rates: tuple[float, float],
    teachers: Sequence[Teacher] = (),
    caches: Sequence[TeacherCache] = (),
) -> str:
    """Every resolved choice of a run, in one table.

    Args:
        config: Run settings.
        runtime: Device, ranks, precision.
        student: The student.
        task: The task.
        data: The run's `Data`.
        num_classes: The student's classes.
        epochs: The first epoch, and one past the last.
        rates: Learning rate and weight decay.
        teachers: The teachers, in the order of --teacher.
        caches: The cache of each with --teacher-cache.
    """
    size = 'x'.join(map(str, data.config['input_size']))
    columns = [
        ('model', config.model),
        ('parameters', _count(count_params(student))),
        ('classes', _classes(config, num_classes, data)),
    ]
    columns += [('input', size), ('mean', numbers(data.config['mean'])), ('std', numbers(data.config['std']))]
    columns += [('precision', describe_precision(config))]
    settings, columns_of = teachers_of(config), []
    for flags, teacher in zip(settings, teachers, strict=True):
        auto = ' (auto)' if flags.dtype == 'auto' and teacher.dtype else ''
        columns_of.append(
            {
                'model': f'{flags.name}{" (random weights)" if flags.is_random else ""}',
                'parameters': f'{_count(count_params(teacher.model))} (frozen)',
                'classes': str(teacher.num_classes),
                'input': _teacher_input(teacher, data.config['input_size']),
                'mean': numbers(teacher.mean),
                'std': numbers(teacher.std),
                'precision': f'{teacher.precision}{auto}',
                'feature width': str(teacher.width),
            }
        )
    if teachers:
        columns.insert(2, ('feature width', str(cast(ProjectorEnsembleTask, task).projectors[0].in_dim)))
    several = len(teachers) > 1
    head = ['', 'student', *(f'teacher {i + 1}' if several else 'teacher' for i in range(len(teachers)))]
    table = [head, *([name, value, *(column[name] for column in columns_of)] for name, value in columns)]
    widths = [13, *(max(len(row[i]) for row in table) for i in range(1, len(head)))]
    lines = ['   '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines += [f'{name:<16}{value}' for name, value in _run_rows(config, runtime, task, data, epochs, rates)]
    lines += [f'{"teacher cache":<16}{cache.describe()}' for cache in caches]
    return '\n'.join(lines)


def _classes(config: RunConfig, num_classes: int, data: Data) -> str:
    if not config.has_labels:
        return 'none, no labels'
    if given_classes(config) is not None:
        return str(num_classes)
    return f'{num_classes} ({"of the data" if count_classes(data.eval.dataset) == num_classes else "its own"})'


def _teacher_input(teacher: Teacher, student_size: Sequence[int]) -> str:
    height, width = teacher.size_for(torch.empty(1, *student_size, device=teacher.scale.device))
    resized = '' if (height, width) == tuple(student_size[1:]) else ' (bicubic)'
    if teacher.built_size and teacher.own_size:
        resized += f', built for it in place of {"x".join(map(str, teacher.own_size))}'
    return f'{len(teacher.mean)}x{height}x{width}{resized}'


def _describe_loss(task: ProjectorEnsembleTask) -> str:
    terms = [f'{task.distill_loss_weight:g} x {task.feature_loss_name}']
    if len(task.teachers) > 1:
        shares = ' '.join(f'{weight:.3g}' for weight in task.teacher_weights)
        terms[0] += f' (teachers weighed {shares}{f", drop {task.teacher_drop:g}" * bool(task.teacher_drop)})'
    if task.criterion is not None:
        criterion, of = task.criterion, ''
        if isinstance(criterion, LabeledLoss):
            criterion, of = criterion.criterion, ' of labelled images'
        terms.insert(0, f'{task.task_loss_weight:g} x {type(criterion).__name__}{of}')
    if task.map_weight:
        terms.append(f'{task.map_weight:g} x direction of maps')
    if task.kd_loss_weight:
        terms.append(f'{task.kd_loss_weight:g} x KL at T = {task.kd_temperature:g}')
    return ' + '.join(terms)


def _run_rows(
    config: RunConfig,
    runtime: Runtime,
    task: TrainingTask,
    data: Data,
    epochs: tuple[int, int],
    rates: tuple[float, float],
) -> list[tuple[str, str]]:
    rows = []
    start_epoch, num_epochs = epochs
    if not isinstance(task, ProjectorEnsembleTask):
        rows.append(('loss', type(task.criterion).__name__))
    else:
        for aim, p in zip(task.aims, task.projectors, strict=True):
            of = f'{aim.tapped} ' if aim.tapped != 'feature' else ''
            to = f' ({task.teacher_names[aim.teacher]})' if len(task.teachers) > 1 else ''
            rows.append(
                (
                    'projectors' if aim is task.aims[0] else '',
                    f'{p.num_projectors} x {p.projector} {of}{p.in_dim} -> {p.out_dim}{to}, activation {p.act}, '
                    f'{_count(count_params(p))} parameters',
                )
            )
        if task.teacher_norm != 'none':
            rows.append(('teacher norm', task.teacher_norm))
        rows.append(('loss', _describe_loss(task)))
    rows.append(('learning rate', f'{rates[0]:.4g} ({config.opt}, {config.sched}, weight decay {rates[1]:g})'))
    accum, batch = config.grad_accum_steps, config.batch_size
    rows.append(
        ('global batch', f'{batch * runtime.world_size * accum} = {batch} x {runtime.world_size} ranks x {accum} steps')
    )
    warmup = f', warmup {config.warmup_epochs}' if config.warmup_epochs else ''
    if warmup and start_epoch == 0 and not config.sched_on_updates and config.sched != 'none':
        warmup += f' (all of epoch 0 at lr {config.warmup_lr:g}: --sched-on-updates warms up batch by batch)'
    first = f', {start_epoch} of them trained before' if start_epoch else ''
    if config.epochs == default_of(type(config), 'epochs'):
        first += f"; {config.epochs} is timm's default, --epochs sets it"
    rows.append(('epochs', f'{num_epochs} of {len(data.train)} batches{warmup}{first}'))
    names = ('mixup', 'cutmix', *(() if config.no_aug else ('reprob',)), 'drop')
    mixing = [f'{n} {getattr(config, n):g}' for n in names if getattr(config, n)]
    smoothing = [f'smoothing {label_smoothing(config):g}'] if config.has_labels else []
    rows.append(('regularization', ', '.join([*mixing, *smoothing]) or 'none'))
    average = f'decay {config.model_ema_decay:g}' if config.model_ema else 'none'
    rows.append(('weight average', average))
    rows.append(('seed', str(config.seed)))
    train, evaluation = data.train.dataset, data.eval.dataset
    if config.has_labels:
        beside = reader_of(train, BesideReader)
        rows += describe_data(train, evaluation)
        rows += describe_beside(config, beside, batch) if beside is not None else []
    else:
        rows += describe_unlabeled(train, evaluation, config.val_fraction)
        rows += _suggest_schedule(config, len(cast(Sized, train)), start_epoch)
    pinned = ', pinned memory' if pins_memory(config, runtime.device.type) else ''
    rows.append(('loader workers', '{} ({}){}'.format(*loader_workers(config, data.train.dataset), pinned)))
    rows.append(('device', f'{runtime.device}, world size {runtime.world_size}'))
    python = platform.python_version()
    rows.append(
        ('versions', f'timm_pe {__version__}, timm {timm.__version__}, torch {torch.__version__}, Python {python}')
    )
    return rows


def _suggest_schedule(config: RunConfig, images: int, start_epoch: int) -> list[tuple[str, str]]:
    """A row with flags to start a pretraining from, in place of those of timm's defaults that the run has."""
    epochs = min(300, max(10, 10 * math.ceil(_PRETRAINING_IMAGES / images / 10)))
    flags = {
        ('opt', 'lr', 'weight_decay'): '--opt adamw --lr 4e-3 --weight-decay 0.02',
        ('sched_on_updates',): '--sched-on-updates',
        ('epochs',): f'--epochs {epochs}',
    }
    said = [text for names, text in flags.items() if not any(map(config.is_given, names))]
    if start_epoch or not said:
        return []
    return [('suggested', f'{" ".join(said)} (a pretraining of {images:,} images)')]


class Progress:
    """Progress of a pass over a loader: a live bar on a terminal, a line now and then elsewhere.

    Args:
        what: 'Train 3/10', 'Test', ...
        total: Number of batches.
        enabled: False on all ranks but the primary.
    """

    def __init__(self, what: str, total: int, enabled: bool = True):
        self.what, self.total, self.start = what, total, time.perf_counter()
        live = enabled and sys.stderr.isatty()
        self.lines = enabled and not live
        self.bar = tqdm(
            total=total, desc=what, leave=False, dynamic_ncols=True, disable=not live, bar_format=_BAR, delay=0
        )

    def update(
        self,
        done: int,
        terms: Mapping[str, float] | None = None,
        images_per_s: float = 0.0,
        lr: float | None = None,
        left: float | None = None,
        waiting: float | None = None,
    ) -> None:
        """Show that `done` batches are done; at intervals with loss terms, speed, learning rate, seconds left and the
        share of time spent waiting for data.

        Without `left`, the seconds left of the pass itself are shown, at its end too.
        """
        self.bar.update(done - self.bar.n)
        if terms is None:
            return
        waits = [] if waiting is None else [f'waiting for data {waiting:.0%}']
        parts = [*_describe_training(terms, images_per_s, lr), *waits]
        text = '  '.join(parts)
        self.bar.set_postfix_str(self._what_fits(parts))
        if self.lines and (left is None or done != self.total):  # the end of an epoch has a line of its own
            share = 100 * done / max(self.total, 1)
            if left is None:
                left = (time.perf_counter() - self.start) / done * (self.total - done)
            _logger.info(f'{self.what} [{done:>4d}/{self.total} ({share:>3.0f}%)]  {text}  left {_duration(left)}')

    def _what_fits(self, parts: Sequence[str]) -> str:
        """As many of the parts as the bar's line has room for, each of them whole."""
        state = self.bar.format_dict
        room = (state['ncols'] or math.inf) - len(tqdm.format_meter(**{**state, 'postfix': None, 'ncols': None})) - 3
        lengths = itertools.accumulate(len(part) + 2 for part in parts)
        return '  '.join(part for part, length in zip(parts, lengths, strict=True) if length <= room)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self.bar.close()


def say_epoch(head: Sequence[str], train_metrics: Mapping[str, float], lr: float, seconds: float, left: float) -> None:
    """Log the final line of an epoch; on a narrow terminal it wraps between its parts.

    Args:
        head: Its number and, if it was validated, its metrics, in words.
        train_metrics: Means of its loss and terms, and images_per_s.
        lr: Learning rate at its end.
        seconds: How long it took.
        left: How long the run still takes.
    """
    terms = {name: value for name, value in train_metrics.items() if name != 'images_per_s'}
    parts = [*head, *_describe_training(terms, train_metrics['images_per_s'], lr), _duration(seconds)]
    parts += [f'left {_duration(left)}'] if left else []
    columns = shutil.get_terminal_size().columns if sys.stderr.isatty() else 0
    lines = [parts[0]]
    for part in parts[1:]:
        if columns and len(f'{lines[-1]}  {part}') >= columns:
            lines.append(f'    {part}')
        else:
            lines[-1] += f'  {part}'
    _logger.info('\n'.join(lines))


def _describe_training(terms: Mapping[str, float], images_per_s: float, lr: float | None) -> list[str]:
    shown = [f'{name} {value:#.4g}' for name, value in terms.items()]
    rate = [] if lr is None else [f'lr {lr:.3g}']
    return [*shown, *rate, f'{images_per_s:.4g} images/s']


def _duration(seconds: float) -> str:
    return f'{int(seconds) // 3600:d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'

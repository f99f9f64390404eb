"""What a run says: the start table, progress, summary.csv."""

import argparse
import contextlib
import csv
import glob
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.utils import setup_default_logging, trim_summary, update_summary, world_info_from_env
from tqdm import tqdm

from .args import resolve_smoothing, resolve_workers
from .errors import UsageError, one_line
from .files import replaced
from .runtime import Runtime, describe_precision, describe_teacher_precision
from .version import __version__

_logger = logging.getLogger(__name__)


class _TqdmHandler(logging.Handler):
    """Log lines that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(level: int = logging.INFO) -> None:
    """Plain messages from `level` up on the primary rank, errors only on the others."""
    is_primary = world_info_from_env()[1] == 0
    setup_default_logging(default_level=level if is_primary else logging.ERROR)
    # it would list all files that are kept, after every epoch
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)
    logging.getLogger('huggingface_hub').propagate = False  # it prints by itself
    root = logging.getLogger()
    handler = _TqdmHandler()
    handler.setFormatter(root.handlers[0].formatter)
    root.handlers = [handler]


def _count(params: int) -> str:
    return f'{params / 1e6:.2f} M' if params >= 1e5 else f'{params:,}'


def _numbers(values: Sequence[float]) -> str:
    return ' '.join(f'{v:.4g}' for v in values)


def count_params(module: nn.Module) -> int:
    """Number of parameters of `module`."""
    return sum(p.numel() for p in module.parameters())


def start_table(
    args: argparse.Namespace,
    runtime: Runtime,
    student: nn.Module,
    task: nn.Module,
    data: Any,
    num_classes: int,
    epochs: tuple[int, int],
    teacher: Any = None,
    cache: Any = None,
) -> str:
    """Every resolved choice of a run, in one table.

    Args:
        args: Run arguments, with `lr` resolved.
        runtime: Device, ranks, precision.
        student: The student.
        task: The task.
        data: The run's `Data`.
        num_classes: The student's classes.
        epochs: The first epoch, and one past the last.
        teacher: The `Teacher`, or None.
        cache: The `TeacherCache`, or None.
    """
    size = 'x'.join(map(str, data.config['input_size']))
    columns = [('model', args.model), ('parameters', _count(count_params(student))), ('classes', str(num_classes))]
    columns += [('input', size), ('mean', _numbers(data.config['mean'])), ('std', _numbers(data.config['std']))]
    columns += [('precision', describe_precision(args))]
    head, rows = ('student', 'teacher'), [(name, value, '') for name, value in columns]
    if teacher is not None:
        of_teacher = {
            'model': args.teacher,
            'parameters': f'{_count(count_params(teacher.model))} (frozen)',
            'classes': str(teacher.num_classes),
            'input': _teacher_input(teacher, data.config['input_size']),
            'mean': _numbers(teacher.mean),
            'std': _numbers(teacher.std),
            'precision': describe_teacher_precision(args, teacher.dtype or teacher.input_dtype),
        }
        rows = [(name, value, of_teacher[name]) for name, value, _ in rows]
        rows.insert(2, ('feature width', str(task.projection.in_dim), str(task.projection.out_dim)))
    width = max(len(r[1]) for r in rows) + 3
    lines = [f'{"":<16}{head[0]:<{width}}{head[1] if teacher is not None else ""}'.rstrip()]
    lines += [f'{name:<16}{a:<{width}}{b}'.rstrip() for name, a, b in rows]
    lines += [f'{name:<16}{value}' for name, value in _run_rows(args, runtime, task, data, teacher, epochs)]
    if cache is not None:
        lines.append(f'{"teacher cache":<16}{cache.describe()}')
    return '\n'.join(lines)


def _teacher_input(teacher: Any, student_size: Sequence[int]) -> str:
    height, width = teacher.size_for(torch.empty(1, *student_size, device=teacher.scale.device))
    resized = '' if (height, width) == tuple(student_size[1:]) else ' (bicubic)'
    return f'{len(teacher.mean)}x{height}x{width}{resized}'


def _run_rows(
    args: argparse.Namespace, runtime: Runtime, task: nn.Module, data: Any, teacher: Any, epochs: tuple[int, int]
) -> list[tuple[str, str]]:
    rows = []
    start_epoch, num_epochs = epochs
    criterion = type(task.criterion).__name__
    if teacher is None:
        rows.append(('loss', criterion))
    else:
        p = task.projection
        of = 'logits ' if task.target == 'logits' else ''
        rows.append(
            (
                'projectors',
                f'{p.num_projectors} x {p.projector} {of}{p.in_dim} -> {p.out_dim}, activation {p.act}, '
                f'{_count(count_params(p))} parameters',
            )
        )
        if task.teacher_norm != 'none':
            rows.append(('teacher norm', task.teacher_norm))
        kd = f' + {task.kd_loss_weight:g} x KL at T = {task.kd_temperature:g}' if task.kd_loss_weight else ''
        rows.append(
            (
                'loss',
                f'{task.task_loss_weight:g} x {criterion} + {task.distill_loss_weight:g} x {task.feature_loss_name}{kd}',
            )
        )
    rows.append(('learning rate', f'{args.lr:.4g} ({args.opt}, {args.sched}, weight decay {args.weight_decay:g})'))
    accum, batch = args.grad_accum_steps, args.batch_size
    rows.append(
        ('global batch', f'{batch * runtime.world_size * accum} = {batch} x {runtime.world_size} ranks x {accum} steps')
    )
    warmup = f', warmup {args.warmup_epochs}' if args.warmup_epochs else ''
    if warmup and start_epoch == 0 and not args.sched_on_updates and args.sched != 'none':
        warmup += f' (all of epoch 0 at lr {args.warmup_lr:g}: --sched-on-updates warms up batch by batch)'
    first = f', starting at {start_epoch}' if start_epoch else ''
    rows.append(('epochs', f'{num_epochs} of {len(data.train)} batches{warmup}{first}'))
    mixing = [f'{n} {getattr(args, n):g}' for n in ('mixup', 'cutmix', 'reprob', 'drop') if getattr(args, n)]
    rows.append(('regularization', ', '.join([*mixing, f'smoothing {resolve_smoothing(args):g}'])))
    average = f'decay {args.model_ema_decay:g}' if args.model_ema else 'none'
    rows.append(('weight average', average))
    rows.append(('seed', str(args.seed)))
    rows.append(('data', f'{len(data.train.dataset)} training, {len(data.eval.dataset)} validation images'))
    rows.append(('loader workers', '{} ({})'.format(*resolve_workers(args, data.train.dataset))))
    rows.append(('device', f'{runtime.device}, world size {runtime.world_size}'))
    python = platform.python_version()
    rows.append(
        ('versions', f'timm_pe {__version__}, timm {timm.__version__}, torch {torch.__version__}, Python {python}')
    )
    return rows


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
        self.bar = tqdm(total=total, desc=what, unit='batch', leave=False, dynamic_ncols=True, disable=not live)

    def update(
        self,
        done: int,
        terms: Mapping[str, float] | None = None,
        images_per_s: float | None = None,
        lr: float | None = None,
    ) -> None:
        """Say that `done` batches are done; now and then with loss terms, speed and learning rate."""
        self.bar.update(done - self.bar.n)
        if terms is None:
            return
        shown = [*(f'{name}: {value:#.4g}' for name, value in terms.items()), f'{images_per_s:.4g} images/s']
        text = '  '.join(shown if lr is None else [*shown, f'lr: {lr:.3e}'])
        self.bar.set_postfix_str(text)
        if self.lines:
            left = (time.perf_counter() - self.start) / done * (self.total - done)
            share = 100 * done / max(self.total, 1)
            _logger.info(f'{self.what} [{done:>4d}/{self.total} ({share:>3.0f}%)]  {text}  left: {_duration(left)}')

    def close(self) -> None:
        """Take the bar off the terminal."""
        self.bar.close()


def _duration(seconds: float) -> str:
    return f'{int(seconds) // 3600:d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'


def write_summary(
    path: str,
    epoch: int,
    train_metrics: Mapping[str, float],
    eval_metrics: Mapping[str, float | str],
    lr: float,
) -> None:
    """Append an epoch to summary.csv; an epoch without validation has empty metrics."""
    columns = ['epoch', *(f'train_{k}' for k in train_metrics), *(f'eval_{k}' for k in eval_metrics), 'lr']
    _move_aside_other_columns(path, columns)
    with _changed(path) as changed:
        update_summary(epoch, train_metrics, eval_metrics, filename=changed, lr=lr)


def read_summary(path: str | os.PathLike) -> dict[int, dict[str, float | None]]:
    """Rows of summary.csv by their epoch, those of files that were moved aside included; None where an epoch has no value.

    Raises:
        UsageError: A file that cannot be read.
    """
    rows = {}
    for file in [*sorted(glob.glob(f'{glob.escape(os.fspath(path))}.until-*')), path]:
        try:
            with open(file, newline='', encoding='utf-8') as f:
                for row in csv.DictReader(f):
                    numbers = {k: float(v) if v else None for k, v in row.items()}
                    rows[int(numbers['epoch'] or 0)] = numbers
        except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as e:
            raise UsageError(f"cannot read '{file}' ({one_line(e, 160)})") from e
    return dict(sorted(rows.items()))


def cut_summary(path: str, start_epoch: int) -> None:
    """Drop the rows of summary.csv from an epoch on: a resumed run writes them again."""
    if os.path.exists(path):
        with _changed(path) as changed:
            trim_summary(changed, start_epoch)


@contextlib.contextmanager
def _changed(path: str) -> Iterator[str]:
    """A copy to change, which then takes the place of the file at once."""
    with replaced(path) as copy:
        if os.path.exists(path):
            shutil.copyfile(path, copy)
        else:
            open(copy, 'w').close()
        yield copy


def _move_aside_other_columns(path: str, columns: list[str]) -> None:
    """A run that goes on with other loss terms starts a new file: a CSV has one header."""
    if not os.path.exists(path):
        return
    with open(path, newline='', encoding='utf-8') as f:
        header = next(csv.reader(f), None)
    if header not in (None, columns):
        aside = f'{path}.until-{time.strftime("%Y%m%d-%H%M%S")}'
        os.replace(path, aside)
        _logger.warning(f"The columns of '{path}' have changed: its rows so far are in '{aside}'.")

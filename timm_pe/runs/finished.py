"""Finished runs, as the report, the model card and the benchmarks read them."""

import argparse
import difflib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ..config.declare import declared_in, default_of
from ..config.derive import ranked_by
from ..config.run_config import RunConfig
from ..errors import UsageError, one_line
from ..run_folder import RunFolder
from ..train.checkpoints import best_epoch, saved_ranks

# keys of an analysis.json that the report reads
_KEYS = {
    'checkpoint',
    'epoch',
    'validation',
    'class_names',
    'compared_with',
    'teacher_weights',
    'calibration',
    'samples',
}


@dataclass
class Run:
    """A run folder of train_distill, as the report needs it.

    Attributes:
        folder: Where it is.
        name: Its name in the report: the folder's name, with its parents' if two have the same.
        args: args.yaml.
        rows: summary.csv, one dict of numbers per epoch; None for a missing value.
        analysis: analysis.json, or None.
    """

    folder: RunFolder
    name: str
    args: dict[str, Any]
    rows: list[dict[str, float | None]]
    analysis: dict[str, Any] | None = None

    @property
    def validated(self) -> list[dict[str, float | None]]:
        """The rows of epochs that were validated."""
        return [row for row in self.rows if row.get('eval_top1') is not None]

    @property
    def has_labels(self) -> bool:
        """Whether it was trained with labels."""
        return not self.args.get('unlabeled') or any(self.args.get(k) for k in ('data', 'data_dir', 'dataset'))

    @property
    def data_folders(self) -> list[str]:
        """The folders of its images, as they were given; none for a data set that needs no folder."""
        if not self.has_labels:
            return list(self.args['unlabeled'])
        folder = self.args.get('data_dir') or self.args.get('data')
        return [folder] if folder else []

    @property
    def final(self) -> dict[str, float | None]:
        """The last validated row; empty if there is none."""
        return self.validated[-1] if self.validated else {}

    @property
    def best(self) -> dict[str, float | None]:
        """The first row of the highest top-1; empty if none was validated."""
        return max(self.validated, key=lambda row: cast(float, row['eval_top1']), default={})

    def epochs_to(self, top1: float) -> int | None:
        """After how many epochs its top-1 was first as high as this, of those that were validated; None if it never was."""
        reached = (row for row in self.validated if cast(float, row['eval_top1']) >= top1)
        return next((int(cast(float, row['epoch'])) + 1 for row in reached), None)

    @property
    def highest_rate(self) -> float | None:
        """The highest learning rate of its epochs; None if it does not tell."""
        return max((rate for row in self.rows if (rate := row.get('lr')) is not None), default=None)

    @cached_property
    def ranks(self) -> int | None:
        """Number of ranks that trained it, each with a batch of its own; None if its newest checkpoint does not say."""
        return saved_ranks(self.folder)

    @cached_property
    def ranking(self) -> str:
        """The metric by which its epochs are ranked."""
        known = declared_in(RunConfig)  # args.yaml of an earlier commit may have others
        return ranked_by(RunConfig(**{name: value for name, value in self.args.items() if name in known}))

    @cached_property
    def ranked(self) -> list[dict[str, float | None]]:
        """The rows of the epochs that were validated by that metric."""
        metric = f'eval_{self.ranking}'
        return [row for row in self.rows if (value := row.get(metric)) is not None and not math.isnan(value)]

    @property
    def highest(self) -> dict[str, float | None]:
        """The first of its best rows by that metric; empty without one."""
        sign = -1 if self.ranking == 'loss' else 1
        return max(self.ranked, key=lambda row: sign * cast(float, row[f'eval_{self.ranking}']), default={})

    @cached_property
    def exported(self) -> dict[str, float | None]:
        """The row of the weights in student.safetensors; empty if no epoch was validated.

        That is the epoch of model_best.pth.tar, or if that file is gone, the first of the best rows.
        """
        kept = best_epoch(self.folder)
        return next((row for row in self.ranked if row['epoch'] == kept), self.highest)

    @property
    def planned(self) -> int:
        """Number of epochs that it is to have; 0 if it does not say."""
        return self.args.get('stop_epoch') or _scheduled_epochs(self.args)

    @property
    def unfinished(self) -> str:
        """How far an unfinished run has come; '' for a finished run."""
        planned = self.planned
        done = int(cast(float, self.rows[-1]['epoch'])) + 1 if self.rows else 0
        return f'{done} of {planned} epochs' if planned and done < planned else ''

    @property
    def teacher(self) -> str | None:
        """Name of its teacher's model, of several 'resnet34 + resnet50'; None for a run without one."""
        given = self.args.get('teacher') or self.args.get('kd_model_name')
        return ' + '.join(map(str, given)) if isinstance(given, list) else given

    @cached_property
    def seconds(self) -> float | None:
        """Duration by the files' times: args.yaml is written at the start, summary.csv at the end.

        None for a resumed run, and if the times can't be those of the run (a copy, or a clone).
        """
        if self.args.get('resume'):
            return None
        seconds = self.folder.summary_file.stat().st_mtime - self.folder.args_file.stat().st_mtime
        speeds = [row.get('train_images_per_s') or math.inf for row in self.rows]
        return seconds if seconds > sum(self.args.get('batch_size', 1) / speed for speed in speeds) else None

    @cached_property
    def params(self) -> int | None:
        """Parameters of the student, as the analysis counted them, else counted in student.safetensors."""
        if self.analysis and self.analysis.get('params'):
            return self.analysis['params']
        try:
            with safe_open(self.folder.student_file, 'pt') as f:
                names = [n for n in f.keys() if 'running_' not in n and 'num_batches_tracked' not in n]  # noqa: SIM118
                return sum(math.prod(f.get_slice(n).get_shape()) for n in names)
        except (OSError, SafetensorError):
            return None


def _scheduled_epochs(args: Mapping[str, Any]) -> int:
    """Number of epochs of a run's schedule, as timm counts them: with cycles, warmup prefix and cooldown."""
    settings = {name: args.get(name, default_of(RunConfig, name)) for name in declared_in(RunConfig)}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        kwargs = scheduler_kwargs(
            argparse.Namespace(**{**settings, 'sched_on_updates': False}), decreasing_metric=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # timm's own of a plateau
            return int(create_scheduler_v2(optimizer, **kwargs)[1])
    except (TypeError, ValueError, AssertionError, ArithmeticError):  # settings that no run has had
        return 0


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """The runs in `folders`, in that order.

    Raises:
        UsageError: No folder given, one given twice, or one that is no run folder (see `read_run`).
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UsageError(f"RUN '{folders[i]}' is given twice: give each run once")
    return [read_run(RunFolder(path), name) for path, name in zip(paths, _distinct_names(paths), strict=True)]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that distinguishes it from the others."""
    names = []
    for path in paths:
        others = [p for p in paths if p != path]
        depth = next(n for n in range(1, len(path.parts) + 1) if all(p.parts[-n:] != path.parts[-n:] for p in others))
        names.append(''.join(c if c.isprintable() else '\ufffd' for c in '/'.join(path.parts[-depth:])))
    return names


def read_run(folder: RunFolder, name: str) -> Run:
    """A run folder's args.yaml, summary.csv and, if it is there, analysis.json.

    Raises:
        UsageError: Not a run folder, files that can't be read, a run without epochs or of multi-label data.
    """
    missing = folder.missing(folder.args_file, folder.summary_file)
    if not folder.path.is_dir():
        beside = [path.name for path in folder.path.parent.glob('*') if path.is_dir()]
        near = difflib.get_close_matches(folder.path.name, beside, n=3)
        raise UsageError(
            f"RUN '{folder.path}': no such folder{', did you mean ' + ' or '.join(near) + '?' if near else ''}"
        )
    if missing:
        raise UsageError(f"RUN '{folder.path}' is no run folder of train_distill: it has no {' and no '.join(missing)}")
    try:
        args, rows = folder.args(), list(folder.rows_by_epoch().values())
        analysis = _read_analysis(folder, rows) if rows else None
    except (OSError, ValueError, TypeError) as e:
        raise UsageError(f"RUN '{folder.path}' cannot be read: {one_line(e, 160)}") from e
    if args.get('task') == 'multilabel':
        raise UsageError(
            f"RUN '{folder.path}' is of --task multilabel: the report compares top-1, which it does not have"
        )
    if not rows:
        raise UsageError(f"RUN '{folder.path}': {folder.summary_file.name} holds no epoch yet, train at least one")
    return Run(folder, name, args, rows, analysis)


def _read_analysis(folder: RunFolder, rows: Sequence[Mapping[str, float | None]]) -> dict[str, Any] | None:
    """analysis.json; None if it is missing, of another version, or of an earlier run in the folder."""
    path = folder.analysis_file
    if not path.is_file():
        return None
    analysis = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(analysis, dict) or not set(analysis) >= _KEYS:
        return None
    row = next((row for row in rows if row['epoch'] == analysis['epoch']), {})
    if analysis['checkpoint'] == 'last' and row is not rows[-1]:
        return None
    if path.stat().st_mtime >= folder.summary_file.stat().st_mtime:
        return analysis
    # it is older, or both files were copied: then the times say nothing, but the numbers agree
    top1, analysed = row.get('eval_top1'), analysis['validation']
    return analysis if top1 is not None and analysed and abs(top1 - analysed['top1']) < 0.05 else None

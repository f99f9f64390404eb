"""Builds the parts of a run from its settings: the only place that defines the order of the stages."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch.nn as nn
from timm.task import TrainingTask
from torch.utils.data import Dataset

from ..config.run_config import RunConfig
from ..data.datasets import check_data, create_datasets
from ..data.knn_data import check_knn_data
from ..data.loaders import Data, create_data
from ..errors import UsageError
from ..method.teacher import Teacher
from ..process.folder_lock import OTHER_ENDS, FolderLock
from ..process.runtime import Runtime, ranks_together, setup_runtime
from ..run_folder import RunFolder
from .checkpoints import continued_folder, find_resume, keeps_teacher_size, named_folder
from .from_run import warn_of_other_normalization
from .learnt_classes import warn_of_kept_classifier
from .run_task import create_run_task
from .run_teachers import create_run_teachers
from .student import check_names, choose_num_classes, create_student, input_channels
from .task_loss import check_loss_weights


@dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes:
        config: Its settings.
        runtime: Device, ranks, precision.
        student: The model to train. With a task it is on its device, else on the CPU.
        datasets: Training split (None with --evaluate) and validation split.
        data: Their loaders.
        teachers: The teachers, none without --teacher.
        task: The task, or None (see `build`).
        checkpoint: The training checkpoint of --resume, '' for a fresh run.
    """

    config: RunConfig
    runtime: Runtime
    student: nn.Module
    datasets: tuple[Dataset[Any] | None, Dataset[Any]]
    data: Data
    teachers: list[Teacher]
    task: TrainingTask | None
    checkpoint: str = ''

    @property
    def num_classes(self) -> int:
        """The student's classes."""
        return cast(int, self.student.num_classes)

    @property
    def training_task(self) -> TrainingTask:
        """The task of a run that trains, which has one."""
        if self.task is None:
            raise RuntimeError('this run has no task: it does not train')
        return self.task


def build(
    config: RunConfig,
    training: bool = True,
    hints: Mapping[str, str] | None = None,
    weights: str = '',
    lock: FolderLock | None = None,
) -> Parts:
    """Build the parts of a run; with --evaluate neither teacher nor task.

    The order matters: cheap checks come first, and each stage continues the seeded random state of the one before, so
    that a rebuilt run is the same.

    Args:
        config: The settings.
        training: False for reading a finished run: no training loader, and no task without a teacher.
        hints: What a user can do about an error of the 'data' or of the 'teacher'.
        weights: File of the weights that the student will get, '' for those of the settings.
        lock: Holds the folder of a run that trains, from before its newest checkpoint is looked for.

    Raises:
        UsageError: A setting, a file or a data set that does not fit.
    """
    hints = hints or {}
    if training:
        check_names(config)
    with hint(hints.get('data')):
        check_data(config)
    if training and not config.evaluate:
        check_knn_data(config)
        check_loss_weights(config, config.num_classes)
    runtime = setup_runtime(config)
    if lock is not None and not config.evaluate:
        _take_folder(config, runtime, lock)
    checkpoint = find_resume(config) if training else ''
    channels = input_channels(config)
    with hint(hints.get('data')):
        datasets = create_datasets(config, channels)
    weights, flag = weights or checkpoint or config.evaluate, '--evaluate' if config.evaluate else '--resume'
    student = create_student(config, choose_num_classes(config, datasets[1], weights, flag))
    if student.in_chans != channels:
        raise UsageError(
            f'--model {config.model} has {student.in_chans} input channels: add --in-chans {student.in_chans}'
        )
    data = create_data(config, (datasets[0] if training else None, datasets[1]), student, runtime)
    if config.evaluate:
        return Parts(config, runtime, student, datasets, data, [], None)
    if training and not checkpoint:
        warn_of_other_normalization(config, data.config['mean'], data.config['std'])
        warn_of_kept_classifier(config, student, datasets[0])
    with hint(hints.get('teacher')):
        teachers = create_run_teachers(config, data, runtime, not keeps_teacher_size(weights))
    task = create_run_task(config, student, teachers, data.config, runtime) if training or teachers else None
    return Parts(config, runtime, student, datasets, data, teachers, task, checkpoint)


def _take_folder(config: RunConfig, runtime: Runtime, lock: FolderLock) -> None:
    """Hold the run's folder if there is one; a process that is about to end in it may write another checkpoint."""
    path = named_folder(config) or continued_folder(config)
    with ranks_together(runtime):
        if runtime.is_primary and path:
            folder = RunFolder(path)
            if os.path.isfile(folder.args_file) or (config.resume and os.path.isdir(path)):
                lock.take(folder.path, OTHER_ENDS)


@contextmanager
def hint(text: str | None) -> Iterator[None]:
    """Append a hint to a `UsageError`."""
    try:
        yield
    except UsageError as e:
        raise UsageError(f'{e} ({text})' if text else str(e)) from e

"""The student of a finished run for export: its best weights in a plain model."""

import logging
import os
from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import Any, cast

import torch.nn as nn
from timm.data.model_config import resolve_input_data_config
from timm.models import model_entrypoint
from torch.utils.data import Dataset

from ..config.derive import given_classes
from ..config.rules import COLUMN_KINDS, data_kind
from ..config.run_config import RunConfig
from ..data.datasets import create_datasets
from ..errors import UsageError, one_line
from ..method.weight_files import classes_in_checkpoint, load_weights, read_state_dict
from ..run_folder import RunFolder
from ..train.learnt_classes import saved_classes
from ..train.student import create_student
from .finished import Run
from .reopen import read_class_names, without_weights

_logger = logging.getLogger(__name__)


@dataclass
class Student:
    """The exported parts of a run.

    Attributes:
        run: The run, as the report knows it.
        model: The student with its best weights, in eval mode on the CPU.
        data_config: input_size, mean, std, interpolation, crop_pct of its validation.
        label_names: One per class, or None if unknown.
        package: The package whose import registers the architecture, 'timm' for timm's own.
        images: Number of images it was validated on, None if they are not available.
    """

    run: Run
    model: nn.Module
    data_config: dict[str, Any]
    label_names: list[str] | None
    package: str
    images: int | None = None

    @property
    def architecture(self) -> str:
        """Its name in timm's registry."""
        return _architecture(self.model)


def _architecture(model: nn.Module) -> str:
    return cast(dict[str, str], model.pretrained_cfg)['architecture']


def read_student(folder: str | os.PathLike[str], data_dir: str | None = None) -> Student:
    """Rebuild the student of a finished run.

    Args:
        folder: Run folder of train_distill.
        data_dir: Where its data is now; None means where it was. It gives the class names and the number of validation
            images.

    Raises:
        UsageError: Not a run folder, a run without a trained student, or weights that do not fit.
    """
    run_folder = RunFolder(folder)
    missing = run_folder.missing(run_folder.args_file, run_folder.summary_file, run_folder.student_file)
    if missing:
        raise UsageError(
            f"RUN '{run_folder.path}' is no run folder of train_distill with a trained student: it has no {missing[0]}"
        )
    config = run_folder.config()
    run = Run(run_folder, run_folder.name, config.as_dict(), list(run_folder.rows_by_epoch().values()))
    # the weights are those of the run; nothing else may be fetched or change them
    config = replace(without_weights(config), data_dir=data_dir or config.data_dir)
    weights = read_state_dict(run_folder.student_file, 'RUN')
    learnt = saved_classes(run_folder) or {}
    classes: int | None = 0
    if config.has_labels:
        known = given_classes(config) or classes_in_checkpoint(config.model, weights)
        classes = known or max(learnt.values(), default=-1) + 1 or None
    model = create_student(config, classes).eval()
    load_weights(model, weights, 'RUN', str(run_folder.student_file))
    try:
        data_config = resolve_input_data_config(model, args=config.as_dict())
    except ValueError as e:
        raise UsageError(f"RUN '{run_folder.path}': {one_line(e)}") from e
    module = model_entrypoint(_architecture(model)).__module__
    dataset = _open_validation(config, model)
    names = _read_label_names(run_folder, dataset, cast(int, model.num_classes))
    return Student(run, model, data_config, names, module.split('.')[0], len(cast(Sized, dataset)) if dataset else None)


def _open_validation(config: RunConfig, model: nn.Module) -> Dataset[Any] | None:
    """The split that the run was validated on; None if it is not available."""
    # those of columns would need the network for their class names
    if data_kind(config) in COLUMN_KINDS or not config.has_labels:
        return None
    try:
        return create_datasets(replace(config, evaluate='RUN', dataset_download=False), cast(int, model.in_chans))[1]
    except UsageError as e:
        _logger.warning(f'What the data tell is left out of the card: {e} (--data-dir PATH says where they are now)')
        return None


def _read_label_names(folder: RunFolder, dataset: Dataset[Any] | None, num_classes: int) -> list[str] | None:
    """Class names in order: those that the run has learnt, as its data may have changed; else those of the data."""
    learnt = {label: name for name, label in (saved_classes(folder) or {}).items()}
    if learnt:
        return _named([learnt.get(c, str(c)) for c in range(num_classes)])
    return None if dataset is None else _named(read_class_names(dataset, num_classes))


def _named(names: list[str]) -> list[str] | None:
    return None if names == [str(c) for c in range(len(names))] else names

"""The classes that weights have learnt, as their run or their configuration names them, beside those of the data."""

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch.nn as nn
from timm.utils import unwrap_model
from torch.utils.data import Dataset

from ..config.declare import name_of
from ..config.run_config import RunConfig
from ..config.teachers import OneTeacher
from ..data.datasets import class_map_of, describe_other_class
from ..errors import UsageError
from ..method.teacher import Teacher
from ..run_folder import RunFolder
from .position import peek_run_state

_logger = logging.getLogger(__name__)


def saved_classes(folder: RunFolder) -> dict[str, int] | None:
    """The class names of a run's training data and their labels, as its newest checkpoint has them; None if unknown."""
    for file in (folder.last_file, folder.best_file):
        state = peek_run_state(file)
        if state and state.meaning.get('classes'):
            return cast(dict[str, int], state.meaning['classes'])
    return None


def _named_classes(model: nn.Module, data: Mapping[str, int] | None) -> dict[str, int] | None:
    """Those that the configuration of a pretrained model names, as an export or the hub has them; None if unknown.

    Names none of which the data knows are of another vocabulary, and say nothing.
    """
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or ()
    try:
        labelled = names.items() if isinstance(names, Mapping) else enumerate(names)
        classes = {str(name): int(label) for label, name in labelled}
    except (TypeError, ValueError):  # a config.json may hold anything
        return None
    # two classes of one name, as ImageNet's cranes, cannot be told apart
    of_model = len(classes) == model.num_classes
    return classes if of_model and classes.keys() & (data or {}).keys() else None


def other_class_of_teacher(flags: OneTeacher, teacher: Teacher, dataset: Dataset[Any] | None) -> str:
    """The first class in which a teacher and the data differ; '' if none or unknown."""
    data, folder = class_map_of(dataset), RunFolder.around(flags.checkpoint)
    if folder is not None:
        return describe_other_class(saved_classes(folder), data)
    as_named = flags.pretrained and not flags.checkpoint
    return describe_other_class(_named_classes(unwrap_model(teacher.model), data), data) if as_named else ''


def check_learnt_classes(folder: RunFolder, dataset: Dataset[Any], what: str) -> None:
    """Refuse data whose classes, or their order, differ from those that a run has learnt.

    Raises:
        UsageError: The message begins with `what` and names the first class that differs.
    """
    other_class = describe_other_class(saved_classes(folder), class_map_of(dataset))
    if other_class:
        raise UsageError(
            f"{what}: the data has other classes than the run '{folder.path}' has learnt ({other_class}): give data of the "
            f'same classes'
        )


def warn_of_kept_classifier(config: RunConfig, student: nn.Module, dataset: Dataset[Any] | None) -> None:
    """Say where a student starts with a classifier of as many classes that were others.

    Args:
        config: Run settings.
        student: The student as it starts.
        dataset: Its training images.
    """
    data = class_map_of(dataset)
    # the last one that gives weights
    given = [name for name in ('initial_checkpoint', 'pretrained_path') if getattr(config, name)]
    if given:
        flag, folder = name_of(given[0]), RunFolder.around(getattr(config, given[0]))
        classes = None if folder is None else saved_classes(folder)
    else:
        flag, classes = '--model', _named_classes(student, data) if config.pretrained else None
    other_class = describe_other_class(classes, data)
    kept = classes is not None and len(classes) == student.num_classes and config.head_init_scale != 0
    if other_class and kept:
        _logger.warning(
            f'{flag}: its weights have learnt other classes ({other_class}), and the student keeps their classifier. '
            f'--head-init-scale 0 starts a new one.'
        )

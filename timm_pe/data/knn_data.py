"""The labelled images of --knn-data: two splits that only measure features."""

import logging
import os
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..config.flags import DataFlags
from ..config.run_config import RunConfig
from ..errors import UsageError
from .datasets import count_classes, create_datasets
from .fingerprint import list_files
from .folders import find_split, name_some
from .same_files import find_same

_logger = logging.getLogger(__name__)

_WHAT = 'give one that holds train and val, each with class folders'


def check_knn_data(flags: DataFlags) -> None:
    """Refuse a --knn-data that is no folder of two splits, before anything is built.

    Raises:
        UsageError: The message names what is missing.
    """
    root = flags.knn_data
    if not root:
        return
    if not os.path.isdir(root):
        raise UsageError(f"--knn-data: no folder '{root}': {_WHAT}")
    for split in ('train', 'validation'):
        if find_split(root, split) is None:
            held = name_some(sorted(name for name in os.listdir(root) if not name.startswith('.'))) or 'nothing'
            raise UsageError(f"--knn-data: no folder for split '{split}' in '{root}', it has {held}: {_WHAT}")


def open_knn_data(config: RunConfig, in_chans: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """The two splits of --knn-data, whose classes are at least two.

    Args:
        config: Run settings; --class-depth and --input-img-mode hold here too.
        in_chans: Channels that the student sees.

    Raises:
        UsageError: They cannot be opened, or are of one class.
    """
    flags = RunConfig(data_dir=config.knn_data, class_depth=config.class_depth, input_img_mode=config.input_img_mode)
    try:
        train, evaluation = create_datasets(flags, in_chans)
    except UsageError as e:
        raise UsageError(f'--knn-data: {e}') from e
    assert train is not None
    if (count_classes(train) or 0) < 2:
        raise UsageError(
            f"--knn-data: '{config.knn_data}' holds one class alone, so every neighbour is of it: give images of two or more"
        )
    return train, evaluation


def warn_of_trained(evaluation: Dataset[Any], train: Dataset[Any] | None) -> None:
    """Warn of validation images of --knn-data that the student trains on, as links to the same files or as copies.

    Args:
        evaluation: The validation images of --knn-data.
        train: The images to train on.
    """
    paths, trained = list_files(evaluation), list_files(train) if train is not None else None
    if paths is None or trained is None:
        return
    same = np.flatnonzero(find_same(paths, trained) >= 0)
    if len(same):
        _logger.warning(
            f'{len(same)} of the {len(paths)} validation images of --knn-data are also images to train on, the first is '
            f"'{paths[same[0]]}': the top-1 of neighbours and linear probe is measured on images that the student has seen."
        )

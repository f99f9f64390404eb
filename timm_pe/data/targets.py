"""Checks of a data set's labels as they are read; each error is one line, in a loader process too."""

from typing import Any

import torch
from timm.data.target_transforms import MultiLabelTarget

from ..errors import UsageError, one_line


class ClassTarget:
    """Checks an image's single label, for data sets whose classes are unknown.

    Args:
        num_classes: Classes of the student.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, target: Any) -> int:
        """The label as an int.

        Raises:
            UsageError: It is not a single label, or the student has no such class.
        """
        try:
            label = int(target)
        except (TypeError, ValueError) as e:
            raise UsageError(
                f'an image has the target {target!r:.100}, not one label: --task multilabel takes several, --target-key '
                f'another column'
            ) from e
        if not 0 <= label < self.num_classes:
            raise UsageError(f'the data has label {label}, the student {self.num_classes} classes: see --num-classes')
        return label


class MultiLabelTargets(MultiLabelTarget):
    """timm's multi-hot vector `[c]` of an image's labels, with errors as `UsageError`.

    Args:
        num_classes: c, the classes of the student.
        dense: Whether targets already are vectors of 0 and 1, not class indices.
    """

    def __call__(self, target: Any) -> torch.Tensor:
        """The vector.

        Raises:
            UsageError: Labels that do not fit, or a vector of 0 and 1 instead of indices.
        """
        try:
            found: torch.Tensor = super().__call__(target)
        except (ValueError, TypeError, RuntimeError) as e:
            raise UsageError(
                f'--task multilabel: the targets of the data set do not fit: {one_line(e)} (got {target!r:.100})'
            ) from e
        # read as indices, they would name only classes 0 and 1, several times
        values = torch.as_tensor(target)
        if not self.dense and self.num_classes > 2 and len(values) == self.num_classes and int(values.max()) <= 1:
            raise UsageError(
                f'--task multilabel: an image has the target {target!r:.100}, a vector of 0 and 1: add --target-format multihot'
            )
        return found
